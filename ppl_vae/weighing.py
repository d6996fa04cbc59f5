"""Importance sampling that says whether it can be trusted, with proposals that fail less.

`log_likelihood` gives the same bound in less memory. Here all weights of a batch are held, since their tail tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl_vae.batches import Data, as_data
from ppl_vae.capture import Compile, Engine
from ppl_vae.conditionals import at_least_one
from ppl_vae.estimates import Estimate, share_warning, whole
from ppl_vae.evaluate import check_density, judging
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.sharding import presented
from ppl_vae.sites import statements
from ppl_vae.sparing import sparing
from ppl_vae.streaming import Streamed, expected_rows, log_mean
from ppl_vae.tails import khat_threshold, pareto
from ppl_vae.traces import LogTerms, check_whole, run_guide, run_model, tabulate

__all__ = ["importance"]

ADVICE = "their bounds are looser than the errors say: try a `widened` guide, defensive=0.1, or `annealed`"


@sparing
@torch.no_grad()
def importance(
    program: Program | Pair,
    data: Any,
    particles: int = 1000,
    *,
    defensive: float = 0.0,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Estimate:
    """The bound L_K of `log_likelihood` (Burda et al. 2016, eq. 8), and how far its weights can be trusted.

    A guide that is narrower than the posterior somewhere misses what it does not draw, and its few draws there
    have weights without limit. Two remedies are at hand: `widened` guides, and ``defensive``, with which a share α
    of the particles is drawn from the prior (Hesterberg 1995; Owen & Zhou 2000). All particles are then weighed
    by the mixture, p(x, z) / [(1 - α) q(z | x) + α p(z)], which is at most p(x | z) / α. Their numbers are fixed,
    round(α K) from the prior and the rest from the guide, at least one of each, and α is their true share; so
    the mean weight stays unbiased (Veach & Guibas 1995, the balance heuristic), and its second moment is at most
    1 / (1 - α) times that with the guide alone.

    Memory grows with ``batch_size * particles`` weights, and with ``batch_size * chunk`` runs of the programs.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        particles: K, exactly so many whatever the chunk.
        defensive: α in [0, 1), the share drawn from the prior.
        batch_size: data per batch.
        chunk: particles per batch held at once in the programs.
        seed: fixes the draws, those of `log_likelihood` where all come from the guide, and redrawn pixels.
        compile: as in `ppl_vae.fit`; "auto" compiles from a million draws on.

    Returns:
        Lower bound per datum. Its standard error is the delta method's for independent weights: with
        ``defensive`` it is on the high side, since fixed numbers vary less than random ones. Diagnostics:
        ``ess``, the effective sample size; ``khat``, as of `pareto`: beyond `khat_threshold` distrust value and
        error alike, and a warning is printed; ``smoothed``, the log mean of Pareto-smoothed weights, a bound in
        neither direction. A datum that no particle can make has value -inf, ``ess`` NaN and ``khat`` inf.

    Raises:
        ValueError: fewer than 25 particles, or a chunk below one; ``defensive`` outside [0, 1), or with a guide
            that draws more than the model's latents; nothing latent; data that do not suit the pair; a guide that
            draws points.
        IncompleteError: data or weights that are NaN or infinite; it has the estimate of the other data.
    """
    limit = khat_threshold(particles)
    at_least_one(chunk=chunk)
    if not 0 <= defensive < 1:
        raise ValueError(f"defensive must lie in [0, 1), got {defensive}; it is the share drawn from the prior")
    prior = min(max(round(defensive * particles), 1), particles - 1) if defensive else 0
    engine = Engine(compile)
    with judging(program, seed, "weights") as pair:
        source = as_data(data, batch_size)
        batches = presented(pair, source, batch_size, seed)
        check_density(pair)
        if not pair.layout.latents:
            raise ValueError("program: nothing is latent, so there is nothing to draw; see `log_likelihood`")
        size, rows = batch_size if isinstance(source, Data) else None, expected_rows(source, batch_size)
        streams = _streams(engine, pair, (particles - prior, prior), chunk, size, rows)

        def judge(row: int, batch: Batch) -> dict[str, Tensor]:
            if prior and not row:
                _check_latents(pair, batch)
            return _judged(_log_weights(streams, batch))

        numbers = batches.collect(judge, engine)
    value, stderr = numbers.pop("value"), numbers.pop("stderr")
    doubts = share_warning(numbers["khat"] > limit, f"k-hat is above {limit:.2f}", ADVICE)
    found = Estimate(value, stderr, "lower", numbers, f"L_{particles}", engine.describe(), doubts)
    return whole(found, found)


class _FromPrior(Streamed):
    """What is summed over particles that the model draws, and the guide only judges."""

    def one(self, size: int, *tensors: Tensor) -> Sequence[Tensor]:
        """The sums after one more chunk of particles."""
        model = run_model(self.pair, tensors, size)
        terms = tabulate(model, run_guide(self.pair, tensors, size, model), tensors, size)
        weight = terms.weight().double()
        check_whole(weight, tensors)
        return self.add((), terms, weight)


def _log_weight(share: float, _: Sequence[Tensor], terms: LogTerms, weight: Tensor) -> Sequence[Tensor]:
    """Log p(x | z) - log[(1 - α) q / p + α], (k, B), where a share α of all particles is from the prior p."""
    if not share:
        return (weight,)
    ratio = terms.rate.double() + math.log1p(-share)
    return (terms.likelihood.double() - torch.logaddexp(ratio, torch.full_like(ratio, math.log(share))),)


def _streams(
    engine: Engine, pair: Pair, counts: tuple[int, int], chunk: int, batch_size: int | None, rows: float
) -> list[Streamed]:
    """What gives log weights of particles, so many from the guide and so many from the prior."""
    add = partial(_log_weight, counts[1] / sum(counts))
    return [
        kind(engine, pair, add, (), particles=count, chunk=chunk, batch_size=batch_size, rows=rows)
        for kind, count in zip((Streamed, _FromPrior), counts, strict=True)
        if count
    ]


def _log_weights(streams: Sequence[Streamed], batch: Batch) -> Tensor:
    """All log weights of a batch, float64 (K, B)."""
    return torch.cat([stream.parts[size](*batch)[0] for stream in streams for size in stream.sizes])


def _judged(weights: Tensor) -> dict[str, Tensor]:
    """What log weights (K, B) say of each datum, each (B,)."""
    khat, smoothed = pareto(weights)
    mean = smoothed.logsumexp(0) - math.log(len(weights))
    value, stderr, ess = log_mean(weights.logsumexp(0), (2 * weights).logsumexp(0), len(weights))
    return {"value": value, "stderr": stderr, "ess": ess, "khat": khat, "smoothed": mean}


def _check_latents(pair: Pair, batch: Batch) -> None:
    """Raise ValueError if a guide draws what the model does not, which a draw of the model has no value for."""
    model, guide = statements(run_model(pair, batch, 1)), statements(run_guide(pair, batch, 1))
    if extra := set(guide) - set(model):
        raise ValueError(
            f"defensive: the guide also draws {min(extra)!r}, which the model does not, so that draws from the "
            "prior have no density under the guide; use defensive=0, or `widened`"
        )
