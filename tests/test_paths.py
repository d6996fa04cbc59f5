"""Paths with discrete latents, which are summed out, and of models alone."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Discrete
from torch import nn

import ppl_vae as pv
from ppl_vae.capture import Engine
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair, prior_guided
from ppl_vae.paths import Path
from ppl_vae.rng import seeded

WEIGHTS, PLACES, ON = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.0, 2.0]), 0.3
MANY = pv.Annealing(chains=16, distributions=60, leapfrog=4)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class Mixed(nn.Module):
    """A category that moves z, a switch that moves x, and z itself."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            on = pyro.sample("on", dist.Bernoulli(ON))
            z = pyro.sample("z", dist.Normal(PLACES[y], 1.0))
            pyro.sample("x", dist.Normal(z + 3 * on, 0.5), obs=x)


class Guided(Mixed):
    """With a guide that draws z first, and what is discrete given z."""

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.7 * x, 1.5))
            pyro.sample("y", dist.Categorical(logits=z[..., None] * torch.tensor([-0.3, 0.0, 0.3])))
            pyro.sample("on", dist.Bernoulli(logits=0.5 * x - z))


def log_evidence(x):
    """Log p(x) of `Mixed` by its six components."""
    components = [
        WEIGHTS[k].log() + math.log(ON if on else 1 - ON) + dist.Normal(place + 3 * on, 1.25**0.5).log_prob(x)
        for k, place in enumerate(PLACES)
        for on in (0, 1)
    ]
    return torch.stack(components).logsumexp(0)


@pytest.mark.parametrize("program", [Mixed(), Mixed().model, Guided()])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_discrete_latents_are_summed_out(program, start):
    x = torch.linspace(-2, 5, 6)
    settings = pv.Annealing(chains=64, distributions=40, leapfrog=4, start=start)
    found = pv.annealed(program, x, settings, compile="off")
    assert ((found.value - log_evidence(x)) / found.stderr).abs().max() < 4
    assert found.stderr.max() < 0.3


def test_the_densities_of_a_path_are_sums_over_all_values():
    x = torch.randn(5)
    pair = as_pair(Guided()).eval()
    inspect(pair, (x,))
    path = Path(pair, (x,), "guide", Engine("off"))
    assert path.coordinates.combinations == 6
    state = torch.randn(3, 5, 1)
    here, z = path.at(state, (x,)), state[..., 0]
    joint = torch.stack(
        [
            WEIGHTS[k].log()
            + math.log(ON if on else 1 - ON)
            + dist.Normal(PLACES[k], 1.0).log_prob(z)
            + dist.Normal(z + 3 * on, 0.5).log_prob(x)
            for k in range(3)
            for on in (0, 1)
        ]
    ).logsumexp(0)
    first = dist.Normal(0.7 * x, 1.5).log_prob(z)
    torch.testing.assert_close(here.first, first)
    torch.testing.assert_close(here.ratio, joint - first)


def test_data_simulated_from_a_model_with_discrete_latents_are_enclosed():
    found = pv.sandwich(Mixed(), 30, settings=MANY, like=(torch.zeros(30),), compile="off")
    assert abs(found.gap.mean) < 3 * found.gap.stderr
    assert found.gap.stderr < 0.1
    assert found.lower.value.mean() < found.upper.value.mean() + 3 * found.gap.stderr


def test_where_all_latents_are_discrete_the_sum_is_exact():
    program, x = Discrete(category=True), torch.randn(5, 4)
    found = pv.annealed(program, x, pv.Annealing(chains=2, distributions=2, leapfrog=1), compile="off")
    torch.testing.assert_close(found.value, program.log_evidence(x).detach().double())
    assert found.stderr.max() < 1e-6


def test_too_many_values_are_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            for name in "abc":
                pyro.sample(name, dist.Categorical(torch.ones(11)))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'a': a, b, c have 1331 combinations of values, more than the 1000"):
        pv.annealed(model, torch.zeros(3), MANY)


def test_a_model_alone_is_guided_by_its_prior():
    program = LinearGaussian.random(0, latent=1)
    x = program.draw(4, seed=1)
    pair = prior_guided(program.model)
    exact = program.log_evidence(x).detach()
    plain = pv.log_likelihood(pair, x, 20_000, compile="off")
    assert ((plain.value - exact) / plain.stderr).abs().max() < 4
    terms = pv.log_terms(pair, x, particles=3)
    torch.testing.assert_close(terms.prior, terms.posterior)
    alone = pv.annealed(program.model, x, pv.Annealing(distributions=12, leapfrog=2), compile="off")
    paired = pv.annealed(program, x, pv.Annealing(distributions=12, leapfrog=2), compile="off")
    torch.testing.assert_close(alone.value, paired.value)  # from the prior a guide has no part in it


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="model: expected a callable of a batch, got float"):
        pv.annealed(3.0, torch.zeros(3))


def trajectory(path, state, momentum, batch, steps=8):
    """The end of a trajectory: its last step whole, the others in the path's precision."""
    moving = (state, momentum, *path.at(state, batch)[1:3])
    for left in reversed(range(steps)):
        leap = path.passed if left else path.leapt
        moving = leap(*moving[:4], torch.tensor(0.8), torch.full((len(batch[0]), 1), 0.05), *batch)
    return moving[0], moving[1]


def test_a_rounded_trajectory_runs_backwards_all_the_same():
    vae = pv.VAE(pv.StandardNormal(5), pv.Bernoulli(pv.MLP(5, 64, 40)), pv.mean_field(pv.MLP(40, 10)))
    batch = (torch.rand(4, 40).round(),)
    pair = as_pair(vae).eval()
    inspect(pair, batch)
    whole, rounded = (Path(pair, batch, "prior", Engine("off"), precision) for precision in ("float32", "bf16"))
    state = whole.draw(batch, 3)
    momentum = torch.randn_like(state)
    end, after = trajectory(rounded, state, momentum, batch)
    other, _ = trajectory(whole, state, momentum, batch)
    error = (end - other).abs().max()
    assert 1e-4 < error < 0.05  # it is another trajectory
    back, _ = trajectory(rounded, end, -after, batch)
    assert (back - state).abs().max() < 0.02 * error


def test_rounded_moves_leave_the_bound_as_it_is():
    program = LinearGaussian.random(0, latent=4, width=8)
    x = program.draw(6, seed=1)
    exact = program.log_evidence(x).detach()
    settings = pv.Annealing(distributions=60, leapfrog=4, precision="bf16")
    found = pv.annealed(program.float().model, x.float(), settings, compile="off")
    assert ((found.value - exact) / found.stderr).abs().max() < 4
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bf16', got 'fp8'"):
        pv.Annealing(precision="fp8")


def test_a_model_alone_whose_parameters_nobody_trained_is_refused():
    def model(x):
        scale = pyro.param("scale", torch.tensor(0.1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pair, x, few = pv.Pair(model, guide), torch.zeros(4), pv.Annealing(2, 5, 2)
    plain = pv.annealed(pair, x, few, compile="off")
    pair.params["scale"].data.fill_(3.0)
    trained = pv.annealed(pair, x, few, compile="off")
    assert (trained.value - plain.value).abs().min() > 0.1
    torch.testing.assert_close(pv.annealed(pair.model, x, few, compile="off").value, trained.value)
    with pytest.raises(ValueError, match="a model alone makes 'scale' anew"):
        pv.annealed(model, x, few)
    with pytest.raises(ValueError, match="a model alone makes 'scale' anew"):
        pv.sandwich(model, 4, settings=few, like=(x,))


def test_one_chain_says_that_it_has_no_error():
    found = pv.annealed(Mixed(), torch.zeros(2), pv.Annealing(1, 5, 2), compile="off")
    assert "of one chain no error is known" in str(found)
    for change in ({"chains": 2.5}, {"distributions": 10.5}):
        with pytest.raises(ValueError, match="must be a whole number, got"):
            pv.Annealing(**change)
