"""Sigmoid belief networks: hierarchies whose latents are binary units (Neal 1992; Mnih & Gregor 2014).

They are a choice of conditionals, not a program of their own: `HierarchicalVAE` with Bernoulli units. A draw of
0 or 1 carries no gradient, so they are trained by estimators that use the score, such as `ppl_vae.scores.vimco`,
or by Pyro's TraceGraph_ELBO.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from ppl_vae.discrete import Constant
from ppl_vae.hierarchies import HierarchicalVAE
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.nets import MLP

__all__ = ["sigmoid_belief_network"]


def sigmoid_belief_network(*sizes: int, hidden: Sequence[int] = ()) -> HierarchicalVAE:
    """A belief network of binary units over binary data, with a guide from the bottom up.

    p(z_L) has learned log-odds; every other layer is Bernoulli given the one above it, and in the guide given
    the one below it. The log-odds are linear in the layer (Mnih & Gregor 2014, section 3), or come from
    deterministic tanh layers between (the non-linear networks of Maddison et al. 2017, section 5.2).

    Args:
        *sizes: units per layer, the data's first: 784, 200, 200 is 784 pixels under two layers of 200 units.
        hidden: widths of the deterministic layers between each two stochastic ones; none for a linear network.

    Raises:
        ValueError: fewer than two sizes, a size or a width below one.

    >>> sigmoid_belief_network(784, 200, 200).blank(3)[0].shape
    torch.Size([3, 784])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            "sizes: expected those of the data and of one or more layers of units, all positive, such as "
            f"784, 200, 200; got {sizes}"
        )
    if min(hidden, default=1) < 1:
        raise ValueError(f"hidden must be positive widths, or none for a linear network; got {tuple(hidden)}")

    def units(inputs: int, outputs: int) -> Bernoulli:
        return Bernoulli(MLP(inputs, *hidden, outputs, activation=nn.Tanh))

    down = [units(above, below) for below, above in pairwise(sizes)]
    up = [units(below, above) for below, above in pairwise(sizes)]
    top = Bernoulli(Constant(torch.zeros(sizes[-1]), learned=True))
    return HierarchicalVAE([*down[1:], top], down[0], up)
