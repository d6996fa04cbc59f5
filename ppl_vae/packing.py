"""A state of tensors and plain values as one file that is data alone: nothing in it is executed, in or out.

It is a safetensors file, with all that is no tensor as JSON in its header, and a checksum of everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.files import PathLike, brief, open_regular, parse_json, write_whole
from ppl_vae.limits import MEMORY, memory_limit

__all__ = ["DamagedError", "Entry", "pack", "read_entries", "read_tensors", "require_readable", "unpack"]

VERSION = 1
WHOSE = "ppl_vae"
DEEPEST = 100  # levels of a state
MOST_HEADER = 32 * 2**20  # bytes of all that is no tensor, and of the names and shapes of those
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 64
TYPES = {
    "BOOL": torch.bool,
    **{f"I{size}": getattr(torch, f"int{size}") for size in (8, 16, 32, 64)},
    **{f"U{size}": getattr(torch, f"uint{size}") for size in (8, 16, 32, 64)},
    **{f"F{size}": getattr(torch, f"float{size}") for size in (16, 32, 64)},
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class DamagedError(ValueError):
    """A file is not what was written: cut off, changed since, or of another program."""


class Entry(NamedTuple):
    """What a file says of a tensor in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Check = Callable[[Mapping[str, str], Mapping[str, Entry]], object]


def pack(path: PathLike, kind: str, state: Any) -> Path:
    """Write a state, whole or not at all.

    Args:
        path: the file.
        kind: what it is, such as "checkpoint"; asked for when it is read.
        state: tensors, numbers, strings and None, in dicts, lists and tuples to any depth.

    Raises:
        ValueError: something in it is of another type, and the message says where; it is more than `unpack` takes;
            the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_plain(state, kind, tensors), allow_nan=False)
    about = {"whose": WHOSE, "version": str(VERSION), "kind": kind, "state": plain}
    about["sha256"] = _checksum(kind, plain, tensors)
    header = _header_of(about, tensors)
    if len(tensors) > MOST_TENSORS or len(header) > MOST_HEADER:
        many = len(tensors) > MOST_TENSORS
        found = f"{len(tensors)} tensors" if many else f"{len(header)} bytes beside its tensors"
        raise ValueError(f"{kind}: {found} are more than a file is read back with; keep less in it")
    require_readable(kind, sum(value.nbytes for value in tensors.values()))
    return write_whole(path, lambda file: _write(file, header, tensors))


def require_readable(kind: str, size: int) -> None:
    """Raise ValueError if a file with so many bytes of tensors would be refused when it is read back."""
    if size > memory_limit():
        raise ValueError(
            f"{kind}: {size / 2**30:.1f} GiB of tensors are more than a file is read back with; "
            f"set {MEMORY} to more in the environment, now and whenever it is read"
        )


def _header_of(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """What a safetensors file begins with."""
    entries: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.nbytes
        entries[name] = {"dtype": NAMES[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Write a file from where tensors lie; safetensors copies them first, or chooses another name meanwhile."""
    with path.open("wb") as file:
        file.write(header)
        for value in tensors.values():
            file.write(_memory(value))


def unpack(path: PathLike, kind: str) -> Any:
    """Read what `pack` wrote, on the CPU.

    Raises:
        DamagedError: a file that is cut off, changed, of another program or another kind.
        ValueError: no such file, or one of a newer version.
    """
    path = Path(path)
    about, tensors = read_tensors(path, lambda about, _: _check_kind(path, about, kind))
    if about["sha256"] != _checksum(kind, about["state"], tensors):
        raise DamagedError(f"path: {path} is damaged: what it holds does not match its checksum")
    try:
        return json.loads(about["state"], object_hook=lambda value: _whole(value, tensors))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DamagedError(f"path: {path} is damaged ({type(error).__name__}: {error})") from error


def read_tensors(path: PathLike, check: Check) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file, on the CPU: what it says of itself, and its tensors by name.

    The header is read first, and each number in it checked against the others, against limits and against the size
    of the file; memory is taken only then, and as much as the tensors need. Nothing is mapped: a file that changes
    while it is read is a damaged one, and not the end of the process.

    Args:
        path: the file.
        check: called with what it says of itself and of its tensors before these are read; it may raise.

    Raises:
        DamagedError: a file that is cut off or no safetensors file.
        ValueError: no such file, or no regular one; a file that takes more memory than it may.
    """
    path = Path(path)
    with _reading(path) as file:
        about, entries = _header(file, path)
        check(about, entries)
        tensors = {name: _tensor(file, path, name, entry) for name, entry in entries.items()}
        if file.read(1):
            raise _Broken("more bytes than its header says")
    return about, tensors


def read_entries(path: PathLike) -> dict[str, Entry]:
    """What a safetensors file says of its tensors; only its header is read.

    Raises:
        DamagedError, ValueError: as for `read_tensors`.
    """
    with _reading(Path(path)) as file:
        return _header(file, Path(path))[1]


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """A file to read; what goes wrong is told as errors of this module."""
    try:
        with open_regular(path) as file:
            yield file
    except _Broken as error:
        raise DamagedError(f"path: {path} is damaged, or no safetensors file ({error})") from error
    except FileNotFoundError as error:
        raise ValueError(f"path: there is no file {brief(path)}") from error
    except OSError as error:
        raise ValueError(f"path: cannot read {brief(path)} ({error.strerror or error})") from error


class _Broken(Exception):  # noqa: N818 - it stays here
    """Why a file is no safetensors file."""


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """What a file says of itself and, in the order of their bytes, of its tensors."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER):
        raise _Broken(f"a header of {length} bytes in a file of {size}")
    try:
        held = parse_json(file.read(length))
    except ValueError as error:
        raise _Broken(f"its header is no JSON: {error}") from error
    if not isinstance(held, dict):
        raise _Broken("its header is no table")
    about = held.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _Broken("its header says something other than text of it")
    if len(held) > MOST_TENSORS:
        raise _Broken(f"{len(held)} tensors, more than {MOST_TENSORS}")
    found = sorted(((*_place(name, value), name) for name, value in held.items()), key=lambda each: each[:2])
    end = 0
    for start, stop, entry, name in found:
        if start != end or stop - start != entry.size:
            raise _Broken(f"{name[:60]!r} of {entry.size} bytes lies at {start} to {stop}, after {end}")
        end = stop
    if end != size - 8 - length:
        raise _Broken(f"tensors of {end} bytes, and {size - 8 - length} in the file")
    if end > memory_limit():
        more = f"{end / 2**30:.1f} GiB, more than may be read"
        raise ValueError(f"path: {path} holds {more}; if it is yours, set {MEMORY} in the environment")
    return about, {name: entry for _, _, entry, name in found}


def _place(name: str, value: Any) -> tuple[int, int, Entry]:
    """Where a tensor begins and ends, and what it is."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"{name[:60]!r} is no tensor")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise _Broken(f"{name[:60]!r} is of an unknown type")
    for numbers, most in ((shape, MOST_DIMENSIONS), (place, 2)):
        if not isinstance(numbers, list) or len(numbers) > most:
            raise _Broken(f"{name[:60]!r} has no shape and place")
        # All but empty dimensions multiplied, as the strides of an empty tensor are.
        if not all(type(n) is int and n >= 0 for n in numbers) or math.prod(n or 1 for n in numbers) >= 2**62:
            raise _Broken(f"{name[:60]!r} is too large")
    if len(place) != 2:
        raise _Broken(f"{name[:60]!r} has no place")
    return place[0], place[1], Entry(TYPES[dtype], tuple(shape))


def _tensor(file: BinaryIO, path: Path, name: str, entry: Entry) -> Tensor:
    """The next tensor of a file."""
    try:
        flat = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
    except (RuntimeError, MemoryError) as error:  # torch's allocator has the former
        needed = f"{name[:60]!r} takes {entry.size / 2**30:.1f} GiB, which this machine has not"
        raise ValueError(f"path: cannot read {path}: {needed}; free some memory, or read it elsewhere") from error
    raw = flat.view(torch.uint8)
    if raw.numel() and file.readinto(raw.numpy().data) != raw.numel():  # type: ignore[attr-defined]
        raise _Broken("it ends too early")
    if entry.dtype == torch.bool and bool((raw > 1).any()):
        raise _Broken(f"{name[:60]!r} is neither true nor false")
    return flat.reshape(entry.shape)


def _check_kind(path: Path, about: Mapping[str, str], kind: str) -> None:
    """Raise ValueError unless a file is what `pack` wrote, of this version and kind."""
    if about.get("whose") != WHOSE or not {"version", "kind", "state", "sha256"} <= about.keys():
        raise DamagedError(f"path: {path} is a safetensors file, but no {kind} of ppl_vae")
    if about["version"] != str(VERSION):
        raise ValueError(
            f"path: {path} is of version {about['version'][:60]!r}, this one reads {VERSION}; upgrade ppl-vae"
        )
    if about["kind"] != kind:
        raise DamagedError(f"path: {path} is a {about['kind'][:60]!r}, no {kind}")


def _plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has them; what JSON lacks is an object of one key. Tensors are put aside by name."""
    if where.count("/") > DEEPEST:
        raise ValueError(f"{where[:60]}...: it holds itself, or is nested more than {DEEPEST} deep")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.dtype not in NAMES or value.is_complex():
            kind = f"{value.layout} {value.dtype} on {value.device}"
            raise ValueError(f"{where}: a tensor of {kind} cannot be kept in a file; a plain one can")
        name = where
        while name in tensors:  # as keys 1 and "1" make it
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_plain(part, f"{where}/{i}", tensors) for i, part in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part, f"{where}/{i}", tensors) for i, part in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, _plain(part, f"{where}/{key}", tensors)] for key, part in value.items()]}
    raise ValueError(f"{where}: a {type(value).__name__} cannot be kept in a file; plain values and tensors can")


def _whole(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What `_plain` made an object of, the parts of which are whole already."""
    ((what, held),) = value.items()
    if what == "tensor":
        return tensors[held]
    if what == "number" and held in ("nan", "inf", "-inf"):
        return float(held)
    if what == "tuple" and isinstance(held, list):
        return tuple(held)
    if what == "dict" and all(type(key) in (int, str) for key, _ in held):
        return dict(held)
    raise ValueError(f"unknown {what[:60]!r}")


def _checksum(kind: str, plain: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything."""
    total = hashlib.sha256()
    for part in _bytes(kind, plain, tensors):
        total.update(part)
    return total.hexdigest()


def _bytes(kind: str, plain: str, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    yield json.dumps([VERSION, kind, plain]).encode()
    for name in sorted(tensors):
        value = tensors[name]
        yield json.dumps([name, str(value.dtype), list(value.shape)]).encode()
        yield _memory(value)


def _memory(value: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    found: memoryview = value.reshape(-1).view(torch.uint8).numpy().data
    return found
