"""Writing files so that nobody ever reads half of one, and reading those of others within limits."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["PathLike", "brief", "expanded", "look", "open_regular", "parse_json", "read_text", "require_folder"]
__all__ += ["resolved", "write_whole"]

PathLike = str | os.PathLike[str]
MOST_SHOWN = 400  # characters of a path in a message


def require_folder(path: PathLike) -> None:
    """Raise ValueError unless the folder of ``path`` exists: for those who write only after long work."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"path: cannot write {path} (there is no folder {Path(path).parent})")


def write_whole(path: PathLike, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there: all or nothing.

    A link at ``path`` is replaced, and not written through.

    Raises:
        ValueError: the folder does not exist or cannot be written, or ``path`` is a folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)  # a link that somebody left there would be written through
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # on disk before the name points to it
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"path: cannot write {path} ({error.strerror or error})") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return path


def expanded(path: PathLike) -> Path:
    """A path with ~ as the home it stands for, or as it is where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def look(path: PathLike, argument: str) -> os.stat_result | None:
    """What there is at a path, links followed; None where nothing is.

    Args:
        path: where.
        argument: where it came from, for the message.

    Raises:
        ValueError: it cannot be told: a folder on the way cannot be read, the name is too long, a link leads
            back to itself.
    """
    try:
        return Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name with a null character
        return None
    except OSError as error:
        raise ValueError(
            f"{argument}: cannot look at {brief(path)} ({error.strerror}); make it readable, or give another path"
        ) from error


def resolved(path: PathLike, argument: str) -> Path:
    """A path with all links in it followed.

    Args:
        path: it need not be there.
        argument: where it came from, for the message.

    Raises:
        ValueError: a link leads back to itself, or a folder on the way cannot be read.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # a loop is the latter before Python 3.13
        why = error.strerror if isinstance(error, OSError) else "a link leads back to itself"
        raise ValueError(
            f"{argument}: cannot follow {brief(path)} ({why}); remove the link, or make its folder readable"
        ) from error


def brief(path: PathLike) -> str:
    """A path to show in a message: of one too long for any file, its beginning and end."""
    text = os.fspath(path)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]}...{text[-MOST_SHOWN // 2 :]}"


def open_regular(path: PathLike) -> BinaryIO:
    """Open a file for reading, unless it is none: a pipe or a device can keep its reader waiting for ever.

    Links are followed.

    Raises:
        OSError: it is not there, or cannot be read, or is a folder, a pipe, a socket or a device.
    """
    _require_regular(Path(path).stat())  # before it is opened: some devices act on that
    # Without waiting for a writer, should it have become a pipe since.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        _require_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_text(path: PathLike, most: int) -> str:
    """The text of a file of at most so many bytes.

    Raises:
        OSError: as `open_regular`; it is larger.
        ValueError: it is no UTF-8.
    """
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most // 1024} KiB")
    return raw.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as plain values; a key that stands twice is refused, since readers differ in which one counts.

    Raises:
        ValueError: it is none, nested too deep, or with such a key.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _require_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return held
