"""From a (model, guide) pair to a table of log-densities: where effect handlers run.

`log_terms` gives log p(x | z), log p(z) and log q(z | x), each of shape (K particles, B data), in nats. The
densities are unscaled: a subsampling plate's N/B never gets inside an importance weight. Masks are honoured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.layout import Layout, inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.sites import Site, base, data_first, family, hand_scale, mean_of, plate_shape, statements

__all__ = [
    "KL",
    "LogTerms",
    "by_datum",
    "guide_means",
    "inspect_shapes",
    "log_terms",
    "predict",
    "require_guided",
    "run_pair",
]

KL = Literal["sampled", "analytic", "auto"]


@dataclass(frozen=True)
class LogTerms:
    """Log-densities of K particles for each of B data, in nats.

    Attributes:
        likelihood: Σ over observed sites of log p(x | z), shape (K, B).
        prior: Σ over latent sites of log p(z), shape (K, B).
        posterior: Σ over latent sites of log q(z | x), shape (K, B).
        samples: the latents drawn, site name -> (K, B, *event); inner plates stand between K and B.
        kl: KL(q || p) given the particle's earlier latents, (K, B), where it was asked for.
        score_only: latent sites whose draws carry no gradient.
    """

    likelihood: Tensor
    prior: Tensor
    posterior: Tensor
    samples: dict[str, Tensor]
    kl: Tensor | None = None
    score_only: tuple[str, ...] = field(default=())

    @property
    def rate(self) -> Tensor:
        """What the code costs, (K, B): the KL if it was asked for, else its sample log q - log p(z)."""
        return self.posterior - self.prior if self.kl is None else self.kl

    def weight(self, beta: Tensor | float = 1.0) -> Tensor:
        """Log importance weights log p(x | z) - beta * rate, (K, B)."""
        return self.likelihood - beta * self.rate


def log_terms(
    pair: Pair, *batch: Tensor, particles: int = 1, kl: KL = "sampled", keep_scales: bool = False
) -> LogTerms:
    """Run guide and model once on all particles, and tabulate their log-densities.

    Args:
        pair: the pair.
        *batch: tensors as the model takes them, first dimension B.
        particles: K.
        kl: "sampled" leaves the KL out; "analytic" uses closed forms and refuses where one is missing or not
            valid; "auto" uses closed forms where they hold and samples elsewhere.
        keep_scales: multiply each site by its own ``poutine.scale`` (for Pyro's ELBOs) instead of refusing it.

    Returns:
        The table; every tensor has gradients to the parameters of both programs.

    Raises:
        ValueError: a site that is not inside the data plate (dim -1), has event dimensions not declared, is
            scaled by hand, or has no analytic KL though it was asked for; the message names the site.
    """
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    layout = pair.layout or inspect(pair, batch)
    require_guided(layout)
    if layout.outside:
        raise ValueError(
            f"site {layout.outside[0]!r} is outside the data plate (dim=-1), so there is no bound per datum; "
            "put it inside, or, if all data share it, train with an ELBO of pyro.infer"
        )
    model, guide = run_pair(pair, batch, particles)
    latents = [s for s in model.values() if not s["is_observed"]]
    auxiliary = [s for s in guide.values() if s["name"] not in model]

    def total(sites: Iterable[Site]) -> Tensor:
        return summed(_per_datum(s, s["fn"].log_prob(s["value"]), keep_scales) for s in sites)

    def summed(terms: Iterable[Tensor]) -> Tensor:
        first, *rest = [*terms] or [torch.zeros((particles, len(batch[0])), device=batch[0].device)]
        return sum(rest, first)

    closed = None
    if kl != "sampled":
        closed = summed(_kl(s["name"], model, guide, kl, keep_scales) for s in latents)
        closed = closed + total(auxiliary) if auxiliary else closed
    return LogTerms(
        likelihood=total(s for s in model.values() if s["is_observed"]),
        prior=total(latents),
        posterior=total(guide.values()),
        samples={name: s["value"] for name, s in guide.items()},
        kl=closed,
        score_only=tuple(name for name, s in guide.items() if not s["fn"].has_rsample),
    )


def run_pair(pair: Pair, batch: Batch, particles: int) -> tuple[dict[str, Site], dict[str, Site]]:
    """The statements of model and guide on K particles: site name -> site, plates and deterministics left out.

    Particles are a plate of their own, left of all plates of the program.
    """
    lift = _particle_plate(pair, batch, particles)
    with _noted(), pyro.validation_enabled(False):  # its checks wait for the device at every site
        guide = poutine.trace(lift(pair.guide)).get_trace(*batch)
        model = poutine.trace(poutine.replay(lift(pair.model), trace=guide)).get_trace(*batch)
    return statements(model), statements(guide)


def require_guided(layout: Layout) -> None:
    """Raise ValueError, naming the first, if latents are left for enumeration: without a q(z | x) no weights."""
    if layout.enumerated:
        raise ValueError(
            f"site {layout.enumerated[0]!r}: the model enumerates it and the guide does not draw it; train "
            "with pyro.infer.TraceEnum_ELBO(), and draw it in the guide to have weights per particle"
        )


def _particle_plate(pair: Pair, batch: Batch, particles: int) -> Any:
    """A plate of particles left of every plate of the pair."""
    layout = pair.layout or inspect(pair, batch)
    return pyro.plate("_particles", particles, dim=-1 - layout.nesting)


@contextmanager
def _noted() -> Iterator[None]:
    """Add to an error in a program what it most often means, since it ran without particles before."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        error.add_note(
            "The program ran with particles, which stand left of the data: z is (K, B, d). Nets and expressions "
            "must keep leading dimensions."
        )
        raise


def _kl(name: str, model: dict[str, Site], guide: dict[str, Site], kind: KL, keep_scales: bool) -> Tensor:
    """KL(q || p) of one latent site, closed if it may be, else log q - log p of its draw."""
    p, q = model[name], guide[name]
    problem = _mean_field_problem(name, model, guide)
    if problem is None and not isinstance(base(q["fn"]), Delta):  # Pyro's closed KL drops a Delta's log_density
        try:
            return _per_datum(q, kl_divergence(q["fn"], p["fn"]), keep_scales)
        except NotImplementedError:
            problem = f"no closed form between {family(q)} and {family(p)} is known"
    if kind == "analytic" and problem:
        raise ValueError(f"site {name!r}: {problem}; use kl='auto' to sample it, or kl='sampled'")
    log_q = _per_datum(q, q["fn"].log_prob(q["value"]), keep_scales)
    return log_q - _per_datum(p, p["fn"].log_prob(p["value"]), keep_scales)


def _mean_field_problem(name: str, model: dict[str, Site], guide: dict[str, Site]) -> str | None:
    """Why the closed KL of a site would be wrong, if it would.

    It integrates z out while what p(z | parents) depends on stays fixed. That is right only if no parent of z
    in the model depends on z in the guide; a latent drawn before z in both programs cannot.
    """
    order = list(guide)
    for parent in model:
        if parent == name:
            return None
        if parent in guide and order.index(parent) > order.index(name):
            return f"the guide draws {parent!r} after it, and the model before it, so the closed KL does not hold"
    return None


def _per_datum(site: Site, log_prob: Tensor, keep_scales: bool) -> Tensor:
    """Mask a site's log-density, sum it over inner plates, and check that (K, B) is left."""
    scale = hand_scale(site)
    if not keep_scales and not (isinstance(scale, float) and scale == 1.0):
        raise ValueError(
            f"site {site['name']!r} is scaled by poutine.scale, or by the subsampling of an inner plate, which "
            "has no place in a bound on log p(x); give the objective a beta, or use pyro.infer.Trace_ELBO()"
        )
    masked: Tensor = scale_and_mask(log_prob, scale=scale, mask=site["mask"])
    shape = plate_shape(site)
    if shape is None or masked.shape != shape:
        raise ValueError(
            f"site {site['name']!r}: its log-density has shape {tuple(masked.shape)}, expected {shape}; "
            "declare the dimensions of one event with .to_event"
        )
    return masked.flatten(1, -2).sum(1) if len(shape) > 2 else masked


class _Means(Messenger):  # type: ignore[misc]
    """Put each latent at its mean, where its distribution has one, instead of drawing it."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        msg["value"] = msg["fn"]()  # stays where there is no mean
        msg["value"] = mean_of(msg)
        msg["done"] = True


class _Given(Messenger):  # type: ignore[misc]
    """Put latents at given values (B, *plates, *event), the same for all particles: the way back of `by_datum`."""

    def __init__(self, latents: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.latents or msg["infer"].get("was_observed"):
            return
        value, fn = self.latents[msg["name"]], msg["fn"]
        if plate_shape(msg) is not None:
            _, *inner, rows = fn.batch_shape
            present = {f.dim for f in msg["cond_indep_stack"] if f.vectorized}
            sizes = (n for dim, n in enumerate(inner, -1 - len(inner)) if dim in present)
            expected = (rows, *sizes, *fn.event_shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"latents {msg['name']!r}: expected shape {expected}, got {tuple(value.shape)}")
            value = value.reshape(rows, *inner, *fn.event_shape).movedim(0, len(inner)).expand(fn.shape())
        msg["value"], msg["done"] = value, True


class _Redrawn(Messenger):  # type: ignore[misc]
    """Put observations at values that their distributions can have: what was observed gave the shape alone."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] and not site_is_subsample(msg) and msg["value"].shape == msg["fn"].shape():
            msg["value"] = msg["fn"].sample()


def inspect_shapes(pair: Pair, batch: Batch) -> None:
    """Check a batch as `inspect` does, but for what is observed, which stands for its shape only.

    Raises:
        ValueError: the programs cannot take the batch.
    """
    known = pair.layout
    try:
        with _Redrawn():
            inspect(pair, batch)
    except TypeError as error:  # from the program's own check
        raise ValueError(f"batch: {len(batch)} tensors do not suit the program ({error})") from error
    pair.layout = known or pair.layout


def by_datum(site: Site, value: Tensor) -> Tensor:
    """A value (K, *plates, B, *event) of particles as (K, B, *plates, *event)."""
    return value if plate_shape(site) is None else data_first(site, value).transpose(0, 1)


@torch.no_grad()
def guide_means(pair: Pair, *batch: Tensor, particles: int = 1) -> dict[str, Tensor]:
    """E_q[z | x] of every latent site: its distribution's mean, averaged over K draws of earlier latents.

    Exact for a one-level guide; a Rao-Blackwell average otherwise. Sites without a mean average their draws.

    Returns:
        Site name -> (B, *event), with inner plates between the two.
    """
    guide = run_pair(pair, batch, particles)[1]
    means = {name: mean_of(site) for name, site in guide.items()}
    floats = {name: m if m.is_floating_point() else m.float() for name, m in means.items()}
    return {name: data_first(guide[name], m.mean(0)) for name, m in floats.items()}


@torch.no_grad()
def predict(
    pair: Pair,
    *batch: Tensor,
    latents: Literal["prior", "guide", "means"] | Mapping[str, Tensor] = "guide",
    particles: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Run the model with its observations left free.

    Args:
        pair: the pair.
        *batch: a batch; what the model observes of it serves as a shape only, and as input of the guide.
        latents: drawn from the "prior", from the "guide", the "means" of the guide, or given by name, each
            (B, *plates, *event).
        particles: K.

    Returns:
        Latents, draws of the observed sites, and means of the observed sites: name -> (K, B, *event), with
        inner plates between B and event.

    Raises:
        ValueError: a given latent has another shape than its site.
    """
    lift = _particle_plate(pair, batch, particles)
    free = poutine.uncondition(lift(pair.model))
    with _noted(), pyro.validation_enabled(False):
        if isinstance(latents, Mapping):
            free = _Given(latents)(free)
        elif latents != "prior":
            guide = poutine.trace(_Means()(lift(pair.guide)) if latents == "means" else lift(pair.guide))
            free = poutine.replay(free, trace=guide.get_trace(*batch))
        sites = statements(poutine.trace(free).get_trace(*batch))
    observed = {n: s for n, s in sites.items() if s["infer"].get("was_observed")}
    return (
        {n: by_datum(s, s["value"]) for n, s in sites.items() if n not in observed},
        {n: by_datum(s, s["value"]) for n, s in observed.items()},
        {n: by_datum(s, mean_of(s)) for n, s in observed.items()},
    )
