"""Training: `fit` maximises an objective of a pair over data, by steps that never wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ppl_vae.batches import Data, Source, Stream, prepare
from ppl_vae.capture import Compile, Engine
from ppl_vae.faults import Faults
from ppl_vae.hooks import Hook, Progress
from ppl_vae.loop import Loop
from ppl_vae.objectives import ELBO, Objective, Part, as_objective
from ppl_vae.pairs import Pair, Program, as_pair
from ppl_vae.products import Precision
from ppl_vae.ranks import count_ranks, own_rank
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded
from ppl_vae.running import NonFiniteError, Run
from ppl_vae.semiamortised import SemiAmortised
from ppl_vae.steps import Feed
from ppl_vae.updates import Update, trained_by

__all__ = ["NonFiniteError", "Run", "Update", "as_device", "default_device", "fit"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
adam: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3, fused=True)


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
    compile: Compile = "auto",
    precision: Precision = "float32",
    refine: int = 0,
    checkpoints: Checkpoints | None = None,
    faults: Faults = Faults(),  # noqa: B008 - it is frozen
) -> Run:
    """Train a (model, guide) pair by stochastic variational inference.

    Where `torch.distributed` is at work, as in a block of `ppl_vae.process_group`, its processes train together:
    all call this alike, each computes its part of every batch, and all end with the same parameters and history.
    Gradients are those of the joined batches, in one sum for each step; of what an objective or a layer computes
    of a batch as a whole, such as a batch norm's statistics, each takes that of its rows.

    Args:
        program: an object with ``model`` and ``guide``, or a `Pair`.
        train: tensor, array, tuple of them, `Data`, torch Dataset, or iterable of batches. Columns beyond what
            the model takes are left out. All processes are given the same; of an iterable each takes all that it
            gives there, for instance by a DistributedSampler, and where one has fewer batches, it waits.
        valid: data of the same kind; with it, the pair ends with the weights of its best epoch.
        objective: `ELBO`, `IWAE`, any `Objective`, or any ELBO of ``pyro.infer``; default ``ELBO()``.
        epochs: passes over ``train``.
        batch_size: rows per step, of all processes together; a stream keeps its own.
        optimizer: parameters -> torch optimizer, e.g. ``functools.partial(torch.optim.Adam, lr=2e-3)``; called
            once for each step that the objective has a batch make.
        scheduler: optimizer -> torch learning-rate scheduler; a `ReduceLROnPlateau` watches the objective (on
            ``valid`` where given), negated if its mode is "min".
        scheduler_every: when it steps.
        clip_norm: largest norm of the gradient.
        seed: fixes the order of the data and every draw, of each process others; the caller's random streams
            are left alone.
        device: where to train; CUDA when present, CPU otherwise.
        hooks: called around steps and epochs.
        progress: show a bar when on a terminal.
        report_every: steps between two readings of the losses; between them nothing waits for the device.
        compile: "auto" captures the step as one graph and compiles it where a run is long enough to earn that
            back (1,000 steps), and where it cannot be, warns and goes on without; "require" always captures, and
            raises where that cannot be; "off" never does. Numbers are the same up to rounding. Keep what changes
            while training in tensors: a Python number is part of the graph, and another one asks for another.
        precision: "float32", or "bf16" for matrix products and convolutions of training steps in bfloat16:
            faster where the processor has them, at some thousandths of relative error in each product.
        refine: steps that refine the posterior of each datum before the model learns from it, as `SemiAmortised`
            has it; 0 for none.
        checkpoints: where to keep all that the run needs to go on, after every epoch, and whether to go on from
            what is kept there. A run that was killed and resumed ends with the bits of one that never was.
        faults: what to do when numbers become NaN or infinite, and where to save them for inspection: by default
            the run ends, and nothing is saved. ``run.faults`` lists what happened.

    Returns:
        The run. Ctrl-C ends it early: hooks save, and what there is comes back, ``interrupted`` set.

    Raises:
        ValueError: bad data or settings, or checkpoints of another run, before training starts; a checkpoint that
            cannot be written; under compile="require", a step that cannot be captured or compiled.
        NonFiniteError: the objective or a parameter became NaN or infinite, more often than ``faults`` bears; the
            message names step, site and datum as far as they can be found, and the pair holds the parameters of
            its best epoch, or without validation the last whose objective was finite.
    """
    for name, number, least in (("epochs", epochs, 1), ("report_every", report_every, 1), ("refine", refine, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if wrong := [hook for hook in hooks if not isinstance(hook, Hook)]:
        raise ValueError(f"hooks: expected instances of Hook, got {wrong[0]!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if scheduler_every not in ("epoch", "step"):
        raise ValueError(f"scheduler_every must be 'epoch' or 'step', got {scheduler_every!r}")
    device, engine = as_device(device), Engine(compile)
    goal = as_objective(ELBO() if objective is None else objective)
    goal = _moved(SemiAmortised(goal, refine) if refine else goal, device)
    pair = as_pair(program).to(device)
    with seeded(seed, device):
        source = prepare(pair, train, batch_size, device)
        held_out = None if valid is None else prepare(pair, valid, batch_size, device)
        _check_shared(source, held_out, batch_size)
        pair.to(device)  # parameters that the first run created
        update = partial(Update, clip_norm=clip_norm, precision=precision)
        updates = [
            update(part.name, pair, part.objective, _made(part.optimizer or optimizer, found))
            for part, found in _parts(goal, pair, source, batch_size)
        ]
        schedules = [] if scheduler is None else [scheduler(made.optimizer) for made in updates]
        if scheduler_every == "step" and any(isinstance(s, ReduceLROnPlateau) for s in schedules):
            raise ValueError("scheduler_every: ReduceLROnPlateau watches a whole epoch; use 'epoch'")
        run = Run(pair, goal, epochs, updates, schedules, engine, validated=held_out is not None)
        loop = Loop(
            run,
            Feed(source, batch_size, epochs),
            None if held_out is None else Feed(held_out, batch_size, epochs),
            [*hooks, *([Progress()] if progress else [])],
            every_step=scheduler_every == "step",
            report_every=report_every,
            seed=seed,
            checkpoints=checkpoints,
            faults=faults,
        )
        with loop.joined.streams():
            loop.go()
    return run


def _check_shared(source: Source, valid: Source | None, size: int) -> None:
    """Raise ValueError for fewer data than processes, in all or in a batch; warn where each has all of them."""
    ranks = count_ranks()
    for name, given in (("train", source), ("valid", valid)) if ranks > 1 and own_rank() == 0 else ():
        if isinstance(given, Stream) and given.whole:
            warnings.warn(
                f"{name}: this DataLoader gives all data to each of the {ranks} processes; give its Dataset to "
                "fit, which shares it out, or the loader a DistributedSampler",
                UserWarning,
                stacklevel=3,
            )
    if size < ranks:
        raise ValueError(f"batch_size: {size} data cannot be shared by {ranks} processes; give at least {ranks}")
    if isinstance(source, Data) and len(source) < ranks:
        raise ValueError(f"train: {len(source)} data cannot be shared by {ranks} processes; start fewer")


def _moved(objective: Objective, device: torch.device) -> Objective:
    """The objective on a device, its buffers moved in place: a hook such as `Anneal` holds one of them."""
    for buffer in objective.buffers():
        buffer.data = buffer.data.to(device)
    return objective.to(device)


def _parts(goal: Objective, pair: Pair, source: Source, size: int) -> list[tuple[Part, list[nn.Parameter]]]:
    """The steps that a batch makes, each with the parameters that it trains."""
    everything = [p for p in pair.parameters() if p.requires_grad]
    if not everything:
        raise ValueError("program: it has no parameters to train; register nets with pyro.module")
    known: dict[str, list[nn.Parameter]] = {}
    found = []
    for part in goal.parts():
        if {"model", "guide"} <= {*part.trains}:
            own = everything
        else:
            known = known or trained_by(pair, next(iter(source.batches(size))))
            own = [p for name in part.trains if isinstance(name, str) for p in known[name]]
        more = [p for module in part.trains if isinstance(module, nn.Module) for p in module.parameters()]
        parameters = list(dict.fromkeys([*own, *(p for p in more if p.requires_grad)]))
        if not parameters:
            raise ValueError(f"objective: {part.name} has no parameters to train")
        found.append((part, parameters))
    return found


def _made(optimizer: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of the parameters."""
    made = optimizer(parameters) if callable(optimizer) else optimizer
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS evaluates the loss several times a step; use a first-order one")
    if made is optimizer or not isinstance(made, Optimizer):
        raise ValueError(
            "optimizer: expected a function from parameters to a torch optimizer, such as "
            f"functools.partial(torch.optim.Adam, lr=1e-3), got {type(optimizer).__name__}"
        )
    return made
