"""Draws that come in sets, in which what is odd or mixed in their noise cancels."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, TransformedDistribution

from ppl_vae.sites import base

__all__ = ["balanced", "power_of_two"]


def balanced(law: TorchDistribution, count: int) -> Tensor:
    """Draws, (count, B, D); those of normals in sets that differ by signs alone.

    Within a set the signs are the columns of a Hadamard matrix and their negatives. So entries of the noise, and
    products of two, sum to zero over a set as their expectations are: what is linear in the noise, or mixes two
    latents, has no part in a gradient's error. Of two latents whose numbers differ by a multiple of half the count
    the products do not. Each draw by itself is one of the law.

    The price: a set has one size for each latent, so that of what is even in the noise it tells as little as one
    draw. It pays where posteriors are near to normal.

    Args:
        law: with batch shape (B,) and event (D,).
        count: a power of two, from 2.

    Raises:
        ValueError: another count.
    """
    if count < 2 or count != power_of_two(count):
        raise ValueError(f"count must be a power of two, at least 2, got {count}")
    first, maps = (law.base_dist, law.transforms) if isinstance(law, TransformedDistribution) else (law, ())
    normal = base(first)
    drawn: Tensor
    if not isinstance(normal, Normal | MultivariateNormal):
        drawn = law.rsample((count,))
        return drawn
    latent = normal.loc.shape[-1]
    size = min(power_of_two(latent), count // 2)
    signs = normal.loc.new_ones(1, 1)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    columns = signs[:, torch.arange(latent, device=signs.device) % size]
    noise = torch.randn_like(normal.loc.expand(count // (2 * size), 1, *normal.loc.shape)) * columns.unsqueeze(1)
    noise = torch.stack([noise, -noise]).flatten(0, 2)
    if isinstance(normal, Normal):
        drawn = normal.loc + normal.scale * noise
    else:
        drawn = normal.loc + (normal.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    for change in maps:
        drawn = change(drawn)
    return drawn


def power_of_two(least: int) -> int:
    """The smallest that is not below ``least``."""
    return 1 << (least - 1).bit_length()
