"""Normals of full and low-rank covariance whose KL to a diagonal normal is a closed form.

torch knows KL(q || p) between two multivariate normals, and Pyro that of a diagonal q to a multivariate p. What a
variational autoencoder needs is the other way round: a correlated posterior against a diagonal prior. It is
registered for the two classes below and not for torch's own, whose table of closed forms is everybody's.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["FullNormal", "LowRankNormal", "kl_to_diagonal"]


class FullNormal(dist.MultivariateNormal):  # type: ignore[misc]
    """N(μ, L Lᵀ), with a closed KL to diagonal normals; arguments as of ``pyro.distributions.MultivariateNormal``.

    >>> import torch
    >>> from torch.distributions import kl_divergence
    >>> q = FullNormal(torch.zeros(2), scale_tril=torch.eye(2))
    >>> float(kl_divergence(q, dist.Normal(torch.tensor([1.0, 0.0]), 1.0).to_event(1)))
    0.5
    """


class LowRankNormal(dist.LowRankMultivariateNormal):  # type: ignore[misc]
    """N(μ, W Wᵀ + D), with a closed KL to diagonal normals; arguments as of Pyro's LowRankMultivariateNormal."""


def kl_to_diagonal(q: FullNormal | LowRankNormal, p: dist.Independent) -> Tensor:
    """KL(q || p) for normal q and p = N(m, diag s²): -H(q) - log N(μ; m, s²) + ½ Σ Var_q(z) / s², in nats.

    The mean log-density under a diagonal normal needs the marginal variances of q alone.

    Raises:
        NotImplementedError: p is not a vector of independent normals, as torch asks of closed forms.
    """
    normal = p.base_dist
    if p.reinterpreted_batch_ndims != 1 or not isinstance(normal, torch.distributions.Normal):
        raise NotImplementedError
    cross: Tensor = normal.log_prob(q.mean) - 0.5 * q.variance / normal.variance  # type: ignore[no-untyped-call]
    divergence: Tensor = -q.entropy() - cross.sum(-1)
    return divergence


for _family in (FullNormal, LowRankNormal):
    register_kl(_family, torch.distributions.Independent)(kl_to_diagonal)  # type: ignore[no-untyped-call]
