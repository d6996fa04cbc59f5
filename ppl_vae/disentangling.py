"""Disentanglement: how well single latents stand for single factors of the data, where the factors are known.

Codes are those of data of which every factor is known; factors are discrete. Nothing here knows a model.

References:
    Chen, Li, Grosse & Duvenaud 2018, "Isolating sources of disentanglement in variational autoencoders".
    Kim & Mnih 2018, "Disentangling by factorising".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vae.rng import seeded

__all__ = ["factor_score", "mutual_information", "mutual_information_gap"]


def mutual_information(codes: Tensor, factors: Tensor, bins: int = 20) -> Tensor:
    """I(z_j; v_k) of every latent and every factor, of codes sorted into bins.

    A histogram's information is biased upwards, by about (bins - 1) (values - 1) / (2 N) nats where there is none,
    and is at most log(bins). (Chen et al. 2018, eq. 5, take q(z_j | x) itself, which needs the pair.)

    Args:
        codes: (N, d), draws from the posterior, and not its means: bins adapt to a latent's range, so that even a
            mean that hardly moves would seem to tell much; among draws that movement is lost in their noise.
        factors: (N, m), the factors' values, of which each must occur more than once.
        bins: of equal width, from the least to the largest of each latent.

    Returns:
        Nats (d, m), float64.

    Raises:
        ValueError: wrong shapes, codes that are not finite, a factor that never changes, a value that occurs
            once, fewer than two bins.

    >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    >>> mutual_information(v.float(), v)
    tensor([[1.3863, 0.0000],
            [0.0000, 1.0986]], dtype=torch.float64)
    """
    return _informations(codes, _checked(codes, factors), bins)


def _informations(codes: Tensor, values: list[Tensor], bins: int) -> Tensor:
    """I(z_j; v_k), (d, m), of factors that are checked."""
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    z = codes.detach().cpu().double()
    low, high = z.amin(0), z.amax(0)
    place = (bins * (z - low) / (high - low).clamp_min(torch.finfo(z.dtype).tiny)).long().clamp_max(bins - 1)
    return torch.stack([torch.stack([_information(a, b) for b in values]) for a in place.T])


def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = 20) -> Tensor:
    """How far ahead of all others the latent is that knows most of a factor (MIG, Chen et al. 2018, eq. 6).

    The gap between the largest and the second largest I(z_j; v_k), divided by the factor's entropy H(v_k): 1 where
    one latent, and no other, tells the factor; 0 where two tell it equally well, or none tells it. The MIG is the
    mean over factors.

    Args:
        codes: (N, d) with d at least two; see `mutual_information`.
        factors: (N, m).
        bins: see `mutual_information`.

    Returns:
        One gap for each factor, (m,), float64, between 0 and 1.

    Raises:
        ValueError: as `mutual_information`; one latent alone, which has no second.

    >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    >>> mutual_information_gap(v.float(), v).tolist()
    [1.0, 1.0]
    """
    values = _checked(codes, factors)
    information = _informations(codes, values, bins)
    if len(information) < 2:
        raise ValueError("codes: a gap needs two or more latents, got 1")
    first, second = information.topk(2, 0).values
    entropy = torch.stack([_information(v, v) for v in values])
    gap: Tensor = (first - second) / entropy
    return gap


def factor_score(
    codes: Tensor, factors: Tensor, *, votes: int = 800, rows: int = 64, least: float = 0.01, seed: int = 0
) -> float:
    """How often the latent that varies least tells which factor was held fixed (Kim & Mnih 2018, section 4).

    A vote holds one factor, drawn at random, at a value drawn at random, takes ``rows`` data that have it, and
    notes the latent whose variance among them is the smallest share of its variance among all. Each latent stands
    for the factor that most of its votes were cast for. The paper counts how many of these votes that gets right;
    here as many fresh votes are judged, so that what was learned by heart does not count.

    Args:
        codes: (N, d), for example posterior means.
        factors: (N, m), the factors' values, of which each must occur more than once.
        votes: to learn from, and as many to judge.
        rows: data per vote, drawn with replacement.
        least: latents of smaller variance are left out: they follow the prior, and say nothing.
        seed: fixes the draws.

    Returns:
        A share of right answers s, with standard error √(s (1 - s) / votes); about 1 / m where codes and factors
        have nothing to do with each other, or no latent varies.

    Raises:
        ValueError: as `mutual_information`; fewer than one vote or two rows.

    >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    >>> factor_score(v.float(), v)
    1.0
    """
    values = _checked(codes, factors)
    if votes < 1 or rows < 2:
        raise ValueError(f"votes must be at least 1 and rows at least 2, got {votes} and {rows}")
    z = codes.detach().cpu().double()
    spread = z.var(0)
    alive = spread > least
    z = z[:, alive] / spread[alive].sqrt() if bool(alive.any()) else torch.zeros(len(z), 1, dtype=z.dtype)
    groups = [[(v == value).nonzero()[:, 0] for value in range(int(v.max()) + 1)] for v in values]
    with seeded(seed):
        cast = torch.tensor([_vote(z, groups, rows) for _ in range(2 * votes)])
    table = torch.zeros(z.shape[1], len(values), dtype=torch.long)
    table.index_put_(tuple(cast[:votes].T), torch.ones(votes, dtype=torch.long), accumulate=True)
    latent, factor = cast[votes:].T
    return float((table.argmax(1)[latent] == factor).double().mean())


def _vote(z: Tensor, groups: list[list[Tensor]], rows: int) -> tuple[int, int]:
    """The latent that varies least while a factor is held fixed, and that factor."""
    factor = int(torch.randint(len(groups), ()))
    group = groups[factor][int(torch.randint(len(groups[factor]), ()))]
    chosen = z[group[torch.randint(len(group), (rows,))]]
    return int(chosen.var(0).argmin()), factor


def _information(a: Tensor, b: Tensor) -> Tensor:
    """I(a; b) of two columns of whole numbers (N,), in nats; the entropy where they are the same."""
    high = int(b.max()) + 1
    joint = torch.bincount(a * high + b, minlength=(int(a.max()) + 1) * high).double().reshape(-1, high) / len(a)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    nats: Tensor = (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)).sum()
    return nats.clamp_min(0.0)


def _checked(codes: Tensor, factors: Tensor) -> list[Tensor]:
    """The factors as columns of whole numbers, once codes and factors suit each other."""
    for name, table in (("codes", codes), ("factors", factors)):
        if table.dim() != 2 or 0 in table.shape:
            raise ValueError(f"{name}: expected one row per datum, (N, columns), got shape {tuple(table.shape)}")
        if not bool(table.isfinite().all()):
            raise ValueError(f"{name}: hold NaN or infinite values")
    if len(codes) != len(factors):
        raise ValueError(f"codes and factors must have as many rows, got {len(codes)} and {len(factors)}")
    return [_ranked(column, k) for k, column in enumerate(factors.detach().cpu().T)]


def _ranked(column: Tensor, k: int) -> Tensor:
    """A factor's values as whole numbers from zero, refused where a value has no other datum to compare with."""
    place: Tensor
    _, place, counts = column.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    if len(counts) < 2 or int(counts.min()) < 2:
        raise ValueError(
            f"factors: column {k} has {len(counts)} values, the rarest {int(counts.min())} times; a factor needs "
            "two or more values, each two or more times. Sort a continuous factor into bins"
        )
    return place
