"""Estimators: how to differentiate any bound. Each returns (B,) values with the right value and gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ppl_vae.bounds import Bound
from ppl_vae.pairs import Pair
from ppl_vae.traces import KL, LogTerms, log_terms

__all__ = ["Estimator", "pathwise", "require_reparameterised"]


class Estimator(Protocol):
    """A differentiable estimate of a bound for each datum of a batch."""

    def __call__(
        self,
        bound: Bound,
        pair: Pair,
        *batch: Tensor,
        particles: int,
        beta: Tensor | float = 1.0,
        kl: KL = "sampled",
    ) -> Tensor:
        """Return the bound per datum, (B,), whose gradient estimates the bound's."""


def pathwise(
    bound: Bound, pair: Pair, *batch: Tensor, particles: int, beta: Tensor | float = 1.0, kl: KL = "sampled"
) -> Tensor:
    """Reparameterised gradients through z = g(ε, φ) (Kingma & Welling 2014, section 2.4).

    Raises:
        ValueError: a latent's distribution has no reparameterised sampler; the message names its site.
    """
    terms = log_terms(pair, *batch, particles=particles, kl=kl)
    require_reparameterised(terms)
    return bound(terms.weight(beta))


def require_reparameterised(terms: LogTerms) -> None:
    """Raise ValueError, naming the first site, if some latent's draws carry no gradient."""
    if terms.score_only:
        raise ValueError(
            f"site {terms.score_only[0]!r}: its distribution has no reparameterised sampler, so a pathwise "
            "gradient would be wrong; use pyro.infer.Trace_ELBO() or TraceGraph_ELBO() as objective, "
            "or a relaxed distribution in the guide"
        )
