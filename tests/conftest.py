"""What all tests share: one thread per worker, the data folder, skipping what the machine lacks."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("agg")
torch.set_num_threads(1)  # workers run side by side; threads that wait for each other's cores are slow


def data_root() -> Path:
    """The folder with real data: PPL_VAE_DATA, or ../shared/data beside the repository; skips without one."""
    folder = Path(os.environ.get("PPL_VAE_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no real data at {folder}; name the folder by PPL_VAE_DATA")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data."""
    return data_root()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
