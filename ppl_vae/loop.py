"""The training loop: batches, optimizer steps, readings of the losses between them, validation after them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ppl_vae.capture import Captured
from ppl_vae.diagnosis import buffers_of, first_wrong, put_back
from ppl_vae.faults import (
    FaultLog,
    Faults,
    Held,
    Suspect,
    WrongError,
    judged_on,
    rows_of,
    smaller_step,
    trained_on,
)
from ppl_vae.graphs import first_line
from ppl_vae.hooks import Hook
from ppl_vae.identity import at_a_glance, looked_at_closely
from ppl_vae.joining import Joined
from ppl_vae.ranks import RankError, alone, count_ranks, gathered, joint_mean, own_rank
from ppl_vae.resuming import Checkpoints, RunState, load_random, random_streams
from ppl_vae.rng import seeded
from ppl_vae.running import Fault, NonFiniteError, Pending, Run, numbers, snapshot
from ppl_vae.steps import Feed, Share, Stepper
from ppl_vae.updates import UntakenError

__all__ = ["Loop"]


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
        faults: Faults = Faults(),  # noqa: B008 - it is frozen
    ) -> None:
        self.run, self.train = run, train
        self.several = count_ranks() > 1
        self.hooks = [hook for hook in hooks if hook.everywhere or own_rank() == 0]
        self.checkpoints = checkpoints
        self.every_step, self.report_every, self.seed = every_step, report_every, seed
        self.parameters = [p for update in run.updates for p in update.parameters]
        self.faults = FaultLog(run, faults)
        self.guarded = faults.policy == "skip"
        self.steppers = [Stepper(update, run.engine, train, self.guarded) for update in run.updates]
        self.valid = None if valid is None else (valid, self.captured(valid))
        self.first = 0  # the first step of this epoch
        closer = looked_at_closely(run, train, valid, "step" if every_step else "epoch")
        self.state = RunState(run, hooks, at_a_glance(run, train, seed), closer)
        self.joined = Joined(run, seed)
        self.joined.begin(self.state.settings | self.state.details | self.alike(faults))
        self.best: dict[str, Tensor] | None = None
        self.pending = Pending()
        self.good = self.latest = Held(run)  # the latest is good once its objective is finite
        self.kept: dict[str, Any] | None = None  # the state at the start of this epoch, to go back to
        self.given = numbers(run.objective)

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
        if self.checkpoints is not None:  # told before hooks start files of theirs anew
            self.prepare(self.checkpoints, fresh=held is None)
        try:
            self.call("on_start")
            self.begin(held)
            while run.epoch < run.epochs and not run.stopping:
                try:
                    self.one_epoch()
                except WrongError as wrong:
                    self.resolve(wrong)
            run.reason = run.reason or "all epochs done"
        except KeyboardInterrupt:
            run.interrupted, run.reason = True, "interrupted"
        finally:
            if self.best is not None:
                run.pair.load_state_dict(self.best)
            elif not self.finite():
                run.pair.load_state_dict(self.good.weights)
            run.pair.eval()
            self.end()

    def call(self, moment: str, *args: Any) -> None:
        """Call every hook; those of the first process alone must not wait for the others."""
        for hook in self.hooks:
            with alone() if self.several and not hook.everywhere else nullcontext():
                getattr(hook, moment)(self.run, *args)

    def end(self) -> None:
        """Let every hook end, also when one of them fails: another may still have weights to save.

        Other processes may have come to their end elsewhere, and are not spoken to any more.
        """
        with ExitStack() as stack:
            stack.enter_context(alone())
            for hook in reversed(self.hooks):
                stack.callback(hook.on_end, self.run)

    def one_epoch(self) -> None:
        """All batches once, then validation, the history's row, and the hooks."""
        run, start = self.run, time.perf_counter()
        run.pair.train()
        self.first, total, count, self.pending = run.step, 0.0, 0, Pending()
        self.begun, self.buffers = random_streams(run.pair.device), buffers_of(run.pair, run.updates)
        for own in self.train.shares(self.seed, run.epoch):
            self.call("on_step")
            if run.step == self.first and self.looks_again():
                for stepper in self.steppers:
                    stepper.recheck(own.item)
            if (value := self.stepped(own)) is not None:
                self.pending.add(value, own.joined)
            run.step += 1
            if self.every_step:
                for schedule in run.schedules:
                    schedule.step()
            if len(self.pending.values) == self.report_every:
                total, count = self.read(total, count)
        if self.pending.values:
            total, count = self.read(total, count)
        if not self.finite():
            what = f"step {run.step} made a parameter NaN or infinite"
            raise WrongError(what, run.step, partial(self.again, run.step))
        seconds = self.joined.settle(time.perf_counter() - start)
        mean, stderr = (math.nan, math.nan) if self.valid is None else self.validate(*self.valid)
        run.epoch += 1
        run.history.append(
            {
                "epoch": run.epoch,
                "step": run.step,
                "train": total / count if count else math.nan,
                "valid": mean,
                "valid_stderr": stderr,
                "lr": float(run.updates[0].optimizer.param_groups[0]["lr"]),
                "seconds": seconds,
                "per_second": count / seconds,
            }
        )
        if self.valid is not None and mean >= run.best > -math.inf:
            run.best_epoch, self.best = run.epoch, snapshot(run.pair)
        self.adjust(run.history[-1]["train"] if self.valid is None else mean)
        self.call("on_epoch")
        self.joined.settle_end()
        over = run.epoch == run.epochs or run.stopping
        if self.checkpoints is not None and (over or run.epoch % self.checkpoints.every == 0):
            self.checkpoints.write(run.epoch, self.state.take(self.best))
        self.keep()

    def prepare(self, checkpoints: Checkpoints, *, fresh: bool) -> None:
        """Write the first checkpoint; see that there is room for others, or leave nothing."""
        if fresh:
            checkpoints.write(0, self.state.take(None))
        moments = max(2 if "betas" in update.optimizer.defaults else 1 for update in self.run.updates)
        try:  # the parameters as they are and the best ones, and what an optimizer keeps of each
            checkpoints.check_room(1 + self.run.validated + moments if fresh else 1)
        except ValueError:
            if fresh:
                checkpoints.clear()
            raise

    def begin(self, held: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, or write the first, now with what hooks have at the start."""
        if held is not None:
            self.best = self.state.put(held)
            self.good = self.latest = Held(self.run)
        elif self.checkpoints is not None:
            self.checkpoints.write(0, self.state.take(None))
        self.keep()

    def alike(self, faults: Faults) -> dict[str, Any]:
        """What several processes must be given alike besides, lest one waits for what another does not do."""
        kept = self.checkpoints
        return {
            "epochs": self.run.epochs,
            "report_every": self.report_every,
            "checkpoints (on every process, though the first alone writes)": None if kept is None else kept.every,
            "faults": [faults.policy, faults.most, faults.folder is None],
            "hooks": [type(hook).__name__ for hook in self.hooks if hook.everywhere],
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

    def stepped(self, own: Share) -> Tensor | None:
        """Take the steps of a batch; return the value of the first, or None where the batch is skipped."""
        held = [buffer.clone() for buffer in self.buffers] if self.guarded else []
        random = random_streams(self.run.pair.device) if self.guarded else {}
        try:
            values = [self.taken(stepper, own) for stepper in self.steppers]
        except UntakenError as error:
            put_back(self.buffers, held)
            self.skip(error, own, random)
            return None
        return values[0]

    def taken(self, stepper: Stepper, own: Share) -> Tensor:
        """Take one of a batch's steps; where it fails under parameters gone wrong, that is what went wrong."""
        try:
            return stepper(own.item, own.rows)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RankError) or self.finite():
                raise
            step = self.run.step + 1
            if not self.several:
                what = f"a parameter became NaN or infinite before step {step}, which failed ({first_line(error)})"
                raise WrongError(what, step, partial(self.again, step)) from error
        # Another process may have met data on which it does not fail, and waits: it gets NaN, and all find that.
        like = [self.parameters[0].new_tensor(math.nan), *stepper.update.parameters]
        means, _ = joint_mean([like[0], *(None for _ in like[1:])], like, max(own.rows, 1))
        if self.guarded:
            raise UntakenError(stepper.update, means[0], [])
        return means[0]

    def skip(self, error: UntakenError, own: Share, random: dict[str, Tensor]) -> None:
        """Leave a batch out, or raise NonFiniteError where that has been done too often."""
        run, feed, step = self.run, self.train, self.run.step + 1
        if self.pending.values:  # they are finite
            self.good = self.latest
        if bool(error.value.isfinite()):
            name = first_wrong(run.pair, error.update, error.found)
            what = f"the gradient of {name} is not finite at step {step}"
        else:
            what = f"the {error.update.name} became {float(error.value)} at step {step}"
        number = run.step - self.first
        error.update.optimizer.__dict__["_opt_called"] = True  # schedulers warn of steps that were not taken
        with seeded(None, run.pair.device):
            load_random(random, run.pair.device)
            batch = feed.present(*feed.columns, *own.item)
            suspect = Suspect(step, batch, rows_of(feed, self.seed, run.epoch, number), number)
            wrong = WrongError(what, step, lambda: iter([suspect]), before=False)
            bearable = self.faults.bears("skip")
            fault = self.faults.record(wrong, "skipped" if bearable else "stopped", run.step)
        if not bearable:
            self.fail(fault)

    def read(self, total: float, count: int) -> tuple[float, int]:
        """Bring the pending values to the host: the only wait for the device within an epoch."""
        values, sizes, seconds = self.pending.take()
        wrong = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
        if wrong != 0:
            self.good = self.latest
        if wrong is not None:
            step = self.run.step - len(values) + wrong + 1
            what = f"the {self.run.updates[0].name} became {values[wrong]} at step {step}"
            raise WrongError(what, step, partial(self.again, step))
        self.latest = Held(self.run)
        part = sum(v * n for v, n in zip(values, sizes, strict=True))
        self.call("on_report", part / sum(sizes), sum(sizes) / seconds)
        return total + part, count + sum(sizes)

    def finite(self) -> bool:
        """Whether all parameters are; a gradient may be NaN though the objective is not."""
        return bool(torch.stack([p.isfinite().all() for p in self.parameters]).all())

    def again(self, last: int) -> Iterator[Suspect]:
        """The batches of this epoch once more, from that which met the last good parameters to a step's."""
        load_random(self.begun, self.run.pair.device)  # from which a shuffled loader takes its order
        steps = range(max(self.good.step, self.first) + 1, last + 1)
        return trained_on(self.train, self.seed, self.run.epoch, self.first, steps)

    def resolve(self, wrong: WrongError) -> None:
        """Go back to the start of the epoch, unless that is not the policy or was done too often; then raise."""
        run, back = self.run, self.faults.bears("back")
        if wrong.before:
            run.pair.load_state_dict(self.good.weights)
        fault = self.faults.record(wrong, "went back" if back else "stopped", self.good.step)
        if fault.action == "stopped" or self.kept is None:
            self.fail(fault)
        listed = [*run.faults]
        self.best = self.state.put(copy.deepcopy(self.kept))
        run.faults[:] = listed
        smaller_step(run)
        for stepper in self.steppers:
            stepper.forget()
        self.good = self.latest = Held(run)
        self.keep()

    def keep(self) -> None:
        """Hold on to the state between two epochs, where training may go back to it."""
        if self.faults.faults.policy == "back":
            self.kept = copy.deepcopy(self.state.take(self.best))

    def fail(self, fault: Fault) -> NoReturn:
        """Put good parameters back, the best if there are, and raise."""
        run = self.run
        run.pair.load_state_dict(self.good.weights)
        run.reason = fault.what
        held = "last good parameters" if self.best is None else f"best parameters, of epoch {run.best_epoch}"
        saved = "" if fault.file is None else f" Batch and state are in {fault.file}."
        raise NonFiniteError(
            f"{fault.what} (epoch {fault.epoch}); likely cause: {fault.cause}.{saved} The pair holds its {held}.",
            run,
        )

    @torch.no_grad()
    def validate(self, valid: Feed, objective: Captured) -> tuple[float, float]:
        """Mean objective and its standard error over data; the same draws every time, the stream left alone."""
        pair, goal = self.run.pair.eval(), self.run.objective
        annealed = numbers(goal)
        goal.load_state_dict(self.given, strict=False)  # under a rising beta, the first epochs would look best
        try:
            with seeded(self.joined.seed, pair.device):
                parts: list[Tensor] = []
                for item in valid.ordered():
                    if not parts and self.looks_again():
                        objective.recheck((*valid.columns, *item))
                    parts.append(objective(*valid.columns, *item)[0])
        finally:
            goal.load_state_dict(annealed, strict=False)
        values = gathered(_joint(parts, pair.device)).cpu()
        if not bool((values < math.inf).all()):  # -inf is that of a datum which the model cannot make
            value = float(values[~(values < math.inf)][0])
            wrong = next((i for i, part in enumerate(parts) if not bool((part < math.inf).all())), len(parts))
            what = f"the validation objective became {value} after step {self.run.step}"
            raise WrongError(what, self.run.step, partial(judged_on, valid, wrong, self.run.step), before=False)
        return float(values.mean()), self.spread(parts)

    def spread(self, parts: list[Tensor]) -> float:
        """Standard error of the mean over data; over batches, where the objective gives one value for each."""
        each = self.run.objective.per_datum(self.run.pair)
        own = parts if each else [part.mean().reshape(1) for part in parts]
        values = gathered(_joint(own, self.run.pair.device))
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _joint(parts: list[Tensor], device: torch.device) -> Tensor:
    """Values of all batches; a process may have none."""
    return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64, device=device)
