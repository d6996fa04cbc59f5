"""What the pictures share: one style, one palette, checked arrays, and saving."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from ppl_vae.files import PathLike, write_whole

__all__ = [
    "Array",
    "DPI",
    "INK",
    "class_colours",
    "class_names",
    "number",
    "points",
    "save",
    "styled",
]

Array = torch.Tensor | npt.NDArray[Any]
"""What the pictures accept: a tensor on any device or an array."""

P = ParamSpec("P")
T = TypeVar("T")

DPI = 150
# Neutral greys, so that a film of grey images is grey throughout and needs no reduced palette.
INK = "#2a2a2a"
_SOFT = "#8e8e8e"

# Ten colours chosen by Petroff (2021, arXiv:2107.02270) to stay apart for colour-blind readers.
_PALETTE = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip

# The caller's own settings of these must not show through, so they start from matplotlib's defaults.
_GROUPS = (
    r"^(agg|axes|figure|font|grid|hist|image|legend|lines|markers|mathtext|patch|path|savefig|scatter|text"
    r"|xtick|ytick)\."
)

_STYLE: dict[str, Any] = {
    **matplotlib.rcParamsDefault.find_all(_GROUPS),
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handletextpad": 0.6,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run `draw` under the house style and put every setting back afterwards."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context():
            with warnings.catch_warnings():
                # A default that a later matplotlib deprecates is none of the reader's concern.
                warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
                matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return inside


def to_numpy(values: Array | Sequence[Any], name: str) -> npt.NDArray[Any]:
    """An array on the CPU, whatever came; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers; got an array of dtype {array.dtype}")
    return array


def points(z: Array, name: str = "z") -> npt.NDArray[np.float64]:
    """Checked points (N, d) in float64.

    Raises:
        ValueError: not of rank 2, empty, or not finite.
    """
    array = to_numpy(z, name)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (N, d) with N, d >= 1; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values: has the training diverged?")
    return array.astype(np.float64)


def class_names(
    y: Array | Sequence[int], size: int, classes: Sequence[str], name: str = "labels"
) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Checked labels (N,) and the name of each one that occurs, in rising order.

    Args:
        y: whole numbers, one per datum; -1 where a label is missing.
        size: N, how many there must be.
        classes: the name of label 0, 1, ...; empty: the number itself is the name.
        name: what the argument is called, for the error.

    Raises:
        ValueError: wrong length, not whole numbers, or a label without a name.
    """
    array = to_numpy(y, name)
    if array.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), one per datum; got {array.shape}")
    codes = array.astype(np.int64) if np.isfinite(array).all() else np.zeros(0, np.int64)
    if codes.shape != array.shape or not (codes == array).all():
        raise ValueError(f"{name} must be whole numbers (class labels); got {array[:5]}...")
    present = [int(code) for code in np.unique(codes)]
    unknown = [code for code in present if classes and not -1 <= code < len(classes)]
    if unknown:
        raise ValueError(f"{name} holds {unknown}, but classes names only 0 to {len(classes) - 1}")
    return codes, {c: str(c) if not classes else "no label" if c == -1 else str(classes[c]) for c in present}


def class_colours(count: int) -> list[Any]:
    """`count` colours: the palette as far as it goes, beyond that equal steps through viridis."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.95, count)))


def number(value: float, form: str) -> str:
    """A number as text, with a true minus sign and no negative zero."""
    text = format(value, form)
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


@styled
def save(fig: Figure, path: PathLike) -> Path:
    """Write a figure as PNG at 150 dots per inch (or as PDF or SVG, by the suffix) in one step.

    A reader never sees half a picture: the file is written beside `path` and then moved there.

    Returns:
        The path written.

    Raises:
        ValueError: the path cannot be written, or its suffix is not png, pdf or svg.
    """
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "pdf", "svg"):
        raise ValueError(f"path must end in .png, .pdf or .svg; got {path}")
    return write_whole(path, lambda file: fig.savefig(file, format=kind, dpi=DPI))
