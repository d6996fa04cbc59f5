"""Images for training and judging: bundled digits, torchvision's MNIST pair, arrays and folders of pictures.

Every source ends in an `Images`: three splits of flat pixels, float32 (N, D) in [0, 1], with the shape of one
picture kept beside them. Pixels are checked here, once, so that no batch is checked again. Binarisation is
not stored but applied as batches are presented: `Data(x, transform=redraw)`.
Reading never unpickles and never writes beside files that are already there.
"""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["DataUnavailable", "Images", "Split", "digits", "fashion_mnist", "from_folder", "from_npy"]
__all__ += ["from_npz", "from_path", "mnist", "subset"]

PathLike: TypeAlias = str | os.PathLike[str]
Array: TypeAlias = NDArray[Any]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IDX = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))

# What damaged files and broken connections make numpy, gzip, Pillow and torchvision (it asserts) raise.
_BUILT_IN = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, AssertionError, SyntaxError)
_DAMAGE = (*_BUILT_IN, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, http.client.HTTPException)


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


def digits() -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn: nothing to download.

    Grey levels are scaled to [0, 1]. The split, 1297 / 200 / 300, is stratified, the same on every machine.
    """
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    bunch = load_digits()
    x = torch.from_numpy((bunch.data / 16).astype(np.float32))
    test, valid, train = _deal(Split(x, torch.from_numpy(bunch.target.astype(np.int64))), (300, 200), seed=0)
    return Images("digits", train, valid, test, (8, 8), tuple(map(str, range(10))))


def mnist(root: PathLike | None = None, download: bool = True) -> Images:
    """MNIST, 28 x 28 handwritten digits: 50,000 / 10,000 / 10,000, validation being the last of training.

    Args:
        root: Folder in torchvision's layout, with the four files, packed (.gz) or not, in `root/MNIST/raw`.
            It may be read-only. By default the user's cache folder, `~/.cache/ppl_vae`.
        download: Whether to fetch missing files, through torchvision, into `root`.

    Raises:
        DataUnavailable: If the files are missing and not to be had, or damaged.
    """
    return _idx_images("MNIST", "mnist", root, download)


def fashion_mnist(root: PathLike | None = None, download: bool = True) -> Images:
    """Fashion-MNIST, 28 x 28 pictures of clothes: as `mnist`, with the files in `root/FashionMNIST/raw`.

    Raises:
        DataUnavailable: If the files are missing and not to be had, or damaged.
    """
    return _idx_images("FashionMNIST", "fashion-mnist", root, download)


def from_path(path: PathLike, seed: int = 0, *, counts: bool = False) -> Images:
    """Read a folder of pictures, an `.npz` or an `.npy` file, whichever `path` is; `counts` as in `from_npz`.

    Raises:
        ValueError: If nothing is there, or it is none of the three, or its reader refuses it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return from_folder(path, seed)
    if path.suffix.lower() in (".npz", ".npy"):
        return from_npz(path, seed, counts=counts)
    state = "is no .npz or .npy file and no folder of pictures" if path.exists() else "does not exist"
    raise ValueError(f"{path} {state}")


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
        ValueError: If the file is missing, damaged or holds pickled objects, if the pixels have another rank
            or scale or are NaN, if counts are not whole, or if labels and images do not match.
    """
    path = Path(path).expanduser()
    arrays = _load(path)
    if ("x" in arrays) == ("x_train" in arrays):
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path} must hold either an array `x` or an array `x_train`, found {found}")
    names = {"train": "" if "x" in arrays else "_train", "valid": "_valid", "test": "_test"}
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
        ValueError: If there is no picture, if one cannot be read, has another size than the first, has more
            than 8 bits per channel or is so large that Pillow suspects a decompression bomb.
    """
    path = Path(path).expanduser()
    files = _picture_files(path)
    pictures = [_picture(file) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.size != pictures[0].size:
            raise ValueError(f"{file} is {picture.size}, not {pictures[0].size} as the first: resize it")
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"{file} has more than 8 bits per channel (mode {picture.mode}): save it with 8")
    mode = "L" if {picture.mode for picture in pictures} <= {"L", "1"} else "RGB"
    x = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    names = np.array([file.relative_to(path).parts[0] for file in files])
    return _images(path, {"train": x}, {} if files[0].parent == path else {"train": names}, seed)


def _deal(whole: Split, sizes: Sequence[int], seed: int) -> list[Split]:
    """Disjoint random splits of the given sizes, and last the rest; labels keep their proportions in each."""
    # Sorting raw draws, because NumPy keeps a bit generator's stream in all versions, but not `permutation`.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(whole)), kind="stable")
    if whole.y is not None:
        labels, turn = whole.y.numpy()[order], np.empty(len(whole))
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            turn[labels == label] = (np.arange(count) + 0.5) / count
        order = order[np.argsort(turn, kind="stable")]
    return [whole[torch.from_numpy(rows)] for rows in np.split(order, np.cumsum(sizes))]


def _images(path: Path, x: dict[str, Array], y: dict[str, Array], seed: int, counts: bool = False) -> Images:
    """Check arrays of pixels and labels, keyed by split, and draw the splits that are missing."""
    read = _counts if counts else _pixels
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
        drawn = _deal(splits["train"], [max(1, n // 10)] * len(missing), seed)
        splits |= dict(zip([*missing, "train"], drawn, strict=True))
    return Images(path.stem, splits["train"], splits["valid"], splits["test"], shapes["train"], classes)


def _pixels(array: Array, where: str) -> tuple[Tensor, tuple[int, ...]]:
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


def _counts(array: Array, where: str) -> tuple[Tensor, tuple[int, ...]]:
    """Counts as float32 (N, D), and the shape of one datum."""
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(f"{where} must be counts (N, D), got shape {array.shape}, dtype {array.dtype}")
    wrong = ~((array >= 0) & (array == np.floor(array)) & (array < 2**24))  # NaN is not whole
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{where}: row {row}, column {column} ({array[row, column]:g}) is no count below 2**24")
    return torch.from_numpy(array.astype(np.float32)), array.shape[1:]


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
    cuts = np.split(codes.astype(np.int64), np.cumsum(list(n.values()))[:-1])
    return dict(zip(n, map(torch.from_numpy, cuts), strict=True)), tuple(map(str, names))


def _load(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file, or the one of an .npy file as `x`; never unpickled."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except _DAMAGE as error:
        raise ValueError(f"cannot read {path}: {_line(error)} (pickles are never loaded)") from error


def _picture_files(path: Path) -> list[Path]:
    """Picture files in order: those of the sub-folders when there are any, else those of the folder."""
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    seen = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    folders = [file for file in seen if file.is_dir()]
    loose = [file for file in seen if file.suffix.lower() in _SUFFIXES and file.is_file()]
    if folders and loose:
        raise ValueError(f"{loose[0]} lies beside the sub-folder {folders[0].name}: move it into a class")
    if {"train", "test"} <= {folder.name for folder in folders}:  # else they would silently become labels
        raise ValueError(f"{path}: sub-folders are labels, here train and test: put the splits together")
    if not folders and not loose:
        raise ValueError(f"{path} holds no pictures; known are {', '.join(_SUFFIXES)}")
    return loose or [file for folder in folders for file in _picture_files(folder)]


def _picture(file: Path) -> Image.Image:
    """A picture in memory; Pillow's complaints become a ValueError that names the file."""
    guard = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    try:
        with guard, Image.open(file) as picture:
            picture.load()
            return picture
    except (*_DAMAGE, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _idx_images(folder: str, name: str, root: PathLike | None, download: bool) -> Images:
    """One of torchvision's data sets in MNIST's format and sizes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ppl_vae")
    raw = Path(cache if root is None else root).expanduser() / folder / "raw"
    kind = getattr(import_module("torchvision.datasets"), folder)  # here, because importing it takes a second
    try:
        with tempfile.TemporaryDirectory() as scratch:  # `raw` may be read-only, and a download may break off
            work = Path(scratch, folder, "raw")
            _unpack(raw, work)
            train, test = kind(scratch, train=True, download=download), kind(scratch, train=False)
            for file in work.glob("*.gz"):  # there after a download only
                raw.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, raw / f"{file.name}.part").replace(raw / file.name)
        sizes = [len(column) for part in (train, test) for column in (part.data, part.targets)]
        if sizes != [60_000, 60_000, 10_000, 10_000]:
            raise ValueError(f"found {sizes} images and labels, not 60000 and 10000 of each")
    except _DAMAGE as error:
        mend = f"put {', '.join(f'{file}.gz' for file in _IDX)} into DIR/{folder}/raw and give --data-dir DIR"
        raise DataUnavailable(f"cannot get {folder} into {raw}: {_line(error)}. Instead, {mend}") from error
    fit, judge = (Split(part.data.flatten(1).float() / 255, part.targets) for part in (train, test))
    classes = tuple(label.split(" - ")[0] for label in kind.classes)  # MNIST's are "0 - zero"
    return Images(name, fit[:50_000], fit[50_000:], judge, tuple(train.data.shape[1:]), classes)


def _unpack(raw: Path, work: Path) -> None:
    """Bring the files that are in `raw`, packed or not, unpacked into the new folder `work`."""
    work.mkdir(parents=True)
    for path in [file for name in _IDX for file in (raw / name, raw / f"{name}.gz") if file.is_file()]:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
                (work / path.name.removesuffix(".gz")).write_bytes(source.read())
        except _DAMAGE as error:
            raise ValueError(f"cannot read {path}: {_line(error)}") from error
