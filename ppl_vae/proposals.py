"""Guides made wider, as proposals that miss less of the posterior than a guide fitted by the ELBO does."""

from __future__ import annotations

import math

from ppl_vae.moving import Moving, Within, moved
from ppl_vae.pairs import Pair, Program, as_pair

__all__ = ["widened"]

ADVICE = "draw some from the prior instead, with `importance(..., defensive=0.1)`"


def widened(program: Program | Pair, factor: float) -> Pair:
    """The same model with a guide whose draws are spread about their means: z' = m + factor (z - m).

    m is the mean of a site's distribution, given the latents drawn before it. Guides fitted by the ELBO are
    narrower than posteriors, and weights p / q have heavy tails there; a factor such as 1.2 often lightens them,
    and `log_likelihood`, `importance`, `elbo` and annealing from the guide stay the bounds they are.

    Parameters are those of ``program``, and training one trains the other. A point stays a point.

    Args:
        program: the pair.
        factor: above 1 for a wider guide, below 1 for a narrower one.

    Raises:
        ValueError: a factor that is not positive and finite; and where the pair is used, naming the site, a
            latent whose support is not all real numbers, or whose distribution has no mean.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(0.5 * x, 0.5))
    >>> from ppl_vae.evaluate import log_likelihood
    >>> narrow, x = Pair(model, guide), torch.zeros(4)
    >>> exact = log_likelihood(widened(narrow, 2**0.5), x, particles=2)  # the posterior's scale, √½
    >>> [round(float(value), 4) for value in exact.value]  # log N(0; 0, 2)
    [-1.2655, -1.2655, -1.2655, -1.2655]
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    return Within(as_pair(program), lambda: Moving(lambda site: moved(site["fn"], factor), ADVICE))
