"""Sums over discrete latents: against Pyro's, against sums by hand, captured, and what is refused."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import WIDTH, case
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from small import vae
from test_semisupervised import MISSING, PROBS, Exact, X, Y, m2
from test_steps import update_of
from torch import nn
from trials import captured_as_written, trains_under_fit

import ppl_vae as pv
from ppl_vae.bounds import elbo, iwae
from ppl_vae.enumeration import enumerated
from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.rng import seeded
from ppl_vae.steps import Stepper

KNOWN = Y.clamp(min=0)
DATA = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def pyros(particles=1, nesting=1):
    parallel = particles > 1
    return pv.PyroObjective(TraceEnum_ELBO(particles, max_plate_nesting=nesting, vectorize_particles=parallel))


def ours(particles=1, **options):
    return pv.ELBO(particles, estimator=enumerated, **options)


def results(program, objective, *batch, seed=0):
    """The mean, and its gradient in every parameter."""
    pair = as_pair(program)
    inspect(pair, batch)
    named = dict(pair.named_parameters())
    with seeded(seed):
        value = objective(pair, *batch).mean()
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {"value": value.detach(), **{n: g for n, g in zip(named, found, strict=True) if g is not None}}


def enumerating(program):
    """The program with its guide marked for Pyro's enumeration; its parameters keep their names."""
    return Pair(program.model, config_enumerate(program.guide))


def same_mean(first, second):
    """Each result has the same mean, within five standard errors."""
    for name in first[0]:
        found = [torch.stack([r[name] for r in runs]) for runs in (first, second)]
        error = sum(f.var(0) / len(f) for f in found).sqrt()
        assert bool(((found[0].mean(0) - found[1].mean(0)).abs() < 5 * error + 1e-9).all()), name


def close(first, second, **tolerances):
    assert first.keys() == second.keys()
    torch.testing.assert_close(first, second, **tolerances)


# ---- which number it is


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("y", [Y, MISSING, KNOWN], ids=["some", "missing", "known"])
def test_value_and_gradient_are_those_of_pyro_on_the_same_draws(y, particles):
    program, x = m2(conditional=True, alpha=2.0, label_probs=PROBS).double(), X.double()
    first, second = (results(program, goal(particles), x, y) for goal in (ours, pyros))
    assert any(name.startswith("programs.0.classifier") for name in first)
    close(first, second)


def test_a_category_alone_needs_no_draw():
    category = case("category", torch.float64)
    x = category.batch[0]
    first = results(category.pair, ours(), x)
    close(first, results(enumerating(category.pair.program), pyros(), x))
    close(first, results(category.pair, ours(4), x, seed=1))


def test_the_exact_posterior_gives_the_evidence():
    exact, x = Exact(widen=1.3), X.double()
    for y in (Y, MISSING):
        pair = as_pair(exact.program)
        inspect(pair, (x, y))
        with seeded(0):
            drawn = torch.stack([ours(500)(pair, x, y) for _ in range(20)])
        error = drawn.std(0) / len(drawn) ** 0.5
        assert bool(((drawn.mean(0) - exact.bound(x, y)).abs() < 5 * error).all())
        assert bool((error < 0.02).all())


@pytest.mark.parametrize("bound", [elbo, iwae, pv.Renyi(0.5)])
def test_it_is_the_mean_over_labels_of_the_bound_of_each(bound):
    program, x = m2().double(), X.double()
    pair = as_pair(program)
    inspect(pair, (x, MISSING))
    with seeded(0):
        found = enumerated(bound, pair, x, MISSING, particles=4, beta=0.7)
    with seeded(0):
        noise = torch.randn(3 * 4, 6, 2, dtype=torch.float64)
    log_q, expected = program.classifier(x).log_softmax(-1), 0.0
    for c in range(3):
        label = nn.functional.one_hot(torch.tensor(c), 3).double().expand(6, -1)
        law = program.posterior(x, label)
        z = law.base_dist.loc + law.base_dist.scale * noise[4 * c : 4 * c + 4]
        prior = program.prior(label).log_prob(z) - math.log(3)
        weight = program.likelihood(z, label).log_prob(x) + 0.7 * (prior - law.log_prob(z) - log_q[:, c])
        expected = expected + log_q[:, c].exp() * bound(weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_bounds_stay_below_the_evidence(bound):
    exact, x = Exact(widen=1.3), X.double()
    pair = as_pair(exact.program)
    inspect(pair, (x, MISSING))
    with seeded(0), torch.no_grad():
        drawn = torch.stack([enumerated(bound, pair, x, MISSING, particles=20) for _ in range(50)])
    assert bool((drawn.mean(0) < exact.joint(x).logsumexp(1) + 5 * drawn.std(0) / 50**0.5).all())


def test_closed_kls_are_averaged_too():
    class Mixture(nn.Module):
        """y ~ p(y), z ~ p(z | y), x ~ p(x | z): closed KLs for both latents."""

        def __init__(self):
            super().__init__()
            self.q_y, self.q_z = nn.Linear(WIDTH, 3), nn.Linear(WIDTH + 3, 2)
            self.p_z, self.p_x = nn.Linear(3, 2), nn.Linear(2, WIDTH)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_tensor([0.1, -1.0, 0.4])))
                z = pyro.sample("z", dist.Normal(self.p_z(y), 0.8).to_event(1))
                pyro.sample("x", dist.Normal(self.p_x(z), 0.5).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.q_y(x)))
                joined = torch.cat([x.expand(*y.shape[:-1], -1), y], -1)
                pyro.sample("z", dist.Normal(self.q_z(joined), 0.6).to_event(1))

    with seeded(0):
        program = Mixture().double()
    closed, sampled = (
        [results(program, ours(400, kl=kl), DATA, seed=s) for s in range(20)] for kl in ("analytic", "sampled")
    )
    same_mean(closed, sampled)


class TwoSites(nn.Module):
    """A bit and a category that depend on each other, with z before, between or after them in the guide."""

    def __init__(self, order="abz"):
        super().__init__()
        self.order = order
        self.q = nn.ModuleDict({"a": nn.Linear(WIDTH + 2, 1), "b": nn.Linear(WIDTH + 2, 3)})
        self.q_z, self.out = nn.Linear(WIDTH + 2, 1), nn.Linear(3, WIDTH)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)))
            b = pyro.sample("b", dist.Categorical(logits=torch.stack([a, 1 - a, 0.5 * a], -1)))
            z = pyro.sample("z", dist.Normal(0.0 * a, 1.0))
            joined = torch.stack(torch.broadcast_tensors(a, b.to(x), z), -1)
            pyro.sample("x", dist.Normal(self.out(joined), 0.5).to_event(1), obs=x)

    def guide(self, x):
        found = [x.new_zeros(len(x)), x.new_zeros(len(x))]
        laws = {
            "a": lambda f: dist.Bernoulli(logits=self.q["a"](f)[..., 0]),
            "b": lambda f: dist.Categorical(logits=self.q["b"](f)),
            "z": lambda f: dist.Normal(self.q_z(f)[..., 0], 0.6),
        }
        with pyro.plate("data", len(x), dim=-1):
            for name in self.order:
                shape = torch.broadcast_shapes(*(f.shape for f in found[-2:]), (len(x),))
                parts = [x.expand(*shape, -1), *(f.expand(shape)[..., None].to(x) for f in found[-2:])]
                found.append(pyro.sample(name, laws[name](torch.cat(parts, -1))))


def two_sites(order):
    with seeded(0):
        return TwoSites(order).double()


def test_several_sites_are_summed_over_all_their_combinations():
    program = two_sites("abz")
    goals = (enumerating(program), pyros(300)), (program, ours(300))
    same_mean(*([results(p, goal, DATA, seed=s) for s in range(20)] for p, goal in goals))


@pytest.mark.parametrize("order", ["zab", "azb"])
def test_probabilities_may_depend_on_earlier_draws_under_the_elbo_alone(order):
    program = two_sites(order)
    pair = as_pair(program)
    inspect(pair, (DATA,))
    scores = pv.ELBO(300, estimator=pv.Score(pv.leave_one_out.replace, paths=True))
    same_mean(*([results(program, goal, DATA, seed=s) for s in range(20)] for goal in (ours(300), scores)))
    with pytest.raises(ValueError, match=r"site 'b': the guide draws 'z' before it.* only the ELBO"):
        pv.IWAE(3, estimator=enumerated)(pair, DATA)


# ---- what has no probability has no part


def test_known_labels_leave_the_classifier_alone():
    program = m2().eval()
    found = results(program, ours(2), X, KNOWN)
    assert all(bool(g.isfinite().all()) for g in found.values())
    grads = [g for n, g in found.items() if "classifier" in n]
    assert grads
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("goal", [pv.ELBO, pv.IWAE])
def test_impossible_values_count_for_nothing(goal):
    class Impossible(nn.Module):
        """One category of three has no probability in the guide, and an infinite weight, or none, in the model."""

        def __init__(self, far):
            super().__init__()
            self.logits, self.far = nn.Parameter(torch.tensor([0.2, -0.3])), far
            self.loc = nn.Parameter(torch.tensor([0.1, 1.0, -0.5]))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                y = pyro.sample("y", dist.Categorical(torch.ones(3)))
                loc = torch.where(y == 2, self.far * self.loc[2], self.loc[y])
                pyro.sample("x", dist.Normal(loc[..., None], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                logits = torch.cat([self.logits, self.logits.new_full((1,), -math.inf)])
                pyro.sample("y", dist.Categorical(logits=logits.expand(len(x), 3)))

    found = [results(Impossible(far), goal(2, estimator=enumerated), X[:, :1]) for far in (1.0, 1e30)]
    assert all(bool(g.isfinite().all()) for g in found[0].values())
    close(*found)


# ---- training


@pytest.mark.parametrize("goal", [pv.ELBO, partial(pv.ELBO, kl="auto"), pv.IWAE])
def test_captured_and_as_written(interpreted, goal):
    captured_as_written(m2(conditional=True, alpha=1.0), goal(2, estimator=enumerated), X, Y)
    assert interpreted


def test_a_graph_made_first_draws_what_the_programs_draw(interpreted):
    """The values are counted while tracing then, which must neither be part of the graph nor take a number."""
    program = m2()
    for order in (["require", "off"], ["off", "require"]):
        pair, results = as_pair(copy.deepcopy(program)), {}
        inspect(pair, (X, Y))
        for how in order:
            with seeded(0):
                value, *_ = Stepper(update_of(pair, ours(2)), how).gradients(X, Y)
                results[how] = torch.stack([value, *torch.rand(2)])
        torch.testing.assert_close(results["off"], results["require"])
    assert len(interpreted) == 2


def test_a_graph_is_recognised_when_traced_again(interpreted):
    pair = as_pair(m2(alpha=1.0))
    inspect(pair, (X, Y))
    stepper = Stepper(update_of(pair, ours()), "require")
    for _ in range(3):
        stepper((X, Y))
        stepper.recheck((X, Y))  # raises where it is not
    assert len(interpreted) == 1


def test_trains_under_fit(interpreted):
    trains_under_fit(m2(alpha=1.0), ours(), X, Y, compile="require")
    assert interpreted
    trains_under_fit(m2(True, alpha=1.0), pv.IWAE(2, estimator=enumerated), X, Y)


def test_the_layout_tells_how_many_values_there_are():
    category, bits = case("category"), case("bernoulli")
    assert inspect(category.pair, category.batch).values == {"z": 2}
    assert "no list of its values" in inspect(bits.pair, bits.batch).values["z"]
    normal = case("one level")
    assert inspect(normal.pair, normal.batch).values == {}


# ---- what is refused


class One(nn.Module):
    """A single latent of any law, under any handler, in one or two plates."""

    def __init__(self, law, handler=None, inner=False):
        super().__init__()
        self.law, self.handler, self.inner, self.shift = law, handler, inner, nn.Parameter(torch.zeros(()))

    def draw(self):
        with pyro.plate("inner", 2, dim=-2) if self.inner else nullcontext(), self.handler or nullcontext():
            return pyro.sample("y", self.law(self.shift))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            y = self.draw()
            y = y.sum(-2, keepdim=len(y.shape) > 2) if self.inner else y
            pyro.sample("x", dist.Normal((y + self.shift)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            self.draw()


def refuse(program, *batch, match, goal=None):
    pair = as_pair(program)
    inspect(pair, batch)
    with pytest.raises(ValueError, match=match):
        (goal or ours())(pair, *batch)


def test_pairs_without_a_sum_are_refused():
    refuse(vae(), torch.rand(3, 12), match="site 'z': no discrete latent.* use the estimator pathwise")
    refuse(m2(labels="relaxed"), X, Y, match="site 'y', 'z': no discrete latent")
    bits = case("bernoulli")
    refuse(bits.pair, *bits.batch, match=r"site 'z': Bernoulli with events of shape \(2,\) gives no list")


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (One(lambda s: dist.Poisson(s.exp())), "site 'y': Poisson .* gives no list of its values.* by scores"),
        (One(lambda s: dist.VonMises(s, 1.0)), "site 'y': VonMises .* gives no list"),
        (One(lambda s: dist.Bernoulli(logits=s), poutine.mask(mask=torch.tensor([True, False, True]))), "masked"),
        (One(lambda s: dist.Bernoulli(logits=s).mask(torch.tensor(True))), "site 'y': it is masked"),
        (One(lambda s: dist.Bernoulli(logits=s), inner=True), "site 'y': it has several draws per datum"),
    ],
    ids=["counts", "angles", "handler mask", "mask", "inner plate"],
)
def test_sites_that_cannot_be_summed_over_are_refused(program, match):
    refuse(program, torch.randn(3, 1), match=match)
