"""Figures of a run, on held-out data and from the prior."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.axes import AXES
from ppl_vae.coding import code_indices
from ppl_vae.data import Images
from ppl_vae.evaluate import decode, encode, reconstruct, sample
from ppl_vae.files import read_text
from ppl_vae.folders import FIGURES, METRICS, RunFolder, refuse_links, shown
from ppl_vae.pairs import Batch
from ppl_vae.plots import (
    code_maps,
    curves,
    label_rows,
    latent_plane,
    latent_scatter,
    pca_plane,
    reconstructions,
    samples,
    save,
)

__all__ = ["draw_figures"]

SCATTERED, MOST_ROWS = 1000, 50  # how many data the scatter shows, how many labels
MOST_HISTORY = 64 * 2**20  # bytes of metrics.csv


def draw_figures(run: RunFolder, images: Images) -> list[Path]:
    """Draw training curves, reconstructions, samples and the latent space of a run, on the test split.

    Returns:
        The files written. Curves need an epoch, the latent plane two data and two dimensions of z.

    Raises:
        ValueError: metrics.csv is missing or damaged, or a file cannot be written.
    """
    folder = run.path / FIGURES
    history = _history(run.path / METRICS)
    title = "Bound during training" if run.config.codes is None else "Log p of codes during training"
    figures: dict[str, Figure] = {"curves.png": curves(history, title)} if history else {}
    figures |= _inferred(run, images) | (_generated(run) if run.pictures else {})
    refuse_links(run.path)
    folder.mkdir(exist_ok=True)
    return [save(figure, folder / name) for name, figure in figures.items()]


def _inferred(run: RunFolder, images: Images) -> dict[str, Figure]:
    """Figures of held-out data: reconstructions, codes, and the plane that the codes spread in."""
    program, split = run.program, images.test[:SCATTERED]
    columns = shown(run, split)
    some = tuple(column[:30] for column in columns)
    figures = {}
    if run.pictures:
        figures["reconstructions.png"] = reconstructions(some[0], reconstruct(program, *some).cpu(), run.shape)
    if AXES["model"][run.config.model].codes:
        figures["codes.png"] = _codes(run, columns)
        return figures
    codes = encode(program, *columns)
    name = "z" if "z" in codes else min(codes)  # of several levels, that next to the data
    z = codes[name].cpu()
    flat = z.shape[1] <= 2
    if not flat and len(z) < 2:
        return figures  # no plane through a single code
    of = "" if len(codes) == 1 else f" {name}"
    figures["latent.png"] = latent_scatter(z, split.y, images.classes, f"Latent codes{of}")
    if z.shape[1] > 1 and run.config.plane:
        lift = _plane(z) if not flat else None
        rest = {other: code.mean(0) for other, code in codes.items() if other != name}
        figures["plane.png"] = latent_plane(
            lambda plane: decode(
                program,
                {name: plane if lift is None else lift(plane)}
                | {other: mean.expand(len(plane), *mean.shape) for other, mean in rest.items()},
            ).cpu(),
            run.shape,
            title=f"Decoded latent plane{of} (means)",
            names=("$z_1$", "$z_2$") if flat else ("principal component 1", "principal component 2"),
        )
    return figures


def _codes(run: RunFolder, columns: Batch) -> Figure:
    """Which codes pictures have, and how often each is used."""
    (indices,) = code_indices(run.program, columns).values()
    return code_maps(columns[0], indices, run.program.posterior.codebook.vectors, run.shape)


def _plane(z: Tensor) -> Callable[[Tensor], Tensor]:
    """The plane of the first principal components of codes, in standard deviations: few priors are N(0, I)."""
    project, lift = pca_plane(z)
    spread = project(z).std(0)
    return lambda plane: lift(plane * spread)


def _generated(run: RunFolder) -> dict[str, Figure]:
    """Means of draws from the prior; of a model that takes labels, a row for each."""
    if not run.config.given:
        return {"samples.png": samples(sample(run.program, 64, mean=True).cpu(), run.shape)}
    rows = torch.arange(min(len(run.classes), MOST_ROWS)).repeat_interleave(10)
    means = sample(run.program, len(rows), rows, mean=True).cpu()
    return {"labels.png": label_rows(means, rows, run.shape, run.classes)}


def _history(path: Path) -> list[dict[str, float]]:
    """The rows that `LogCSV` wrote."""
    try:
        rows = csv.DictReader(read_text(path, MOST_HISTORY).splitlines())
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"run: {path} is missing or damaged ({error})") from error
