"""A run in several processes: what they begin with, and what they settle after every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.ranks import any_rank, check_alike, check_equal, first_rank, own_rank, share
from ppl_vae.rng import derived, seeded
from ppl_vae.running import Run

__all__ = ["Joined"]


class Joined:
    """A run of which each process computes a part; of one alone, all of it.

    Every process holds all parameters, and takes the same steps along the gradients of the joined batches.

    Args:
        run: the run.
        seed: of the run.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self.run = run
        self.device = run.pair.device
        self.seed = derived(seed, "rank", own_rank()) if own_rank() else seed

    def begin(self, about: Mapping[str, Any]) -> None:
        """Begin with the numbers that the first process has.

        Args:
            about: data and settings, as plain values.

        Raises:
            ValueError: another process was given other data, settings, or another program.
        """
        shapes = {name: list(value.shape) for name, value in self.run.pair.state_dict().items()}
        check_alike({"program": shapes, **about})
        share(self._held())

    def streams(self) -> AbstractContextManager[None]:
        """Random streams of this process's own; the first goes on with those at hand."""
        return seeded(self.seed, self.device) if own_rank() else nullcontext()

    def settle(self, seconds: float) -> float:
        """Give all processes the buffers of the first, such as running statistics, after the steps of an epoch.

        Args:
            seconds: that they took.

        Returns:
            The seconds that they took the first.

        Raises:
            RankError: parameters are not the same in all.
        """
        parameters = [p for update in self.run.updates for p in update.parameters]
        check_equal(parameters, f"after epoch {self.run.epoch + 1}")
        share(t for t in self._held() if not isinstance(t, nn.Parameter))
        return float(first_rank(torch.tensor(seconds, dtype=torch.float64)))

    def settle_end(self) -> None:
        """End the run in all processes after this epoch, where one of them asks for it."""
        if any_rank(self.run.stopping) and not self.run.stopping:
            self.run.stop("another process asked for it")

    def _held(self) -> list[Tensor]:
        """Parameters and buffers of pair and objective."""
        modules = (self.run.pair, self.run.objective)
        found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return list({id(t): t for t in found}.values())
