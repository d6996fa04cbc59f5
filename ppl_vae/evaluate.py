"""Evaluation: bounds on log p(x) with their errors, and what a trained pair infers and generates.

All log quantities are in nats per datum, higher is better. Every function leaves the caller's random streams
alone and puts the pair in evaluation mode for its own duration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae.batches import placed, prepare
from ppl_vae.pairs import Batch, Pair, Program, as_pair, evaluating
from ppl_vae.rng import seeded
from ppl_vae.traces import KL, LogTerms, guide_means, log_terms, predict

__all__ = [
    "ActiveUnits",
    "Estimate",
    "active_units",
    "decode",
    "elbo",
    "encode",
    "log_likelihood",
    "reconstruct",
    "sample",
]

Direction = Literal["lower", "upper", "unbiased"]


@dataclass(frozen=True)
class Estimate:
    """An estimate for each of N data, with its direction and its errors.

    Attributes:
        value: nats per datum, float64 (N,).
        stderr: Monte Carlo standard error of each value, (N,); NaN where one particle says nothing of it.
        direction: whether the expected value lies below log p(x), above it, or at it.
        diagnostics: further numbers per datum, name -> (N,), such as the effective sample size.
        name: what was estimated, for printing.
    """

    value: Tensor
    stderr: Tensor
    direction: Direction
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    name: str = "log p(x)"

    @property
    def mean(self) -> float:
        """The mean over data."""
        return float(self.value.mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of the mean over data drawn from the population; it includes the Monte Carlo error."""
        return _stderr(self.value)

    @property
    def monte_carlo_stderr(self) -> float:
        """Standard error of the mean from the draws alone, these data held fixed."""
        return float(self.stderr.square().sum().sqrt()) / len(self.stderr)

    def __str__(self) -> str:
        kind = {"lower": "lower bound", "upper": "upper bound", "unbiased": "unbiased"}[self.direction]
        draws = self.monte_carlo_stderr
        error = "" if math.isnan(draws) else f"; Monte Carlo s.e. {draws:.3f}"
        return (
            f"{self.name} = {self.mean:.3f} ± {self.mean_stderr:.3f} nats per datum "
            f"({kind}; {len(self.value)} data{error})"
        )


@torch.no_grad()
def log_likelihood(
    program: Program | Pair,
    data: Any,
    particles: int = 1000,
    *,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
) -> Estimate:
    """Importance-weighted lower bound on log p(x) (Burda et al. 2016, eq. 8), log 1/K Σ p(x, z_k) / q(z_k | x).

    Exactly K particles are drawn for each datum, ``chunk`` at a time; sums of weights are streamed, so memory
    grows with ``chunk * batch_size`` and not with K.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        particles: K.
        batch_size: data per batch.
        chunk: particles per batch held at once.
        seed: fixes the draws, and redrawn pixels.

    Returns:
        Lower bound per datum. Its standard error is the delta method's, sd(w) / (mean(w) √K). Diagnostics:
        ``ess``, the effective sample size (Σw)² / Σw²; where it is a few, distrust value and error alike.

    Raises:
        ValueError: fewer than one particle or chunk; data that do not suit the pair.
    """
    _positive(particles=particles, chunk=chunk)
    values, errors, sizes = [], [], []
    with _judging(program, seed) as pair:
        for batch in prepare(pair, data, batch_size).batches(batch_size):
            first, second = _streamed_sums(pair, batch, particles, chunk)
            ess = (2 * first - second).exp()
            values.append(first - math.log(particles))
            errors.append(_delta_stderr(ess, particles))
            sizes.append(ess)
    value, stderr, ess = (torch.cat(parts).cpu() for parts in (values, errors, sizes))
    return Estimate(value, stderr, "lower", {"ess": ess}, f"L_{particles}")


def _streamed_sums(pair: Pair, batch: Batch, particles: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Log Σ w and log Σ w² over exactly ``particles`` draws, each (B,) in float64."""
    first = second = torch.full((len(batch[0]),), -math.inf, dtype=torch.float64, device=batch[0].device)
    for start in range(0, particles, chunk):
        weight = _judged(log_terms(pair, *batch, particles=min(chunk, particles - start)), batch)
        first = torch.logaddexp(first, weight.logsumexp(0))
        second = torch.logaddexp(second, (2 * weight).logsumexp(0))
    return first, second


def _judged(terms: LogTerms, batch: Batch) -> Tensor:
    """Log weights (K, B) in float64, one column for each datum of the batch."""
    weight = terms.weight().double()
    if weight.shape[1] != len(batch[0]):
        raise ValueError(
            f"program: {weight.shape[1]} rows in its data plate for a batch of {len(batch[0])}; "
            "to judge each datum, the plate must hold the whole batch"
        )
    return weight


def _delta_stderr(ess: Tensor, particles: int) -> Tensor:
    """Standard error of log mean(w): var(w) / mean(w)² = K / ESS - 1, with the sample variance's K - 1."""
    if particles == 1:
        return torch.full_like(ess, math.nan)
    return ((particles / ess - 1).clamp_min(0) / (particles - 1)).sqrt()


@torch.no_grad()
def elbo(
    program: Program | Pair,
    data: Any,
    particles: int = 1,
    *,
    kl: KL = "auto",
    batch_size: int = 100,
    seed: int = 0,
) -> Estimate:
    """The evidence lower bound, with the rate and the distortion it is made of.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        particles: draws per datum that are averaged.
        kl: "auto" takes the KL in closed form where it holds; "sampled" and "analytic" as in `ELBO`.
        batch_size: data per batch.
        seed: fixes the draws, and redrawn pixels.

    Returns:
        ELBO per datum. Diagnostics: ``rate``, KL(q || p) in nats, and ``distortion``, -E_q log p(x | z);
        the ELBO is -(rate + distortion) (Alemi et al. 2018).

    Raises:
        ValueError: fewer than one particle; data that do not suit the pair.
    """
    _positive(particles=particles)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with _judging(program, seed) as pair:
        for batch in prepare(pair, data, batch_size).batches(batch_size):
            terms = log_terms(pair, *batch, particles=particles, kl=kl)
            weight = _judged(terms, batch)
            spread = weight.std(0) if particles > 1 else torch.full_like(weight[0], math.nan)
            columns.append(
                (weight.mean(0), spread / math.sqrt(particles), terms.rate.mean(0), -terms.likelihood.mean(0))
            )
    value, stderr, rate, distortion = (torch.cat(parts).double().cpu() for parts in zip(*columns, strict=True))
    return Estimate(value, stderr, "lower", {"rate": rate, "distortion": distortion}, "ELBO")


@dataclass(frozen=True)
class ActiveUnits:
    """Which latent dimensions a guide uses: those whose posterior mean varies over the data.

    Attributes:
        variance: latent site -> Var_x(E_q[z | x]), one number per dimension.
        threshold: a unit with more than this is active.
    """

    variance: dict[str, Tensor]
    threshold: float

    @property
    def count(self) -> dict[str, int]:
        """Latent site -> number of active units."""
        return {name: int((v > self.threshold).sum()) for name, v in self.variance.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.count[name]} of {v.numel()}" for name, v in self.variance.items())


def active_units(
    program: Program | Pair,
    data: Any,
    *,
    threshold: float = 1e-2,
    particles: int = 1,
    batch_size: int = 500,
    seed: int = 0,
) -> ActiveUnits:
    """Count active units: Var_x(E_q[z | x]) > threshold (Burda et al. 2016, section 5.1).

    Args:
        program: the pair.
        data: at least two data.
        threshold: variance above which a unit counts.
        particles: draws of earlier latents that the mean of a later one is averaged over.
        batch_size: data per batch.
        seed: fixes those draws.

    Raises:
        ValueError: fewer than two data.
    """
    with _judging(program, seed) as pair:
        batches = prepare(pair, data, batch_size).batches(batch_size)
        parts = [guide_means(pair, *b, particles=particles) for b in batches]
    means = {name: torch.cat([p[name] for p in parts]).double().cpu() for name in parts[0]}
    if len(next(iter(means.values()))) < 2:
        raise ValueError("data: active units need at least two data, got 1")
    return ActiveUnits({name: m.var(0) for name, m in means.items()}, threshold)


def encode(program: Program | Pair, *batch: Tensor, particles: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Posterior means E_q[z | x] of a batch: latent site -> (B, *event)."""
    with _judging(program, seed) as pair:
        return guide_means(pair, *placed(pair, batch), particles=particles)


def reconstruct(program: Program | Pair, *batch: Tensor, site: str | None = None, seed: int = 0) -> Tensor:
    """The likelihood's mean at the posterior mean of each datum: a picture without noise.

    Args:
        program: the pair.
        *batch: a batch as the model takes it.
        site: which observed site; may be left out where there is one.
        seed: fixes the draws of latents that have no mean.

    Returns:
        Means (B, *event).
    """
    with _judging(program, seed) as pair:
        return _only(predict(pair, *placed(pair, batch), latents="means")[2], site)[0]


def sample(
    program: Program | Pair,
    size: int,
    *context: Tensor,
    like: Batch | None = None,
    mean: bool = False,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw data from the model: z ~ p(z | c), x ~ p(x | z, c).

    Args:
        program: the pair.
        size: how many.
        *context: conditions c, one row for each sample.
        like: for a program without ``blank``: a batch of ``size`` rows of the right shapes.
        mean: return the mean of p(x | z, c) instead of a draw: the picture without its noise.
        site: which observed site; may be left out where there is one.
        seed: fixes the draws.

    Returns:
        Samples or means (size, *event).

    Raises:
        ValueError: no way to know the shapes, fewer than one sample.
    """
    _positive(size=size)
    with _judging(program, seed) as pair:
        drawn = predict(pair, *_template(pair, size, context, like), latents="prior")
    return _only(drawn[2] if mean else drawn[1], site)[0]


def decode(
    program: Program | Pair,
    latents: Mapping[str, Tensor],
    *context: Tensor,
    like: Batch | None = None,
    site: str | None = None,
) -> Tensor:
    """The likelihood's mean at given latents: interpolations, traversals, the plane of a 2-D latent.

    Args:
        program: the pair.
        latents: latent site -> (B, *event), all sites that the observed one depends on.
        *context: conditions c, (B, ...).
        like: for a program without ``blank``: a batch of B rows of the right shapes.
        site: which observed site; may be left out where there is one.

    Returns:
        Means (B, *event).

    Raises:
        ValueError: no latents, unknown ones, or of different lengths; no way to know the shapes.
    """
    sizes = {len(z) for z in latents.values()}
    if len(sizes) != 1:
        raise ValueError(f"latents: expected tensors of one length, got lengths {sorted(sizes)}")
    with _judging(program, 0) as pair:
        given = dict(zip(latents, placed(pair, tuple(latents.values())), strict=True))
        batch = _template(pair, sizes.pop(), context, like)
        drawn, _, means = predict(pair, *batch, latents=given)
    if unknown := set(given) - set(drawn):
        raise ValueError(f"latents: the model has no latent {min(unknown)!r}, but {sorted(drawn)}")
    return _only(means, site)[0]


def _template(pair: Pair, size: int, context: Batch, like: Batch | None) -> Batch:
    """A batch of the right shapes for running the model freely."""
    if like is None:
        blank = getattr(pair.program, "blank", None)
        if not callable(blank):
            raise ValueError("program: it has no `blank` method that tells its shapes; pass like=batch")
        try:
            like = blank(size, *placed(pair, context))
        except TypeError as error:
            raise ValueError(f"context: {len(context)} conditions do not suit the program ({error})") from error
    if len(like[0]) != size:
        raise ValueError(f"like: expected a batch of {size} rows, got {len(like[0])}")
    return placed(pair, like)


@contextmanager
def _judging(program: Program | Pair, seed: int) -> Iterator[Pair]:
    """A pair in evaluation mode, under one seeded stream; its mode is put back afterwards."""
    pair = as_pair(program)
    with evaluating(pair), seeded(seed, pair.device):
        yield pair


def _only(sites: dict[str, Tensor], site: str | None) -> Tensor:
    if site is None and len(sites) != 1:
        raise ValueError(f"site: the model observes {sorted(sites)}; say which")
    if site is not None and site not in sites:
        raise ValueError(f"site: the model does not observe {site!r}, but {sorted(sites)}")
    return sites[site] if site is not None else next(iter(sites.values()))


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _stderr(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
