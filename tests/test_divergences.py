"""Closed KLs of correlated normals against diagonal ones: published numbers, torch's closed forms, sampling."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import ppl_vae as pv
from ppl_vae.discrete import OneHotCategorical
from ppl_vae.divergences import FullNormal, LowRankNormal
from ppl_vae.pairs import as_pair
from ppl_vae.posteriors import FullCovariance, LowRank
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def correlated(kind, *lead, d=3):
    loc = torch.randn(*lead, d, dtype=torch.float64)
    if kind == "full":
        tril = torch.randn(*lead, d, d, dtype=torch.float64).tril(-1)
        return FullNormal(loc, scale_tril=tril + torch.rand(*lead, d, dtype=torch.float64).add(0.2).diag_embed())
    factor = torch.randn(*lead, d, 2, dtype=torch.float64)
    return LowRankNormal(loc, factor, torch.rand(*lead, d, dtype=torch.float64).add(0.2))


def diagonal(*lead, d=3):
    return torch.randn(*lead, d, dtype=torch.float64), torch.rand(*lead, d, dtype=torch.float64).add(0.3)


@pytest.mark.parametrize("kind", ["full", "low rank"])
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"), [((), (), ()), ((5,), (), (5,)), ((4, 5), (5,), (4, 5)), ((), (5,), (5,))]
)
def test_it_is_torchs_between_the_same_two_normals(kind, ours, theirs, shape):
    q, (loc, scale) = correlated(kind, *ours), diagonal(*theirs)
    value = kl_divergence(q, dist.Normal(loc, scale).to_event(1))
    assert value.shape == shape
    torch.testing.assert_close(
        value, kl_divergence(q, dist.MultivariateNormal(loc, scale_tril=scale.diag_embed()))
    )


@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_expanded_by_plates(kind):
    q, (loc, scale) = correlated(kind, 5), diagonal()
    p = dist.Normal(loc, scale).to_event(1)
    plain = kl_divergence(q, p)
    assert plain.unique().numel() == 5
    torch.testing.assert_close(kl_divergence(q.expand((2, 5)), p.expand((2, 5))), plain.expand(2, 5))


def test_the_published_formula_for_uncorrelated_dimensions():
    """½ Σ (μ² + σ² - log σ² - 1) against N(0, I)."""
    loc, scale = diagonal(4)
    standard = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    expected = 0.5 * (loc**2 + scale**2 - (scale**2).log() - 1).sum(-1)
    torch.testing.assert_close(kl_divergence(FullNormal(loc, scale_tril=scale.diag_embed()), standard), expected)


@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_it_is_the_mean_of_log_q_minus_log_p(kind):
    q, (loc, scale) = correlated(kind), diagonal()
    p = dist.Normal(loc, scale).to_event(1)
    z = q.sample((100_000,))
    difference = q.log_prob(z) - p.log_prob(z)
    error = float(difference.std()) / math.sqrt(len(z))
    assert float(difference.mean()) == pytest.approx(float(kl_divergence(q, p)), abs=5 * error)
    assert error < 0.02 * float(kl_divergence(q, p))


def test_published_numbers_of_discrete_distributions():
    p = torch.tensor([0.36, 0.48, 0.16], dtype=torch.float64)
    p, q = (OneHotCategorical(lambda probs=probs: probs.log())() for probs in (p, torch.ones_like(p) / 3))
    assert float(kl_divergence(p, q)) == pytest.approx(0.0853, abs=5e-5)
    assert float(kl_divergence(q, p)) == pytest.approx(0.09746, abs=5e-6)


def test_what_has_no_closed_form_says_so_and_torchs_classes_are_left_alone():
    loc, tril = torch.zeros(3), torch.eye(3)
    ours, normal = FullNormal(loc, scale_tril=tril), dist.Normal(loc, 1.0)
    for q, p in [
        (ours, dist.Laplace(loc, 1.0).to_event(1)),
        (ours, dist.Normal(loc.expand(2, 3), 1.0).to_event(2)),
        (dist.MultivariateNormal(loc, scale_tril=tril), normal.to_event(1)),
        (dist.LowRankMultivariateNormal(loc, torch.ones(3, 1), torch.ones(3)), normal.to_event(1)),
    ]:
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)
    other = dist.MultivariateNormal(loc + 1, scale_tril=2 * tril)
    torch.testing.assert_close(
        kl_divergence(ours, other), kl_divergence(dist.MultivariateNormal(loc, scale_tril=tril), other)
    )


@pytest.mark.parametrize("posterior", [FullCovariance(pv.MLP(6, 9)), LowRank(pv.MLP(6, 12), 3, 2)])
@pytest.mark.parametrize("learned", [False, True])
def test_the_elbo_takes_it(posterior, learned):
    prior = (
        pv.Normal(lambda: torch.tensor([0.3, -0.2, 1.0]), pv.LearnedScale(0.7))
        if learned
        else pv.StandardNormal(3)
    )
    vae = pv.VAE(prior, pv.Normal(pv.MLP(3, 6), 1.0), posterior)
    x = torch.randn(4, 6)
    with torch.no_grad():
        terms = log_terms(as_pair(vae), x, particles=20_000, kl="analytic")
    assert terms.kl.shape == (20_000, 4)
    assert bool((terms.kl == terms.kl[:1]).all())
    sampled = terms.posterior - terms.prior
    assert bool(((sampled.mean(0) - terms.kl[0]).abs() < 5 * sampled.std(0) / math.sqrt(20_000)).all())
    value = pv.ELBO(kl="analytic")(as_pair(vae), x)
    value.sum().backward()
    assert all(p.grad.isfinite().all() for p in posterior.parameters())
