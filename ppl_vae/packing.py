"""A state of tensors and plain values as one file that is data alone: nothing in it is executed, in or out.

It is a safetensors file, with all that is no tensor as JSON in its header, and a checksum of everything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppl_vae.files import PathLike, write_whole

__all__ = ["DamagedError", "pack", "unpack"]

VERSION = 1
WHOSE = "ppl_vae"
DEEPEST = 100  # levels of a state


class DamagedError(ValueError):
    """A file is not what was written: cut off, changed since, or of another program."""


def pack(path: PathLike, kind: str, state: Any) -> Path:
    """Write a state, whole or not at all.

    Args:
        path: the file.
        kind: what it is, such as "checkpoint"; asked for when it is read.
        state: tensors, numbers, strings and None, in dicts, lists and tuples to any depth.

    Raises:
        ValueError: something in it is of another type, and the message says where; the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_plain(state, kind, tensors), allow_nan=False)
    about = {"whose": WHOSE, "version": str(VERSION), "kind": kind, "state": plain}
    packed = save(tensors, about | {"sha256": _checksum(kind, plain, tensors)})
    return write_whole(path, lambda file: file.write_bytes(packed))


def unpack(path: PathLike, kind: str) -> Any:
    """Read what `pack` wrote, on the CPU.

    Raises:
        DamagedError: a file that is cut off, changed, of another program or another kind.
        ValueError: no such file, or one of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"path: {path} is damaged, or no safetensors file ({error})") from error
    if about.get("whose") != WHOSE or not {"version", "kind", "state", "sha256"} <= about.keys():
        raise DamagedError(f"path: {path} is a safetensors file, but no {kind} of ppl_vae")
    if about["version"] != str(VERSION):
        raise ValueError(
            f"path: {path} is of version {about['version']!r}, this one reads {VERSION}; upgrade ppl-vae"
        )
    if about["kind"] != kind:
        raise DamagedError(f"path: {path} is a {about['kind']}, no {kind}")
    if about["sha256"] != _checksum(kind, about["state"], tensors):
        raise DamagedError(f"path: {path} is damaged: what it holds does not match its checksum")
    try:
        return _whole(json.loads(about["state"]), tensors)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DamagedError(f"path: {path} is damaged ({type(error).__name__}: {error})") from error


def _plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has them; what JSON lacks is an object of one key. Tensors are put aside by name."""
    if where.count("/") > DEEPEST:
        raise ValueError(f"{where[:60]}...: it holds itself, or is nested more than {DEEPEST} deep")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = f"{value.layout} {value.dtype} on {value.device}"
            raise ValueError(f"{where}: a tensor of {kind} cannot be kept in a file; a plain one can")
        name = where
        while name in tensors:  # as keys 1 and "1" make it
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
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


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_plain` was given."""
    if isinstance(value, list):
        return [_whole(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((what, held),) = value.items()
    if what == "tensor":
        return tensors[held]
    if what == "number":
        return float(held)
    if what == "tuple":
        return tuple(_whole(part, tensors) for part in held)
    if what == "dict":
        return {key: _whole(part, tensors) for key, part in held}
    raise ValueError(f"unknown {what!r}")


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
        yield value.reshape(-1).view(torch.uint8).numpy().data
