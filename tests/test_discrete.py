"""Discrete latents and their relaxations: laws against torch's, limits, exact sums, straight-through layers."""

import math

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from small import WIDTH, fit, pixels
from test_steps import agree, found, update_of
from torch import nn
from torch.distributions import Categorical, Independent, kl_divergence
from torch.distributions import RelaxedBernoulli as TorchRelaxedBernoulli
from torch.distributions import RelaxedOneHotCategorical as TorchRelaxedOneHot

import ppl_vae as pv
from ppl_vae import discrete
from ppl_vae.discrete import Bits, Constant, RelaxedBernoulli, RelaxedCategorical, Simplex
from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.rng import seeded
from ppl_vae.scores import vimco
from ppl_vae.traces import log_terms

LOGITS = torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def within(draws, exact):
    """Whether means over the first dimension are those that they should be, within 5 standard errors."""
    draws = draws.detach().double()
    return bool(((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / math.sqrt(len(draws))).all())


# ---- constants
def test_a_constant_makes_priors():
    assert torch.equal(Constant(LOGITS)(torch.zeros(3, 2)), LOGITS)
    assert torch.equal(Constant(LOGITS)(), LOGITS)
    assert [*Constant(LOGITS).parameters()] == []
    (parameter,) = Constant(LOGITS, learned=True).parameters()
    assert parameter.requires_grad
    assert parameter.data_ptr() != LOGITS.data_ptr()
    assert list(Constant(LOGITS).state_dict()) == ["value"]


# ---- one-hot
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
def test_one_hot(lead):
    logits = torch.randn(*lead, 4)
    law = discrete.OneHotCategorical(Constant(logits))(torch.zeros(1))
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (4,), False)
    z = law.sample((20_000,))
    assert within(z, logits.softmax(-1))
    torch.testing.assert_close(law.log_prob(z[0]), Categorical(logits=logits).log_prob(z[0].argmax(-1)))
    total = law.log_prob(torch.eye(4).reshape(4, *[1] * len(lead), 4).expand(4, *lead, 4)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(lead))


def test_several_categories_in_one_event():
    law = discrete.OneHotCategorical(nn.Unflatten(-1, (3, 4)), event_dim=2)(torch.randn(5, 12))
    assert (law.batch_shape, law.event_shape) == ((5,), (3, 4))
    even = discrete.OneHotCategorical(Constant(torch.zeros(3, 4)), event_dim=2)()
    divergence = kl_divergence(law, even.expand((5,)))
    entropy = law.base_dist.entropy().sum(-1)
    torch.testing.assert_close(divergence, 3 * math.log(4) - entropy)


def vae_of(prior, posterior, front, width):
    return pv.VAE(prior, pv.Normal(nn.Sequential(*front, pv.MLP(width, 16, WIDTH)), pv.LearnedScale()), posterior)


def one_hot_vae():
    return vae_of(
        discrete.OneHotCategorical(Constant(torch.zeros(4), learned=True)),
        discrete.OneHotCategorical(pv.MLP(WIDTH, 16, 4)),
        [],
        4,
    )


def bits_vae():
    return vae_of(pv.Bernoulli(Constant(torch.zeros(5), learned=True)), pv.Bernoulli(pv.MLP(WIDTH, 16, 5)), [], 5)


def test_summed_over_all_categories():
    """TraceEnum_ELBO with an enumerated guide is the ELBO as a sum, and so is its gradient."""
    vae, x = one_hot_vae(), pixels(6)
    q = vae.posterior(x)
    z = torch.eye(4).unsqueeze(1)  # (4, 1, 4)
    joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
    probability = q.probs.T
    exact = (probability * (joint - probability.log())).sum(0).mean()
    summed = Pair(vae.model, pyro.infer.config_enumerate(vae.guide))
    objective = pv.objectives.as_objective(TraceEnum_ELBO(max_plate_nesting=1))
    inspect(summed, (x,))
    value = objective(summed, x).mean()
    torch.testing.assert_close(value, exact)
    parameters = [*vae.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(value, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [one_hot_vae, bits_vae])
def test_closed_kl_of_discrete_latents(make):
    vae, x = make(), pixels(6)
    with torch.no_grad():
        terms = log_terms(as_pair(vae), x, particles=20_000, kl="analytic")
        assert terms.kl.shape == (20_000, 6)
        assert within(terms.posterior - terms.prior, terms.kl[0])


# ---- relaxed bits
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_relaxed_bits_are_torchs(lead, temperature):
    logits = torch.randn(*lead, 4, dtype=torch.float64)
    law = RelaxedBernoulli(Constant(logits), temperature)(torch.zeros(1))
    reference = Independent(TorchRelaxedBernoulli(torch.tensor(temperature), logits=logits), 1)
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (4,), True)
    y = torch.randn(*lead, 4, dtype=torch.float64)
    x = Bits()(y)
    jacobian = (x * (1 - x)).log().sum(-1)  # of x in y
    torch.testing.assert_close(law.log_prob(y), reference.log_prob(x) + jacobian, rtol=1e-5, atol=1e-6)


def test_the_density_of_a_relaxed_bit_integrates_to_one_and_its_draws_follow_it():
    law = RelaxedBernoulli(Constant(LOGITS[:1]), 0.5)()
    y = torch.linspace(-60, 60, 200_001, dtype=torch.float64)[:, None]
    density = law.log_prob(y).exp() * float(y[1] - y[0])
    assert float(density.sum()) == pytest.approx(1, abs=1e-8)
    draws = law.rsample((50_000,))
    for f in (torch.sigmoid, lambda v: v.abs(), lambda v: (v > 1.0).double()):
        assert within(f(draws), (f(y) * density[:, None]).sum(0))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 50.0])
def test_temperatures_of_relaxed_bits(temperature):
    law = RelaxedBernoulli(Constant(LOGITS), temperature)()
    y = law.rsample((50_000,))
    assert within((y > 0), LOGITS.sigmoid())  # at any temperature
    distance = (Bits()(y) - Bits(hard=True)(y)).abs().mean()
    assert {1e-3: distance < 1e-2, 0.5: 0.05 < distance < 0.4, 50.0: distance > 0.45}[temperature]


def test_noise_of_exactly_zero_draws_a_finite_bit(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, **options))
    assert RelaxedBernoulli(Constant(LOGITS), 0.5)().rsample().isfinite().all()


# ---- relaxed categories
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_relaxed_categories_are_torchs(lead, temperature):
    logits = torch.randn(*lead, 4, dtype=torch.float64)
    law = RelaxedCategorical(Constant(logits), temperature)(torch.zeros(1))
    reference = TorchRelaxedOneHot(torch.tensor(temperature), logits=logits)
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (4,), True)
    y = torch.randn(*lead, 4, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(law.log_prob(y), reference.log_prob(y.exp()) + y.sum(-1))
    again = law.expand((3, *lead))
    torch.testing.assert_close(again.log_prob(y.expand(3, *y.shape)), law.log_prob(y).expand(3, *lead))
    x = Simplex()(again.rsample())
    assert x.shape == (3, *lead, 4)
    torch.testing.assert_close(x.sum(-1), torch.ones(3, *lead, dtype=torch.float64))
    assert bool((x >= 0).all())


def test_the_density_of_two_relaxed_categories_is_that_of_a_relaxed_bit():
    """And so integrates to one: y_1 - y_2 is the bit's logit."""
    law = RelaxedCategorical(Constant(LOGITS[:2]), 0.7)()
    bit = RelaxedBernoulli(Constant((LOGITS[0] - LOGITS[1])[None]), 0.7)()
    logit = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    y = torch.cat([logit, torch.zeros_like(logit)], -1).log_softmax(-1)
    torch.testing.assert_close(law.log_prob(y), bit.log_prob(logit))  # both are densities of x_1 times x_1 x_2


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 50.0])
def test_temperatures_of_relaxed_categories(temperature):
    law = RelaxedCategorical(Constant(LOGITS), temperature)()
    y = law.rsample((50_000,))
    corner = Simplex(hard=True)(y)
    assert within(corner, LOGITS.softmax(-1))  # at any temperature
    largest = Simplex()(y).amax(-1).mean()
    assert {1e-3: largest > 0.99, 0.5: 0.5 < largest < 0.95, 50.0: largest < 0.3}[temperature]


# ---- both
RELAXED = {"bits": (RelaxedBernoulli, Bits), "categories": (RelaxedCategorical, Simplex)}


@pytest.mark.parametrize("family", RELAXED)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [1e-2, 0.5])
@pytest.mark.parametrize("extreme", [1.0, 1e4])
def test_draws_densities_and_gradients_are_finite_at_extremes(family, hard, temperature, extreme):
    relaxed, layer = RELAXED[family]
    net = Constant(extreme * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.5, 1.0]]), learned=True)
    q, p = relaxed(net, temperature)(), relaxed(Constant(torch.zeros(3)), 2 * temperature)()
    y = q.expand((100, 2)).rsample()
    rate = (q.log_prob(y) - p.log_prob(y)).mean()
    (rate + layer(hard)(y).square().sum()).backward()
    assert rate.isfinite()
    assert net.value.grad.isfinite().all()


@pytest.mark.parametrize("family", RELAXED)
def test_straight_through(family):
    _, layer = RELAXED[family]
    y = torch.randn(50, 4, requires_grad=True)
    soft, hard = layer()(y), layer(hard=True)(y)
    exact = {"bits": (y > 0).float(), "categories": nn.functional.one_hot(y.argmax(-1), 4).float()}[family]
    assert torch.equal(hard, exact)
    weights = torch.randn(50, 4)
    gradients = [torch.autograd.grad((out * weights).sum(), y, retain_graph=True)[0] for out in (soft, hard)]
    torch.testing.assert_close(*gradients)
    assert bool((gradients[1] != 0).any())


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("family", RELAXED)
def test_a_temperature_is_positive(family, temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        RELAXED[family][0](Constant(LOGITS), temperature)


@pytest.mark.parametrize(
    "make", [discrete.OneHotCategorical, lambda n, event_dim: RelaxedBernoulli(n, 1, event_dim)]
)
def test_an_event_has_dimensions(make):
    with pytest.raises(ValueError, match="event_dim must be at least 1, got 0"):
        make(Constant(LOGITS), event_dim=0)


# ---- inside a program
def relaxed_vae(family, hard=False, several=False):
    relaxed, layer = RELAXED[family]
    net, shape = pv.MLP(WIDTH, 16, 4), (4,)
    front, options = [layer(hard)], {}
    if several:
        net, shape, options = nn.Sequential(net, nn.Unflatten(-1, (2, 2))), (2, 2), {"event_dim": 2}
        front.append(nn.Flatten(-2))
    return vae_of(
        relaxed(Constant(torch.zeros(shape), learned=True), 0.5, **options), relaxed(net, 0.6, **options), front, 4
    )


CASES = [(family, hard, several) for family in RELAXED for hard in (False, True) for several in (False, True)]


@pytest.mark.parametrize(("family", "hard", "several"), CASES)
def test_relaxed_programs_train(family, hard, several):
    vae = relaxed_vae(family, hard, several)
    hook = pv.Anneal(vae.posterior.temperature, pv.linear(1.0, 0.5, 2))
    run = fit(vae, pixels(), epochs=1, batch_size=48, compile="off", objective=pv.ELBO(2), hooks=[hook])
    assert run.step == 2
    assert float(vae.posterior.temperature) == 0.75
    assert pv.log_likelihood(vae, pixels(8), particles=5).value.isfinite().all()


@pytest.mark.parametrize(("family", "hard", "several"), CASES)
@pytest.mark.parametrize(
    "goal", [lambda: pv.IWAE(3), lambda: pv.IWAE(3, estimator=pv.doubly)], ids=["iwae", "doubly"]
)
def test_relaxed_programs_captured_and_as_written(interpreted, family, hard, several, goal):
    pair, x = as_pair(relaxed_vae(family, hard, several)), pixels(6)
    inspect(pair, (x,))
    agree(update_of(pair, goal()), x)
    assert len(interpreted) == 1


@pytest.mark.parametrize("family", RELAXED)
def test_a_captured_step_sees_another_temperature(interpreted, family):
    vae, x = relaxed_vae(family), pixels(6)
    pair = as_pair(vae)
    inspect(pair, (x,))
    update = update_of(pair, pv.ELBO())
    stepper = pv.steps.Stepper(update, "require")
    values = []
    for temperature in (0.6, 0.2):
        vae.posterior.temperature.fill_(temperature)
        with seeded(0):
            values.append(stepper.gradients(x)[0].clone())
        torch.testing.assert_close(values[-1], found(update, "off", x)[0][0], rtol=1e-4, atol=1e-5)
    assert abs(float(values[0] - values[1])) > 0.05
    assert len(stepper.gradients.graphs) == 1


@pytest.mark.parametrize("make", [one_hot_vae, bits_vae])
def test_discrete_programs_train_by_scores(interpreted, make):
    vae, x = make(), pixels(48)
    objective = pv.BoundObjective(pv.bounds.iwae, vimco, particles=4)
    assert fit(vae, x, epochs=2, batch_size=48, compile="off", objective=objective).step == 2
    agree(update_of(as_pair(vae), objective), x[:6])
    assert len(interpreted) == 1
    with pytest.raises(ValueError, match="'z': its distribution has no reparameterised sampler"):
        pv.ELBO()(as_pair(vae), x)


@pytest.mark.parametrize("make", [one_hot_vae, bits_vae])
def test_closed_kls_of_discrete_latents_captured(interpreted, make):
    pair, x = as_pair(make()), pixels(6)
    inspect(pair, (x,))
    agree(update_of(pair, pv.BoundObjective(pv.bounds.elbo, vimco, particles=3, kl="analytic")), x)
