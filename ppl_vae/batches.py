"""Data as batches: columns in memory, gathered row by row, or a stream of batches made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ppl_vae.layout import Layout, check_rows, check_supports, inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.rng import seeded

__all__ = ["Data", "Source", "Stream", "as_data", "prepare"]

Transform = Callable[[Tensor], Tensor]


class Data:
    """Columns of equal length held in memory, such as images x (N, D) and labels y (N,).

    Args:
        *columns: tensors or arrays with the same first dimension N. Where a pair takes them, floating-point
            columns get the precision of its parameters. A first column of uint8 holds pixels, kept small in
            memory and presented as x / 255; bool becomes 0 and 1.
        transform: applied to the first column of each batch whenever it is presented, for instance
            `ppl_vae.redraw`, which draws binary pixels anew.

    Raises:
        ValueError: no columns, no rows, or columns of different lengths.

    >>> data = Data(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> len(data), [len(x) for x, y in data.batches(2)]
    (3, [2, 1])
    """

    def __init__(self, *columns: Any, transform: Transform | None = None) -> None:
        if not columns:
            raise ValueError("Data: at least one column is needed")
        self.columns = tuple(_as_tensor(c, f"column {i}") for i, c in enumerate(columns))
        self.transform = transform
        self.dtype: torch.dtype | None = None  # of the pair that takes them
        lengths = [len(c) if c.dim() else 0 for c in self.columns]
        if lengths[0] == 0:
            raise ValueError("Data: column 0 is empty; at least one row is needed")
        if len(set(lengths)) > 1:
            raise ValueError(f"Data: columns must have the same number of rows, got {lengths}")

    def __len__(self) -> int:
        return len(self.columns[0])

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(c.shape)) for c in self.columns)
        return f"Data({shapes}, transform={self.transform!r})"

    def __getitem__(self, rows: slice | Tensor) -> Data:
        """Some of the rows, under the same transform."""
        return self.having(c[rows] for c in self.columns)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Data:
        """The same data on a device and in a floating precision; what is so already is not copied."""
        data = self.having(_placed(c, device, dtype) for c in self.columns)
        data.dtype = dtype or self.dtype
        return data

    def having(self, columns: Iterable[Tensor]) -> Data:
        """Other columns, presented in the same way."""
        data = Data(*columns, transform=self.transform)
        data.dtype = self.dtype
        return data

    def present(self, rows: slice | Tensor) -> Batch:
        """A batch of some rows as the model sees it, transformed."""
        first, *rest = (c[rows] for c in self.columns)
        first = _pixels(first, self.dtype)
        return (first if self.transform is None else self.transform(first), *rest)

    def batches(self, size: int, *, order: Tensor | None = None) -> Iterator[Batch]:
        """All rows in batches of ``size`` (the last may be shorter), in the order given or their own."""
        for start in range(0, len(self), size):
            stop = start + size
            yield self.present(slice(start, stop) if order is None else order[start:stop])

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """All rows shuffled: an order that depends on the seed and the epoch's number alone."""
        generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        return self.batches(size, order=order.to(self.columns[0].device))


class Stream:
    """Batches from an iterable: a DataLoader, a list of batches, anything that can be iterated again.

    Args:
        source: the iterable; each item is a tensor, an array, or a tuple or list of them, treated as columns of
            `Data` are.
        shuffled: another order of the same data, for training; by default the source itself.
        device: where batches are moved as they come.

    Raises:
        ValueError: an iterator, which could serve one epoch only.
    """

    def __init__(
        self,
        source: Iterable[Any],
        shuffled: DataLoader[Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(source, Iterator):
            raise ValueError(
                "data: an iterator is used up after one epoch; give something that can be iterated again "
                "(a DataLoader, a list, or an object whose __iter__ starts anew)"
            )
        self.source, self.shuffled, self.device = source, shuffled, device
        self.dtype: torch.dtype | None = None
        self.width: int | None = None  # how many of a batch's tensors to pass on
        self.check: Callable[[Batch], None] | None = None  # refuses a batch, before it goes to the device

    def __repr__(self) -> str:
        return f"Stream({type(self.source).__name__})"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Stream:
        """The same stream, its batches moved to a device and a floating precision as they come."""
        stream = Stream(self.source, self.shuffled, device)
        stream.dtype, stream.width, stream.check = dtype or self.dtype, self.width, self.check
        return stream

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """One pass over the source, in its own order and batch size."""
        return self._read(self.source)

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One pass for training; a Dataset's order depends on the seed and the epoch's number alone."""
        if self.shuffled is not None and self.shuffled.generator is not None:
            self.shuffled.generator.manual_seed(_epoch_seed(seed, epoch))
        return self._read(self.source if self.shuffled is None else self.shuffled)

    def _read(self, source: Iterable[Any]) -> Iterator[Batch]:
        empty = True
        for number, item in enumerate(source):
            empty = False
            batch = tuple(_placed(t, t.device, self.dtype) for t in _as_batch(item)[: self.width])
            if self.check is not None:
                try:
                    self.check((_pixels(batch[0], self.dtype), *batch[1:]))
                except ValueError as error:
                    which = "shuffled data" if source is self.shuffled else "data"
                    raise ValueError(f"{which} batch {number}: {error}") from error
            first, *rest = (_placed(t, self.device, self.dtype) for t in batch)
            yield (_pixels(first, self.dtype), *rest)
        if empty:
            raise ValueError("data: the iterable gave no batch; at least one is needed")


Source = Data | Stream


def as_data(data: Any, batch_size: int = 128) -> Source:
    """Data in any form that users have it: tensor, array, tuple of them, torch Dataset, iterable of batches.

    Args:
        data: the data; a map-style Dataset is read through DataLoaders of ``batch_size``.
        batch_size: used for a Dataset only.

    Raises:
        ValueError: something that holds no tensors, or holds no rows; a list of columns, which is no tuple.
    """
    if isinstance(data, Data | Stream):
        return data
    if isinstance(data, Tensor | np.ndarray):
        return Data(data)
    if isinstance(data, tuple) and all(isinstance(c, Tensor | np.ndarray) for c in data):
        return Data(*data)
    if isinstance(data, list) and _ranks_differ(data):
        raise ValueError(
            "data: a list is read as batches of one column, but its tensors differ in rank, shapes "
            f"{[tuple(c.shape) for c in data[:4]]}; give columns as a tuple, (x, y)"
        )
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            return Stream(DataLoader(data, batch_size=batch_size))
        loader = DataLoader(data, batch_size=batch_size, shuffle=True, generator=torch.Generator())
        return Stream(DataLoader(data, batch_size=batch_size), shuffled=loader)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return Stream(data)
    raise ValueError(
        "data: expected a tensor, an array, a tuple of them, a torch Dataset or an iterable of batches, "
        f"got {type(data).__name__}"
    )


def prepare(pair: Pair, data: Any, batch_size: int = 128, device: torch.device | str | None = None) -> Source:
    """Data for a pair: on its device, with no more columns than the model takes, checked before any use.

    Columns beyond the model's arguments (labels, say) are left out. Everything in memory is checked now, for
    NaN and for values outside what the likelihood is defined on. A stream is checked on its first batch now,
    and on every batch when it comes, before that goes to the device.

    Raises:
        ValueError: the data do not suit the pair (the message names the site or column, the row, the value), or
            ``batch_size`` is no int of at least 1.
    """
    _check_size(batch_size)
    device = pair.device if device is None else device
    source, (least, most) = as_data(data, batch_size).to(device, pair.dtype), _arity(pair)
    if isinstance(source, Stream):
        source.width, source.check = most, partial(_check_batch, pair, least, None)
        source.check = partial(_check_batch, pair, least, inspect(pair, next(source.batches())))
        return source
    _check_count(len(source.columns), least)
    source = source.having(source.columns[:most])
    check_rows(pair, source.columns, "data column")
    with seeded(0, device):  # a transform may draw
        first = source.present(slice(0, batch_size))
    first_column = None if source.transform else _pixels(source.columns[0], source.dtype)
    check_supports(inspect(pair, first), (first_column, *source.columns[1:]))
    return source


def _arity(pair: Pair) -> tuple[int, int | None]:
    """How many tensors the model must and can take; None for any number."""
    model = pair.raw_model
    takes = signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()
    named = [p for p in takes if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is Parameter.empty for p in named)
    return least, None if any(p.kind is Parameter.VAR_POSITIONAL for p in takes) else len(named)


def _ranks_differ(items: list[Any]) -> bool:
    """Whether a list holds nothing but tensors and arrays that cannot all be batches of one column."""
    return all(isinstance(c, Tensor | np.ndarray) for c in items) and len({c.ndim for c in items}) > 1


def _check_size(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise ValueError(f"batch_size must be an int, got {size!r}")
    if int(size) < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")


def _check_batch(pair: Pair, least: int, layout: Layout | None, batch: Batch) -> None:
    """Raise ValueError unless a batch of a stream suits a pair; without its layout, supports are left out."""
    _check_count(len(batch), least)
    check_rows(pair, batch, "tensor")
    if layout is not None:
        check_supports(layout, batch)


def _check_count(count: int, least: int) -> None:
    if count < least:
        raise ValueError(
            f"data: the model takes {least} tensors, got {count}; give x and its conditions as a tuple of columns"
        )


def _pixels(first: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The first tensor of a batch as it is presented: bytes as x / 255."""
    return first.to(dtype or torch.get_default_dtype()) / 255.0 if first.dtype == torch.uint8 else first


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


def _as_tensor(column: Any, name: str) -> Tensor:
    if not isinstance(column, Tensor | np.ndarray):
        raise ValueError(f"{name}: expected a tensor or an array, got {type(column).__name__}")
    if isinstance(column, np.ndarray):
        column = np.require(column, requirements=["C", "W"])  # torch takes neither flipped nor read-only ones
    try:
        tensor = torch.as_tensor(column)
    except TypeError as error:
        raise ValueError(f"{name}: an array of {column.dtype} cannot become a tensor") from error
    return tensor.float() if tensor.dtype == torch.bool else tensor


def _placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """On a device; in a precision, if it is a floating-point tensor."""
    onto_gpu = torch.device(device).type == "cuda"  # only that way is an unfinished copy waited for
    return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=onto_gpu)


def _as_batch(item: Any) -> Batch:
    parts = item if isinstance(item, tuple | list) else (item,)
    if not parts:
        raise ValueError("data: a batch holds no tensors")
    return tuple(_as_tensor(part, f"batch item {i}") for i, part in enumerate(parts))
