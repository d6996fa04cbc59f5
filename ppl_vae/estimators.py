"""Estimators: how to differentiate any bound. Each returns (B,) values with the right value and gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from operator import and_
from typing import Any, Protocol

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.bounds import Bound, derivatives
from ppl_vae.pairs import Pair, unregistered
from ppl_vae.sites import Site, base, plate_shape, statements
from ppl_vae.traces import (
    KL,
    LogTerms,
    check_table,
    log_density,
    log_terms,
    run_guide,
    run_model,
    tabulate,
    with_values,
)

__all__ = ["Estimator", "doubly", "frozen", "pathwise", "repeated", "require_reparameterised", "sticking"]


class Estimator(Protocol):
    """A differentiable estimate of a bound for each datum of a batch."""

    def __call__(
        self,
        bound: Bound,
        pair: Pair,
        *batch: Tensor,
        particles: int,
        beta: Tensor | float = 1.0,
        kl: KL = "sampled",
    ) -> Tensor:
        """Return the bound per datum, (B,), whose gradient estimates the bound's."""


def pathwise(
    bound: Bound, pair: Pair, *batch: Tensor, particles: int, beta: Tensor | float = 1.0, kl: KL = "sampled"
) -> Tensor:
    """Reparameterised gradients through z = g(ε, φ) (Kingma & Welling 2014, section 2.4).

    Raises:
        ValueError: a latent's distribution has no reparameterised sampler; the message names its site.
    """
    terms = log_terms(pair, *batch, particles=particles, kl=kl)
    require_reparameterised(terms)
    return bound(terms.weight(beta))


def doubly(
    bound: Bound, pair: Pair, *batch: Tensor, particles: int, beta: Tensor | float = 1.0, kl: KL = "sampled"
) -> Tensor:
    """Doubly reparameterised gradients of the guide, for any bound (Tucker et al. 2019; docs/math.md, eq. 3).

    The score of the guide's density is itself reparameterised, so that the gradient reaches the guide through
    the draws alone: with f the bound, f_k and f_kk its derivatives in log w_k, that of particle k is weighted
    by f_k - beta f_kk. For the ELBO, where f_kk = 0, this is sticking the landing (Roeder et al. 2017).
    Value and model gradient are those of `pathwise`; the guide's gradient has the same mean and, near the
    posterior, a far smaller variance. The guide runs twice: drawing, and on what it drew.

    Raises:
        ValueError: kl is not "sampled"; a latent's distribution has no reparameterised sampler; the guide draws
            random numbers outside its sites, as dropout does, or masks some of its latents and others not.
    """
    _require_sampled(kl)
    if not torch.is_grad_enabled():
        return pathwise(bound, pair, *batch, particles=particles, beta=beta)
    terms, sites = _without_score(pair, batch, particles)
    weight = terms.weight(beta)
    slope, curvature = derivatives(bound, weight.detach())
    some = slope.abs() >= torch.finfo(slope.dtype).tiny  # a particle below it has no part in the bound
    ratio = beta * curvature / slope.where(some, 1.0)
    # The densities pass f_k back: to the model as it is, to the guide's draws times f_k - beta f_kk over f_k.
    scored = _scored(sites)
    for site in sites.values():
        if site["value"].requires_grad:
            site["value"].register_hook(partial(torch.mul, _gate(site, ratio, scored)))
    return bound(weight)


def sticking(
    bound: Bound, pair: Pair, *batch: Tensor, particles: int, beta: Tensor | float = 1.0, kl: KL = "sampled"
) -> Tensor:
    """Sticking the landing: `pathwise` without the score of the guide's density (Roeder et al. 2017, eq. 8).

    For the ELBO, and the mean of several, the score has mean zero and it is `doubly`. For other bounds the
    guide's gradient is biased without it (Tucker et al. 2019, section 3), though it vanishes at the posterior.

    Raises:
        ValueError: as by `doubly`.
    """
    _require_sampled(kl)
    if not torch.is_grad_enabled():
        return pathwise(bound, pair, *batch, particles=particles, beta=beta)
    return bound(_without_score(pair, batch, particles)[0].weight(beta))


def _require_sampled(kl: KL) -> None:
    if kl != "sampled":
        raise ValueError(
            f"kl must be 'sampled' for this estimator, got {kl!r}: it replaces the score of log q, which a closed "
            "KL does not have; use kl='sampled', or the estimator pathwise"
        )


def _without_score(pair: Pair, batch: tuple[Tensor, ...], particles: int) -> tuple[LogTerms, dict[str, Site]]:
    """The table, with a guide whose parameters its densities do not reach but through its draws; its sites."""
    check_table(pair, batch, particles)
    # Densities see an identity copy of each draw. A hook on the draw itself would act again on what a later
    # draw passes back to it, once per level.
    drawn = with_values(run_guide(pair, batch, particles), lambda z: z.view_as(z))
    model = run_model(pair, batch, particles, drawn)
    with frozen(pair):
        guide = run_guide(pair, batch, particles, drawn)
        # Here, and not outside: some densities run nets when they are asked for, as those of flows do.
        posterior = log_density(statements(guide).values(), batch, particles)
    terms = tabulate(model, guide, batch, particles, posterior=posterior)
    require_reparameterised(terms)
    return terms, statements(guide)


def _gate(site: Site, ratio: Tensor, scored: Tensor | bool) -> Tensor:
    """1 - ratio (K, B) where a draw has a score, with the dimensions of its value, (K, *plates, B, *event)."""
    plates: tuple[int, ...] = plate_shape(site) or ()
    fitted = ratio.reshape(len(ratio), *(1 for _ in plates[1:-1]), ratio.shape[1])
    gate = 1 - fitted * scored
    return gate.reshape(*gate.shape, *(1 for _ in range(site["fn"].event_dim))).to(site["value"].dtype)


def _scored(guide: dict[str, Site]) -> Tensor | bool:
    """Which draws have a score that is in the weight: True for all, False for none, or a mask of them.

    Densities of points (Delta) have none, except those that hold functions of auxiliary draws, as in Pyro's
    automatic guides; masked ones have none that counts.

    Raises:
        ValueError: some have and some have not. What a score of one draw is replaced by would pass through the
            others, and weigh them, too.
    """
    auxiliary = any(s["infer"].get("is_auxiliary") for s in guide.values())
    kinds = {n: (not auxiliary and isinstance(base(s["fn"]), Delta), _masks(s)) for n, s in guide.items()}
    first, (point, masks) = next(iter(kinds.items()), ("", (True, [])))
    for name, (other, others) in kinds.items():
        same = other == point and [*map(id, others)] == [*map(id, masks)]
        if not same or any(torch.is_tensor(m) and m.dim() > len(guide[name]["fn"].batch_shape) for m in others):
            raise ValueError(
                f"site {name!r}: the guide has a density there for other draws than at {first!r}, as masks and "
                "Delta make it, for which the doubly reparameterised estimator has no rule; use pathwise"
            )
    return reduce(and_, masks, not point)


def _masks(site: Site) -> list[Tensor | bool]:
    """The masks of a site's log-density, by handlers and by its distribution."""
    masks, fn = [site["mask"]], site["fn"]
    while fn is not base(fn):
        masks += [fn._mask] if isinstance(fn, MaskedDistribution) else []
        fn = fn.base_dist
    return [m for m in masks if m is not None and m is not True]


@contextmanager
def repeated(pair: Pair) -> Iterator[None]:
    """Run programs of a pair once more, on values that they have drawn.

    Buffers, such as BatchNorm's running statistics, are copies meanwhile, so that they do not see the batch
    twice.

    Raises:
        ValueError: something is drawn: the second run of a program would not be the first.
    """
    buffers = [(m, name, b) for m in pair.modules() for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        with _NoDraws():  # type: ignore[no-untyped-call]
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


@contextmanager
def frozen(pair: Pair) -> Iterator[None]:
    """Run programs of a pair once more, with constants for parameters; see `repeated`.

    Gradients pass through values, and not to parameters, wherever these live; a closed-over net's too, which
    is why they are switched off instead of being replaced.
    """
    own = {id(p): p for p in (*pair.parameters(), *pair.known.values())}
    trained = [p for p in own.values() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with repeated(pair), unregistered():
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class _NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse random numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(
                f"the guide draws random numbers outside its sample statements ({func.overloadpacket}, as dropout "
                "does), so it cannot be run again on what it drew; take them out, or use the estimator pathwise"
            )
        return func(*args, **(kwargs or {}))


def require_reparameterised(terms: LogTerms) -> None:
    """Raise ValueError, naming the first site, if some latent's draws carry no gradient."""
    if terms.score_only:
        raise ValueError(
            f"site {terms.score_only[0]!r}: its distribution has no reparameterised sampler, so a pathwise "
            "gradient would be wrong; use pyro.infer.Trace_ELBO() or TraceGraph_ELBO() as objective, "
            "or a relaxed distribution in the guide, or enumerated where it has few values, or an estimator by "
            "scores, such as vimco with two particles"
        )
