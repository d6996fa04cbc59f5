"""Objectives of two steps: what each of them trains, and that both reach what they should."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import WIDTH, Discrete, TwoLevel
from small import fit, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.alternating import PIWAE, RWS, Alternating, Wake
from ppl_vae.bounds import Grouped, iwae
from ppl_vae.estimators import doubly, pathwise
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms
from ppl_vae.updates import trained_by


def data(rows=64):
    with seeded(3):
        return torch.randn(rows, WIDTH)


def two_level(**options):
    with seeded(0):
        return TwoLevel(**options)


def grads(value, program):
    named = dict(program.named_parameters())
    parts = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(named, parts, strict=True) if g is not None}


MODEL, GUIDE = {"low", "out"}, {"first", "second"}


def owners(found):
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("bottom_up", [False, True])
def test_who_is_trained_by_what(bottom_up):
    program = two_level(bottom_up=bottom_up)
    found = trained_by(as_pair(program), (data(4),))
    names = {id(p): n for n, p in program.named_parameters()}
    assert {k: owners(names[id(p)] for p in v) for k, v in found.items()} == {"model": MODEL, "guide": GUIDE}


class Shared(TwoLevel):
    """A parameter in model and guide, and a guide that draws points."""

    def __init__(self):
        super().__init__()
        self.common = nn.Parameter(torch.zeros(WIDTH))

    def model(self, x):
        super().model(x + self.common)

    def guide(self, x):
        h, z = self.first(x + self.common).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("h", dist.Delta(h).to_event(1))
            pyro.sample("z", dist.Delta(z).to_event(1))


def test_shared_parameters_are_trained_by_both_and_points_by_the_guide():
    with seeded(0):
        program = Shared()
    found = trained_by(as_pair(program), (data(4),))
    assert any(p is program.common for p in found["model"])
    assert {id(p) for p in found["guide"]} == {id(p) for p in (program.common, *program.first.parameters())}


def test_the_models_gradient_is_that_of_its_bound():
    """Draws and guide are constants to it; its value is the bound's."""
    program = two_level()
    pair, x = as_pair(program), data(6)
    goal = RWS(4)
    with seeded(1):
        value = goal(pair, x)
    with seeded(1):
        terms = log_terms(pair, x, particles=4)
        theirs = iwae(terms.weight())
    torch.testing.assert_close(value, theirs)
    ours, full = grads(value.sum(), program), grads(theirs.sum(), program)
    assert owners(ours) == MODEL
    for name in ours:
        if name.startswith("out"):  # the last level has no path through draws
            torch.testing.assert_close(ours[name], full[name])
    with torch.no_grad(), seeded(1):
        torch.testing.assert_close(goal(pair, x), theirs.detach())


def test_the_wake_phase_is_the_weighted_cross_entropy():
    program = two_level()
    pair, x = as_pair(program), data(6)
    with seeded(1):
        value = Wake(4)(pair, x)
    with seeded(1):
        terms = log_terms(pair, x, particles=4)
    share = (terms.likelihood + terms.prior - terms.posterior).softmax(0)
    torch.testing.assert_close(value, (share * terms.posterior).sum(0))
    assert owners(grads(value.sum(), program)) == GUIDE


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_wake_phase_points_to_the_posterior(offset):
    """A guide N(m + d, S) beside the posterior N(m, S) has the slope -1'S⁻¹1 d in d: none where it is exact."""
    program, particles = LinearGaussian.random(2), 20_000
    x = program.draw(3, seed=1)
    moved = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def guide(x):
        mean, covariance = program.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean + moved, covariance))

    with seeded(0):
        value = Wake(particles)(pv.Pair(program.model, guide), x)
    (slope,) = torch.autograd.grad(value.sum(), moved)
    precision = float(program.precision.sum().detach())
    assert float(slope) == pytest.approx(-3 * precision * offset, abs=5 * (3 * precision / particles) ** 0.5)


@pytest.mark.parametrize("estimator", [pathwise, doubly])
def test_piwae_is_one_bound_for_the_model_and_another_for_the_guide(estimator):
    goal = PIWAE(2, 3, estimator=estimator)
    first, second = goal.parts()
    assert (first.objective, first.trains) == (goal, ("model",))
    assert second.objective.bound == Grouped(iwae, 2)
    assert second.objective.particles == goal.particles == 6
    pair, x = as_pair(two_level()), data(6)
    with torch.no_grad(), seeded(1):
        ours = goal(pair, x)
    with torch.no_grad(), seeded(1):
        torch.testing.assert_close(ours, pv.IWAE(6)(pair, x))


@pytest.mark.parametrize("goal", [RWS(3), PIWAE(2, 2)], ids=["rws", "piwae"])
def test_two_steps_captured_and_as_written(interpreted, goal):
    ends = []
    for how in ("off", "require"):
        program = two_level()
        run = fit(program, data(), data(16), objective=goal, epochs=3, batch_size=16, compile=how, clip_norm=5.0)
        ends.append(([row["train"] for row in run.history], weights(program)))
        assert [update.name for update in run.updates] == ["objective", "the guide's objective"]
        trained = [{id(p) for p in update.parameters} for update in run.updates]
        assert not trained[0] & trained[1]
        assert run.history[-1]["valid"] > run.history[0]["valid"]
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-4)
    for name, theirs in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], theirs, rtol=1e-3, atol=1e-4)


def test_wake_sleep_learns_discrete_latents():
    """No reparameterised sampler; the guide comes to the posterior, so that the bound comes near log p(x)."""
    with seeded(1):
        program = Discrete()
        truth = Discrete()
    with seeded(2), torch.no_grad():
        x = pv.sample(truth, 512, like=(torch.zeros(512, WIDTH),))
    before = float(pv.elbo(program, x, particles=100).mean)
    optimizer = lambda p: torch.optim.Adam(p, 2e-2)  # noqa: E731
    fit(program, x, objective=RWS(5), epochs=30, batch_size=128, optimizer=optimizer)
    evidence = float(program.log_evidence(x).mean().detach())
    after = float(pv.elbo(program, x, particles=100).mean)
    assert before < after < evidence + 0.05
    assert evidence - after < 0.15


def test_refusals():
    with pytest.raises(ValueError, match="particles must be at least 2, got 1"):
        RWS(1)
    with pytest.raises(ValueError, match="particles must be at least 1, got 0"):
        Alternating(iwae, 0, Wake(2))
    program = two_level()
    for net in (program.low, program.out):
        net.requires_grad_(False)
    with pytest.raises(ValueError, match="objective: objective has no parameters to train"):
        fit(program, data(), objective=RWS(2), epochs=1)
