"""Processes that work together, each on its part of the data: torch.distributed's, where it is initialised."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["RankError", "alone", "any_rank", "check_alike", "check_equal", "connected", "count_ranks"]
__all__ += ["first_bytes", "first_rank", "from_all", "from_first", "gathered", "joint_mean", "over_ranks"]
__all__ += ["own_count", "own_rank", "own_rows", "process_group", "share"]

# A process that ends is noticed when its connections close. This is for one that hangs, or whose machine is gone,
# and it must not come between processes of which one compiles its first step while the others wait.
TIMEOUT = timedelta(minutes=10)
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
APART = ContextVar("APART", default=False)
IDLE = ContextVar("IDLE", default=False)
STORE: ContextVar[Any] = ContextVar("STORE", default=None)
LOST = ("gloo", "Connection closed by peer", "pair closure", "NCCL")  # gloo's errors have no class of their own


class RankError(RuntimeError):
    """Processes cannot go on together: one of them has ended or hangs, or holds other numbers than the rest."""


class FirstFailedError(RankError):
    """The first process has failed and has said why."""


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the block lasts; alone, do nothing.

    They speak by gloo, and on GPUs by NCCL. On a machine with GPUs, each takes the one of its number there, which
    is what "cuda" means in the block. A group that there is already is left as it is.

    Args:
        device: where they compute; CUDA when present, the CPU otherwise.

    Raises:
        ValueError: a GPU by its number; more processes on a machine than it has GPUs.
        RankError: the others are not to be reached within ten minutes.

    >>> with process_group("cpu"):  # not started by torchrun
    ...     count_ranks()
    1
    """
    if not all(name in os.environ for name in LAUNCHED) or _initialised():
        yield
        return
    if not distributed.is_available():
        raise ValueError("torchrun: this build of torch has no torch.distributed; start one process without it")
    on_gpu = str(device or "cuda").startswith("cuda") and torch.cuda.is_available()
    with _own_gpu(device) if on_gpu else nullcontext():
        try:
            store, rank, count = next(distributed.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
            how: dict[str, Any] = {"rank": rank, "world_size": count, "timeout": TIMEOUT}
            how["store"] = distributed.PrefixStore(_life(store, rank, count), store)  # type: ignore[attr-defined]
            distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **how)
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            number = os.environ["RANK"]
            raise RankError(f"process {number} cannot reach the others at {where} ({error})") from error
        before = STORE.set(how["store"])
        try:
            yield
        finally:
            STORE.reset(before)
            distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """For what one process does without the others: in the block it is the only one there is."""
    before = APART.set(True)
    try:
        yield
    finally:
        APART.reset(before)


def count_ranks() -> int:
    """How many processes work together; 1 for one alone."""
    return distributed.get_world_size() if _together() else 1


def own_rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _together() else 0


def own_rows(size: int) -> slice:
    """Which of so many rows are this process's: as many as others have, or one more or fewer; perhaps none."""
    rank, ranks = own_rank(), count_ranks()
    return slice(size * rank // ranks, size * (rank + 1) // ranks)


def own_count(size: int) -> int:
    """How many of so many rows are this process's."""
    rows = own_rows(size)
    return int(rows.stop - rows.start)


@contextmanager
def idle() -> Iterator[None]:
    """For what one process computes only to keep in step: in the block it adds nothing to sums over all."""
    before = IDLE.set(True)
    try:
        yield
    finally:
        IDLE.reset(before)


def over_ranks(value: Tensor) -> Tensor:
    """The sum over the processes, without a gradient; it can be captured."""
    return _summed(torch.zeros_like(value) if IDLE.get() else value)


def _summed(value: Tensor) -> Tensor:
    if not _together():
        return value
    ops, group = torch.ops._c10d_functional, distributed.group.WORLD
    if group is None:
        raise RankError("there is no group of all processes")
    with connected():
        total = ops.wait_tensor(ops.all_reduce(_carried(value.detach()), "sum", group.group_name))
    return total.to(value.device)  # type: ignore[no-any-return]


def any_rank(flag: bool) -> bool:
    """Whether it is true of any of the processes."""
    return bool(over_ranks(torch.tensor([int(flag)])))


def first_rank(value: Tensor) -> Tensor:
    """What the first of the processes has, the same for all."""
    if not _together():
        return value
    return _summed(value if distributed.get_rank() == 0 else torch.zeros_like(value))


def gathered(value: Tensor) -> Tensor:
    """The rows of all processes, in their order; each may have another number of them.

    Args:
        value: (n, ...) of the process, of the same type and further sizes in all.
    """
    if not _together():
        return value
    # As bytes: gloo does not have all types.
    row = value.shape[1:]
    own = _carried(value.detach().contiguous()).view(len(value), math.prod(row)).view(torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(count_ranks())]
    with connected():
        distributed.all_gather(sizes, torch.tensor([len(own)], device=own.device))
        padded = own.new_zeros(max(int(size) for size in sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
    rows = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(value.device)
    return rows.view(-1).view(value.dtype).view(len(rows), *row)


def joint_mean(
    values: Sequence[Tensor | None], like: Sequence[Tensor], rows: int
) -> tuple[list[Tensor], Callable[[], list[bool]]]:
    """Means over the rows of all processes, from the means that each has over its own; all in one call.

    Args:
        values: means over this process's rows, None for zero; without rows they do not count.
        like: tensors of the same shapes, types and device, on all processes.
        rows: how many this process has.

    Returns:
        The means, and a function that tells of which any process had a value. It waits for the device.
    """
    dtype = reduce(torch.promote_types, (t.dtype for t in like), torch.float32)  # rows are counted in it, too
    device, there = like[0].device, [rows > 0 and value is not None for value in values]
    parts = [
        torch.zeros(t.numel(), dtype=dtype, device=device)
        if value is None or not rows
        else value.reshape(-1).to(dtype)
        for value, t in zip(values, like, strict=True)
    ]
    # Without waiting for the device, to which so few numbers are sent at once.
    about = torch.tensor([*map(float, there), 1.0], dtype=dtype).to(device, non_blocking=True)
    about[-1] *= rows
    flat = torch.cat([*parts, about])
    flat[: -len(about)] *= rows
    total = _carried(flat)
    with connected():
        distributed.all_reduce(total)
    total = total.to(device)
    means = total[: -len(about)].div_(total[-1])
    found = zip(torch.split(means, [t.numel() for t in like]), like, strict=True)
    return [mean.view(t.shape).to(t.dtype) for mean, t in found], lambda: (total[-len(about) : -1] > 0).tolist()


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes what the first has, in place and in one call.

    Args:
        tensors: on one device, of the same shapes and types on all processes.
    """
    # As bytes, the widest numbers first, so that each begins at a multiple of its width.
    ordered = sorted((t for t in tensors if t.numel()), key=lambda t: -t.dtype.itemsize)
    if not _together() or not ordered:
        return
    flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in ordered])
    flat = _broadcast(flat)
    for tensor, part in zip(ordered, torch.split(flat, [t.nbytes for t in ordered]), strict=True):
        tensor.copy_(part.view(tensor.dtype).view(tensor.shape))


def said_by_first(text: str) -> bool:
    """Whether the first process ends with the same message, of which it tells the others; called as one ends."""
    if (store := STORE.get()) is None:
        return False
    try:
        if own_rank() == 0:
            store.set("ends with", text)
            return False
        store.wait(["ends with"], timedelta(seconds=5))
        return bool(store.get("ends with").decode() == text)
    except RuntimeError:  # it has not ended, or has taken the store with it
        return False


def first_bytes(make: Callable[[], bytes]) -> bytes:
    """What a function gives the first process, which alone calls it.

    Raises:
        RankError: it raised an error there.
    """
    if not _together():
        return make()
    failed: Exception | None = None
    data, size = b"", -1
    if own_rank() == 0:
        try:
            data = make()
            size = len(data)
        except Exception as error:  # noqa: BLE001 - raised below; the others would wait for ever
            failed = error
    size = int(_broadcast(torch.tensor([size])))
    if failed is not None:
        raise failed
    if size < 0:
        raise FirstFailedError(f"process {own_rank()} ends because process 0 failed; see its message")
    sent = torch.frombuffer(bytearray(data or bytes(size)), dtype=torch.uint8) if size else torch.zeros(0)
    return bytes(_broadcast(sent).numpy().tobytes()) if size else b""


def from_first(make: Callable[[], Any]) -> Any:
    """What a function gives the first process, which alone calls it: plain values, as JSON has them.

    Raises:
        RankError: it raised an error there.
    """
    return json.loads(first_bytes(lambda: json.dumps(make()).encode())) if _together() else make()


def from_all(value: Any) -> list[Any]:
    """What each of the processes has, in their order: plain values, as JSON has them."""
    lines = gathered(torch.tensor([*json.dumps(value).encode(), ord("\n")], dtype=torch.uint8))
    return [json.loads(line) for line in bytes(lines.tolist()).splitlines()]


def check_alike(about: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first, where plain values are not what they are on the first process.

    Numbers are compared to six digits: processors of different kinds add up in different ways.
    """
    if not _together():
        return
    found = gathered(torch.tensor([[_digest(value) for value in about.values()]]))
    for number, name in enumerate(about):
        others = (found[:, number] != found[0, number]).nonzero().flatten().tolist()
        if others:
            raise ValueError(f"{name}: process {others[0]} was given another than process 0; give all the same")


@torch.no_grad()
def check_equal(tensors: Sequence[Tensor], when: str) -> None:
    """Raise RankError unless tensors have the same bits on all processes."""
    if not _together():
        return
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    views = (t.detach().reshape(-1).view(words[t.dtype.itemsize]) for t in tensors)
    sums = torch.stack([view.sum(dtype=torch.int64) * (2 * i + 1) for i, view in enumerate(views)])
    found = gathered(sums.sum(dtype=torch.int64).reshape(1)).tolist()
    others = [rank for rank, value in enumerate(found) if value != found[0]]
    if others:
        raise RankError(
            f"process {others[0]} holds other parameters than process 0 {when}: something changes them on one "
            "alone, such as a hook that is not called everywhere, or their processors are of different kinds"
        )


@contextmanager
def connected() -> Iterator[None]:
    """Say in plain words what it means when processes cannot speak to each other any more.

    Raises:
        RankError: one of them has ended, or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or any(word in str(error) for word in LOST)
        if isinstance(error, RankError) or not _together() or not lost:
            raise
        said = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]
        raise RankError(
            f"process {own_rank()} of {count_ranks()} has lost another, which has ended, as its own message says, "
            f"or hangs ({said}); start all of them again, with resume 'auto' from the last checkpoint"
        ) from error


def _life(store: Any, rank: int, count: int) -> str:
    """A name on which exactly the processes agree that live now.

    Torchrun's store outlasts the processes that it starts again, and what the dead left there, such as their
    addresses, must not be read. Its count of restarts does not tell lives apart, for it is each machine's own.
    So each process asks under a name that nobody had before, and the first answers until all have heard it.
    """
    store, own = distributed.PrefixStore("ppl_vae", store), uuid.uuid4().hex  # type: ignore[attr-defined]
    if rank:
        store.set(f"asks {rank}", own)
        life: str = store.get(f"answer {own}").decode()
        store.set(f"{life} heard by {rank}", "")
        return life
    waiting, end = set(range(1, count)), time.monotonic() + TIMEOUT.total_seconds()
    while waiting := {other for other in waiting if not store.check([f"{own} heard by {other}"])}:
        if time.monotonic() > end:
            raise RuntimeError(f"processes {sorted(waiting)} have not come")
        for other in waiting:
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", own)
        time.sleep(0.02)
    return own


def _own_gpu(device: torch.device | str | None) -> AbstractContextManager[object]:
    """The GPU of this process's number on its machine, as the current one."""
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    try:
        numbered = torch.device(device or "cuda").index is not None
    except RuntimeError as error:
        raise ValueError(f"device: there is no {str(device)!r}; give 'cuda' or 'cpu'") from error
    if numbered and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError(f"device: {str(device)!r} would be that of all processes; give 'cuda' for one each")
    if local >= there:
        raise ValueError(
            f"device: process {local} of this machine finds {there} GPUs; start no more than these, or give 'cpu'"
        )
    return torch.cuda.device(local)


def _broadcast(value: Tensor) -> Tensor:
    """What the first process has, of the same shape and type in all."""
    sent = _carried(value)
    with connected():
        distributed.broadcast(sent, 0)
    return sent.to(value.device)


def _carried(value: Tensor) -> Tensor:
    """A tensor where the group can take it: NCCL alone takes none of the CPU's."""
    return value.cuda() if distributed.get_backend() == "nccl" and not value.is_cuda else value


def _digest(value: Any) -> int:
    """Plain values as 63 bits."""
    plain = json.loads(json.dumps(value), parse_float=lambda text: f"{float(text):.6g}")
    return int.from_bytes(hashlib.sha256(json.dumps(plain).encode()).digest()[:8], "little") >> 1


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _together() -> bool:
    return _initialised() and not APART.get() and distributed.get_world_size() > 1
