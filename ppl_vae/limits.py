"""How much memory a file of somebody else may take, asked before it is taken."""

from __future__ import annotations

import math
import os
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["MEMORY", "BeyondError", "Bounded", "memory_limit"]

MEMORY = "PPL_VAE_READ_GIB"  # the environment variable that moves the limit
GIB = 8.0  # the limit without it


def memory_limit() -> int:
    """How many bytes the contents of one file, or of one folder of pictures, may take.

    8 GiB, or as many as the environment variable PPL_VAE_READ_GIB says.

    Raises:
        ValueError: the variable is no positive number.
    """
    text = os.environ.get(MEMORY)
    try:
        most = GIB if text is None else float(text)
    except ValueError:
        most = math.nan
    if not 0 < most < math.inf:
        raise ValueError(f"{MEMORY} must be a positive number of GiB, got {text!r}")
    return int(most * 2**30)


class BeyondError(ValueError):
    """Torch was asked for more than a block may take."""


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which torch holds so many bytes at once, in so many tensors in all; it raises an error first.

    What counts is every new tensor, the passing ones too for as long as they are there, and neither views nor what
    is done in place.

    Args:
        size: bytes of the tensors that there are at one time.
        tensors: how many are made.

    >>> import torch
    >>> with Bounded(size=400, tensors=100):
    ...     print(sum(torch.zeros(9, 9).sum() for _ in range(5)))
    tensor(0.)
    >>> with Bounded(size=400, tensors=100):
    ...     torch.zeros(10**9, 10**9)
    Traceback (most recent call last):
    ppl_vae.limits.BeyondError: it takes more than 400 bytes
    """

    def __init__(self, size: int, tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.tensors = size, tensors
        self.taken, self.count = 0, 0
        self.held: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation of torch, if what it returns is within the bounds."""
        kwargs = kwargs or {}
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return func(*args, **kwargs)
        self._check(sum(value.nbytes for value in _tensors(_shapes(func, args, kwargs))))
        found = func(*args, **kwargs)
        made = _tensors(found)
        # A tensor may be gone while what it holds is a parameter's.
        for value in made:
            self.held.append((StorageWeakRef(value.untyped_storage()), value.nbytes))  # type: ignore[no-untyped-call]
        self.taken += sum(value.nbytes for value in made)
        self.count += len(made)
        self._check(0)
        return found

    def _check(self, more: int) -> None:
        """Raise BeyondError unless there is room for so many bytes more."""
        if self.taken + more > self.size:  # some may be gone since
            self.held = [held for held in self.held if not held[0].expired()]  # type: ignore[no-untyped-call]
            self.taken = sum(size for _, size in self.held)
            if self.taken + more > self.size:
                raise BeyondError(f"it takes more than {self.size} bytes")
        if self.count > self.tensors:
            raise BeyondError(f"it makes more than {self.tensors} tensors")


def _tensors(found: Any) -> list[Tensor]:
    return [value for value in tree_leaves(found) if isinstance(value, Tensor)]


def _shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation would return, without numbers."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {name: value for name, value in kwargs.items() if name != "generator"} | {"device": "meta"}
    args, kwargs = tree_map(lambda part: part.to("meta") if isinstance(part, Tensor) else part, (args, kwargs))
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # it needs the numbers, or is refused by torch itself
        return None
