"""Hierarchies: exact against linear-Gaussian chains of one to three levels, and in training as every program."""

from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal
from trials import answers, captured_as_written, trains_under_fit, trains_under_svi, unbiased

import ppl_vae as pv
from ppl_vae.hierarchies import HierarchicalVAE, LadderVAE
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms

WIDTH = 3


def line(weight, bias, scale):
    """N(weight z + bias, scale²), in float64."""
    weight = torch.as_tensor(weight, dtype=torch.float64)
    net = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(torch.as_tensor(bias, dtype=torch.float64))
    law = pv.Normal(net, float(scale)).double()
    law.scale.value.fill_(scale)  # in all its digits
    return law


class Chain:
    """z_L ~ N(0, 1), z_l ~ N(w z_{l+1} + b, s²), x ~ N(a z_1 + c, s0²), each z a number; and what is known of it.

    Attributes:
        seen: for each level from the first up, (a, c, S): p(x | z_l) = N(a z_l + c, S).
        laws: for each level, mean and variance of p(z_l).
    """

    def __init__(self, levels, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=g, dtype=torch.float64)
        a, c, s0 = draw(WIDTH), draw(WIDTH), 0.6
        self.steps = [(float(draw(1)) + 0.5, float(draw(1)), 0.5 + 0.2 * level) for level in range(levels - 1)]
        self.likelihood = line(a[:, None], c, s0)
        self.priors = [line([[w]], [b], s) for w, b, s in self.steps]
        self.priors.append(pv.StandardNormal(1).double())
        self.seen, self.laws = [(a, c, s0**2 * torch.eye(WIDTH, dtype=torch.float64))], [(0.0, 1.0)]
        for w, b, s in self.steps:
            a, c, cov = self.seen[-1]
            self.seen.append((a * w, c + a * b, cov + s**2 * a.outer(a)))
        for w, b, s in reversed(self.steps):
            mean, variance = self.laws[0]
            self.laws.insert(0, (w * mean + b, w**2 * variance + s**2))
        a, c, cov = self.seen[-1]
        self.evidence = MultivariateNormal(c, cov + a.outer(a)).log_prob
        self.x = c + draw(4, WIDTH)

    def likeness(self, level):
        """P(x | z_l) as a normal of z_l: weight and bias of its mean in x, and its variance."""
        a, c, cov = self.seen[level]
        rows = torch.linalg.solve(cov, a)
        precision = float(a @ rows)
        return rows[None] / precision, -(rows @ c) / precision, 1 / precision

    def bottom_up(self, widen=1.0):
        """The posteriors p(z_1 | x), p(z_2 | z_1), ..."""
        weight, bias, variance = self.likeness(0)
        found = [joined(weight, bias, variance, *self.laws[0], widen)]
        for (w, b, s), law in zip(self.steps, self.laws[1:], strict=True):
            found.append(joined(torch.tensor([[1 / w]], dtype=torch.float64), -b / w, (s / w) ** 2, *law, widen))
        return found

    def evidences(self, widen=1.0):
        """What the ladder asks for: p(x | z_l) of each level, and p(z_L | x)."""
        lower = [self.likeness(level) for level in range(len(self.steps))]
        top = joined(*self.likeness(len(self.steps)), 0.0, 1.0, widen)
        return [*(line(w, [b], widen * v**0.5) for w, b, v in lower), top]

    def hierarchical(self, widen=1.0):
        return HierarchicalVAE(self.priors, self.likelihood, self.bottom_up(widen))

    def ladder(self, widen=1.0):
        features = [nn.Identity() for _ in self.priors]
        return LadderVAE(self.priors, self.likelihood, features, self.evidences(widen))


def joined(weight, bias, variance, mean, prior_variance, widen):
    """The product of N(z; weight u + bias, variance) and N(z; mean, prior_variance), as a conditional of u."""
    share = prior_variance / (prior_variance + variance)
    return line(share * weight, [share * bias + (1 - share) * mean], widen * (share * variance) ** 0.5)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["hierarchical", "ladder"])
def test_the_weight_under_the_exact_posterior_is_the_evidence(kind, levels):
    chain = Chain(levels)
    terms = log_terms(as_pair(getattr(chain, kind)()), chain.x, particles=7)
    torch.testing.assert_close(terms.weight(), chain.evidence(chain.x).expand(7, -1), rtol=1e-9, atol=1e-9)
    assert {name: z.shape for name, z in terms.samples.items()} == {f"z{i + 1}": (7, 4, 1) for i in range(levels)}


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kind", ["hierarchical", "ladder"])
def test_weights_are_unbiased_under_any_guide(kind, levels):
    chain = Chain(levels)
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(getattr(chain, kind)(1.4)), chain.x, particles=20_000).weight()
    assert weight.std(0).min() > 0.1  # not exact
    unbiased(weight, chain.evidence(chain.x))


def nets(kind, path=False):
    """Three levels of nets over 6 pixels."""
    sizes, states = [4, 3, 2], [5, 6, 7] if path else [4, 3, 2]
    tanh = partial(pv.MLP, activation=nn.Tanh)
    with seeded(0):
        priors = [pv.conditional_normal(tanh(states[i + 1], 8, 2 * sizes[i])) for i in range(2)]
        priors.append(pv.StandardNormal(2))
        likelihood = pv.Bernoulli(tanh(states[0], 8, 6))
        down = None
        if path:
            down = [pv.Concat(tanh(sizes[i] + states[i + 1], states[i]), None, None) for i in range(2)]
            down.append(tanh(2, states[2]))
        if kind == "hierarchical":
            posteriors = [pv.mean_field(tanh(a, 8, 2 * b)) for a, b in zip([6, 4, 3], sizes, strict=True)]
            return HierarchicalVAE(priors, likelihood, posteriors, down)
        features = [nn.Sequential(nn.Linear(a, 9), nn.Tanh()) for a in (6, 9, 9)]
        return LadderVAE(priors, likelihood, features, [pv.mean_field(nn.Linear(9, 2 * d)) for d in sizes], down)


X = (torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
CASES = [(kind, path) for kind in ("hierarchical", "ladder") for path in (False, True)]


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_the_joint_density_is_that_of_the_levels(kind, path):
    program = nets(kind, path)
    with seeded(1):
        z = {f"z{i + 1}": torch.randn(5, 8, d) for i, d in enumerate([4, 3, 2])}
    s3 = program.path[2](z["z3"]) if path else z["z3"]
    s2 = program.path[1](z["z2"], s3) if path else z["z2"]
    s1 = program.path[0](z["z1"], s2) if path else z["z1"]
    by_hand = torch.distributions.Normal(0, 1).log_prob(z["z3"]).sum(-1)
    by_hand = by_hand + program.priors[1](s3).log_prob(z["z2"]) + program.priors[0](s2).log_prob(z["z1"])
    by_hand = by_hand + program.likelihood(s1).log_prob(X)
    torch.testing.assert_close(pv.log_joint(as_pair(program), z, X), by_hand)


@pytest.mark.parametrize("path", [False, True])
def test_the_ladder_joins_by_precision(path):
    program = nets("ladder", path)
    pair = as_pair(program)
    with seeded(0):
        terms = log_terms(pair, X, particles=3)
    z, d, found = terms.samples, X, []
    for net, evidence in zip(program.features, program.evidence, strict=True):
        d = net(d)
        found.append(evidence(d).base_dist)
    s3 = program.path[2](z["z3"]) if path else z["z3"]
    s2 = program.path[1](z["z2"], s3) if path else z["z2"]
    by_hand = found[2].log_prob(z["z3"]).sum(-1)
    for level, above in ((1, s3), (0, s2)):
        prior = program.priors[level](above).base_dist
        a, b = found[level].variance.reciprocal(), prior.variance.reciprocal()
        mean = (found[level].mean * a + prior.mean * b) / (a + b)
        by_hand = by_hand + torch.distributions.Normal(mean, (a + b).rsqrt()).log_prob(z[f"z{level + 1}"]).sum(-1)
    torch.testing.assert_close(terms.posterior, by_hand, rtol=1e-4, atol=1e-4)


def test_the_ladder_survives_scales_at_their_limits():
    program = nets("ladder")
    with torch.no_grad():
        program.evidence[0].net.bias[4:] = 1e3  # log-scale 7
        program.priors[0].net[-1].bias[4:] = -1e3
    gradients = torch.autograd.grad(pv.ELBO()(as_pair(program), X).mean(), list(program.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)


# ---- which closed KL holds


def test_the_closed_kl_holds_under_the_ladder():
    chain = Chain(3)
    pair = as_pair(chain.ladder(1.4))
    with seeded(0), torch.no_grad():
        closed = log_terms(pair, chain.x, particles=20_000, kl="analytic")
        sampled = closed.posterior - closed.prior
    assert closed.kl.std(0).max() < sampled.std(0).min()  # of the lower levels, given a draw of the upper ones
    error = (sampled - closed.kl).std(0) / len(sampled) ** 0.5
    assert bool(((sampled - closed.kl).mean(0).abs() < 5 * error).all())


def test_the_closed_kl_is_refused_from_the_bottom_up_and_taken_where_it_holds():
    chain = Chain(3)
    pair = as_pair(chain.hierarchical(1.4))
    with pytest.raises(ValueError, match=r"the guide draws 'z3' after it, and the model before it.*use kl='auto'"):
        log_terms(pair, chain.x, kl="analytic")
    with seeded(0), torch.no_grad():
        terms = log_terms(pair, chain.x, particles=20_000, kl="auto")
    difference = terms.posterior - terms.prior - terms.kl
    assert difference.std(0).min() > 0.1  # the top level's is closed
    assert bool((difference.mean(0).abs() < 5 * difference.std(0) / len(difference) ** 0.5).all())


# ---- as every program

GOALS = {"elbo": pv.ELBO, "auto": partial(pv.ELBO, kl="auto"), "doubly": partial(pv.IWAE, 3, estimator=pv.doubly)}


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_it_trains_under_pyros_svi(kind, path):
    trains_under_svi(nets(kind, path), Trace_ELBO(), X)
    if kind == "ladder":  # of the other, Pyro warns of the order, and takes the closed KL all the same
        trains_under_svi(nets(kind, path), TraceMeanField_ELBO(), X)


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_it_trains_under_fit_and_answers(interpreted, kind, path):
    program = nets(kind, path)
    trains_under_fit(program, pv.ELBO(kl="auto"), X, compile="require")
    assert interpreted
    answers(trains_under_fit(program, pv.ELBO(), X), X)


@pytest.mark.parametrize(("kind", "path"), [("hierarchical", False), ("ladder", True)])
@pytest.mark.parametrize("goal", GOALS)
def test_captured_and_as_written(interpreted, kind, path, goal):
    captured_as_written(nets(kind, path), GOALS[goal](), X)


def test_pyros_mean_field_elbo_means_the_same():
    program = nets("ladder")
    trains_under_fit(program, TraceMeanField_ELBO(), X)


# ---- what is refused


def test_parts_must_match():
    chain = Chain(2)
    with pytest.raises(ValueError, match=r"posteriors: expected one per level, as priors, 2, got 1"):
        HierarchicalVAE(chain.priors, chain.likelihood, chain.bottom_up()[:1])
    with pytest.raises(ValueError, match=r"path: expected one per level, as priors, 2, got 1"):
        HierarchicalVAE(chain.priors, chain.likelihood, chain.bottom_up(), [nn.Identity()])
    with pytest.raises(ValueError, match=r"evidence: expected one per level, as priors, 2, got 1"):
        LadderVAE(chain.priors, chain.likelihood, [nn.Identity()] * 2, chain.evidences()[:1])
    with pytest.raises(ValueError, match=r"priors: expected one per level.*got none"):
        HierarchicalVAE([], chain.likelihood, [])


def test_the_ladder_joins_normals_alone():
    program = nets("ladder")
    program.evidence[0] = pv.Bernoulli(nn.Linear(9, 4))
    with pytest.raises(ValueError, match="site 'z1': the ladder joins diagonal normals, got Bernoulli"):
        log_terms(as_pair(program), X)
