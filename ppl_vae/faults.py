"""Numbers gone wrong: what a run does about them, and the files in which it leaves them for inspection."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from ppl_vae.batches import Data, Source
from ppl_vae.conditionals import at_least_one
from ppl_vae.diagnosis import TOO_LARGE, diagnose
from ppl_vae.files import PathLike
from ppl_vae.packing import DamagedError, pack, unpack
from ppl_vae.pairs import Batch
from ppl_vae.ranks import alone, count_ranks, from_all, from_first, gathered, own_rank
from ppl_vae.resuming import random_streams
from ppl_vae.rng import seeded
from ppl_vae.running import Fault, Run, snapshot
from ppl_vae.steps import Feed

__all__ = ["FaultLog", "Faults", "Held", "Policy", "SavedFault", "Suspect", "WrongError", "judged_on"]
__all__ += ["load_fault", "rows_of", "smaller_step", "trained_on"]

Policy = Literal["stop", "skip", "back"]

KIND = "fault"
SAVED = 10  # files of one run, and one more where it stops: the first are those that tell
SMALLER = 0.5  # what becomes of a learning rate when training goes back
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # of a group: its own, and those that schedulers keep
UNFOUND = "nothing in the batch by itself"


@dataclass(frozen=True)
class Faults:
    """What `ppl_vae.fit` does when an objective, a gradient or a parameter becomes NaN or infinite.

    A program that raises an error of its own on such numbers, as ``torch.linalg.cholesky`` does, is not covered:
    the error ends the run under every policy, unless parameters have become NaN or infinite before. Of a
    validation objective, -inf is no fault, but the value of a datum that the model cannot make; an epoch of such
    a value is never the best.

    Args:
        policy: "stop" ends the run with `ppl_vae.NonFiniteError`. "skip" takes no step along such numbers:
            parameters, buffers and the optimizer's state stay as they are, and the next batch comes. Of several
            steps that a batch makes, those before the first such one are taken. Numbers are looked at before each
            step, which on CUDA waits for the device, and rules out replaying steps as one launch. A validation
            objective that is NaN or inf, or a parameter that the step itself makes infinite, ends the run. "back"
            goes back to the start of the epoch, all random streams included, and on with half the learning rates;
            where the same datum is to blame at the same step again, that did not help, and the run ends.
        most: how often a run may skip or go back; after that it ends as under "stop".
        folder: where the first ten of a run, and that which ends it, are saved for `load_fault`; made where it is
            not there, in a folder that is. None saves nothing.

    Raises:
        ValueError: an unknown policy; ``most`` no whole number or below one; a folder that is no path, is a file,
            or could not be made.
    """

    policy: Policy = "stop"
    most: int = 10
    folder: PathLike | None = None

    def __post_init__(self) -> None:
        if self.policy not in ("stop", "skip", "back"):
            raise ValueError(f"policy must be 'stop', 'skip' or 'back', got {self.policy!r}")
        if isinstance(self.most, bool):
            raise ValueError(f"most must be a whole number, got {self.most}")
        at_least_one(most=self.most)
        if self.folder is None:
            return
        if not isinstance(self.folder, str | os.PathLike):
            raise ValueError(f"folder must be a path, or None to save nothing, got {self.folder!r}")
        folder = Path(self.folder)
        if own_rank() == 0 and folder.exists() and not folder.is_dir():
            raise ValueError(f"folder: {folder} is a file; give a folder, or a name that is free")
        if own_rank() == 0 and not folder.parent.is_dir():
            raise ValueError(f"folder: cannot make {folder} (there is no folder {folder.parent})")


@dataclass(frozen=True)
class SavedFault:
    """What `load_fault` reads: a batch on which numbers went wrong, and the state of the run.

    Attributes:
        fault: what is known of it.
        batch: as the model saw it, redrawn pixels included where the policy was "skip"; else drawn anew.
        rows: of the batch in the data, (B,); None of a stream.
        weights: the pair's parameters and buffers, for ``as_pair(program).load_state_dict``.
        weights_step: after how many steps it had them: under "skip" those before the step; else the last whose
            objective was finite.
        objective: the objective's state.
        optimizers: the optimizers' states when the numbers were found to be wrong.
        random: torch's streams, "cpu" and perhaps "cuda", when the programs were run on the batch.
    """

    fault: Fault
    batch: Batch
    rows: Tensor | None
    weights: dict[str, Tensor]
    weights_step: int
    objective: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    random: dict[str, Tensor]


def load_fault(path: PathLike) -> SavedFault:
    """Read a file that a run left when its numbers went wrong, on the CPU; nothing in it is executed.

    Raises:
        ppl_vae.packing.DamagedError: a file that is cut off, changed, or of another kind.
        ValueError: no such file, or one of a newer version.
    """
    held = unpack(path, KIND)
    try:
        fault = Fault(**held["fault"])
        return SavedFault(**{**held, "fault": replace(fault, file=str(path)), "batch": tuple(held["batch"])})
    except (TypeError, LookupError) as error:
        raise DamagedError(f"path: {path} holds no fault of a run ({error})") from error


class Suspect(NamedTuple):
    """A batch that may be to blame.

    Attributes:
        step: that it made, from 1.
        batch: as the model saw it.
        rows: its rows in the data; None of a stream.
        number: of the batch in its epoch, from 0.
        sure: whether it is that of the step, and not what an iterable gave in its place when it was run again.
    """

    step: int
    batch: Batch
    rows: Tensor | None
    number: int
    sure: bool = True


def trained_on(feed: Feed, seed: int, epoch: int, first: int, steps: range) -> Iterator[Suspect]:
    """The batches of some steps of an epoch, once more; the epoch's begins after ``first`` steps."""
    batches, sure = feed.source.epoch(feed.size, seed, epoch), _repeats(feed.source)
    for number, batch in islice(enumerate(batches), steps.start - first - 1, steps.stop - first - 1):
        yield Suspect(first + number + 1, batch, rows_of(feed, seed, epoch, number), number, sure)


def judged_on(valid: Feed, number: int, step: int) -> Iterator[Suspect]:
    """One of the batches that are validated, if this process has it."""
    source = valid.source
    for batch in islice(source.own_batches(valid.size), number, number + 1):
        rows = None
        if isinstance(source, Data):
            own = next(islice(source.own_slices(valid.size), number, None))
            rows = torch.arange(own.start, own.stop)
        yield Suspect(step, batch, rows, number, _repeats(source))


def _repeats(source: Source) -> bool:
    """Whether a source is known to give the same batches again, random streams being what they were."""
    if isinstance(source, Data) or source.shuffled is not None:
        return True
    made = source.source
    if isinstance(made, DataLoader):
        return made.generator is None and not isinstance(made.dataset, IterableDataset)
    return isinstance(made, list | tuple)


def rows_of(feed: Feed, seed: int, epoch: int, number: int) -> Tensor | None:
    """The row numbers of one of an epoch's batches; None of a stream."""
    if not isinstance(feed.source, Data):
        return None
    return next(islice(feed.source.rows(feed.size, seed, epoch), number, None))


class Held:
    """A pair's parameters and buffers after a step."""

    def __init__(self, run: Run) -> None:
        self.step, self.weights = run.step, snapshot(run.pair)


class WrongError(Exception):
    """Numbers were found to be wrong after steps were taken; the loop decides what to do.

    Attributes:
        step: the first that is known to be, from 1.
        suspects: gives the batches that may be to blame, in order; it may draw.
        before: whether the pair's last good parameters, and not those it has, are what the batches met.
    """

    def __init__(
        self, what: str, step: int, suspects: Callable[[], Iterator[Suspect]], *, before: bool = True
    ) -> None:
        super().__init__(what)
        self.what, self.step, self.suspects, self.before = what, step, suspects, before


class FaultLog:
    """The faults of a run: looked into, saved and listed. All processes of a run must call it alike.

    Args:
        run: the run.
        faults: what is asked for.

    Raises:
        ValueError: something else is asked for.
    """

    def __init__(self, run: Run, faults: Faults) -> None:
        if not isinstance(faults, Faults):
            raise ValueError(f"faults: expected Faults, such as Faults('skip'), got {faults!r}")
        self.run, self.faults = run, faults

    def bears(self, policy: Policy) -> bool:
        """Whether this is the policy, and it has not come to its end."""
        return self.faults.policy == policy and len(self.run.faults) < self.faults.most

    def record(self, wrong: WrongError, action: str, weights_step: int) -> Fault:
        """Find out where numbers went wrong, under the parameters that the pair has; save it, and list it.

        What is to be done about it becomes "stopped" where it is what going back was to mend.
        """
        run = self.run
        with seeded(None, run.pair.device):
            suspect, told = self._look(wrong)
            state = self._state(weights_step)
        tellers = from_all(told)
        known = [t for t in tellers if t["cause"] is not None]
        first = min(known or tellers, key=lambda t: (not t["columns"], t["step"], t["datum"] is None, t["rank"]))
        rank, columns = first.pop("rank"), first.pop("columns") or [None]
        first["cause"] = first["cause"] or (TOO_LARGE if wrong.before else UNFOUND)
        several = count_ranks() > 1 and first["batch"] is not None
        fault = Fault(epoch=run.epoch + 1, what=wrong.what, action=action, rank=rank if several else None, **first)
        if action == "went back" and self._same(fault):
            action = "stopped"
            fault = replace(fault, cause=f"{fault.cause} (going back did not help)", action=action)
        if self.faults.folder is not None and (len(run.faults) < SAVED or action == "stopped"):
            state |= self._batch(suspect if rank == own_rank() else None, columns)
            fault = replace(fault, file=self._save(fault, state))
        run.faults.append(fault)
        return fault

    def _same(self, fault: Fault) -> bool:
        """Whether training went back because of the same datum at the same step just before.

        Of a step that is too large for all of a batch the same is to be expected, until rates are small enough.
        """

        def place(one: Fault) -> tuple[Any, ...]:
            return one.epoch, one.step, one.site, one.datum, one.batch, one.rank

        before = [other for other in self.run.faults[-1:] if other.action == "went back"]
        return fault.datum is not None and [place(fault)] == [place(other) for other in before]

    def _look(self, wrong: WrongError) -> tuple[Suspect | None, dict[str, Any]]:
        """The first suspect on which numbers go wrong, or else the last, and what there is to tell."""
        run, suspect = self.run, None
        told: dict[str, Any] = dict.fromkeys(("cause", "site", "datum", "batch"))
        told |= {"rank": own_rank(), "step": wrong.step, "columns": None}
        for suspect in wrong.suspects():
            told["columns"] = [_about(column) for column in (*suspect.batch, suspect.rows)]
            with alone():  # others may look at another number of batches
                found = diagnose(run.pair, run.updates, suspect.batch)
            if found is None:
                continue
            told |= {"step": suspect.step, "cause": found.what, "site": found.site}
            if found.row is not None:
                whose = f" of process {own_rank()}" if count_ranks() > 1 else ""
                datum, of = found.row, f" of batch {suspect.number}{whose}"
                if suspect.rows is not None:
                    datum, of = int(suspect.rows[found.row]), ""
                told |= {"datum": datum, "batch": suspect.number if of else None}
                told["cause"] = found.what.format(datum=f"datum {datum}{of}")
            if suspect.step != wrong.step:
                told["cause"] += f", at step {suspect.step}"
            if not suspect.sure:
                told["cause"] += ", if the data's iterable gave the same again"
            break
        return suspect, told

    def _state(self, weights_step: int) -> dict[str, Any]:
        run = self.run
        return {
            "weights": dict(run.pair.state_dict()),
            "weights_step": weights_step,
            "objective": dict(run.objective.state_dict()),
            "optimizers": [update.optimizer.state_dict() for update in run.updates],
            "random": random_streams(run.pair.device),
        }

    def _batch(self, suspect: Suspect | None, columns: list[Any]) -> dict[str, Any]:
        """The batch and its rows, of the one process that has them."""
        own = [None for _ in columns] if suspect is None else [*suspect.batch, suspect.rows]
        *batch, rows = (_given(c, about, self.run.pair.device) for c, about in zip(own, columns, strict=True))
        return {"batch": batch, "rows": rows}

    def _save(self, fault: Fault, state: dict[str, Any]) -> str | None:
        """Write the file, in the first process; warn of what keeps it from being written."""
        again, folder = sum(other.step == fault.step for other in self.run.faults), Path(str(self.faults.folder))
        path = folder / f"step-{fault.step:06d}{f'-{again + 1}' if again else ''}.safetensors"

        def write() -> str | None:
            try:
                folder.mkdir(exist_ok=True)
                pack(path, KIND, {"fault": asdict(fault)} | state)
            except (OSError, ValueError) as error:  # what the run does about its numbers is not to depend on it
                warnings.warn(f"faults: {path} was not saved ({error})", UserWarning, stacklevel=2)
                return None
            return str(path)

        file: str | None = from_first(write)
        return file


def smaller_step(run: Run) -> None:
    """Halve the learning rates of all groups, and those that schedulers go by."""
    for update in run.updates:
        for group in update.optimizer.param_groups:
            group.update({name: group[name] * SMALLER for name in RATES if name in group})
    for schedule in run.schedules:
        _halve(schedule)


def _halve(schedule: LRScheduler) -> None:
    for name in ("base_lrs", "max_lrs", "_last_lr"):
        if rates := getattr(schedule, name, None):
            setattr(schedule, name, [rate * SMALLER for rate in rates])
    for part in getattr(schedule, "_schedulers", ()):
        _halve(part)


def _about(column: Tensor | None) -> list[Any] | None:
    """What another process must know to receive a column."""
    return None if column is None else [str(column.dtype).removeprefix("torch."), list(column.shape[1:])]


def _given(column: Tensor | None, about: list[Any] | None, device: torch.device) -> Tensor | None:
    """A column of the one process that has it; None where it has none."""
    if about is None:
        return None
    dtype, sizes = about
    return gathered(
        torch.empty((0, *sizes), dtype=getattr(torch, dtype), device=device) if column is None else column
    )
