"""What judges find of data, batch by batch: of several processes each judges rows of its own, and all have all.

Every process goes through the same batches, so that redrawn pixels do not depend on how many there are. It judges
what is its own of them, and results are exchanged at the end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ppl_vae.batches import Data, Source, prepare
from ppl_vae.capture import Engine
from ppl_vae.pairs import Batch, Pair
from ppl_vae.ranks import RankError, check_alike, connected, count_ranks, from_all, gathered, own_rank, own_rows
from ppl_vae.rng import derived, seeded

__all__ = ["Batches", "in_batches", "prepared", "presented"]

Found = Mapping[Any, Tensor]
Judge = Callable[[int, Batch], Found]

# Annealing takes hours, and of processes that are not equally fast the last may end long after the first. One that
# dies is noticed at once all the same: its connections close.
PATIENCE = timedelta(days=1)


class Batches:
    """All data in batches, in their order; iterating gives (number of the first row, batch), once.

    Args:
        pair: whose data they are.
        parts: (number of the first row, batch); the same in all processes.
        rows: how many data there are; None where a stream decides.
    """

    def __init__(self, pair: Pair, parts: Iterable[tuple[int, Batch]], rows: int | None) -> None:
        self.pair, self.parts, self.rows = pair, parts, rows

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return iter(self.parts)

    def collect(self, judge: Judge, engine: Engine | None = None) -> dict[Any, Tensor]:
        """What a judge finds of all data: name -> (N, ...), in their order, on the CPU.

        Several processes must all call it, and all get the same. Each judges as many rows, one after the other of
        data in memory, or of each batch of a stream. The first draws from the stream at hand, and each of the
        others from one of its own, derived from that one's seed and the rank; the stream at hand is then where it
        was.

        Args:
            judge: (number of the first row, a batch or some rows of it) -> name -> a row for each datum.
            engine: how it runs: all processes describe it by what the first did.

        Raises:
            ValueError: what the judge refuses, on all processes though it was in one; data or parameters that are
                not the same in all.
            RankError: something else went wrong in another process, or it has ended.
        """
        if count_ranks() == 1:
            parts = [judge(first, batch) for first, batch in self]
            return {name: column.cpu() for name, column in _joined(parts).items()}
        check_alike({"parameters": _size([*self.pair.parameters(), *self.pair.buffers()])})
        return self._shared(judge, engine)

    def _shared(self, judge: Judge, engine: Engine | None) -> dict[Any, Tensor]:
        device, rank = self.pair.device, own_rank()
        rows, found, seen, failure = [torch.zeros(0, dtype=torch.int64)], list[Found](), _Seen(), None
        with connected():
            patient: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
        try:
            with seeded(derived(torch.initial_seed(), "rank", rank) if rank else None, device):
                for first, batch in self:
                    seen.add(batch)
                    own = self._own(first, len(batch[0]))
                    if own.start < own.stop:
                        found.append(judge(first + own.start, _cut(batch, own)))
                        rows.append(torch.arange(first + own.start, first + own.stop))
                if not found:  # another's row tells what there is to give none of
                    one = judge(first, _cut(batch, slice(0, 1)))
                    found.append({name: column[:0] for name, column in one.items()})
        except Exception as error:  # noqa: BLE001 - raised once the others know of it: they wait
            failure = error
        with connected():
            distributed.barrier(patient)
            distributed.destroy_process_group(patient)
        _agree(failure, engine)
        check_alike({"data (all of them, in every process)": [seen.rows, float(seen.total)]})
        order = gathered(torch.cat(rows)).argsort()
        return {name: gathered(column).cpu()[order] for name, column in _joined(found).items()}

    def _own(self, first: int, size: int) -> slice:
        """Which rows of a batch this process judges; perhaps none."""
        if self.rows is None:
            return own_rows(size)
        own = own_rows(self.rows)
        return slice(max(own.start - first, 0), min(own.stop - first, size))


class _Seen:
    """A glance at data: how many, and a sum that depends on their order."""

    def __init__(self) -> None:
        self.rows, self.total = 0, torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Take a batch into account; nothing is read back from its device."""
        size = len(batch[0])
        places = torch.arange(self.rows + 1, self.rows + size + 1, device=batch[0].device)
        for column in batch:
            each = column.detach().double().abs().nan_to_num().reshape(size, -1).sum(1)
            self.total = self.total.to(each.device) + (places * each).sum()
        self.rows += size


def in_batches(pair: Pair, columns: Batch, size: int) -> Batches:
    """Columns as they are, each with N rows, so many at a time."""
    rows = len(columns[0])
    parts = ((first, tuple(c[first : first + size] for c in columns)) for first in range(0, rows, size))
    return Batches(pair, parts, rows)


def presented(pair: Pair, data: Any, batch_size: int, seed: int) -> Batches:
    """Data checked, in order.

    Each batch is presented under a seed of its own, so that redrawn pixels depend on ``seed`` and
    ``batch_size`` alone: whatever is drawn between batches, all estimates judge the same pixels.
    """
    return prepared(pair, prepare(pair, data, batch_size), batch_size, seed)


def prepared(pair: Pair, source: Source, batch_size: int, seed: int) -> Batches:
    """The same of data that `prepare` has checked."""
    rows = len(source) if isinstance(source, Data) else None
    return Batches(pair, _presented(pair, source, batch_size, seed), rows)


def _presented(pair: Pair, source: Source, batch_size: int, seed: int) -> Iterator[tuple[int, Batch]]:
    batches, row, number = source.batches(batch_size), 0, 0
    while True:
        with seeded(derived(seed, number), pair.device):
            batch = next(batches, None)
        if batch is None:
            return
        yield row, batch
        row, number = row + len(batch[0]), number + 1


def _cut(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, laid out as a batch of their own."""
    return batch if rows == slice(0, len(batch[0])) else tuple(column[rows].clone() for column in batch)


def _joined(parts: list[Found]) -> dict[Any, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _size(tensors: Iterable[Tensor]) -> float:
    """Sum of absolute values, of which NaN counts none."""
    return float(sum(float(t.detach().double().abs().nan_to_num().sum()) for t in tensors))


def _agree(failure: Exception | None, engine: Engine | None) -> None:
    """Raise what one process has come upon in all of them; else describe all engines by the first."""
    refused = isinstance(failure, ValueError)
    text = None if failure is None else str(failure) if refused else f"{type(failure).__name__}: {failure}"
    ranks = from_all([text, refused, "" if engine is None else engine.describe()])
    if failure is not None:
        raise failure
    for rank, (text, refused, _) in enumerate(ranks):
        if text is not None:
            raise ValueError(text) if refused else RankError(f"process {rank} failed: {text}")
    if engine is not None:
        engine.notes[:] = [ranks[0][2]]
