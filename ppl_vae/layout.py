"""Look at a pair once before using it: what its sites are, and whether the data suit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.pairs import Batch, Pair, evaluating
from ppl_vae.rng import seeded
from ppl_vae.sites import Site, base, masked, plate_shape, statements

__all__ = [
    "Layout",
    "check_finite",
    "check_rows",
    "check_supports",
    "check_values",
    "count_values",
    "inspect",
    "position",
]

WORDS = {  # for supports whose own names say little
    constraints.nonnegative_integer: "whole numbers 0, 1, 2, ... in floating point (bytes are pixels, x / 255)",
}


@dataclass(frozen=True)
class Layout:
    """What a pair declares.

    Attributes:
        nesting: how many dimensions its plates take, the data plate at dim -1 being the first.
        latents: names of the latent sites, in the guide's order.
        observed: observed site -> (position of its tensor in the batch or None, family, support or None); a
            tensor that the model reshapes first is found, a copy of it is not.
        score_only: latent sites without a reparameterised sampler.
        values: of each of these, how many values it has, or, where they cannot be listed, why.
        enumerated: latent sites that the model enumerates and the guide leaves out, as TraceEnum_ELBO allows.
        points: latent sites whose posterior is a point where the prior has a density: such a guide has no bound.
        outside: sites outside the data plate; with any, there is no bound per datum.
        population: how many data the data plate stands for, where that is not the batch's length.
    """

    nesting: int
    latents: tuple[str, ...]
    observed: dict[str, tuple[int | None, str, Any]]
    score_only: tuple[str, ...]
    values: dict[str, int | str]
    enumerated: tuple[str, ...]
    points: tuple[str, ...]
    outside: tuple[str, ...]
    population: int | None


def inspect(pair: Pair, batch: Batch) -> Layout:
    """Run a pair once on a batch, check its structure, and remember its layout in ``pair.layout``.

    Parameters that the programs create when first run exist afterwards. No random number is taken from the
    caller's stream, and running statistics (BatchNorm) stay as they are: modules run in evaluation mode.

    Raises:
        ValueError: the programs cannot take the batch (rank, width, type), their latents do not match, an
            observed value is outside its distribution's support; the message names the site or the tensor.
    """
    check_rows(pair, batch, "batch tensor")
    model, guide = _run(pair, batch)
    if pair.expected:
        raise ValueError(f"the loaded weights are another program's: it has no {min(pair.expected)!r}")
    enumerated = _match(model, guide)
    sites = [*model.values(), *guide.values()]
    for site in sites:
        _check_shape(site)
    dims = [f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    frame = next((f for s in sites for f in s["cond_indep_stack"] if f.dim == -1), None)
    full = None if frame is None else frame.full_size or frame.size
    layout = Layout(
        nesting=-min(dims, default=-1),
        latents=tuple(guide),
        observed={n: _observation(s, batch) for n, s in model.items() if s["is_observed"]},
        score_only=tuple(n for n, s in guide.items() if not s["fn"].has_rsample),
        values={n: count_values(s) for n, s in guide.items() if not s["fn"].has_rsample},
        enumerated=enumerated,
        points=_points(model, guide),
        outside=tuple(dict.fromkeys(s["name"] for s in sites if plate_shape(s) is None)),
        population=full if full != len(batch[0]) else None,
    )
    pair.layout = layout
    return layout


def _run(pair: Pair, batch: Batch) -> tuple[dict[str, Site], dict[str, Site]]:
    try:
        with seeded(None, batch[0].device), torch.no_grad(), evaluating(pair), pyro.validation_enabled(False):
            guide = poutine.trace(pair.guide).get_trace(*batch)
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # Pyro adds a table of shapes
        advice = (
            "Flat nets want x as (B, features): use x.flatten(1); check also the net's first width"
            if batch[0].is_floating_point()
            else "Nets want floating-point x: use x.float()"
        )
        raise ValueError(f"the program cannot take a batch of {_shapes(batch)}: {reason}. {advice}") from error
    return statements(model), statements(guide)


def _match(model: dict[str, Site], guide: dict[str, Site]) -> tuple[str, ...]:
    """Raise ValueError unless the guide draws the model's latents; return those left out to be enumerated."""
    latents = {n for n, s in model.items() if not s["is_observed"]}
    extra = {n for n, s in guide.items() if not s["infer"].get("is_auxiliary")} - latents
    if seen := [n for n, s in guide.items() if s["is_observed"]]:
        raise ValueError(f"site {seen[0]!r}: the guide observes it; a guide only draws latents")
    enumerated = {n for n in latents - set(guide) if model[n]["infer"].get("enumerate")}
    if missing := latents - set(guide) - enumerated:
        raise ValueError(f"site {min(missing)!r}: a latent of the model that the guide does not draw")
    if extra:
        raise ValueError(f"site {min(extra)!r}: drawn by the guide, but no latent of the model")
    return tuple(sorted(enumerated))


def count_values(site: Site, plates: int = 1) -> int | str:
    """How many values a discrete site has, or why there is no list of them for each datum.

    ``plates`` are those around each draw: the data's, and a second one where there are particles.
    """
    fn = site["fn"]
    if not fn.has_enumerate_support:
        family = type(base(fn)).__name__
        return f"{family} with events of shape {tuple(fn.event_shape)} gives no list of its values to sum over"
    if len(plate_shape(site) or ()) != plates:
        return "it has several draws per datum, in an inner plate"
    if site["mask"] is not None or masked(fn):
        return "it is masked, so its density is not its probability"
    return len(fn.enumerate_support(expand=False))


def _points(model: dict[str, Site], guide: dict[str, Site]) -> tuple[str, ...]:
    """Latents for which a guide draws points among real numbers; whole ones have a probability, as others have.

    Pyro's automatic guides draw points too, around auxiliary sites that hold the density.
    """
    if any(site["infer"].get("is_auxiliary") for site in guide.values()):
        return ()
    lone = {n for n, s in guide.items() if isinstance(base(s["fn"]), Delta) and s["value"].is_floating_point()}
    return tuple(n for n in guide if n in lone and n in model and not isinstance(base(model[n]["fn"]), Delta))


def _check_shape(site: Site) -> None:
    """Raise ValueError if a site in the data plate has dimensions that neither a plate nor an event explains."""
    expected, given = plate_shape(site), tuple(site["fn"].batch_shape)
    if expected is not None and given != expected:
        raise ValueError(
            f"site {site['name']!r}: its distribution has batch shape {given}, its plates {expected}; "
            "declare the dimensions of one event with .to_event"
        )


def _observation(site: Site, batch: Batch) -> tuple[int | None, str, Any]:
    """Check an observed value's shape and support; say which tensor of the batch it is."""
    fn, value = site["fn"], site["value"]
    expected = fn.batch_shape + fn.event_shape
    if value.shape != expected:
        raise ValueError(
            f"site {site['name']!r}: observed value has shape {tuple(value.shape)}, its distribution "
            f"{tuple(expected)}; the data's width must be the width of the likelihood"
        )
    fn = base(fn)
    family, support = type(fn).__name__, fn.support
    check_values(site["name"], value, family, support)
    # A support that depends on parameters speaks of this batch alone.
    declared = getattr(type(fn), "support", None)
    static = isinstance(declared, constraints.Constraint) and not isinstance(declared, property)
    return position(site, batch), family, support if static else None


def position(site: Site, batch: Batch) -> int | None:
    """Which tensor of the batch a site observes: itself or, under a support of single entries, reshaped."""
    value, elementwise = site["value"], base(site["fn"]).support.event_dim == 0
    same = [i for i, t in enumerate(batch) if t is value]
    if elementwise and not same and (entries := _entries(value)) is not None:
        same = [i for i, t in enumerate(batch) if _entries(t) == entries]
    return same[0] if same else None


def _entries(tensor: Tensor) -> tuple[int, int, torch.dtype] | None:
    """Where a tensor's entries lie, whatever its shape; None if there are gaps or repeats among them."""
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.data_ptr(), tensor.numel(), tensor.dtype) if span == tensor.numel() - 1 else None


def check_rows(pair: Pair, columns: Batch, name: str) -> None:
    """Raise ValueError unless columns share their rows, hold numbers only, and suit the program's own check."""
    lengths = {len(t) if t.dim() else 0 for t in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"batch: tensors must share a first dimension of at least 1, got {_shapes(columns)}")
    for i, column in enumerate(columns):
        check_finite(column, f"{name} {i}")
    if callable(check := getattr(pair.program, "check", None)):
        check(*columns)


def check_supports(layout: Layout, columns: Sequence[Tensor | None]) -> None:
    """Raise ValueError if a column, presented as the model sees it, has entries outside its site's support.

    A column of None is not known, and left out; so are sites whose support depends on parameters.
    """
    for site, (position, family, support) in layout.observed.items():
        column = columns[position] if position is not None and position < len(columns) else None
        if column is not None and support is not None:
            check_values(site, column, family, support)


def check_values(site: str, value: Tensor, family: str, support: Any) -> None:
    """Raise ValueError, naming site, family, row and value, if ``value`` has entries outside ``support``."""
    wrong = ~support.check(value).reshape(len(value), -1)
    if not bool(wrong.any()):
        return
    row = int(wrong.any(1).nonzero()[0])
    entries = value.reshape(len(value), -1)[row]
    entry = float(entries[wrong[row]][0] if wrong.shape[1] == entries.numel() else entries.flatten()[0])
    advice = (
        "binarise the data (redraw or threshold), or choose a likelihood for real values such as Normal"
        if support is constraints.boolean
        else "rescale the data or choose another likelihood"
    )
    raise ValueError(
        f"site {site!r}: {family} takes {WORDS.get(support, support)}, got {entry:g} in row {row}; {advice}"
    )


def check_finite(column: Tensor, name: str) -> None:
    """Raise ValueError naming the first row of ``column`` that holds NaN or infinity."""
    if column.is_floating_point() and not bool(torch.isfinite(column).all()):
        row = int((~torch.isfinite(column)).reshape(len(column), -1).any(1).nonzero()[0])
        raise ValueError(f"{name}: row {row} holds NaN or infinity; remove or impute it")


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in batch)
