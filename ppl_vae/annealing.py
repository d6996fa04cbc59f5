"""Annealed importance sampling: log p(x) from below on any data, and from above on data of the model's own.

Particles move from f_0 (the prior, or the guide) to the posterior through f_β(z) ∝ f_0(z)^(1-β) p(x, z)^β, and
collect log weights Σ_t (β_t - β_{t-1}) log [p(x, z) / f_0(z)]. The weight is an unbiased estimate of p(x), so its
log is a lower bound on average (Neal 2001). Run backwards from a draw of the posterior it estimates 1 / p(x), and
gives an upper bound (Grosse, Ghahramani & Adams 2015; Wu, Burda, Salakhutdinov & Grosse 2017). Such a draw is at
hand where the model made the datum: z, from which x was drawn.

The moves are Hamiltonian. Their step sizes are tuned in a pilot run, for each datum along the path, and are then
frozen: moves tuned by the run that they serve would leave nothing invariant, and the weights would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae.capture import Compile, Engine
from ppl_vae.conditionals import at_least_one
from ppl_vae.estimates import Estimate, Sandwich, share_warning, whole
from ppl_vae.evaluate import check_density, judging, template
from ppl_vae.layout import position
from ppl_vae.pairs import Batch, Pair, Program, paired
from ppl_vae.paths import Path
from ppl_vae.rng import derived, seeded
from ppl_vae.schedules import Annealing, Plan, pilot
from ppl_vae.sharding import in_batches, presented
from ppl_vae.sites import statements
from ppl_vae.sparing import sparing
from ppl_vae.streaming import log_mean
from ppl_vae.traces import by_datum, joint_terms, log_density, run_model

__all__ = ["annealed", "sandwich", "simulated"]

CHAINS = "annealing"  # the name of their stream
LEAST = 0.2  # acceptance of moves below which the particles hardly went anywhere


@torch.no_grad()
def _walk(
    path: Path, state: Tensor, betas: Sequence[float], steps: Tensor, leapfrog: int, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Log weights, float64 (K, B), and the mean acceptance (B,) of particles taken through β."""
    here = path.at(state, batch)
    weight = here.ratio.new_zeros(here.ratio.shape, dtype=torch.float64)
    accepted = here.ratio.new_zeros(here.ratio.shape[1])
    for number, (now, then) in enumerate(pairwise(betas), 1):
        weight += (then - now) * here.ratio.double()
        if number < len(betas) - 1:  # a move at the end would change nothing
            beta = here.ratio.new_tensor(then)
            here, probability = path.move(here, beta, steps[number], leapfrog, batch)
            accepted += probability.mean(0)
    return weight, accepted / max(1, len(betas) - 2)


def _weights(
    path: Path, settings: Annealing, plan: Plan, batch: Batch, exact: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log weights, (B, chains), and the share of moves accepted, (B,), float64, on the CPU.

    Forwards from f_0, or backwards from one draw of each posterior, (1, B, D).
    """
    betas, steps = plan.betas.tolist(), plan.steps
    if exact is not None:
        betas, steps = betas[::-1], steps.flip(0)
    weights, accepted = [], []
    chunk = max(1, settings.chunk // path.coordinates.combinations)  # of which each has rows of its own
    for first in range(0, settings.chains, chunk):
        chains = min(chunk, settings.chains - first)
        state = path.draw(batch, chains) if exact is None else exact.expand(chains, -1, -1)
        weight, rate = _walk(path, state, betas, steps, settings.leapfrog, batch)
        weights.append(weight)
        accepted.append(rate * chains / settings.chains)
    return torch.cat(weights).T.cpu(), torch.stack(accepted).sum(0).double().cpu()


def _estimate(
    weights: Tensor, accepted: Tensor, settings: Annealing, direction: Literal["lower", "upper"], engine: Engine
) -> Estimate:
    """Log of the mean weight; upwards minus that, since weights estimate 1 / p(x) then."""
    value, stderr, ess = log_mean(weights.logsumexp(1), (2 * weights).logsumexp(1), settings.chains)
    name = f"AIS, {settings.chains} x {settings.distributions}"
    if direction == "upper":
        # All chains of a datum begin at the same draw: what another draw would change, they do not tell.
        value, stderr, name = -value, torch.full_like(stderr, math.nan), f"reverse {name}"
    found = {"ess": ess, "acceptance": accepted, "log_weights": weights}
    doubts = share_warning(
        accepted < LEAST,
        f"fewer than {LEAST:.0%} of the moves were accepted",
        "the pilot did not find step sizes: take more distributions, which lengthens it",
    )
    if settings.chains == 1:
        doubts += ("of one chain no error is known: take more chains",)
    doubts += share_warning(
        (ess < 2) & (settings.chains > 3),
        "one chain has most of the weight",
        "value and error are those of one draw: take more distributions",
    )
    return Estimate(value, stderr, direction, found, name, engine.describe(), doubts)


@sparing
def annealed(
    program: Program | Pair | Callable[..., Any],
    data: Any,
    settings: Annealing = Annealing(),
    *,
    batch_size: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Estimate:
    """Annealed importance sampling: a lower bound on log p(x) that gets tight with more distributions (Neal 2001).

    Args:
        program: the pair, or a model alone: the guide has a part in it with ``start="guide"`` alone. Discrete
            latents are summed out, where they can be listed.
        data: data in any form that ``fit`` takes.
        settings: how to anneal.
        batch_size: data moved at once.
        seed: fixes all draws, and redrawn pixels: those that `log_likelihood` judges.
        compile: as in `ppl_vae.fit`.

    Returns:
        Lower bound per datum. Its standard error is the delta method's, as for `log_likelihood`. Diagnostics:
        ``ess``, ``acceptance`` of the moves, and ``log_weights`` (N, chains).

    Raises:
        ValueError: data that do not suit the pair; a discrete latent with too many values, or without a list of
            them; a latent whose support depends on others; nothing latent; a model alone with parameters of its
            own.
        IncompleteError: data or weights that are NaN or infinite; it has the estimate of the other data.
    """
    engine, paths = Engine(compile), list[Path]()
    with judging(paired(program), seed, CHAINS) as pair:

        def judge(_: int, batch: Batch) -> dict[int, Tensor]:
            _check_trained(program, pair)
            if not paths:
                paths.append(_path(pair, batch, settings, engine))
            return dict(enumerate(_weights(paths[0], settings, pilot(paths[0], settings, batch), batch)))

        weights, accepted = presented(pair, data, batch_size, seed).collect(judge, engine).values()
    return whole(found := _estimate(weights, accepted, settings, "lower", engine), found)


def _check_trained(program: Any, pair: Pair) -> None:
    """Raise ValueError for a model alone that has just made parameters: nobody has trained those."""
    if pair.params and not isinstance(program, Pair) and not hasattr(program, "guide"):
        raise ValueError(
            f"program: a model alone makes {', '.join(map(repr, pair.params))} anew; give the pair that "
            "has been trained, or hold parameters in modules"
        )


def _path(pair: Pair, batch: Batch, settings: Annealing, engine: Engine) -> Path:
    if settings.start == "guide":
        check_density(pair)
    uses = settings.distributions * settings.leapfrog
    return Path(pair, batch, settings.start, engine, settings.precision, uses)


def sandwich(
    program: Program | Pair | Callable[..., Any],
    size: int,
    *context: Tensor,
    settings: Annealing = Annealing(),
    wanted: float | None = None,
    most: int = 100_000,
    like: Batch | None = None,
    batch_size: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Sandwich:
    """Bounds on log p(x) from below and from above, on data drawn from the model (bidirectional Monte Carlo).

    The upper bound needs a draw of the posterior, which only simulated data have: the z that made them. So it
    speaks of the model's own data. If the gap is small there, annealing with these settings can be trusted where
    posteriors are no harder; on real data that differ from the model's they may be (Wu et al. 2017, section 4).

    Args:
        program: the pair, or a model alone.
        size: how many data to simulate.
        *context: conditions c, one row for each.
        settings: how to anneal.
        wanted: the mean gap, in nats, to get below, two standard errors included: distributions are doubled
            until it is.
        most: no more distributions than this, whatever the gap is then.
        like: for a program without ``blank``: a batch of ``size`` rows of the right shapes.
        batch_size: data moved at once.
        seed: fixes data and draws.
        compile: as in `ppl_vae.fit`.

    Returns:
        Both estimates, of the same data, and the settings of the last run. What error an upper bound has for one
        datum is not known, since all of its chains begin at the same draw; that of means and of the gap is, over
        data. With ``wanted`` the gap is one that was waited for: for a figure to report, run its settings again
        under another seed.

    Raises:
        ValueError: as for `annealed`; an observed site that is no tensor of the batch, or that depends on x other
            than as its observed value; ``wanted`` not positive, or with fewer than two data.
        IncompleteError: as for `annealed`; it has the sandwich.
    """
    at_least_one(size=size, batch_size=batch_size, most=most)
    if wanted is not None and not wanted > 0:
        raise ValueError(f"wanted must be positive, in nats, got {wanted}")
    if wanted is not None and size < 2:
        raise ValueError(f"size must be at least 2 to tell whether the gap is as wanted, got {size}")
    engine = Engine(compile)
    with judging(paired(program), seed) as pair:
        batch, latents = simulated(pair, template(pair, size, context, like))
        _check_trained(program, pair)
        path = _path(pair, batch, settings, engine)
        while True:
            found = _enclosed(path, batch, path.coordinates.pack(latents), settings, batch_size, seed)
            gap, more = found.gap, 2 * settings.distributions
            if wanted is None or gap.mean + 2 * gap.stderr < wanted or more > most or not math.isfinite(gap.mean):
                return whole(found := replace(found, wanted=wanted), found.lower, found.upper)
            settings = replace(settings, distributions=more)


def _enclosed(path: Path, batch: Batch, exact: Tensor, settings: Annealing, size: int, seed: int) -> Sandwich:
    """Anneal simulated data both ways, by the same step sizes."""

    def judge(_: int, columns: Batch) -> dict[int, Tensor]:
        *part, start = columns
        plan = pilot(path, settings, tuple(part))
        up = _weights(path, settings, plan, tuple(part))
        return dict(enumerate((*up, *_weights(path, settings, plan, tuple(part), start.unsqueeze(0)))))

    with seeded(derived(seed, CHAINS), path.pair.device):
        found = in_batches(path.pair, (*batch, exact[0]), size).collect(judge, path.engine)
    lower = _estimate(found[0], found[1], settings, "lower", path.engine)
    return Sandwich(lower, _estimate(found[2], found[3], settings, "upper", path.engine), settings)


@torch.no_grad()
def simulated(pair: Pair, like: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """A batch with the model's own draws for what it observes, and the latents behind them, (1, B, ...).

    Raises:
        ValueError: the draws cannot take their places in the batch, or the model then sees something else there.
    """
    like = tuple(column.contiguous() for column in like)  # a view of it, as an inner plate needs, is known by that
    seen = statements(run_model(pair, like, 1))
    sites = statements(run_model(pair, like, 1, free=True))
    observed = {name: s for name, s in sites.items() if s["infer"].get("was_observed")}
    latents = {name: by_datum(s, s["value"]) for name, s in sites.items() if name not in observed}
    batch = list(like)
    for name, site in observed.items():
        place = position(seen[name], like)
        if place is None:
            raise ValueError(
                f"site {name!r}: what the model observes is no tensor of the batch, so that simulated data cannot "
                "take its place"
            )
        batch[place] = by_datum(site, site["value"])[0].reshape(batch[place].shape)
    meant, found = log_density(observed.values(), like, 1), joint_terms(pair, latents, *batch)[1]
    if not torch.allclose(meant, found, rtol=1e-3, atol=1e-2):
        raise ValueError(
            f"site {min(observed)!r}: of data simulated at once the model does not find what it drew; this comes "
            "of a distribution that depends on x itself, or of an observed value that is x in another order"
        )
    return tuple(batch), latents
