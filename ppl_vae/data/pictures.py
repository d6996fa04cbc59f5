"""Pictures from a folder: of known formats, and of one size, which is known before any is unpacked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ppl_vae.data.images import DAMAGE, Array, line
from ppl_vae.files import brief, open_regular
from ppl_vae.limits import MEMORY, memory_limit

__all__ = ["read_pictures"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow reads some others by running programs
MOST_PIXELS = 2**24  # of one picture
MOST_FILES = 2_000_000  # in all folders
DEEPEST = 16  # folders in one another


def read_pictures(path: Path) -> tuple[Array, list[str]]:
    """All pictures of a folder, uint8 (N, H, W) or in colour (N, H, W, 3), and the sub-folder that each lies in.

    Of a file with several pictures the first counts. Links are followed.

    Returns:
        The pictures, and the names, none where there are no sub-folders.

    Raises:
        ValueError: as `ppl_vae.data.from_folder`.
    """
    try:
        files = _picture_files(path, [], 0)
    except OSError as error:
        where = brief(error.filename or path)
        raise ValueError(f"path: cannot read {where} ({error.strerror}); make it readable") from error
    pictures: list[Image.Image] = []
    for file in files:
        pictures.append(_picture(file, pictures[0] if pictures else None, len(files)))
    mode = "L" if {picture.mode for picture in pictures} <= {"L", "1"} else "RGB"
    x = np.stack([_array(file, picture, mode) for file, picture in zip(files, pictures, strict=True)])
    return x, [] if files[0].parent == path else [file.relative_to(path).parts[0] for file in files]


def _picture_files(path: Path, above: list[Path], count: int) -> list[Path]:
    """Picture files in order: those of the sub-folders when there are any, else those of the folder."""
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    if path.resolve() in above or len(above) > DEEPEST:
        raise ValueError(f"{path} leads back to a folder that it is in, or lies more than {DEEPEST} folders deep")
    seen = []
    for file in path.iterdir():
        seen.append(file)
        if count + len(seen) > MOST_FILES:
            raise ValueError(f"{path}: more than {MOST_FILES} files; keep the pictures as arrays, in an .npz file")
    seen = sorted(file for file in seen if not file.name.startswith("."))
    folders = [file for file in seen if file.is_dir()]
    loose = [file for file in seen if file.suffix.lower() in SUFFIXES and file.is_file()]
    if folders and loose:
        raise ValueError(f"{loose[0]} lies beside the sub-folder {folders[0].name}: move it into a class")
    if {"train", "test"} <= {folder.name for folder in folders}:  # else they would silently become labels
        raise ValueError(f"{path}: sub-folders are labels, here train and test: put the splits together")
    if not folders and not loose:
        raise ValueError(f"{path} holds no pictures; known are {', '.join(SUFFIXES)}")
    for folder in folders:
        loose += _picture_files(folder, [*above, path.resolve()], count + len(loose) + len(folders))
    return loose


def _picture(file: Path, first: Image.Image | None, count: int) -> Image.Image:
    """A picture in memory; Pillow's complaints become a ValueError that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"), open_regular(file) as opened:
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            with Image.open(opened, formats=FORMATS) as picture:
                _check_size(file, picture, first, count)
                picture.load()
                return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, *DAMAGE) as error:
        if isinstance(error, _Unfit):
            raise
        raise ValueError(f"cannot read the picture {file}: {line(error)}") from error


class _Unfit(ValueError):  # noqa: N818 - it stays here
    """A picture that is whole, and not to be taken."""


def _check_size(file: Path, picture: Image.Image, first: Image.Image | None, count: int) -> None:
    """Raise ValueError for a picture, not unpacked yet, of the wrong size or depth, or if all take too much."""
    size = picture.size
    if first is not None and size != first.size:
        raise _Unfit(f"{file} is {size}, not {first.size} as the first: resize it")
    if picture.mode.startswith(("I", "F")):
        raise _Unfit(f"{file} has more than 8 bits per channel (mode {picture.mode}): save it with 8")
    if size[0] * size[1] > MOST_PIXELS:
        raise _Unfit(f"{file} has {size[0] * size[1]} pixels, more than {MOST_PIXELS}: resize it")
    needed = count * size[0] * size[1] * 4 * (1 if picture.mode in ("1", "L") else 3)
    if first is None and needed > memory_limit():
        whole = f"{count} pictures of {size} take {needed / 2**30:.1f} GiB"
        raise _Unfit(f"{file.parent}: {whole}, more than may be read; if they are yours, set {MEMORY}")


def _array(file: Path, picture: Image.Image, mode: str) -> Array:
    try:
        return np.asarray(picture.convert(mode))
    except DAMAGE as error:
        raise ValueError(f"cannot read the picture {file}: {line(error)}") from error
