"""Semi-amortised training: the guide says where to start, a few gradient steps for each datum do the rest.

A guide that lags behind the model teaches it to do without its latents. Here the model's parameters follow the
bound at a posterior that was refined for each datum of the batch (Hjelm et al. 2016; Krishnan, Liang & Hoffman
2018, algorithm 1; Kim et al. 2018). The guide itself follows the bound at its own posterior, as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from ppl_vae.conditionals import at_least_one
from ppl_vae.estimators import pathwise
from ppl_vae.moving import Moving, Within, moved
from ppl_vae.objectives import BoundObjective, Objective, Part
from ppl_vae.pairs import Pair
from ppl_vae.sites import Site, plate_shape

__all__ = ["SemiAmortised"]

ADVICE = "draw a normal latent, and transform its value in the model, or train without refinement"
LIMIT = 5.0  # of a slope: a guide that is far too wide has others that would throw it out


class SemiAmortised(Objective):
    """A bound at posteriors refined by a few gradient steps for each datum.

    A latent that the guide draws from a distribution of mean m and standard deviation s is moved,
    z' = m + a s + e^b (z - m), with a and b of each datum and dimension's own. They start at 0, the guide as it
    is, and ascend the bound by pathwise gradients, under fresh draws at each step. Then the model takes a step
    along the bound at z', which it is given as it is: no gradient passes through the refinement (first order, as
    Krishnan et al. have it). A second step trains the guide by the bound at its own draws.

    The value is that of the refined bound, in validation too. It is a bound on log p(x), as q' knows of x alone.

    Args:
        objective: the bound, with the estimator of the guide's gradient.
        steps: of the refinement; each costs about what a training step does.
        rate: their length, in units of s and of log-scales, times the slope.

    Raises:
        ValueError: an objective that is no `BoundObjective`; no steps; a rate that is not positive and finite; and
            where it is used, naming the site, a latent without a sampler that carries gradients, whose support is
            not all real numbers, or whose distribution has no mean and standard deviation.

    >>> from ppl_vae.objectives import ELBO
    >>> [part.trains for part in SemiAmortised(ELBO(), steps=5).parts()]
    [('model',), ('guide',)]
    """

    def __init__(self, objective: Objective, steps: int, rate: float = 0.1) -> None:
        super().__init__()
        if not isinstance(objective, BoundObjective):
            raise ValueError(
                f"objective: expected a bound such as pv.ELBO(), got {type(objective).__name__}, which cannot be "
                "refined"
            )
        at_least_one(steps=steps)
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {rate}")
        self.objective, self.steps, self.rate = objective, steps, rate

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return the bound per datum at the refined posterior, (B,), with the model's gradient alone."""
        goal, moves = self.objective, _Moves()
        refined = Within(pair, moves.around)
        for _ in range(self.steps):
            with torch.enable_grad():
                value = pathwise(goal.bound, refined, *batch, particles=goal.particles, beta=goal.beta, kl=goal.kl)
                moves.ascend(value, self.rate)
        moves.held = True
        return goal.forward(refined, *batch)

    def parts(self) -> tuple[Part, ...]:
        """A step of the model; one of the guide, and of what the estimator learns; then the penalties' own."""
        guide, *others = self.objective.parts()
        trains = tuple(each for each in guide.trains if each != "model")
        guide = replace(guide, name="the guide's objective", trains=trains)
        return Part("objective", self, ("model",)), guide, *others

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"steps={self.steps}, rate={self.rate:g}"


class _Moves:
    """Numbers of each datum's own that move what a guide draws, made as zeros where a site is first met.

    Attributes:
        numbers: site -> its a and b, each (*plates, B, *event).
        held: whether the guide is run without gradients.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[Tensor, Tensor]] = {}
        self.held = False

    def ascend(self, value: Tensor, rate: float) -> None:
        """Take a step up along the values of all data, which have no numbers in common.

        Raises:
            ValueError: the guide has drawn nothing that can be moved.
        """
        if not self.numbers:
            raise ValueError(
                "program: its guide draws nothing but points, which cannot be refined; train it as it is"
            )
        leaves = [leaf for pair in self.numbers.values() for leaf in pair]
        slopes = torch.autograd.grad(value.sum(), leaves)
        # A slope that is infinite or NaN, as one draw from afar may have it, moves nothing.
        steps = [rate * g.nan_to_num(0.0, 0.0, 0.0).clamp(-LIMIT, LIMIT) for g in slopes]
        climbed = iter([(leaf + step).detach().requires_grad_() for leaf, step in zip(leaves, steps, strict=True)])
        self.numbers = {name: (next(climbed), next(climbed)) for name in self.numbers}

    @contextmanager
    def around(self) -> Iterator[None]:
        """What the guide runs within."""
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.held),
            Moving(self._change, ADVICE, spread=True),
        ):
            yield

    def _change(self, site: Site) -> TorchDistribution:
        """What a site is drawn from instead."""
        name, fn = site["name"], site["fn"]
        if name not in self.numbers:
            start = fn.mean.new_zeros((*(plate_shape(site) or ()), *fn.event_shape))
            self.numbers[name] = start.clone().requires_grad_(), start.requires_grad_()
        shift, log_factor = self.numbers[name]
        return moved(fn, log_factor.exp(), shift)
