"""Discrete latents and their relaxations, as posteriors and as priors, which take a `Constant` for a net.

Independent bits are `ppl_vae.likelihoods.Bernoulli`: as posterior with a net of the data, as prior for instance
``Bernoulli(Constant(torch.zeros(20)))``, where all are even. Discrete draws carry no gradient: they want an
estimator by scores, or a sum over all values, see `OneHotCategorical`.

A relaxed draw is kept as logits, y, of which a decoder takes the point: ``nn.Sequential(Bits(), MLP(20, 784))``.
Points themselves would reach 0 and 1 by rounding, where they tell no more how far out they are, and densities are
infinite (Maddison et al. 2017, appendix C). The bound is the same, since q and p are densities of the
same y. A relaxed posterior wants a relaxed prior, of a temperature of its own.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.distributions.utils import clamp_probs

from ppl_vae.conditionals import Conditional, at_least_one

__all__ = [
    "Bits",
    "Constant",
    "OneHotCategorical",
    "RelaxedBernoulli",
    "RelaxedCategorical",
    "RelaxedLogits",
    "RelaxedOneHot",
    "Simplex",
]


class Constant(nn.Module):
    """A net that ignores its context, which makes of any conditional a prior.

    Args:
        value: what it gives, the numbers of one datum.
        learned: whether the value is a parameter.

    >>> OneHotCategorical(Constant(torch.zeros(4)))().probs
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    value: Tensor

    def __init__(self, value: Tensor, learned: bool = False) -> None:
        super().__init__()
        if learned:
            self.value = nn.Parameter(value.detach().clone())
        else:
            self.register_buffer("value", value.detach().clone())

    def forward(self, *context: Tensor) -> Tensor:
        """Return the value, without leading dimensions."""
        return self.value


class OneHotCategorical(Conditional):
    """One of C categories, as an indicator vector, logits from a net; or several of them.

    The KL between two is a closed form. Exact gradients of one come of summing over its C values, with the
    estimator `ppl_vae.enumerated`.

    Args:
        net: module of the context giving logits, (..., C) or (..., variables, C).
        event_dim: how many rightmost dimensions make one event; 2 for several variables.

    >>> from ppl_vae.nets import MLP
    >>> OneHotCategorical(MLP(784, 200, 10))(torch.zeros(3, 784)).event_shape
    torch.Size([10])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(event_dim=event_dim)
        self.net, self.event_dim = net, event_dim

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution with batch shape that of the context."""
        return dist.OneHotCategorical(logits=self.net(*context)).to_event(self.event_dim - 1)


class _Relaxed(Conditional):
    """What the relaxed conditionals share: a net of logits, and a temperature that a hook may anneal."""

    temperature: Tensor

    def __init__(self, net: nn.Module, temperature: float, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(event_dim=event_dim)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.net, self.event_dim = net, event_dim
        self.register_buffer("temperature", torch.tensor(float(temperature)))


class RelaxedBernoulli(_Relaxed):
    """Bits relaxed to (0, 1), by their logits y = (net + logistic noise) / T (Maddison et al. 2017, appendix B).

    A bit falls above one half as often as its Bernoulli is 1, whatever T; the lower T, the closer to 0 or 1.

    Args:
        net: module of the context giving logits of the event's shape.
        temperature: T, a buffer, as of `ppl_vae.hooks.Anneal`. 2/3 for the posterior with 1/2 for the prior is
            usual.
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: a temperature that is not positive and finite.

    >>> from ppl_vae.nets import MLP
    >>> RelaxedBernoulli(MLP(784, 200, 20), 2 / 3)(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution of the logits, with batch shape that of the context."""
        logits = self.net(*context)
        return RelaxedLogits(logits / self.temperature, 1 / self.temperature).to_event(self.event_dim)


class RelaxedCategorical(_Relaxed):
    """One of C categories relaxed to the simplex, by its logarithm (Maddison et al. 2017).

    y = log softmax((net + Gumbel noise) / T). The greatest of y is category k as often as the categorical is,
    whatever T; the lower T, the closer to a corner.

    Args:
        net: module of the context giving logits, (..., C) or (..., variables, C).
        temperature: T, a buffer, as of `ppl_vae.hooks.Anneal`. At most 1 / (C - 1) has no mode inside the
            simplex.
        event_dim: how many rightmost dimensions make one event; 2 for several variables.

    Raises:
        ValueError: a temperature that is not positive and finite.

    >>> from ppl_vae.nets import MLP
    >>> RelaxedCategorical(MLP(784, 200, 10), 0.5)(torch.zeros(3, 784)).event_shape
    torch.Size([10])
    """

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution of the logarithm, with batch shape that of the context."""
        return RelaxedOneHot(self.temperature, logits=self.net(*context)).to_event(self.event_dim - 1)


class Bits(nn.Module):
    """What a decoder takes of relaxed bits, as its first layer: logits y (...) -> (0, 1).

    Args:
        hard: give 0 or 1 with the gradient of the relaxed bit, straight through (Bengio et al. 2013). The model is
            then one of bits, its gradient biased.

    >>> Bits()(torch.tensor([-1e3, 0.0, 1e3])).tolist()
    [0.0, 0.5, 1.0]
    """

    def __init__(self, hard: bool = False) -> None:
        super().__init__()
        self.hard = hard

    def forward(self, y: Tensor) -> Tensor:
        """Return the bits."""
        soft = y.sigmoid()
        return _straight((y > 0).to(y.dtype), soft) if self.hard else soft


class Simplex(nn.Module):
    """What a decoder takes of a relaxed category, as its first layer: y (..., C) -> the simplex in C.

    Args:
        hard: give a corner with the gradient of the point, straight through (Jang et al. 2017, section 2.2).

    >>> Simplex(hard=True)(torch.tensor([-2.0, -0.1, -7.0]))
    tensor([0., 1., 0.])
    """

    def __init__(self, hard: bool = False) -> None:
        super().__init__()
        self.hard = hard

    def forward(self, y: Tensor) -> Tensor:
        """Return the points."""
        soft = y.softmax(-1)
        if not self.hard:
            return soft
        return _straight(torch.zeros_like(y).scatter(-1, y.argmax(-1, keepdim=True), 1.0), soft)


class RelaxedLogits(dist.Logistic):  # type: ignore[misc]
    """Pyro's logistic distribution, whose own draws are infinite where noise is exactly 0, once in 17 million."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw by the inverse of the distribution function, (*sample_shape, ...)."""
        noise = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        draw: Tensor = self.icdf(clamp_probs(noise))
        return draw


class RelaxedOneHot(ExpRelaxedCategorical, TorchDistributionMixin):  # type: ignore[misc]
    """torch's logarithm of a relaxed category, as Pyro takes it; it wraps that on the simplex alone."""


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    return hard + (soft - soft.detach())
