"""The doubly reparameterised estimator: its rule by hand, its mean, its variance, what it leaves as it was."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import LATENT, PROGRAMS, ROWS, WIDTH, OneLevel, TwoLevel, case
from torch import nn
from torch.autograd.functional import hessian
from torch.distributions import Normal
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.bounds import derivatives, elbo, iwae
from ppl_vae.estimators import doubly, frozen, pathwise
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.traces import by_datum, log_joint, log_terms, run_guide, run_pair

SCORED = {"bernoulli", "category", "baseline"}
NO_TABLE = {"shared latent", "auto diagonal", "scaled", "nested, subsampled"}
REPARAMETERISED = [name for name in PROGRAMS if name not in SCORED | NO_TABLE]


def renyi(log_weight, alpha=0.5):
    """A bound that does not know its derivatives."""
    return (((1 - alpha) * log_weight).logsumexp(0) - math.log(len(log_weight))) / (1 - alpha)


def skewed(log_weight):
    """A bound whose particles differ in their parts, so that no rule for exchangeable ones will do."""
    steps = torch.arange(1.0, 1 + len(log_weight), dtype=log_weight.dtype)[:, None]
    return (log_weight + steps.log()).logsumexp(0) - steps.sum().log()


BOUNDS = [elbo, iwae, renyi, skewed]


def run(estimator, bound, pair, batch, seed=0, **options):
    """Value (B,), and gradient of its mean: name -> tensor, None where there is none."""
    named = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    value = estimator(bound, pair, *batch, **options)
    found = torch.autograd.grad(value.mean(), list(named.values()), allow_unused=True)
    return value.detach(), dict(zip(named, found, strict=True))


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient.values() if g is not None])


# ---------------------------------------------------------------- the rule
@pytest.mark.parametrize("bound", BOUNDS)
def test_derivatives_are_those_of_the_hessian(bound):
    g = torch.Generator().manual_seed(0)
    w = 2 * torch.randn(5, 3, generator=g, dtype=torch.float64)
    first, second = derivatives(bound, w)
    for b in range(3):
        column = w[:, b : b + 1]
        torch.testing.assert_close(second[:, b], hessian(lambda c: bound(c).sum(), column)[:, 0, :, 0].diagonal())
    (plain,) = torch.autograd.grad(bound(w.requires_grad_()).sum(), w)
    torch.testing.assert_close(first, plain)


def by_hand(program, x, bound, beta, particles, bottom_up):
    """The guide's gradient of eq. 3 for two Gaussian levels: nets written out, densities with constant ones."""
    constants = {n: p.detach() for n, p in program.second.named_parameters()}

    def law(raw):
        loc, log_scale = raw.chunk(2, -1)
        return Normal(loc, log_scale.exp())

    joined = lambda v: torch.cat([x.expand(particles, -1, -1), v], -1)  # noqa: E731
    first = law(program.first(x).expand(particles, -1, -1)).rsample()
    second = law(program.second(joined(first))).rsample()
    log_q = law(program.first(x).detach()).log_prob(first).sum(-1)
    log_q = log_q + law(functional_call(program.second, constants, (joined(first),))).log_prob(second).sum(-1)
    z, h = (first, second) if bottom_up else (second, first)
    log_p = Normal(0, 1).log_prob(h).sum(-1) + law(program.low(h)).log_prob(z).sum(-1)
    weight = law(program.out(z)).log_prob(x).sum(-1) + beta * (log_p - log_q)
    slopes = torch.autograd.functional.jacobian(lambda w: bound(w).sum(), weight.detach())
    curves = [hessian(lambda c: bound(c[:, None])[0], column).diagonal() for column in weight.detach().T]
    curvature = torch.stack(curves, 1)
    surrogate = ((slopes - beta * curvature) * weight).sum(0).mean()
    guide = [*program.first.parameters(), *program.second.parameters()]
    return torch.autograd.grad(surrogate, guide)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", ["two levels", "bottom up"])
def test_the_rule_written_out(name, bound, beta):
    """Draw by draw: each level's densities pass back once, second-level ones to the first level's draw, too."""
    c = case(name, torch.float64)
    _, ours = run(doubly, bound, c.pair, c.batch, particles=4, beta=beta)
    torch.manual_seed(0)
    hand = by_hand(c.pair.program, *c.batch, bound, beta, 4, name == "bottom up")
    guide = [g for n, g in ours.items() if ".first." in n or ".second." in n]
    for mine, theirs in zip(guide, hand, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_one_particle_sticks_the_landing():
    """At K = 1 every bound is the ELBO, whose weight stays 1."""
    c = case("two levels", torch.float64)
    gradients = [run(doubly, bound, c.pair, c.batch, particles=1)[1] for bound in (elbo, iwae)]
    torch.testing.assert_close(*[flat(g) for g in gradients])


# ---------------------------------------------------------------- what it shares with the pathwise one
@pytest.mark.parametrize("name", REPARAMETERISED)
@pytest.mark.parametrize("bound", [elbo, iwae])
def test_value_and_model_gradient_are_the_plain_ones(name, bound):
    c = case(name, torch.float64)
    model = {id(p) for p in model_parameters(c)}
    (plain, first), (value, second) = (
        run(e, bound, c.pair, c.batch, particles=4, beta=0.5) for e in (pathwise, doubly)
    )
    torch.testing.assert_close(value, plain)
    moved = 0
    for n, p in c.pair.named_parameters():
        if id(p) in model and first[n] is not None:
            torch.testing.assert_close(second[n], first[n])
        elif first[n] is not None:
            moved += float((second[n] - first[n]).abs().max())
    assert moved > 1e-3, "the guide's gradient is the plain one too"


def model_parameters(c):
    """Those that the log-joint at given latents depends on."""
    model = run_pair(c.pair, c.batch, 2)[0]
    latents = {n: by_datum(s, s["value"]).detach() for n, s in model.items() if not s["is_observed"]}
    parameters = list(c.pair.parameters())
    found = torch.autograd.grad(log_joint(c.pair, latents, *c.batch).sum(), parameters, allow_unused=True)
    return [p for p, g in zip(parameters, found, strict=True) if g is not None]


@pytest.mark.parametrize(
    ("name", "bound", "particles", "beta"),
    [
        ("one level", iwae, 5, 1.0),
        ("one level", elbo, 3, 0.5),
        ("two levels", iwae, 5, 1.0),
        ("two levels", iwae, 5, 0.4),
        ("bottom up", renyi, 3, 1.5),
        ("nested", iwae, 4, 1.0),
        ("handler mask", iwae, 4, 0.6),
        ("law mask", iwae, 4, 1.0),
        ("bare params", skewed, 4, 1.0),
    ],
)
def test_the_mean_gradient_is_that_of_the_pathwise_estimator(name, bound, particles, beta):
    """Band from the standard error of paired differences, over batches of the same rows and draws."""
    c = case(name, torch.float64)
    with torch.no_grad():
        for p in c.pair.parameters():
            p.mul_(0.5)  # tails light enough for standard errors to be believed
    batch = (c.batch[0].repeat(60, 1),)
    both = [
        [flat(run(e, bound, c.pair, batch, seed, particles=particles, beta=beta)[1]) for e in (pathwise, doubly)]
        for seed in range(80)
    ]
    plain, ours = (torch.stack(g) for g in zip(*both, strict=True))
    difference = ours - plain
    error = difference.std(0) / math.sqrt(len(difference))
    assert bool((difference.mean(0).abs() <= 4.5 * error + 1e-12).all())
    assert float(error.norm() / plain.mean(0).norm()) < 0.05, "too noisy to tell"


# ---------------------------------------------------------------- its variance
def apart(**options):
    """A linear-Gaussian model and, with parameters of its own, its guide."""
    program, x = LinearGaussian.reference(**options)
    twin = copy.deepcopy(program)
    return Pair(program.model, twin.guide), twin, x


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_variance_at_the_posterior(bound):
    """Every draw of the guide's gradient is zero, where the pathwise one has only a mean of zero."""
    pair, twin, x = apart(guide="exact")
    names = [n for n, p in pair.named_parameters() if any(p is q for q in twin.parameters())]
    for estimator, still in ((doubly, True), (pathwise, False)):
        _, gradient = run(estimator, bound, pair, (x.expand(4, -1),), particles=3)
        size = max(float(gradient[n].abs().max()) for n in names)
        assert (size < 1e-12) == still


A, NOISE = 0.8, 0.5  # h ~ N(0, 1), z | h ~ N(A h, 1), x | z ~ N(z, NOISE)


def chain(x):
    with pyro.plate("data", len(x), dim=-1):
        h = pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(A * h, 1.0))
        pyro.sample("x", dist.Normal(z, math.sqrt(NOISE)), obs=x)


class Chained(nn.Module):
    """The exact posterior of the chain, from the top: p(h | x) p(z | h, x)."""

    def __init__(self):
        super().__init__()
        total = A**2 + 1 + NOISE
        exact = [A / total, math.sqrt(1 - A**2 / total), A * NOISE / (1 + NOISE), 1 / (1 + NOISE)]
        self.raw = nn.Parameter(torch.tensor([*exact, math.sqrt(NOISE / (1 + NOISE))], dtype=torch.float64))

    def forward(self, x):
        a, s, b, c, t = self.raw
        with pyro.plate("data", len(x), dim=-1):
            h = pyro.sample("h", dist.Normal(a * x, s))
            pyro.sample("z", dist.Normal(b * h + c * x, t))


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_no_variance_at_the_posterior_of_two_levels(bound):
    """Only if log q(z | h) passes its gradient to h: a density cut off from its parents would not do."""
    pair, x = Pair(chain, Chained()), torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64)
    _, gradient = run(doubly, bound, pair, (x,), particles=4)
    assert float(flat(gradient).abs().max()) < 1e-12
    _, gradient = run(pathwise, bound, pair, (x,), particles=4)
    assert float(flat(gradient).abs().max()) > 1e-3


def test_more_particles_do_not_drown_the_guide():
    """At K = 64 the pathwise gradient is mostly noise, the doubly reparameterised one is not."""
    pair, twin, x = apart(widen=1.3)
    names = [n for n, p in pair.named_parameters() if any(p is q for q in twin.parameters())]
    noise, ratio = {}, {}
    for estimator in (pathwise, doubly):
        for k in (4, 64):
            draws = [run(estimator, iwae, pair, (x,), seed, particles=k)[1] for seed in range(300)]
            draws = torch.stack([torch.cat([d[n].flatten() for n in names]) for d in draws])
            noise[estimator, k] = float(draws.var(0).sum())
            ratio[estimator, k] = float(draws.mean(0).norm()) / math.sqrt(noise[estimator, k])
    assert noise[doubly, 64] < 0.2 * noise[pathwise, 64]
    assert ratio[doubly, 64] > ratio[doubly, 4]


def test_far_weights_leave_finite_gradients():
    """Where a particle's share underflows, f_kk / f_k has no value, and the particle no part."""
    pair, _, x = apart(widen=40.0)
    weight = log_terms(pair, x, particles=6).weight()
    assert bool((weight.softmax(0) == 0).any()), "not far"
    _, gradient = run(doubly, iwae, pair, (x,), particles=6)
    assert bool(flat(gradient).isfinite().all())


# ---------------------------------------------------------------- captured
CAPTURED = [n for n in REPARAMETERISED if n not in ("given rows", "bottom up", "closed over")]


@pytest.mark.parametrize("replaced", [False, True], ids=["own parameters", "parameters as arguments"])
@pytest.mark.parametrize(("name", "bound"), [*((n, iwae) for n in CAPTURED), ("two levels", renyi)])
def test_captured_with_its_gradient(name, bound, replaced):
    """One graph, the same numbers on the same draws; a fake tensor has no number to read."""
    c = case(name)
    beta = torch.tensor(0.7)

    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = c.pair

        def forward(self, *batch):
            return doubly(bound, self.pair, *batch, particles=3, beta=beta)

    objective = Objective()
    named = dict(objective.named_parameters())

    def step(parameters, *batch):
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()} if replaced else named
        value = functional_call(objective, leaves, batch) if replaced else objective(*batch)
        found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        return [value.detach(), *(g for g in found if g is not None)]

    plain = {n: p.detach() for n, p in named.items()}
    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(plain, *c.batch)
    batch = tuple(x + 0.5 for x in c.batch)
    results = []
    for function in (step, graph):
        torch.manual_seed(5)
        results.append(function(plain, *batch))
    assert len(results[0]) > 2
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager)
    assert all(p.requires_grad for p in c.pair.parameters())


# ---------------------------------------------------------------- what it leaves as it was
def test_a_net_that_a_function_closes_over_is_frozen_too():
    whole, closed = case("one level", torch.float64), case("closed over", torch.float64)
    with torch.no_grad():
        for (_, p), (_, q) in zip(whole.pair.named_parameters(), whole.pair.named_parameters(), strict=True):
            p.copy_(q)
        for name in ("encoder", "decoder"):
            for part in ("weight", "bias"):
                own = dict(closed.pair.named_parameters())[f"params.{name}$$${part}"]
                own.copy_(getattr(getattr(whole.pair.program, name), part))
    ours, theirs = (run(doubly, iwae, c.pair, c.batch, particles=4)[1] for c in (closed, whole))
    for name in ("encoder", "decoder"):
        for part in ("weight", "bias"):
            first, second = ours[f"params.{name}$$${part}"], theirs[f"programs.0.{name}.{part}"]
            torch.testing.assert_close(first, second)


def test_parameters_are_constants_while_frozen():
    c = case("two levels")
    drawn = run_guide(c.pair, c.batch, 2)
    with frozen(c.pair):
        again = run_guide(c.pair, c.batch, 2, drawn)
        assert not any(p.requires_grad for p in c.pair.parameters())
    site = again.nodes["z"]
    (to_h,) = torch.autograd.grad(site["fn"].log_prob(site["value"].detach()).sum(), drawn.nodes["h"]["value"])
    assert bool((to_h != 0).any())


def test_what_the_user_froze_stays_frozen_also_after_an_error():
    c = case("two levels")
    fixed = c.pair.program.first.bias.requires_grad_(False)
    trained = [p for p in c.pair.parameters() if p is not fixed]
    doubly(iwae, c.pair, *c.batch, particles=2).sum().backward()
    with pytest.raises(ZeroDivisionError), frozen(c.pair):
        raise ZeroDivisionError
    assert not fixed.requires_grad
    assert fixed.grad is None
    assert all(p.requires_grad and p.grad is not None for p in trained)


class Normed(OneLevel):
    """Its encoder has running statistics, of the rows of a batch."""

    def __init__(self, extra=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.encoder = nn.Sequential(self.norm, self.encoder, *([] if extra is None else [extra]))


def test_running_statistics_see_a_batch_once():
    seen = []
    for estimator in (pathwise, doubly):
        torch.manual_seed(0)
        program = Normed()
        own = program.norm.running_mean
        run(estimator, iwae, as_pair(program), (torch.randn(ROWS, WIDTH),), particles=3)
        assert program.norm.running_mean is own
        assert int(program.norm.num_batches_tracked) == 1
        seen.append(own.clone())
    assert torch.equal(*seen)


def test_dropout_in_the_guide_is_refused_in_training_alone():
    """The second run would have other units dropped than the one that drew."""
    pair = as_pair(Normed(nn.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"guide draws random numbers outside.*dropout.*pathwise"):
        doubly(iwae, pair, torch.randn(ROWS, WIDTH), particles=3)
    assert all(p.requires_grad for p in pair.parameters())
    assert doubly(iwae, pair.eval(), torch.randn(ROWS, WIDTH), particles=3).shape == (ROWS,)


def test_dropout_in_the_model_is_no_matter():
    program = OneLevel()
    program.decoder = nn.Sequential(nn.Dropout(0.5), program.decoder)
    assert doubly(iwae, as_pair(program), torch.randn(ROWS, WIDTH), particles=3).shape == (ROWS,)


def test_without_gradients_the_guide_runs_once():
    calls = []

    class Counted(TwoLevel):
        def guide(self, x):
            calls.append(torch.is_grad_enabled())
            super().guide(x)

    pair, x = as_pair(Counted()), torch.randn(ROWS, WIDTH)
    doubly(iwae, pair, x, particles=3)
    calls.clear()
    with torch.no_grad():
        torch.manual_seed(0)
        value = doubly(iwae, pair, x, particles=3)
    assert calls == [False]
    torch.testing.assert_close(value, run(doubly, iwae, pair, (x,), particles=3)[0])
    assert calls == [False, True, True]


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("kl", ["analytic", "auto"])
def test_a_closed_kl_is_refused(kl):
    c = case("one level")
    with pytest.raises(ValueError, match=f"kl must be 'sampled'.*got '{kl}'.*pathwise"):
        doubly(elbo, c.pair, *c.batch, particles=2, kl=kl)


@pytest.mark.parametrize("name", sorted(SCORED))
def test_a_draw_without_gradient_is_refused(name):
    c = case(name)
    with pytest.raises(ValueError, match=r"site 'z'.*no reparameterised sampler"):
        doubly(iwae, c.pair, *c.batch, particles=2)


@pytest.mark.parametrize("name", sorted(NO_TABLE))
def test_pairs_without_a_table_are_refused(name):
    c = case(name)
    with pytest.raises(ValueError, match=r"site '.*(outside the data plate|is scaled)"):
        doubly(iwae, c.pair, *c.batch, particles=2)


class Mixed(TwoLevel):
    """One of two latents is masked, or a point."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            h = pyro.sample("h", dist.Normal(self.first(x)[..., :LATENT], 1.0).to_event(1))
            loc = self.second(torch.cat([x.expand(*h.shape[:-1], -1), h], -1))[..., :LATENT]
            pyro.sample("z", self.law(loc, x))


@pytest.mark.parametrize(
    "law",
    [
        lambda loc, x: dist.Normal(loc, 1.0).to_event(1).mask(x[:, 0] > 0),
        lambda loc, x: dist.Normal(loc, 1.0).mask(torch.tensor([True, False])).to_event(1),
        lambda loc, x: dist.Delta(loc, event_dim=1),
    ],
    ids=["rows", "entries", "point"],
)
def test_a_guide_with_scores_for_some_of_its_draws_is_refused(law):
    with pytest.raises(ValueError, match=r"site 'z'.*other draws than at 'h'.*pathwise"):
        doubly(iwae, as_pair(Mixed(law)), torch.randn(ROWS, WIDTH), particles=2)


@pytest.mark.parametrize("masked", [False, True])
def test_points_have_no_score(masked):
    """Their gradient is the pathwise one; so is that of a guide none of whose densities counts."""

    class Point(OneLevel):
        def law(self, fn, x):
            return fn.mask(False) if masked else dist.Delta(fn.mean, event_dim=1)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1).mask(True), obs=x.repeat(1, 2))

    pair = as_pair(Point().double())
    batch = (torch.randn(ROWS, WIDTH, dtype=torch.float64),)
    first, second = (run(e, iwae, pair, batch, particles=3)[1] for e in (pathwise, doubly))
    torch.testing.assert_close(flat(first), flat(second))


def test_other_bounds_by_partial():
    c = case("one level", torch.float64)
    first, second = (run(doubly, b, c.pair, c.batch, particles=3)[1] for b in (renyi, partial(renyi, alpha=0.5)))
    torch.testing.assert_close(flat(first), flat(second))
