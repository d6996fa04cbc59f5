"""Random streams: everything random inside a call draws from one seeded stream and leaves the caller's alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import torch

__all__ = ["derived", "seeded"]


def derived(seed: int, *names: object) -> int:
    """A seed of its own for a purpose: streams of different names have nothing to do with one another.

    >>> derived(0, "annealing") == derived(0, "annealing"), derived(0, "annealing") == derived(0, "refining")
    (True, False)
    """
    return Random(" ".join(map(str, (seed, *names)))).getrandbits(63)


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's default generators for a block, then put them back as they were.

    Pyro draws from the default generators, so they are forked rather than replaced.

    Args:
        seed: seed of the block; ``None`` goes on from the caller's stream, which the block still leaves alone.
        device: where the block computes; the CPU generator is always included.

    >>> with seeded(0):
    ...     a = torch.rand(1)
    >>> with seeded(0):
    ...     print(bool(a == torch.rand(1)))
    True
    """
    device = torch.device(device)
    gpus: list[int] = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=gpus):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
        yield
