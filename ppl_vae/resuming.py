"""Checkpoints: everything that decides how a training run goes on, so that one that was cut off ends as if not.

What a run holds between two epochs is written after each: parameters, the best ones, optimizers, schedules, the
objective's own numbers, the random streams, hooks, history. The order of the data follows from seed and epoch.
So a run that was killed and resumed ends with the bits of one that never was, on the same machine, versions and
number of threads. Torch's default streams are kept, and not those of `random`, NumPy or a DataLoader's own; nor
are the running baselines of Pyro's TraceGraph_ELBO. On a stream of batches under compile="auto", which counts them
before it compiles, numbers are the same up to rounding.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ppl_vae.conditionals import at_least_one
from ppl_vae.files import PathLike, brief
from ppl_vae.packing import DamagedError, pack, require_readable, unpack
from ppl_vae.ranks import RankError, alone, count_ranks, first_bytes, gathered, own_rank
from ppl_vae.rng import derived
from ppl_vae.running import Fault
from ppl_vae.states import check_best, check_faults, check_optimizer, check_progress, check_schedule

if TYPE_CHECKING:
    from ppl_vae.hooks import Hook
    from ppl_vae.running import Run

__all__ = ["Checkpoints", "Resume", "RunState", "load_random", "random_streams"]

Resume = Literal["off", "last", "auto"]

KIND = "checkpoint"
KEPT = ("epoch", "step", "history", "best_epoch", "stopping", "reason")  # of a run
NAME = re.compile(r"epoch-(\d+)\.safetensors")
CUT_OFF = ".epoch-*.part"  # what a kill leaves of a file


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        folder: made where it is not there; its parent must be.
        resume: "last" goes on from the newest; "auto" from an earlier one, with a warning that names both, where
            that is damaged, and from the start where there is none; "off" starts, in a folder without checkpoints.
        every: epochs from one to the next; the first is written before training, the last at its end.
        keep: how many of the newest are kept.

    Raises:
        ValueError: numbers below one; an unknown ``resume``.
    """

    def __init__(self, folder: PathLike, resume: Resume = "off", *, every: int = 1, keep: int = 2) -> None:
        at_least_one(every=every, keep=keep)
        if resume not in ("off", "last", "auto"):
            raise ValueError(f"resume must be 'off', 'last' or 'auto', got {resume!r}")
        self.folder, self.resume, self.every, self.keep = Path(folder), resume, every, keep

    def found(self) -> list[Path]:
        """The files there are, the oldest first.

        Raises:
            ValueError: the folder cannot be read.
        """
        try:
            if not self.folder.is_dir():
                return []
            numbered = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except OSError as error:
            where = brief(self.folder)
            raise ValueError(f"checkpoints: cannot read {where} ({error.strerror}); make it readable") from error
        return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]

    def write(self, epoch: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then remove the oldest; whatever goes wrong, the one before stays.

        Of several processes the first alone writes.

        Raises:
            ValueError: it cannot be written.
        """
        if own_rank():
            return
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"checkpoints: cannot make {self.folder} ({error.strerror})") from error
        pack(self.folder / f"epoch-{epoch:06d}.safetensors", KIND, state)
        for path in (*self.found()[: -self.keep], *self.folder.glob(CUT_OFF)):
            path.unlink(missing_ok=True)

    def check_room(self, copies: int) -> None:
        """Look, before training, whether the folder can be written to, and has room for as many as it will hold.

        Args:
            copies: how many times as large as the newest a later one may be.

        Raises:
            ValueError: it has not, or cannot; they would be larger than what may be read.
        """
        if own_rank():
            return
        there = [path.stat().st_size for path in self.found()]
        require_readable(KIND, copies * there[-1])
        needed = (self.keep + 1) * copies * there[-1] - sum(there)  # one more while it is written
        disk = shutil.disk_usage(self.folder)
        if disk.total > 0 and disk.free < needed:  # some file systems do not tell
            raise ValueError(
                f"checkpoints: the disk of {self.folder} has {disk.free / 1e6:.1f} MB left, and this run needs "
                f"about {needed / 1e6:.1f} MB to keep the last {self.keep}; free some, or take another folder"
            )
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"checkpoints: {self.folder} cannot be written to; mend that before going on")

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in (*self.found(), *self.folder.glob(CUT_OFF)):
            path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The state to go on from, None to start.

        Raises:
            ValueError: there is none and "last" wants one, or there is one and "off" wants none; a file of a newer
                version.
            DamagedError: the newest is damaged, under "last"; all are, under "auto".
        """
        paths = self.found()[::-1]
        if self.resume == "off" and paths:
            raise ValueError(f"checkpoints: {self.folder} holds those of a run; resume it, or take another folder")
        if self.resume == "last" and not paths:
            raise ValueError(f"resume: there is no checkpoint in {self.folder}; start afresh, or resume 'auto'")
        wrong: list[str] = []
        for path in paths:
            try:
                state: dict[str, Any] = unpack(path, KIND)
            except DamagedError as error:
                if self.resume == "last":
                    older = f"resume 'auto' goes back to {paths[1].name}" if paths[1:] else "there is no other"
                    raise DamagedError(f"{error}; {older}") from error
                wrong.append(str(error).removeprefix("path: "))
                continue
            if wrong:
                warnings.warn(f"resume: going on from {path.name}: {'; '.join(wrong)}", UserWarning, stacklevel=2)
            return state
        if wrong:
            raise DamagedError(f"resume: no checkpoint is whole: {'; '.join(wrong)}")
        return None


class RunState:
    """The state of a run, between two epochs, as plain values and tensors.

    Args:
        run: the run.
        hooks: its hooks.
        settings: what decides its numbers besides.
        details: more of that, looked at last.
    """

    def __init__(self, run: Run, hooks: Sequence[Hook], settings: dict[str, Any], details: dict[str, Any]) -> None:
        self.run, self.hooks, self.settings, self.details = run, hooks, settings, details
        self.source = ""  # where the state came from, for errors

    def find(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """The state to go on from, None to start; nothing is changed.

        Of several processes the first reads it, and the others need no access to the folder.

        Raises:
            ValueError: what `Checkpoints.read` refuses; a checkpoint of another run, or of another version.
            DamagedError: one with other parts than such a run makes, as only a crafted file has.
            RankError: so in the first process, and this is another.
        """
        self.source = f" in {checkpoints.folder}"
        if count_ranks() == 1:
            return self._read(checkpoints)
        found: list[dict[str, Any] | None] = []

        def sent() -> bytes:
            with alone():
                found.append(self._read(checkpoints))
            return b"" if found[0] is None else _packed(found[0])

        received = first_bytes(sent)
        return found[0] if found else (_unpacked(received) if received else None)

    def _read(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """The state that is kept, if it is of this run."""
        held, run = checkpoints.read(), self.run
        if held is not None:
            self._check_version(held, checkpoints)
            with _state_of_a_run(self.source):
                _check_state("settings", held["settings"], self.settings)
                _check_state("parameters", _shapes(held["pair"]), _shapes(run.pair.state_dict()))
                _check_state("objective", _shapes(held["objective"]), _shapes(run.objective.state_dict()))
                _check_state("hooks", [*held["hooks"]], [*self._hooked()])
                _check_state("details", held["details"], self.details)
                _check_state("optimizers", len(held["optimizers"]), len(run.updates))
                _check_state("schedules", len(held["schedules"]), len(run.schedules))
                self._check_parts(held)
        return held

    def _check_version(self, held: Any, checkpoints: Checkpoints) -> None:
        """Raise ValueError unless a state has the parts that `take` gives; earlier versions kept no faults."""
        where = f"resume: the newest checkpoint in {checkpoints.folder}"
        if not isinstance(held, dict) or "settings" not in held:
            raise DamagedError(f"{where} is no state of a run")
        held.setdefault("faults", [])
        own = self.take(None).keys()
        if differing := [f"{'lacks' if name in own else 'has'} {name!r}" for name in own ^ held.keys()]:
            raise DamagedError(
                f"{where} ({checkpoints.found()[-1].name}) is of another version of ppl_vae (it "
                f"{', '.join(sorted(differing))[:200]}): finish that run with the version that began it (run.json "
                "tells which), or start afresh"
            )

    def _check_parts(self, held: dict[str, Any]) -> None:
        """Raise TypeError, or what `_state_of_a_run` takes for one, where a part is not what such a run makes."""
        run = self.run
        check_progress(held["run"], KEPT, run)
        check_best(held["best"], run.pair.state_dict())
        check_faults(held["faults"])
        for update, state in zip(run.updates, held["optimizers"], strict=True):
            check_optimizer(state, update.optimizer, scheduled=bool(run.schedules))
        for schedule, state in zip(run.schedules, held["schedules"], strict=True):
            check_schedule(state, schedule)

    def take(self, best: dict[str, Tensor] | None) -> dict[str, Any]:
        """The state, with the best parameters so far."""
        run = self.run
        return {
            "settings": self.settings,
            "details": self.details,
            "pair": dict(run.pair.state_dict()),
            "best": best,
            "objective": dict(run.objective.state_dict()),
            "optimizers": [update.optimizer.state_dict() for update in run.updates],
            "schedules": [schedule.state_dict() for schedule in run.schedules],
            "random": _all_streams(run.pair.device),
            "run": {name: getattr(run, name) for name in KEPT},
            "faults": [asdict(fault) for fault in run.faults],
            "hooks": {name: hook.state() for name, hook in self._hooked().items()},
        }

    def put(self, held: dict[str, Any]) -> dict[str, Tensor] | None:
        """Put the run into a state; return the best parameters.

        Raises:
            DamagedError: it is of another kind than `take` gives, as only a crafted file is.
        """
        with _state_of_a_run(self.source):
            return self._put(held)

    def _put(self, held: dict[str, Any]) -> dict[str, Tensor] | None:
        run, device = self.run, self.run.pair.device
        run.pair.load_state_dict(held["pair"])
        run.objective.load_state_dict(held["objective"])
        for update, state in zip(run.updates, held["optimizers"], strict=True):
            _load_optimizer(update.optimizer, state)
        for schedule, state in zip(run.schedules, held["schedules"], strict=True):
            _load_schedule(schedule, state)
        for name in KEPT:
            setattr(run, name, held["run"][name])
        run.faults[:] = [Fault(**fault) for fault in held["faults"]]
        for name, hook in self._hooked().items():
            hook.restore(run, held["hooks"][name])
        self._go_on_drawing(held["random"])  # last: hooks may have drawn
        best: dict[str, Tensor] | None = held["best"]
        return best and {name: value.to(device) for name, value in best.items()}

    def _go_on_drawing(self, states: dict[str, Tensor]) -> None:
        """Put generators where they were, with as many processes; else begin new streams, with a warning."""
        device, rank, ranks = self.run.pair.device, own_rank(), count_ranks()
        before = len(states["cpu"]) if states["cpu"].dim() > 1 else 1
        if before == ranks:
            own = states if ranks == 1 else {name: each[rank].clone() for name, each in states.items()}
            load_random(own, device)  # of a view, torch reads past its end
            return
        if rank == 0:
            warnings.warn(
                f"resume: the run had {before} processes and goes on with {ranks}: what is drawn from here on is "
                "not what would have been",
                UserWarning,
                stacklevel=2,
            )
        seed = derived(self.settings["seed"], "rank", rank, "of", ranks, "from epoch", self.run.epoch)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)

    def _hooked(self) -> dict[str, Hook]:
        """The hooks that have a state, by kind and place."""
        named = {
            f"{i} {type(hook).__name__}": hook
            for i, hook in enumerate(self.hooks)
            if hook.everywhere or own_rank() == 0
        }
        return {name: hook for name, hook in named.items() if hook.state() is not None}


@contextmanager
def _state_of_a_run(source: str) -> Iterator[None]:
    """Tell what goes wrong with the parts of a state as damage: whole ones fit each other."""
    try:
        yield
    except (torch.OutOfMemoryError, RankError):
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DamagedError(f"resume: the checkpoint{source} is not of such a run ({why})") from error


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _check_state(what: str, held: Any, own: Any) -> None:
    """Raise ValueError, naming the first difference, unless a checkpoint is of the same run."""
    if held == own:
        return
    if isinstance(held, dict) and isinstance(own, dict):
        name = next(n for n in [*own, *held] if held.get(n) != own.get(n))
        held, own, what = held.get(name), own.get(name), f"{what}: {name}"
    raise ValueError(f"resume: the checkpoint is of another run, by its {what}: {held} there, {own} here")


def _packed(state: dict[str, Any]) -> bytes:
    """A state as the bytes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder, "state"), KIND, state).read_bytes()


def _unpacked(data: bytes) -> dict[str, Any]:
    """The state that `_packed` was given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.write_bytes(data)
        state: dict[str, Any] = unpack(path, KIND)
    return state


def _all_streams(device: torch.device) -> dict[str, Tensor]:
    """`random_streams`; of several processes each one's, stacked."""
    own = random_streams(device)
    return own if count_ranks() == 1 else {name: gathered(state[None]) for name, state in own.items()}


def random_streams(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's default generators, of the CPU and of the GPU in use."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def load_random(states: dict[str, Tensor], device: torch.device) -> None:
    """Put generators where `random_streams` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _load_schedule(schedule: LRScheduler, state: dict[str, Any]) -> None:
    """Load a state; what was a Counter, as in `MultiStepLR`, is one again."""
    counters = {name for name, value in vars(schedule).items() if isinstance(value, Counter)}
    nested = getattr(schedule, "_schedulers", [])
    states = state.get("_schedulers", [])
    schedule.load_state_dict({**state, "_schedulers": [{} for _ in nested]} if nested else state)
    for name in counters:
        setattr(schedule, name, Counter(getattr(schedule, name)))
    for part, own in zip(nested, states, strict=True):
        _load_schedule(part, own)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state into the groups that there are: those who hold them, schedulers and recorded steps, keep them.

    Raises:
        ValueError: it is of other groups or parameters.
    """
    groups = optimizer.param_groups
    optimizer.load_state_dict(state)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in loaded.items() if name != "params"})
    optimizer.param_groups = groups
