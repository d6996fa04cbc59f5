"""Posteriors q(z | x, c): the families a guide draws its latents from."""

from __future__ import annotations

from torch import nn

from ppl_vae.conditionals import NetScale, Normal

__all__ = ["mean_field"]


def mean_field(net: nn.Module) -> Normal:
    """q(z | x) = N(μ(x), diag σ²(x)) (Kingma & Welling 2014, eq. 9); ``net`` gives ``2 * latent`` numbers.

    >>> import torch
    >>> from ppl_vae.nets import MLP
    >>> mean_field(MLP(784, 200, 2 * 20))(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """
    return Normal(net, NetScale())
