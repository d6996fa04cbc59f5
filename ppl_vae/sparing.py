"""A datum that holds NaN does not cost the others their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ppl_vae.batches import Data, arity, as_data
from ppl_vae.estimates import IncompleteError, kept
from ppl_vae.layout import check_finite
from ppl_vae.pairs import Batch, paired

__all__ = ["sparing"]

Judge = TypeVar("Judge", bound=Callable[..., Any])


def sparing(judge: Judge) -> Judge:
    """Make a function of (program, data, ...) give the results of the other data, where some hold NaN or infinity.

    The others are judged without them. Then there is NaN in the places of those left out, and an
    `IncompleteError` that names the first has it all. So it is for data in memory; a stream ends at the batch that
    holds NaN, as does data where nothing is left.
    """

    @wraps(judge)
    def judged(program: Any, data: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(data, Data | Tensor | np.ndarray | tuple):
            return judge(program, data, *args, **options)
        source = cast(Data, as_data(data))
        whole = _whole(columns := source.columns)
        if not bool(whole.all()):  # then a column that the model does not take may be meant
            whole = _whole(columns := columns[: arity(paired(program))[1]])
        if bool(whole.all()) or not bool(whole.any()):
            return judge(program, data, *args, **options)
        rest = source.having(column[whole.to(column.device)] for column in source.columns)
        here = whole.cpu()
        args, options = _changed((args, options), len(here), lambda value: value[here])
        found = kept(lambda: judge(program, rest, *args, **options))
        found = _changed(found, int(here.sum()), lambda value: _spread(value, here))
        try:
            for i, column in enumerate(columns):
                check_finite(column, f"data column {i}")
        except ValueError as error:
            raise IncompleteError(f"{error}; the other rows are in this error's `result`", found) from error
        return found

    return cast(Judge, judged)


def _whole(columns: Batch) -> Tensor:
    """Which rows hold numbers alone, (N,)."""
    found = torch.ones(len(columns[0]), dtype=torch.bool, device=columns[0].device)
    for column in columns:
        if column.is_floating_point():
            found &= column.isfinite().reshape(len(column), -1).all(1).to(found.device)
    return found


def _spread(value: Tensor, here: Tensor) -> Tensor:
    """Rows in their places among all, with NaN, or False, in the others."""
    nothing = torch.nan if value.is_floating_point() else False
    found = torch.full((len(here), *value.shape[1:]), nothing, dtype=value.dtype)
    found[here] = value.cpu()
    return found


def _changed(value: Any, size: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Estimates and what holds them, with every tensor of so many rows changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() and len(value) == size else value
    if isinstance(value, dict):
        return {name: _changed(part, size, change) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_changed(part, size, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _changed(getattr(value, f.name), size, change) for f in fields(value)})
    return value
