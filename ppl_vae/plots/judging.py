"""Pictures of what judges a model: bounds, weights, gaps, calibration, units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.estimates import Average, Estimate
from ppl_vae.plots.common import INK, Array, class_colours, number, styled, to_numpy

__all__ = ["bounds", "calibration", "gap_bars", "khat_histogram", "rate_distortion", "spectrum"]

_LINE, _MARKED, _BAND = "#3f90da", "#e76300", "#94a4a2"
_MARKERS = {"lower": "^", "upper": "v", "unbiased": "o"}
_SAME = 1e-12


@styled
def bounds(
    curves: Mapping[str, Sequence[tuple[int, Estimate]]],
    effort: str = "particles",
    title: str = "Bounds on log p(x)",
) -> Figure:
    """Bounds against the effort spent on them: particles, or distributions of an annealing.

    Each is a mean over data, with two Monte Carlo standard errors to each side where these are known. The data are
    the same along a curve, so that their own error has no part in its slope. Triangles point to where log p(x)
    lies: up from a lower bound, down from an upper one.

    Args:
        curves: name -> (effort, estimate), in any order.
        effort: what the horizontal axis counts.
        title: above the picture.

    Raises:
        ValueError: no estimate; an effort below one.
    """
    if not curves or not all(curves.values()):
        raise ValueError("curves: expected at least one estimate for each name")
    if any(n < 1 for curve in curves.values() for n, _ in curve):
        raise ValueError(f"curves: {effort} must be at least 1")
    fig = Figure(figsize=(6.6, 4.2), layout="constrained")
    axes = fig.subplots()
    for (name, curve), colour in zip(curves.items(), class_colours(len(curves)), strict=True):
        ordered = sorted(curve, key=lambda point: point[0])
        direction = ordered[0][1].direction
        axes.errorbar(
            [n for n, _ in ordered],
            [estimate.mean for _, estimate in ordered],
            yerr=[2 * np.nan_to_num(estimate.monte_carlo_stderr) for _, estimate in ordered],
            color=colour,
            marker=_MARKERS[direction],
            markersize=5,
            capsize=2.5,
            label=f"{name} ({direction})" if direction != "unbiased" else name,
        )
    axes.set_xscale("log")
    axes.set_xlabel(effort)
    axes.set_ylabel("nats per datum")
    axes.grid(axis="y")
    axes.legend(loc="best")
    axes.set_title(title)
    return fig


@styled
def khat_histogram(khat: Array, limit: float = 0.7, title: str = "Pareto k-hat of the weights") -> Figure:
    """How many data have which k-hat, and the share beyond the limit, where importance sampling is in doubt.

    Args:
        khat: one number per datum (N,). Those that are infinite are counted at the ends.
        limit: up to which weights are trusted, as `ppl_vae.tails.khat_threshold` has it.
        title: above the picture.

    Raises:
        ValueError: not one number per datum.
    """
    values = to_numpy(khat, "khat").astype(np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"khat: expected one number per datum, got shape {values.shape}, perhaps with NaN")
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    low, high = min(low, 0.0) - 0.05, max(high, limit) + 0.05
    values = values.clip(low, high)
    fig = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = fig.subplots()
    # The limit is the edge of a bin, so that no bar is on both of its sides.
    width = max((high - low) / 40, 1e-3)
    edges = np.concatenate(
        [np.arange(limit, low - width, -width)[::-1], np.arange(limit + width, high + width, width)]
    )
    for part, colour, name in (
        (values[values <= limit], _LINE, f"trusted, at most {limit:.2g}"),
        (values[values > limit], _MARKED, "in doubt"),
    ):
        axes.hist(
            part,
            edges.tolist(),
            color=colour,
            label=f"{name}: {len(part) / len(values):.1%} of {len(values)} data",
        )
    axes.margins(y=0.3)  # room for the legend
    axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel("k-hat")
    axes.set_ylabel("data")
    axes.legend(loc="best")
    axes.set_title(title)
    return fig


@styled
def gap_bars(rows: Mapping[str, Mapping[str, Average]], title: str = "Where log p(x) and the ELBO part") -> Figure:
    """What lies between log p(x) and the ELBO, a bar for each model, with two standard errors of each part.

    Args:
        rows: model -> part -> its size in nats, the same parts for each model, such as "approximation" and
            "amortisation".
        title: above the picture.

    Raises:
        ValueError: no model, or models of different parts.
    """
    parts = [tuple(row) for row in rows.values()]
    if not parts or not parts[0] or len({*parts}) > 1:
        raise ValueError(f"rows: expected the same parts for each model, got {parts}")
    fig = Figure(figsize=(6.6, 1.6 + 0.55 * len(rows)), layout="constrained")
    axes = fig.subplots()
    places, left = np.arange(len(rows)), np.zeros(len(rows))
    for part, colour in zip(parts[0], class_colours(len(parts[0])), strict=True):
        sizes = np.array([row[part].mean for row in rows.values()])
        errors = np.nan_to_num([2 * row[part].stderr for row in rows.values()])
        axes.barh(places, sizes, left=left, color=colour, label=part, height=0.6)
        left = left + sizes
        axes.errorbar(left, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("nats per datum")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.35 / len(rows) - 0.15), ncols=len(parts[0]))
    axes.set_title(title)
    return fig


@styled
def calibration(
    difference: Array,
    points: Array,
    band: tuple[Array, Array],
    outside: Array | None = None,
    title: str = "Calibration of the guide",
) -> Figure:
    """The ranks' distribution function less the uniform one, a line for each latent dimension, and the band.

    A guide too narrow gives lines that rise first and then fall below, one too wide the reverse, a biased one an
    arch.

    Args:
        difference: (L, *dimensions), as `ppl_vae.calibration.Calibration` gives it.
        points: where, (L,).
        band: lower and upper bound, (L,), of what a calibrated dimension stays within.
        outside: which dimensions are marked; by default those that leave the band.
        title: above the picture.

    Raises:
        ValueError: shapes that do not go together.
    """
    lines, at = to_numpy(difference, "difference").astype(np.float64), to_numpy(points, "points")
    lower, upper = (to_numpy(b, "band").astype(np.float64) for b in band)
    if not lines.ndim or lines.shape[:1] != at.shape or lower.shape != at.shape or upper.shape != at.shape:
        raise ValueError(
            f"difference: expected (L, ...) at L points in a band of L, got shapes {lines.shape}, {at.shape}, "
            f"{lower.shape}"
        )
    lines = lines.reshape(len(at), -1)
    left = (lines < lower[:, None] - _SAME) | (lines > upper[:, None] + _SAME)
    marked = np.asarray(left.any(0) if outside is None else to_numpy(outside, "outside").reshape(-1) > 0)
    fig = Figure(figsize=(6.6, 3.9), layout="constrained")
    axes = fig.subplots()
    axes.fill_between(
        at, lower, upper, color=_BAND, alpha=0.3, linewidth=0, label="band of one that is calibrated"
    )
    for mask, colour, name in ((~marked, _LINE, "calibrated"), (marked, _MARKED, "not calibrated")):
        if mask.any():
            axes.plot(at, lines[:, mask], color=colour, linewidth=1, alpha=0.7)
            axes.plot([], [], color=colour, label=f"{name}: {mask.sum()} of {len(mask)} dimensions")
    axes.margins(y=0.25)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("rank of the latent among draws of the guide, as a share")
    axes.set_ylabel("ECDF less uniform")
    axes.legend(loc="best")
    axes.set_title(title)
    return fig


@styled
def rate_distortion(
    points: Sequence[tuple[float, Average, Average]], title: str = "Rate and distortion over β"
) -> Figure:
    """Distortion against rate, a point for each β; along a dotted line the ELBO is the same.

    Args:
        points: (β, rate, distortion), nats per datum.
        title: above the picture.

    Raises:
        ValueError: no point.
    """
    if not points:
        raise ValueError("points: there are none to draw")
    ordered = sorted(points, key=lambda point: point[1].mean)
    rates, distortions = (np.array([p[i].mean for p in ordered]) for i in (1, 2))  # type: ignore[union-attr]
    fig = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = fig.subplots()
    _level_lines(axes, rates, distortions)
    errors = [[np.nan_to_num(2 * p[i].stderr) for p in ordered] for i in (1, 2)]  # type: ignore[union-attr]
    axes.errorbar(
        rates, distortions, xerr=errors[0], yerr=errors[1], color=_LINE, marker="o", markersize=5, capsize=2
    )
    for beta, rate, distortion in ordered:
        axes.annotate(
            f"β = {beta:g}", (rate.mean, distortion.mean), xytext=(6, 6), textcoords="offset points", fontsize=8.5
        )
    axes.set_xlabel("rate, KL(q || p) (nats per datum)")
    axes.set_ylabel("distortion, −E log p(x | z) (nats per datum)")
    axes.set_title(title)
    return fig


def _level_lines(axes: Axes, rates: npt.NDArray[np.float64], distortions: npt.NDArray[np.float64]) -> None:
    """Lines of one ELBO each, through the picture; the best point's is drawn out."""
    span = max(float(np.ptp(rates)), float(np.ptp(distortions)), 1.0)
    best = float((rates + distortions).min())
    x = np.array([rates.min() - 0.1 * span, rates.max() + 0.1 * span])
    for step in range(6):
        label = f"best ELBO {number(-best, '.2f')}" if step == 0 else None
        total = best + step * span / 4
        axes.plot(x, total - x, color=_BAND, linewidth=1.2 if step == 0 else 0.8, linestyle=":", label=label)
    axes.set_ylim(distortions.min() - 0.15 * span, distortions.max() + 0.15 * span)
    axes.set_xlim(*x)
    axes.legend(loc="upper right")


@styled
def spectrum(
    variance: Mapping[str, Array], threshold: float = 1e-2, title: str = "Spectrum of the units"
) -> Figure:
    """Var_x(E_q[z | x]) of the units in falling order, on a logarithmic scale; those above the threshold count.

    Args:
        variance: latent site -> one number per dimension, as `ppl_vae.ActiveUnits` has them.
        threshold: above which a unit is active.
        title: above the picture.

    Raises:
        ValueError: no units, or a variance that is negative or NaN.
    """
    fig = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = fig.subplots()
    if not variance:
        raise ValueError("variance: there are no units to draw")
    for (name, values), colour in zip(variance.items(), class_colours(len(variance)), strict=True):
        ordered = np.sort(to_numpy(torch.as_tensor(values).flatten(), "variance").astype(np.float64))[::-1]
        if not len(ordered) or not (ordered >= 0).all():
            raise ValueError(f"variance: those of {name} must be at least 0, and one or more")
        active = int((ordered > threshold).sum())
        axes.plot(
            np.arange(1, len(ordered) + 1),
            ordered.clip(1e-12),
            color=colour,
            marker="o",
            markersize=3.5,
            label=f"{name}: {active} of {len(ordered)} active",
        )
    axes.axhline(threshold, color=INK, linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axes.set_yscale("log")
    axes.set_xlabel("unit, in falling order")
    axes.set_ylabel("variance of its posterior mean")
    axes.grid(axis="y")
    axes.legend(loc="best")
    axes.set_title(title)
    return fig
