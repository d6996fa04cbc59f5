"""Likelihoods of binary, bounded and real data: densities against scipy, extremes, starting from the mean."""

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
from ppl_vae.likelihoods import Beta, ContinuousBernoulli, StableContinuousBernoulli, StudentT
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("lead", [(5,), (7, 5)])
@pytest.mark.parametrize("event", [(6,), (1, 2, 3)])
def test_the_density_is_the_bernoullis(lead, event):
    net = nn.Sequential(pv.MLP(2, 8, 6), nn.Unflatten(-1, event))
    z, x = torch.randn(*lead, 2), torch.randint(0, 2, (*lead, *event)).float()
    law = pv.Bernoulli(net, event_dim=len(event))(z)
    assert (law.batch_shape, law.event_shape) == (lead, event)
    chance = torch.sigmoid(net(z)).detach().double().numpy()
    by_hand = stats.bernoulli(chance).logpmf(x.numpy()).reshape(*lead, -1).sum(-1)
    np.testing.assert_allclose(law.log_prob(x).detach().numpy(), by_hand, rtol=1e-5)
    torch.testing.assert_close(law.mean, torch.sigmoid(net(z)))


@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_extreme_logits_give_finite_densities_and_gradients(extreme):
    net = nn.Linear(2, 6)
    nn.init.constant_(net.bias, extreme)
    value = pv.Bernoulli(net)(torch.randn(4, 2)).log_prob(torch.eye(6)[:4]).sum()
    value.backward()
    assert value.isfinite()
    assert net.bias.grad.isfinite().all()


@pytest.mark.parametrize("event", [(4,), (1, 2, 2)])
def test_before_training_the_logits_are_those_of_the_clipped_mean(event):
    x = torch.tensor([[0.0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1]]).reshape(4, *event)
    flat = pv.MLP(2, 8, 4)
    bernoulli = pv.Bernoulli(nn.Sequential(flat, nn.Unflatten(-1, event)), event_dim=len(event))
    bernoulli.start_from(x)
    nn.init.zeros_(flat[-1].weight)
    mean = bernoulli(torch.randn(3, 2)).mean
    wanted = torch.tensor([0.001, 0.999, 0.25, 0.999]).reshape(event)
    torch.testing.assert_close(mean, wanted.expand(3, *event))


def test_a_net_of_another_width_is_refused():
    with pytest.raises(ValueError, match="gives 5 numbers, the data need 4"):
        pv.Bernoulli(pv.MLP(2, 5)).start_from(torch.ones(3, 4))


# ---- other scales of the data


def entries(law):
    """The distribution of single entries."""
    return law.base_dist


def integral(law, nodes):
    """∫ exp(log p) over nodes in (0, 1), of which each entry has the same, by the trapezoid rule."""
    x = nodes.reshape(-1, *(1 for _ in entries(law).batch_shape))
    density = entries(law).log_prob(x.expand(len(nodes), *entries(law).batch_shape)).exp()
    return torch.trapezoid(density, nodes, dim=0)


# Nodes that crowd at both ends, where densities may be steep.
NODES = (0.5 + 0.5 * torch.tanh(torch.linspace(-18, 18, 20001, dtype=torch.float64))).clamp(1e-15, 1 - 1e-15)
LOGITS = torch.tensor([0.0, 1e-4, -0.3, 0.59, 0.61, -2.0, 5.0, -15.0, 17.0, 40.0, -300.0], dtype=torch.float64)


def test_the_continuous_bernoulli_is_a_density_with_its_mean_at_any_logit():
    law = ContinuousBernoulli(nn.Identity())(LOGITS)
    torch.testing.assert_close(integral(law, NODES), torch.ones_like(LOGITS), rtol=1e-5, atol=0)
    x = NODES[:, None]
    mean = torch.trapezoid(x * entries(law).log_prob(x.expand(-1, len(LOGITS))).exp(), NODES, dim=0)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=0)
    # It is an exponential distribution, cut at 1: scipy's, turned around where it rises.
    rate = LOGITS[5:].abs().numpy()
    at = 0.3 + 0.4 * (LOGITS[5:] > 0).double()
    by_hand = stats.truncexpon(b=rate, scale=1 / rate).logpdf(0.3)
    np.testing.assert_allclose(entries(law).log_prob(torch.cat([torch.zeros(5), at]))[5:], by_hand, rtol=1e-12)


def test_the_continuous_bernoulli_is_torchs_where_that_is_right():
    logits = torch.linspace(-8, 8, 33, dtype=torch.float64)
    x = torch.rand(33, dtype=torch.float64)
    ours, theirs = StableContinuousBernoulli(logits=logits), torch.distributions.ContinuousBernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.icdf(x), theirs.icdf(x), atol=1e-3, rtol=0)


def test_the_continuous_bernoullis_samples_and_quantiles_agree_with_its_density():
    law = StableContinuousBernoulli(logits=LOGITS)
    u = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)[:, None].expand(-1, len(LOGITS))
    x = law.icdf(u)
    slope = (law.icdf(u + 1e-6) - law.icdf(u - 1e-6)) / 2e-6  # dx/du = 1 / density
    torch.testing.assert_close(-slope.log(), law.log_prob(x), atol=1e-4, rtol=1e-4)
    n = 20_000
    drawn = law.expand((n, len(LOGITS))).sample()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert ((drawn.mean(0) - law.mean).abs() < 5 * drawn.std(0) / n**0.5).all()


def test_the_continuous_bernoullis_series_are_exact_near_zero():
    logits = torch.linspace(-0.7, 0.7, 29, dtype=torch.float64)
    logits[14] = 9e-4  # in place of 0
    law, h = StableContinuousBernoulli(logits=logits), logits.numpy() / 2
    middle = law.log_prob(torch.full((29,), 0.5, dtype=torch.float64))
    np.testing.assert_allclose(middle, -np.log(np.sinh(h) / h), atol=3e-9, rtol=0)
    np.testing.assert_allclose(law.mean, (1 + 1 / np.tanh(h) - 1 / h) / 2, atol=3e-9, rtol=0)
    u = torch.linspace(0.1, 0.9, 29, dtype=torch.float64)
    np.testing.assert_allclose(law.icdf(u), np.log1p(u.numpy() * np.expm1(2 * h)) / (2 * h), atol=1e-7, rtol=0)


@pytest.mark.parametrize("extreme", [0.0, 1e-20, 1e6, -1e6, 1e30])
def test_the_continuous_bernoulli_has_finite_gradients_everywhere(extreme):
    logits = torch.full((3,), extreme, requires_grad=True)
    law = ContinuousBernoulli(nn.Identity())(logits)
    value = law.log_prob(torch.tensor([0.0, 0.25, 1.0])) + law.mean.sum() + law.rsample().sum()
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


SHAPES = torch.tensor([[0.4, 1.0, 2.0, 30.0, 0.7], [0.7, 1.0, 5.0, 20.0, 8.0]], dtype=torch.float64)


def test_the_beta_is_the_beta():
    first, second = SHAPES
    law = Beta(nn.Identity())(unbounded(SHAPES.log()).flatten())
    x = torch.rand(5, dtype=torch.float64)
    by_hand = stats.beta(first.numpy(), second.numpy()).logpdf(x.numpy()).sum()
    np.testing.assert_allclose(law.log_prob(x), by_hand, rtol=1e-9)
    torch.testing.assert_close(law.mean, first / (first + second))
    torch.testing.assert_close(integral(law, NODES), torch.ones(5, dtype=torch.float64), rtol=1e-4, atol=0)
    drawn = law.sample((20_000,))
    assert ((drawn.mean(0) - law.mean).abs() < 5 * (law.variance / 20_000).sqrt()).all()


def test_the_beta_takes_and_draws_numbers_inside_the_interval_alone():
    net = nn.Linear(2, 2)
    nn.init.constant_(net.bias, -1e9)  # all mass at the ends
    vae = pv.VAE(pv.StandardNormal(2), Beta(net), pv.mean_field(pv.MLP(1, 4)))
    drawn = vae.likelihood(torch.zeros(2000, 2)).sample()
    assert ((drawn > 0) & (drawn < 1)).all()
    assert vae.likelihood(torch.zeros(2000, 2)).log_prob(drawn).isfinite().all()
    x = torch.full((300, 1), 0.5)
    x[270] = 0.0  # beyond the first batch
    with pytest.raises(ValueError, match="Beta takes numbers strictly between 0 and 1, got 0 in row 270"):
        fit(vae, x, epochs=1)


@pytest.mark.parametrize("df", [0.5, 3.0, pv.LearnedScale(4.0), pv.LearnedScale(2.5, shape=(6,))])
@pytest.mark.parametrize("scale", [0.4, pv.LearnedScale(0.3), pv.NetScale()])
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
def test_the_student_t_is_the_student_t(df, scale, lead):
    student = StudentT(nn.Identity(), scale, df)
    raw = torch.randn(*lead, 6 * student.scale.channels, dtype=torch.float64)
    law = student(raw)
    assert (law.batch_shape, law.event_shape) == (lead, (6,))
    loc, sigma = student.scale(raw, -1)
    degrees = student.df.value.detach().numpy() * np.ones(6)
    x = torch.randn(*lead, 6, dtype=torch.float64)
    by_hand = stats.t(degrees, loc.numpy(), sigma.detach().numpy()).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(law.log_prob(x).detach(), by_hand, rtol=1e-5)


def test_the_student_ts_degrees_and_scale_are_learned():
    with seeded(0):
        x = 2.0 + 0.5 * torch.distributions.StudentT(4.0).sample((4000, 1))
    net = nn.Linear(1, 1)
    student = StudentT(net, pv.LearnedScale(1.0), pv.LearnedScale(30.0))
    student.start_from(x)
    torch.testing.assert_close(net.bias.detach(), x.mean(0))
    assert student.scale.value.item() == pytest.approx(float(x.std()), rel=1e-3)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -student(torch.zeros(len(x), 1)).log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    best = stats.t.fit(x.numpy())
    assert student.df.value.item() == pytest.approx(best[0], rel=0.02)
    assert student.scale.value.item() == pytest.approx(best[2], rel=0.01)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="df must be a Scale, or a number positive and finite, got 0"):
        StudentT(nn.Identity(), 1.0, 0.0)
    with pytest.raises(ValueError, match="df cannot be a NetScale"):
        StudentT(nn.Identity(), 1.0, pv.NetScale())
    with pytest.raises(ValueError, match="scale: OptimalScale is the closed form for Normal alone"):
        StudentT(nn.Identity(), OptimalScale())
    with pytest.raises(ValueError, match=r"Beta: the net must give 2 numbers for each entry.*7 is no multiple"):
        Beta(nn.Identity())(torch.zeros(3, 7))
    for kind in (pv.Bernoulli, Beta, ContinuousBernoulli):
        with pytest.raises(ValueError, match="event_dim must be at least 1, got 0"):
            kind(nn.Identity(), event_dim=0)


@pytest.mark.parametrize("event", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize(("kind", "numbers"), [(Beta, 2), (ContinuousBernoulli, 1)])
def test_shapes_and_the_start_from_the_mean(kind, numbers, event):
    flat = pv.MLP(2, 8, 6 * numbers)
    likelihood = kind(
        nn.Sequential(flat, nn.Unflatten(-1, (numbers * event[0], *event[1:]))), event_dim=len(event)
    )
    law = likelihood(torch.randn(7, 5, 2))
    assert (law.batch_shape, law.event_shape) == ((7, 5), event)
    x = 0.02 + 0.9 * torch.rand(50, *event) * torch.linspace(0.05, 1, 6).reshape(event)
    likelihood.start_from(x)
    nn.init.zeros_(flat[-1].weight)
    torch.testing.assert_close(
        likelihood(torch.zeros(3, 2)).mean, x.mean(0).expand(3, *event), rtol=1e-3, atol=1e-4
    )


def test_the_beta_starts_at_the_variance_of_the_data():
    with seeded(0):
        x = torch.distributions.Beta(2.0, 6.0).sample((5000, 3))
    flat = nn.Linear(2, 6)
    nn.init.zeros_(flat.weight)
    beta = Beta(flat)
    beta.start_from(x)
    torch.testing.assert_close(beta(torch.zeros(1, 2)).variance.mean(), x.var(0).mean(), rtol=0.02, atol=0)


KINDS = {
    "continuous bernoulli": lambda: ContinuousBernoulli(pv.MLP(2, 8, 6)),
    "beta": lambda: Beta(pv.MLP(2, 8, 12)),
    "student-t": lambda: StudentT(pv.MLP(2, 8, 12), pv.NetScale(), pv.LearnedScale(5.0, shape=(6,))),
}


def around(likelihood):
    """A small VAE around a likelihood of 6 entries."""
    return pv.VAE(pv.StandardNormal(2), likelihood, pv.mean_field(pv.MLP(6, 8, 4)))


@pytest.mark.parametrize("name", KINDS)
def test_they_train_and_evaluate(name):
    vae, x = around(KINDS[name]()), 0.05 + 0.9 * torch.rand(40, 6)
    before = weights(vae.likelihood)
    fit(vae, x, epochs=1, batch_size=20, compile="off")
    after = weights(vae.likelihood)
    assert all(not torch.equal(before[name], after[name]) for name, _ in vae.likelihood.named_parameters())
    bound = pv.log_likelihood(vae, x, particles=5)
    assert bound.value.isfinite().all()
    assert pv.reconstruct(vae, x).shape == x.shape


@pytest.mark.parametrize("name", KINDS)
def test_captured_and_as_written(interpreted, name):
    pair, x = as_pair(around(KINDS[name]())), 0.05 + 0.9 * torch.rand(5, 6)
    inspect(pair, (x,))
    agree(update_of(pair, pv.IWAE(3, estimator=pv.doubly)), x)
    assert len(interpreted) == 1
