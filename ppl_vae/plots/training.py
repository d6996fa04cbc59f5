"""The course of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppl_vae.plots.common import INK, number, styled

__all__ = ["curves"]

Column = npt.NDArray[np.float64]

_TRAIN, _VALID = "#3f90da", "#e76300"


@styled
def curves(history: Sequence[Mapping[str, Any]], title: str = "Bound during training") -> Figure:
    """Training and validation bound against the epoch; the best epoch is marked.

    The validation curve carries a band of one standard error to each side where the history has one. The
    learning rate gets a small panel of its own if it changes. If the first epochs lie so far below the
    others that the rest would be a flat line, the axis starts above them and the figure says so.

    Args:
        history: one mapping per epoch with "epoch" and "train" and, if there, "valid", "valid_stderr" and
            "lr"; bounds in nats per datum, higher is better. NaN: not measured at that epoch.
        title: above the curves.

    Raises:
        ValueError: no rows, no epoch or train in a row, or no finite bound at all.

    Example:
        >>> fig = curves([{"epoch": 1, "train": -30.0}, {"epoch": 2, "train": -20.0}])
        >>> fig.axes[0].get_ylabel()
        'bound (nats per datum)'
    """
    epoch, train, valid, stderr, rate = _columns(history)
    changes = len(np.unique(rate[np.isfinite(rate)])) > 1
    fig = Figure(figsize=(6.6, 4.8 if changes else 3.9), layout="constrained")
    panels = fig.subplots(1 + changes, 1, sharex=True, squeeze=False, height_ratios=[4, 1][: 1 + changes])[:, 0]
    _draw_bounds(panels[0], epoch, train, valid, stderr)
    panels[0].set_title(title)
    if changes:
        panels[1].plot(epoch, rate, color=INK, linewidth=1.4)
        panels[1].set_ylabel("learning rate")
        panels[1].set_ylim(bottom=0)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panels[-1].margins(x=0.02)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    fig.align_ylabels(list(panels))
    return fig


def _columns(history: Sequence[Mapping[str, Any]]) -> tuple[Column, Column, Column, Column, Column]:
    """Epoch, train, valid, its standard error and learning rate; what is missing or infinite is NaN."""
    if not len(history):
        raise ValueError("history is empty: train for at least one epoch before drawing its curves")
    for row in history:
        if "epoch" not in row or "train" not in row:
            raise ValueError(f"history: every row needs 'epoch' and 'train'; got a row with {sorted(row)}")
    keys = ("epoch", "train", "valid", "valid_stderr", "lr")
    table = np.array([[float(row.get(key, np.nan)) for key in keys] for row in history])
    table[~np.isfinite(table)] = np.nan
    if np.isnan(table[:, 1:3]).all():
        raise ValueError("history holds no finite bound: the training diverged in its first epoch")
    epoch, train, valid, stderr, rate = table.T
    return epoch, train, valid, stderr, rate


def _draw_bounds(axes: Axes, epoch: Column, train: Column, valid: Column, stderr: Column) -> None:
    """Both curves, the band, the best epoch and the legend."""
    marker = "o" if len(epoch) <= 15 else None
    axes.plot(epoch, train, color=_TRAIN, marker=marker, markersize=3.5, label="training")
    seen = ~np.isnan(valid)
    if seen.any():
        marker = "o" if seen.sum() <= 15 else None
        axes.plot(epoch[seen], valid[seen], color=_VALID, marker=marker, markersize=3.5, label="validation")
    band = seen & ~np.isnan(stderr)
    if band.any():
        low, high = valid[band] - stderr[band], valid[band] + stderr[band]
        axes.fill_between(epoch[band], low, high, color=_VALID, alpha=0.22, linewidth=0, label="± 1 std. error")
    _mark_best(axes, epoch, valid if seen.any() else train, stderr, _VALID if seen.any() else _TRAIN)
    axes.set_ylabel("bound (nats per datum)")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    _zoom(axes, epoch, np.concatenate([train, valid]))


def _mark_best(axes: Axes, epoch: Column, bound: Column, stderr: Column, colour: str) -> None:
    """A ring at the highest bound, its value in the legend, where it cannot cover a curve."""
    best = int(np.nanargmax(bound))
    error = f" ± {stderr[best]:.2g}" if np.isfinite(stderr[best]) else ""
    axes.plot(
        epoch[best],
        bound[best],
        linestyle="none",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=1.4,
        zorder=5,
        label=f"best: {number(float(bound[best]), '.2f')}{error}, epoch {epoch[best]:g}",
    )


def _zoom(axes: Axes, epoch: Column, bounds: Column) -> None:
    """Leave the first epochs out of view when they take more than 60% of the height, and say it."""
    early = max(1, len(epoch) // 20)
    late = bounds.reshape(2, -1)[:, early:]
    if len(epoch) < 10 or np.isnan(late).all():
        return
    low, high = np.nanmin(late), np.nanmax(bounds)
    if high - low < 0.4 * (high - np.nanmin(bounds)):
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        which = f"epoch {epoch[0]:g}" if early == 1 else f"epochs {epoch[0]:g} to {epoch[early - 1]:g}"
        note = f"not shown: {which}, from {number(float(np.nanmin(bounds)), '.4g')}"
        axes.text(1.0, 1.02, note, transform=axes.transAxes, ha="right", fontsize=8, color="#707070")
