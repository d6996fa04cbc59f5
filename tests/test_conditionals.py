"""Normal conditionals: densities against closed forms, scales that cannot run away, starting from the data."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from small import fit, weights
from test_steps import agree, found, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.conditionals import LOG_SCALE_LIMIT, OptimalScale, as_scale, bounded, unbounded
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair

D = 6


class Given(nn.Module):
    """A net whose output does not depend on its input: a parameter."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, *context):
        return self.value


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def shapes_of(scale, event):
    """The output of a net for an event: twice as many numbers along its first dimension if it gives the scale."""
    return (event[0] * scale.channels, *event[1:])


@pytest.mark.parametrize("event", [(D,), (2, 3), (2, 4, 3)])
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize("scale", [pv.FixedScale(0.3), pv.LearnedScale(0.7), pv.NetScale()])
def test_the_density_is_the_normals(scale, lead, event):
    raw = torch.randn(*lead, *shapes_of(scale, event), dtype=torch.float64)
    law = pv.Normal(Given(raw), scale, event_dim=len(event))(torch.zeros(1))
    assert law.batch_shape == lead
    assert law.event_shape == event
    # By hand: location first, then raw log-scale, along the first event dimension.
    loc, sigma = raw.numpy(), {pv.FixedScale: 0.3, pv.LearnedScale: 0.7}.get(type(scale))
    if sigma is None:
        loc, log_scale = np.split(loc, 2, axis=len(lead))
        sigma = np.exp(7 * np.tanh(log_scale / 7))
    x = torch.randn(*lead, *event, dtype=torch.float64)
    by_hand = stats.norm(loc, sigma).logpdf(x.numpy()).reshape(*lead, -1).sum(-1)
    np.testing.assert_allclose(law.log_prob(x).detach().numpy(), by_hand, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 2])
def test_a_number_is_a_fixed_scale(scale):
    normal = pv.Normal(pv.MLP(2, D), scale)
    assert isinstance(normal.scale, pv.FixedScale)
    assert torch.equal(normal(torch.zeros(3, 2)).stddev, torch.full((3, D), float(scale)))
    assert not list(normal.scale.parameters())


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_fixed_scale_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        pv.FixedScale(value)


@pytest.mark.parametrize("init", [0.001, 0.2, 1.0, 1000.0])
def test_a_learned_scale_starts_where_it_is_told(init):
    assert float(pv.LearnedScale(init).value.detach()) == pytest.approx(init, rel=1e-4)


@pytest.mark.parametrize("init", [0.0, -0.1, math.nan, 1e4, 1e-4])
def test_a_learned_scale_must_start_within_its_bounds(init):
    with pytest.raises(ValueError, match="init must lie within exp"):
        pv.LearnedScale(init)


def test_an_odd_number_holds_no_pairs_of_location_and_scale():
    with pytest.raises(ValueError, match="got an odd number, 7"):
        pv.Normal(pv.MLP(2, 7), pv.NetScale())(torch.zeros(3, 2))


def test_bounded_is_the_identity_near_zero_monotone_and_never_beyond_the_limit():
    raw = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    squashed = bounded(raw)
    (slope,) = torch.autograd.grad(squashed.sum(), raw)
    assert squashed.abs().max() <= LOG_SCALE_LIMIT
    assert (squashed.diff() >= 0).all()
    near = raw.abs() < 0.3
    torch.testing.assert_close(slope[near], torch.ones_like(slope[near]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("extreme", [1e6, -1e6, 1e30, -1e30])
@pytest.mark.parametrize("scale", [pv.LearnedScale(), pv.NetScale()])
def test_extreme_raw_scales_give_finite_densities_and_gradients(scale, extreme):
    if isinstance(scale, pv.LearnedScale):
        nn.init.constant_(scale.raw, extreme)
        raw = torch.zeros(4, D)
    else:
        raw = torch.cat([torch.zeros(4, D), torch.full((4, D), extreme)], dim=-1)
    normal = pv.Normal(Given(raw), scale)
    value = normal(torch.zeros(1)).log_prob(torch.randn(4, D)).sum()
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in normal.parameters())


@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_so_do_extreme_locations(extreme):
    normal = pv.Normal(Given(torch.full((4, 2 * D), extreme)), pv.NetScale())
    value = normal(torch.zeros(1)).log_prob(torch.zeros(4, D)).sum()
    value.backward()
    assert value.isfinite()
    assert normal.net.value.grad.isfinite().all()


@pytest.mark.parametrize("scale", [pv.LearnedScale(), pv.NetScale()])
def test_constant_pixels_drive_the_scale_to_its_bound_and_no_further(scale):
    x = torch.full((32, D), 0.5)
    normal = pv.Normal(pv.MLP(2, 8, scale.channels * D), scale)
    optimizer = torch.optim.Adam(normal.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -normal(torch.randn(32, 2)).log_prob(x).mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(p.isfinite().all() for p in normal.parameters())
    assert normal(torch.randn(32, 2)).stddev.min() >= math.exp(-LOG_SCALE_LIMIT) * (1 - 1e-6)


# ---- starting from the data


def images(count=200, event=(D,)):
    mean = torch.linspace(-0.5, 1.5, math.prod(event)).reshape(event)
    return mean + 0.25 * torch.randn(count, *event)


@pytest.mark.parametrize("scale", [0.3, pv.LearnedScale(), pv.NetScale()])
@pytest.mark.parametrize("event", [(D,), (2, 3, 2)])
def test_before_training_the_mean_and_scale_are_the_datas(scale, event):
    x = images(event=event)
    channels = getattr(scale, "channels", 1)
    flat = pv.MLP(2, 8, channels * math.prod(event))
    net = nn.Sequential(flat, nn.Unflatten(-1, (channels * event[0], *event[1:]))) if len(event) > 1 else flat
    normal = pv.Normal(net, scale, event_dim=len(event))
    normal.start_from(x)
    nn.init.zeros_(flat[-1].weight)  # what is left is the bias
    law = normal(torch.randn(5, 2))
    torch.testing.assert_close(law.mean, x.mean(0).expand(5, *event))
    deviation = (x - x.mean(0)).square().mean().sqrt() if scale != 0.3 else torch.tensor(0.3)
    torch.testing.assert_close(law.stddev, deviation.expand(5, *event), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [pv.LearnedScale(), pv.NetScale()])
def test_data_that_hardly_vary_start_the_scale_inside_its_bounds(scale):
    normal = pv.Normal(pv.MLP(2, scale.channels * D), scale)
    normal.start_from(1e-6 * torch.randn(10, D))
    nn.init.zeros_(normal.net[-1].weight)
    log_scale = normal(torch.zeros(1, 2)).stddev.log()
    torch.testing.assert_close(log_scale, torch.full((1, D), -0.99 * LOG_SCALE_LIMIT))
    log_scale.sum().backward()
    raw = normal.scale.raw if isinstance(scale, pv.LearnedScale) else normal.net[-1].bias
    assert (raw.grad != 0).any()  # it can still leave


@pytest.mark.parametrize("scale", [pv.LearnedScale(0.4), pv.NetScale()])
def test_data_that_do_not_vary_say_nothing_of_the_scale(scale):
    normal, z = pv.Normal(pv.MLP(2, scale.channels * D), scale), torch.randn(3, 2)
    before = normal(z).stddev
    normal.start_from(torch.full((10, D), 0.5))
    assert torch.equal(normal(z).stddev, before)


def test_a_net_of_another_width_is_left_as_it_was():
    normal = pv.Normal(pv.MLP(2, D), pv.NetScale())  # half of the numbers that the scale needs
    before = normal.net[-1].bias.clone()
    with pytest.raises(ValueError, match=f"gives {D} numbers, the data need {2 * D}"):
        normal.start_from(images())
    assert torch.equal(normal.net[-1].bias, before)


def test_conditionals_without_an_output_layer_say_so():
    with pytest.raises(ValueError, match="StandardNormal cannot start from the mean of data"):
        pv.StandardNormal(3).start_from(images())


def test_a_conditional_must_say_what_it_is():
    with pytest.raises(TypeError, match="abstract"):
        pv.Conditional()
    with pytest.raises(TypeError, match="abstract"):
        pv.Scale()


# ---- one scale for each pixel, and the closed-form optimum


def test_a_learned_scale_may_be_one_for_each_pixel():
    scale = pv.LearnedScale(0.4, shape=(2, 1, 3))
    law = pv.Normal(nn.Identity(), scale, event_dim=3)(torch.zeros(5, 2, 4, 3))
    torch.testing.assert_close(law.stddev, torch.full((5, 2, 4, 3), 0.4))
    law.log_prob(torch.randn(5, 2, 4, 3)).sum().backward()
    assert scale.raw.grad.shape == (2, 1, 3)
    assert scale.raw.grad.unique().numel() == 6


def test_unbounded_undoes_bounded_and_keeps_inside():
    raw = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(unbounded(bounded(raw, 5.0), 5.0), raw)
    assert unbounded(torch.tensor([-1e9, 1e9])).isfinite().all()


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_number_that_is_no_scale_is_refused_by_name(value):
    with pytest.raises(ValueError, match="df must be a Scale, or a number positive and finite"):
        as_scale(value, "df")


def optimal(loc, scale=None):
    """A normal with the optimal scale and the location given."""
    return pv.Normal(nn.Identity(), scale or OptimalScale())(loc)


@pytest.mark.parametrize("lead", [(5,), (7, 5)])
def test_while_training_the_density_is_the_normals_at_the_root_mean_squared_error(lead):
    loc, x = torch.randn(*lead, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    found = optimal(loc).log_prob(x)
    sigma = (x - loc).square().mean().sqrt()
    by_hand = stats.norm(loc.numpy(), sigma.item()).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    # No other σ makes the batch likelier.
    assert all(found.sum() > torch.distributions.Normal(loc, s * sigma).log_prob(x).sum() for s in (0.99, 1.01))


def test_the_gradient_takes_the_optimum_as_given_and_is_that_through_it():
    loc, x = torch.randn(7, 5, D, dtype=torch.float64, requires_grad=True), torch.randn(5, D, dtype=torch.float64)
    (ours,) = torch.autograd.grad(optimal(loc).log_prob(x).mean(), loc)
    sigma = (x - loc).square().mean().sqrt()
    (through,) = torch.autograd.grad(torch.distributions.Normal(loc, sigma).log_prob(x).sum(-1).mean(), loc)
    torch.testing.assert_close(ours, through)
    # One particle's density does not reach for the others.
    (alone,) = torch.autograd.grad(optimal(loc).log_prob(x)[0].sum(), loc)
    assert (alone[1:] == 0).all()
    assert (alone[0] != 0).all()


def test_in_evaluation_the_scale_is_the_average_over_batches_and_fixed():
    scale = OptimalScale(momentum=0.5)
    for deviation in (1.0, 3.0):
        optimal(torch.zeros(4, D), scale).log_prob(torch.full((4, D), deviation))
    wanted = math.sqrt((0.25 * 1.0 + 0.5 * 9.0) / 0.75)  # early batches count fully: no trace of init
    assert float(scale.value) == pytest.approx(wanted, rel=1e-4)
    scale.eval()
    x = torch.randn(4, D)
    law = optimal(torch.zeros(4, D), scale)
    np.testing.assert_allclose(law.log_prob(x), stats.norm(0, wanted).logpdf(x.numpy()).sum(-1), rtol=1e-4)
    torch.testing.assert_close(law.log_prob(x)[:1], optimal(torch.zeros(1, D), scale).log_prob(x[:1]))
    assert float(scale.value) == pytest.approx(wanted, rel=1e-4)  # nothing was added
    torch.testing.assert_close(law.stddev, torch.full((4, D), wanted))
    assert set(scale.state_dict()) == {"square", "weight"}
    assert not list(scale.parameters())


def test_the_optimal_scale_starts_where_it_is_told_and_keeps_its_bounds():
    scale = OptimalScale(0.3)
    assert float(scale.value) == pytest.approx(0.3)
    normal = pv.Normal(nn.Linear(2, D), scale)
    normal.start_from(images())
    assert float(scale.value) == pytest.approx(0.25, rel=0.05)
    constant = optimal(torch.zeros(4, D, requires_grad=True), scale).log_prob(torch.zeros(4, D))
    assert constant.isfinite().all()
    assert optimal(torch.zeros(1, D), OptimalScale(limit=2.0)).log_prob(torch.zeros(1, D)) < D * 2.0
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"momentum must lie in \(0, 1\]"):
            OptimalScale(momentum=wrong)
    with pytest.raises(ValueError, match="init must lie within exp"):
        OptimalScale(0.0)


def test_the_optimal_normal_keeps_its_scale_when_expanded_and_samples_at_the_average():
    scale = OptimalScale(0.5)
    law, x = optimal(torch.zeros(D), scale).expand((3, 4)), torch.randn(3, 4, D)
    by_hand = stats.norm(0, x.square().mean().sqrt().item()).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(law.log_prob(x), by_hand, rtol=1e-5)
    drawn = optimal(torch.zeros(20_000, D), OptimalScale(0.5)).sample()
    assert float(drawn.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * drawn.numel()))


def around(scale):
    return pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 16, D), scale), pv.mean_field(pv.MLP(D, 16, 4)))


def test_the_optimal_scale_trains_to_the_error_and_bounds_use_the_average():
    vae, x = around(OptimalScale(momentum=0.1)), images()
    run = fit(vae, x, x, epochs=30, batch_size=50, compile="off", optimizer=partial(torch.optim.Adam, lr=1e-2))
    sigma = float(vae.likelihood.scale.value)
    assert 0.2 < sigma < 0.32  # the data's noise is 0.25
    half, whole = pv.elbo(vae, x[:100], particles=20), pv.elbo(vae, x, particles=20)
    torch.testing.assert_close(half.value, whole.value[:100], atol=1.0, rtol=0)  # a datum's bound is its own
    assert float(vae.likelihood.scale.value) == sigma
    assert run.history[-1]["valid"] > run.history[0]["valid"]


def test_the_optimal_scale_captured_and_as_written(interpreted):
    pair, x = as_pair(around(OptimalScale())), images(6)
    inspect(pair, (x,))
    scale = pair.program.likelihood.scale
    before = weights(scale)
    update = update_of(pair, pv.IWAE(3, estimator=pv.doubly))
    after = []
    for how in ("off", "require"):
        found(update, how, x)
        after.append(weights(scale))
        scale.load_state_dict(before)
    assert all(not torch.equal(before[n], after[0][n]) for n in before)
    for name in before:
        torch.testing.assert_close(after[1][name], after[0][name])
    agree(update, x)
    assert len(interpreted) == 2
