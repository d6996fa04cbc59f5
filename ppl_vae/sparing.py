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

    Those are judged as if they were the first datum that holds numbers, so that batches and draws of all others
    stay what they are. Then their results become NaN, and an `IncompleteError` that names the first has them all.
    So it is for data in memory; a stream ends at the batch that holds NaN, as does data where nothing is left.
    """

    @wraps(judge)
    def judged(program: Any, data: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(data, Data | Tensor | np.ndarray | tuple):
            return judge(program, data, *args, **options)
        source = cast(Data, as_data(data))
        wrong = _spoilt(columns := source.columns)
        if bool(wrong.any()):  # then a column that the model does not take may be meant
            wrong = _spoilt(columns := columns[: arity(paired(program))[1]])
        if not bool(wrong.any()) or bool(wrong.all()):
            return judge(program, data, *args, **options)
        rows = torch.arange(len(wrong), device=wrong.device)
        rows = torch.where(wrong, (~wrong).nonzero()[0], rows)
        mended = source.having(column[rows.to(column.device)] for column in source.columns)
        found = _without(kept(lambda: judge(program, mended, *args, **options)), wrong.cpu())
        try:
            for i, column in enumerate(columns):
                check_finite(column, f"data column {i}")
        except ValueError as error:
            raise IncompleteError(f"{error}; the other rows are in this error's `result`", found) from error
        return found

    return cast(Judge, judged)


def _spoilt(columns: Batch) -> Tensor:
    """Which rows hold NaN or infinity, (N,)."""
    wrong = torch.zeros(len(columns[0]), dtype=torch.bool, device=columns[0].device)
    for column in columns:
        if column.is_floating_point():
            wrong |= ~column.isfinite().reshape(len(column), -1).all(1).to(wrong.device)
    return wrong


def _without(result: Any, wrong: Tensor) -> Any:
    """A result whose tensors of all data are NaN, or False, for some of them."""
    if isinstance(result, Tensor) and result.dim() and len(result) == len(wrong):
        nothing = torch.nan if result.is_floating_point() else False
        return result.masked_fill(wrong.reshape(-1, *[1] * (result.dim() - 1)), nothing)
    if isinstance(result, dict):
        return {name: _without(value, wrong) for name, value in result.items()}
    if is_dataclass(result) and not isinstance(result, type):
        return replace(result, **{f.name: _without(getattr(result, f.name), wrong) for f in fields(result)})
    return result
