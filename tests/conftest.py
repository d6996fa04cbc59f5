"""What all tests share: one thread per worker, the data folder, skipping what the machine lacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

collect_ignore = ["bench/numpyro_peer.py", "bench/pythae_peer.py"]  # they need packages that the project does not
matplotlib.use("agg")
torch.set_num_threads(1)  # workers run side by side; threads that wait for each other's cores are slow


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data: PPL_VAE_DATA, or ../shared/data beside the repository; skips without one."""
    root = Path(os.environ.get("PPL_VAE_DATA") or Path(__file__).parents[1] / "../shared/data").resolve()
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {root}; set PPL_VAE_DATA to a folder that has it")
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs are captured and not compiled, which takes seconds; how many arguments each of them had."""
    from ppl_vae import capture, graphs

    made: list[int] = []

    def interpret(function: Any, tensors: Any, *, compile: bool = True) -> Any:
        made.append(len(tensors))
        return graphs.capture(function, tensors, compile=False)

    monkeypatch.setattr(capture, "capture", interpret)
    return made
