"""How a run came about: what another needs to repeat it, or to see why its numbers differ."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ppl_vae.data import Images

__all__ = ["circumstances", "data_checksum", "installed"]

PACKAGES = ("ppl-vae", "torch", "pyro-ppl", "arviz", "numpy")


def circumstances(images: Images, device: torch.device) -> dict[str, Any]:
    """What is known when a run starts: time, command, versions, machine, data, and the commit it was started in.

    Args:
        images: the data, as they were loaded.
        device: where it trains.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(device) if gpu is None else f"{device}, {gpu}",
        "threads": torch.get_num_threads(),
        "data": data_checksum(images),
    }


def data_checksum(images: Images) -> str:
    """SHA-256 of all splits, pixels and labels."""
    total = hashlib.sha256()
    for split in (images.train, images.valid, images.test):
        for column in split.columns:
            total.update(f"{column.dtype} {tuple(column.shape)}".encode())
            total.update(column.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def installed(package: str) -> str:
    """The version of an installed package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The commit that the working folder is at, and whether it has changes; None outside a repository."""
    try:
        found = [
            subprocess.run(["git", *what], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return f"{found[0]}{', with changes' if found[1] else ''}"
