"""The codes of a codebook: which of them pictures have, and how often each is used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.codes import perplexity, usage
from ppl_vae.plots.common import INK, Array, styled, to_numpy
from ppl_vae.plots.images import labelled_page, pictures, tile

__all__ = ["code_maps"]

# Pixels: the height of the bars, of what stands under and over them, and what stands at their sides.
_BARS, _BELOW, _GAP, _LEFT, _RIGHT = 220, 84, 40, 110, 24
_WIDTH = 720
_FILL = "#3f90da"


@styled
def code_maps(x: Array, indices: Tensor, vectors: Array, shape: tuple[int, ...], columns: int = 10) -> Figure:
    """Pictures over the maps of their codes, and below these how often each code is used, in falling order.

    A code has the colour of its vector's three principal components among the codes that occur, so that codes
    alike in colour are alike.

    Args:
        x: pictures (N, D) in [0, 1].
        indices: their codes (N, h, w), 0 .. K - 1; all are counted, and the first ``columns`` shown.
        vectors: the codebook (K, D).
        shape: of a picture, (H, W) or (C, H, W).
        columns: how many pictures to show.

    Raises:
        ValueError: wrong sizes, or columns below 1; codes that the codebook has not.

    >>> import torch
    >>> fig = code_maps(torch.rand(5, 64), torch.randint(8, (5, 4, 4)), torch.randn(8, 3), (8, 8))
    >>> fig.axes[1].get_xlabel()
    'code, in falling order'
    """
    if indices.dim() != 3 or len(indices) != len(x):
        raise ValueError(
            f"indices: expected {len(x)} grids (N, h, w), one for each of x, got {tuple(indices.shape)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    codebook = to_numpy(vectors, "vectors").astype(np.float64)
    indices, codes = indices.cpu(), len(codebook)
    shares = np.sort(np.bincount(indices.flatten().numpy(), minlength=codes) / indices.numel())[::-1]
    effective, used = perplexity(indices, codes), round(usage(indices, codes) * codes)
    cells = pictures(x[:columns], shape, "x")
    maps = _coloured(codebook, indices.numpy())[indices[:columns].numpy()]
    for axis in (1, 2):  # as large as the pictures
        side, places = cells.shape[axis], maps.shape[axis]
        maps = maps.take(np.arange(side) * places // side, axis)
    title = f"Codes: {used} of {codes} in use, perplexity {effective:.1f}"
    fig = labelled_page(tile([cells, maps]), title, ["picture", "codes"], _WIDTH, bottom=_BARS + _BELOW + _GAP)
    _add_bars(fig, shares)
    return fig


def _add_bars(fig: Figure, shares: npt.NDArray[np.float64]) -> None:
    """Shares of places in falling order, beside what each would have if all were alike."""
    wide, tall = (side * fig.dpi for side in fig.get_size_inches())
    axes = fig.add_axes((_LEFT / wide, _BELOW / tall, 1 - (_LEFT + _RIGHT) / wide, _BARS / tall))
    codes = len(shares)
    axes.bar(np.arange(1, codes + 1), 100 * shares, width=1.0, color=_FILL, linewidth=0)
    axes.axhline(100 / codes, color=INK, linewidth=1, linestyle="--", label="all alike")
    axes.set_xlim(0.5, codes + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("code, in falling order")
    axes.set_ylabel("% of places")
    axes.grid(axis="y")
    axes.legend(loc="upper right")


def _coloured(vectors: npt.NDArray[np.float64], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A colour (K, 3) for each code, by principal components over the places of those that occur."""
    found = np.unique(indices)
    cloud = vectors[indices.flatten()]
    mean = cloud.mean(0)
    _, _, axes = np.linalg.svd((cloud - mean).T @ (cloud - mean))
    parts = np.zeros((len(vectors), 3))
    parts[:, : min(3, len(axes))] = (vectors - mean) @ axes[:3].T
    low, high = parts[found].min(0), parts[found].max(0)
    colours = 0.1 + 0.85 * (parts - low) / np.maximum(high - low, 1e-12)
    scaled: npt.NDArray[np.float32] = colours.clip(0, 1).astype(np.float32)
    return scaled
