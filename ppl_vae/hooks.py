"""Hooks: what happens around training steps without being part of them.

A hook gets the `ppl_vae.running.Run`, reads its history and settings, and may ask it to stop.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ppl_vae.pairs import Pair, Program, as_pair

if TYPE_CHECKING:
    from ppl_vae.running import Run

__all__ = ["Anneal", "EarlyStop", "Hook", "LogCSV", "LogTensorBoard", "Progress", "WholeProgram"]
__all__ += ["cyclical", "linear"]


class Hook:
    """Called at five moments of a run; every method does nothing until overridden.

    A hook that remembers anything from one epoch to the next gives it as its state, and so is part of checkpoints.

    Attributes:
        everywhere: whether every one of several processes calls it, or the first alone, as those that write must
            be. What acts on training must be called everywhere, alike; asking the run to stop is enough on one.
            Called on the first alone, it finds itself the only process, so that what it judges it judges without
            the others, which wait for it, up to ten minutes.
    """

    everywhere: bool = False

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step(self, run: Run) -> None:
        """Before each step; ``run.step`` counts the steps done."""

    def on_report(self, run: Run, value: float, rate: float) -> None:
        """When losses were read: the mean objective since the last time, and data per second."""

    def on_epoch(self, run: Run) -> None:
        """After each epoch; ``run.history[-1]`` is its row."""

    def on_end(self, run: Run) -> None:
        """At the end, however it came: finished, stopped, interrupted, or failed."""

    def state(self) -> dict[str, Any] | None:
        """What it remembers between two epochs: tensors and plain values; None for nothing."""
        return None

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Go on from a state, in a run whose history is that of it: after ``on_start``, or gone back to later."""


class Progress(Hook):
    """A bar on the terminal with the bound in nats per datum and the throughput; silent elsewhere."""

    def __init__(self, disable: bool | None = None) -> None:
        self.disable = disable
        self.bar: Any = None

    def on_step(self, run: Run) -> None:
        """Open the bar; not before, for a resumed run has done some epochs then."""
        if self.bar is not None:
            return
        from tqdm.auto import tqdm

        self.bar = tqdm(total=run.epochs, initial=run.epoch, unit="epoch", disable=self.disable, leave=True)

    def on_report(self, run: Run, value: float, rate: float) -> None:
        """Show the current bound."""
        self.bar.set_postfix_str(f"train {value:.2f} nats, {rate:,.0f}/s" + self._valid(run) + self._faults(run))

    def on_epoch(self, run: Run) -> None:
        """Show how many epochs are done."""
        self.bar.update(run.epoch - self.bar.n)

    def on_end(self, run: Run) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @staticmethod
    def _faults(run: Run) -> str:
        return f", {len(run.faults)} times not finite" if run.faults else ""

    @staticmethod
    def _valid(run: Run) -> str:
        if not run.history or math.isnan(run.history[-1]["valid"]):
            return ""
        return f", valid {run.history[-1]['valid']:.2f} ± {run.history[-1]['valid_stderr']:.2f}"


class EarlyStop(Hook):
    """Stop when the validation bound has not risen for some epochs.

    Args:
        patience: epochs without a rise.
        min_rise: how many nats count as a rise.

    Raises:
        ValueError: patience below one; no validation data given to ``fit``.
    """

    everywhere = True

    def __init__(self, patience: int = 10, min_rise: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience, self.min_rise = patience, min_rise
        self.best, self.since = -math.inf, 0

    def on_start(self, run: Run) -> None:
        """Make sure there is something to watch, and forget earlier runs."""
        if not run.validated:
            raise ValueError("EarlyStop: fit(...) needs valid data to watch")
        self.best, self.since = -math.inf, 0

    def on_epoch(self, run: Run) -> None:
        """Count epochs since the last rise."""
        value = run.history[-1]["valid"]
        if value > self.best + self.min_rise:
            self.best, self.since = value, 0
        else:
            self.since += 1
        if self.since >= self.patience:
            run.stop(f"no rise of the validation bound in {self.patience} epochs")

    def state(self) -> dict[str, Any]:
        """The best bound, and the epochs since."""
        return {"best": self.best, "since": self.since}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Go on counting.

        Raises:
            TypeError: the state is not that of one.
        """
        if type(state["best"]) is not float or type(state["since"]) is not int or state["since"] < 0:
            raise TypeError("EarlyStop: its state must be the best bound, and how many epochs ago that was")
        self.best, self.since = state["best"], state["since"]


class Anneal(Hook):
    """Set a number held in a tensor, such as an objective's ``beta``, before each step.

    Validation keeps to the value that the objective had when ``fit`` was called: give it that of the end.

    Args:
        target: the tensor, written in place so that a captured step sees it.
        schedule: step -> value.

    >>> from ppl_vae.objectives import ELBO
    >>> warm_up = ELBO()
    >>> hook = Anneal(warm_up.beta, linear(0.0, 1.0, steps=1000))
    """

    everywhere = True

    def __init__(self, target: Tensor, schedule: Callable[[int], float]) -> None:
        self.target, self.schedule = target, schedule

    def on_step(self, run: Run) -> None:
        """Write the value of this step."""
        self.target.fill_(self.schedule(run.step))


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A schedule from ``start`` to ``end`` in ``steps`` steps, constant afterwards.

    >>> [linear(0.0, 1.0, 4)(s) for s in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cyclical(low: float, high: float, period: int, ratio: float = 0.5) -> Callable[[int], float]:
    """A schedule that starts anew every ``period`` steps: a rise, then a rest (Fu et al. 2019, eq. 6).

    Args:
        low: value at the start of each cycle.
        high: value that a cycle comes to, and keeps.
        period: steps of a cycle.
        ratio: which part of a cycle it rises in.

    Raises:
        ValueError: a period below one, a ratio outside (0, 1].

    >>> [cyclical(0.0, 1.0, period=4)(s) for s in (0, 1, 2, 3, 4, 5)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    return lambda step: low + (high - low) * min(step % period / period / ratio, 1.0)


class LogCSV(Hook):
    """Write one row per epoch to a CSV file, readable while the run goes on."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_start(self, run: Run) -> None:
        """Start the file anew; it stays empty until an epoch is done."""
        self._write("w", [])

    def on_epoch(self, run: Run) -> None:
        """Append the epoch's row."""
        self._write("a", run.history[-1:])

    def state(self) -> dict[str, Any]:
        """Nothing of its own: the history has it all."""
        return {}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Write the rows of the epochs that are done, and no others."""
        self._write("w", run.history)

    def _write(self, mode: Literal["w", "a"], rows: list[dict[str, float]]) -> None:
        try:
            with self.path.open(mode, newline="") as file:
                for row in rows:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
        except OSError as error:
            raise ValueError(f"path: cannot write {self.path} ({error.strerror})") from error


class LogTensorBoard(Hook):
    """Write the history to TensorBoard event files; what was lost or undone of a run is purged there.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("LogTensorBoard: install the extra, pip install 'ppl-vae[tensorboard]'") from error
        self.open = partial(SummaryWriter, str(folder))
        self.writer: Any = None
        self.rows = 0  # written so far

    def on_epoch(self, run: Run) -> None:
        """Write the epoch's row."""
        row = run.history[-1]
        self.rows += 1
        if self.writer is None or self.rows != run.epoch:  # rows from here on, if any, are of what is no more
            self.on_end(run)
            self.writer, self.rows = self.open(purge_step=int(row["step"])), run.epoch
        for name, value in row.items():
            if name not in ("epoch", "step") and not math.isnan(value):
                self.writer.add_scalar(name, value, row["step"])

    def on_end(self, run: Run) -> None:
        """Flush and close the files."""
        if self.writer is not None:
            self.writer.close()


class WholeProgram(Hook):
    """Show a hook the whole program that a part is trained of, so that the whole is saved or filmed.

    Args:
        program: the whole, which shares the trained parameters.
        hook: what sees it as the pair of the run.

    >>> import ppl_vae as pv
    >>> prior = pv.LearnedNormal(2)
    >>> vae = pv.VAE(prior, pv.Normal(pv.MLP(2, 8, 4), scale=1.0), pv.mean_field(pv.MLP(4, 8, 4)))
    >>> hook = WholeProgram(vae, pv.Save("vae.safetensors"))  # for a run that trains pv.Density(prior)
    """

    def __init__(self, program: Program | Pair, hook: Hook) -> None:
        self.program, self.hook, self.everywhere = program, hook, hook.everywhere

    def on_start(self, run: Run) -> None:
        """Before the first step."""
        self._call("on_start", run)

    def on_step(self, run: Run) -> None:
        """Before each step."""
        self._call("on_step", run)

    def on_report(self, run: Run, value: float, rate: float) -> None:
        """When losses were read."""
        self._call("on_report", run, value, rate)

    def on_epoch(self, run: Run) -> None:
        """After each epoch."""
        self._call("on_epoch", run)

    def on_end(self, run: Run) -> None:
        """At the end."""
        self._call("on_end", run)

    def state(self) -> dict[str, Any] | None:
        """The hook's."""
        return self.hook.state()

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """The hook goes on."""
        self._call("restore", run, state)

    def _call(self, moment: str, run: Run, *args: Any) -> None:
        whole = replace(run, pair=as_pair(self.program))
        getattr(self.hook, moment)(whole, *args)
        if whole.stopping and not run.stopping:
            run.stop(whole.reason)
