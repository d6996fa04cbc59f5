"""From a (model, guide) pair to a table of log-densities: where effect handlers run.

`log_terms` gives log p(x | z), log p(z) and log q(z | x), each of shape (K particles, B data), in nats. The
densities are unscaled: a subsampling plate's N/B never gets inside an importance weight. Masks are honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.layout import Layout, inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.sites import Site, base, data_first, family, hand_scale, plate_shape, statements

__all__ = [
    "KL",
    "LogTerms",
    "by_datum",
    "check_table",
    "check_whole",
    "joint_terms",
    "log_density",
    "log_joint",
    "log_posterior",
    "log_terms",
    "mean_field_problem",
    "require_guided",
    "run_guide",
    "run_model",
    "run_pair",
    "site_kl",
    "tabulate",
    "with_values",
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
    check_table(pair, batch, particles)
    guide = run_guide(pair, batch, particles)
    model = run_model(pair, batch, particles, guide)
    return tabulate(model, guide, batch, particles, kl=kl, keep_scales=keep_scales)


def log_joint(pair: Pair, latents: Mapping[str, Tensor], *batch: Tensor) -> Tensor:
    """Log p(x, z) at given latents, in nats, (K, B): the sum of `joint_terms`, with its arguments and errors."""
    prior, likelihood = joint_terms(pair, latents, *batch)
    return prior + likelihood


def joint_terms(pair: Pair, latents: Mapping[str, Tensor], *batch: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(z) and log p(x | z) at given latents, in nats: the guide has no part in it, and nothing is drawn.

    Args:
        pair: the pair.
        latents: every latent site of the model -> (K, B, *event), with inner plates between B and event, as
            `ppl_vae.predictive.predict` gives them and as `by_datum` makes of values in a trace.
        *batch: tensors as the model takes them, first dimension B.

    Returns:
        Two of (K, B), differentiable in the latents and in the model's parameters.

    Raises:
        ValueError: a latent is missing, unknown or of another shape than its site's; a site outside the data
            plate, or scaled by hand.
    """
    particles = next((len(z) for z in latents.values() if z.dim()), 1)
    check_table(pair, batch, particles)
    sites = statements(run_model(pair, batch, particles, latents, lead=(particles,)))
    drawn = [s for s in sites.values() if not s["is_observed"]]
    _check_names({s["name"] for s in drawn}, latents)
    zeros = _zeros(batch, particles)
    return _total(drawn, zeros), _total((s for s in sites.values() if s["is_observed"]), zeros)


def log_posterior(pair: Pair, latents: Mapping[str, Tensor], *batch: Tensor) -> Tensor:
    """Log q(z | x) at given latents, in nats, (K, B); arguments and errors as of `joint_terms`."""
    particles = next((len(z) for z in latents.values() if z.dim()), 1)
    check_table(pair, batch, particles)
    sites = statements(run_guide(pair, batch, particles, latents))
    _check_names(set(sites), latents)
    return _total(sites.values(), _zeros(batch, particles))


def _check_names(expected: set[str], latents: Mapping[str, Tensor]) -> None:
    if expected != set(latents):
        raise ValueError(f"latents: expected values of {sorted(expected)}, got {sorted(latents)}")


def tabulate(
    model: Trace,
    guide: Trace,
    batch: Batch,
    particles: int,
    *,
    kl: KL = "sampled",
    keep_scales: bool = False,
    posterior: Tensor | None = None,
) -> LogTerms:
    """The table of a run of the guide and of a run of the model on its values; arguments as in `log_terms`.

    The guide's log-densities may be given, if they were taken before.
    """
    p, q = statements(model), statements(guide)
    zeros = _zeros(batch, particles)
    latents = [s for s in p.values() if not s["is_observed"]]
    closed = None
    if kl != "sampled":
        terms = [site_kl(s["name"], p, q, kl, keep_scales) for s in latents]
        auxiliary = [s for s in q.values() if s["name"] not in p]
        closed = _sum([*terms, *([_total(auxiliary, zeros, keep_scales)] if auxiliary else [])], zeros)
    return LogTerms(
        likelihood=_total((s for s in p.values() if s["is_observed"]), zeros, keep_scales),
        prior=_total(latents, zeros, keep_scales),
        posterior=_total(q.values(), zeros, keep_scales) if posterior is None else posterior,
        samples={name: s["value"] for name, s in q.items()},
        kl=closed,
        score_only=tuple(name for name, s in q.items() if not s["fn"].has_rsample),
    )


def _zeros(batch: Batch, particles: int) -> Tensor:
    """The log-density of no site at all."""
    return torch.zeros((particles, len(batch[0])), device=batch[0].device)


def _sum(terms: Iterable[Tensor], zeros: Tensor) -> Tensor:
    first, *rest = [*terms] or [zeros]
    return sum(rest, first)


def _total(sites: Iterable[Site], zeros: Tensor, keep_scales: bool = False) -> Tensor:
    """Log-densities of sites at their values, (K, B)."""
    return _sum((_per_datum(s, s["fn"].log_prob(s["value"]), keep_scales) for s in sites), zeros)


def log_density(sites: Iterable[Site], batch: Batch, particles: int) -> Tensor:
    """Log-densities of some sites at their values, (K, B), in nats."""
    return _total(sites, _zeros(batch, particles))


def run_guide(
    pair: Pair, batch: Batch, particles: int, given: Trace | Mapping[str, Tensor] | None = None
) -> Trace:
    """Run the guide on K particles, drawing, or on values: of an earlier run, or by name, (K, B, *plates, *event).

    Particles are a plate of their own, left of all plates of the program.
    """
    guide = _on_values(_particle_plate(pair, batch, particles)(pair.guide), given, (particles,))
    with _running():
        return poutine.trace(guide).get_trace(*batch)


def run_model(
    pair: Pair,
    batch: Batch,
    particles: int,
    given: Trace | Mapping[str, Tensor] | None = None,
    *,
    lead: tuple[int, ...] = (),
    free: bool = False,
) -> Trace:
    """Run the model on K particles.

    Args:
        pair: the pair.
        batch: its batch.
        particles: K.
        given: values of latents, from a run of the guide, or by name, (*lead, B, *plates, *event); the others
            are drawn from the model.
        lead: (K,), or () for values that all particles share.
        free: whether observations are drawn too.

    Raises:
        ValueError: a value given by name has another shape than its site.
    """
    model = _particle_plate(pair, batch, particles)(pair.model)
    model = _on_values(poutine.uncondition(model) if free else model, given, lead)
    with _running():
        return poutine.trace(model).get_trace(*batch)


def _on_values(program: Any, given: Trace | Mapping[str, Tensor] | None, lead: tuple[int, ...]) -> Any:
    """A program whose latents have the values of a trace, or those given by name."""
    if isinstance(given, Trace):
        return poutine.replay(program, trace=given)
    return program if given is None else _Given(given, lead)(program)


def run_pair(pair: Pair, batch: Batch, particles: int) -> tuple[dict[str, Site], dict[str, Site]]:
    """The statements of model and guide on K particles: site name -> site, plates and deterministics left out."""
    guide = run_guide(pair, batch, particles)
    return statements(run_model(pair, batch, particles, guide)), statements(guide)


def with_values(trace: Trace, change: Callable[[Tensor], Tensor]) -> Trace:
    """A copy of a trace for replaying, where draws that carry a gradient are changed."""
    changed = trace.copy()
    for name, site in trace.nodes.items():
        value = site.get("value")
        if site["type"] == "sample" and torch.is_tensor(value) and value.requires_grad:
            changed.nodes[name] = site | {"value": change(value)}
    return changed


def check_table(pair: Pair, batch: Batch, particles: int) -> None:
    """Raise ValueError unless a pair has log-densities per particle and datum."""
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    layout = pair.layout or inspect(pair, batch)
    require_guided(layout)
    if layout.outside:
        raise ValueError(
            f"site {layout.outside[0]!r} is outside the data plate (dim=-1), so there is no bound per datum; "
            "put it inside, or, if all data share it, train with an ELBO of pyro.infer"
        )


def check_whole(table: Tensor, batch: Batch) -> None:
    """Raise ValueError unless a table of (K, rows) has a row for each datum of its batch."""
    if table.shape[1] != len(batch[0]):
        raise ValueError(
            f"program: {table.shape[1]} rows in its data plate for a batch of {len(batch[0])}; "
            "to judge each datum, the plate must hold the whole batch"
        )


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
def _running() -> Iterator[None]:
    """Without Pyro's checks, which wait for the device at every site.

    Adds to an error in a program what it most often means, since it ran without particles before.
    """
    try:
        with pyro.validation_enabled(False):
            yield
    except (RuntimeError, ValueError, IndexError) as error:
        error.add_note(
            "The program ran with particles, which stand left of the data: z is (K, B, d). Nets and expressions "
            "must keep leading dimensions."
        )
        raise


def site_kl(name: str, model: dict[str, Site], guide: dict[str, Site], kind: KL, keep_scales: bool) -> Tensor:
    """KL(q || p) of one latent site, closed if it may be, else log q - log p of its draw."""
    p, q = model[name], guide[name]
    problem = mean_field_problem(name, model, guide)
    if problem is None and not isinstance(base(q["fn"]), Delta):  # Pyro's closed KL drops a Delta's log_density
        try:
            return _per_datum(q, kl_divergence(q["fn"], p["fn"]), keep_scales)
        except NotImplementedError:
            problem = f"no closed form between {family(q)} and {family(p)} is known"
    if kind == "analytic" and problem:
        raise ValueError(f"site {name!r}: {problem}; use kl='auto' to sample it, or kl='sampled'")
    log_q = _per_datum(q, q["fn"].log_prob(q["value"]), keep_scales)
    return log_q - _per_datum(p, p["fn"].log_prob(p["value"]), keep_scales)


def mean_field_problem(name: str, model: dict[str, Site], guide: dict[str, Site]) -> str | None:
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


class _Given(Messenger):  # type: ignore[misc]
    """Put latents at given values (*lead, B, *plates, *event), where lead is (K,) or (): `by_datum` reversed."""

    def __init__(self, latents: Mapping[str, Tensor], lead: tuple[int, ...]) -> None:
        super().__init__()
        self.latents, self.lead = latents, lead

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.latents or msg["is_observed"] or msg["infer"].get("was_observed"):
            return
        value, fn = self.latents[msg["name"]], msg["fn"]
        if plate_shape(msg) is not None:
            _, *inner, rows = fn.batch_shape
            present = {f.dim for f in msg["cond_indep_stack"] if f.vectorized}
            sizes = (n for dim, n in enumerate(inner, -1 - len(inner)) if dim in present)
            expected = (*self.lead, rows, *sizes, *fn.event_shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"latents {msg['name']!r}: expected shape {expected}, got {tuple(value.shape)}")
            at = len(self.lead)
            value = value.reshape(*self.lead, rows, *inner, *fn.event_shape).movedim(at, at + len(inner))
            value = value.expand(fn.shape())
        msg["value"], msg["done"] = value, True


def by_datum(site: Site, value: Tensor) -> Tensor:
    """A value (K, *plates, B, *event) of particles as (K, B, *plates, *event)."""
    return value if plate_shape(site) is None else data_first(site, value).transpose(0, 1)
