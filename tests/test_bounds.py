"""Bounds: maps of log weights, against sums written out, at the edges, and as laws."""

import math

import pytest
import torch

from ppl_vae.bounds import elbo, iwae

BOUNDS = pytest.mark.parametrize("bound", [elbo, iwae])


def weights(particles, data=5, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(particles, data, generator=g, dtype=torch.float64)


def test_written_out():
    log_weight = torch.tensor([[0.0, -1.0], [math.log(3.0), -1.0]], dtype=torch.float64)
    torch.testing.assert_close(elbo(log_weight), torch.tensor([math.log(3) / 2, -1.0], dtype=torch.float64))
    torch.testing.assert_close(iwae(log_weight), torch.tensor([math.log(2), -1.0], dtype=torch.float64))


@BOUNDS
def test_one_particle_is_its_own_bound(bound):
    w = weights(1)
    torch.testing.assert_close(bound(w), w[0])


@BOUNDS
def test_each_datum_has_its_own_weights(bound):
    """Not one weight for the batch: a change of one column changes one value."""
    w = weights(4)
    other = w.clone()
    other[:, 2] += 3.0
    torch.testing.assert_close(bound(other) - bound(w), torch.tensor([0.0, 0, 3, 0, 0], dtype=torch.float64))
    assert not torch.allclose(iwae(w).sum(), iwae(w.sum(1, keepdim=True)).sum())


@BOUNDS
def test_order_and_repetition_of_particles_do_not_matter(bound):
    """In particular log K is that of the particles given, so that repeating all of them changes nothing."""
    w = weights(6)
    torch.testing.assert_close(bound(w.flip(0)), bound(w))
    torch.testing.assert_close(bound(w.repeat(3, 1)), bound(w))


def test_between_mean_and_maximum():
    w = weights(8)
    assert bool((elbo(w) < iwae(w)).all())
    assert bool((iwae(w) < w.max(0).values).all())
    assert bool((iwae(w) >= w.max(0).values - math.log(8)).all())


def test_splitting_particles_never_raises_the_bound():
    w = weights(64, data=200)
    for k in (1, 2, 8, 32):
        split = torch.stack([iwae(part) for part in w.split(k)]).mean(0)
        assert bool((split <= iwae(w) + 1e-12).all())


def test_not_the_self_normalised_sum():
    """Σ w̃ log w exceeds the bound by log K - H(w̃); it is optimistic and reported by some."""
    w = weights(5)
    share = w.softmax(0)
    wrong = (share * w).sum(0)
    entropy = -(share * share.log()).sum(0)
    torch.testing.assert_close(wrong - iwae(w), math.log(5) - entropy)
    assert bool((wrong > iwae(w)).all())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_far_from_zero(shift):
    """Densities of images under- and overflow; their logarithms do not."""
    w = weights(10)
    torch.testing.assert_close(iwae(w + shift) - shift, iwae(w), rtol=0, atol=1e-9)


def test_impossible_particles():
    """A particle of weight zero counts among K; all of them make the bound -inf, and not NaN."""
    w = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    assert iwae(w).tolist() == [pytest.approx(-math.log(2)), -math.inf]


def test_gradients_are_normalised_weights():
    w = weights(7).requires_grad_()
    (gradient,) = torch.autograd.grad(iwae(w).sum(), w)
    torch.testing.assert_close(gradient, w.softmax(0).detach())
    (gradient,) = torch.autograd.grad(elbo(w).sum(), w)
    torch.testing.assert_close(gradient, torch.full_like(w, 1 / 7))
