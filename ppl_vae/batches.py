"""Data as batches: columns in memory, gathered by rows where they lie, and other forms of data as streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from ppl_vae.layout import Layout, check_rows, check_supports, inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.ranks import count_ranks, own_count, own_rows
from ppl_vae.rng import seeded
from ppl_vae.streams import Stream, as_pixels, as_tensor, delivered, epoch_seed, placed

__all__ = ["Data", "Source", "Stream", "arity", "as_data", "fits", "prepare"]


class Data:
    """Columns of equal length held in memory, such as images x (N, D) and labels y (N,).

    Args:
        *columns: tensors or arrays with the same first dimension N. Where a pair takes them, floating-point
            columns get the precision of its parameters. A first column of uint8 holds pixels, kept small in
            memory and presented as x / 255; bool becomes 0 and 1.
        transform: applied to the first column of each batch whenever it is presented, for instance
            `ppl_vae.redraw`, which draws binary pixels anew. It runs on the device that batches go to, inside
            the training step, and so must not read numbers back from there.

    Attributes:
        device: where batches are presented.
        resident: whether the columns lie there too; others are gathered where they lie, and copied.

    Raises:
        ValueError: no columns, no rows, or columns of different lengths.

    >>> data = Data(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> len(data), data.steps(2), [len(x) for x, y in data.batches(2)]
    (3, 2, [2, 1])
    """

    def __init__(self, *columns: Any, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        if not columns:
            raise ValueError("Data: at least one column is needed")
        self.columns = tuple(as_tensor(c, f"column {i}") for i, c in enumerate(columns))
        self.transform = transform
        self.dtype: torch.dtype | None = None  # of the pair that takes them
        self.device: torch.device | str = self.columns[0].device
        self.resident = True
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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, *, resident: bool = True) -> Data:
        """The same data for a device and in a floating precision; what is so already is not copied.

        Args:
            device: where batches are presented.
            dtype: of floating-point columns; by default as they are.
            resident: move the columns there. Otherwise they stay, and batches of them are copied ahead of use.
        """
        data = self.having(placed(c, device if resident else c.device, dtype) for c in self.columns)
        data.dtype, data.device, data.resident = dtype or self.dtype, device, resident
        return data

    def having(self, columns: Iterable[Tensor]) -> Data:
        """Other columns, presented in the same way."""
        data = Data(*columns, transform=self.transform)
        data.dtype, data.device, data.resident = self.dtype, self.device, self.resident
        return data

    def presented(self, columns: Batch, rows: slice | Tensor) -> Batch:
        """A batch of some rows as the model sees it: a pure function of columns, rows and random draws.

        Args:
            columns: the data's own, or others in their place, as in a captured graph that takes them as inputs.
            rows: which, as a slice or as indices (B,), on the columns' device.
        """
        return self._shown(_gathered(columns, rows))

    def present(self, rows: slice | Tensor) -> Batch:
        """A batch of some rows as the model sees it, transformed, on the device."""
        return self._shown(tuple(placed(c, self.device) for c in _gathered(self.columns, rows)))

    def steps(self, size: int) -> int:
        """How many batches of ``size`` there are, the last of which may be shorter."""
        return -(-len(self) // size)

    def rows(self, size: int, seed: int, epoch: int) -> Iterator[Tensor]:
        """The row indices of each batch of an epoch, int64 (size,) or fewer, on the columns' device.

        All rows shuffled: the order depends on the seed and the epoch's number alone, not on the device. Each of
        several processes gets its part of each batch; where that is empty, a row of another, to keep in step.
        """
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        batches = torch.split(placed(order, self.columns[0].device), size)
        if count_ranks() == 1:
            return iter(batches)
        return (rows[own_rows(len(rows)) if own_count(len(rows)) else slice(1)] for rows in batches)

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows in their own order in batches of ``size``; the last may be shorter."""
        return self._batches(slice(start, start + size) for start in range(0, len(self), size))

    def own_slices(self, size: int) -> Iterator[slice]:
        """Which rows of each of the `batches` are this process's; where there are none, nothing."""
        for start in range(0, len(self), size):
            own = own_rows(min(size, len(self) - start))
            if own.start < own.stop:
                yield slice(start + own.start, start + own.stop)

    def own_batches(self, size: int) -> Iterator[Batch]:
        """This process's part of each of the `batches`."""
        return self._batches(self.own_slices(size))

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """All rows shuffled, in the order of `rows`; of several processes, each gets its part."""
        return self._batches(self.rows(size, seed, epoch))

    def _batches(self, parts: Iterator[slice | Tensor] | Iterator[Tensor]) -> Iterator[Batch]:
        if self.resident:
            return map(self.present, parts)
        jobs = (partial(_gathered, self.columns, rows) for rows in parts)
        return (self._shown(batch) for batch in delivered(jobs, self.device))

    def _shown(self, batch: Batch) -> Batch:
        first = as_pixels(batch[0], self.dtype)
        return (first if self.transform is None else self.transform(first), *batch[1:])


Source = Data | Stream

_CHUNK = 2**24  # entries that are checked at once


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
        order = torch.Generator()
        shuffled = _Parts(RandomSampler(data, generator=order), batch_size)  # type: ignore[arg-type]
        return Stream(
            DataLoader(data, batch_size=batch_size),
            shuffled=DataLoader(data, batch_sampler=shuffled, generator=order),
            own=DataLoader(data, batch_sampler=_Parts(SequentialSampler(data), batch_size)),  # type: ignore[arg-type]
        )
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return Stream(data)
    raise ValueError(
        "data: expected a tensor, an array, a tuple of them, a torch Dataset or an iterable of batches, "
        f"got {type(data).__name__}"
    )


class _Parts(Sampler[list[int]]):
    """This process's part of each batch of the rows that a sampler gives; where that is empty, nothing."""

    def __init__(self, rows: Sampler[int], size: int) -> None:
        self.batches, self.size = BatchSampler(rows, size, drop_last=False), size

    def __iter__(self) -> Iterator[list[int]]:
        return filter(None, (batch[own_rows(len(batch))] for batch in self.batches))

    def __len__(self) -> int:
        full, rest = divmod(len(self.batches.sampler), self.size)  # type: ignore[arg-type]
        return full * bool(own_count(self.size)) + bool(own_count(rest))


def prepare(pair: Pair, data: Any, batch_size: int = 128, device: torch.device | str | None = None) -> Source:
    """Data for a pair: for its device, with no more columns than the model takes, checked before any use.

    Columns beyond the model's arguments (labels, say) are left out. Everything in memory is checked now, for
    NaN and for values outside what the likelihood and the transform are defined on, and moved to the device if
    it `fits`; else it stays where it is, and batches are copied ahead of their use. A stream is checked on its
    first batch now, and on every batch when it comes, before that goes to the device.

    Raises:
        ValueError: the data do not suit the pair (the message names the site or column, the row, the value), or
            ``batch_size`` is no int of at least 1.
    """
    _check_size(batch_size)
    device = pair.device if device is None else device
    source, (least, most) = as_data(data, batch_size), arity(pair)
    if isinstance(source, Stream):
        source = source.to(device, pair.dtype)
        source.width, source.check = most, partial(_check_batch, pair, least, None)
        first = next(source.to("cpu").batches())  # it alone, and not what would follow onto a GPU
        layout = inspect(pair, tuple(placed(c, device) for c in first))
        source.check = partial(_check_batch, pair, least, layout)
        return source
    _check_count(len(source.columns), least)
    source = source.having(source.columns[:most])
    source = source.to(device, pair.dtype, resident=fits(_bytes(source.columns, pair.dtype), device))
    check_rows(pair, source.columns, "data column")
    _check_levels(source)
    with seeded(0, device):  # a transform may draw
        layout = inspect(pair, source.present(slice(0, batch_size)))
    _check_supports(layout, source)
    return source


def fits(size: int, device: torch.device | str) -> bool:
    """Whether columns of ``size`` bytes may lie on a device: on CUDA half of what is free, else any."""
    if torch.device(device).type != "cuda":
        return True
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, not in use
    return 2 * size <= torch.cuda.mem_get_info(device)[0] + cached


def _bytes(columns: Batch, dtype: torch.dtype) -> int:
    """What columns would take on a GPU in the precision of a pair, less those that lie on one already."""
    sizes = (c.numel() * (dtype if c.is_floating_point() else c.dtype).itemsize for c in columns if not c.is_cuda)
    return sum(sizes)


def _gathered(columns: Batch, rows: slice | Tensor) -> Batch:
    """Some rows of each column."""
    if isinstance(rows, slice):
        return tuple(c[rows] for c in columns)
    return tuple(c.index_select(0, rows) for c in columns)  # on bytes eight times as fast as c[rows]


def _check_levels(data: Data) -> None:
    """Raise ValueError if the first column has entries that the transform, such as `ppl_vae.redraw`, refuses."""
    support, first = getattr(data.transform, "support", None), data.columns[0]
    if support is None or first.dtype == torch.uint8:
        return
    wrong = ~support.check(first).reshape(len(first), -1)
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        value = float(first[row].flatten()[wrong[row]][0])
        raise ValueError(
            f"data column 0: {data.transform!r} takes {support}, got {value:g} in row {row}; rescale the data"
        )


def _check_supports(layout: Layout, data: Data) -> None:
    """Raise ValueError if a column has entries outside its site's support, part by part to save memory.

    What a transform makes of the first column is not known, and left out.
    """
    size = max(1, len(data) * _CHUNK // max(1, sum(c.numel() for c in data.columns)))
    for start in range(0, len(data), size):
        first, *rest = (c[start : start + size] for c in data.columns)
        try:
            check_supports(layout, (None if data.transform else as_pixels(first, data.dtype), *rest))
        except ValueError as error:
            if start == 0:
                raise
            raise ValueError(f"data from row {start} on: {error}") from error


def arity(pair: Pair) -> tuple[int, int | None]:
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
