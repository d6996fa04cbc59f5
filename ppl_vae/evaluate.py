"""Evaluation: bounds on log p(x) with their errors, and what a trained pair infers and generates.

All log quantities are in nats per datum, higher is better. Every function leaves the caller's random streams
alone and puts the pair in evaluation mode for its own duration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppl_vae.batches import Data, prepare
from ppl_vae.capture import Compile, Engine
from ppl_vae.conditionals import at_least_one
from ppl_vae.estimates import ActiveUnits, Estimate, share_warning, whole
from ppl_vae.layout import check_finite
from ppl_vae.pairs import Batch, Pair, Program, as_pair, evaluating
from ppl_vae.predictive import guide_draws, guide_means, inspect_shapes, predict
from ppl_vae.rng import derived, seeded
from ppl_vae.sharding import prepared, presented
from ppl_vae.sparing import sparing
from ppl_vae.streaming import Add, Streamed, add_means, add_weights, expected_rows, log_mean, mean_stderr
from ppl_vae.traces import KL

__all__ = [
    "ActiveUnits",
    "Estimate",
    "active_units",
    "check_density",
    "decode",
    "elbo",
    "encode",
    "judging",
    "log_likelihood",
    "reconstruct",
    "sample",
    "template",
]

FEW = 5  # an effective sample size below which a mean of weights, and its error, are a few particles' luck
ADVICE = "their bounds are loose, and looser than the errors say; see `importance` for what to do"


@sparing
@torch.no_grad()
def log_likelihood(
    program: Program | Pair,
    data: Any,
    particles: int = 1000,
    *,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Estimate:
    """Importance-weighted lower bound on log p(x) (Burda et al. 2016, eq. 8), log 1/K Σ p(x, z_k) / q(z_k | x).

    Exactly K particles are drawn for each datum, ``chunk`` at a time; sums of weights are streamed, so memory
    grows with ``chunk * batch_size`` and not with K. Where nothing is latent, nothing is drawn, and the value is
    log p(x) itself.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        particles: K.
        batch_size: data per batch.
        chunk: particles per batch held at once.
        seed: fixes the draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`; "auto" compiles from a million draws on.

    Returns:
        Lower bound per datum. Its standard error is the delta method's, sd(w) / (mean(w) √K). Diagnostics:
        ``ess``, the effective sample size (Σw)² / Σw²; where it is a few, distrust value and error alike.

    Raises:
        ValueError: fewer than one particle or chunk; data that do not suit the pair; a guide that draws points.
        IncompleteError: data or weights that are NaN or infinite; it has the estimate of the other data.
    """
    at_least_one(particles=particles, chunk=chunk)
    sizes = {"batch_size": batch_size, "particles": particles, "chunk": chunk}
    start = (-math.inf, -math.inf)
    (first, second), drawn, how = _summed(program, data, add_weights, start, seed=seed, compile=compile, **sizes)
    value, stderr, ess = log_mean(first, second, drawn)
    doubts = share_warning((ess < FEW) & (drawn > FEW), f"the effective sample size is below {FEW}", ADVICE)
    name = f"L_{particles}" if drawn else "log p(x)"
    return whole(found := Estimate(value, stderr, "lower", {"ess": ess}, name, how, doubts), found)


def _summed(
    program: Program | Pair,
    data: Any,
    add: Add,
    start: tuple[float, ...],
    *,
    batch_size: int,
    seed: int,
    compile: Compile,
    **sizes: Any,
) -> tuple[list[Tensor], int, str]:
    """Sums over particles of all data, each float64 (N,) on the CPU, how many were drawn, and how.

    Where nothing is latent there is nothing to draw: 0, and the sums are one exact term.
    """
    engine = Engine(compile)
    with judging(program, seed, "weights") as pair:
        source = prepare(pair, data, batch_size)
        check_density(pair)
        drawn = sizes["particles"] if pair.layout is None or pair.layout.latents else 0
        sizes["particles"] = drawn or 1
        sizes["rows"] = expected_rows(source, batch_size)
        sizes["batch_size"] = batch_size if isinstance(source, Data) else None
        sums = Streamed(engine, pair, add, start, **sizes)
        batches = prepared(pair, source, batch_size, seed)
        found = batches.collect(lambda _, batch: dict(enumerate(sums(batch))), engine)
    return [*found.values()], drawn, engine.describe()


def check_density(pair: Pair) -> None:
    """Raise ValueError for a guide that draws points: its "weights" compare a mass with a density."""
    if pair.layout is not None and pair.layout.points:
        raise ValueError(
            f"site {pair.layout.points[0]!r}: the guide draws a point, which has no density, so there is no bound "
            "on log p(x); judge it by `reconstruct`, or give the guide a spread, as `mean_field` does"
        )


@sparing
@torch.no_grad()
def elbo(
    program: Program | Pair,
    data: Any,
    particles: int = 1,
    *,
    kl: KL = "auto",
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Estimate:
    """The evidence lower bound, with the rate and the distortion it is made of.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        particles: draws per datum that are averaged.
        kl: "auto" takes the KL in closed form where it holds; "sampled" and "analytic" as in `ELBO`.
        batch_size: data per batch.
        chunk: particles per batch held at once.
        seed: fixes the draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`; "auto" compiles from a million draws on.

    Returns:
        ELBO per datum. Diagnostics: ``rate``, KL(q || p) in nats, and ``distortion``, -E_q log p(x | z);
        the ELBO is -(rate + distortion) (Alemi et al. 2018).

    Raises:
        ValueError: fewer than one particle or chunk; data that do not suit the pair; a guide that draws points.
        IncompleteError: data or weights that are NaN or infinite; it has the estimate of the other data.
    """
    at_least_one(particles=particles, chunk=chunk)
    sizes = {"batch_size": batch_size, "particles": particles, "chunk": chunk}
    start = (0.0, 0.0, 0.0, math.nan, 0.0, 0.0)
    columns, drawn, how = _summed(program, data, add_means, start, seed=seed, compile=compile, kl=kl, **sizes)
    value, rate, distortion = (total / (drawn or 1) for total in columns[:3])
    stderr = mean_stderr(columns, drawn)
    diagnostics = {"rate": rate, "distortion": distortion}
    return whole(found := Estimate(value, stderr, "lower", diagnostics, "ELBO", how), found)


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

    A distribution without a mean, such as a flow's, has its draws averaged. Their noise, Var(z | x) / particles,
    counts then, so that only thousands of particles tell.

    Args:
        program: the pair.
        data: at least two data.
        threshold: variance above which a unit counts.
        particles: draws of earlier latents that the mean of a later one is averaged over, or draws of a latent
            itself where there is no mean.
        batch_size: data per batch.
        seed: fixes those draws, and redrawn pixels.

    Raises:
        ValueError: fewer than two data or one particle; data that do not suit the pair.
    """
    at_least_one(particles=particles)
    with judging(program, seed) as pair:
        batches = presented(pair, data, batch_size, seed)
        found = batches.collect(lambda _, batch: guide_means(pair, *batch, particles=particles))
    means = {name: mean.double() for name, mean in found.items()}
    if not means:
        raise ValueError("program: nothing is latent, so there are no units; judge it by `log_likelihood`")
    if len(next(iter(means.values()))) < 2:
        raise ValueError("data: active units need at least two data, got 1")
    return ActiveUnits({name: m.var(0) for name, m in means.items()}, threshold)


def encode(
    program: Program | Pair, *batch: Tensor, particles: int = 1, draw: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Posterior means E_q[z | x] of a batch, or draws: latent site -> (B, *plates, *event).

    Args:
        program: the pair.
        *batch: a batch as the model takes it.
        particles: draws of earlier latents that the mean of a later one is averaged over.
        draw: give one draw z ~ q(z | x) of each datum instead of the mean.
        seed: fixes those draws.

    Raises:
        ValueError: fewer than one particle; a batch that does not suit the pair.
    """
    at_least_one(particles=particles)
    with judging(program, seed) as pair:
        checked = _checked(pair, batch)
        return guide_draws(pair, *checked) if draw else guide_means(pair, *checked, particles=particles)


def reconstruct(program: Program | Pair, *batch: Tensor, site: str | None = None, seed: int = 0) -> Tensor:
    """The likelihood's mean at the posterior mean of each datum: a picture without noise.

    Args:
        program: the pair.
        *batch: a batch as the model takes it.
        site: which observed site; may be left out where there is one.
        seed: fixes the draws of latents that have no mean.

    Returns:
        Means (B, *plates, *event).

    Raises:
        ValueError: a batch that does not suit the pair; no such site, or several to choose from.
    """
    with judging(program, seed) as pair:
        return _only(predict(pair, *_checked(pair, batch), latents="means")[2], site)[0]


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
        Samples or means (size, *plates, *event).

    Raises:
        ValueError: no way to know the shapes, fewer than one sample, conditions that do not suit the pair.
    """
    at_least_one(size=size)
    with judging(program, seed) as pair:
        drawn = predict(pair, *template(pair, size, context, like), latents="prior")
    return _only(drawn[2] if mean else drawn[1], site)[0]


def decode(
    program: Program | Pair,
    latents: Mapping[str, Tensor],
    *context: Tensor,
    like: Batch | None = None,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """The likelihood's mean at given latents: interpolations, traversals, the plane of a 2-D latent.

    Args:
        program: the pair.
        latents: latent site -> (B, *plates, *event) as `encode` gives them; the model draws those left out, such
            as the lower levels of a hierarchy under the upper ones.
        *context: conditions c, (B, ...).
        like: for a program without ``blank``: a batch of B rows of the right shapes.
        site: which observed site; may be left out where there is one.
        seed: fixes the draws of latents left out.

    Returns:
        Means (B, *plates, *event).

    Raises:
        ValueError: no latents, unknown ones, of other shapes or lengths, or NaN; no way to know the shapes;
            conditions that do not suit the pair.
    """
    with judging(program, seed) as pair:
        given = {name: _tensors(pair, (z,))[0] for name, z in latents.items()}
        sizes = {len(z) for z in given.values()}
        if len(sizes) != 1:
            raise ValueError(f"latents: expected tensors of one length, got lengths {sorted(sizes)}")
        for name, z in given.items():
            check_finite(z, f"latents {name!r}")
        batch = template(pair, sizes.pop(), context, like)
        drawn, _, means = predict(pair, *batch, latents=given)
    if unknown := set(given) - set(drawn):
        raise ValueError(f"latents: the model has no latent {min(unknown)!r}, but {sorted(drawn)}")
    return _only(means, site)[0]


def _tensors(pair: Pair, columns: Batch) -> Batch:
    """Tensors or arrays as tensors of the pair's device and precision."""
    return Data(*columns).to(pair.device, pair.dtype).columns if columns else ()


def _checked(pair: Pair, batch: Batch) -> Batch:
    """A batch as the pair takes it, refused where `ppl_vae.fit` would refuse it."""
    data, known = Data(*batch), pair.layout
    first = next(prepare(pair, data, len(data)).batches(len(data)))
    pair.layout = known or pair.layout  # a training run that looks on the way keeps its own
    if len(first) < len(batch):
        raise ValueError(f"batch: the model takes {len(first)} tensors, got {len(batch)}")
    return first


def template(pair: Pair, size: int, context: Batch, like: Batch | None) -> Batch:
    """A batch of the right shapes for running the model freely, with conditions that the program takes."""
    if like is None:
        blank = getattr(pair.program, "blank", None)
        if not callable(blank):
            raise ValueError("program: it has no `blank` method that tells its shapes; pass like=batch")
        context = _tensors(pair, context)
        try:
            with seeded(None, pair.device):  # what it may draw is no part of the sample
                like = blank(size, *context)
        except (TypeError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"context: {len(context)} conditions do not suit the program ({reason})") from error
    elif context:
        raise ValueError("like: it holds the conditions already; give either `like` or conditions")
    if len(like[0]) != size:
        raise ValueError(f"like: expected a batch of {size} rows, got {len(like[0])}")
    like = Data(*like).to(pair.device, pair.dtype).present(slice(None))
    inspect_shapes(pair, like)
    return like


@contextmanager
def judging(program: Program | Pair, seed: int, purpose: str = "") -> Iterator[Pair]:
    """A pair in evaluation mode, under one seeded stream; its mode is put back afterwards.

    What judges data has a stream of its own, named by a purpose: data may have been drawn from the seed's, and a
    guide that draws from the prior would draw the very latents behind them.
    """
    pair = as_pair(program)
    with evaluating(pair), seeded(derived(seed, purpose) if purpose else seed, pair.device):
        yield pair


def _only(sites: dict[str, Tensor], site: str | None) -> Tensor:
    if site is None and len(sites) != 1:
        raise ValueError(f"site: the model observes {sorted(sites)}; say which")
    if site is not None and site not in sites:
        raise ValueError(f"site: the model does not observe {site!r}, but {sorted(sites)}")
    return sites[site] if site is not None else next(iter(sites.values()))
