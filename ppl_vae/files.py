"""Writing files so that nobody ever reads half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["PathLike", "require_folder", "write_whole"]

PathLike = str | os.PathLike[str]


def require_folder(path: PathLike) -> None:
    """Raise ValueError unless the folder of ``path`` exists: for those who write only after long work."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"path: cannot write {path} (there is no folder {Path(path).parent})")


def write_whole(path: PathLike, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there: all or nothing.

    Raises:
        ValueError: the folder does not exist or cannot be written, or ``path`` is a folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
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
