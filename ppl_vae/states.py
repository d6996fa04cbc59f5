"""Whether the parts of a checkpoint are what a run makes: looked at before any of them is put into one.

A file with the right checksum may still have been made by someone else, and what reads its parts later, kernels of
optimizers among them, does not ask for types and shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ppl_vae.running import Fault, Run

__all__ = ["check_best", "check_faults", "check_optimizer", "check_progress", "check_schedule"]

MOST = 2**53  # of whole numbers: up to here each is a float as well
ROW = ("epoch", "step", "train", "valid", "valid_stderr", "lr", "seconds", "per_second")  # hooks may add to it
RATES = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay"}  # of a group: what training may change
CYCLED = {"momentum", "betas"}  # with a schedule
FUSED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # kernels do not ask their sizes
MOVING = {  # of torch's schedules: what their steps change
    "last_epoch", "_step_count", "_last_lr", "base_lrs", "max_lrs", "best", "num_bad_epochs", "cooldown_counter",
    "T_cur", "T_i", "_get_lr_called_within_step", "_is_initial", "lr_lambdas",
}  # fmt: skip


def check_progress(held: Mapping[str, Any], names: tuple[str, ...], run: Run) -> None:
    """Raise TypeError unless these are numbers, history and reason of a run between two epochs."""
    if held.keys() != {*names}:
        raise TypeError(f"run: {_listed(held)} instead of {_listed(names)}")
    epoch, step, history, best = (held[name] for name in ("epoch", "step", "history", "best_epoch"))
    if not _whole(epoch) or not _whole(step):
        raise TypeError(f"epoch and step must be whole numbers from 0, got {_short(epoch)} and {_short(step)}")
    if not isinstance(history, list) or len(history) != epoch:
        raise TypeError(f"history must have a row for each of {epoch} epochs")
    for number, row in enumerate(history, 1):
        if not isinstance(row, dict) or not {*ROW} <= row.keys() or not all(map(_number, row.values())):
            raise TypeError(f"history: row {number} does not have numbers for {', '.join(ROW)}")
    if not (best is None or (_whole(best) and 1 <= best <= epoch)):
        raise TypeError(f"best_epoch must be one of {epoch} epochs, got {_short(best)}")
    for name in ("stopping", "reason"):
        if type(held[name]) is not type(getattr(run, name)):
            raise TypeError(f"{name} is a {type(held[name]).__name__}")


def check_best(held: Any, pair: Mapping[str, Tensor]) -> None:
    """Raise TypeError unless these are None, or parameters of the same names and shapes."""
    if held is None:
        return
    if not isinstance(held, dict) or held.keys() != pair.keys():
        raise TypeError("best: not the parameters that the pair has")
    for name, own in pair.items():
        _check_tensor(f"best: {name}", held[name], own)


def check_faults(held: Any) -> None:
    """Raise TypeError unless each is made of what a `Fault` is."""
    kinds = get_type_hints(Fault)
    if not isinstance(held, list):
        raise TypeError(f"faults is a {type(held).__name__}")
    for fault in held:
        if not isinstance(fault, dict) or fault.keys() != {each.name for each in fields(Fault)}:
            raise TypeError("faults: one does not say what and where")
        for name, kind in kinds.items():
            if not isinstance(fault[name], kind) or isinstance(fault[name], bool):
                raise TypeError(f"faults: {name} is {_short(fault[name])}")


def check_optimizer(held: Any, optimizer: Optimizer, *, scheduled: bool) -> None:
    """Raise TypeError unless this is a state that the optimizer may come to.

    Args:
        held: the state.
        optimizer: with the settings that it has at the start of a run.
        scheduled: whether a schedule may cycle its momentum.
    """
    own = optimizer.param_groups
    if not isinstance(held, dict) or held.keys() != {"state", "param_groups"}:
        raise TypeError(f"optimizers: a state with {_listed(held)} instead of state, param_groups")
    if len(held["param_groups"]) != len(own):
        raise TypeError(f"optimizers: {len(held['param_groups'])} groups instead of {len(own)}")
    changing = RATES | (CYCLED if scheduled else set())
    numbers: list[int] = []
    parameters: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for there, group in zip(held["param_groups"], own, strict=True):
        if not isinstance(there, dict) or there.keys() != group.keys():
            raise TypeError(f"optimizers: a group with {_listed(there)} instead of {_listed(group)}")
        numbers += there["params"]
        parameters += [(p, group) for p in group["params"]]
        counts = len(there["params"]), len(group["params"])
        if counts[0] != counts[1]:
            raise TypeError(f"optimizers: a group of {counts[0]} parameters instead of {counts[1]}")
        for name in group.keys() - {"params"}:
            _check_setting(f"optimizers: {name}", there[name], group[name], name in changing)
    if numbers != [*range(len(parameters))] or any(type(number) is not int for number in numbers):
        raise TypeError("optimizers: parameters must be numbered from 0")
    made: dict[Any, dict[str, Any] | None] = {}
    for number, state in held["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise TypeError(f"optimizers: a state of parameter {_short(number)} of {len(parameters)}")
        parameter, group = parameters[number]
        alike = id(group), parameter.shape, parameter.dtype, parameter.device
        if alike not in made:
            made[alike] = _state_after_a_step(optimizer, parameter, group)
        _check_averages(state, made[alike], parameter)


def _state_after_a_step(
    optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What an optimizer of torch keeps of such a parameter; None for one of another origin."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    twin = nn.Parameter(torch.zeros_like(parameter))
    settings = {name: v.clone() if isinstance(v, Tensor) else v for name, v in group.items() if name != "params"}
    make: Callable[..., Optimizer] = type(optimizer)
    stepped = make([{**settings, "params": [twin]}])
    twin.grad = torch.zeros_like(twin)
    stepped.step()
    return dict(stepped.state[twin])


def _check_averages(held: Any, own: Mapping[str, Any] | None, parameter: Tensor) -> None:
    """Raise TypeError unless a parameter's state has what the optimizer makes of it."""
    if not isinstance(held, dict) or (own is not None and held.keys() != own.keys()):
        raise TypeError(f"optimizers: a state with {_listed(held)} instead of {_listed(own or {})}")
    for name, value in held.items():
        if own is None:
            if name in FUSED:
                _check_tensor(f"optimizers: {name}", value, parameter)
        elif isinstance(own[name], Tensor):
            _check_tensor(f"optimizers: {name}", value, own[name])
        elif not (type(value) is type(own[name]) and (not _number(value) or math.isfinite(value))):
            raise TypeError(f"optimizers: {name} is {_short(value)}")
        if name == "step" and not 0 <= float(value) <= MOST:
            raise TypeError(f"optimizers: {float(value)} steps")


def check_schedule(held: Any, schedule: LRScheduler) -> None:
    """Raise TypeError unless this is a state that a schedule may come to."""
    kind, known = type(schedule).__name__, schedule.state_dict()
    own = {name: dict(v) if isinstance(v, Counter) else v for name, v in known.items()}
    if not isinstance(held, dict) or held.keys() != own.keys():  # it would replace whatever attributes it names
        raise KeyError(f"a {kind} with {_listed(held)}")
    parts = getattr(schedule, "_schedulers", [])
    torchs = type(schedule).__module__ == "torch.optim.lr_scheduler"
    for name in own.keys() - {"_schedulers"} if parts else own:
        if name in MOVING or not torchs:
            _check_like(f"schedules: {name} of {kind}", held[name], own[name])
        elif held[name] != own[name]:
            raise TypeError(f"schedules: {name} of {kind} is {_short(held[name])}, not {_short(own[name])}")
    for name, least in (("last_epoch", -1), ("_step_count", 0), ("T_i", 1)):  # -1 of one that waits for another
        if torchs and name in own and not (type(held[name]) is int and least <= held[name] <= MOST):
            raise TypeError(f"schedules: {name} of {kind} is {_short(held[name])}")
    if parts:
        if len(held["_schedulers"]) != len(parts):
            raise TypeError(f"schedules: {kind} has {len(parts)} parts")
        for there, part in zip(held["_schedulers"], parts, strict=True):
            check_schedule(there, part)


def _check_like(what: str, held: Any, own: Any) -> None:
    """Raise TypeError unless a value is of the kind of another: lists as long, a number for a number."""
    if own is None or (_number(own) and _number(held)):
        return
    if type(held) is not type(own) or (isinstance(own, list) and len(held) != len(own)):
        raise TypeError(f"{what} is {_short(held)}")
    for i, part in enumerate(own if isinstance(own, list) else ()):
        _check_like(what, held[i], part)
    if isinstance(own, Tensor):
        _check_tensor(what, held, own)


def _check_setting(what: str, held: Any, own: Any, changing: bool) -> None:
    """Raise TypeError unless a group's setting is its own, or where that changes, a finite one of its kind."""
    if isinstance(own, Tensor):
        _check_tensor(what, held, own)
        fits = bool(held.isfinite().all()) and (changing or torch.equal(held, own.cpu()))
    elif not changing:
        fits = type(held) is type(own) and held == own
    elif isinstance(own, tuple | list):
        fits = type(held) is type(own) and len(held) == len(own) and all(_number(v) and 0 <= v < 1 for v in held)
    else:
        fits = _number(own) and _number(held) and math.isfinite(held)
    if not fits:
        raise TypeError(f"{what} is {_short(held)}, not {'like ' if changing else ''}{_short(own)}")


def _check_tensor(what: str, held: Any, own: Tensor) -> None:
    """Raise TypeError unless a tensor is of another's shape, and both of whole or neither of whole numbers."""
    if not isinstance(held, Tensor) or held.shape != own.shape:
        raise TypeError(f"{what} of shape {tuple(getattr(held, 'shape', ()))} for {tuple(own.shape)}")
    if held.is_floating_point() != own.is_floating_point():
        raise TypeError(f"{what} of {held.dtype} for {own.dtype}")


def _number(value: Any) -> bool:
    """Whether it is a float, or a whole number that one can hold; NaN and infinity are."""
    return type(value) is float or (type(value) is int and abs(value) <= MOST)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))[:200] if isinstance(names, Mapping | tuple) else _short(names)


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
