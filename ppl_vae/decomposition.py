"""The ELBO taken apart: reconstruction and rate, the parts of the rate, and how both trade off over β.

Over a data set of N, with n drawn evenly and z ~ q(z | x_n), the rate is the index-code mutual information I(n; z)
and the KL of the aggregate q(z) = 1/N Σ_n q(z | x_n) to the prior (Hoffman & Johnson 2016). That KL is the
total correlation KL(q(z) || Π_j q(z_j)) and the dimension-wise Σ_j KL(q(z_j) || p(z_j)) where the prior is of
independent dimensions (Chen, Li, Grosse & Duvenaud 2018, eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.calibration import refuse_masks
from ppl_vae.conditionals import at_least_one
from ppl_vae.estimates import Average, average
from ppl_vae.evaluate import check_density, elbo, judging
from ppl_vae.objectives import ELBO
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.penalties import entries, features
from ppl_vae.rng import seeded
from ppl_vae.sharding import in_batches, presented
from ppl_vae.sites import statements
from ppl_vae.traces import (
    by_datum,
    check_table,
    check_whole,
    joint_terms,
    log_density,
    run_guide,
    run_model,
    tabulate,
)
from ppl_vae.train import fit

__all__ = ["Decomposition", "RateDistortion", "RatePoint", "decompose", "rate_distortion"]

SAME = 1e-3  # how far two evaluations of one log-density may be apart, relative to 1 and to itself


@dataclass(frozen=True)
class Decomposition:
    """The parts of the mean ELBO over N data, in nats per datum, each with its Monte Carlo standard error.

    elbo = reconstruction - rate, rate = mutual_information + aggregated_kl, and aggregated_kl = total_correlation
    + dimension_wise, all of them exactly, as they are means over the same draws. Each is unbiased, given the data:
    the aggregate is their own mixture, of all N posteriors. They are not unbiased for the population: the more
    data, the more there are to be told apart.

    Attributes:
        elbo: the evidence lower bound.
        reconstruction: E_q log p(x | z).
        rate: KL(q(z | x) || p(z)).
        mutual_information: I(n; z), at most log N.
        aggregated_kl: KL(q(z) || p(z)); None where each datum has a prior of its own.
        total_correlation: KL(q(z) || Π_j q(z_j)); None where dimensions cannot be told apart.
        dimension_wise: Σ_j KL(q(z_j) || p(z_j)); likewise.
        size: N.
        reason: why there is no more, if so.
    """

    elbo: Average
    reconstruction: Average
    rate: Average
    mutual_information: Average
    aggregated_kl: Average | None
    total_correlation: Average | None
    dimension_wise: Average | None
    size: int
    reason: str = ""

    def __str__(self) -> str:
        parts = (
            ("ELBO", self.elbo),
            ("= reconstruction", self.reconstruction),
            ("- rate", self.rate),
            ("    = mutual information", self.mutual_information),
            ("    + KL(q(z) || p(z))", self.aggregated_kl),
            ("        = total correlation", self.total_correlation),
            ("        + dimension-wise KL", self.dimension_wise),
        )
        lines = [
            f"the ELBO of {self.size} data, nats per datum, Monte Carlo s.e. (log N = {math.log(self.size):.3f})"
        ]
        lines += [f"  {name:<30}{part}" for name, part in parts if part is not None]
        return "\n".join([*lines, *([f"  no more parts: {self.reason}"] if self.reason else [])])


@torch.no_grad()
def decompose(
    program: Program | Pair,
    data: Any,
    particles: int = 2,
    *,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
) -> Decomposition:
    """Take the ELBO apart, with the aggregate of all data as it is, and not of a batch of them.

    Each draw is scored under the posterior of every datum: N² times ``particles`` densities, for N up to some
    thousands. Memory grows with ``chunk * batch_size`` and with the draws themselves. Dimensions are told apart
    for one latent site, which guide and prior draw as independent entries.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes; all of them are held.
        particles: draws from each posterior; two or more, for errors.
        batch_size: data at once.
        chunk: draws per batch held at once.
        seed: fixes the draws, and redrawn pixels.

    Returns:
        The parts, with what keeps the rate from being taken further apart.

    Raises:
        ValueError: a number below one; data that do not suit the pair; nothing latent, masked latents, a guide
            that draws points or what the model does not; log-densities that are NaN.
    """
    at_least_one(particles=particles, chunk=chunk)
    with judging(program, seed, "parts") as pair:
        batches = [batch for _, batch in presented(pair, data, batch_size, seed)]
        check_density(pair)
        reason = _indivisible(pair, batches[0])
        latents, (likelihood, prior, posterior) = _drawn(pair, batches, particles, chunk)
        shared = _one_prior(pair, batches, latents)
        reason = reason if shared else "each datum has a prior of its own, so that there is no one p(z)"
        joint, product = (t.reshape(prior.shape) for t in _aggregate(pair, batches, latents, chunk, not reason))
    for table in (likelihood + prior + posterior, joint):  # a datum's own first: NaN spreads over the mixture
        if bool((wrong := table.isnan().any(0)).any()):
            raise ValueError(
                f"data: log-densities of the draws of row {int(wrong.nonzero()[0])} are NaN; look for parameters "
                "that are NaN, and for scales that overflow or vanish there"
            )
    return Decomposition(
        elbo=_mean(likelihood + prior - posterior),
        reconstruction=_mean(likelihood),
        rate=_mean(posterior - prior),
        mutual_information=_mean(posterior - joint),
        aggregated_kl=_mean(joint - prior) if shared else None,
        total_correlation=None if reason else _mean(joint - product),
        dimension_wise=None if reason else _mean(product - prior),
        size=prior.shape[1],
        reason=reason,
    )


def _indivisible(pair: Pair, batch: Batch) -> str:
    """Why dimensions cannot be told apart, if so; and a check that there are latents to speak of."""
    check_table(pair, batch, 1)
    run = run_guide(pair, batch, 1)
    guide, model = statements(run), statements(run_model(pair, batch, 1, run))
    prior = {name: site for name, site in model.items() if not site["is_observed"]}
    refuse_masks([*guide.values(), *prior.values()])
    if not prior:
        raise ValueError("program: nothing is latent, so the ELBO has no rate to take apart")
    if extra := set(guide) - set(prior):
        raise ValueError(f"program: the guide also draws {min(extra)!r}, whose density is no part of the rate")
    if len(prior) > 1:
        return f"there are several latents, {[*prior]}, and dimensions are told apart for one"
    (name,) = prior
    try:
        for sites in (guide, prior):
            entries(sites[name])
    except ValueError as error:
        return str(error)
    return ""


def _drawn(
    pair: Pair, batches: Sequence[Batch], particles: int, chunk: int
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Draws of all posteriors, (K N, *plates, *event), and log p(x | z), log p(z), log q(z | x), (K, N) each."""
    rows: list[Tensor] = []
    values: dict[str, list[Tensor]] = {}
    for batch in batches:
        tables, drawn = [], dict[str, list[Tensor]]()
        for first in range(0, particles, chunk):
            size = min(chunk, particles - first)
            run = run_guide(pair, batch, size)
            terms = tabulate(run_model(pair, batch, size, run), run, batch, size)
            check_whole(terms.prior, batch)
            tables.append(torch.stack([terms.likelihood, terms.prior, terms.posterior]).double())
            for name, site in statements(run).items():
                drawn.setdefault(name, []).append(by_datum(site, site["value"]))
        rows.append(torch.cat(tables, 1))
        for name, parts in drawn.items():
            values.setdefault(name, []).append(torch.cat(parts))
    return {name: torch.cat(parts, 1).flatten(0, 1) for name, parts in values.items()}, torch.cat(rows, 2).unbind()


def _one_prior(pair: Pair, batches: Sequence[Batch], latents: Mapping[str, Tensor]) -> bool:
    """Whether all data have the same p(z), as far as one z tells."""
    one = {name: z[:1] for name, z in latents.items()}
    found = [joint_terms(pair, _shared(one, len(batch[0])), *batch)[0][0] for batch in batches]
    values = torch.cat(found)
    return torch.allclose(values, values[:1], rtol=SAME, atol=SAME, equal_nan=True)


def _shared(latents: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Draws, (k, *plates, *event), each as a value for so many data: (k, rows, *plates, *event)."""
    return {name: z.unsqueeze(1).expand(-1, rows, *z.shape[1:]) for name, z in latents.items()}


def _aggregate(
    pair: Pair, batches: Sequence[Batch], latents: Mapping[str, Tensor], chunk: int, apart: bool
) -> tuple[Tensor, Tensor]:
    """Log q(z) of each draw under the mixture of all posteriors, and Σ_j log q(z_j), (K N,); 0 unless apart."""

    def scored(_: int, columns: Batch) -> dict[int, Tensor]:
        some = dict(zip(latents, columns, strict=True))
        parts = [_summed(pair, batch, _shared(some, len(batch[0])), apart) for batch in batches]
        return {0: torch.stack(parts).logsumexp(0)}

    found = in_batches(pair, tuple(latents.values()), chunk).collect(scored)[0]
    size = sum(len(batch[0]) for batch in batches)
    logs = found.to(pair.device) - math.log(size)
    return logs[:, 0], logs[:, 1:].sum(1)


def _summed(pair: Pair, batch: Batch, latents: Mapping[str, Tensor], apart: bool) -> Tensor:
    """Log Σ q(z | x) over the data of a batch, and of each entry log Σ q(z_j | x) if apart, (k, 1 + entries)."""
    particles = len(next(iter(latents.values())))
    sites = statements(run_guide(pair, batch, particles, latents))
    table = log_density(sites.values(), batch, particles).unsqueeze(-1)  # (k, B, 1)
    if apart:
        (site,) = sites.values()
        each = features(site, entries(site).log_prob(site["value"]))
        table = torch.cat([table, each], -1)
    return table.double().logsumexp(1)


def _mean(table: Tensor) -> Average:
    """The mean of draws (K, N), and its error with the data held fixed: draws of each datum are a stratum."""
    draws, size = table.shape
    error = (table.var(0) / draws).sum().sqrt() / size if draws > 1 else torch.tensor(math.nan)
    return Average(float(table.mean()), float(error))


@dataclass(frozen=True)
class RatePoint:
    """What a pair trained at one β reaches, in nats per datum, with errors over data.

    Attributes:
        beta: weight of the rate in training.
        rate: R = KL(q(z | x) || p(z)).
        distortion: D = -E_q log p(x | z).
        elbo: -(R + D), the bound on log p(x), whatever the β.
        program: the pair as trained.
    """

    beta: float
    rate: Average
    distortion: Average
    elbo: Average
    program: Any


@dataclass(frozen=True)
class RateDistortion:
    """Points of a rate-distortion curve, one for each β, in the order given."""

    points: tuple[RatePoint, ...]

    def __str__(self) -> str:
        lines = [f"{'beta':>8}  {'rate':>20}  {'distortion':>20}  {'ELBO':>20}"]
        lines += [f"{p.beta:>8g}  {p.rate!s:>20}  {p.distortion!s:>20}  {p.elbo!s:>20}" for p in self.points]
        return "\n".join(lines)


def rate_distortion(
    make: Callable[[], Program | Pair],
    train: Any,
    test: Any,
    betas: Sequence[float],
    *,
    particles: int = 10,
    seed: int = 0,
    **options: Any,
) -> RateDistortion:
    """Train a pair for each β, and see where it lands in the plane of rate and distortion.

    The pair that minimises D + β R is where the curve of optimal pairs has the slope ∂D / ∂R = -β: a low β buys a
    low distortion at a high rate (Alemi et al. 2018, figure 1).

    Args:
        make: gives a fresh program; called once for each β, from the same random stream.
        train: data to train on, as `ppl_vae.fit` takes them.
        test: data to judge by.
        betas: weights of the rate.
        particles: draws per datum by which rate and distortion are judged.
        seed: fixes initial weights, training and draws.
        **options: further arguments of `ppl_vae.fit`, such as ``valid`` and ``epochs``; not ``objective``.

    Returns:
        The points, with the trained programs.

    Raises:
        ValueError: no β, or one that is negative; ``objective`` among the options; a ``make`` that gives the same
            program twice; what `ppl_vae.fit` and `ppl_vae.elbo` refuse.
    """
    if "objective" in options:
        raise ValueError("objective: each point is trained with ELBO(beta=β); give betas alone")
    if not betas:
        raise ValueError("betas: expected one or more, got none")
    at_least_one(particles=particles)
    objectives = [ELBO(kl="auto", beta=beta) for beta in betas]  # refuses before hours of training
    points: list[RatePoint] = []
    for beta, objective in zip(betas, objectives, strict=True):
        with seeded(seed):
            program = make()
        if any(program is point.program for point in points):
            raise ValueError("make: it gave the same program twice; each β needs one of its own, untrained")
        fit(program, train, objective=objective, seed=seed, **options)
        found = elbo(program, test, particles, seed=seed)
        parts = (found.diagnostics["rate"], found.diagnostics["distortion"], found.value)
        rate, distortion, bound = (average(part) for part in parts)
        points.append(RatePoint(float(beta), rate, distortion, bound, program))
    return RateDistortion(tuple(points))
