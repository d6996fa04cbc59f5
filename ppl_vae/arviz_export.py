"""A pair and data in the form that ArviZ plots and summarises.

ArviZ 0.23 takes an `InferenceData`, ArviZ 1 an xarray `DataTree`; `build` makes whichever the installed
version reads. The groups are the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae.batches import Data, as_data
from ppl_vae.evaluate import check_density
from ppl_vae.pairs import Batch, Pair, Program, as_pair, evaluating
from ppl_vae.predictive import predict
from ppl_vae.rng import derived, seeded
from ppl_vae.sharding import presented
from ppl_vae.sites import Site, data_first
from ppl_vae.tails import FEWEST, pareto
from ppl_vae.traces import LogTerms, by_datum, log_terms, run_pair

__all__ = ["build", "to_arviz"]

Groups = dict[str, dict[str, Tensor]]

_ROWS = 20_000  # draws x data that go through the nets at once
_LIMIT = 2**32  # bytes of one variable
_DIMENSIONS = ("chain", "draw", "datum")
_UNDRAWN = ("observed_data", "constant_data")  # groups of what has no draws


def to_arviz(
    pair: Program | Pair,
    data: Any,
    draws: int = 200,
    *,
    seed: int = 0,
    max_data: int = 100,
    predictive: bool = True,
    resampled: int | None = None,
) -> Any:
    """Draws from the guide, or from the posterior as importance sampling has it, and what goes with them.

    The groups, all values in nats where they are log-densities:

    - posterior: each latent site, drawn from q(z | x); (chain, draw, datum, site_dim).
    - posterior_predictive: each observed site, drawn from p(x | z) at the same z; likewise.
    - log_likelihood: log p(x | z) of each draw, called as the observed site, or "all" where there are
      several; (chain, draw, datum).
    - sample_stats: log_weight = log p(x, z) - log q(z | x); (chain, draw, datum).
    - observed_data: each observed site; (datum, site_dim).
    - constant_data: khat, the Pareto shape of each datum's weights, where there are 25 of them or more; (datum).

    Draws are independent, so there is one chain, and diagnostics of mixing have nothing to find. They come
    from the guide, not from the exact posterior; log_weight is what importance sampling corrects them by. With
    ``resampled`` the correction is made: so many draws of the guide are weighed, the weights' tails smoothed, and
    ``draws`` of them chosen in proportion (sampling importance resampling, Rubin 1988). What stands in the groups
    is then about the posterior's, as far as khat allows; draws may repeat, and log_weight is what they had.
    Each datum has latents of its own, so leave-one-out statistics of log_likelihood leave nothing out:
    compare models by `ppl_vae.log_likelihood` instead.

    Args:
        pair: a program or pair.
        data: as `ppl_vae.fit` takes it.
        draws: per datum.
        seed: of the draws; the caller's random state is left as it is.
        max_data: the first so many data are exported.
        predictive: whether to draw the observed sites too: for images by far the largest group.
        resampled: of how many draws of the guide those exported are chosen by weight; at least ``draws``.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (ArviZ 1).

    Raises:
        ValueError: draws or max_data below 1, ``resampled`` below draws or 25, a variable past 4 GiB, a site
            called like a dimension, a latent outside the data plate, a guide that draws points where weights are
            asked for, or data that the pair cannot take.
    """
    if draws < 1 or max_data < 1:
        raise ValueError(f"draws and max_data must be at least 1; got draws={draws}, max_data={max_data}")
    if resampled is not None and resampled < max(draws, FEWEST):
        raise ValueError(
            f"resampled must be at least {max(draws, FEWEST)} (draws, and {FEWEST} for k-hat), got {resampled}"
        )
    pair, particles = as_pair(pair), resampled or draws
    with evaluating(pair), torch.no_grad():
        columns = _first(pair, data, max_data, seed)
        device = columns[0].device
        with seeded(seed, device):
            model, guide = run_pair(pair, columns, 1)
        sites = {**model, **guide}
        _check(sites, draws, predictive)
        if resampled is not None:
            check_density(pair)
        size = max(1, _ROWS // particles)
        parts = []
        for start in range(0, len(columns[0]), size):
            batch = tuple(column[start : start + size] for column in columns)
            with seeded(derived(seed, "draws", start), device):
                terms = log_terms(pair, *batch, particles=particles)
                _check_weights(terms.weight(), start)
                parts.append(_exported(pair, batch, terms, draws, sites, predictive, resampled is not None))
    groups = {group: _joined([part[group] for part in parts]) for group in parts[0]}
    groups["observed_data"] = {n: data_first(s, s["value"]).cpu() for n, s in model.items() if s["is_observed"]}
    arrays = {
        group: {n: (t if group in _UNDRAWN else t[None]).numpy() for n, t in values.items()}
        for group, values in groups.items()
    }
    dims = {name: _dims(name, site) for name, site in sites.items()}
    dims |= {"all": ["datum"], "log_weight": ["datum"], "khat": ["datum"]}
    return build(arrays, dims, {"datum": np.arange(len(columns[0]))})


def build(
    groups: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any] | npt.NDArray[Any]],
) -> Any:
    """Arrays in groups as what the installed ArviZ reads: the one place that knows its versions.

    Args:
        groups: group -> variable -> array (chain, draw, ...); no chain and draw in observed_data, constant_data.
        dims: variable -> names of its dimensions after chain and draw; in log_likelihood the names of a
            variable's event are left over and ignored.
        coords: dimension -> values along it.

    Returns:
        ``arviz.InferenceData`` or ``xarray.DataTree``.
    """
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its successor once a day when it is imported.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz
    nested = {group: dict(values) for group, values in groups.items()}
    names = {"dims": {name: list(of) for name, of in dims.items()}, "coords": dict(coords)}
    if "posterior" in signature(arviz.from_dict).parameters:  # before ArviZ 1: one argument per group
        return arviz.from_dict(**nested, **names)
    return arviz.from_dict(nested, **names)


def _first(pair: Pair, data: Any, count: int, seed: int) -> Batch:
    """The first `count` data as the model sees them, checked, on the pair's device."""
    source = as_data(data)
    batches: list[Batch] = []
    for row, batch in presented(pair, source[:count] if isinstance(source, Data) else source, count, seed):
        batches.append(batch)
        if row + len(batch[0]) >= count:
            break
    return tuple(torch.cat(parts)[:count] for parts in zip(*batches, strict=True))


def _check(sites: Mapping[str, Site], draws: int, predictive: bool) -> None:
    """Refuse sites whose names xarray needs, and arrays that would fill the memory."""
    for name, site in sites.items():
        if name in _DIMENSIONS:
            raise ValueError(f"site {name!r} is called like a dimension of ArviZ's arrays: rename it")
        size = draws * math.prod(site["fn"].shape()) * 4
        if size > _LIMIT and (predictive or not site["is_observed"]):
            advice = ", or predictive=False" if site["is_observed"] else ""
            raise ValueError(
                f"site {name!r}: {draws} draws for each datum would take {size / 2**30:.1f} GiB: "
                f"lower draws or max_data{advice}"
            )


def _check_weights(weight: Tensor, start: int) -> None:
    """Raise ValueError, naming the datum, for log weights (K, B) that are NaN or infinite."""
    wrong = (weight.isnan() | weight.isposinf()).any(0)
    if bool(wrong.any()):
        raise ValueError(
            f"data: a log weight of row {start + int(wrong.nonzero()[0])} is NaN or infinite; look for parameters "
            "that are NaN, and for scales that overflow or vanish there; leave it out to export the others"
        )


def _exported(
    pair: Pair,
    batch: Batch,
    terms: LogTerms,
    draws: int,
    sites: Mapping[str, Site],
    predictive: bool,
    resampled: bool,
) -> Groups:
    """All groups but observed_data for one batch: arrays (draw, B, ...) on the CPU, and k-hat (B,)."""
    # Log-densities in float64: ArviZ fits Pareto tails in the type it is given, and fails in float32.
    weight, likelihood = terms.weight().double(), terms.likelihood.double()
    latents = {n: by_datum(sites[n], z) for n, z in terms.samples.items()}
    groups: Groups = {}
    if len(weight) >= FEWEST and not pair.layout.points:
        khat, smoothed = pareto(weight)
        groups["constant_data"] = {"khat": khat.cpu()}
        if resampled:
            chosen = torch.multinomial(smoothed.softmax(0).T, draws, replacement=True).T
            weight, likelihood = weight.gather(0, chosen), likelihood.gather(0, chosen)
            latents = {n: z[chosen, torch.arange(len(batch[0]), device=z.device)] for n, z in latents.items()}
    observed = [name for name, site in sites.items() if site["is_observed"]]
    groups |= {
        "posterior": {n: z.cpu() for n, z in latents.items()},
        "log_likelihood": {observed[0] if len(observed) == 1 else "all": likelihood.cpu()},
        "sample_stats": {"log_weight": weight.cpu()},
    }
    if predictive:
        values = predict(pair, *batch, latents=latents, particles=draws, lead=(draws,))[1]
        groups["posterior_predictive"] = {n: x.cpu() for n, x in values.items()}
    return groups


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches side by side along the data: the last dimension of k-hat, the second of draws."""
    return {
        name: torch.cat([part[name] for part in parts], dim=min(1, parts[0][name].dim() - 1)) for name in parts[0]
    }


def _dims(name: str, site: Site) -> list[str]:
    """Names of a site's dimensions in order: datum, inner plates, event."""
    event, particles = site["fn"].event_dim, -len(site["fn"].batch_shape)
    inner = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized and particles < f.dim < -1}
    events = [f"{name}_dim_{k}" for k in range(event)] if event > 1 else [f"{name}_dim"] * event
    return ["datum", *(inner[dim] for dim in sorted(inner)), *events]
