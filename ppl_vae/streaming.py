"""Sums over particles: exactly K draws for each datum, a chunk at a time, captured where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ppl_vae.batches import Source
from ppl_vae.capture import Captured, Engine
from ppl_vae.pairs import Batch, Pair
from ppl_vae.ranks import count_ranks
from ppl_vae.traces import KL, LogTerms, check_whole, log_terms

__all__ = [
    "Add",
    "Streamed",
    "add_means",
    "add_weights",
    "expected_rows",
    "log_mean",
    "mean_stderr",
    "weight_stderr",
]

Add = Callable[[Sequence[Tensor], LogTerms, Tensor], Sequence[Tensor]]

ROWS = 1000  # of a chunk, particles times data, count as one use of the engine's


class Streamed:
    """What is summed over K particles for each datum: memory grows with the chunk, not with K.

    Args:
        engine: how to run.
        pair: the pair, in evaluation mode.
        add: (sums so far, terms of a chunk, their log weights (k, B) in float64) -> sums.
        start: the values that the sums start from; each sum is float64 (B,).
        particles: K.
        chunk: particles held at once.
        kl: as in `log_terms`.
        batch_size: data per batch, the last may be shorter; None where a stream decides.
        rows: how many data there are, as far as known.
    """

    def __init__(
        self,
        engine: Engine,
        pair: Pair,
        add: Add,
        start: Sequence[float],
        *,
        particles: int,
        chunk: int,
        kl: KL = "sampled",
        batch_size: int | None,
        rows: float,
    ) -> None:
        self.pair, self.add, self.start, self.kl = pair, add, start, kl
        self.batch_size, self.rows = batch_size, rows
        chunk = min(chunk, particles)
        self.sizes = [chunk] * (particles // chunk) + [particles % chunk] * (particles % chunk > 0)
        # Exactly K: what K leaves over the chunks is a smaller one of its own.
        self.parts = {
            size: Captured(engine, [pair], partial(self.one, size), partial(self.uses, size))
            for size in {*self.sizes}
        }

    def uses(self, size: int, *tensors: Tensor) -> float:
        """How often such a chunk is expected, weighed by its rows; a short batch comes once."""
        length = len(tensors[-1])
        data = self.rows if self.batch_size in (None, length) else min(length, self.rows)
        return self.sizes.count(size) * size * data / ROWS

    def one(self, size: int, *tensors: Tensor) -> Sequence[Tensor]:
        """The sums after one more chunk of particles."""
        sums, batch = tensors[: len(self.start)], tensors[len(self.start) :]
        terms = log_terms(self.pair, *batch, particles=size, kl=self.kl)
        weight = terms.weight().double()
        check_whole(weight, batch)
        return self.add(sums, terms, weight)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """The sums for a batch, each float64 (B,); NaN for a datum with a weight that is."""
        size, device = len(batch[0]), batch[0].device
        sums: Sequence[Tensor] = [torch.full((size,), v, dtype=torch.float64, device=device) for v in self.start]
        for chunk in self.sizes:
            sums = self.parts[chunk](*sums, *batch)
        return sums


def expected_rows(source: Source, batch_size: int) -> float:
    """How many data a source has for each process, as far as it tells."""
    steps = source.steps(batch_size)
    return float("inf") if steps is None else steps * batch_size / count_ranks()


def add_weights(sums: Sequence[Tensor], terms: LogTerms, weight: Tensor) -> Sequence[Tensor]:
    """Log Σ w and log Σ w²; both start from -inf."""
    first, second = sums
    return torch.logaddexp(first, weight.logsumexp(0)), torch.logaddexp(second, (2 * weight).logsumexp(0))


def log_mean(first: Tensor, second: Tensor, particles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log mean(w), its standard error and the effective sample size, from log Σ w and log Σ w² of K weights.

    With none drawn the sums are of one exact weight.
    """
    ess = (2 * first - second).exp()
    return first - math.log(particles or 1), weight_stderr(ess, particles), ess


def weight_stderr(ess: Tensor, particles: int) -> Tensor:
    """Standard error of log mean(w): var(w) / mean(w)² = K / ESS - 1, with the sample variance's K - 1.

    Unknown (NaN) for one particle, and zero for none: where nothing was drawn the value is exact.
    """
    if particles < 2:
        return torch.full_like(ess, torch.nan if particles else 0.0)
    return ((particles / ess - 1).clamp_min(0) / (particles - 1)).sqrt()


def add_means(sums: Sequence[Tensor], terms: LogTerms, weight: Tensor) -> Sequence[Tensor]:
    """Σ log w, Σ rate, Σ distortion, then three of the spread: from 0, 0, 0, NaN, 0, 0."""
    total, rate, distortion, centre, first, second = sums
    # Squares are taken about the mean of the first chunk: of what is left then, squares do not cancel.
    centre = torch.where(centre.isnan(), weight.mean(0), centre)
    rest = weight - centre
    return (
        total + weight.sum(0),
        rate + terms.rate.double().sum(0),
        distortion - terms.likelihood.double().sum(0),
        centre,
        first + rest.sum(0),
        second + rest.square().sum(0),
    )


def mean_stderr(sums: Sequence[Tensor], particles: int) -> Tensor:
    """Standard error of the mean of log w, from what `add_means` has summed."""
    *_, first, second = sums
    if particles < 2:  # as in `weight_stderr`
        return torch.full_like(first, torch.nan if particles else 0.0)
    return ((second - first.square() / particles).clamp_min(0) / (particles - 1) / particles).sqrt()
