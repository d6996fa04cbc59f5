"""Arrays from .npy and .npz files: numbers and text alone, and no more of them than the file has room for."""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from ppl_vae.data.images import DAMAGE, Array, line
from ppl_vae.files import brief, open_regular
from ppl_vae.limits import MEMORY, memory_limit

__all__ = ["read_arrays"]

MOST_DESCRIPTION = 4096  # bytes of the text that says what an array is
MOST_CHARACTERS = 1000  # of one label
MOST_DIRECTORY = 2**20  # bytes of the list of a zip file's members
CHUNK = 2**20
DIMENSIONS = 32  # of an array
DESCRIPTION = re.compile(r"\{(?:'(?:descr|fortran_order|shape)':(?:'[^']*'|True|False|\([\d,]*\)),?){3}\}")
NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|U\d{1,5})")
BYTES = re.compile(r"[<>|=]?S\d+")


def read_arrays(path: Path, names: Collection[str]) -> tuple[dict[str, Array], list[str]]:
    """The arrays of an .npz file that have one of the names, or the array of an .npy file as ``x``.

    What an array takes is known from its description, and compared with the size of the file, or of its member of
    the file, before any memory is taken. A member is unpacked as far as its array goes.

    Args:
        path: the file, told apart by its first bytes.
        names: those of interest; other arrays are not read.

    Returns:
        The arrays by name, and the names of all there are.

    Raises:
        ValueError: it cannot be read, is damaged, holds anything but numbers and text, or takes too much memory.
    """
    try:
        with open_regular(path) as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"PK"):
                return _members(file, names)
            return {"x": _array(file, file.seek(0, io.SEEK_END) - file.seek(0), memory_limit())}, ["x"]
    except (*DAMAGE, Warning) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else line(error)
        raise ValueError(f"cannot read {brief(path)}: {why} (pickles are never loaded)") from error


def _members(file: BinaryIO, names: Collection[str]) -> tuple[dict[str, Array], list[str]]:
    """The arrays of a zip file."""
    size, left, found = file.seek(0, io.SEEK_END), memory_limit(), {}
    file.seek(0)
    # Python's reader takes what the file says of its directory as it is; duplicates in that are warned of.
    with warnings.catch_warnings(action="error"), zipfile.ZipFile(cast("IO[bytes]", _Sparing(file))) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("two of its arrays have the same name")
        for name in sorted(members.keys() & {*names}):
            member = members[name]
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is packed by a method that numpy does not use")
            if member.compress_size > size:
                raise ValueError(f"{name} is longer than the file")
            with archive.open(member) as stream:
                found[name] = _array(stream, member.file_size, left)
                if stream.read(1):  # reading on to the end has the checksum compared
                    raise ValueError(f"{name} goes on after its array")
                if stream.tell() != member.file_size:
                    raise ValueError(f"{name} has another size than the file's list of members says")
            left -= _taken(found[name])
        return found, sorted(members)


class _Sparing(io.RawIOBase):
    """A file of which no more is read at once than a zip file's directory may have.

    Args:
        file: what is read.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(MOST_DIRECTORY + 1 if size < 0 else min(size, MOST_DIRECTORY + 1))
        if len(found) > MOST_DIRECTORY:
            most = f"{MOST_DIRECTORY // 1024} KiB"
            raise ValueError(f"its list of members is longer than {most}; save x and y alone")
        return found


def _array(file: IO[bytes], size: int, most: int) -> Array:
    """The array that begins here, with its description, in so many bytes."""
    dtype, shape, fortran, used = _description(file)
    count = math.prod(shape)
    if not 0 <= count * dtype.itemsize <= size - used:
        raise ValueError(
            f"an array of shape {shape}, {dtype}, takes more bytes than the {size - used} that follow"
        )
    if max(count * dtype.itemsize, 4 * count) > most:
        needed = f"{max(count * dtype.itemsize, 4 * count) / 2**30:.1f} GiB"
        raise ValueError(f"it takes {needed}, more than may be read; if it is yours, set {MEMORY}")
    array: Array = np.empty(count, dtype)
    raw = array.view(np.uint8).data if array.nbytes else memoryview(b"")
    for start in range(0, len(raw), CHUNK):
        part = raw[start : start + CHUNK]
        if (got := file.read(len(part))) is None or len(got) != len(part):
            raise EOFError("it ends too early")
        part[:] = got
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a value is neither true nor false")
    if dtype.kind == "U" and array.size and array.view(dtype.byteorder + "u4").max() > 0x10FFFF:
        raise ValueError("a label is no text")
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _description(file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Type and shape of an array, whether columns go first, and how many bytes said so."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise ValueError("it is no array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > MOST_DESCRIPTION:
        raise ValueError(f"a description of {length} bytes")
    text = "".join(file.read(length).decode("latin1").split())
    text = re.sub(r"(?<=\d)L(?=[,)])", "", text)  # whole numbers as Python 2 wrote them
    if not DESCRIPTION.fullmatch(text):
        raise ValueError("it holds more than plain numbers or text; save one array of numbers, or of text")
    values = dict(re.findall(r"'(\w+)':('[^']*'|True|False|\([\d,]*\))", text))
    kind, shape = values.get("descr", "")[1:-1], values.get("shape", "")
    if BYTES.fullmatch(kind):
        raise ValueError(f"it holds bytes ({kind}); save y as text (dtype U), or as whole numbers")
    if len(values) < 3 or not NUMBERS.fullmatch(kind) or values["fortran_order"] not in ("True", "False"):
        found = f"it holds something other than numbers or text ({kind[:60]})"
        raise ValueError(f"{found}; save x as numbers, y as whole numbers or text")
    dtype, sides = np.dtype(kind), tuple(int(side) for side in shape[1:-1].split(",") if side)
    if not shape.startswith("(") or len(sides) > DIMENSIONS or math.prod(side or 1 for side in sides) >= 2**62:
        raise ValueError("its shape is none")
    if dtype.kind == "U" and not 0 < dtype.itemsize <= 4 * MOST_CHARACTERS:
        found = f"labels of more than {MOST_CHARACTERS} characters, or none"
        raise ValueError(f"{found}; shorten them, or save y as whole numbers")
    return dtype, sides, values["fortran_order"] == "True", 8 + width + length


def _taken(array: Array) -> int:
    """Bytes of an array, or of its numbers as they are used."""
    return max(array.nbytes, 4 * array.size)
