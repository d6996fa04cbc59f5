"""Bounds: maps of log weights, against sums written out, at the edges, and as laws."""

import math

import pytest
import torch

from ppl_vae.bounds import Grouped, Mixed, Renyi, Thermodynamic, derivatives, elbo, iwae


def named(bound):
    return getattr(bound, "__name__", repr(bound))  # a function's repr holds an address


OF_ALL = [elbo, iwae, Renyi(0.5), Renyi(-1.0), Mixed(0.3), Thermodynamic((0, 0.1, 0.4))]
BOUNDS = pytest.mark.parametrize("bound", OF_ALL, ids=named)


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


# ---- families of bounds
def test_renyis_bounds_lead_from_one_to_the_other():
    w = weights(6)
    torch.testing.assert_close(Renyi(0.0)(w), iwae(w))
    torch.testing.assert_close(Renyi(1 - 1e-6)(w), elbo(w), rtol=1e-4, atol=1e-4)
    values = torch.stack([Renyi(alpha)(w) for alpha in (-5.0, -1.0, 0.0, 0.3, 0.9, 2.0)])
    assert bool((values.diff(dim=0) < 0).all())
    torch.testing.assert_close(Renyi(-1e4)(w), w.max(0).values, rtol=0, atol=1e-2)
    by_hand = (0.5 * w).exp().mean(0).log() / 0.5
    torch.testing.assert_close(Renyi(0.5)(w), by_hand)


def test_groups_lead_from_one_to_the_other():
    w = weights(6)
    torch.testing.assert_close(Grouped(iwae, 1)(w), iwae(w))
    torch.testing.assert_close(Grouped(iwae, 6)(w), elbo(w))
    by_hand = (iwae(w[:3]) + iwae(w[3:])) / 2
    torch.testing.assert_close(Grouped(iwae, 2)(w), by_hand)
    assert bool((Grouped(iwae, 3)(w) < Grouped(iwae, 2)(w)).all())
    with pytest.raises(ValueError, match="particles: 6 do not make 4 groups of one size"):
        Grouped(iwae, 4)(w)


def test_a_combination_of_bounds():
    w = weights(6)
    torch.testing.assert_close(Mixed(1.0)(w), elbo(w))
    torch.testing.assert_close(Mixed(0.0)(w), iwae(w))
    torch.testing.assert_close(Mixed(0.25)(w), 0.25 * elbo(w) + 0.75 * iwae(w))


def test_the_thermodynamic_bound_is_a_sum_below_an_integral():
    w = weights(6)
    torch.testing.assert_close(Thermodynamic([0])(w), elbo(w))
    by_hand = 0.3 * w.mean(0) + 0.7 * ((0.3 * w).softmax(0) * w).sum(0)
    torch.testing.assert_close(Thermodynamic((0, 0.3))(w), by_hand)
    finer = torch.stack([Thermodynamic([i / n for i in range(n)])(w) for n in (1, 2, 4, 8, 16)])
    assert bool((finer.diff(dim=0) > 0).all())
    assert bool((finer[-1] < iwae(w)).all())
    torch.testing.assert_close(Thermodynamic([i / 4000 for i in range(4000)])(w), iwae(w), rtol=0, atol=2e-3)


@pytest.mark.parametrize("bound", [*OF_ALL, Grouped(iwae, 3), Grouped(Renyi(0.4), 2)], ids=named)
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_derivatives_are_those_by_differentiation(bound, shift):
    w = weights(6) + shift
    for ours, theirs in zip(derivatives(bound, w), derivatives(lambda w: bound(w), w), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Renyi(1.0), "alpha must be finite and other than 1, where the bound is the ELBO; got 1.0"),
        (lambda: Renyi(math.nan), "alpha must be finite"),
        (lambda: Grouped(iwae, 0), "groups must be at least 1, got 0"),
        (lambda: Mixed(1.5), r"share must lie in \[0, 1\], got 1.5"),
        (lambda: Thermodynamic(()), "points must start at 0"),
        (lambda: Thermodynamic((0.1, 0.5)), "points must start at 0"),
        (lambda: Thermodynamic((0, 0.5, 0.5)), "rise, and stay below 1, got"),
        (lambda: Thermodynamic((0, 1.0)), "stay below 1"),
    ],
)
def test_settings_that_make_no_bound(make, message):
    with pytest.raises(ValueError, match=message):
        make()
