"""Generators alone, z -> x, such as a GAN's: log p(x) of what has neither a guide nor a density.

A normal observation model gives them a density, with a σ that is fitted on validation data, and annealing from the
prior judges them (Wu, Burda, Salakhutdinov & Grosse 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.annealing import annealed
from ppl_vae.capture import Compile
from ppl_vae.conditionals import Conditional, FixedScale, Normal, Scale
from ppl_vae.estimates import Estimate
from ppl_vae.nets import Batched
from ppl_vae.pairs import as_pair, evaluating
from ppl_vae.priors import StandardNormal
from ppl_vae.schedules import Annealing

__all__ = ["FittedScale", "Generator", "fit_scale"]


class Generator(nn.Module):
    """A generator alone: z ~ p(z), x ~ N(net(z), σ² I), and for a guide the prior (Wu et al. 2017).

    `ppl_vae.annealed` and `ppl_vae.sandwich` judge it. Bounds that draw from the guide, such as `log_likelihood`,
    draw from the prior: they are plain Monte Carlo, and tight for few latents only.

    Args:
        net: module (N, latent) -> (N, *event), frozen or not; one of (N, latent, 1, 1) goes behind an
            ``nn.Unflatten(1, (latent, 1, 1))``. Data must be on the scale of what it gives: with a tanh at its
            end, pixels from -1 to 1.
        latent: number of latents.
        scale: σ, a positive number, which `fit_scale` can fit; or a `Scale`.
        prior: p(z), of events (latent,); the standard normal, where it is left out.
        event_dim: how many rightmost dimensions make one datum: 3 for pictures (C, H, W).

    Shapes: x is (B, *event), z is (K, B, latent) under K particles.

    Raises:
        ValueError: ``latent`` or ``event_dim`` below one; a scale that is not positive and finite.

    >>> net = nn.Sequential(nn.Linear(2, 1 * 8 * 8), nn.Unflatten(1, (1, 8, 8)))
    >>> Generator(net, latent=2, scale=0.1, event_dim=3).blank(5)[0].shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        latent: int,
        scale: float | Scale,
        prior: Conditional | None = None,
        event_dim: int = 1,
    ) -> None:
        super().__init__()
        self.prior = StandardNormal(latent) if prior is None else prior
        self.likelihood = Normal(Batched(net, latent), scale, event_dim)

    def model(self, x: Tensor) -> None:
        """Declare z ~ p(z), x ~ N(net(z), σ² I) for a batch ``x`` (B, *event)."""
        pyro.module("prior", self.prior)
        pyro.module("likelihood", self.likelihood)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """Declare z ~ p(z), whatever ``x`` is."""
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.prior())

    @torch.no_grad()
    def blank(self, size: int) -> tuple[Tensor, ...]:
        """A batch of the right shape, for sampling from the model: x is zeros (size, *event)."""
        with evaluating(as_pair(self)):  # a BatchNorm would take what is drawn here into its statistics
            z = self.prior().sample((1,))  # only its shape is used
            event = self.likelihood(z).event_shape
        return (z.new_zeros(size, *event),)

    def check(self, x: Tensor) -> None:
        """Raise ValueError where the data have more or fewer dimensions than the generator's."""
        if x.dim() != 1 + self.likelihood.event_dim:
            raise ValueError(
                f"x: with event_dim={self.likelihood.event_dim} a batch has {1 + self.likelihood.event_dim} "
                f"dimensions, got shape {tuple(x.shape)}"
            )


@dataclass(frozen=True)
class FittedScale:
    """The σ under which validation data are likeliest, and what others were tried.

    Attributes:
        scale: σ, in units of the data.
        curve: σ -> bound on log p(x) of the validation data under it, from the least σ to the greatest.
    """

    scale: float
    curve: dict[float, Estimate]

    @property
    def estimate(self) -> Estimate:
        """The bound under the σ chosen: too good, by a little, for the data that chose it."""
        return self.curve[self.scale]

    def __str__(self) -> str:
        return f"σ = {self.scale:.4g}, the best of {len(self.curve)} tried\n{self.estimate}"


def fit_scale(
    generator: Generator,
    valid: Any,
    *,
    low: float = 0.01,
    high: float = 1.0,
    settings: Annealing = Annealing(chains=8, distributions=200),
    tolerance: float = 0.02,
    batch_size: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> FittedScale:
    """Find and set the σ of a generator that maximises the mean bound of `ppl_vae.annealed` on validation data.

    The search is Brent's, over log σ. One seed serves for all, but trajectories soon part, and bounds differ by
    their Monte Carlo errors all the same: data of few dimensions, of which σ changes little, need more chains, or
    more data. Bounds are looser where σ is small and posteriors hence are narrow, so that σ comes out rather too
    great; more distributions show by how much. Judge test data afterwards, with more distributions.

    Args:
        generator: the generator; its ``scale`` was given as a number.
        valid: validation data in any form that ``fit`` takes; some hundreds will do.
        low: the least σ that is tried, in units of the data.
        high: the greatest one.
        settings: how to anneal for each σ.
        tolerance: how near to come, in log σ: 0.02 is 2%.
        batch_size: data moved at once.
        seed: fixes all draws.
        compile: as in `ppl_vae.fit`; what is compiled serves for every σ.

    Returns:
        The σ found, which the generator has from now on, and the bounds under all those tried.

    Raises:
        ValueError: ``low``, ``high`` or ``tolerance`` out of range; a scale that is no `FixedScale`; an optimum at
            ``low`` or ``high``; what `ppl_vae.annealed` raises. The generator then keeps the σ it had.
    """
    from scipy.optimize import minimize_scalar

    scale = _fixed(generator)
    if not 0 < low < high < math.inf:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    if not 0 < tolerance < math.log(high / low) / 4:
        raise ValueError(
            f"tolerance must be positive, and less than a quarter of log(high / low), "
            f"{math.log(high / low):.3g}, got {tolerance}"
        )
    chosen, curve = scale.value.clone(), dict[float, Estimate]()

    def loss(log_scale: float) -> float:
        scale.value.fill_(sigma := math.exp(log_scale))
        curve[sigma] = annealed(generator, valid, settings, batch_size=batch_size, seed=seed, compile=compile)
        return -curve[sigma].mean

    try:
        bounds = (math.log(low), math.log(high))
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": tolerance})
        best = max(curve, key=lambda sigma: curve[sigma].mean)
        _check_inside(best, low, high, tolerance)
        chosen.fill_(best)
    finally:
        scale.value.copy_(chosen)
    return FittedScale(best, {sigma: curve[sigma] for sigma in sorted(curve)})


def _fixed(generator: Generator) -> FixedScale:
    """The scale of a generator that can be set.

    Raises:
        ValueError: it is of another kind.
    """
    scale = generator.likelihood.scale
    if not isinstance(scale, FixedScale):
        raise ValueError(f"generator: its scale must be a FixedScale to be set, got {type(scale).__name__}")
    return scale


def _check_inside(best: float, low: float, high: float, tolerance: float) -> None:
    """Raise ValueError for a σ that the search ended at only because it had to end there."""
    for name, value, way in (("low", low, "lower"), ("high", high, "raise")):
        if abs(math.log(best / value)) < 2 * tolerance:
            raise ValueError(f"{name}: data are likeliest at σ = {best:.4g}, next to {name}={value:g}; {way} it")
