"""Bounds on log p(x): maps from log importance weights (K, B) to (B,), in nats per datum.

log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q. A bound says nothing about gradients: that is an estimator's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

__all__ = ["Bound", "elbo", "iwae"]

Bound = Callable[[Tensor], Tensor]


def elbo(log_weight: Tensor) -> Tensor:
    """Evidence lower bound, the mean of K single-sample bounds (Kingma & Welling 2014, eq. 2).

    >>> import torch
    >>> elbo(torch.tensor([[1.0], [3.0]]))
    tensor([2.])
    """
    return log_weight.mean(0)


def iwae(log_weight: Tensor) -> Tensor:
    """Importance-weighted bound log 1/K Σ w_k, between the ELBO and log p(x) (Burda et al. 2016, eq. 8).

    >>> import torch
    >>> round(float(iwae(torch.tensor([[0.0], [math.log(3.0)]])).exp()), 6)
    2.0
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))
