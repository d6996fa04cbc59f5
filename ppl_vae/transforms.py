"""Transforms of pictures as batches are presented: binary pixels, redrawn or cut at a level, or dequantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["LEVELS", "Transform", "dequantise", "redraw", "threshold"]


@dataclass(frozen=True, repr=False)
class Transform:
    """A function of a batch's first column, (B, ...) to (B, ...), with a name to show.

    It runs inside the training step, on the data's device: it must read no number back from there.

    Attributes:
        name: what it is called in messages.
        rule: the function.
        support: what it takes; `fit` refuses other data beforehand, because the step itself checks nothing.
    """

    name: str
    rule: Callable[[Tensor], Tensor]
    support: constraints.Constraint | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.rule(x)

    def __repr__(self) -> str:
        return self.name


def _redrawn(x: Tensor) -> Tensor:
    """Bernoulli(x) from 16 random bits per entry: 1 where their number, one of 65,536, lies below x."""
    # Four entries share one 64-bit number, since drawing is what costs: a generator makes no 16-bit numbers. The
    # bits are taken out by shifts of int32, which inductor fuses with the comparison; a view as int16 it does not.
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device).view(torch.int32)
    signed = torch.stack([words >> 16, (words << 16) >> 16]).view(-1)[: x.numel()].view(x.shape)
    # -32768..32767 against the middle of its step: levels 0 and 1 stay exact, others are rounded to the nearest.
    level = x.to(torch.promote_types(x.dtype, torch.float32)) * 65536 - 32768.5
    return (signed < level).to(x.dtype)


redraw = Transform("redraw", _redrawn, constraints.unit_interval)
"""Transform: x ~ Bernoulli(grey level), drawn from torch's default stream each time a batch is presented.

Levels are resolved to 16 bits: 0 and 1 are exact, and the probability of any other lies within 2^-17 of it, 500
times finer than the 256 levels of a picture. A level outside [0, 1] counts as the nearer end.
"""


def threshold(level: float = 0.5) -> Transform:
    """Make a transform that turns pixels above `level` into 1 and the others into 0.

    Raises:
        ValueError: If `level` is outside [0, 1), where every picture would become blank.

    Example:
        >>> threshold(0.5)(torch.tensor([0.2, 0.5, 0.9]))
        tensor([0., 0., 1.])
    """
    if not 0 <= level < 1:
        raise ValueError(f"level must be in [0, 1), got {level}")
    return Transform(f"threshold({level:g})", lambda x: (x > level).to(x.dtype))


class _Levels(constraints.Constraint):
    """Multiples of 1/255 in [0, 1], up to what rounding leaves of them."""

    def check(self, value: Tensor) -> Tensor:
        level = 255 * value
        return (level >= -1e-3) & (level <= 255 + 1e-3) & ((level - level.round()).abs() <= 1e-3)

    def __repr__(self) -> str:
        return "pixels of 8 bits, 0, 1/255, ..., 1"


LEVELS = _Levels()
"""Constraint: what bytes are presented as."""


def _dequantised(x: Tensor) -> Tensor:
    """(255 x + u) / 256, kept a rounding error away from 0 and 1, where some densities are infinite."""
    level = 255 * x.to(torch.promote_types(x.dtype, torch.float32))
    inside = torch.finfo(x.dtype).eps
    return ((level.round() + torch.rand_like(level)) / 256).to(x.dtype).clamp(inside, 1 - inside)


dequantise = Transform("dequantise", _dequantised, LEVELS)
"""Transform: y = (255 x + u) / 256, u uniform on [0, 1) and drawn anew each time a batch is presented.

It takes pixels of 8 bits, 0, 1/255, ..., 1, and gives each level its own 256th of (0, 1), so that a density cannot
grow beyond all bounds on single levels. A density of y is a lower bound on the probability of levels: log P(x) ≥
E[log p(y)] - D log 256 (Theis et al. 2016, section 3.1); see `ppl_vae.pixels.bits_per_dimension`.
"""
