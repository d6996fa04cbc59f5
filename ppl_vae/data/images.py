"""Images in splits, and what every reader of them needs."""

from __future__ import annotations

import http.client
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "DAMAGE", "DataUnavailable", "Images", "Split", "deal", "line", "unit_pixels", "subset"]

Array: TypeAlias = NDArray[Any]

# What damaged files and broken connections make numpy, gzip, Pillow and torchvision (it asserts) raise.
_BUILT_IN = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, AssertionError, SyntaxError)
DAMAGE = (*_BUILT_IN, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, http.client.HTTPException)


class DataUnavailable(ValueError):  # noqa: N818 - it names a state of the world, as StopIteration does
    """A named data set is neither on disk nor to be had by download; the message says what to do."""


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images of one split, with their labels when there are any.

    Attributes:
        x: Pixels, float32 (N, D) in [0, 1].
        y: Labels, int64 (N,), indices into `Images.classes`, -1 where one is missing; None when unlabelled.
    """

    x: Tensor
    y: Tensor | None = None

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The tensors to build `Data` from: `(x,)` or `(x, y)`."""
        return (self.x,) if self.y is None else (self.x, self.y)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return Split(*(column[rows] for column in self.columns))

    def __repr__(self) -> str:
        return f"Split({len(self)} x {self.x.shape[1]}{'' if self.y is None else ', labelled'})"


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """A data set in three splits.

    Attributes:
        name: What to call it in a title or a run folder.
        train, valid, test: Images to fit to, to choose by (early stopping, learning rates), to report on.
        shape: Shape of one picture, (H, W) or (C, H, W); its product is D. (D,) where the data are no pictures.
        classes: The name of each label; empty when unlabelled.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, valid={len(self.valid)}, test={len(self.test)}"
        return f"Images({self.name!r}, shape={self.shape}, {sizes}, classes={len(self.classes)})"


def subset(images: Images, n: int) -> Images:
    """Keep the first `n` images of each split, or all where there are fewer: for a quick run.

    Raises:
        ValueError: If `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    return replace(images, train=images.train[:n], valid=images.valid[:n], test=images.test[:n])


def deal(whole: Split, sizes: Sequence[int], seed: int) -> list[Split]:
    """Disjoint random splits of the given sizes, and last the rest; labels keep their proportions in each."""
    # Sorting raw draws, because NumPy keeps a bit generator's stream in all versions, but not `permutation`.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(whole)), kind="stable")
    if whole.y is not None:
        labels, turn = whole.y.numpy()[order], np.empty(len(whole))
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            turn[labels == label] = (np.arange(count) + 0.5) / count
        order = order[np.argsort(turn, kind="stable")]
    return [whole[torch.from_numpy(rows)] for rows in np.split(order, np.cumsum(sizes))]


def unit_pixels(array: Array, where: str) -> tuple[Tensor, tuple[int, ...]]:
    """Pixels as float32 (N, D) in [0, 1], and the shape of one picture."""
    if array.ndim == 4 and array.shape[3] in (1, 3):
        array = array[..., 0] if array.shape[3] == 1 else np.moveaxis(array, 3, 1)
    elif array.ndim not in (2, 3):
        raise ValueError(f"{where} must be (N, D), (N, H, W) or (N, H, W, 1 or 3), got shape {array.shape}")
    if not array.size:
        raise ValueError(f"{where} is empty, of shape {array.shape}")
    flat = array.reshape(len(array), -1)
    side = round(flat.shape[1] ** 0.5)
    guess = (side, side) if side * side == flat.shape[1] else (1, flat.shape[1])
    return torch.from_numpy(_unit(flat, where)), array.shape[1:] if array.ndim > 2 else guess


def _unit(x: Array, where: str) -> NDArray[np.float32]:
    """Numbers (N, D) as float32 in [0, 1], refused where that would need a guess."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{where} must be numbers, got dtype {x.dtype}")
    if x.dtype == np.uint8:
        if x.max() <= 1:  # 0/1 pixels in uint8: dividing would make every picture all but black
            raise ValueError(f"{where} is uint8 without a value above 1: save 0/1 pixels as bool")
        return x.astype(np.float32) / np.float32(255)
    outside = "is outside [0, 1]: rescale the pixels, or save 0..255 as uint8"
    for fault, mend in ((np.isnan(x), "is NaN: drop or mend the picture"), ((x < 0) | (x > 1), outside)):
        if fault.any():
            row, pixel = np.argwhere(fault)[0]
            raise ValueError(f"{where}: row {row}, pixel {pixel} ({x[row, pixel]:g}) {mend}")
    return x.astype(np.float32)


def line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
