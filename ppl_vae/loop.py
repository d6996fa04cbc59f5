"""The training loop: batches, optimizer steps, readings of the losses between them, validation after them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ppl_vae.batches import Data
from ppl_vae.capture import Captured
from ppl_vae.hooks import Hook
from ppl_vae.pairs import Batch, Pair
from ppl_vae.resuming import Checkpoints, RunState
from ppl_vae.rng import seeded
from ppl_vae.running import NonFiniteError, Pending, Run, numbers, snapshot
from ppl_vae.steps import Feed, Stepper
from ppl_vae.traces import log_terms
from ppl_vae.updates import Update

__all__ = ["Loop", "diagnose"]


class Loop:
    """The training loop: epochs of steps, readings of the losses between them, validation after them."""

    def __init__(
        self,
        run: Run,
        train: Feed,
        valid: Feed | None,
        hooks: Sequence[Hook],
        *,
        every_step: bool,
        report_every: int,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.run, self.train, self.hooks = run, train, hooks
        self.checkpoints = checkpoints
        self.every_step, self.report_every, self.seed = every_step, report_every, seed
        self.parameters = [p for update in run.updates for p in update.parameters]
        self.steppers = [Stepper(update, run.engine, train) for update in run.updates]
        self.valid = None if valid is None else (valid, self.captured(valid))
        self.first = 0  # the first step of this epoch
        self.best: dict[str, Tensor] | None = None
        self.good = self.latest = snapshot(run.pair)  # the latest is good once its objective is finite
        self.given = numbers(run.objective)
        self.state = RunState(run, hooks, self.settings(seed), self.details())

    def captured(self, feed: Feed) -> Captured:
        """The objective's values on a feed's items, without gradients."""
        pair, goal = self.run.pair, self.run.objective

        def values(*arguments: Tensor) -> Sequence[Tensor]:
            return (goal(pair, *feed.present(*arguments)),)

        return Captured(self.run.engine, [pair, goal], values, feed.uses, goal.obstacle(pair), noted=False)

    def go(self) -> None:
        """Run to the end, and call ``on_end`` however it comes."""
        run = self.run
        held = None if self.checkpoints is None else self.state.find(self.checkpoints)
        if self.checkpoints is not None and held is None:  # told before hooks start files of theirs anew
            self.checkpoints.write(0, self.state.take(None))
        try:
            self.call("on_start")
            self.begin(held)
            while run.epoch < run.epochs and not run.stopping:
                self.one_epoch()
            run.reason = run.reason or "all epochs done"
        except KeyboardInterrupt:
            run.interrupted, run.reason = True, "interrupted"
        finally:
            if self.best is not None:
                run.pair.load_state_dict(self.best)
            elif not self.finite():
                run.pair.load_state_dict(self.good)
            run.pair.eval()
            self.end()

    def call(self, moment: str, *args: Any) -> None:
        """Call every hook."""
        for hook in self.hooks:
            getattr(hook, moment)(self.run, *args)

    def end(self) -> None:
        """Let every hook end, also when one of them fails: another may still have weights to save."""
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.callback(hook.on_end, self.run)

    def one_epoch(self) -> None:
        """All batches once, then validation, the history's row, and the hooks."""
        run, start = self.run, time.perf_counter()
        run.pair.train()
        self.first, total, count, pending = run.step, 0.0, 0, Pending()
        for item in self.train.epoch(self.seed, run.epoch):
            self.call("on_step")
            if run.step == self.first and self.looks_again():
                for stepper in self.steppers:
                    stepper.recheck(item)
            values = [stepper(item) for stepper in self.steppers]
            pending.add(values[0], len(item[0]))
            run.step += 1
            if self.every_step:
                for schedule in run.schedules:
                    schedule.step()
            if len(pending.values) == self.report_every:
                total, count = self.read(pending, total, count)
        if pending.values:
            total, count = self.read(pending, total, count)
        if not self.finite():
            self.fail(f"step {run.step} made a parameter NaN or infinite", self.again(run.step - 1))
        seconds = time.perf_counter() - start
        mean, stderr = (math.nan, math.nan) if self.valid is None else self.validate(*self.valid)
        run.epoch += 1
        run.history.append(
            {
                "epoch": run.epoch,
                "step": run.step,
                "train": total / count,
                "valid": mean,
                "valid_stderr": stderr,
                "lr": float(run.updates[0].optimizer.param_groups[0]["lr"]),
                "seconds": seconds,
                "per_second": count / seconds,
            }
        )
        if self.valid is not None and mean >= run.best:
            run.best_epoch, self.best = run.epoch, snapshot(run.pair)
        self.adjust(total / count if self.valid is None else mean)
        self.call("on_epoch")
        over = run.epoch == run.epochs or run.stopping
        if self.checkpoints is not None and (over or run.epoch % self.checkpoints.every == 0):
            self.checkpoints.write(run.epoch, self.state.take(self.best))

    def begin(self, held: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, or write the first, now with what hooks have at the start."""
        if held is not None:
            self.best = self.state.put(held)
            self.good = self.latest = snapshot(self.run.pair)
        elif self.checkpoints is not None:
            self.checkpoints.write(0, self.state.take(None))

    def settings(self, seed: int) -> dict[str, Any]:
        """What decides the numbers of a run besides what is in its state, as far as a glance tells."""
        run, source = self.run, self.train.source
        return {
            "seed": seed,
            "batch_size": self.train.size,
            "rows": len(source) if isinstance(source, Data) else None,
            "updates": [[type(u.optimizer).__name__, u.precision, u.clip_norm] for u in run.updates],
            "schedules": [type(schedule).__name__ for schedule in run.schedules],
        }

    def details(self) -> dict[str, Any]:
        """The same on a closer look, at the start of a run."""
        run = self.run
        return {
            "scheduler_every": "step" if self.every_step else "epoch",
            "data": _data(self.train),
            "valid": None if self.valid is None else _data(self.valid[0]),
            "objective": _made_of(run.objective),
            "groups": [_groups(update) for update in run.updates],
            "schedules": [str(schedule.state_dict()) for schedule in run.schedules],
        }

    def looks_again(self) -> bool:
        """Whether, before this epoch, graphs are compared with what programs compute now: at 1, 2, 4, 8, ..."""
        done = self.run.epoch
        return done > 0 and done & (done - 1) == 0

    def adjust(self, value: float) -> None:
        """Step a scheduler that goes by epochs; one that watches gets the objective, or the loss."""
        for schedule in self.run.schedules:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(value if schedule.mode == "max" else -value)
            elif not self.every_step:
                schedule.step()

    def read(self, pending: Pending, total: float, count: int) -> tuple[float, int]:
        """Bring the pending values to the host: the only wait for the device within an epoch."""
        values, sizes, seconds = pending.take()
        wrong = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
        if wrong != 0:
            self.good = self.latest
        if wrong is not None:
            step = self.run.step - len(values) + wrong
            self.fail(
                f"the {self.run.updates[0].name} became {values[wrong]} at step {step + 1}",
                self.again(step),
            )
        self.latest = snapshot(self.run.pair)
        part = sum(v * n for v, n in zip(values, sizes, strict=True))
        self.call("on_report", part / sum(sizes), sum(sizes) / seconds)
        return total + part, count + sum(sizes)

    def finite(self) -> bool:
        """Whether all parameters are; a gradient may be NaN though the objective is not."""
        return bool(torch.stack([p.isfinite().all() for p in self.parameters]).all())

    def again(self, step: int) -> Iterator[Batch]:
        """The batches of this epoch once more, from that of a step (counted from 0) on."""
        feed = self.train
        return islice(feed.source.epoch(feed.size, self.seed, self.run.epoch), step - self.first, None)

    def fail(self, what: str, batches: Iterator[Batch]) -> NoReturn:
        """Put good parameters back, the best if there are, and raise; the first batch tells the likely cause."""
        run = self.run
        run.pair.load_state_dict(self.good)
        run.reason = what
        cause = diagnose(run.pair, next(batches, None))
        held = "last good parameters" if self.best is None else f"best parameters, of epoch {run.best_epoch}"
        raise NonFiniteError(
            f"{what} (epoch {run.epoch + 1}); likely cause: {cause}. The pair holds its {held}.", run
        )

    @torch.no_grad()
    def validate(self, valid: Feed, objective: Captured) -> tuple[float, float]:
        """Mean objective and its standard error over data; the same draws every time, the stream left alone."""
        pair, goal = self.run.pair.eval(), self.run.objective
        annealed = numbers(goal)
        goal.load_state_dict(self.given, strict=False)  # under a rising beta, the first epochs would look best
        try:
            with seeded(self.seed, pair.device):
                parts: list[Tensor] = []
                for item in valid.ordered():
                    if not parts and self.looks_again():
                        objective.recheck((*valid.columns, *item))
                    parts.append(objective(*valid.columns, *item)[0])
        finally:
            goal.load_state_dict(annealed, strict=False)
        values = torch.cat(parts).double().cpu()
        if values.isnan().any():
            wrong = next(i for i, part in enumerate(parts) if part.isnan().any())
            what = f"the validation objective became nan after step {self.run.step}"
            self.fail(what, islice(valid.source.batches(valid.size), wrong, None))
        return float(values.mean()), self.spread(parts)

    def spread(self, parts: list[Tensor]) -> float:
        """Standard error of the mean over data; over batches, where the objective gives one value for each."""
        alone = self.run.objective.per_datum(self.run.pair)
        values = (torch.cat(parts) if alone else torch.stack([part.mean() for part in parts])).double()
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _data(feed: Feed) -> Any:
    """What tells data in memory from others: shapes, and the sums of columns; of a stream, nothing."""
    if not isinstance(feed.source, Data):
        return None
    return [[list(c.shape), float(c.sum(dtype=torch.float64))] for c in feed.source.columns]


def _made_of(module: nn.Module) -> Any:
    """The kinds of an objective and of its parts, with their numbers."""
    return [
        [name, type(m).__name__]
        + [f"{k}={v}" for k, v in sorted(vars(m).items()) if type(v) in (int, float, str) and k[0] != "_"]
        + [f"{k}={b.tolist()}" for k, b in m._buffers.items() if b is not None and b.numel() == 1]
        for name, m in module.named_modules()
    ]


def _groups(update: Update) -> str:
    """The settings of an optimizer's groups, and how many parameters each has."""
    return str([{**group, "params": len(group["params"])} for group in update.optimizer.param_groups])


@torch.no_grad()
def diagnose(pair: Pair, batch: Batch | None) -> str:
    """Say where a batch's log-densities go wrong under the given parameters, if they do already."""
    for i, column in enumerate(batch or ()):
        if column.is_floating_point() and not bool(torch.isfinite(column).all()):
            return f"batch tensor {i} holds NaN or infinity"
    if batch is None or pair.layout is None or pair.layout.outside or pair.layout.enumerated:
        return "too large a step (lower the learning rate, or set clip_norm)"
    terms = log_terms(pair, *batch, keep_scales=True)
    for name, value in (
        ("likelihood", terms.likelihood),
        ("prior", terms.prior),
        ("posterior", terms.posterior),
    ):
        if not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).any(0).nonzero()[0])
            return f"the {name}'s log-density of batch row {row} is not finite"
    return "too large a step (lower the learning rate, or set clip_norm)"
