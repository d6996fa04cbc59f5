"""Simulation-based calibration: whether a guide's posteriors are neither biased nor too narrow nor too wide.

If z ~ p(z), x ~ p(x | z) and L draws come from the exact posterior of x, then z and those draws are exchangeable,
and the rank of z among them is uniform on 0, ..., L (Talts et al. 2018, theorem 1). A guide's ranks tell where it
departs from that: ranks that are low or high on average show a bias, ranks at both ends a guide too narrow, ranks
in the middle one too wide. It speaks of the model's own data, and of averages over them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae.annealing import simulated
from ppl_vae.conditionals import at_least_one
from ppl_vae.evaluate import judging, template
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.sharding import in_batches
from ppl_vae.sites import Site, masked, statements
from ppl_vae.traces import by_datum, check_table, check_whole, run_guide

__all__ = ["Calibration", "refuse_masks", "sbc"]

Array = npt.NDArray[np.float64]

ORDER = 4  # of the smooth test, as Neyman has it
CLEAR = 3.0  # standard errors from which a shift or a width is named
SHOWN = 5  # dimensions that are printed
ENOUGH = 100  # data for p-values that hold for many of them
TRIALS = 1000  # simulated for a band


@dataclass(frozen=True)
class Calibration:
    """Ranks of N simulated latents among L draws from the guide, and what they say of it.

    Each dimension is put to Neyman's smooth test of order 4, with polynomials that are orthonormal under the
    uniform law on 0, ..., L itself, so that ranks are taken as the whole numbers they are (Rayner & Best 1989).
    The sum of squared components is χ² of 4 degrees of freedom for large N, some hundred data. Over all dimensions
    p-values are adjusted by Holm's method, which holds however the dimensions depend on each other.

    Attributes:
        ranks: latent site -> int64 (N, *plates, *event), each from 0 to L.
        draws: L.
        level: probability that no dimension of an exact guide is told to be outside; and that of a band.
    """

    ranks: dict[str, Tensor]
    draws: int
    level: float = 0.95

    @property
    def pit(self) -> dict[str, Tensor]:
        """Ranks as shares of (0, 1), float64: (rank + ½) / (L + 1)."""
        return {name: (rank.double() + 0.5) / (self.draws + 1) for name, rank in self.ranks.items()}

    @property
    def points(self) -> Tensor:
        """Where the ranks' distribution function is looked at: 1 / (L + 1), ..., L / (L + 1), float64 (L,)."""
        return torch.arange(1, self.draws + 1).double() / (self.draws + 1)

    @property
    def difference(self) -> dict[str, Tensor]:
        """The ranks' empirical distribution function less the uniform one at the points, (L, *plates, *event)."""
        found = {}
        for name, rank in self.ranks.items():
            ordered = rank.flatten(1).T.sort(1).values if rank.dim() > 1 else rank[None].sort(1).values
            wanted = torch.arange(self.draws).expand(len(ordered), -1).contiguous()
            share = torch.searchsorted(ordered.contiguous(), wanted, right=True).double() / len(rank)
            found[name] = (share - self.points).T.reshape(self.draws, *rank.shape[1:])
        return found

    def band(self, level: float | None = None) -> tuple[Tensor, Tensor]:
        """Bounds that the whole difference of a calibrated dimension stays within, with probability ``level``.

        Simultaneous over the points (Säilynoja, Bürkner & Vehtari 2022, algorithm 1), by ArviZ; for one dimension
        at a time, as a plot shows it. For D of them 1 - (1 - level) / D is Bonferroni's.

        Args:
            level: by default that of the calibration.

        Returns:
            The lower and the upper bound, float64 (L,) each.

        Raises:
            ValueError: a level that is not between 0 and 1.
        """
        level = _checked(self.level if level is None else level)
        size = len(next(iter(self.ranks.values())))
        lower, upper = (torch.from_numpy(b) for b in _ecdf_band(size, self.points.numpy(), level))
        return lower - self.points, upper - self.points

    @property
    def components(self) -> dict[str, Tensor]:
        """Components of the smooth test, float64 (4, *plates, *event), each N(0, 1) if calibrated.

        The first is positive where z lies above the draws too often; the second where ranks gather at both ends,
        as those of a guide too narrow do; then their skewness and their tails. Fewer than 4 where L is smaller.
        """
        polynomials = _orthonormal(self.draws, min(ORDER, self.draws))
        return {name: polynomials[:, rank].sum(1) / len(rank) ** 0.5 for name, rank in self.ranks.items()}

    @property
    def p_values(self) -> dict[str, Tensor]:
        """The p-value of each dimension, taken alone: latent site -> (*plates, *event)."""
        return {
            name: torch.special.gammaincc(torch.tensor(len(c) / 2).double(), c.square().sum(0) / 2)
            for name, c in self.components.items()
        }

    @property
    def adjusted(self) -> dict[str, Tensor]:
        """P-values adjusted for the number of dimensions by Holm's method: latent site -> (*plates, *event)."""
        alone = self.p_values
        flat = torch.cat([p.flatten() for p in alone.values()])
        ordered, order = flat.sort()
        left = torch.arange(len(flat), 0, -1)
        adjusted = torch.empty_like(flat)
        adjusted[order] = (ordered * left).cummax(0).values.clamp_max(1.0)
        parts = torch.split(adjusted, [p.numel() for p in alone.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(alone.items(), parts, strict=True)}

    @property
    def outside(self) -> dict[str, Tensor]:
        """Which dimensions are not calibrated, at the level, over all of them: latent site -> bool."""
        return {name: p < 1 - self.level for name, p in self.adjusted.items()}

    @property
    def calibrated(self) -> bool:
        """The verdict: no dimension is outside."""
        return not any(bool(o.any()) for o in self.outside.values())

    def __str__(self) -> str:
        size, total = len(next(iter(self.ranks.values()))), sum(o.numel() for o in self.outside.values())
        found = sorted(
            (float(p[tuple(at)]), name, at)
            for name, p in self.adjusted.items()
            for at in self.outside[name].nonzero().tolist()
        )
        lines = [
            f"{len(found)} of {total} dimensions not calibrated at {100 * self.level:g}% "
            f"({size} simulated data, ranks among {self.draws} draws)"
        ]
        lines += [f"  {_entry(name, at)}: {self._how(name, at)}, p {p:.1g}" for p, name, at in found[:SHOWN]]
        lines += [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to believe it, if so."""
        size = len(next(iter(self.ranks.values())))
        return () if size >= ENOUGH else (f"{size} data are few for the p-values, which want {ENOUGH} or more",)

    def _how(self, name: str, at: list[int]) -> str:
        """What the guide is in one dimension, in words.

        A shift moves ranks to both ends, too, though more of them to one. Their normal scores tell it from a wrong
        width, where posterior and guide are normal. So what is named must show in both.
        """
        scores = torch.special.ndtri((torch.arange(self.draws + 1).double() + 0.5) / (self.draws + 1))
        known, found = scores.square().mean(), scores[self.ranks[name].movedim(0, -1)[tuple(at)]]
        shift = found.mean() / known.sqrt() * len(found) ** 0.5
        width = (found.var(correction=0) - known) / scores.square().std(correction=0) * len(found) ** 0.5
        component = self.components[name].movedim(0, -1)[tuple(at)]
        words = (("too low", "too high", shift), ("too narrow", "too wide", width))
        clear = {
            word: min(sign * float(size), sign * float(c))
            for (more, less, size), c in zip(words, component, strict=False)
            for word, sign in ((more, 1), (less, -1))
        }
        named = sorted((word for word in clear if clear[word] > CLEAR), key=clear.__getitem__, reverse=True)
        return " and ".join(named) or "of another shape"


@torch.no_grad()
def sbc(
    program: Program | Pair,
    size: int,
    *context: Tensor,
    draws: int = 99,
    level: float = 0.95,
    like: Batch | None = None,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
) -> Calibration:
    """Simulation-based calibration of the guide (Talts et al. 2018, algorithm 1).

    Latents and data are simulated from the model, and each latent is ranked among draws of the guide at its datum,
    dimension by dimension. Ranks need nothing but an order, so any support will do. Where draws equal the latent,
    as discrete ones do, its place among them is drawn at random, which keeps ranks uniform; categories are ordered
    by their numbers.

    Args:
        program: the pair.
        size: how many data to simulate; p-values want some hundred.
        *context: conditions c, one row for each.
        draws: L, draws of the guide for each datum; ranks take L + 1 values.
        level: probability that an exact guide passes.
        like: for a program without ``blank``: a batch of ``size`` rows of the right shapes.
        batch_size: data at once.
        chunk: draws per batch held at once.
        seed: fixes data and draws.

    Returns:
        Ranks with their tests.

    Raises:
        ValueError: a number below one, a level that is not between 0 and 1; nothing latent, masked latents, draws
            that are NaN; what `ppl_vae.sandwich` refuses of a model to simulate from.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.4))  # the posterior's scale is 0.71
    >>> print(sbc(Pair(model, guide), 400, like=(torch.zeros(400),)))
    1 of 1 dimensions not calibrated at 95% (400 simulated data, ranks among 99 draws)
      z: too narrow, p ...
    """
    at_least_one(size=size, draws=draws, batch_size=batch_size, chunk=chunk)
    _checked(level)
    with judging(program, seed) as pair:
        shapes = template(pair, size, context, like)
        check_table(pair, shapes, 1)
        if pair.layout is not None and not pair.layout.latents:
            raise ValueError("program: nothing is latent, so there is nothing to rank")
        batch, latents = simulated(pair, shapes)

        def judge(_: int, columns: Batch) -> dict[str, Tensor]:
            true = dict(zip(latents, columns[len(batch) :], strict=True))
            return _ranks(pair, columns[: len(batch)], true, draws, chunk)

        columns = (*batch, *(z[0] for z in latents.values()))
        return Calibration(in_batches(pair, columns, batch_size).collect(judge), draws, level)


def _ranks(pair: Pair, batch: Batch, true: dict[str, Tensor], draws: int, chunk: int) -> dict[str, Tensor]:
    """How many draws of the guide lie below each latent, (B, *plates, *event); of equal ones a random number."""
    less = {name: torch.zeros(z.shape, dtype=torch.int64, device=z.device) for name, z in true.items()}
    same = {name: torch.zeros_like(count) for name, count in less.items()}
    for first in range(0, draws, chunk):
        sites = statements(run_guide(pair, batch, min(chunk, draws - first)))
        refuse_masks(sites.values())
        for name, z in true.items():
            drawn = by_datum(sites[name], sites[name]["value"])
            check_whole(drawn, batch)
            if bool(drawn.isnan().any()):  # which would compare as neither less nor equal
                raise ValueError(f"site {name!r}: the guide draws NaN; look for parameters that are NaN")
            less[name] += (drawn < z).sum(0)
            same[name] += (drawn == z).sum(0)
    return {
        name: less[name] + (torch.rand(z.shape, dtype=torch.float64, device=z.device) * (same[name] + 1)).long()
        for name, z in true.items()
    }


def refuse_masks(sites: Iterable[Site]) -> None:
    """Raise ValueError, naming the first, for latents that are masked: some of their values stand for nothing."""
    for site in sites:
        if site["mask"] is not None or masked(site["fn"]):
            raise ValueError(
                f"site {site['name']!r}: it is masked, so that for some data its value stands for nothing; give a "
                "batch, and a program, in which every datum has it"
            )


def _orthonormal(draws: int, order: int) -> Tensor:
    """Polynomials of degree 1 to ``order``, orthonormal under the uniform law on 0, ..., L: (order, L + 1)."""
    even = torch.linspace(-1, 1, draws + 1, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(torch.stack([even**k for k in range(order + 1)], 1))
    signed: Tensor = basis * triangle.diagonal().sign() * (draws + 1) ** 0.5  # each rises at its right end
    return signed.T[1:]


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return level


def _entry(name: str, at: list[int]) -> str:
    return f"{name}[{', '.join(map(str, at))}]" if at else name


def _ecdf_band(size: int, points: Array, level: float) -> tuple[Array, Array]:
    """The band of an empirical distribution function of ``size`` uniform values at some points, by ArviZ.

    Both of its versions simulate, from the same stream, and so agree. What is uniform on 0, ..., L has at its
    points the distribution function of what is uniform on [0, 1], so nothing is lost by simulating the latter.
    """
    stream = np.random.default_rng(0)
    if find_spec("arviz_stats") is not None:  # ArviZ 1
        tools = import_module("arviz_stats.ecdf_utils")
        alone = tools.simulate_confidence_bands(size, 1, points, level, TRIALS, stream)
        lower, upper = tools.get_pointwise_confidence_band(alone, size, points)
        return lower, upper
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its successor once a day when it is imported.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        tools = import_module("arviz.stats.ecdf_utils")
    drawn = {"rvs": lambda count, random_state: random_state.uniform(size=count), "random_state": stream}
    method = {"method": "simulated", "num_trials": TRIALS}
    lower, upper = tools.ecdf_confidence_band(size, points, points, level, **method, **drawn)
    return lower, upper
