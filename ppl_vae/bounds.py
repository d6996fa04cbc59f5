"""Bounds on log p(x): maps from log importance weights (K, B) to (B,), in nats per datum.

log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q. A bound says nothing about gradients: that is an estimator's.
It may know its own derivatives in log w, in its attribute ``derivatives``; see `derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

__all__ = ["Bound", "Grouped", "Mixed", "Renyi", "Thermodynamic", "derivatives", "elbo", "iwae"]

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


@dataclass(frozen=True)
class Renyi:
    """Rényi's bound 1 / (1 - α) log 1/K Σ w_k^(1 - α) (Li & Turner 2016, eq. 4).

    With α = 0 it is the importance-weighted bound, towards α = 1 the ELBO. It is a lower bound on log p(x) for
    α from 0 to 1; a negative α lies above the importance-weighted bound, and may lie above log p(x).

    Args:
        alpha: α, not 1.

    Raises:
        ValueError: α is 1 or not finite.

    >>> import torch
    >>> Renyi(0.0)(torch.zeros(4, 1))
    tensor([0.])
    """

    alpha: float

    def __post_init__(self) -> None:
        if self.alpha == 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"alpha must be finite and other than 1, where the bound is the ELBO; got {self.alpha}"
            )

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Return the bound, (B,)."""
        return iwae((1 - self.alpha) * log_weight) / (1 - self.alpha)

    def derivatives(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares s of w^(1 - α), and (1 - α)(s - s²)."""
        share = ((1 - self.alpha) * log_weight).softmax(0)
        return share, (1 - self.alpha) * (share - share**2)


def _name(bound: Bound) -> str:
    return getattr(bound, "__name__", repr(bound))


@dataclass(frozen=True, repr=False)
class Grouped:
    """The mean of a bound over groups of particles: MIWAE for `iwae` (Rainforth et al. 2018, eq. 8).

    Args:
        bound: of each group.
        groups: M; the particles are to be a multiple of it.

    Raises:
        ValueError: fewer than one group; particles that do not make groups of one size.
    """

    bound: Bound
    groups: int

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Return the bound, (B,)."""
        return self.bound(self.split(log_weight)).reshape(self.groups, -1).mean(0)

    def __repr__(self) -> str:
        return f"Grouped({_name(self.bound)}, {self.groups})"

    def split(self, log_weight: Tensor) -> Tensor:
        """The particles of a group as (K / M, M B): groups are to a bound as data are."""
        if len(log_weight) % self.groups:
            raise ValueError(f"particles: {len(log_weight)} do not make {self.groups} groups of one size")
        grouped = log_weight.reshape(self.groups, -1, log_weight.shape[1])
        return grouped.transpose(0, 1).flatten(1)

    def derivatives(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the group that a particle is in, divided by M."""
        first, second = (
            part.reshape(-1, self.groups, log_weight.shape[1]).transpose(0, 1).flatten(0, 1) / self.groups
            for part in derivatives(self.bound, self.split(log_weight))
        )
        return first, second


@dataclass(frozen=True, repr=False)
class Mixed:
    """A convex combination s f + (1 - s) g of two bounds: CIWAE for `elbo` and `iwae` (Rainforth et al. 2018).

    Args:
        share: s.
        first: f.
        second: g.

    Raises:
        ValueError: a share outside [0, 1].
    """

    share: float
    first: Bound = elbo
    second: Bound = iwae

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Return the bound, (B,)."""
        return self.share * self.first(log_weight) + (1 - self.share) * self.second(log_weight)

    def __repr__(self) -> str:
        return f"Mixed({self.share}, {_name(self.first)}, {_name(self.second)})"

    def derivatives(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same combination of those of both bounds."""
        (a, b), (c, d) = derivatives(self.first, log_weight), derivatives(self.second, log_weight)
        return self.share * a + (1 - self.share) * c, self.share * b + (1 - self.share) * d


@dataclass(frozen=True)
class Thermodynamic:
    """The thermodynamic lower bound, a left Riemann sum (Masrani et al. 2019, eq. 9).

    log 1/K Σ w_k is the integral over t from 0 to 1 of Σ_k s_k(t) log w_k, with s(t) the shares of w^t, which
    grows with t. A left sum is therefore at most `iwae`, and a lower bound on log p(x) for any K.

    Args:
        points: 0 = t_0 < t_1 < ... < 1, where the integrand is taken; with 0 alone it is the ELBO.

    Raises:
        ValueError: points that do not start at 0, do not rise, or reach 1.
    """

    points: tuple[float, ...]

    def __init__(self, points: Sequence[float]) -> None:
        object.__setattr__(self, "points", tuple(float(t) for t in points))
        rising = all(a < b for a, b in pairwise((*self.points, 1.0)))
        if not self.points or self.points[0] != 0 or not rising:
            raise ValueError(f"points must start at 0, rise, and stay below 1, got {self.points}")

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Return the bound, (B,)."""
        total = torch.zeros_like(log_weight[0])
        for t, after in pairwise((*self.points, 1.0)):
            share = (t * log_weight).softmax(0)
            total = total + (after - t) * (share * log_weight.masked_fill(share == 0, 0.0)).sum(0)
        return total

    def derivatives(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over t of the derivatives of Σ s(t) log w, times the steps."""
        first, second = torch.zeros_like(log_weight), torch.zeros_like(log_weight)
        for t, after in pairwise((*self.points, 1.0)):
            share = (t * log_weight).softmax(0)
            slope = share * (1 + t * (log_weight - (share * log_weight).sum(0)))
            first = first + (after - t) * slope
            second = second + (after - t) * t * ((1 - share) * slope + share * (1 - slope))
        return first, second


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
