"""Objectives: what training maximises, a bound with an estimator of its gradient, or one of Pyro's ELBOs.

An objective maps a pair and a batch to values (B,), in nats per datum, to be maximised in the mean.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO, TraceTMC_ELBO
from pyro.infer import elbo as pyro_elbo
from torch import Tensor, nn

from ppl_vae.bounds import Bound, elbo, iwae
from ppl_vae.estimators import Estimator, pathwise, require_reparameterised
from ppl_vae.layout import Layout, inspect
from ppl_vae.pairs import Batch, Pair
from ppl_vae.sites import statements
from ppl_vae.traces import KL, check_table, log_terms, require_guided, run_guide, run_model, tabulate

__all__ = ["ELBO", "IWAE", "BoundObjective", "Objective", "Part", "PyroObjective", "as_objective"]


@dataclass(frozen=True)
class Part:
    """One of the optimizer steps that a batch makes.

    Attributes:
        name: what its value is called in errors.
        objective: what it maximises.
        trains: whose parameters it trains: those that the "model" or the "guide" depends on, and modules'.
        optimizer: parameters -> optimizer; None for that of the run.
    """

    name: str
    objective: Objective
    trains: tuple[str | nn.Module, ...]
    optimizer: Callable[[list[nn.Parameter]], Any] | None = None


class Objective(nn.Module, ABC):
    """What `ppl_vae.fit` maximises: ``forward(pair, *batch) -> (B,)``, nats per datum."""

    def parts(self) -> tuple[Part, ...]:
        """The steps that a batch makes, in order; the first one's value is reported, and validated."""
        return (Part("objective", self, ("model", "guide", self)),)

    @abstractmethod
    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return one value per datum, (B,), differentiable in the pair's parameters."""

    def per_datum(self, pair: Pair) -> bool:
        """Whether the values are those of each datum, or the mean of the batch repeated."""
        return True

    def obstacle(self, pair: Pair) -> str | None:
        """Why a step on it cannot be captured as a graph, in one line; None where it can."""
        return None


class BoundObjective(Objective):
    """A bound on log p(x) and the estimator of its gradient.

    Args:
        bound: map of log weights (K, B) to (B,).
        estimator: how to differentiate it.
        particles: K.
        beta: weight of the rate, part of the importance weight (Higgins et al. 2017, eq. 4). It is a buffer, so
            a hook may anneal it. With beta other than 1 the value is no bound on log p(x).
        kl: whether the rate is a closed form; see `ppl_vae.traces.log_terms`.
        penalties: what is subtracted from the bound, from the same run of the programs, with pathwise gradients;
            see `ppl_vae.penalties`. With them the value is no bound on log p(x).

    Raises:
        ValueError: an estimator that cannot be called, fewer than one particle, negative beta, unknown kl;
            penalties beside another estimator than `pathwise`.
    """

    beta: Tensor

    def __init__(
        self,
        bound: Bound,
        estimator: Estimator = pathwise,
        *,
        particles: int = 1,
        beta: float = 1.0,
        kl: KL = "sampled",
        penalties: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        if not callable(estimator):
            raise ValueError(f"estimator: expected a function such as pathwise or doubly, got {estimator!r}")
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be finite and not negative, got {beta}")
        if kl not in ("sampled", "analytic", "auto"):
            raise ValueError(f"kl must be 'sampled', 'analytic' or 'auto', got {kl!r}")
        if penalties and estimator is not pathwise:
            raise ValueError("penalties have pathwise gradients; take them with the estimator pathwise")
        self.penalties = nn.ModuleList(penalties)
        self.bound, self.estimator, self.particles, self.kl = bound, estimator, particles, kl
        self.register_buffer("beta", torch.tensor(float(beta)))

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return the bound per datum, (B,), less the penalties."""
        if not self.penalties:
            return self.estimator(self.bound, pair, *batch, particles=self.particles, beta=self.beta, kl=self.kl)
        check_table(pair, batch, self.particles)
        guide = run_guide(pair, batch, self.particles)
        model = run_model(pair, batch, self.particles, guide)
        terms = tabulate(model, guide, batch, self.particles, kl=self.kl)
        require_reparameterised(terms)
        value = self.bound(terms.weight(self.beta))
        for penalty in self.penalties:
            value = value - penalty(statements(model), statements(guide), batch)
        return value

    def parts(self) -> tuple[Part, ...]:
        """A step of the pair, and of what the estimator learns; then the penalties' own, such as a critic's."""
        learned = (self.estimator,) if isinstance(self.estimator, nn.Module) else ()
        others = [part for penalty in self.penalties for part in cast(Any, penalty).parts()]
        return Part("objective", self, ("model", "guide", *learned)), *others

    def extra_repr(self) -> str:
        """Name the bound and its settings."""
        name = getattr(self.bound, "__name__", repr(self.bound))
        estimator = getattr(self.estimator, "__name__", repr(self.estimator))
        return f"{name}, particles={self.particles}, kl={self.kl}, estimator={estimator}"


def ELBO(  # noqa: N802
    particles: int = 1,
    *,
    kl: KL = "sampled",
    beta: float = 1.0,
    estimator: Estimator = pathwise,
    penalties: Sequence[nn.Module] = (),
) -> BoundObjective:
    """The evidence lower bound, averaged over ``particles`` draws (Kingma & Welling 2014).

    Args:
        particles: draws per datum; more of them lower the gradient's variance, not the bound's looseness.
        kl: "sampled" (eq. 2, as Pyro's Trace_ELBO), "analytic" (eq. 3, as TraceMeanField_ELBO), or "auto".
        beta: weight of the KL.
        estimator: of the gradient; `doubly` is sticking the landing (Roeder et al. 2017), with a sampled KL.
        penalties: what is subtracted, such as `ppl_vae.penalties.MMD`.
    """
    return BoundObjective(elbo, estimator, particles=particles, beta=beta, kl=kl, penalties=penalties)


def IWAE(particles: int = 5, *, estimator: Estimator = pathwise) -> BoundObjective:  # noqa: N802
    """The importance-weighted bound of ``particles`` draws (Burda et al. 2016): tighter with each more.

    Args:
        particles: K.
        estimator: of the gradient; with `doubly`, the guide's does not drown in noise as K grows.
    """
    return BoundObjective(iwae, estimator, particles=particles)


class PyroObjective(Objective):
    """One of Pyro's ELBOs: per datum, minus its loss divided by the number of data its plate stands for.

    ``Trace_ELBO`` and ``TraceMeanField_ELBO`` are lowered to the same table of log-densities as our own bounds,
    with the same value and gradient as Pyro's: site scales count, and the closed KL is used where it holds.
    (Where guide and model order their latents differently, Pyro warns and uses it all the same; here such a
    site is sampled.) Every other ELBO, and every pair without a bound per datum or with latents that have no
    reparameterised sampler, runs through Pyro's own ``loss_and_grads``, eagerly; Pyro's ``Jit`` forms run as
    the plain ones.
    """

    def __init__(self, loss: pyro_elbo.ELBO) -> None:
        super().__init__()
        if type(loss).__name__.startswith("Jit"):
            # Pyro's compiled forms look parameters up in the global store; their parents have the same value.
            loss = copy.copy(loss)
            loss.__class__ = type(loss).__mro__[1]
        self.loss = loss
        self.store: dict[str, Any] = {"params": {}, "constraints": {}}  # what Pyro itself stores: baselines
        lowered: dict[type, KL] = {Trace_ELBO: "sampled", TraceMeanField_ELBO: "auto"}
        self.kl = lowered.get(type(loss))

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return minus the loss per datum, (B,); the mean repeated where the ELBO gives no value per datum."""
        layout = pair.layout or inspect(pair, batch)
        if not isinstance(self.loss, TraceEnum_ELBO | TraceTMC_ELBO):
            require_guided(layout)
        if self.kl is not None and self.per_datum(pair):
            particles = self.loss.num_particles
            terms = log_terms(pair, *batch, particles=particles, kl=self.kl, keep_scales=True)
            require_reparameterised(terms)
            return elbo(terms.weight())
        with pyro.get_param_store().scope(self.store):
            value = -self._through_pyro(pair, batch) / (layout.population or len(batch[0]))
        return value.expand(len(batch[0]))

    def per_datum(self, pair: Pair) -> bool:
        """Only where the ELBO is lowered; Pyro itself gives one number for a batch."""
        layout: Layout = pair.layout
        return self.kl is not None and not layout.outside and not layout.score_only

    def obstacle(self, pair: Pair) -> str | None:
        """Pyro's own ELBOs read their losses back at every site."""
        if self.kl is not None and self.per_datum(pair):
            return None
        name = type(self.loss).__name__
        return f"{name} runs through Pyro's own loss_and_grads, which reads numbers back at every site"

    def _through_pyro(self, pair: Pair, batch: Batch) -> Tensor:
        """Pyro's loss as a scalar tensor with Pyro's gradient.

        ``loss_and_grads`` is the one method that all of Pyro's ELBOs have. Its backward pass writes to
        ``.grad``; these gradients are read off and attached to the value.
        """
        device = batch[0].device

        def model(*args: Tensor) -> Any:
            pair.declare()  # Pyro takes no gradient where it has seen no parameter
            return pair.model(*args)

        if not torch.is_grad_enabled():
            return torch.as_tensor(_first(self.loss.loss(model, pair.guide, *batch)), device=device)
        parameters = [p for p in pair.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            loss = self.loss.loss_and_grads(model, pair.guide, *batch)
            gradients = [p.grad for p in parameters]
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
        value = torch.as_tensor(_first(loss), device=device).detach()
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                value = value + ((p - p.detach()) * gradient).sum()
        return value

    def extra_repr(self) -> str:
        """Name Pyro's ELBO."""
        return f"{type(self.loss).__name__}, particles={self.loss.num_particles}"


def _first(loss: Any) -> Any:
    """A loss; where there are two, as in reweighted wake-sleep, the model's, which is minus a bound."""
    return loss[0] if isinstance(loss, tuple) else loss


def as_objective(objective: Any) -> Objective:
    """An objective of ours as it is; one of Pyro's ELBOs adapted.

    Raises:
        ValueError: anything else, and TraceTailAdaptive_ELBO, which has a gradient but no value to follow.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, TraceTailAdaptive_ELBO):
        raise ValueError("objective: TraceTailAdaptive_ELBO gives no value, only a gradient; use pyro.infer.SVI")
    if isinstance(objective, pyro_elbo.ELBO):
        return PyroObjective(objective)
    raise ValueError(
        f"objective: expected ELBO(...), IWAE(...) or an ELBO of pyro.infer, got {type(objective).__name__}"
    )
