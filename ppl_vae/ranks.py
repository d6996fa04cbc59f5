"""Processes that work together, each on its part of the data: torch.distributed's, where it is initialised."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["count_ranks", "first_rank", "gathered", "over_ranks", "own_rank", "own_rows"]


def count_ranks() -> int:
    """How many processes work together; 1 for one alone."""
    return distributed.get_world_size() if _together() else 1


def own_rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _together() else 0


def own_rows(size: int) -> slice:
    """Which of so many rows are this process's: as many as others have, or one more or fewer; perhaps none."""
    rank, ranks = own_rank(), count_ranks()
    return slice(size * rank // ranks, size * (rank + 1) // ranks)


def over_ranks(value: Tensor) -> Tensor:
    """The sum over the processes."""
    if not _together():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total


def first_rank(value: Tensor) -> Tensor:
    """What the first of the processes has, the same for all."""
    if not _together():
        return value
    return over_ranks(value if distributed.get_rank() == 0 else torch.zeros_like(value))


def gathered(value: Tensor) -> Tensor:
    """The rows of all processes, in their order; each may have another number of them.

    Args:
        value: (n, ...) of the process, of the same type and further sizes in all.
    """
    if not _together():
        return value
    sizes = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(count_ranks())]
    distributed.all_gather(sizes, torch.tensor([len(value)], device=value.device))
    most = max(int(size) for size in sizes)
    padded = value.new_zeros(most, *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
