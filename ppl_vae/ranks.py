"""What processes that train together tell one another."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["first_rank", "over_ranks"]


def over_ranks(value: Tensor) -> Tensor:
    """The sum over the processes that train together, each on its part of a batch."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total


def first_rank(value: Tensor) -> Tensor:
    """What the first of these processes has, the same for all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    return over_ranks(value if distributed.get_rank() == 0 else torch.zeros_like(value))
