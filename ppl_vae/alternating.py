"""Objectives that train the model by one bound and the guide by another value, in a step each."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vae.bounds import Bound, Grouped, iwae
from ppl_vae.estimators import Estimator, pathwise
from ppl_vae.objectives import BoundObjective, Objective, Part
from ppl_vae.pairs import Pair
from ppl_vae.scores import scored_run
from ppl_vae.sites import statements
from ppl_vae.traces import check_table, log_density, run_guide, run_model, tabulate

__all__ = ["PIWAE", "RWS", "Alternating", "Wake"]


class Alternating(Objective):
    """A bound for the model, and another objective for the guide; its value is the model's bound.

    Parameters that model and guide share, such as a ladder's priors, are trained by both steps.

    Args:
        bound: of the model; its gradient takes draws and guide as they are.
        particles: K.
        guide: what the guide maximises.

    Raises:
        ValueError: fewer than one particle.
    """

    def __init__(self, bound: Bound, particles: int, guide: Objective) -> None:
        super().__init__()
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        self.bound, self.particles, self.guide = bound, particles, guide

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return the bound per datum, (B,), with the model's gradient alone."""
        check_table(pair, batch, self.particles)
        with torch.no_grad():  # draws, and their density, are constants to the model
            guide = run_guide(pair, batch, self.particles)
            posterior = log_density(statements(guide).values(), batch, self.particles)
        model = run_model(pair, batch, self.particles, guide)
        return self.bound(tabulate(model, guide, batch, self.particles, posterior=posterior).weight())

    def parts(self) -> tuple[Part, ...]:
        """A step of the model, then one of the guide."""
        return Part("objective", self, ("model",)), Part(
            "the guide's objective", self.guide, ("guide", self.guide)
        )

    def extra_repr(self) -> str:
        """Name the model's bound."""
        return f"{getattr(self.bound, '__name__', repr(self.bound))}, particles={self.particles}"


class Wake(Objective):
    """The wake phase of the guide, Σ_k w̃_k log q(z_k | x) (Bornschein & Bengio 2015, eq. 10), for `Alternating`.

    It is the cross-entropy of q with the posterior as K weighted draws have it, and no bound on log p(x).

    Args:
        particles: K.

    Raises:
        ValueError: fewer than two particles: the weight of a single one is always 1.
    """

    def __init__(self, particles: int) -> None:
        super().__init__()
        if particles < 2:
            raise ValueError(f"particles must be at least 2, got {particles}")
        self.particles = particles

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return the weighted log-density per datum, (B,)."""
        terms, log_q = scored_run(pair, batch, self.particles)
        return (terms.weight().detach().softmax(0) * log_q).sum(0)


def RWS(particles: int = 5) -> Alternating:  # noqa: N802
    """Reweighted wake-sleep (Bornschein & Bengio 2015): the importance-weighted bound, and a wake-phase guide.

    Needs no reparameterised sampler, and its guide's gradient does not fade as K grows.

    Args:
        particles: K, for both steps.
    """
    return Alternating(iwae, particles, Wake(particles))


def PIWAE(groups: int, particles: int, *, estimator: Estimator = pathwise) -> Alternating:  # noqa: N802
    """The partially importance-weighted autoencoder (Rainforth et al. 2018, section 4).

    The model maximises the bound of all M K particles, the guide the mean of M bounds of K.

    Args:
        groups: M.
        particles: K, of each group.
        estimator: of the guide's gradient.
    """
    guide = BoundObjective(Grouped(iwae, groups), estimator, particles=groups * particles)
    return Alternating(iwae, groups * particles, guide)
