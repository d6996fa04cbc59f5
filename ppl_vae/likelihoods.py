"""Likelihoods p(x | z, c): what a decoder's output means, on a stated scale of the data.

The Gaussian likelihood is `ppl_vae.conditionals.Normal`, for real-valued data.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional
from ppl_vae.nets import output_bias

__all__ = ["Bernoulli"]


class Bernoulli(Conditional):
    """Independent binary pixels, log-odds from a net. Data: exactly 0 or 1.

    Args:
        net: module of the context giving logits of the event's shape.
        event_dim: how many rightmost dimensions make one event.

    >>> from ppl_vae.nets import MLP
    >>> Bernoulli(MLP(20, 200, 784))(torch.zeros(3, 20)).event_shape
    torch.Size([784])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        self.net = net
        self.event_dim = event_dim

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the Bernoulli with batch shape that of the context."""
        return dist.Bernoulli(logits=self.net(*context)).to_event(self.event_dim)

    def start_from(self, x: Tensor) -> None:
        """Start the logits at those of the mean of ``x`` (N, d), clipped to [.001, .999] (Burda et al. 2016)."""
        mean = x.mean(0).flatten()
        bias = output_bias(self.net, mean.numel())
        with torch.no_grad():
            bias.copy_(torch.logit(mean.to(bias), eps=1e-3))
