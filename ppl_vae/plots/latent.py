"""The latent space: codes as points, and the plane decoded on a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ppl_vae.plots.common import Array, class_colours, class_names, number, points, styled
from ppl_vae.plots.images import page, pictures, tile

__all__ = ["latent_plane", "latent_scatter", "pca_plane"]

_PLAIN = "#3f90da"


class _Principal(NamedTuple):
    """Principal axes of a cloud: mean (d,), axes (2, d) orthonormal, share of the variance (2,)."""

    mean: Tensor
    axes: Tensor
    share: Tensor


def _principal(z: Array) -> _Principal:
    """The two leading principal axes of z (N, d), by the singular value decomposition of z - mean."""
    cloud = torch.from_numpy(points(z))
    if min(cloud.shape) < 2:
        raise ValueError(f"z must hold at least 2 points of 2 or more dimensions; got {tuple(cloud.shape)}")
    mean = cloud.mean(0)
    _, singular, rows = torch.linalg.svd(cloud - mean, full_matrices=False)
    axes = rows[:2]
    # An axis and its negative are equally right: let the largest loading be positive.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    variance = singular.square()
    return _Principal(mean, axes, variance[:2] / variance.sum().clamp_min(1e-300))


def pca_plane(z: Array) -> tuple[Callable[[Array], Tensor], Callable[[Array], Tensor]]:
    """The plane through the mean of a cloud along its two principal axes.

    The axes are orthonormal, so for z ~ N(0, I) the coordinates in the plane are N(0, I) about the mean
    and the quantile grid of `latent_plane` fits them as it fits a 2-D latent.

    Args:
        z: codes (N, d), N >= 2 and d >= 2.

    Returns:
        `project`, (M, d) -> (M, 2), and `lift`, (M, 2) -> (M, d), with project(lift(c)) = c; both float32.

    Raises:
        ValueError: z is not (N, d) of finite numbers with N, d >= 2.

    Example:
        >>> project, lift = pca_plane(torch.randn(100, 5))
        >>> torch.allclose(project(lift(torch.ones(3, 2))), torch.ones(3, 2), atol=1e-5)
        True
    """
    mean, axes, _ = _principal(z)

    def project(z: Array) -> Tensor:
        return ((_double(z) - mean) @ axes.T).float()

    def lift(coordinates: Array) -> Tensor:
        return (mean + _double(coordinates) @ axes).float()

    return project, lift


def _double(values: Array) -> Tensor:
    return torch.as_tensor(values).detach().cpu().double()


@styled
def latent_scatter(
    z: Array, y: Array | Sequence[int] | None = None, classes: Sequence[str] = (), title: str = "Latent codes"
) -> Figure:
    """Codes as points, coloured by label.

    d = 2 is shown as it is, d > 2 by its two leading principal components with their share of the variance
    on the axes, d = 1 as a histogram for each label.

    Args:
        z: codes (N, d), for example posterior means.
        y: labels (N,), whole numbers, or nothing.
        classes: names of label 0, 1, ...; empty: the number is shown.
        title: above the points.

    Raises:
        ValueError: wrong sizes, NaN, or a label without a name.
    """
    cloud = points(z)
    codes, names = class_names(y, len(cloud), classes, "y") if y is not None else (None, {})
    columns = -(-len(names) // 20)
    fig = Figure(figsize=(4.9 + 0.7 * columns, 4.6), layout="constrained")
    axes = fig.subplots()
    axes.set_title(title)
    colours = dict(zip(names, class_colours(len(names)), strict=True))
    if cloud.shape[1] == 1:
        _histograms(axes, cloud[:, 0], codes, colours)
    else:
        _scatter(axes, cloud, codes, colours)
    if names:
        handles = [Line2D([], [], linestyle="none", marker="o", markersize=6, color=c) for c in colours.values()]
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "ncols": columns, "handlelength": 1.0}
        axes.legend(handles, list(names.values()), **place)
    return fig


def _scatter(axes: Axes, cloud: Any, codes: Any, colours: dict[int, Any]) -> None:
    """Points in the plane, in the order of the data so that no class lies on top of the others."""
    if cloud.shape[1] > 2:
        mean, plane, share = _principal(cloud)
        cloud = (cloud - mean.numpy()) @ plane.numpy().T
        labels = [f"principal component {k + 1} ({100 * share[k]:.1f}% of the variance)" for k in (0, 1)]
    else:
        labels = ["$z_1$", "$z_2$"]
    paint = [colours[code] for code in codes] if colours else _PLAIN
    size = float(np.clip(20000 / len(cloud), 4, 24))
    axes.scatter(cloud[:, 0], cloud[:, 1], c=paint, s=size, alpha=0.8, linewidths=0, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def _histograms(axes: Axes, values: Any, codes: Any, colours: dict[int, Any]) -> None:
    """One outline per label over common bins."""
    bins = np.histogram_bin_edges(values, bins=min(50, max(8, len(values) // 20))).tolist()
    if not colours:
        axes.hist(values, bins=bins, color=_PLAIN, alpha=0.8)
    for code, colour in colours.items():
        axes.hist(values[codes == code], bins=bins, histtype="stepfilled", color=colour, alpha=0.18)
        axes.hist(values[codes == code], bins=bins, histtype="step", color=colour, linewidth=1.5)
    axes.set_xlabel("$z$")
    axes.set_ylabel("number of codes")


@styled
def latent_plane(
    decode: Callable[[Tensor], Array],
    shape: Sequence[int],
    size: int = 15,
    spread: float = 2.5,
    title: str = "Decoded latent plane (means)",
    names: tuple[str, str] = ("$z_1$", "$z_2$"),
) -> Figure:
    """The 2-D latent plane, decoded on a grid of equal prior probability, z2 upward.

    Grid lines are at z = Φ⁻¹(u), u in equal steps from Φ(-spread) to Φ(spread), Φ the distribution function
    of N(0, 1): as many pictures where the prior has much mass as it has mass (Kingma and Welling 2014,
    appendix A). For more latents pass `lambda c: decode(lift(c))` with `lift` from `pca_plane`.

    Args:
        decode: codes (M, 2), float32 on the CPU -> means (M, D) in [0, 1]; called once.
        shape: (H, W) or (C, H, W).
        size: pictures to a side.
        spread: the outermost codes, in standard deviations of the prior.
        title: above the grid.
        names: of the two axes.

    Raises:
        ValueError: size below 1, spread not positive, or decode gives the wrong number or size of pictures.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    if not 0 < spread < 8:
        raise ValueError(f"spread must be between 0 and 8 standard deviations; got {spread}")
    line = _quantiles(size, spread)
    across, up = torch.meshgrid(line, line, indexing="xy")
    # Rows of pictures run downward, so the first one is the highest z2.
    codes = torch.stack([across, up.flip(0)], -1).reshape(-1, 2)
    with torch.no_grad():
        cells = pictures(decode(codes), shape, "decode(codes)")
    if len(cells) != size**2:
        raise ValueError(f"decode must return one picture for each of {size**2} codes; got {len(cells)}")
    mosaic = tile(list(cells.reshape(size, size, *cells.shape[1:])))
    fig, axes = page(mosaic, title, left=96, bottom=84)
    ticks = sorted({round(k * (size - 1) / 4) for k in range(5)})
    marks = [number(float(line[k]), ".1f") for k in ticks]
    axes.set_xticks([mosaic.columns[k] for k in ticks], marks)
    axes.set_yticks([mosaic.rows[size - 1 - k] for k in ticks], marks)
    axes.tick_params(length=2.5, pad=2)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    return fig


def _quantiles(size: int, spread: float) -> Tensor:
    """`size` codes from -spread to spread at equal steps of probability; the middle one for size 1."""
    if size == 1:
        return torch.zeros(1)
    edge = torch.special.ndtr(torch.tensor(float(spread), dtype=torch.float64))
    steps = torch.linspace(float(1 - edge), float(edge), size, dtype=torch.float64)
    line: Tensor = torch.special.ndtri(steps)
    return line.float()
