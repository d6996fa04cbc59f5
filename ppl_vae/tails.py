"""Pareto-smoothed importance sampling: do the largest weights tell how large others may be, and what if they do.

Means of weights fail by their tail, which K draws hardly show. The M largest weights are taken for draws from a
generalised Pareto distribution above the next one; its shape k says how many moments the weights have, about 1/k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FEWEST", "khat_threshold", "pareto"]

FEWEST = 25  # particles whose tail, a fifth of them, has five: fewer weights say nothing of a shape
SAME = 1e-5  # of log weights: float32 gives densities of some hundred nats no more digits


def khat_threshold(particles: int) -> float:
    """min(1 - 1 / log10 K, 0.7), above which k-hat tells against L_K (Vehtari et al. 2024, eq. 13).

    Args:
        particles: K.

    Raises:
        ValueError: fewer than 25 particles.

    >>> khat_threshold(100), khat_threshold(100_000)
    (0.5, 0.7)
    """
    _tail(particles)
    return min(1 - 1 / math.log10(particles), 0.7)


def _tail(particles: int) -> int:
    """M = ⌈min(K / 5, 3 √K)⌉ (Vehtari et al. 2024, appendix H)."""
    if particles < FEWEST:
        raise ValueError(
            f"particles must be at least {FEWEST}, got {particles}: the tail of fewer weights cannot be fitted; "
            "raise particles, or use `log_likelihood`, which has no k-hat"
        )
    return math.ceil(min(particles / 5, 3 * math.sqrt(particles)))


@torch.no_grad()
def pareto(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto k-hat of importance weights, and the smoothed weights (Vehtari et al. 2024).

    The tail is what exceeds the (M + 1)-th largest weight, M = ⌈min(K / 5, 3 √K)⌉; weights equal to it are no
    part. Smoothing puts quantiles of the fitted distribution in their places, none above the largest weight.

    Args:
        log_weights: of K particles for each of B data, in nats, (K, B); -inf is a particle of no weight.

    Returns:
        k-hat (B,) and smoothed log weights (K, B), float64. Up to `khat_threshold` means can be trusted, and that
        of smoothed weights varies less; it is a bound in neither direction. k-hat is -inf where the largest
        weights are all the same, as with the exact posterior for a guide, and inf where fewer than five stand out,
        or none is possible; nothing is smoothed then. Discrete latents of few values make such weights, though
        theirs are bounded: judge those by the effective sample size, or sum them out. Both are NaN for a datum
        with a weight that is NaN or infinite.

    Raises:
        ValueError: no table of at least 25 particles.

    >>> khat, smoothed = pareto(torch.linspace(-1, 0, 400).log1p().reshape(400, 1))  # a bounded tail: k < 0
    >>> bool(khat < 0), smoothed.shape
    (True, torch.Size([400, 1]))
    """
    if log_weights.dim() != 2:
        raise ValueError(f"log_weights: expected a table (K, B), got shape {tuple(log_weights.shape)}")
    count, log_weights = _tail(len(log_weights)), log_weights.double()
    wrong = (log_weights.isnan() | log_weights.isposinf()).any(0)
    log_weights = log_weights.masked_fill(wrong, 0.0)
    top, places = log_weights.topk(count + 1, dim=0)
    largest, last = top[0], top[-1]
    shift = torch.where(largest > -math.inf, largest, 0.0)
    cutoff = (last - shift).exp().clamp_min(torch.finfo(torch.float64).tiny)
    tail, smoothed = (top - shift).exp(), log_weights.clone()
    flat = largest - last < SAME  # not where both are -inf
    khat = torch.where(flat, -math.inf, math.inf).double()
    # Ties at the cutoff, as discrete latents have them, shorten the tail of a datum: one fit for each length.
    lengths = torch.where(flat, 0, (tail > cutoff).sum(0))
    for length in sorted({*lengths.tolist()}):
        if length < 5:
            continue
        rows = (lengths == length).nonzero().squeeze(1)
        shape, scale = _fit(tail[:length, rows] - cutoff[rows])
        fitted = shape.isfinite()
        khat[rows] = torch.where(fitted, shape, math.inf)
        smooth = (_quantiles(shape, scale, length) + cutoff[rows]).clamp_max(1.0).log() + shift[rows]
        smoothed[places[:length, rows], rows] = torch.where(fitted, smooth.flip(0), top[:length, rows])
    return khat.masked_fill(wrong, math.nan), smoothed.masked_fill(wrong, math.nan)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale σ of the generalised Pareto distribution of n draws (n, B), the largest first.

    The posterior mean of -k / σ by quadrature (Zhang & Stephens 2009, where k has the other sign), then k drawn
    towards 0.5 as if by 10 further draws (Vehtari et al. 2024).
    """
    n = len(excess)
    points = 30 + math.isqrt(n)
    ranks = torch.arange(1, points + 1, dtype=excess.dtype, device=excess.device) - 0.5
    quartile = excess[n - math.floor(n / 4 + 0.5)]
    grid = 1 / excess[0] + (1 - (points / ranks).sqrt()).unsqueeze(1) / (3 * quartile)
    shapes = torch.stack([torch.log1p(-point * excess).mean(0) for point in grid])  # one by one, to save memory
    profile = n * ((-grid / shapes).log() - shapes - 1)
    ratio = (profile.softmax(0) * grid).sum(0)
    shape = torch.log1p(-ratio * excess).mean(0)
    return (n * shape + 10 * 0.5) / (n + 10), -shape / ratio


def _quantiles(shape: Tensor, scale: Tensor, count: int) -> Tensor:
    """Quantiles (i - ½) / n of generalised Pareto distributions, (n, B): about what n sorted draws are."""
    at = (torch.arange(count, dtype=shape.dtype, device=shape.device) + 0.5).unsqueeze(1) / count
    return scale * torch.expm1(-shape * torch.log1p(-at)) / shape
