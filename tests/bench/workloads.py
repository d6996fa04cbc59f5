"""What is timed: every workload, its network and its data, stated once for all peers.

Only numpy is imported here: some peers run in an interpreter without torch.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = ["JITTER", "LEAPFROG", "SCALING", "STEP", "WORKLOADS", "Workload", "batches", "binary", "digits"]

POOL = 16  # batches that the steps of one workload go round
LEAPFROG, STEP, JITTER = 10, 0.05, 0.2  # of annealing's moves: steps, their size, what share of it is random


@dataclass(frozen=True)
class Workload:
    """One piece of work, the same for every peer. Pixels are binary, learning is Adam's at 1e-3, all in float32.

    What only ours does otherwise, its name says.

    Attributes:
        name: what the table calls it.
        kind: "step" of training; "epoch" of training with its data path; "evaluation" of log p(x) by importance
            weights; "gradient" of the log joint in z; "annealing" of chains from the prior to the posterior, by
            step sizes that are given.
        hidden: widths of the hidden layers, from the data to the latents; () is the convolutional network.
        latent: number of latents.
        activation: of the hidden layers.
        batch: rows of a batch.
        particles: K of the objective or of the evaluation; chains, for a gradient and for annealing.
        estimator: of the gradient.
        images: rows of data, where that matters.
        distributions: of annealing.
        precision: of matrix products in ours, within the trajectories of annealing.
    """

    name: str
    kind: Literal["step", "epoch", "evaluation", "gradient", "annealing"] = "step"
    hidden: tuple[int, ...] = (400,)
    latent: int = 20
    activation: Literal["softplus", "tanh"] = "softplus"
    batch: int = 128
    particles: int = 1
    estimator: Literal["pathwise", "doubly"] = "pathwise"
    images: int = 0
    distributions: int = 0
    precision: Literal["float32", "bf16"] = "float32"

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Workload:
        """A workload from its fields as they come out of JSON."""
        return cls(**{**fields, "hidden": tuple(fields["hidden"])})

    @property
    def event(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return (784,) if self.hidden else (3, 32, 32)

    @property
    def once(self) -> bool:
        """Whether it is long enough to be timed by one repetition."""
        return self.kind in ("epoch", "evaluation", "annealing")

    def quick(self) -> Workload:
        """The same work on little data, for a smoke test."""
        fewer = {
            "epoch": {"images": 1000},
            "evaluation": {"images": 20, "particles": 200},
            "annealing": {"batch": 10, "distributions": 3},
        }
        return replace(self, **fewer.get(self.kind, {}))

    def amount(self, milliseconds: float) -> str:
        """A time as the table shows it."""
        if self.kind == "evaluation":
            return f"{self.images / milliseconds * 1e3:.3g} images/s"
        if self.kind == "annealing":
            return f"{milliseconds / (LEAPFROG * (self.distributions - 1)):.3g} ms per leapfrog step"
        return f"{milliseconds / 1e3:.2f} s" if self.kind == "epoch" else f"{milliseconds:.3g} ms"


def vae(name: str, **fields: Any) -> Workload:
    """784-400-20, softplus (Kingma & Welling 2014)."""
    return Workload(f"784-400-20, {name}", **fields)


def iwae(name: str, **fields: Any) -> Workload:
    """784-200-200-50, tanh (Burda et al. 2016)."""
    return Workload(f"784-200-200-50, {name}", hidden=(200, 200), latent=50, activation="tanh", **fields)


def annealing(name: str, **fields: Any) -> Workload:
    """Wu et al. 2017, with fewer distributions: what counts is the time of one step."""
    return iwae(name, kind="annealing", batch=100, particles=16, distributions=25, **fields)


WORKLOADS = [
    *(vae(f"ELBO, batch {b}", batch=b) for b in (20, 128, 512)),
    *(iwae(f"K = {k}, batch {b}", batch=b, particles=k) for b in (20, 100) for k in (1, 5, 50)),
    iwae("K = 50, batch 20, doubly reparameterised", batch=20, particles=50, estimator="doubly"),
    Workload("convolutional 3x32x32, batch 128", hidden=(), latent=32),
    vae("epoch of MNIST, batch 128", kind="epoch", images=60_000),
    iwae("L_5000", kind="evaluation", batch=100, particles=5000, images=200),
    iwae("log joint gradient in z, 1,600 rows", kind="gradient", batch=100, particles=16),
    annealing("annealing, 16 chains x 100 images"),
    annealing("annealing, 16 chains x 100 images, ours in bf16 within trajectories", precision="bf16"),
]

SCALING = {
    "batch size": {b: vae(f"batch {b}", batch=b) for b in (8, 32, 128, 512, 2048)},
    "particles K": {k: iwae(f"K = {k}", batch=20, particles=k) for k in (1, 4, 16, 64, 256)},
    "latents": {d: vae(f"latents {d}", latent=d) for d in (2, 8, 32, 128, 512)},
}


def binary(rows: int, event: tuple[int, ...]) -> np.ndarray:
    """Binary pixels as float32 (rows, *event), three in ten of them on."""
    return (np.random.default_rng(0).random((rows, *event), dtype=np.float32) > 0.7).astype(np.float32)


def batches(work: Workload) -> np.ndarray:
    """The batches that steps go round: float32 (POOL, B, *event)."""
    return binary(POOL * work.batch, work.event).reshape(POOL, work.batch, *work.event)


def digits(rows: int) -> np.ndarray:
    """Training images of MNIST, uint8 (rows, 784): from the folder PPL_VAE_DATA, or made up, of the same size."""
    raw = Path(os.environ.get("PPL_VAE_DATA", "")) / "MNIST" / "raw"
    plain, packed = raw / "train-images-idx3-ubyte", raw / "train-images-idx3-ubyte.gz"
    if "PPL_VAE_DATA" not in os.environ or not (plain.exists() or packed.exists()):
        return np.random.default_rng(0).integers(0, 256, (rows, 784), dtype=np.uint8)
    content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 784)[:rows].copy()
