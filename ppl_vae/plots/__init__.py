"""Pictures of a run: pure functions from arrays to a matplotlib `Figure`.

Nothing here knows a model, touches `pyplot` or changes a global setting, so it all works without a
display and inside any other program. `save` writes a figure in one step; `film_frame` and `write_gif`
make the film of a training run.
"""

from __future__ import annotations

from ppl_vae.plots.codes import code_maps
from ppl_vae.plots.common import Array, save
from ppl_vae.plots.film import film_frame, write_gif
from ppl_vae.plots.images import image_grid, label_rows, reconstructions, samples
from ppl_vae.plots.judging import (
    bounds,
    calibration,
    gap_bars,
    khat_histogram,
    rate_distortion,
    spectrum,
)
from ppl_vae.plots.latent import latent_plane, latent_scatter, pca_plane
from ppl_vae.plots.training import curves

__all__ = [
    "Array",
    "bounds",
    "calibration",
    "code_maps",
    "curves",
    "film_frame",
    "gap_bars",
    "image_grid",
    "khat_histogram",
    "label_rows",
    "latent_plane",
    "latent_scatter",
    "pca_plane",
    "rate_distortion",
    "reconstructions",
    "samples",
    "save",
    "spectrum",
    "write_gif",
]
