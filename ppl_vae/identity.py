"""What tells one run from another, besides its state: for checkpoints, and for processes that train together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppl_vae.batches import Data
from ppl_vae.running import Run
from ppl_vae.steps import Feed
from ppl_vae.updates import Update

__all__ = ["at_a_glance", "looked_at_closely"]


def at_a_glance(run: Run, train: Feed, seed: int) -> dict[str, Any]:
    """What decides the numbers of a run besides what is in its state, as far as a glance tells."""
    source = train.source
    return {
        "seed": seed,
        "batch_size": train.size,
        "rows": len(source) if isinstance(source, Data) else None,
        "updates": [[type(u.optimizer).__name__, u.precision, u.clip_norm] for u in run.updates],
        "schedules": [type(schedule).__name__ for schedule in run.schedules],
    }


def looked_at_closely(run: Run, train: Feed, valid: Feed | None, scheduler_every: str) -> dict[str, Any]:
    """The same on a closer look, at the start of a run."""
    return {
        "scheduler_every": scheduler_every,
        "data": _data(train),
        "valid": None if valid is None else _data(valid),
        "objective": _made_of(run.objective),
        "groups": [_groups(update) for update in run.updates],
        "schedules": [str(schedule.state_dict()) for schedule in run.schedules],
    }


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
