"""The E-step of variational EM: a posterior of its own for each datum, with the model as it is.

A guide's posterior is the output of a net, one net for all data. Here each datum's own numbers are optimised
instead, so that the ELBO they reach is the best of their family, ELBO*(x) = max over q of ELBO(q, x), up to what
the steps leave (Cremer, Li & Duvenaud 2018, section 3). All latents of a datum are one vector u of real numbers,
whatever their sites, plates and supports. It is written u = m + s v, with m and s its mean and standard deviation
under the guide, and the family is one of v. So optimisation starts near the guide, and in its units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.capture import Captured, Compile, Engine
from ppl_vae.conditionals import Conditional, at_least_one
from ppl_vae.draws import balanced, power_of_two
from ppl_vae.estimates import Average, Estimate, average, kept, share_warning, whole
from ppl_vae.evaluate import FEW, elbo, judging
from ppl_vae.flows import Flowed, planar
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.paths import Coordinates
from ppl_vae.posteriors import FullCovariance, mean_field
from ppl_vae.ranks import count_ranks
from ppl_vae.rng import derived, seeded
from ppl_vae.sharding import presented
from ppl_vae.sites import statements
from ppl_vae.sparing import sparing
from ppl_vae.streaming import add_means, add_weights, log_mean, mean_stderr
from ppl_vae.tails import FEWEST, khat_threshold, pareto
from ppl_vae.traces import LogTerms, by_datum, check_whole, joint_terms, run_guide, run_model

__all__ = ["Local", "LocalFamily", "Refined", "local_flow", "local_full_covariance", "local_mean_field", "refine"]

DRAWS = 100  # of the guide, to find where it is and how wide
FIRST = 8  # draws per step, in the first part
LAST = 32, 128  # in that which is averaged: at least, and as twice as many as latents, at most
DECAY = 0.9, 0.99  # of Adam's two averages
TINY = 1e-8  # lest Adam divides by zero
SURE = 3.0  # standard errors beyond which a difference is no chance
ADVICE = "their posteriors are of another shape: take a richer family, or `annealed`"
TAIL = 0.5  # share of the steps after which iterates are averaged
LATE = 0.8  # share of the steps after which the rest should gain nothing more
SETTLED = 0.01  # nats that they may still gain
STARTS = (-math.inf, -math.inf, 0.0, 0.0, 0.0, math.nan, 0.0, 0.0)  # of `add_weights` and `add_means`


class Local(NamedTuple):
    """A family of local posteriors: a table of numbers in, a distribution of v for each datum out.

    Attributes:
        law: (B, numbers) -> a distribution with batch shape (B,), event (latent,), reparameterised draws, and a
            density at any value. Numbers of zero are where the guide is: N(0, I), or what starts near it.
        numbers: how many there are for each datum.
    """

    law: Conditional
    numbers: int


LocalFamily = Callable[[int], Local]


def local_mean_field(latent: int) -> Local:
    """Independent normals, 2 d numbers for each datum: for a mean-field guide, its own family."""
    return Local(mean_field(nn.Identity()), 2 * latent)


def local_full_covariance(latent: int) -> Local:
    """A normal of any covariance, d + d (d + 1) / 2 numbers for each datum; see `ppl_vae.FullCovariance`."""
    return Local(FullCovariance(nn.Identity()), latent * (latent + 3) // 2)


def local_flow(depth: int = 4) -> LocalFamily:
    """Independent normals pushed through planar flows, 2 d + depth (2 d + 1) numbers for each datum.

    Bent and split posteriors are within its reach; see `ppl_vae.planar`.

    Args:
        depth: how many flows.

    Raises:
        ValueError: ``depth`` below one.

    >>> local_flow(depth=4)(3).numbers
    34
    """
    at_least_one(depth=depth)

    def family(latent: int) -> Local:
        width = 2 * latent + 1
        flows = planar(latent, depth, context=depth * width)
        for number, flow in enumerate(flows):  # its share of a datum's numbers is added to what it starts from
            (slope,) = (p for p in flow.parameters() if p.dim() == 2)
            nn.init.eye_(slope.detach()[:, number * width : (number + 1) * width])
        base = mean_field(_Columns(0, 2 * latent))
        return Local(Flowed(base, *flows, context=_Columns(2 * latent, None)), 2 * latent + depth * width)

    return family


class _Columns(nn.Module):
    """Some columns of a table."""

    def __init__(self, first: int, last: int | None) -> None:
        super().__init__()
        self.columns = slice(first, last)

    def forward(self, table: Tensor) -> Tensor:
        return table[..., self.columns]


@dataclass(frozen=True)
class Refined:
    """What local posteriors reach.

    Attributes:
        elbo: of the local posteriors, a lower bound, from draws made after the optimisation. Diagnostics:
            ``rate`` and ``distortion``, as of `ppl_vae.elbo`, and ``gain``, how many nats the last fifth of the
            steps brought. It warns of data that have not converged.
        before: the guide's ELBO, of the same data with the same redrawn pixels.
        bound: the importance-weighted bound with the local posterior as proposal, of the same draws as ``elbo``;
            its diagnostics are ``ess`` and ``khat``, NaN of fewer than 25 draws.
        latents: the local posteriors' means, latent site -> (N, *plates, *event).
        converged: whether the last fifth of the steps gained less than 0.01 nat, (N,).
    """

    elbo: Estimate
    before: Estimate
    bound: Estimate
    latents: dict[str, Tensor]
    converged: Tensor

    @property
    def improvement(self) -> Average:
        """Mean of ELBO* - ELBO over data, nats per datum, with the standard error of the paired difference."""
        return average(self.elbo.value - self.before.value)

    def __str__(self) -> str:
        return f"{self.before}\n{self.elbo}\n{self.bound}\nimprovement {self.improvement} nats per datum"


@sparing
def refine(
    program: Program | Pair,
    data: Any,
    family: LocalFamily = local_mean_field,
    *,
    steps: int = 1000,
    rate: float = 0.1,
    particles: int = 1000,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Refined:
    """Optimise a posterior of its own for each datum; nothing of the program changes.

    Each step ascends the ELBO of 8 draws, later of 32 to 128, by the gradient without the score, whose noise
    vanishes as q becomes the posterior (Roeder, Wu & Duvenaud 2017, eq. 8). Draws come with their signs turned, so
    that with up to 64 latents it vanishes too where independent normals are as near as they get to a normal
    posterior. Adam's averages are each number's own, so that data have no part in one another. Steps get shorter
    along a cosine, down to none (Loshchilov & Hutter 2017, eq. 5).

    Args:
        program: the pair; its guide says where to start and in which units.
        data: data in any form that ``fit`` takes.
        family: of the local posteriors: `local_mean_field`, `local_full_covariance`, ``local_flow(depth)``, or
            any function of the number of latents that gives a `Local`. A family poorer than the guide's may end
            below the guide.
        steps: of the optimisation.
        rate: the first step's length, in the guide's standard deviations and in nats of log-scales.
        particles: K, draws per datum by which the results are judged.
        batch_size: data refined at once.
        chunk: particles per batch held at once while judging.
        seed: fixes the draws, and redrawn pixels: those that `elbo` and `log_likelihood` judge.
        compile: as in `ppl_vae.fit`; "auto" compiles from 1,000 steps on, those of all batches together.

    Returns:
        The bounds that the local posteriors reach, and those of the guide.

    Raises:
        ValueError: sizes out of range; data that do not suit the pair; a guide that draws points, or whose ELBO is
            NaN; nothing latent; a latent that is discrete, or whose support depends on others.
        IncompleteError: data or bounds that are NaN or infinite; it has the results of the other data.
    """
    at_least_one(steps=steps, particles=particles, chunk=chunk)
    if not callable(family):
        raise ValueError(f"family: expected a function such as local_full_covariance, got {family!r}")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate}")
    # The guide first: it is cheap, and what it refuses is refused before long.
    # What fails of it is told in the end, with the results of the other data.
    shared: dict[str, Any] = {"batch_size": batch_size, "chunk": chunk, "seed": seed, "compile": compile}
    before = kept(lambda: elbo(program, data, particles, **shared))
    engine, refiners = Engine(compile), list[_Refiner]()
    with judging(program, seed, "refining") as pair:
        batches = presented(pair, data, batch_size, seed)
        expected = len(before.value) // count_ranks() // batch_size

        def refined(row: int, batch: Batch) -> dict[int, Tensor]:
            if not refiners:
                size = len(batch[0]) if batches.rows is None else batch_size  # a process may begin with a part
                refiners.append(_Refiner(pair, batch, family, engine, steps, expected, size))
            judged_by = derived(seed, "judging", row)
            return dict(enumerate(refiners[0].refined(batch, rate, particles, chunk, judged_by)))

        gain, khat, *sums = batches.collect(refined, engine).values()
    found = _results(gain, khat, sums, [*refiners[0].coordinates.parts], before, particles, engine)
    return whole(found, found.before, found.elbo)


class _Place(NamedTuple):
    """Where the guide has the latents of a batch, as real vectors: mean and standard deviation, (B, D)."""

    mean: Tensor
    scale: Tensor


class _Refiner:
    """Local posteriors of a pair's data, batch by batch.

    Args:
        pair: the pair, in evaluation mode.
        batch: the first batch, to find the latents with.
        family: of the local posteriors.
        engine: how to run.
        steps: of the optimisation.
        batches: how many of the usual size there are.
        size: the usual size of a batch; by default that of the first.

    Raises:
        ValueError: nothing is latent; a latent is discrete; what `Coordinates` refuses.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        family: LocalFamily,
        engine: Engine,
        steps: int,
        batches: int = 1,
        size: int | None = None,
    ) -> None:
        self.pair, self.engine, self.steps = pair, engine, steps
        self.batches, self.size = batches, size or len(batch[0])
        with torch.no_grad():
            sites = statements(run_model(pair, batch, 1))
        latents = {name: site for name, site in sites.items() if not site["is_observed"]}
        if not latents:
            raise ValueError("program: nothing is latent, so there is nothing to refine; see `log_likelihood`")
        for name, site in latents.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"site {name!r}: it is discrete, and has no gradient to be refined along; sum it out in the "
                    "model, or judge by `log_likelihood`"
                )
        self.coordinates = Coordinates(latents)
        width = self.place(batch).mean.shape[-1]
        law, self.numbers = family(width)
        self.law = law.to(pair.device, pair.dtype).requires_grad_(False).eval()
        uses, last = partial(self._uses, steps), min(LAST[1], max(LAST[0], 2 * power_of_two(width)))
        self.early, self.late = (
            Captured(engine, [pair, self.law], partial(self._step, count), uses) for count in (FIRST, last)
        )
        self.parts: dict[int, Captured] = {}  # of judging, for each size of a chunk

    def _uses(self, each: int, *tensors: Tensor) -> float:
        """How often what runs so often for a batch is expected to run; a batch of another size comes once."""
        return each * (max(1, self.batches) if len(tensors[-1]) == self.size else 1)

    @torch.no_grad()
    def place(self, batch: Batch) -> _Place:
        """Where the guide has the latents, by draws of it."""
        sites = statements(run_guide(self.pair, batch, DRAWS))
        drawn = {name: by_datum(sites[name], sites[name]["value"]) for name in self.coordinates.parts}
        state = self.coordinates.pack(drawn)
        # A guide may be so sure that its draws are all the same number in this precision.
        return _Place(state.mean(0), state.std(0).clamp_min(torch.finfo(state.dtype).eps))

    def refined(self, batch: Batch, rate: float, particles: int, chunk: int, seed: int) -> Sequence[Tensor]:
        """What the last steps gained, k-hat, and sums over K draws of each local posterior, as of `judged`."""
        place, found = self.place(batch), []
        for table in self.optimised(place, rate, batch):
            with seeded(seed, self.pair.device):  # the same draws for both: their chance cancels in the gain
                found.append(self.judged(table, place, particles, chunk, batch))
        (_, before), (weights, sums) = found
        khat = pareto(weights)[0] if particles >= FEWEST else torch.full_like(sums[0], math.nan)
        return [(sums[2] - before[2]) / particles, khat, *sums]

    def optimised(self, place: _Place, rate: float, batch: Batch) -> tuple[Tensor, Tensor]:
        """The data's numbers, (B, numbers), late in the optimisation and at its end, as averages of iterates."""
        table = place.mean.new_zeros(len(place.mean), self.numbers)
        first, second, mean, late = (torch.zeros_like(table) for _ in range(4))
        (slow, slower), averaged = DECAY, 0
        for step in range(1, self.steps + 1):
            length = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
            length *= math.sqrt(1 - slower**step) / (1 - slow**step)  # both averages began at zero
            stepped = self.late if step > TAIL * self.steps else self.early
            table, first, second = stepped(table, first, second, table.new_tensor(length), *place, *batch)
            if step > TAIL * self.steps:
                averaged += 1
                mean = mean + (table - mean) / averaged
            late = mean if step <= LATE * self.steps else late
        return late, mean

    def _step(
        self, particles: int, table: Tensor, first: Tensor, second: Tensor, length: Tensor, *given: Tensor
    ) -> Sequence[Tensor]:
        """One step of Adam (Kingma & Ba 2015, algorithm 1), given the place and the batch."""
        with torch.enable_grad():
            numbers = table.detach().requires_grad_()
            terms = self._terms(numbers, particles, _Place(*given[:2]), given[2:])
            (slope,) = torch.autograd.grad(terms.weight().mean(0).sum(), numbers)
        # A draw from afar may overflow in the model; the datum waits for the next. If all do, judging tells.
        slope = torch.where(slope.isfinite().all(-1, keepdim=True), slope, 0.0)
        first = DECAY[0] * first + (1 - DECAY[0]) * slope
        second = DECAY[1] * second + (1 - DECAY[1]) * slope.square()
        return table + length * first / (second.sqrt() + TINY), first, second

    def _terms(self, numbers: Tensor, particles: int, place: _Place, batch: Batch) -> LogTerms:
        """The table at draws of the local posteriors; their own density has a gradient through draws alone."""
        with pyro.validation_enabled(False):  # it would wait for the device
            law = density = self.law(numbers)
            if numbers.requires_grad:
                drawn, density = balanced(law, particles), self.law(numbers.detach())
            else:
                drawn = law.rsample((particles,))
            log_q = density.log_prob(drawn) - place.scale.log().sum(-1)
        latents, volume = self.coordinates.unpack(place.mean + place.scale * drawn)
        prior, likelihood = joint_terms(self.pair, latents, *batch)
        check_whole(prior, batch)
        return LogTerms(likelihood, prior, log_q - volume, latents)

    @torch.no_grad()
    def judged(
        self, table: Tensor, place: _Place, particles: int, chunk: int, batch: Batch
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Log weights (K, B) of exactly K draws, and sums over them: those of ``STARTS``, then of each latent."""
        sizes = [chunk] * (particles // chunk) + [particles % chunk] * (particles % chunk > 0)
        start = [table.new_full((len(table),), value, dtype=torch.float64) for value in STARTS]
        latents = self.coordinates.unpack(place.mean[None])[0].values()
        weights: list[Tensor] = []
        sums: Sequence[Tensor] = [*start, *(torch.zeros_like(z[0], dtype=torch.float64) for z in latents)]
        for size in sizes:
            if size not in self.parts:
                uses = partial(self._uses, 2 * sizes.count(size))
                part = partial(self._add, size, len(sums))
                self.parts[size] = Captured(self.engine, [self.pair, self.law], part, uses, noted=False)
            *sums, weight = self.parts[size](*sums, table, *place, *batch)
            weights.append(weight)
        return torch.cat(weights), sums

    def _add(self, size: int, count: int, *tensors: Tensor) -> Sequence[Tensor]:
        """The sums after one more chunk of particles, and its log weights."""
        sums, (table, mean, scale, *batch) = tensors[:count], tensors[count:]
        terms = self._terms(table, size, _Place(mean, scale), tuple(batch))
        weight = terms.weight().double()
        latents = (total + z.double().sum(0) for total, z in zip(sums[8:], terms.samples.values(), strict=True))
        return [*add_weights(sums[:2], terms, weight), *add_means(sums[2:8], terms, weight), *latents, weight]


def _results(
    gain: Tensor,
    khat: Tensor,
    sums: Sequence[Tensor],
    names: Sequence[str],
    before: Estimate,
    particles: int,
    engine: Engine,
) -> Refined:
    """What sums over draws of all data's local posteriors say."""
    how, means, latents = engine.describe(), sums[2:8], sums[8:]
    value, rate, distortion = (total / particles for total in means[:3])
    diagnostics = {"rate": rate, "distortion": distortion, "gain": gain}
    converged = gain < SETTLED
    doubts = share_warning(~converged, f"the last steps still gained {SETTLED:g} nat or more", "take more steps")
    worse = value < before.value - SURE * before.stderr.nan_to_num()
    doubts += share_warning(worse, "the guide has a higher ELBO", "lower rate, or take a richer family")
    refined = Estimate(value, mean_stderr(means, particles), "lower", diagnostics, "refined ELBO", how, doubts)
    value, stderr, ess = log_mean(sums[0], sums[1], particles)
    doubts = share_warning((ess < FEW) & (particles > FEW), f"the effective sample size is below {FEW}", ADVICE)
    if particles >= FEWEST:
        limit = khat_threshold(particles)
        doubts += share_warning(khat > limit, f"k-hat is above {limit:.2f}", ADVICE)
    bound = Estimate(value, stderr, "lower", {"ess": ess, "khat": khat}, f"refined L_{particles}", how, doubts)
    found = {name: total / particles for name, total in zip(names, latents, strict=True)}
    return Refined(refined, before, bound, found, converged)
