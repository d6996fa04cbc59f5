"""What a VQ-VAE's objective is lowered by besides its bound: the losses of codebook and commitment."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vae.codes import QuantisedPoint
from ppl_vae.pairs import Batch
from ppl_vae.penalties import Penalty, Sites, features
from ppl_vae.sites import Site, base

__all__ = ["Commitment"]


class Commitment(Penalty):
    """weight * |f - sg(e)|² + |sg(f) - e|² over all quantised latents (van den Oord et al. 2017, eq. 3).

    f are the encoder's features, e the codes they were quantised to, and sg stops the gradient. The first term
    draws features to codes, the second codes to features; it is there where codes are learned, and an averaged
    codebook needs none. With residual codebooks f is what each was left with (Lee et al. 2022, section 3.1).

    Both are sums over a datum's grid, as the log-likelihood is one over its pixels; the paper divides them by the
    number of places.

    Args:
        weight: β of the paper, a buffer.

    Raises:
        ValueError: a negative weight; when run, no latent of the guide is quantised.

    >>> import ppl_vae as pv
    >>> objective = pv.ELBO(penalties=[Commitment()])
    """

    def __init__(self, weight: float = 0.25) -> None:
        super().__init__(weight)

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the losses of each datum, (B,)."""
        sites = [site for site in guide.values() if isinstance(base(site["fn"]), QuantisedPoint)]
        if not sites:
            raise ValueError(
                "Commitment: no latent of the guide is quantised; take it off, or draw one from Quantised"
            )
        return torch.stack([self._loss(site) for site in sites]).sum(0)

    def _loss(self, site: Site) -> Tensor:
        point: QuantisedPoint = base(site["fn"])
        loss = self.weight * (point.features - point.vectors.detach()).square()
        if point.codebook.learned:
            loss = loss + (point.features.detach() - point.vectors).square()
        return features(site, loss).sum(-1).mean(0)  # particles share their point
