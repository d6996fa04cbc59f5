"""Where a batch's numbers go wrong: the site, the parameter and the datum. Asked after a failure, at any cost."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ppl_vae.graphs import first_line
from ppl_vae.pairs import Batch, Pair, evaluating
from ppl_vae.resuming import load_random, random_streams
from ppl_vae.rng import seeded
from ppl_vae.sites import Site, plate_shape, statements
from ppl_vae.updates import Update, gradients

__all__ = ["TOO_LARGE", "Finding", "buffers_of", "diagnose", "first_wrong", "put_back"]

WITHIN = re.compile(r"^(programs\.\d+|params)\.")  # what a pair puts before a name
TOO_LARGE = "too large a step (lower the learning rate, or set clip_norm)"
DRAWS = 8  # of the latents, before a batch is taken to be sound


@dataclass(frozen=True)
class Finding:
    """Where a batch goes wrong.

    Attributes:
        what: in words; "{datum}" stands for the name of the datum.
        site: the site; None where densities are finite.
        row: of the batch, from 0; None where it is not one datum.
    """

    what: str
    site: str | None = None
    row: int | None = None


def diagnose(pair: Pair, updates: Sequence[Update], batch: Batch) -> Finding | None:
    """Where the numbers of a batch first go wrong: in data, parameters, densities, objectives, or gradients.

    The first draws are those that the streams at hand would give a step. Others follow, and data alone in
    evaluation mode, in which they do not mix. Nothing is changed, but for what a program does to itself.

    Args:
        pair: the pair, with the parameters to look at.
        updates: the steps that the batch makes.
        batch: as the model sees it.

    Returns:
        The finding; None where nothing goes wrong under these parameters.
    """
    found = _in_data(pair, batch) or _in_parameters(pair, updates)
    if found is not None:
        return found
    try:
        with _aside(pair, updates, batch[0].device), evaluating(pair):
            found = _in_programs(pair, updates, batch)
        if found is None and pair.training:
            with _aside(pair, updates, batch[0].device):
                found = _in_programs(pair, updates, batch)
    except (RuntimeError, ValueError, IndexError) as error:
        return Finding(f"the program cannot be run on the batch ({type(error).__name__}: {first_line(error)})")
    return found


def _in_programs(pair: Pair, updates: Sequence[Update], batch: Batch) -> Finding | None:
    start = random_streams(batch[0].device)
    for _ in range(DRAWS):
        if found := _in_sites(pair, batch):
            return found
    for update in updates:
        load_random(start, batch[0].device)
        if found := _in_update(pair, update, batch):
            return found
    return None


@contextmanager
def _aside(pair: Pair, updates: Sequence[Update], device: torch.device) -> Iterator[None]:
    """A block that leaves streams and buffers, such as running statistics, as they are, and warns of nothing."""
    with (
        seeded(None, device),
        unchanged(buffers_of(pair, updates)),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pyro's own ELBOs warn of the very numbers that are looked for
        yield


def buffers_of(pair: Pair, updates: Sequence[Update]) -> list[Tensor]:
    """What steps change besides parameters: the buffers of programs and objectives."""
    modules = (pair, *(update.objective for update in updates))
    return [*{id(b): b for module in modules for b in module.buffers()}.values()]


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put tensors back at the end."""
    held = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        put_back(tensors, held)


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], held: Sequence[Tensor]) -> None:
    """Put tensors back to earlier copies, in place."""
    for tensor, value in zip(tensors, held, strict=True):
        tensor.copy_(value)


def _in_data(pair: Pair, batch: Batch) -> Finding | None:
    for i, column in enumerate(batch):
        if rows := _wrong_rows(column):
            observed = pair.layout.observed.items() if pair.layout else ()
            site = next((name for name, (position, *_) in observed if position == i), None)
            return Finding(f"tensor {i} of {{datum}} holds NaN or infinity", site, rows[0])
    return None


def _in_parameters(pair: Pair, updates: Sequence[Update]) -> Finding | None:
    name = next((n for n, p in _named(pair, updates) if not bool(p.isfinite().all())), None)
    return None if name is None else Finding(f"parameter {name!r} holds NaN or infinity")


def _named(pair: Pair, updates: Sequence[Update]) -> Iterator[tuple[str, Tensor]]:
    """All parameters, by the names that the user's programs have for them."""
    for module in (pair, *(update.objective for update in updates)):
        for name, parameter in module.named_parameters():
            yield WITHIN.sub("", name), parameter


@torch.no_grad()
def _in_sites(pair: Pair, batch: Batch) -> Finding | None:
    """Run the programs as they are, on one draw; the guide's sites come first, then the model's in their order."""
    guide = poutine.trace(pair.guide).get_trace(*batch)
    for name, site in statements(guide).items():
        if found := _in_site(name, site, "posterior", batch):
            return found
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    for name, site in statements(model).items():
        if found := _in_site(name, site, "likelihood" if site["is_observed"] else "prior", batch):
            return found
    return None


def _in_site(name: str, site: Site, part: str, batch: Batch) -> Finding | None:
    log_density = scale_and_mask(site["fn"].log_prob(site["value"]), scale=site["scale"], mask=site["mask"])
    wrong = log_density[~log_density.isfinite()]
    if not len(wrong):
        return None
    what = f"site {name!r} ({part}): the log-density"
    if plate_shape(site) is None or log_density.shape[-1:] != batch[0].shape[:1]:
        return Finding(f"{what} is {float(wrong[0])}", name)
    rows = _wrong_rows(log_density.movedim(-1, 0))
    if len(rows) == len(batch[0]) > 1:
        return Finding(f"{what} of every datum of the batch is {float(wrong[0])}: {TOO_LARGE}", name)
    first = log_density[..., rows[0]].flatten()
    value = float(first[~first.isfinite()][0])
    others = f", and of {len(rows) - 1} more of its batch" if rows[1:] else ""
    return Finding(f"{what} of {{datum}}{others} is {value}", name, rows[0])


def _wrong_rows(column: Tensor) -> list[int]:
    """Which rows hold what is not finite."""
    found: list[int] = (~column.isfinite()).reshape(len(column), -1).any(1).nonzero()[:, 0].tolist()
    return found


def _in_update(pair: Pair, update: Update, batch: Batch) -> Finding | None:
    """Evaluate an objective and its gradient, on the batch, then on each of its rows alone."""
    start, size = random_streams(batch[0].device), len(batch[0])

    def wrong(rows: slice) -> str:
        load_random(start, batch[0].device)
        with torch.enable_grad(), update.products():
            value = update.value(*(column[rows] for column in batch))
            value, found = gradients(value, [update.parameters])
        if not bool(value.isfinite()):
            return f"the {update.name} of {{datum}} is {float(value)}, though its densities are finite"
        name = first_wrong(pair, update, found)
        return f"the gradient of {name} at {{datum}} is not finite, though the {update.name} is" if name else ""

    whole = wrong(slice(0, size))
    if not whole:
        return None
    try:
        alone = [wrong(slice(row, row + 1)) for row in range(size)]
    except (RuntimeError, ValueError, IndexError):  # a program need not take a batch of one
        alone = [""]
    row = next((i for i, text in enumerate(alone) if text), None)
    if row is None or (size > 1 and all(alone)):
        return Finding(whole.format(datum="the batch"))
    return Finding(alone[row], row=row)


def first_wrong(pair: Pair, update: Update, found: Sequence[Tensor | None]) -> str:
    """The name of the first of an update's parameters whose gradient is not finite; empty where all are."""
    for parameter, gradient in zip(update.parameters, found, strict=True):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return next((repr(n) for n, p in _named(pair, [update]) if p is parameter), "a parameter")
    return ""
