"""Bounds on log p(x): maps from log importance weights (K, B) to (B,), in nats per datum.

log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q. A bound says nothing about gradients: that is an estimator's.
It may know its own derivatives in log w, in its attribute ``derivatives``; see `derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

__all__ = ["Bound", "derivatives", "elbo", "iwae"]

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


def derivatives(bound: Bound, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """First derivatives f_k and diagonal second derivatives f_kk of a bound f in each log w_k.

    A bound that has closed forms gives them as its attribute ``derivatives``, a function of log weights; for
    others the gradient is differentiated K times at once, in memory K times that of the weights.

    Returns:
        Two tensors (K, B).

    >>> import torch
    >>> [d.flatten().tolist() for d in derivatives(iwae, torch.zeros(2, 1))]
    [[0.5, 0.5], [0.25, 0.25]]
    """
    closed: Callable[[Tensor], tuple[Tensor, Tensor]] | None = getattr(bound, "derivatives", None)
    if closed is not None:
        return closed(log_weight)
    slope = grad(lambda w: bound(w).sum())  # data do not mix, so the sum's derivatives are those of each datum
    units = torch.eye(len(log_weight), dtype=log_weight.dtype, device=log_weight.device)[:, :, None]
    pulled: tuple[Tensor, Callable[[Tensor], tuple[Tensor]]] = vjp(slope, log_weight)  # type: ignore[assignment]
    first, back = pulled
    (rows,) = vmap(back)(units.expand(-1, *log_weight.shape))  # (K, K, B)
    own = torch.arange(len(rows), device=rows.device)
    return first, rows[own, own]


def _elbo_derivatives(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(log_weight, 1 / len(log_weight)), torch.zeros_like(log_weight)


def _iwae_derivatives(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    share = log_weight.softmax(0)
    return share, share - share**2


elbo.derivatives = _elbo_derivatives  # type: ignore[attr-defined]
iwae.derivatives = _iwae_derivatives  # type: ignore[attr-defined]
