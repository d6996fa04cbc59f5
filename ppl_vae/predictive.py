"""Programs run for what they predict: means of the latents, and draws and means of what was observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.layout import inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.sites import Site, data_first, mean_of, statements
from ppl_vae.traces import by_datum, run_guide, run_model, run_pair

__all__ = ["guide_draws", "guide_means", "inspect_shapes", "predict"]


@torch.no_grad()
def guide_means(pair: Pair, *batch: Tensor, particles: int = 1) -> dict[str, Tensor]:
    """E_q[z | x] of every latent site: its distribution's mean, averaged over K draws of earlier latents.

    Exact for a one-level guide; a Rao-Blackwell average otherwise. Sites without a mean average their draws.

    Returns:
        Site name -> (B, *event), with inner plates between the two.
    """
    guide = run_pair(pair, batch, particles)[1]
    means = {name: mean_of(site) for name, site in guide.items()}
    floats = {name: m if m.is_floating_point() else m.float() for name, m in means.items()}
    return {name: data_first(guide[name], m.mean(0)) for name, m in floats.items()}


@torch.no_grad()
def guide_draws(pair: Pair, *batch: Tensor) -> dict[str, Tensor]:
    """One draw z ~ q(z | x) of every latent site: name -> (B, *event), with inner plates between the two."""
    guide = run_pair(pair, batch, 1)[1]
    return {name: data_first(site, site["value"][0]) for name, site in guide.items()}


@torch.no_grad()
def predict(
    pair: Pair,
    *batch: Tensor,
    latents: Literal["prior", "guide", "means"] | Mapping[str, Tensor] = "guide",
    particles: int = 1,
    lead: tuple[int, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Run the model with its observations left free.

    Args:
        pair: the pair.
        *batch: a batch; what the model observes of it serves as a shape only, and as input of the guide.
        latents: drawn from the "prior", from the "guide", the "means" of the guide, or given by name, each
            (*lead, B, *plates, *event).
        particles: K.
        lead: (K,), or () for given values that all particles share.

    Returns:
        Latents, draws of the observed sites, and means of the observed sites: name -> (K, B, *event), with
        inner plates between B and event.

    Raises:
        ValueError: a given latent has another shape than its site.
    """
    if isinstance(latents, Mapping):
        given = latents
    elif latents == "prior":
        given = None
    elif latents == "means":
        with _Means():
            given = run_guide(pair, batch, particles)
    else:
        given = run_guide(pair, batch, particles)
    sites = statements(run_model(pair, batch, particles, given, lead=lead, free=True))
    observed = {n: s for n, s in sites.items() if s["infer"].get("was_observed")}
    return (
        {n: by_datum(s, s["value"]) for n, s in sites.items() if n not in observed},
        {n: by_datum(s, s["value"]) for n, s in observed.items()},
        {n: by_datum(s, mean_of(s)) for n, s in observed.items()},
    )


def inspect_shapes(pair: Pair, batch: Batch) -> None:
    """Check a batch as `ppl_vae.layout.inspect` does, but for what is observed, which stands for its shape only.

    Raises:
        ValueError: the programs cannot take the batch.
    """
    known = pair.layout
    try:
        with _Redrawn():
            inspect(pair, batch)
    except TypeError as error:  # from the program's own check
        raise ValueError(f"batch: {len(batch)} tensors do not suit the program ({error})") from error
    pair.layout = known or pair.layout


class _Means(Messenger):  # type: ignore[misc]
    """Put each latent at its mean, where its distribution has one, instead of drawing it."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        msg["value"] = msg["fn"]()  # stays where there is no mean
        msg["value"] = mean_of(msg)
        msg["done"] = True


class _Redrawn(Messenger):  # type: ignore[misc]
    """Put observations at values that their distributions can have: what was observed gave the shape alone."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] and not site_is_subsample(msg) and msg["value"].shape == msg["fn"].shape():
            msg["value"] = msg["fn"].sample()
