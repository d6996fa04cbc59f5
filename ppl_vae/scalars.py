"""Monotone maps of one coordinate: what autoregressive and coupling flows do to each, given others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from ppl_vae.conditionals import bounded

__all__ = ["AffineMap", "ScalarMap", "SplineMap"]


class ScalarMap(ABC):
    """A monotone map of one coordinate with parameters ``raw`` (..., numbers, latent); the identity where 0.

    Attributes:
        numbers: how many parameters a coordinate takes.
    """

    numbers: int

    @abstractmethod
    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of ``x`` (..., latent) and the log of the slope there, of the same shape."""

    @abstractmethod
    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x that is mapped to ``y``, and the log of the map's slope at x."""


@dataclass(frozen=True)
class AffineMap(ScalarMap):
    """x ↦ μ + σ x (Kingma et al. 2016, eq. 10), with |log σ| below ``limit``.

    Raises:
        ValueError: ``limit`` is not positive and finite.
    """

    limit: float = 3.0
    numbers = 2

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {self.limit}")

    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ + σ x and log σ."""
        log_scale = bounded(raw[..., 1, :], self.limit)
        return raw[..., 0, :] + log_scale.exp() * x, log_scale

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y - μ) / σ and log σ."""
        log_scale = bounded(raw[..., 1, :], self.limit)
        return (y - raw[..., 0, :]) * (-log_scale).exp(), log_scale


@dataclass(frozen=True)
class SplineMap(ScalarMap):
    """A monotone rational-quadratic spline on [-bound, bound] (Durkan et al. 2019, eq. 4), the identity outside.

    Args:
        bins: how many pieces.
        bound: B; give the prior's mass room, 3 to 5 for standard latents.

    Raises:
        ValueError: fewer than 2 or more than 500 bins; ``bound`` not positive and finite.
    """

    bins: int = 8
    bound: float = 3.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 500:
            raise ValueError(f"bins must be from 2 to 500, got {self.bins}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {self.bound}")

    @property
    def numbers(self) -> int:  # type: ignore[override]
        """Widths and heights of the bins, and slopes at the knots between them."""
        return 3 * self.bins - 1

    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spline at ``x`` and the log of its slope there."""
        inside = x.clamp(-self.bound, self.bound)
        x0, y0, width, height, left, right = self.bin_of(inside, raw, 0)
        t = (inside - x0) / width
        rise, bend = height / width, left + right - 2 * height / width
        y = y0 + height * (rise * t.square() + left * t * (1 - t)) / (rise + bend * t * (1 - t))
        return self.within(x, inside, y, _log_slope(t, rise, left, right))

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spline's inverse at ``y`` (eq. 6 to 8), and the log of the spline's slope there."""
        inside = y.clamp(-self.bound, self.bound)
        x0, y0, width, height, left, right = self.bin_of(inside, raw, 1)
        rise, bend, up = height / width, left + right - 2 * height / width, inside - y0
        b, a, c = height * left - up * bend, height * (rise - left) + up * bend, -rise * up
        t = 2 * c / (-b - (b.square() - 4 * a * c).sqrt())
        return self.within(y, inside, x0 + t * width, _log_slope(t, rise, left, right))

    def within(self, given: Tensor, inside: Tensor, found: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """What was found, where the value given lies inside the bound; elsewhere the identity."""
        out = given != inside
        return torch.where(out, given, found), log_slope.masked_fill(out, 0.0)

    def bin_of(self, value: Tensor, raw: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin that a value of x (``axis`` 0) or y (1) lies in: its corner, sides, and slopes left and right.

        No bin is narrower than a thousandth, and no slope below it.
        """
        widths, heights, slopes = torch.split(raw.transpose(-1, -2), [self.bins, self.bins, self.bins - 1], dim=-1)
        sides = [1e-3 + (1 - 1e-3 * self.bins) * side.softmax(-1) for side in (widths, heights)]
        edges = [self.bound * (2 * pad(side.cumsum(-1), (1, -1)) - 1) for side in sides]
        slopes = pad(1e-3 + softplus(slopes + math.log(math.expm1(1 - 1e-3))), (1, 1), value=1.0)
        which = (value.unsqueeze(-1) >= edges[axis][..., 1:]).sum(-1, keepdim=True)
        tables = (*edges, *(2 * self.bound * side for side in sides), slopes[..., :-1], slopes[..., 1:])
        return tuple(table.gather(-1, which).squeeze(-1) for table in tables)


def _log_slope(t: Tensor, rise: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The log of a rational quadratic's slope (Durkan et al. 2019, eq. 5)."""
    both = t * (1 - t)
    top = right * t.square() + 2 * rise * both + left * (1 - t).square()
    return 2 * rise.log() + top.log() - 2 * (rise + (left + right - 2 * rise) * both).log()
