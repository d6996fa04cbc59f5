"""Images from files: arrays, and folders of pictures."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.arrays import read_arrays
from ppl_vae.data.images import Array, Images, Split, deal, unit_pixels
from ppl_vae.data.pictures import read_pictures
from ppl_vae.files import PathLike, brief, expanded, look
from ppl_vae.settings import printable

__all__ = ["from_folder", "from_npy", "from_npz", "from_path"]

_ENDS = {"train": "_train", "valid": "_valid", "test": "_test"}
_KNOWN = [f"{column}{end}" for column in "xy" for end in ("", *_ENDS.values())]


def from_path(path: PathLike, seed: int = 0, *, counts: bool = False) -> Images:
    """Read a folder of pictures, an `.npz` or an `.npy` file, whichever `path` is; `counts` as in `from_npz`.

    Raises:
        ValueError: If nothing is there, or it is none of the three, or its reader refuses it.
    """
    path = expanded(path)
    found = look(path, "path")
    if found is not None and stat.S_ISDIR(found.st_mode):
        return from_folder(path, seed)
    if path.suffix.lower() in (".npz", ".npy"):
        return from_npz(path, seed, counts=counts)
    state = "is no .npz or .npy file and no folder of pictures" if found is not None else "does not exist"
    raise ValueError(f"{brief(path)} {state}")


def from_npz(path: PathLike, seed: int = 0, *, counts: bool = False) -> Images:
    """Read `x` (and `y`), or `x_train`, `x_valid`, `x_test` (and `y_train`, ...), from an `.npz` file.

    A split that is missing is drawn from the training images, a tenth of them, stratified by label: so `x`
    alone becomes 80 / 10 / 10.

    Args:
        path: The file. Pixels are (N, D), (N, H, W) or (N, H, W, C) with C = 1 or 3: uint8 (divided by 255),
            bool, or numbers in [0, 1]. Labels are (N,), whole numbers or text; `classes` lists the distinct
            ones in order, and a whole number -1 is a missing one. Flat pixels are drawn as a square where D is
            one, else as one row.
        seed: Which images go where, when a split has to be drawn.
        counts: The numbers are counts 0, 1, 2, ..., (N, D), kept as they are; they are no pictures, of shape (D,).

    Raises:
        ValueError: If the file is missing, damaged, too large or holds anything but numbers and text, if the
            pixels have another rank or scale or are NaN, if counts are not whole, or if labels and images do not
            match.
    """
    path = expanded(path)
    arrays, there = read_arrays(path, _KNOWN)
    if ("x" in arrays) == ("x_train" in arrays):
        found = ", ".join(name[:60] for name in there[:20]) or "nothing"
        raise ValueError(f"{path} must hold either an array `x` or an array `x_train`, found {found}")
    names = _ENDS | ({"train": ""} if "x" in arrays else {})
    x = {part: arrays[f"x{end}"] for part, end in names.items() if f"x{end}" in arrays}
    y = {part: arrays[f"y{end}"] for part, end in names.items() if f"y{end}" in arrays}
    return _images(path, x, y, seed, counts)


def from_npy(path: PathLike, seed: int = 0) -> Images:
    """Read one array of pixels from an `.npy` file: unlabelled, split 80 / 10 / 10, otherwise as `from_npz`.

    Raises:
        ValueError: As for `from_npz`.
    """
    return from_npz(path, seed)


def from_folder(path: PathLike, seed: int = 0) -> Images:
    """Read a folder of pictures of one size, split 80 / 10 / 10, stratified by label.

    Sub-folders, when there are any, are the labels. Greyscale when every picture is, RGB otherwise;
    transparency is dropped. Hidden files and files of other kinds are passed over.

    Raises:
        ValueError: If there is no picture, if one cannot be read, has another size than the first or more than
            8 bits per channel, or if one is, or all together are, too large.
    """
    path = expanded(path)
    x, names = read_pictures(path)
    return _images(path, {"train": x}, {"train": np.array(names)} if names else {}, seed)


def _images(path: Path, x: dict[str, Array], y: dict[str, Array], seed: int, counts: bool = False) -> Images:
    """Check arrays of pixels and labels, keyed by split, and draw the splits that are missing."""
    read = _counts if counts else unit_pixels
    pixels = {part: read(array, f"{path}: x of {part}") for part, array in x.items()}
    shapes = {part: shape for part, (_, shape) in pixels.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: pictures of all splits must have one shape, got {shapes}")
    labels, classes = _labels(path, y, {part: len(array) for part, array in x.items()})
    splits = {part: Split(flat, labels.get(part)) for part, (flat, _) in pixels.items()}
    n, missing = len(splits["train"]), [part for part in ("test", "valid") if part not in splits]
    if n <= len(missing):
        raise ValueError(f"{path}: {n} training images are too few to draw {' and '.join(missing)} from")
    if missing:
        drawn = deal(splits["train"], [max(1, n // 10)] * len(missing), seed)
        splits |= dict(zip([*missing, "train"], drawn, strict=True))
    return Images(path.stem, splits["train"], splits["valid"], splits["test"], shapes["train"], classes)


def _counts(array: Array, where: str) -> tuple[Tensor, tuple[int, ...]]:
    """Counts as float32 (N, D), and the shape of one datum."""
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(f"{where} must be counts (N, D), got shape {array.shape}, dtype {array.dtype}")
    wrong = ~((array >= 0) & (array == np.floor(array)) & (array < 2**24))  # NaN is not whole
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{where}: row {row}, column {column} ({array[row, column]:g}) is no count below 2**24")
    return torch.from_numpy(array.astype(np.float32)), array.shape[1:]


def _labels(path: Path, y: dict[str, Array], n: dict[str, int]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels of each split as indices into the sorted distinct ones, returned too; -1 stays: no label."""
    if not y:
        return {}, ()
    for part, size in n.items():
        labels = y.get(part, np.empty(0))
        if labels.shape != (size,) or labels.dtype.kind not in "biuU":
            wrong = f"got shape {labels.shape}, dtype {labels.dtype}"
            raise ValueError(f"{path}: labels of {part} must be ({size},), whole numbers or text; {wrong}")
    names, codes = np.unique(np.concatenate([y[part] for part in n]), return_inverse=True)
    if names.dtype.kind == "i" and names[0] == -1:
        names, codes = names[1:], codes - 1
    classes = tuple(map(str, names))
    if unreadable := next((name for name in classes if not printable(name)), None):
        raise ValueError(f"{path}: labels must be text without control characters, got {unreadable[:60]!r}")
    cuts = np.split(codes.astype(np.int64), np.cumsum(list(n.values()))[:-1])
    return dict(zip(n, map(torch.from_numpy, cuts), strict=True)), classes
