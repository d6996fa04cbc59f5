"""Paths from a distribution that is easy to draw from to p(x, z), and Hamiltonian moves along them.

f_β(z) = f_0(z)^(1-β) p(x, z)^β, where f_0 is the prior p(z) or the guide q(z | x). All continuous latents of a
datum are one vector of real numbers, whatever their sites, plates and supports. Discrete ones are summed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import Transform

from ppl_vae.capture import Captured, Engine
from ppl_vae.layout import count_values
from ppl_vae.pairs import Batch, Pair
from ppl_vae.products import Precision, products_in
from ppl_vae.sites import CIRCULAR, Site, base, statements
from ppl_vae.traces import by_datum, check_table, check_whole, joint_terms, log_posterior, run_guide, run_model

__all__ = ["Coordinates", "Path", "Place", "Start"]

Start = Literal["prior", "guide"]
MOST = 1000  # combinations of values of discrete latents
JITTER = 0.2  # share of a step size that is drawn anew for each move


class _Part(NamedTuple):
    """One latent site in a vector: the shape of its real numbers for a datum, and what makes its value of them."""

    shape: tuple[int, ...]
    transform: Transform


class Coordinates:
    """Latents of all sites as one vector of real numbers for each particle and datum, and a list of values.

    Args:
        sites: the latent sites of a run of the model on particles.

    Attributes:
        parts: continuous site -> its place in the vector.
        values: discrete site -> its values (C, *event) in each of the C combinations that all of them have.
        combinations: C; 1 where nothing is discrete.

    Raises:
        ValueError: nothing is latent; a latent is discrete without a list of values, or these have too many
            combinations; a support depends on other latents.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        if not sites:
            raise ValueError("program: nothing is latent, so there is nothing to anneal; see `log_likelihood`")
        discrete = {name: site for name, site in sites.items() if site["fn"].support.is_discrete}
        self.values = _combined({name: _listed(name, site) for name, site in discrete.items()})
        self.combinations = len(next(iter(self.values.values()))) if discrete else 1
        self.parts: dict[str, _Part] = {}
        for name, site in sites.items():
            if name in discrete:
                continue
            transform, value = _onto_support(name, site["fn"]), by_datum(site, site["value"])
            free = transform.inv(value)
            try:
                transform.log_abs_det_jacobian(free, value)  # type: ignore[no-untyped-call]
            except NotImplementedError as error:
                raise _unsupported(name, site["fn"]) from error
            self.parts[name] = _Part(tuple(free.shape[2:]), transform)

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents, each (K, B, *plates, *event), as vectors (K, B, D)."""
        if not self.parts:
            shape = next(iter(latents.values())).shape[:2]
            return torch.zeros(*shape, 0, device=next(iter(latents.values())).device)
        free = (part.transform.inv(latents[name]) for name, part in self.parts.items())
        return torch.cat([z.reshape(*z.shape[:2], -1) for z in free], -1)

    def unpack(self, state: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Vectors (K, B, D) as latents, and the log-volume |det ∂z / ∂state|, (K, B)."""
        volume = state.new_zeros(state.shape[:2])
        latents: dict[str, Tensor] = {}
        if not self.parts:
            return latents, volume
        pieces = torch.split(state, [math.prod(p.shape) for p in self.parts.values()], -1)
        for (name, part), piece in zip(self.parts.items(), pieces, strict=True):
            free = piece.reshape(*state.shape[:2], *part.shape)
            latents[name] = part.transform(free)
            change: Tensor = part.transform.log_abs_det_jacobian(free, latents[name])  # type: ignore[no-untyped-call]
            volume = volume + change.flatten(2).sum(-1) if change.dim() > 2 else volume + change
        return latents, volume


def _listed(name: str, site: Site) -> Tensor:
    """The values of a discrete site, (C, *event).

    Raises:
        ValueError: there is no list of them for each datum.
    """
    found, fn = count_values(site, plates=2), site["fn"]
    if isinstance(found, str):
        raise ValueError(
            f"site {name!r}: it is discrete, has no gradient to anneal along, and cannot be summed out: {found}; "
            "judge by `log_likelihood`"
        )
    support: Tensor = fn.enumerate_support(expand=False)
    return support.reshape(found, *fn.event_shape)


def _combined(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of several sites (C_i, *event), each in all combinations with the others, (C, *event)."""
    count = math.prod(len(v) for v in values.values())
    if count > MOST:
        raise ValueError(
            f"site {min(values)!r}: {', '.join(values)} have {count} combinations of values, more than the {MOST} "
            "that are summed over; judge by `log_likelihood`"
        )
    places = torch.cartesian_prod(*(torch.arange(len(v)) for v in values.values())) if values else None
    columns = [] if places is None else places.reshape(count, -1).unbind(1)
    return {name: v[at.to(v.device)] for (name, v), at in zip(values.items(), columns, strict=True)}


def _onto_support(name: str, fn: TorchDistribution) -> Transform:
    """The map from real numbers onto a site's support.

    Raises:
        ValueError: there is none, or another one for other parameters.
    """
    family, support = type(base(fn)), fn.support
    if issubclass(family, Delta):
        raise ValueError(
            f"site {name!r}: the model puts it at a point, where no move is possible; compute it instead"
        )
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    narrow = support
    while isinstance(narrow, constraints.independent):
        narrow = narrow.base_constraint
    if any(torch.is_tensor(bound) for bound in vars(narrow).values()):
        raise ValueError(
            f"site {name!r}: the support of {family.__name__} has tensors for bounds, which may depend on other "
            "latents; write them as numbers, or declare a latent of fixed support and transform its value"
        )
    if issubclass(family, CIRCULAR):  # torch calls their support real
        raise _unsupported(name, fn)
    try:
        transform: Transform = biject_to(support)
    except NotImplementedError as error:
        raise _unsupported(name, fn) from error
    return transform


def _unsupported(name: str, fn: TorchDistribution) -> ValueError:
    return ValueError(
        f"site {name!r}: no map from real numbers onto the support of {type(base(fn)).__name__} is known; declare "
        "a latent of another family, and transform its value"
    )


class Place(NamedTuple):
    """Where particles are on a path, and what is known there.

    Attributes:
        state: (K, B, D).
        first_slope: gradient of ``first``, (K, B, D).
        ratio_slope: gradient of ``ratio``, (K, B, D).
        first: log f_0, (K, B).
        ratio: log p(x, z) - log f_0, (K, B).
    """

    state: Tensor
    first_slope: Tensor
    ratio_slope: Tensor
    first: Tensor
    ratio: Tensor


class Path:
    """f_β for a pair, with Hamiltonian moves that leave it as it is.

    Args:
        pair: the pair, in evaluation mode.
        batch: a batch, to find the latents with.
        start: f_0: the "prior" p(z), or the "guide" q(z | x).
        engine: how to run.
        precision: of the matrix products behind slopes, as `Annealing` has it.
        uses: how many moves are expected.

    Raises:
        ValueError: what `Coordinates` refuses; a guide whose latents are not the model's alone.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        start: Start,
        engine: Engine,
        precision: Precision = "float32",
        uses: float = math.inf,
    ) -> None:
        check_table(pair, batch, 1)
        self.pair, self.start = pair, start
        self.coordinates = Coordinates(self._drawn(batch, 1, "prior"))
        known = {*self.coordinates.parts, *self.coordinates.values}
        if start == "guide" and (extra := set(self._drawn(batch, 1, "guide")) - known):
            raise ValueError(f"start='guide': it also draws {min(extra)!r}, which the model does not; use 'prior'")
        self.engine, self.precision = engine, precision
        self.leapt = Captured(engine, [pair], self._leap, lambda *_: uses)
        self.passed = self.leapt
        if precision != "float32":
            self.passed = Captured(engine, [pair], self._pass, lambda *_: uses)

    @torch.no_grad()
    def draw(self, batch: Batch, particles: int) -> Tensor:
        """Draws of f_0, (K, B, D)."""
        sites = self._drawn(batch, particles, self.start)
        return self.coordinates.pack({name: by_datum(s, s["value"]) for name, s in sites.items()})

    def _drawn(self, batch: Batch, particles: int, start: Start) -> dict[str, Site]:
        """The latent sites of one run of the model, or of the guide."""
        with torch.no_grad():
            run = run_guide if start == "guide" else run_model
            sites = statements(run(self.pair, batch, particles))
        return {name: site for name, site in sites.items() if not site["is_observed"]}

    def at(self, state: Tensor, batch: Batch) -> Place:
        """What is known at a state."""
        return Place(state, *self._look(state, *batch))

    def _look(self, state: Tensor, *batch: Tensor) -> Sequence[Tensor]:
        """Log f_0 and the log ratio, after their slopes."""
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            latents, volume = self.coordinates.unpack(state)
            first, ratio = self._densities(latents, len(state), batch)
            first = first + volume
            check_whole(ratio, batch)
            with products_in(self.precision):
                slopes = [_slope(value, state) for value in (first, ratio)]
        return *slopes, first.detach(), ratio.detach()

    def _densities(self, latents: Mapping[str, Tensor], particles: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log f_0 and the log ratio at continuous latents, discrete ones summed out of p and f_0, (K, B)."""
        count, size = self.coordinates.combinations, len(batch[0])
        if count > 1:  # every value on rows of its own
            latents = {name: z.repeat(count, *[1] * (z.dim() - 1)) for name, z in latents.items()}
        for name, value in self.coordinates.values.items():
            rows = value.repeat_interleave(particles, 0).unsqueeze(1)
            latents = {**latents, name: rows.expand(-1, size, *rows.shape[2:])}
        prior, likelihood = joint_terms(self.pair, latents, *batch)
        if count == 1 and self.start == "prior":
            return prior, likelihood
        first = prior if self.start == "prior" else log_posterior(self.pair, latents, *batch)
        joint = prior + likelihood
        if count > 1:
            first, joint = (table.reshape(count, -1, size).logsumexp(0) for table in (first, joint))
        return first, joint - first

    def _leap(
        self,
        state: Tensor,
        momentum: Tensor,
        first_slope: Tensor,
        ratio_slope: Tensor,
        beta: Tensor,
        step: Tensor,
        *batch: Tensor,
    ) -> Sequence[Tensor]:
        """One leapfrog step (Neal 2011, section 2.3)."""
        half = momentum + 0.5 * step * _tilted(first_slope, ratio_slope, beta)
        state = state + step * half
        first_slope, ratio_slope, first, ratio = self._look(state, *batch)
        momentum = half + 0.5 * step * _tilted(first_slope, ratio_slope, beta)
        return state, momentum, first_slope, ratio_slope, first, ratio

    def _pass(self, *tensors: Tensor) -> Sequence[Tensor]:
        """A leapfrog step within a trajectory, where only slopes are asked for, and rounded ones will do."""
        with products_in(self.precision):
            return self._leap(*tensors)[:4]

    def move(self, here: Place, beta: Tensor, step: Tensor, leapfrog: int, batch: Batch) -> tuple[Place, Tensor]:
        """One Hamiltonian move that leaves f_β as it is: leapfrog steps, accepted or not (Neal 2011, eq. 3.6).

        Whatever the force, a trajectory runs backwards and keeps volume, as long as the force is a function of the
        place. So slopes may be rounded; energies, which decide what is accepted, are whole.

        Args:
            here: where the particles are.
            beta: β, a tensor of one number, ().
            step: step sizes (B, 1).
            leapfrog: how many steps.
            batch: the batch.

        Returns:
            Where they are then, and the probability with which each was accepted, (K, B).
        """
        momentum = torch.randn_like(here.state)
        # Lengths vary at random, lest a trajectory comes back to where it began (Neal 2011, section 3.2).
        step = step * (1 + JITTER * (2 * torch.rand_like(here.first).unsqueeze(-1) - 1))
        moving: Sequence[Tensor] = here.state, momentum, here.first_slope, here.ratio_slope
        for _ in range(leapfrog - 1):
            moving = self.passed(*moving[:4], beta, step, *batch)
        state, after, *rest = self.leapt(*moving[:4], beta, step, *batch)
        there = Place(state, *rest)
        gain = _energy(there, after, beta) - _energy(here, momentum, beta)
        # A trajectory that left all bounds has NaN for an energy, and ends where it began.
        probability = gain.nan_to_num(nan=-math.inf).clamp(max=0).exp()
        accepted = torch.rand_like(probability) < probability
        return Place(*(_chosen(accepted, new, old) for new, old in zip(there, here, strict=True))), probability


def _slope(value: Tensor, state: Tensor) -> Tensor:
    """The gradient of values, (K, B), each in its own row of the state; zero where they do not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(state)
    (slope,) = torch.autograd.grad(value.sum(), state, retain_graph=True, materialize_grads=True)
    return slope


def _tilted(first: Tensor, ratio: Tensor, beta: Tensor) -> Tensor:
    """First + β ratio, where a ratio that is infinite counts for nothing at β = 0."""
    return first + torch.where(beta > 0, beta * ratio, 0.0)


def _energy(at: Place, momentum: Tensor, beta: Tensor) -> Tensor:
    """Log f_β and the log-density of the momentum, up to a constant, (K, B)."""
    return _tilted(at.first, at.ratio, beta) - 0.5 * momentum.square().sum(-1)


def _chosen(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.unsqueeze(-1) if new.dim() > accepted.dim() else accepted, new, old)
