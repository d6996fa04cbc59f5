"""How much memory a file of somebody else may take, asked before it is taken."""

from __future__ import annotations

import math
import os
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["MEMORY", "Bounded", "memory_limit"]

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


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which torch makes so many numbers, in so many tensors, and no more; it raises ValueError first.

    What counts is every new tensor, the passing ones too, and neither views nor what is done in place.

    Args:
        numbers: in all tensors together.
        tensors: how many.

    >>> import torch
    >>> with Bounded(numbers=100, tensors=10):
    ...     print(torch.zeros(9, 9).sum())
    tensor(0.)
    >>> with Bounded(numbers=100, tensors=10):
    ...     torch.zeros(10**9, 10**9)
    Traceback (most recent call last):
    ValueError: it asks for more than 100 numbers
    """

    def __init__(self, numbers: int, tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.tensors = numbers, tensors
        self.made, self.count = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation of torch, if what it returns is within the bounds."""
        kwargs = kwargs or {}
        if all(returned.alias_info is None for returned in func._schema.returns):
            self._count(_shapes(func, args, kwargs))
        return func(*args, **kwargs)

    def _count(self, found: Any) -> None:
        made = [value.numel() for value in tree_leaves(found) if isinstance(value, Tensor)]
        self.made, self.count = self.made + sum(made), self.count + len(made)
        if self.made > self.numbers:
            raise ValueError(f"it asks for more than {self.numbers} numbers")
        if self.count > self.tensors:
            raise ValueError(f"it asks for more than {self.tensors} tensors")


def _shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation would return, without numbers."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {name: value for name, value in kwargs.items() if name != "generator"} | {"device": "meta"}
    args, kwargs = tree_map(lambda part: part.to("meta") if isinstance(part, Tensor) else part, (args, kwargs))
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # it needs the numbers, or is refused by torch itself
        return None
