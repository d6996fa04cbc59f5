"""Semi-amortised training: what each step follows, and what it is for."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import WIDTH, Discrete, HandlerMask, Nested, TwoLevel
from small import cvae, fit, pixels, vae, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.estimators import doubly
from ppl_vae.graphs import capture
from ppl_vae.layout import inspect
from ppl_vae.moving import Within
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.rng import seeded
from ppl_vae.semiamortised import SemiAmortised, _Moves
from ppl_vae.traces import run_guide


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class Offset(LinearGaussian):
    """With a guide that knows the slope of the posterior's mean, and has it off by a constant."""

    off = 1.0

    def guide(self, x):
        with torch.no_grad():
            loc, _ = self.posterior(x)
            scale = self.mean_field_variance.sqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc + self.off * scale, scale).to_event(1))


def values(objective, program, *batch, draws=200):
    """The mean value of each datum over draws."""
    pair = as_pair(program)
    with torch.no_grad():
        return torch.stack([objective(pair, *batch) for _ in range(draws)]).mean(0)


# ---- the refinement
def test_each_step_gets_nearer_to_the_best_posterior():
    program = Offset.random(0)
    x = program.draw(1, seed=0).expand(200, -1)
    best = LinearGaussian.random(0).elbo(x[:1]).detach()
    means = [values(SemiAmortised(pv.ELBO(8), steps, rate=0.15), program, x, draws=3) for steps in (1, 4, 16)]
    plain = values(pv.ELBO(8), program, x, draws=3).mean()
    found = [m.mean() for m in means]
    assert best - plain > 1
    assert plain + 0.2 < found[0] < found[1] - 0.2 < found[2] - 0.2
    assert found[2] < best + 4 * means[2].std() / 200**0.5
    assert found[2] > best - 0.2  # steps of one length do not settle


@pytest.mark.parametrize("kind", ["mean-field", "exact"])
def test_draws_and_their_density_move_as_said(kind):
    """z' = m + a s + e^b (z - m), for a normal and for one with a covariance."""
    program = LinearGaussian.random(0, guide=kind)
    x = program.draw(3, seed=0)
    pair = as_pair(program)
    inspect(pair, (x,))
    moves = _Moves()
    shift, log_scale = torch.randn(2, 3, 3).double()
    moves.numbers = {"z": (shift, log_scale)}
    with seeded(1), torch.no_grad():
        site = run_guide(pair, (x,), 4).nodes["z"]
    with seeded(1), torch.no_grad():
        moved = run_guide(Within(pair, moves.around), (x,), 4).nodes["z"]
    law = site["fn"]
    wanted = law.mean + shift * law.stddev + log_scale.exp() * (site["value"] - law.mean)
    torch.testing.assert_close(moved["value"], wanted.expand(4, 3, 3))
    density = law.log_prob(site["value"]) - log_scale.sum(-1)
    torch.testing.assert_close(moved["fn"].log_prob(moved["value"]), density)


def test_data_are_refined_apart():
    """Another datum beside it changes nothing: neither its value nor, by it, that of others."""
    program = Offset.random(0)
    x = program.draw(4, seed=0)
    objective = SemiAmortised(pv.ELBO(), 3)
    found = []
    for last in (x[3:], 100 + x[3:]):
        with seeded(1), torch.no_grad():
            found.append(objective(as_pair(program), torch.cat([x[:3], last])))
    torch.testing.assert_close(found[0][:3], found[1][:3])
    assert not torch.isclose(found[0][3], found[1][3])


# ---- what is trained
def refined_by_hand(program, x, steps, rate):
    """The refinement written out for a one-level normal guide; its mean and scale."""
    posterior = program.posterior(x)[0].detach()
    scale = program.mean_field_variance.sqrt().detach()
    mean = posterior + program.off * scale
    shift, log_scale = torch.zeros_like(mean), torch.zeros_like(mean)
    for _ in range(steps):
        leaves = [shift.requires_grad_(), log_scale.requires_grad_()]
        value = by_hand(program, x, mean + shift * scale, log_scale.exp() * scale).sum()
        slopes = torch.autograd.grad(value, leaves)
        shift, log_scale = ((u + rate * g.clamp(-5, 5)).detach() for u, g in zip(leaves, slopes, strict=True))
    return mean + shift * scale, log_scale.exp() * scale


def by_hand(program, x, mean, scale):
    z = mean + scale * torch.randn(1, *mean.shape).double()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    loc = z @ program.weight.T + program.mean
    likelihood = dist.Normal(loc, math.sqrt(program.variance)).log_prob(x).sum(-1)
    return (prior + likelihood - dist.Normal(mean, scale).log_prob(z).sum(-1))[0]


def test_the_models_gradient_is_that_of_the_elbo_at_the_refined_posterior():
    program = Offset.random(1)
    x = program.draw(5, seed=0)
    parameters = [program.weight, program.mean]
    as_pair(program).layout = None
    inspect(as_pair(program), (x,))
    with seeded(1):
        value = SemiAmortised(pv.ELBO(), 3, rate=0.05)(as_pair(program), x)
    with seeded(1):
        wanted = by_hand(program, x, *refined_by_hand(program, x, 3, 0.05))
    torch.testing.assert_close(value, wanted)
    found = torch.autograd.grad(value.sum(), parameters)
    for first, second in zip(found, torch.autograd.grad(wanted.sum(), parameters), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(3), pv.ELBO(2, kl="auto"), pv.IWAE(3, estimator=doubly)])
@pytest.mark.parametrize("program", [TwoLevel, lambda: TwoLevel(bottom_up=True)])
def test_one_step_is_the_models_and_one_the_guides(program, objective):
    program = program()
    pair, x = as_pair(program), torch.randn(4, WIDTH)
    inspect(pair, (x,))
    first, second = SemiAmortised(objective, 2).parts()
    named = dict(program.named_parameters())
    gradients = torch.autograd.grad(first.objective(pair, x).sum(), list(named.values()), allow_unused=True)
    with_gradient = {name.split(".")[0] for name, g in zip(named, gradients, strict=True) if g is not None}
    assert with_gradient == {"low", "out"}
    assert first.trains == ("model",)
    assert second.objective is objective
    assert second.trains == ("guide",)


def test_a_penalty_keeps_its_place_and_beta_its_hook():
    objective = pv.ELBO(beta=0.5, penalties=(pv.MMD(weight=1.0),))
    semi = SemiAmortised(objective, 2)
    assert [part.name for part in semi.parts()] == ["objective", "the guide's objective"]
    assert {name for name, _ in semi.named_buffers()} >= {"objective.beta"}
    run = fit(vae(), pixels(64), objective=semi, epochs=1, compile="off")
    assert math.isfinite(run.history[-1]["train"])


def test_training_with_refinement_reaches_a_better_likelihood():
    """The guide is off by a constant for good; without refinement the model bends to suit it."""
    found = []
    x = LinearGaussian.random(2).draw(256, seed=0)
    for steps in (0, 8):
        program = Offset.random(3)
        objective = pv.ELBO(4)
        fit(
            Trained(program),
            x,
            objective=SemiAmortised(objective, steps, rate=0.2) if steps else objective,
            epochs=25,
            batch_size=128,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
            compile="off",
        )
        found.append(program.log_evidence(x).mean().detach())
    assert found[1] > found[0] + 0.1


class Trained(nn.Module):
    """The program, with a parameter in its guide."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.log_scale = nn.Parameter(torch.zeros(()).double())

    def model(self, x):
        self.program.model(x)

    def guide(self, x):
        with torch.no_grad():
            loc, _ = self.program.posterior(x)
            scale = self.program.mean_field_variance.sqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc + 3 * scale, scale * self.log_scale.exp()).to_event(1))


@pytest.mark.parametrize("name", ["two levels", "inner plate", "masked", "conditional"])
def test_programs_of_every_shape_are_trained_and_validated_by_the_refined_bound(name):
    x = pixels(16)
    program, data = {
        "two levels": (TwoLevel(), torch.randn(16, WIDTH)),
        "inner plate": (Nested(), torch.randn(16, WIDTH)),
        "masked": (HandlerMask(), torch.randn(16, WIDTH)),
        "conditional": (cvae(), (x, (x[:, :2] > 0.5).sum(1))),
    }[name]
    plain = values(pv.ELBO(), program, *(data if isinstance(data, tuple) else (data,)), draws=50)
    before = weights(program)
    objective = SemiAmortised(pv.ELBO(), 8)
    run = fit(program, data, data, objective=objective, epochs=1, batch_size=16, compile="off")
    assert run.history[0]["valid"] > float(plain.mean()) + 0.1
    moved = {n.split(".")[0] for n, w in weights(program).items() if not torch.equal(w, before[n])}
    assert moved == {n.split(".")[0] for n in dict(program.named_parameters())}


@pytest.mark.parametrize("training", [True, False])
def test_captured_is_as_written(training):
    program = TwoLevel()
    pair, x = as_pair(program), torch.randn(4, WIDTH)
    inspect(pair, (x,))
    objective = SemiAmortised(pv.ELBO(2), 3)
    parameters = [program.low.weight, program.out.weight]

    def function(x):
        if not training:
            with torch.no_grad():
                return (objective(pair, x),)
        value = objective(pair, x)
        return value.detach(), *torch.autograd.grad(value.sum(), parameters)

    graph = capture(function, (x,), compile=False)
    for run in range(2):  # the second time on other draws
        with seeded(run):
            found = graph(x)
        with seeded(run):
            wanted = function(x)
        for first, second in zip(found, wanted, strict=True):
            torch.testing.assert_close(first, second)


# ---- what is refused
def test_settings_out_of_range():
    for call, message in (
        (lambda: SemiAmortised(pv.ELBO(), 0), "steps must be at least 1, got 0"),
        (lambda: SemiAmortised(pv.ELBO(), 2, rate=-1.0), "rate must be positive and finite, got -1.0"),
        (lambda: SemiAmortised(pv.RWS(5), 2), "objective: expected a bound such as .* got Alternating"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def one(law):
    """A pair whose latent has a law in the guide and a wide normal, or the same, in the model."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            fn = law() if not isinstance(law(), dist.TransformedDistribution) else dist.Normal(0.0, 1.0)
            z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", law())

    return Pair(model, guide)


def flowed():
    return dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.TanhTransform().inv])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Discrete(), "site 'z': the support of Bernoulli is not all real numbers"),
        (one(lambda: dist.Gamma(2.0, 1.0)), "site 'z': the support of Gamma is not all real numbers"),
        (one(lambda: dist.VonMises(0.0, 1.0)), "site 'z': the support of VonMises is not all real numbers"),
        (one(lambda: dist.Cauchy(0.0, 1.0)), "site 'z': no finite mean and standard deviation of Cauchy is known"),
        (one(flowed), "site 'z': no finite mean and standard deviation of TransformedDistribution is known"),
        (one(lambda: dist.Delta(torch.zeros(()))), "its guide draws nothing but points"),
    ],
)
def test_guides_that_cannot_be_moved(program, message):
    x = torch.rand(3, WIDTH if isinstance(program, Discrete) else 1)
    pair = as_pair(program)
    with pytest.raises(ValueError, match=message):
        SemiAmortised(pv.ELBO(), 2)(pair, x)


def test_fit_refines_on_request():
    by_argument, by_objective = vae(), vae()
    by_objective.load_state_dict(by_argument.state_dict())
    x, options = pixels(48), {"epochs": 2, "batch_size": 16, "compile": "off"}
    first = fit(by_argument, x, refine=2, **options)
    second = fit(by_objective, x, objective=SemiAmortised(pv.ELBO(), 2), **options)
    assert [row["train"] for row in first.history] == [row["train"] for row in second.history]
    assert all(torch.equal(a, b) for a, b in zip(by_argument.parameters(), by_objective.parameters(), strict=True))
    with pytest.raises(ValueError, match="refine must be at least 0, got -1"):
        fit(by_argument, x, refine=-1)
