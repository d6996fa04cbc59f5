"""Training: `fit` maximises an objective of a pair over data, by steps that never wait for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ppl_vae.batches import Source, prepare
from ppl_vae.hooks import Hook, Progress
from ppl_vae.objectives import ELBO, Objective, as_objective
from ppl_vae.pairs import Batch, Pair, Program, as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms

__all__ = ["NonFiniteError", "Run", "Update", "as_device", "default_device", "fit"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
adam: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3, fused=True)


class NonFiniteError(FloatingPointError):
    """A loss or a parameter became NaN or infinite; the pair holds the last good parameters again."""


def default_device() -> torch.device:
    """CUDA when present, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_device(device: torch.device | str | None = None) -> torch.device:
    """A device that can be computed on; by default CUDA when present, the CPU otherwise.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).tolist()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device: {str(device)!r} is not to be had here; there is {', '.join(here)}") from error
    return chosen


class Update:
    """One optimizer step on one objective: a function of parameters, optimizer state, batch and random draws.

    Nothing in it reads a number back from the device, so that it can be captured as one graph.

    Args:
        name: shown in errors.
        pair: the pair.
        objective: what to maximise.
        optimizer: torch optimizer over parameters of the pair.
        clip_norm: largest norm of the gradient, or None.
    """

    def __init__(
        self,
        name: str,
        pair: Pair,
        objective: Objective,
        optimizer: Optimizer,
        clip_norm: float | None = None,
    ) -> None:
        self.name, self.pair, self.objective = name, pair, objective
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: Batch) -> Tensor:
        """Take the step; return the mean objective over the batch, a scalar on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        value: Tensor = self.objective(self.pair, *batch).mean()
        torch.autograd.backward(-value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, foreach=True)
        self.optimizer.step()
        return value.detach()


@dataclass
class Run:
    """A training run: what hooks see while it goes on, and what ``fit`` returns.

    Attributes:
        pair: the trained pair; the program given to ``fit`` shares its parameters.
        objective: what was maximised.
        epochs: how many were asked for.
        history: one row per epoch: epoch, step, train and valid (mean objective, nats per datum; valid as it was
            given to ``fit``, whatever is annealed), valid_stderr (over data), lr, seconds, rate (data per second).
        epoch: epochs done.
        step: steps done.
        best_epoch: the epoch whose weights the pair holds, by the validation objective; None without one.
        reason: why the run ended.
    """

    pair: Pair
    objective: Objective
    epochs: int
    validated: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    best_epoch: int | None = None
    reason: str = ""
    interrupted: bool = False
    stopping: bool = False

    @property
    def best(self) -> float:
        """The best validation objective so far, nats per datum; -inf before there is one."""
        return max((r["valid"] for r in self.history if not math.isnan(r["valid"])), default=-math.inf)

    def stop(self, reason: str) -> None:
        """Ask the run to end after this epoch."""
        self.stopping, self.reason = True, reason


def fit(
    program: Program | Pair,
    train: Any,
    valid: Any = None,
    *,
    objective: Any = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: OptimizerFactory = adam,
    scheduler: SchedulerFactory | None = None,
    scheduler_every: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
    report_every: int = 50,
) -> Run:
    """Train a (model, guide) pair by stochastic variational inference.

    Args:
        program: an object with ``model`` and ``guide``, or a `Pair`.
        train: tensor, array, tuple of them, `Data`, torch Dataset, or iterable of batches. Columns beyond what
            the model takes are left out.
        valid: data of the same kind; with it, the pair ends with the weights of its best epoch.
        objective: `ELBO`, `IWAE`, any `Objective`, or any ELBO of ``pyro.infer``; default ``ELBO()``.
        epochs: passes over ``train``.
        batch_size: rows per step; a stream keeps its own.
        optimizer: parameters -> torch optimizer, e.g. ``functools.partial(torch.optim.Adam, lr=2e-3)``.
        scheduler: optimizer -> torch learning-rate scheduler; a `ReduceLROnPlateau` watches the objective (on
            ``valid`` where given), negated if its mode is "min".
        scheduler_every: when it steps.
        clip_norm: largest norm of the gradient.
        seed: fixes the order of the data and every draw; the caller's random streams are left alone.
        device: where to train; CUDA when present, CPU otherwise.
        hooks: called around steps and epochs.
        progress: show a bar when on a terminal.
        report_every: steps between two readings of the losses; between them nothing waits for the device.

    Returns:
        The run. Ctrl-C ends it early: hooks save, and what there is comes back, ``interrupted`` set.

    Raises:
        ValueError: bad data or settings, before training starts.
        NonFiniteError: the objective or a parameter became NaN or infinite; the pair holds the last parameters
            whose objective was finite.
    """
    for name, number in (("epochs", epochs), ("report_every", report_every)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if scheduler_every not in ("epoch", "step"):
        raise ValueError(f"scheduler_every must be 'epoch' or 'step', got {scheduler_every!r}")
    device = as_device(device)
    goal = _moved(as_objective(ELBO() if objective is None else objective), device)
    pair = as_pair(program).to(device)
    with seeded(seed, device):
        source = prepare(pair, train, batch_size, device)
        held_out = None if valid is None else prepare(pair, valid, batch_size, device)
        pair.to(device)  # parameters that the first run created
        parameters = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("program: it has no parameters to train; register nets with pyro.module")
        update = Update("objective", pair, goal, _made(optimizer, parameters), clip_norm)
        schedule = None if scheduler is None else scheduler(update.optimizer)
        if scheduler_every == "step" and isinstance(schedule, ReduceLROnPlateau):
            raise ValueError("scheduler_every: ReduceLROnPlateau watches a whole epoch; use 'epoch'")
        run = Run(pair, goal, epochs, validated=held_out is not None)
        loop = _Loop(run, update, schedule, scheduler_every, [*hooks, *([Progress()] if progress else [])])
        loop.go(source, held_out, batch_size, seed, report_every)
    return run


def _moved(objective: Objective, device: torch.device) -> Objective:
    """The objective on a device, its buffers moved in place: a hook such as `Anneal` holds one of them."""
    for buffer in objective.buffers():
        buffer.data = buffer.data.to(device)
    return objective.to(device)


def _made(optimizer: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of the parameters."""
    made = optimizer(parameters) if callable(optimizer) else optimizer
    if made is optimizer or not isinstance(made, Optimizer):
        raise ValueError(
            "optimizer: expected a function from parameters to a torch optimizer, such as "
            f"functools.partial(torch.optim.Adam, lr=1e-3), got {type(optimizer).__name__}"
        )
    return made


class _Loop:
    """The training loop: epochs of steps, readings of the losses between them, validation after them."""

    def __init__(
        self,
        run: Run,
        update: Update,
        schedule: LRScheduler | None,
        scheduler_every: str,
        hooks: Sequence[Hook],
    ) -> None:
        self.run, self.update, self.hooks = run, update, hooks
        self.schedule, self.every_step = schedule, scheduler_every == "step"
        self.best: dict[str, Tensor] | None = None
        self.good = self.latest = snapshot(run.pair)  # the latest is good once its objective is finite
        self.given = snapshot(run.objective)

    def go(self, source: Source, valid: Source | None, batch_size: int, seed: int, report_every: int) -> None:
        """Run to the end, and call ``on_end`` however it comes."""
        run = self.run
        self.batch_size, self.seed, self.report_every = batch_size, seed, report_every
        try:
            self.call("on_start")
            while run.epoch < run.epochs and not run.stopping:
                self.one_epoch(source, valid)
            run.reason = run.reason or "all epochs done"
        except KeyboardInterrupt:
            run.interrupted, run.reason = True, "interrupted"
        finally:
            if self.best is not None:
                run.pair.load_state_dict(self.best)
            elif not self.finite():
                run.pair.load_state_dict(self.good)
            run.pair.eval()
            self.call("on_end")

    def call(self, moment: str, *args: Any) -> None:
        """Call every hook."""
        for hook in self.hooks:
            getattr(hook, moment)(self.run, *args)

    def one_epoch(self, source: Source, valid: Source | None) -> None:
        """All batches once, then validation, the history's row, and the hooks."""
        run, start = self.run, time.perf_counter()
        run.pair.train()
        self.first, total, count, pending = run.step, 0.0, 0, _Pending()
        for batch in source.epoch(self.batch_size, self.seed, run.epoch):
            self.call("on_step")
            pending.add(self.update(batch), len(batch[0]))
            run.step += 1
            if self.schedule is not None and self.every_step:
                self.schedule.step()
            if len(pending.values) == self.report_every:
                total, count = self.read(pending, source, total, count)
        if pending.values:
            total, count = self.read(pending, source, total, count)
        if not self.finite():
            self.fail(f"step {run.step} made a parameter NaN or infinite", self.again(source, run.step - 1))
        seconds = time.perf_counter() - start
        mean, stderr = (math.nan, math.nan) if valid is None else self.validate(valid)
        run.epoch += 1
        run.history.append(
            {
                "epoch": run.epoch,
                "step": run.step,
                "train": total / count,
                "valid": mean,
                "valid_stderr": stderr,
                "lr": float(self.update.optimizer.param_groups[0]["lr"]),
                "seconds": seconds,
                "rate": count / seconds,
            }
        )
        if valid is not None and mean >= run.best:
            run.best_epoch, self.best = run.epoch, snapshot(run.pair)
        self.adjust(total / count if valid is None else mean)
        self.call("on_epoch")

    def adjust(self, value: float) -> None:
        """Step a scheduler that goes by epochs; one that watches gets the objective, or the loss."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(value if self.schedule.mode == "max" else -value)
        elif self.schedule is not None and not self.every_step:
            self.schedule.step()

    def read(self, pending: _Pending, source: Source, total: float, count: int) -> tuple[float, int]:
        """Bring the pending values to the host: the only wait for the device within an epoch."""
        values, sizes, seconds = pending.take()
        wrong = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
        if wrong != 0:
            self.good = self.latest
        if wrong is not None:
            step = self.run.step - len(values) + wrong
            self.fail(f"the objective became {values[wrong]} at step {step + 1}", self.again(source, step))
        self.latest = snapshot(self.run.pair)
        part = sum(v * n for v, n in zip(values, sizes, strict=True))
        self.call("on_report", part / sum(sizes), sum(sizes) / seconds)
        return total + part, count + sum(sizes)

    def finite(self) -> bool:
        """Whether all parameters are; a gradient may be NaN though the objective is not."""
        return bool(torch.stack([p.isfinite().all() for p in self.update.parameters]).all())

    def again(self, source: Source, step: int) -> Iterator[Batch]:
        """The batches of this epoch once more, from that of a step (counted from 0) on."""
        return islice(source.epoch(self.batch_size, self.seed, self.run.epoch), step - self.first, None)

    def fail(self, what: str, batches: Iterator[Batch]) -> NoReturn:
        """Put the last good parameters back and raise, naming the likely cause: see the first of the batches."""
        run = self.run
        run.pair.load_state_dict(self.good)
        self.best, run.best_epoch, run.reason = None, None, what
        raise NonFiniteError(
            f"{what} (epoch {run.epoch + 1}); likely cause: {diagnose(run.pair, next(batches, None))}. "
            "The pair holds its last good parameters."
        )

    @torch.no_grad()
    def validate(self, valid: Source) -> tuple[float, float]:
        """Mean objective and its standard error over data; the same draws every time, the stream left alone."""
        pair, goal = self.run.pair.eval(), self.run.objective
        annealed = snapshot(goal)
        goal.load_state_dict(self.given)  # under a rising beta, the first epochs would look best
        with seeded(self.seed, self.update.parameters[0].device):
            parts = [goal(pair, *b) for b in valid.batches(self.batch_size)]
        goal.load_state_dict(annealed)
        values = torch.cat(parts).double().cpu()
        if values.isnan().any():
            wrong = next(i for i, part in enumerate(parts) if part.isnan().any())
            what = f"the validation objective became nan after step {self.run.step}"
            self.fail(what, islice(valid.batches(self.batch_size), wrong, None))
        return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


class _Pending:
    """Objective values still on the device, and the sizes of their batches."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.sizes: list[int] = []
        self.since = time.perf_counter()

    def add(self, value: Tensor, size: int) -> None:
        self.values.append(value)
        self.sizes.append(size)

    def take(self) -> tuple[list[float], list[int], float]:
        values, sizes = torch.stack(self.values).tolist(), self.sizes
        seconds = time.perf_counter() - self.since
        self.__init__()  # type: ignore[misc]
        return values, sizes, seconds


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, of a pair or an objective."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def diagnose(pair: Pair, batch: Batch | None) -> str:
    """Say where a batch's log-densities go wrong under the given parameters, if they do already."""
    for i, column in enumerate(batch or ()):
        if column.is_floating_point() and not bool(torch.isfinite(column).all()):
            return f"batch tensor {i} holds NaN or infinity"
    if batch is None or pair.layout is None or pair.layout.outside:
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
