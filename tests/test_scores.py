"""Score-function estimators: their mean gradients, against closed forms, enumeration and pathwise ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import LATENT, WIDTH, Discrete, TwoLevel, gaussian
from torch import nn

import ppl_vae as pv
from ppl_vae.bounds import Grouped, Mixed, Renyi, Thermodynamic, elbo, iwae
from ppl_vae.estimators import pathwise
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.scores import NVIL, Score, leave_one_out, score, vimco
from ppl_vae.traces import log_terms

SCORES = {"score": score, "leave one out": leave_one_out, "vimco": vimco}
BOUNDS = [elbo, iwae, Renyi(0.5), Grouped(iwae, 2), Mixed(0.4), Thermodynamic((0, 0.2, 0.5))]


def named(bound):
    return getattr(bound, "__name__", repr(bound))


def baseline(width):
    with seeded(5):
        return NVIL(nn.Linear(width, 1))


def made(name, width):
    return baseline(width) if name == "nvil" else (SCORES | {"doubly": pv.doubly})[name]


def gradients(estimator, bound, program, x, rows, size=25, particles=4, seed=0, beta=1.0):
    """Independent mean gradients of the bound of one datum, as rows, each over `size` copies of it."""
    parameters = list(program.parameters())
    with seeded(seed):
        copies = x.expand(rows * size, -1)
        values = estimator(bound, as_pair(program), copies, particles=particles, beta=beta)
        found = [
            torch.autograd.grad(v.mean(), parameters, retain_graph=True, allow_unused=True)
            for v in values.split(size)
        ]
    zeros = [torch.zeros_like(p) for p in parameters]
    return torch.stack(
        [torch.cat([(z if g is None else g).flatten() for z, g in zip(zeros, gs, strict=True)]) for gs in found]
    )


def same_mean(first, second, sigmas=4.5):
    """Assert that two samples have one mean, and that they can tell."""
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    assert bool(((first.mean(0) - second.mean(0)).abs() <= sigmas * error + 1e-10).all())
    return float(error.norm() / second.mean(0).norm())


@pytest.mark.parametrize("name", [*SCORES, "nvil", "doubly"])
@pytest.mark.parametrize("bound", BOUNDS, ids=named)
def test_mean_gradients_are_those_of_pathwise(bound, name):
    program = LinearGaussian.random(1, latent=1, width=2, widen=1.1)
    estimator = made(name, 2).double() if name == "nvil" else made(name, 2)
    x = program.draw(1, seed=1)
    ours = gradients(estimator, bound, program, x, 60, seed=1)
    theirs = gradients(pathwise, bound, program, x, 60, seed=2)
    assert same_mean(ours, theirs) < 0.5


@pytest.mark.parametrize("name", [*SCORES, "nvil", "doubly"])
@pytest.mark.parametrize("bound", BOUNDS, ids=named)
def test_on_two_levels(bound, name):
    """The trap: what a later draw's density depends on must be a constant in it, and the draw's own score stay."""
    with seeded(0):
        program = TwoLevel()
    x = torch.tensor([[0.3, -0.2, 0.5, 0.1]])
    ours = gradients(made(name, WIDTH), bound, program, x, 60, seed=1, beta=0.7)
    theirs = gradients(pathwise, bound, program, x, 60, seed=2, beta=0.7)
    same_mean(ours, theirs, sigmas=5.0)


@pytest.mark.parametrize("name", [*SCORES, "nvil"])
@pytest.mark.parametrize("category", [False, True])
def test_discrete_latents_against_enumeration(category, name):
    """The ELBO's gradient is a finite sum."""
    with seeded(0):
        program = Discrete(category)
    x = torch.tensor([[0.4, -0.6, 0.5, 0.2]])
    states = torch.arange(2) if category else torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    q = program.law(program.encoder(x)).log_prob(states.reshape(len(states), 1, *([] if category else [2])))
    loc = program.table[states] if category else states @ program.table
    joint = dist.Normal(loc, 0.9).to_event(1).log_prob(x) + program.law(program.logits).log_prob(states)
    exact = (q.exp().flatten() * (joint - q.flatten())).sum()
    parts = torch.autograd.grad(exact, list(program.parameters()))
    exact = torch.cat([g.flatten() for g in parts])
    ours = gradients(made(name, WIDTH), elbo, program, x, 60, size=250, particles=3, seed=3)
    error = ours.std(0) / math.sqrt(len(ours))
    assert bool(((ours.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all())
    assert float(error.norm() / exact.norm()) < 0.1


class Both(nn.Module):
    """A discrete latent, then a continuous one that depends on it, in model and guide."""

    def __init__(self):
        super().__init__()
        self.class_net, self.encoder = nn.Linear(WIDTH, 1), nn.Linear(WIDTH + 1, 2 * LATENT)
        self.decoder = nn.Linear(LATENT + 1, 2 * WIDTH)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(0.4 * x.new_ones(1)).to_event(1))
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            joined = torch.cat([z, y.expand(*z.shape[:-1], 1)], -1)
            pyro.sample("x", gaussian(self.decoder(joined)), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(logits=self.class_net(x)).to_event(1))
            joined = torch.cat([x.expand(*y.shape[:-1], WIDTH), y], -1)
            pyro.sample("z", gaussian(self.encoder(joined)))


@pytest.mark.parametrize("baseline", [None, leave_one_out.replace, vimco.replace])
def test_draws_that_carry_a_gradient_may_keep_it(baseline):
    with seeded(0):
        program = Both()
    x = torch.tensor([[0.4, -0.6, 0.5, 0.2]])
    ours = gradients(Score(baseline, paths=True), iwae, program, x, 60, particles=3, seed=3)
    theirs = gradients(Score(baseline), iwae, program, x, 60, particles=3, seed=4)
    same_mean(ours, theirs)
    assert float(ours.var(0).sum()) < 0.7 * float(theirs.var(0).sum())
    with seeded(0):
        alone = TwoLevel()
    first = gradients(Score(paths=True), iwae, alone, x, 5, particles=3)
    torch.testing.assert_close(first, gradients(pathwise, iwae, alone, x, 5, particles=3))


@pytest.mark.parametrize("bottom_up", [False, True])
def test_sticking_the_landing_is_right_for_the_elbo_alone(bottom_up):
    with seeded(0):
        program = TwoLevel(bottom_up)
    x = torch.tensor([[0.3, -0.2, 0.5, 0.1]])
    ours = gradients(pv.sticking, elbo, program, x, 60, seed=1)
    same_mean(ours, gradients(pathwise, elbo, program, x, 60, seed=2), sigmas=5.0)
    torch.testing.assert_close(ours, gradients(pv.doubly, elbo, program, x, 60, seed=1))
    many = [gradients(e, iwae, program, x, 60, size=400, seed=i) for i, e in enumerate((pv.sticking, pathwise))]
    with pytest.raises(AssertionError):
        same_mean(*many)


def test_baselines_lower_the_variance():
    program = LinearGaussian.random(1, latent=2, width=4, widen=1.1)
    x = program.draw(1, seed=1)
    variances = {
        name: float(gradients(made(name, 4), iwae, program, x, 60, size=8, particles=8, seed=1).var(0).sum())
        for name in ("score", "leave one out", "vimco")
    }
    assert variances["leave one out"] < 0.5 * variances["score"]
    assert variances["vimco"] < 0.5 * variances["score"]


@pytest.mark.parametrize("name", [*SCORES, "nvil"])
@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_values_are_those_of_the_bound(name, kl):
    with seeded(0):
        pair = as_pair(
            pv.VAE(pv.StandardNormal(2), pv.Normal(nn.Linear(2, 4), 0.5), pv.mean_field(nn.Linear(4, 4)))
        )
    x = torch.rand(5, 4)
    with seeded(1):
        ours = made(name, 4)(elbo, pair, x, particles=3, kl=kl, beta=0.6)
    with seeded(1):
        theirs = elbo(log_terms(pair, x, particles=3, kl=kl).weight(0.6))
    torch.testing.assert_close(ours, theirs)


def test_what_is_left_out_of_a_baseline():
    w = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    for k in range(3):
        others = torch.cat([w[:k], w[k + 1 :]])
        torch.testing.assert_close(leave_one_out.baselines(iwae, w)[k], iwae(others))
        torch.testing.assert_close(
            leave_one_out.baselines(elbo, w)[k], (others.sum(0) + others.exp().mean(0).log()) / 3
        )
        replaced = w.clone()
        replaced[k] = others.mean(0)
        torch.testing.assert_close(vimco.baselines(iwae, w)[k], iwae(replaced))
        torch.testing.assert_close(vimco.baselines(elbo, w)[k], others.mean(0))


def test_a_learned_baseline_follows_the_bound(interpreted):
    """It trains along with the pair, captured and as written, and its error falls to the bound's spread."""
    with seeded(0):
        x = torch.randn(64, WIDTH)
    ends = []
    for how in ("off", "require"):
        with seeded(0):
            program = Discrete()
        objective = pv.IWAE(2, estimator=baseline(WIDTH))
        run = pv.fit(
            program, x, objective=objective, epochs=60, batch_size=32, compile=how, device="cpu", progress=False
        )
        ends.append([p.detach().clone() for p in (*program.parameters(), *objective.parameters())])
        assert float(objective.estimator.centre) != 0
        with torch.no_grad():
            expected = objective.estimator.net(x).flatten() + objective.estimator.centre
            left = pv.IWAE(200)
            value = left.bound(log_terms(as_pair(program), x, particles=200).weight())
        assert float((value - expected).square().mean().sqrt()) < 0.6 * float((value - 0).square().mean().sqrt())
        assert run.history[-1]["train"] > run.history[0]["train"]
    for ours, theirs in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_refusals():
    with seeded(0):
        program = TwoLevel()
    pair, x = as_pair(program), torch.zeros(3, WIDTH)
    inspect(pair, (x,))
    for estimator in (vimco, leave_one_out):
        with pytest.raises(
            ValueError, match="particles must be at least 2 for a baseline made of the others, got 1"
        ):
            estimator(elbo, pair, x, particles=1)
    with pytest.raises(ValueError, match="net: expected one number per datum, 3, got 6"):
        NVIL(nn.Linear(WIDTH, 2))(elbo, pair, x, particles=1)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        NVIL(nn.Linear(WIDTH, 1), decay=1)

    class Points(TwoLevel):
        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("h", dist.Delta(self.first(x)[..., :LATENT]).to_event(1))
                pyro.sample("z", dist.Delta(self.first(x)[..., LATENT:]).to_event(1))

    with pytest.raises(ValueError, match="site 'h': the guide draws a point, which has no score; use pathwise"):
        score(elbo, as_pair(Points()), x, particles=1)

    class Dropping(TwoLevel):
        def guide(self, x):
            super().guide(torch.nn.functional.dropout(x, 0.5))

    with pytest.raises(ValueError, match="random numbers outside its sample statements"):
        score(elbo, as_pair(Dropping()).train(), x + 1, particles=2)
