"""Score-function estimators: gradients of any bound where draws carry none, and what lowers their variance.

For z_k ~ q and a bound f of all log weights, ∇ E f = E[Σ_k f ∇ log q(z_k) + ∇f]: the density of each draw is made
likelier by what came of it. From f, anything may be subtracted that does not depend on z_k: a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor, nn
from torch.func import vmap

from ppl_vae.bounds import Bound
from ppl_vae.estimators import repeated
from ppl_vae.pairs import Batch, Pair
from ppl_vae.sites import Site, base, statements
from ppl_vae.traces import KL, LogTerms, check_table, log_density, run_guide, run_model, tabulate, with_values

__all__ = ["NVIL", "Score", "leave_one_out", "score", "scored_run", "vimco"]

Replace = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """The score-function estimator, for any bound, guide and latent, discrete or not.

    Args:
        replace: log weights (K, B) -> for each particle a stand-in made of the others', (K, B). The baseline of
            particle k is the bound with w_k replaced by it. None: no baseline.
        paths: draws that carry a gradient keep it, and only the others are scored: for programs with discrete
            and continuous latents.
    """

    replace: Replace | None = None
    paths: bool = False

    def __call__(
        self,
        bound: Bound,
        pair: Pair,
        *batch: Tensor,
        particles: int,
        beta: Tensor | float = 1.0,
        kl: KL = "sampled",
    ) -> Tensor:
        """Return the bound per datum, (B,).

        Raises:
            ValueError: a baseline of other particles with fewer than two; a guide that draws points (Delta), or
                random numbers outside its sites, as dropout does, between draws that carry a gradient.
        """
        if self.replace is not None and particles < 2:
            raise ValueError(f"particles must be at least 2 for a baseline made of the others, got {particles}")
        terms, log_q = scored_run(pair, batch, particles, kl=kl, paths=self.paths)
        weight = terms.weight(beta)
        value = bound(weight)
        signal = value.detach() - self.baselines(bound, weight.detach())
        return value + _no_value((signal * log_q).sum(0))

    def baselines(self, bound: Bound, log_weight: Tensor) -> Tensor | float:
        """The bound without each of the particles, (K, B)."""
        if self.replace is None:
            return 0.0
        own = torch.eye(len(log_weight), dtype=torch.bool, device=log_weight.device)[:, :, None]
        replaced = torch.where(own, self.replace(log_weight)[:, None], log_weight)  # (K, K, B): row k without k
        found: Tensor = vmap(bound)(replaced)
        return found


def _mean_of_others(log_weight: Tensor) -> Tensor:
    """Log of the geometric mean of the other weights, (K, B)."""
    return (log_weight.sum(0) - log_weight) / (len(log_weight) - 1)


def _log_mean_of_others(log_weight: Tensor) -> Tensor:
    """Log of the arithmetic mean of the other weights, (K, B)."""
    own = torch.eye(len(log_weight), dtype=torch.bool, device=log_weight.device)[:, :, None]
    others = log_weight.expand(len(log_weight), *log_weight.shape).masked_fill(own, -math.inf)
    return others.logsumexp(1) - math.log(len(log_weight) - 1)


score = Score()
"""No baseline (Williams 1992): right in the mean, of large variance."""

leave_one_out = Score(_log_mean_of_others)
"""The baseline has w_k replaced by the others' mean; for the importance-weighted bound it is the others'."""

vimco = Score(_mean_of_others)
"""The bound with w_k replaced by the others' geometric mean (Mnih & Rezende 2016, eq. 6 to 8)."""


class NVIL(nn.Module):
    """The score-function estimator with a learned baseline (Mnih & Gregor 2014, section 2.3).

    The baseline is net(x) + c, with c a running mean of what the net leaves. The net is trained on the squared
    error, along with the pair, by a term of the objective without value. (The paper's division of the signal by
    its running deviation is left out: it is another step size, and Adam's affair.)

    Args:
        net: module of the batch giving (B,) or (B, 1) numbers, for instance ``MLP(784, 100, 1)``.
        decay: of the running mean.
        paths: as of `Score`.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    centre: Tensor

    def __init__(self, net: nn.Module, decay: float = 0.9, paths: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.net, self.decay, self.paths = net, decay, paths
        self.register_buffer("centre", torch.zeros(()))

    def forward(
        self,
        bound: Bound,
        pair: Pair,
        *batch: Tensor,
        particles: int,
        beta: Tensor | float = 1.0,
        kl: KL = "sampled",
    ) -> Tensor:
        """Return the bound per datum, (B,).

        Raises:
            ValueError: as by `Score`; a net that does not give one number per datum.
        """
        terms, log_q = scored_run(pair, batch, particles, kl=kl, paths=self.paths)
        value = bound(terms.weight(beta))
        expected = self.net(*batch).flatten() + self.centre.clone()
        if expected.shape != value.shape:
            raise ValueError(f"net: expected one number per datum, {len(value)}, got {len(expected)}")
        signal = value.detach() - expected.detach()
        if torch.is_grad_enabled():
            self.centre.add_((1 - self.decay) * signal.mean())
        error = -0.5 * (value.detach() - expected).square()
        return value + _no_value((signal * log_q).sum(0) + error)


def _no_value(term: Tensor) -> Tensor:
    """A term's gradient without its value."""
    return term - term.detach()


def scored_run(
    pair: Pair, batch: Batch, particles: int, *, kl: KL = "sampled", paths: bool = False
) -> tuple[LogTerms, Tensor]:
    """Run guide and model on draws that are constants, and the log-densities whose score is to be taken.

    Args:
        pair: the pair.
        batch: its batch.
        particles: K.
        kl: as in `log_terms`.
        paths: leave draws that carry a gradient as they are, and score the others alone.

    Returns:
        The table, and Σ log q of the scored draws, (K, B).

    Raises:
        ValueError: as by `Score`.
    """
    check_table(pair, batch, particles)
    guide = run_guide(pair, batch, particles)
    if not paths and any(_carries(site) for site in statements(guide).values()):
        # Densities at detached draws: the guide runs again, for what later draws depend on.
        with repeated(pair):
            guide = run_guide(pair, batch, particles, with_values(guide, Tensor.detach))
    model = run_model(pair, batch, particles, guide)
    sites = statements(guide).values()
    auxiliary = any(s["infer"].get("is_auxiliary") for s in sites)
    for site in sites:
        if not paths and not auxiliary and isinstance(base(site["fn"]), Delta):
            raise ValueError(f"site {site['name']!r}: the guide draws a point, which has no score; use pathwise")
    chosen = [s for s in sites if not (paths and s["fn"].has_rsample)]
    return tabulate(model, guide, batch, particles, kl=kl), log_density(chosen, batch, particles)


def _carries(site: Site) -> bool:
    value: Any = site["value"]
    return torch.is_tensor(value) and value.requires_grad
