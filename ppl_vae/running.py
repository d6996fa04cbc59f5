"""A training run: what hooks see while it goes on, and what is left when it ends."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ppl_vae.capture import Engine
from ppl_vae.objectives import Objective
from ppl_vae.pairs import Pair
from ppl_vae.updates import Update

__all__ = ["Fault", "NonFiniteError", "Pending", "Run", "numbers", "snapshot"]


class NonFiniteError(FloatingPointError):
    """A loss or a parameter became NaN or infinite; the pair holds good parameters again.

    Attributes:
        run: what there is, history included.
    """

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


@dataclass(frozen=True)
class Fault:
    """Numbers that went wrong: when, where, and what was done.

    Attributes:
        epoch: of the run, from 1.
        step: of the run, from 1: the one whose numbers are not finite.
        what: which numbers.
        cause: what is likely behind it, in words.
        site: where densities first go wrong; None where they do not, or nothing tells.
        datum: whose they are, the number of its row in the data, from 0; of a stream, in its batch; None where it
            is not one of them.
        batch: the number of the batch in its epoch, from 0, of a stream; None of data in memory.
        action: "stopped", "skipped" or "went back".
        file: where batch and state are, for `ppl_vae.load_fault`; None where they were not saved.
        rank: the number of the process that has the batch, of a stream on several; else None.
    """

    epoch: int
    step: int
    what: str
    cause: str
    site: str | None
    datum: int | None
    batch: int | None
    action: str
    file: str | None = None
    rank: int | None = None

    def __str__(self) -> str:
        saved = "" if self.file is None else f", saved in {self.file}"
        return f"epoch {self.epoch}, {self.what}: {self.cause}; {self.action}{saved}"

    @property
    def where(self) -> str:
        """Site, datum, batch and process, as far as they are known."""
        known = [] if self.site is None else [f"site {self.site!r}"]
        known += [] if self.datum is None else [f"datum {self.datum}"]
        known += [] if self.batch is None else [f"batch {self.batch}"]
        known += [] if self.rank is None else [f"process {self.rank}"]
        return ", ".join(known)


@dataclass
class Run:
    """A training run: what hooks see while it goes on, and what ``fit`` returns.

    Attributes:
        pair: the trained pair; the program given to ``fit`` shares its parameters.
        objective: what was maximised.
        epochs: how many were asked for.
        history: one row per epoch: epoch, step, train and valid (mean objective, nats per datum; valid as it was
            given to ``fit``, whatever is annealed), valid_stderr (over data), lr, seconds, per_second (data).
        updates: the optimizer steps that one batch makes, in order; the first one's value is reported.
        schedules: the learning-rate schedulers, one for each of the updates, or none.
        engine: how steps and validation run; ``run.engine.describe()`` tells what became of it.
        epoch: epochs done.
        step: steps done.
        best_epoch: the epoch whose weights the pair holds, by the validation objective; None without one, or where
            it was always -inf.
        reason: why the run ended.
        faults: numbers that went wrong, in order.
    """

    pair: Pair
    objective: Objective
    epochs: int
    updates: list[Update] = field(default_factory=list)
    schedules: list[LRScheduler] = field(default_factory=list)
    engine: Engine = field(default_factory=lambda: Engine("off"))
    validated: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    best_epoch: int | None = None
    reason: str = ""
    faults: list[Fault] = field(default_factory=list)
    interrupted: bool = False
    stopping: bool = False

    @property
    def best(self) -> float:
        """The best validation objective so far, nats per datum; -inf before there is one."""
        return max((r["valid"] for r in self.history if not math.isnan(r["valid"])), default=-math.inf)

    @property
    def trouble(self) -> str:
        """How often numbers went wrong, and where first, in one line; empty where they did not."""
        if not self.faults:
            return ""
        counts = Counter(fault.action for fault in self.faults)
        skipped, back = counts["skipped"], counts["went back"]
        told = [f"{skipped} {'batch' if skipped == 1 else 'batches'} skipped"] if skipped else []
        told += [f"gone back {'once' if back == 1 else f'{back} times'}"] if back else []
        told += ["stopped"] if counts["stopped"] else []
        first = self.faults[0]
        return f"{', '.join(told)}, first at step {first.step}: {first.where or first.cause}"

    def stop(self, reason: str) -> None:
        """Ask the run to end after this epoch."""
        self.stopping, self.reason = True, reason


class Pending:
    """Objective values still on the device, and the sizes of their batches."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.sizes: list[int] = []
        self.since = time.perf_counter()

    def add(self, value: Tensor, size: int) -> None:
        """Put a value aside."""
        self.values.append(value)
        self.sizes.append(size)

    def take(self) -> tuple[list[float], list[int], float]:
        """All of them on the host, their sizes, and the seconds since the last were taken."""
        values, sizes = torch.stack(self.values).tolist(), self.sizes
        seconds = time.perf_counter() - self.since
        self.__init__()  # type: ignore[misc]
        return values, sizes, seconds


def numbers(objective: nn.Module) -> dict[str, Tensor]:
    """A copy of an objective's own numbers, such as beta, which hooks anneal; of nets in it, nothing."""
    own = [(f"{path}." if path else "", m) for path, m in objective.named_modules() if not m._parameters]
    return {prefix + name: b.detach().clone() for prefix, m in own for name, b in m.named_buffers(recurse=False)}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
