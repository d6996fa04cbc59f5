"""Streams: batches made elsewhere, converted and checked as they come, brought to a device ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from ppl_vae.pairs import Batch

__all__ = ["Stream", "as_pixels", "as_tensor", "delivered", "epoch_seed", "placed", "prefetched"]

Job: TypeAlias = Callable[[], Batch]


class Stream:
    """Batches from an iterable: a DataLoader, a list of batches, anything that can be iterated again.

    The iterable is run where the batches are used, one batch after the other; onto a CUDA device it runs two
    batches ahead, and each is checked, pinned and copied in a thread meanwhile. Batches that take long to make
    are best made by a DataLoader with ``num_workers``.

    Args:
        source: the iterable; each item is a tensor, an array, or a tuple or list of them, treated as columns of
            `ppl_vae.Data` are.
        shuffled: another order of the same data, for training; by default the source itself.
        own: what of the source is this process's, of several; by default all of it.
        device: where batches are moved as they come.

    Raises:
        ValueError: an iterator, which could serve one epoch only.
    """

    def __init__(
        self,
        source: Iterable[Any],
        shuffled: DataLoader[Any] | None = None,
        device: torch.device | str = "cpu",
        *,
        own: DataLoader[Any] | None = None,
    ) -> None:
        if isinstance(source, Iterator):
            raise ValueError(
                "data: an iterator is used up after one epoch; give something that can be iterated again "
                "(a DataLoader, a list, or an object whose __iter__ starts anew)"
            )
        self.source, self.shuffled, self.device, self.own = source, shuffled, device, own
        self.dtype: torch.dtype | None = None
        self.width: int | None = None  # how many of a batch's tensors to pass on
        self.check: Callable[[Batch], None] | None = None  # refuses a batch, before it goes to the device

    def __repr__(self) -> str:
        return f"Stream({type(self.source).__name__})"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Stream:
        """The same stream, its batches moved to a device and a floating precision as they come."""
        stream = Stream(self.source, self.shuffled, device, own=self.own)
        stream.dtype, stream.width, stream.check = dtype or self.dtype, self.width, self.check
        return stream

    @property
    def whole(self) -> bool:
        """Whether it is a DataLoader that gives each of several processes all data of its Dataset."""
        loader = self.source
        return (
            self.own is None
            and isinstance(loader, DataLoader)
            and type(loader.sampler) in (RandomSampler, SequentialSampler)
            and type(loader.batch_sampler) in (BatchSampler, type(None))
            and not isinstance(loader.dataset, IterableDataset)
        )

    def steps(self, size: int | None = None) -> int | None:
        """How many batches an epoch has, by the length of its source; None where that has none."""
        source = self.source if self.shuffled is None else self.shuffled
        try:
            return len(source)  # type: ignore[arg-type]
        except TypeError:  # also from a DataLoader, when its IterableDataset has no length
            return None

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """One pass over the source, in its own order and batch size."""
        return self._read(self.source, "data")

    def own_batches(self, size: int | None = None) -> Iterator[Batch]:
        """This process's part of the `batches`: of a Dataset some rows of each, else what the source gives it."""
        return self._read(self.source if self.own is None else self.own, "data")

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One pass for training; a Dataset's order depends on the seed and the epoch's number alone.

        Of several processes, each gets its part of a Dataset's batches. Any other source gives each its own: a
        DataLoader by a DistributedSampler, which is told the number of the epoch, an IterableDataset by itself.
        """
        if self.shuffled is None:
            for sampler in (getattr(self.source, name, None) for name in ("sampler", "batch_sampler")):
                if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                    set_epoch(epoch)
            return self._read(self.source, "data")
        if self.shuffled.generator is not None:
            self.shuffled.generator.manual_seed(epoch_seed(seed, epoch))
        return self._read(self.shuffled, "shuffled data")

    def _read(self, source: Iterable[Any], name: str) -> Iterator[Batch]:
        for first, *rest in delivered(self._jobs(source, name), self.device):
            yield (as_pixels(first, self.dtype), *rest)

    def _jobs(self, source: Iterable[Any], name: str) -> Iterator[Job]:
        empty = True
        for number, item in enumerate(source):
            empty = False
            yield partial(self._checked, item, f"{name} batch {number}")
        if empty and source is not self.own:  # so few data may be those of other processes
            raise ValueError("data: the iterable gave no batch; at least one is needed")

    def _checked(self, item: Any, name: str) -> Batch:
        """An item as tensors in their precision, still where they were made; refused if it does not suit."""
        batch = tuple(placed(t, t.device, self.dtype) for t in _as_batch(item)[: self.width])
        if self.check is not None:
            try:
                self.check((as_pixels(batch[0], self.dtype), *batch[1:]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return batch


def delivered(jobs: Iterator[Job], device: torch.device | str) -> Iterator[Batch]:
    """The batches that jobs make, on a device, in order: one by one, or ahead of their use where that is CUDA.

    Args:
        jobs: functions that make a batch each. They themselves are always asked for in the caller's thread.
        device: where the batches go.
    """
    if torch.device(device).type == "cuda":
        return prefetched(jobs, device)
    return (tuple(placed(t, device) for t in job()) for job in jobs)


def prefetched(jobs: Iterator[Job], device: torch.device | str, depth: int = 2) -> Iterator[Batch]:
    """The batches that jobs make, on a device, in order; ``depth`` of them are under way beyond the one in use.

    A thread runs the jobs, pins what they make and copies it on a CUDA stream of its own, while the caller
    computes. What a job raises is raised here, when its turn comes; the thread ends when the iterator does,
    by exhaustion, an error, or being closed. The jobs are *drawn* in the caller's thread: what a user's iterable
    draws from torch's default generator, which all threads share, keeps its order, and loaders start their
    workers from there.

    Args:
        jobs: functions that make a batch each; they must draw no random numbers.
        device: where the batches go.
        depth: how many to be ahead.
    """
    bring = _Courier(torch.device(device))
    worker = ThreadPoolExecutor(1, thread_name_prefix="ppl_vae prefetch")
    waiting: deque[Future[_Arrival]] = deque()
    try:
        for job in jobs:
            waiting.append(worker.submit(bring, job))
            if len(waiting) > depth:
                yield bring.received(waiting.popleft().result())
        while waiting:
            yield bring.received(waiting.popleft().result())
    finally:
        worker.shutdown(wait=True, cancel_futures=True)


_Arrival: TypeAlias = tuple[Batch, torch.cuda.Event | None]


class _Courier:
    """Brings batches to a device in one thread and hands them over in another; pinning is for CUDA alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lane = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, job: Job) -> _Arrival:
        """Make a batch and start its copy; in the prefetching thread."""
        batch = job()
        if self.lane is None:
            return tuple(placed(t, self.device) for t in batch), None
        if any(t.is_cuda for t in batch):  # made or cast on the thread's own stream
            self.lane.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.lane):
            pinned = (t.pin_memory() if t.device.type == "cpu" else t for t in batch)
            moved = tuple(placed(t, self.device) for t in pinned)
            return moved, self.lane.record_event()

    def received(self, arrival: _Arrival) -> Batch:
        """The batch, for the caller's CUDA stream: kernels wait for the copy, the caller does not."""
        batch, copied = arrival
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(stream)  # else its memory could be given out again while kernels read it
        return batch


def as_pixels(first: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The first tensor of a batch as it is presented: bytes as x / 255."""
    return first.to(dtype or torch.get_default_dtype()) / 255.0 if first.dtype == torch.uint8 else first


def as_tensor(column: Any, name: str) -> Tensor:
    """A column or a batch's part as a tensor; bool becomes 0 and 1.

    Raises:
        ValueError: neither tensor nor array, or an array that torch has no type for.
    """
    if not isinstance(column, Tensor | np.ndarray):
        raise ValueError(f"{name}: expected a tensor or an array, got {type(column).__name__}")
    if isinstance(column, np.ndarray):
        column = np.require(column, requirements=["C", "W"])  # torch takes neither flipped nor read-only ones
    try:
        tensor = torch.as_tensor(column)
    except TypeError as error:
        raise ValueError(f"{name}: an array of {column.dtype} cannot become a tensor") from error
    return tensor.float() if tensor.dtype == torch.bool else tensor


def placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """On a device; in a precision, if it is a floating-point tensor."""
    onto_gpu = torch.device(device).type == "cuda"  # only that way is an unfinished copy waited for
    return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=onto_gpu)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's order, from the run's seed and the epoch's number alone."""
    return (seed * 1_000_003 + epoch) % 2**63


def _as_batch(item: Any) -> Batch:
    parts = item if isinstance(item, tuple | list) else (item,)
    if not parts:
        raise ValueError("data: a batch holds no tensors")
    return tuple(as_tensor(part, f"batch item {i}") for i, part in enumerate(parts))
