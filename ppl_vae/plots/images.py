"""Grids of images: reconstructions, prior samples, one row per label.

A grid is one array with thin gaps, drawn pixel for pixel on one axes: a thousand images cost one draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from ppl_vae.plots.common import DPI, Array, class_names, styled, to_numpy

__all__ = ["image_grid", "label_rows", "reconstructions", "samples"]

Pictures = npt.NDArray[np.float32]

_GAP_COLOUR = 0.90
_SIDE = 72  # pixels an image is magnified to, about half an inch on the page
_WIDEST = 2400
_PAD = 18
_TITLE = 48
_LABEL_SIZE = 9.0


class Mosaic(NamedTuple):
    """A grid of images as one picture: pixels (H, W, 3) and the middle of each row and column in them."""

    pixels: Pictures
    rows: list[float]
    columns: list[float]


def pictures(images: Array, shape: Sequence[int], name: str = "images") -> Pictures:
    """Images as (N, H, W, 3) in [0, 1].

    Args:
        images: (N, H*W), (N, C*H*W) or (N, *shape), on the scale [0, 1].
        shape: (H, W) for grey or (C, H, W) with C = 1 or 3.
        name: what the argument is called, for the error.

    Raises:
        ValueError: wrong sizes, NaN, whole numbers past 1, or a shape that is no picture.
    """
    shape = tuple(int(side) for side in shape)
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))) or min(shape) < 1:
        raise ValueError(f"shape must be (H, W) or (C, H, W) with C = 1 or 3; got {shape}")
    array = to_numpy(images, name)
    if not len(array.shape) or len(array) == 0 or array.shape[1:] not in (shape, (math.prod(shape),)):
        wanted = f"(N, {math.prod(shape)}) or (N, {', '.join(map(str, shape))}) with N >= 1"
        raise ValueError(f"{name} must have shape {wanted} to show pictures of {shape}; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values: has the training diverged?")
    if array.dtype.kind in "iu" and array.max() > 1:
        raise ValueError(f"{name} must be on the scale [0, 1]; got whole numbers up to {array.max()}: divide")
    channels = array.reshape(-1, *((1, *shape) if len(shape) == 2 else shape))
    colour = np.broadcast_to(channels, (len(array), 3, *shape[-2:]))
    return np.clip(colour.transpose(0, 2, 3, 1).astype(np.float32), 0.0, 1.0)


def tile(rows: Sequence[Pictures], breaks: Sequence[int] = (), side: int = _SIDE) -> Mosaic:
    """Lay out rows of pictures (n, H, W, 3) in thin frames.

    Short rows stay empty to the right, a wider gap stands before the rows in `breaks`, and pictures
    smaller than `side` pixels are magnified by the whole number that comes nearest to it.
    """
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    zoom = max(1, min(round(side / max(height, width)), _WIDEST // (columns * width)))
    height, width = height * zoom, width * zoom
    gap = max(2, round(0.05 * min(height, width)))
    lefts = [gap + column * (width + gap) for column in range(columns)]
    tops: list[int] = []
    for row in range(len(rows)):
        extra = 4 * gap if row in breaks else 0
        tops.append(gap if row == 0 else tops[-1] + height + gap + extra)
    canvas = np.ones((tops[-1] + height + gap, lefts[-1] + width + gap, 3), np.float32)
    for top, row_pictures in zip(tops, rows, strict=True):
        for left in lefts[: len(row_pictures)]:
            canvas[top - gap : top + height + gap, left - gap : left + width + gap] = _GAP_COLOUR
        for left, picture in zip(lefts, row_pictures, strict=False):
            canvas[top : top + height, left : left + width] = picture.repeat(zoom, 0).repeat(zoom, 1)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    return Mosaic(canvas, [top + middle_y for top in tops], [left + middle_x for left in lefts])


def text_width(text: str, size: float, weight: str = "normal") -> int:
    """Width of a line of text at `size` points, in pixels of the page."""
    if not text.strip():
        return 0
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans", weight=weight))
    return math.ceil(path.get_extents().width / 72 * DPI)


def page(
    mosaic: Mosaic, title: str, *, left: int = _PAD, bottom: int = _PAD, width: int = 0
) -> tuple[Figure, Axes]:
    """An axes that shows the mosaic pixel for pixel on a figure of its own, under a title.

    `left` and `bottom` are margins, `width` the least width of the whole, all in pixels.
    """
    height_px, width_px = mosaic.pixels.shape[:2]
    top = _TITLE if title else _PAD
    wide = max(left + width_px, _PAD + text_width(title, 11, "bold"), width - _PAD) + _PAD
    tall = bottom + height_px + top
    fig = Figure(figsize=(wide / DPI, tall / DPI), dpi=DPI)
    axes = fig.add_axes((left / wide, bottom / tall, width_px / wide, height_px / tall))
    axes.imshow(mosaic.pixels, vmin=0.0, vmax=1.0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        fig.text(min(left, _PAD) / wide, 1 - 0.62 * top / tall, title, size=11, weight="bold", va="center")
    return fig, axes


def labelled_page(mosaic: Mosaic, title: str, labels: Sequence[str], width: int = 0, bottom: int = _PAD) -> Figure:
    """`page` with a label left of each row, in a margin as wide as the longest one."""
    margin = max((text_width(label, _LABEL_SIZE) for label in labels), default=0)
    fig, axes = page(mosaic, title, left=_PAD + margin + (14 if margin else 0), bottom=bottom, width=width)
    if margin:
        axes.set_yticks(mosaic.rows, labels, fontsize=_LABEL_SIZE)
        axes.tick_params(length=0, pad=14 / DPI * 72 / 2)
    return fig


@styled
def image_grid(
    images: Array,
    shape: Sequence[int],
    columns: int | None = None,
    title: str = "",
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Images from left to right, top to bottom; small ones are magnified.

    Args:
        images: (N, D) or (N, *shape) in [0, 1]; values outside are shown as 0 or 1.
        shape: (H, W) for grey, (C, H, W) with C = 1 or 3.
        columns: images per row; default: about as many as rows.
        title: above the grid.
        row_labels: one text left of each row.

    Raises:
        ValueError: wrong sizes, NaN, columns below 1, or not one label per row.

    Example:
        >>> import torch
        >>> fig = image_grid(torch.rand(10, 64), (8, 8), columns=5, title="Noise")
        >>> [axes.get_images()[0].get_array().shape for axes in fig.axes]
        [(156, 384, 3)]
    """
    cells = pictures(images, shape)
    columns = math.ceil(math.sqrt(len(cells))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"row_labels must hold one label for each of {len(rows)} rows; got {len(row_labels)}")
    return labelled_page(tile(rows), title, row_labels or ())


@styled
def reconstructions(
    x: Array, means: Array, shape: Sequence[int], columns: int = 10, title: str = "Inputs and reconstructions"
) -> Figure:
    """Inputs, and under each the mean of p(x | z) at its code: means, not noise.

    Args:
        x: inputs (N, D) in [0, 1].
        means: reconstructions (N, D).
        shape: (H, W) or (C, H, W).
        columns: images per row; more inputs start a new pair of rows.
        title: above the grid.

    Raises:
        ValueError: wrong sizes, NaN, columns below 1, or not as many means as inputs.
    """
    rows, labels = paired_rows(pictures(x, shape, "x"), pictures(means, shape, "means"), columns)
    return labelled_page(tile(rows, range(2, len(rows), 2)), title, labels)


def paired_rows(x: Pictures, means: Pictures, columns: int) -> tuple[list[Pictures], list[str]]:
    """Alternating rows of inputs and means, and their labels."""
    if len(x) != len(means):
        raise ValueError(f"means must be as many as x; got {len(means)} means for {len(x)} inputs")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    starts = range(0, len(x), columns)
    rows = [part[start : start + columns] for start in starts for part in (x, means)]
    return rows, ["input", "mean"] * len(starts)


def samples(
    means: Array,
    shape: Sequence[int],
    columns: int | None = None,
    title: str = "Samples from the prior (means)",
) -> Figure:
    """Draws z ~ p(z), each shown as the mean of p(x | z).

    Args:
        means: (N, D) in [0, 1].
        shape: (H, W) or (C, H, W).
        columns: images per row; default: about as many as rows.
        title: above the grid.

    Raises:
        ValueError: as `image_grid`.
    """
    return image_grid(means, shape, columns, title)


@styled
def label_rows(
    means: Array,
    labels: Array | Sequence[int],
    shape: Sequence[int],
    classes: Sequence[str] = (),
    title: str = "Samples for each label (means)",
) -> Figure:
    """One row per label, in rising order, of what a conditional model draws for it.

    Args:
        means: (N, D) in [0, 1], in any order.
        labels: (N,) whole numbers.
        shape: (H, W) or (C, H, W).
        classes: names of label 0, 1, ...; empty: the number is shown.
        title: above the grid.

    Raises:
        ValueError: wrong sizes, NaN, or a label without a name.
    """
    cells = pictures(means, shape, "means")
    codes, names = class_names(labels, len(cells), classes)
    return labelled_page(tile([cells[codes == code] for code in names]), title, list(names.values()))
