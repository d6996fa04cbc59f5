"""Monotone maps of one coordinate: the identity at first, slopes that are derivatives, exact inverses."""

import math

import pytest
import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from torch.nn.functional import softplus

from ppl_vae.scalars import AffineMap, SplineMap

MAPS = [AffineMap(), AffineMap(0.5), SplineMap(), SplineMap(bins=2, bound=1.0), SplineMap(bins=20, bound=8.0)]


def parameters(scalar, scale, *lead, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*lead, scalar.numbers, 3, generator=g, dtype=dtype)


def points(*lead, dtype=torch.float64, scale=3.0):
    return scale * torch.randn(*lead, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("scalar", MAPS, ids=repr)
def test_zeros_are_the_identity(scalar):
    x = points(200)
    for way in (scalar, scalar.inverse):
        y, log_slope = way(x, parameters(scalar, 0.0, 200))
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("scalar", MAPS, ids=repr)
def test_slopes_are_derivatives_and_inverses_invert(scalar, scale):
    x, raw = points(5, 200).requires_grad_(), parameters(scalar, scale, 5, 200)
    y, log_slope = scalar(x, raw)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log())
    back, same = scalar.inverse(y.detach(), raw)
    torch.testing.assert_close(back, x.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(same, log_slope.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scalar", MAPS, ids=repr)
def test_they_rise(scalar):
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None].expand(-1, 3)
    y, _ = scalar(x, parameters(scalar, 2.0).expand(4001, -1, -1))
    assert (y.diff(dim=0) > 0).all()


@pytest.mark.parametrize("scalar", MAPS, ids=repr)
def test_far_away_all_is_finite(scalar):
    x = torch.tensor([[-1e6, 0.0, 1e6], [3.0, -3.0, 1.0]], requires_grad=True)
    raw = 100 * parameters(scalar, 1.0, 2, dtype=torch.float32).requires_grad_()
    for way in (scalar, scalar.inverse):
        values = way(x, raw)
        gradients = torch.autograd.grad(sum(v.sum() for v in values), (x, raw))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        if isinstance(scalar, SplineMap):
            outside = x.abs() > scalar.bound
            assert torch.equal(values[0][outside], x[outside])
            assert (values[1][outside] == 0).all()


def test_the_spline_is_pyros():
    """Theirs has the slope .999 at the ends; the inner bins are the same."""
    scalar = SplineMap(bins=6, bound=2.0)
    x, raw = points(300, scale=0.8), parameters(scalar, 1.0, 300)
    widths, heights, slopes = raw.transpose(-1, -2).split([6, 6, 5], dim=-1)
    slopes = softplus(slopes + math.log(math.expm1(0.999)))
    y, log_slope = _monotonic_rational_spline(x, widths.softmax(-1), heights.softmax(-1), slopes, bound=2.0)
    ours, log_ours = scalar(x, raw)
    torch.testing.assert_close(ours, y, atol=2e-3, rtol=0)
    torch.testing.assert_close(log_ours, log_slope, atol=2e-3, rtol=0)
    edges = 2.0 * (2 * (1e-3 + (1 - 6e-3) * widths.softmax(-1)).cumsum(-1) - 1)
    inner = (x > edges[..., 0]) & (x < edges[..., 4])
    torch.testing.assert_close(ours[inner], y[inner])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineMap(0.0), "limit must be positive and finite, got 0.0"),
        (lambda: AffineMap(math.inf), "limit must be positive and finite, got inf"),
        (lambda: SplineMap(bins=1), "bins must be from 2 to 500, got 1"),
        (lambda: SplineMap(bins=501), "bins must be from 2 to 500, got 501"),
        (lambda: SplineMap(bound=-1.0), "bound must be positive and finite, got -1.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
