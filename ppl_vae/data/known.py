"""Data sets by name: bundled digits, and torchvision's, read from its files or fetched."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from ppl_vae.data.images import DAMAGE, DataUnavailable, Images, Split, deal, line, unit_pixels
from ppl_vae.files import PathLike, expanded, open_regular

__all__ = ["cifar10", "digits", "fashion_mnist", "mnist"]

_IDX = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
MOST_BYTES = 2**26  # of one file, unpacked; the largest, of MNIST, has 45 MiB


def digits() -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn: nothing to download.

    Grey levels are scaled to [0, 1]. The split, 1297 / 200 / 300, is stratified, the same on every machine.
    """
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    bunch = load_digits()
    x = torch.from_numpy((bunch.data / 16).astype(np.float32))
    test, valid, train = deal(Split(x, torch.from_numpy(bunch.target.astype(np.int64))), (300, 200), seed=0)
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


def cifar10(root: PathLike | None = None, download: bool = True) -> Images:
    """CIFAR-10, 32 x 32 pictures in colour of ten things: 45,000 / 5,000 / 10,000, as `mnist` splits them.

    Its files are pickles. They are unpickled only where their MD5 sums are those that torchvision knows.

    Args:
        root: Folder in torchvision's layout, with the files in `root/cifar-10-batches-py`. It may be read-only.
            By default the user's cache folder, `~/.cache/ppl_vae`.
        download: Whether to fetch them, through torchvision, into `root` where that folder is not there.

    Raises:
        DataUnavailable: If the files are missing and not to be had, or not the original ones.
    """
    kind = import_module("torchvision.datasets").CIFAR10  # here, as below
    place = _place(root)
    folder = place / kind.base_folder
    try:
        with tempfile.TemporaryDirectory() as scratch:  # a download may break off
            found = folder.exists()
            if found:  # a copy that nobody changes between the check and the reading
                names = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
                _copy(folder, Path(scratch, kind.base_folder), names)
            # torchvision checks the sums of all files before it opens one.
            train, test = (kind(scratch, train=part, download=download and not found) for part in (True, False))
            if not found:
                place.mkdir(parents=True, exist_ok=True)
                part = place / f".{kind.base_folder}.{os.getpid()}.part"
                shutil.copytree(Path(scratch, kind.base_folder), part)
                try:
                    part.rename(folder)
                except OSError:  # another process may have been faster
                    shutil.rmtree(part)
                    if not folder.is_dir():
                        raise
    except DAMAGE as error:
        files = f"unpack {kind.filename}, of MD5 {kind.tgz_md5},"
        raise _unavailable("CIFAR10", folder, error, files, "", download) from error
    fit, judge = (
        Split(unit_pixels(part.data, "CIFAR10")[0], torch.tensor(part.targets)) for part in (train, test)
    )
    n = len(fit) * 9 // 10
    return Images("cifar10", fit[:n], fit[n:], judge, (3, *train.data.shape[1:3]), tuple(train.classes))


def _place(root: PathLike | None) -> Path:
    """Where files are, and fetched ones go: a folder, or the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ppl_vae")
    return expanded(cache if root is None else root)


def _idx_images(folder: str, name: str, root: PathLike | None, download: bool) -> Images:
    """One of torchvision's data sets in MNIST's format and sizes."""
    raw = _place(root) / folder / "raw"
    kind = getattr(import_module("torchvision.datasets"), folder)  # here, because importing it takes a second
    try:
        with tempfile.TemporaryDirectory() as scratch:  # `raw` may be read-only, and a download may break off
            work = Path(scratch, folder, "raw")
            _copy(raw, work, _IDX)
            train, test = kind(scratch, train=True, download=download), kind(scratch, train=False)
            for file in work.glob("*.gz"):  # there after a download only
                raw.mkdir(parents=True, exist_ok=True)
                part = raw / f".{file.name}.{os.getpid()}.part"  # another process may fetch it, too
                shutil.copyfile(file, part).replace(raw / file.name)
        sizes = [len(column) for part in (train, test) for column in (part.data, part.targets)]
        if sizes != [60_000, 60_000, 10_000, 10_000]:
            raise ValueError(f"found {sizes} images and labels, not 60000 and 10000 of each")
        if train.data.shape[1:] != test.data.shape[1:] or max(part.targets.max() for part in (train, test)) > 9:
            raise ValueError("found pictures of two shapes, or labels beyond ten")
    except DAMAGE as error:
        files = f"put {', '.join(f'{file}.gz' for file in _IDX)}"
        raise _unavailable(folder, raw, error, files, f"/{folder}/raw", download) from error
    fit, judge = (Split(part.data.flatten(1).float() / 255, part.targets) for part in (train, test))
    classes = tuple(label.split(" - ")[0] for label in kind.classes)  # MNIST's are "0 - zero"
    return Images(name, fit[:50_000], fit[50_000:], judge, tuple(train.data.shape[1:]), classes)


def _unavailable(
    name: str, place: Path, error: BaseException, files: str, below: str, download: bool
) -> DataUnavailable:
    """What went wrong, and how to mend it: another folder where they were fetched, else this one.

    Args:
        name: of the data set.
        place: the folder that has its files.
        error: what went wrong.
        files: what to do with which.
        below: what the folder is called, from that which a user names.
        download: whether missing files are fetched.
    """
    if download:
        mend = f"{files} into DIR{below} and give --data-dir DIR"
        return DataUnavailable(f"cannot get {name} into {place}: {line(error)}. Instead, {mend}")
    why = line(error).replace("You can use download=True to download it", "").strip(" .")
    where = place if below else place.parent
    return DataUnavailable(
        f"cannot get {name} from {place}: {why}. Either {files} into {where}, or leave data_dir out to fetch them"
    )


def _copy(folder: Path, work: Path, names: Sequence[str]) -> None:
    """Bring those of the files that are there, packed or not, unpacked into a new folder."""
    work.mkdir(parents=True)
    for path in [file for name in names for file in (folder / name, folder / f"{name}.gz") if file.is_file()]:
        try:
            with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as source:
                content = source.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError(f"it is longer than {MOST_BYTES // 2**20} MiB, unlike any such file")
            (work / path.name.removesuffix(".gz")).write_bytes(content)
        except DAMAGE as error:
            raise ValueError(f"cannot read {path}: {line(error)}") from error
