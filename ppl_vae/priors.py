"""Priors p(z | c): conditionals of nothing, or of the condition c alone."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional, NetScale, Normal

__all__ = ["StandardNormal", "conditional_normal"]


class StandardNormal(Conditional):
    """N(0, I) over ``latent`` dimensions, whatever the context.

    Raises:
        ValueError: ``latent`` below one.

    >>> StandardNormal(20)().event_shape
    torch.Size([20])
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.register_buffer("loc", torch.zeros(latent))
        self.register_buffer("scale", torch.ones(latent))
        self.loc: Tensor
        self.scale: Tensor

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return N(0, I) without batch shape: the plate around the site expands it."""
        return dist.Normal(self.loc, self.scale).to_event(1)


def conditional_normal(net: nn.Module) -> Normal:
    """p(z | c) = N(μ(c), diag σ²(c)) (Sohn et al. 2015, section 4.1); ``net`` gives ``2 * latent`` numbers."""
    return Normal(net, NetScale())
