"""Likelihoods of 8 bits: probabilities of 256 levels that sum to 1, their samples, and bits per dimension."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from small import fit, weights
from test_steps import agree, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.conditionals import OptimalScale, unbounded
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.pixels import Categorical, DiscretisedLogistic, LogisticMixture, bits_per_dimension
from ppl_vae.rng import seeded
from ppl_vae.transforms import LEVELS, dequantise

LEVEL = torch.arange(256, dtype=torch.float64) / 255
D, K = 6, 3
KINDS = {
    "categorical": (256, lambda net, dim: Categorical(net, event_dim=dim)),
    "logistic": (1, lambda net, dim: DiscretisedLogistic(net, 0.05, event_dim=dim)),
    "logistic, by the net": (2, lambda net, dim: DiscretisedLogistic(net, pv.NetScale(), event_dim=dim)),
    "mixture": (3 * K, lambda net, dim: LogisticMixture(net, K, event_dim=dim)),
    "coupled": (10 * K / 3, lambda net, dim: LogisticMixture(net, K, coupled=True, event_dim=dim)),
}
kinds = pytest.mark.parametrize("name", KINDS)
apart = pytest.mark.parametrize("name", [name for name in KINDS if name != "coupled"])


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def made(name, net=None, event=(D,)):
    """A likelihood, and how many numbers its net gives along the first event dimension."""
    numbers, make = KINDS[name]
    return make(nn.Identity() if net is None else net, len(event)), round(numbers * event[0])


def at_random(name, *lead, event=(D,)):
    """A likelihood's distribution for random numbers of the net, spread over black, grey and white."""
    likelihood, width = made(name, event=event)
    raw = torch.randn(*lead, width, *event[1:], dtype=torch.float64)
    return likelihood(raw if name == "categorical" else raw * 1.5 - 1.0)


def levels(*shape):
    return torch.randint(0, 256, shape) / torch.tensor(255.0, dtype=torch.float64)


@apart
def test_probabilities_sum_to_one_and_give_the_mean(name):
    law = at_random(name, 4).base_dist
    x = LEVEL[:, None, None].expand(-1, 4, D)
    chances = law.log_prob(x).exp()
    assert law.batch_shape == (4, D)
    torch.testing.assert_close(chances.sum(0), torch.ones(4, D, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close((x * chances).sum(0), law.mean, rtol=1e-6, atol=1e-12)
    assert law.mean.std() > 0.02


@apart
def test_samples_are_levels_and_agree_with_probabilities(name):
    n = 20_000
    law = at_random(name).base_dist
    drawn = law.sample((n,))
    assert drawn.shape == (n, D)
    assert LEVELS.check(drawn).all()
    spread = drawn.std(0).clamp(min=1 / 255)
    assert ((drawn.mean(0) - law.mean).abs() < 5 * spread / n**0.5).all()
    for low, high in ((0, 1), (1, 128), (128, 255), (255, 256)):
        x = LEVEL[low:high, None].expand(-1, D)
        chance = law.log_prob(x).exp().sum(0)
        share = ((255 * drawn).round() >= low) & ((255 * drawn).round() < high)
        assert ((share.double().mean(0) - chance).abs() < 5 * (chance * (1 - chance) / n).sqrt() + 1e-9).all()
    expanded = law.expand((50, D)).sample()
    assert expanded.shape == (50, D)
    assert (expanded[1:] != expanded[0]).any()


@kinds
@pytest.mark.parametrize("event", [(6,), (3, 2), (3, 2, 2)])
def test_shapes_under_particles_and_for_pictures(name, event):
    law = at_random(name, 5, 4, event=event)
    assert (law.batch_shape, law.event_shape) == ((5, 4), event)
    x = levels(4, *event)
    assert law.log_prob(x).shape == (5, 4)
    torch.testing.assert_close(law.log_prob(x)[2], law.log_prob(x.expand(5, -1, *event))[2])
    assert law.sample((2,)).shape == (2, 5, 4, *event)


@kinds
def test_flattened_pictures_have_the_same_probabilities(name):
    event = (3, 2, 2)
    likelihood, width = made(name, event=event)
    flat, _ = made(name, event=(12,))
    raw, x = torch.randn(4, width, 2, 2), levels(4, *event)
    torch.testing.assert_close(likelihood(raw).log_prob(x), flat(raw.flatten(1)).log_prob(x.flatten(1)))


def test_the_categorical_has_any_probabilities():
    chances = torch.rand(256, D, dtype=torch.float64)
    law = Categorical(nn.Identity())(chances.log().flatten())
    x = levels(D)
    index = (255 * x).round().long()
    by_hand = (chances / chances.sum(0)).log()[index, torch.arange(D)].sum()
    torch.testing.assert_close(law.log_prob(x), by_hand)
    torch.testing.assert_close(law.log_prob(x.float().double()), by_hand)  # as bytes are presented


def logistic(x, loc, scale):
    """Scipy's masses around levels, all beyond included at 0 and 1."""
    law = stats.logistic(loc, scale)
    below = np.where(x > 1 - 1e-3, 1.0, law.cdf(x + 0.5 / 255))
    return below - np.where(x < 1e-3, 0.0, law.cdf(x - 0.5 / 255))


def test_the_logistic_has_the_masses_around_levels():
    loc = torch.tensor([-0.3, 0.0, 0.2, 0.71, 1.0, 1.1], dtype=torch.float64)
    for scale in (0.002, 0.05, 2.0):
        law = DiscretisedLogistic(nn.Identity(), scale)(loc).base_dist
        x = LEVEL[:, None].expand(-1, D)
        np.testing.assert_allclose(law.log_prob(x).exp(), logistic(x.numpy(), loc.numpy(), scale), atol=1e-8)


def test_far_from_its_location_a_level_keeps_its_slope():
    """There differences of sigmoids are zero in floating point: log p falls by 1 / scale for each unit."""
    loc = torch.tensor([0.2], requires_grad=True)
    law = DiscretisedLogistic(nn.Identity(), 0.001)(loc)
    value = law.log_prob(torch.tensor([204 / 255]))
    (slope,) = torch.autograd.grad(value, loc)
    edge = (203.5 / 255 - 0.2) / 0.001
    assert value.item() == pytest.approx(-edge + math.log(-math.expm1(-1 / 0.255)), rel=1e-5)
    assert slope.item() == pytest.approx(1000.0, rel=1e-5)


def test_a_mixture_is_the_sum_of_its_parts():
    raw = torch.randn(3, K, D, dtype=torch.float64)
    x = levels(D)
    scale = np.exp(7 * np.tanh(raw[2].numpy() / 7))
    by_hand = (raw[0].softmax(0).numpy() * logistic(x.numpy(), raw[1].numpy(), scale)).sum(0)
    law = LogisticMixture(nn.Identity(), K)(raw.flatten())
    np.testing.assert_allclose(law.log_prob(x), np.log(by_hand).sum(), rtol=1e-4)
    one = LogisticMixture(nn.Identity(), 1)(raw[:, 0].flatten())
    single = DiscretisedLogistic(nn.Identity(), pv.NetScale())(raw[1:, 0].flatten())
    torch.testing.assert_close(one.log_prob(x), single.log_prob(x))


def coupled(raw):
    """A pixel of three channels from ten rows of K numbers, (10, K)."""
    return LogisticMixture(nn.Identity(), raw.shape[1], coupled=True)(raw.flatten())


def test_coupled_channels_by_hand():
    raw, x = torch.randn(10, K, dtype=torch.float64), levels(3)
    r, g, b = x.numpy()
    weight, slopes = raw[0].softmax(0).numpy(), np.tanh(raw[7:].numpy())
    locs, scales = raw[1:4].numpy(), np.exp(7 * np.tanh(raw[4:7].numpy() / 7))
    green = locs[1] + slopes[0] * (r - 0.5)
    blue = locs[2] + slopes[1] * (r - 0.5) + slopes[2] * (g - 0.5)
    parts = [logistic(v, loc, s) for v, loc, s in zip((r, g, b), (locs[0], green, blue), scales, strict=True)]
    np.testing.assert_allclose(coupled(raw).log_prob(x), np.log((weight * np.prod(parts, 0)).sum()), rtol=1e-4)


def test_coupled_channels_sum_to_one_and_agree_with_samples():
    raw = torch.randn(10, K)
    raw[1:4] = 0.9 + 0.05 * raw[1:4].tanh()
    raw[4:7], raw[7:] = unbounded(torch.tensor(0.015).log()), 0.1 * raw[7:]
    law, levels = coupled(raw), LEVEL[128:].float()  # elsewhere there is next to nothing
    red, green = torch.meshgrid(levels, levels, indexing="ij")
    total, product, chance = 0.0, 0.0, 0.0
    for blue in levels:
        x = torch.stack([red, green, blue.expand(128, 128)], -1)
        p = law.log_prob(x).exp()
        total += p.sum().item()
        product += (p * red * blue).sum().item()
        chance += (p * (green > red) * (blue > 0.9)).sum().item()
    assert total == pytest.approx(1.0, abs=1e-4)
    n = 20_000
    drawn = law.sample((n,))
    assert LEVELS.check(drawn).all()
    r, g, b = drawn.unbind(-1)
    assert (r * b).mean().item() == pytest.approx(product, abs=5 * (r * b).std().item() / n**0.5)
    assert 0.01 < chance < 0.99
    both = ((g > r) & (b > 0.9)).float().mean().item()
    assert both == pytest.approx(chance, abs=5 * (chance * (1 - chance) / n) ** 0.5 + 1e-6)
    expanded = law.expand((5, 4))
    assert expanded.sample().shape == (5, 4, 3)
    torch.testing.assert_close(expanded.log_prob(drawn[:4]), law.log_prob(drawn[:4]).expand(5, 4))


def test_the_mean_of_coupled_channels_is_that_of_their_draws():
    raw = torch.randn(10, K)
    raw[1:4] = 0.5 + 0.1 * raw[1:4].tanh()
    raw[4:7] = unbounded(torch.tensor(0.02).log())
    law, n = coupled(raw), 40_000
    drawn = law.sample((n,))
    assert ((drawn.mean(0) - law.mean).abs() < 5 * drawn.std(0) / n**0.5 + 1e-5).all()
    assert law.expand((2,)).mean.shape == (2, 3)


@kinds
@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_extreme_outputs_give_finite_probabilities_and_gradients(name, extreme):
    likelihood, width = made(name)
    raw = torch.full((3, width), extreme, requires_grad=True)
    value = likelihood(raw).log_prob(torch.tensor([0.0, 0.2, 1.0])[:, None].expand(-1, D)).sum()
    value.backward()
    assert value.isfinite()
    assert raw.grad.isfinite().all()


# ---- bits


@kinds
def test_no_likelihood_of_levels_has_fewer_bits_than_none(name):
    """A probability is at most 1: a density would gain without end on constant pixels."""
    likelihood, width = made(name)
    raw = torch.zeros(width)
    raw[-width // 2 :] = -1e9  # as narrow as may be
    assert likelihood(raw).log_prob(torch.zeros(D)) <= 0


def test_a_uniform_distribution_has_eight_bits():
    assert bits_per_dimension(-784 * math.log(256), 784) == 8.0
    law = Categorical(nn.Identity())(torch.zeros(5, 256 * D, dtype=torch.float64))
    torch.testing.assert_close(bits_per_dimension(law.log_prob(levels(5, D)), D), torch.full((5,), 8.0).double())
    y = dequantise(levels(5, D))
    uniform = torch.distributions.Uniform(torch.zeros(D), 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(bits_per_dimension(uniform, D, dequantised=True), torch.full((5,), 8.0))
    with pytest.raises(ValueError, match="dims must be at least 1, got 0"):
        bits_per_dimension(0.0, 0)


def test_a_density_constant_on_each_level_has_the_bits_of_the_levels():
    chances = torch.rand(256, dtype=torch.float64)
    chances /= chances.sum()
    x = levels(1000, 1)
    law = Categorical(nn.Identity())(chances.log().expand(1000, 256))
    y = dequantise(x)
    density = (256 * chances[(256 * y).long()]).log().sum(-1)
    torch.testing.assert_close(
        bits_per_dimension(density, 1, dequantised=True), bits_per_dimension(law.log_prob(x), 1)
    )


def test_a_dequantised_density_has_no_fewer_bits_than_its_levels():
    """The logistic itself, on y, against its masses on levels, which Jensen's inequality puts above it."""
    loc, scale, x = 0.4, 0.004, LEVEL[:, None]
    y_law = stats.logistic(loc, scale)
    masses = y_law.cdf((np.arange(256) + 1) / 256) - y_law.cdf(np.arange(256) / 256)
    draws = torch.stack([dequantise(x) for _ in range(2000)])
    density = torch.from_numpy(y_law.logpdf(draws.numpy())).mean(0)
    ours = bits_per_dimension(density, 1, dequantised=True).squeeze()[80:125]
    theirs = bits_per_dimension(torch.from_numpy(np.log(masses[80:125])), 1)
    assert (ours > theirs - 1e-3).all()
    assert (ours - theirs).max() < 0.15


# ---- settings, data, the start


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        LogisticMixture(nn.Identity(), 0)
    for make in (Categorical, lambda net, event_dim: LogisticMixture(net, 2, event_dim=event_dim)):
        with pytest.raises(ValueError, match="event_dim must be at least 1, got 0"):
            make(nn.Identity(), event_dim=0)
    with pytest.raises(ValueError, match="scale must be a Scale, or a number positive and finite, got 0"):
        DiscretisedLogistic(nn.Identity(), 0)
    with pytest.raises(ValueError, match="scale: OptimalScale is the closed form for Normal alone"):
        DiscretisedLogistic(nn.Identity(), OptimalScale())
    with pytest.raises(ValueError, match=r"must give 256 numbers for each entry.*255 is no multiple"):
        Categorical(nn.Identity())(torch.zeros(255))
    with pytest.raises(ValueError, match=r"must give 10 numbers for each of 3 components.*31 is no multiple"):
        LogisticMixture(nn.Identity(), 3, coupled=True)(torch.zeros(31))


@kinds
def test_data_are_levels_in_all_rows(name):
    _, width = made(name)
    vae = around(made(name, pv.MLP(2, width))[0])
    x = levels(300, D).float()
    x[270, 2] = 0.5  # between 127 / 255 and 128 / 255, and beyond the first batch
    with pytest.raises(ValueError, match=r"takes pixels of 8 bits, 0, 1/255, \.\.\., 1, got 0\.5 in row 270"):
        fit(vae, x, epochs=1)


@kinds
@pytest.mark.parametrize("event", [(6,), (3, 2)])
def test_before_training_the_mean_is_near_the_datas(name, event):
    _, width = made(name, event=event)
    flat = pv.MLP(2, 8, width * math.prod(event[1:]))
    net = nn.Sequential(flat, nn.Unflatten(-1, (width, *event[1:])))
    likelihood, _ = made(name, net, event)
    mean = torch.linspace(0.3, 0.7, 6).reshape(event)
    x = ((mean + 0.1 * torch.randn(2000, *event)).clamp(0, 1) * 255).round() / 255
    likelihood.start_from(x)
    nn.init.zeros_(flat[-1].weight)
    law = likelihood(torch.zeros(4000, 2))
    drawn = law.sample()
    tolerance = 0.03 if name == "categorical" else 0.01
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=tolerance, rtol=0)
    if name not in ("logistic", "categorical"):  # a fixed scale, and counts that are drawn to the uniform
        assert 0.08 < drawn.std(0).mean() < 0.14
    assert law.log_prob(x[:1]).mean() > likelihood_of_noise(x[:1])


def likelihood_of_noise(x):
    return -x[0].numel() * math.log(256)


def around(likelihood):
    """A small VAE around a likelihood of D pixels."""
    return pv.VAE(pv.StandardNormal(2), likelihood, pv.mean_field(pv.MLP(D, 8, 4)))


@kinds
def test_they_train_on_bytes_and_evaluate(name):
    vae = around(made(name, pv.MLP(2, 8, made(name)[1]))[0])
    x = torch.randint(0, 256, (40, D), dtype=torch.uint8)
    before = weights(vae.likelihood)
    fit(vae, x, epochs=1, batch_size=20, compile="off")
    after = weights(vae.likelihood)
    assert all(not torch.equal(before[n], after[n]) for n, _ in vae.likelihood.named_parameters())
    bound = pv.log_likelihood(vae, x, particles=5).value
    assert (bits_per_dimension(bound, D) > 5).all()  # noise of 8 bits
    assert LEVELS.check(pv.sample(vae, 20)).all()
    assert pv.reconstruct(vae, x).shape == x.shape


@kinds
def test_captured_and_as_written(interpreted, name):
    pair, x = as_pair(around(made(name, pv.MLP(2, 8, made(name)[1]))[0])), levels(5, D).float()
    inspect(pair, (x,))
    agree(update_of(pair, pv.IWAE(3, estimator=pv.doubly)), x)
    assert len(interpreted) == 1
