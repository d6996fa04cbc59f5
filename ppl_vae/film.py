"""The film of a training run: the same inputs, their reconstructions and the same prior draws, epoch by epoch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae.evaluate import reconstruct, sample
from ppl_vae.files import PathLike, require_folder
from ppl_vae.hooks import Hook
from ppl_vae.pairs import Pair
from ppl_vae.plots import film_frame, write_gif
from ppl_vae.plots.common import number
from ppl_vae.running import Run

__all__ = ["Film"]


class Film(Hook):
    """Take a picture before training and after epochs, and write them as a GIF at the end.

    The prior draws have the same latents in every frame, so the film shows the decoder learn.

    Args:
        path: where the GIF goes.
        inputs: columns of the data to follow, a batch of some rows: x (B, *event) and perhaps conditions.
        shape: of one picture, (H, W) or (C, H, W).
        frames: about how many epochs to show; early ones are shown more densely, when most changes.
        draws: how many prior draws; with a condition, as many as inputs, with their conditions.

    Raises:
        ValueError: fewer than one frame or draw; when training starts, no folder to write to.
    """

    def __init__(
        self, path: PathLike, inputs: Sequence[Tensor], shape: Sequence[int], *, frames: int = 60, draws: int = 30
    ) -> None:
        if frames < 1 or draws < 1:
            raise ValueError(f"frames and draws must be at least 1, got {frames} and {draws}")
        self.path, self.inputs, self.shape = Path(path), tuple(inputs), tuple(shape)
        self.frames, self.draws = frames, draws
        self.pictures: list[np.ndarray] = []
        self._packed: list[Tensor] = []  # the first of them, as checkpoints hold them
        self.epochs: set[int] = set()

    def on_start(self, run: Run) -> None:
        """Choose the epochs to show, and show the untrained pair."""
        require_folder(self.path)
        count = min(self.frames, run.epochs)
        self.epochs = {round(e) for e in np.geomspace(1, run.epochs, count)} | {run.epochs}
        self.pictures, self._packed = [], []
        self.take(run, "before training")

    def on_epoch(self, run: Run) -> None:
        """Show this epoch, if it is one of the chosen."""
        if run.epoch in self.epochs or run.stopping:
            row = run.history[-1]
            bound = row["train"] if np.isnan(row["valid"]) else row["valid"]
            self.take(run, f"epoch {run.epoch}: {number(bound, '.2f')} nats per datum")

    def take(self, run: Run, caption: str) -> None:
        """Add a frame of the pair as it is."""
        means = reconstruct(run.pair, *self.inputs)
        self.pictures.append(film_frame(self.inputs[0], means, self._draws(run.pair), self.shape, caption))

    def state(self) -> dict[str, Any]:
        """The pictures so far, packed: most of each is background."""
        for picture in self.pictures[len(self._packed) :]:  # each once, not again with every checkpoint
            pixels = bytearray(zlib.compress(picture.tobytes(), 1))
            self._packed.append(torch.frombuffer(pixels, dtype=torch.uint8))
        return {"shapes": [list(picture.shape) for picture in self.pictures], "pictures": [*self._packed]}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Go on from the pictures so far."""
        self._packed = [*state["pictures"]]
        unpacked = (zlib.decompress(packed.numpy().tobytes()) for packed in self._packed)
        self.pictures = [
            np.frombuffer(pixels, np.uint8).reshape(shape)
            for pixels, shape in zip(unpacked, state["shapes"], strict=True)
        ]

    def _draws(self, pair: Pair) -> Tensor:
        x, *context = self.inputs
        count = len(x) if context else self.draws
        if callable(getattr(pair.program, "blank", None)):
            return sample(pair, count, *context, mean=True, seed=1)
        rows = torch.arange(count) % len(x)  # the inputs tell the shapes, as often as is needed
        return sample(pair, count, like=tuple(column[rows] for column in self.inputs), mean=True, seed=1)

    def on_end(self, run: Run) -> None:
        """Write the film, also of a run that ended early; it closes with the weights that are kept."""
        if run.best_epoch not in (None, run.epoch):
            self.take(run, f"kept, epoch {run.best_epoch}: {number(run.best, '.2f')} nats per datum")
        if self.pictures:
            write_gif(self.pictures, self.path)
