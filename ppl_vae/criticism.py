"""Predictive checks: whether data that a model makes look like those it was given, in what a statistic sees.

A statistic T of each datum is compared with T of replicates x_rep ~ p(x | z). With z ~ q(z | x) the question is
whether a datum could have come from where the guide puts it (posterior predictive, Gelman, Meng & Stern 1996);
with z ~ p(z), whether the model makes data like these at all (prior predictive, Box 1980).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae.conditionals import at_least_one
from ppl_vae.estimates import Average, average
from ppl_vae.evaluate import judging
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.sharding import presented
from ppl_vae.sites import data_first, statements
from ppl_vae.traces import by_datum, check_table, check_whole, log_density, run_guide, run_model

__all__ = ["PredictiveCheck", "Statistic", "predictive_check"]

Statistic = Callable[[Tensor], Tensor] | Literal["discrepancy"]
Table = dict[str, tuple[Tensor, Tensor]]  # of data and of replicates, (k, B) each


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of N data and of K replicates of each.

    Attributes:
        observed: statistic -> T(x), float64 (N, 1); of a discrepancy D(x, z), at each draw of z, (N, K).
        replicated: statistic -> T(x_rep), float64 (N, K); D(x_rep, z) at the same draws of z.
        latents: what z was drawn from.
    """

    observed: dict[str, Tensor]
    replicated: dict[str, Tensor]
    latents: Literal["guide", "prior"]

    @property
    def p(self) -> dict[str, Tensor]:
        """P(T(x_rep) >= T(x)) of each datum, (N,) (Gelman, Meng & Stern 1996).

        In a model that is right, prior predictive ones are uniform. Posterior predictive ones are nearer to ½, as
        each datum has had its say in z: they do not reject at the rate of their level, but less.
        """
        return {name: self._reached(name).double().mean(1) for name in self.observed}

    @property
    def stderr(self) -> dict[str, Tensor]:
        """Monte Carlo standard error of each p-value, (N,)."""
        draws = next(iter(self.replicated.values())).shape[1]
        # As if one replicate more had reached T(x), and one not: none of K is no proof that none will.
        shares = {name: (draws * p + 1) / (draws + 2) for name, p in self.p.items()}
        return {name: (p * (1 - p) / draws).sqrt() for name, p in shares.items()}

    @property
    def average(self) -> dict[str, Average]:
        """The p-values' mean over data, near ½ unless data differ from replicates all in one direction."""
        return {name: average(p) for name, p in self.p.items()}

    @property
    def whole(self) -> dict[str, Average]:
        """The p-value of the data set as one: P(mean T of a replicated data set >= mean T of the data).

        The mean over many data is known well, so it tells a small difference that all data share.
        """
        return {n: average(t.mean(0) >= self.observed[n].mean(0)) for n, t in self.replicated.items()}

    def __str__(self) -> str:
        size, draws = next(iter(self.replicated.values())).shape
        kind = "posterior" if self.latents == "guide" else "prior"
        lines = [f"{kind} predictive check, P(T(x_rep) >= T(x)): {size} data, {draws} replicates of each"]
        for name, p in self.average.items():
            seen, made = (float(t[name].mean()) for t in (self.observed, self.replicated))
            lines.append(
                f"  {name}: p {p:.3f} per datum, {self.whole[name]:.3f} of all together; T {seen:.4g} of data, "
                f"{made:.4g} of replicates"
            )
        return "\n".join(lines)

    def _reached(self, name: str) -> Tensor:
        return self.replicated[name] >= self.observed[name]


@torch.no_grad()
def predictive_check(
    program: Program | Pair,
    data: Any,
    statistic: Statistic | Mapping[str, Statistic] | None = None,
    *,
    latents: Literal["guide", "prior"] = "guide",
    draws: int = 100,
    site: str | None = None,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
) -> PredictiveCheck:
    """Compare statistics of data with those of replicates that the model makes.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        statistic: T, a function of an observed site's values, (..., B, *plates, *event) -> (..., B), or several by
            name; "discrepancy" stands for -log p(x | z), which depends on z too, and so needs z of the datum
            itself, from the guide (Gelman, Meng & Stern 1996). By default mean and standard deviation
            over the entries of a datum and, with the guide, the discrepancy.
        latents: z of replicates: from the "guide" at each datum, or from the "prior".
        draws: K, replicates of each datum.
        site: which observed site; may be left out where there is one.
        batch_size: data per batch.
        chunk: replicates per batch held at once; their statistics are all kept, N K numbers each.
        seed: fixes the draws, and redrawn pixels.

    Returns:
        Statistics, with p-values of each datum and of all together. A mask on the site, as of missing entries, is
        honoured by the discrepancy alone.

    Raises:
        ValueError: a number below one; no such site, or several to choose from; data that do not suit the pair; a
            statistic that is no function, does not give one number for each datum, or gives NaN; a discrepancy
            with latents from the prior.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 8), 0.3).to_event(1), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x.mean(-1), 0.1))
    >>> x = torch.randn(50, 1) + 0.9 * torch.randn(50, 8)  # three times as rough as the model has it
    >>> check = predictive_check(Pair(model, guide), x, {"range": lambda x: x.amax(-1) - x.amin(-1)})
    >>> bool(check.average["range"].mean < 0.1)
    True
    """
    at_least_one(draws=draws, chunk=chunk)
    if latents not in ("guide", "prior"):
        raise ValueError(f"latents must be 'guide' or 'prior', got {latents!r}")
    with judging(program, seed, "replicates") as pair:

        def judge(_: int, batch: Batch) -> dict[tuple[str, int], Tensor]:
            check_table(pair, batch, 1)
            name, x = _observed(pair, batch, site)
            statistics = _statistics(statistic, x.dim() - 1, latents)
            sizes = (min(chunk, draws - first) for first in range(0, draws, chunk))
            chunks = [_replicated(pair, batch, name, statistics, size, latents) for size in sizes]
            table = {n: _joined([c[n] for c in chunks]) for n in statistics}
            for n, function in statistics.items():
                if callable(function):
                    table[n] = _checked(n, function(x), tuple(x.shape), 1)[None], table[n][1]
            return {(n, i): column.T for n, columns in table.items() for i, column in enumerate(columns)}

        found = presented(pair, data, batch_size, seed).collect(judge)
    observed, replicated = ({n: t for (n, i), t in found.items() if i == of} for of in (0, 1))
    return PredictiveCheck(observed, replicated, latents)


def _observed(pair: Pair, batch: Batch, site: str | None) -> tuple[str, Tensor]:
    """The observed site, and its value (B, *plates, *event)."""
    found = {n: s for n, s in statements(run_model(pair, batch, 1)).items() if s["is_observed"]}
    if site is None and len(found) != 1:
        raise ValueError(f"site: the model observes {sorted(found)}; say which")
    if site is not None and site not in found:
        raise ValueError(f"site: the model does not observe {site!r}, but {sorted(found)}")
    name = next(iter(found)) if site is None else site
    x = data_first(found[name], found[name]["value"])
    check_whole(x[None], batch)
    return name, x


def _statistics(
    given: Statistic | Mapping[str, Statistic] | None, entries: int, latents: str
) -> Mapping[str, Statistic]:
    """Statistics by name; the usual ones for a datum of so many dimensions."""
    if given is None:
        across = tuple(range(-entries, 0))
        usual: dict[str, Statistic] = {"mean": lambda x: x.double()}
        if entries:
            usual["mean"] = lambda x: x.double().mean(across)
            usual["sd"] = lambda x: x.double().std(across, correction=0)
        return usual | ({"discrepancy": "discrepancy"} if latents == "guide" else {})
    if not isinstance(given, Mapping):
        given = {given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__): given}
    if not given:
        raise ValueError("statistic: expected one or more by name, got none")
    for name, function in given.items():
        if not callable(function) and function != "discrepancy":
            raise ValueError(f"statistic {name!r}: expected a function of x, or 'discrepancy', got {function!r}")
        if function == "discrepancy" and latents == "prior":
            raise ValueError(
                f"statistic {name!r}: -log p(x | z) compares a datum with replicates of the same z, and draws of "
                "the prior are no datum's; give latents='guide'"
            )
    return given


def _replicated(
    pair: Pair,
    batch: Batch,
    name: str,
    statistics: Mapping[str, Statistic],
    size: int,
    latents: Literal["guide", "prior"],
) -> Table:
    """Each statistic of k replicates of each datum, (k, B); and a discrepancy of the datum at the same z."""
    guide = run_guide(pair, batch, size) if latents == "guide" else None
    free = run_model(pair, batch, size, guide, free=True)
    site = statements(free)[name]
    x = by_datum(site, site["value"])
    found: Table = {}
    for n, function in statistics.items():
        if callable(function):
            made = _checked(n, function(x), tuple(x.shape), 2)
            found[n] = made[:0], made  # of the datum itself z is no part
        else:
            given = statements(run_model(pair, batch, size, free))[name]
            seen, made = (_checked(n, -log_density([s], batch, size), tuple(x.shape), 2) for s in (given, site))
            found[n] = seen, made
    return found


def _checked(name: str, value: Any, shape: tuple[int, ...], lead: int) -> Tensor:
    """A statistic's values, float64 (..., B), of x of a shape with ``lead`` dimensions up to that of the data."""
    if not torch.is_tensor(value) or tuple(value.shape) != shape[:lead]:
        got = f"shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise ValueError(
            f"statistic {name!r}: expected one number for each datum, shape {shape[:lead]} for x of shape "
            f"{shape}, got {got}; reduce the last dimensions, as x.amax(-1) does"
        )
    if bool(value.isnan().any()):
        raise ValueError(f"statistic {name!r}: it is NaN for some x, and NaN cannot be compared")
    return value.double()


def _joined(tables: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of tables (k, B) as one pair of all draws."""
    first, second = zip(*tables, strict=True)
    return torch.cat(first), torch.cat(second)
