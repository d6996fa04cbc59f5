"""Likelihoods p(x | z, c): what a decoder's output means, on a stated scale of the data.

Here are those for binary, bounded and real-valued data. The Gaussian is `ppl_vae.conditionals.Normal`; those for
pictures of 8 bits are in `ppl_vae.pixels`, those for counts in `ppl_vae.counts`.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.conditionals import Entrywise, LocationScale, NetScale, Scale, as_scale, bounded, unbounded
from ppl_vae.nets import output_bias, pooled

__all__ = ["Bernoulli", "Beta", "ContinuousBernoulli", "StudentT"]


class Bernoulli(Entrywise):
    """Independent binary pixels, log-odds from a net. Data: exactly 0 or 1.

    Args:
        net: module of the context giving logits of the event's shape.
        event_dim: how many rightmost dimensions make one event.

    >>> from ppl_vae.nets import MLP
    >>> Bernoulli(MLP(20, 200, 784))(torch.zeros(3, 20)).event_shape
    torch.Size([784])
    """

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the Bernoulli of single pixels."""
        return dist.Bernoulli(logits=self.net(*context))

    def start_from(self, x: Tensor) -> None:
        """Start the logits at those of the mean of ``x`` (N, d), clipped to [.001, .999] (Burda et al. 2016)."""
        mean = x.mean(0).flatten()
        bias = output_bias(self.net, mean.numel())
        with torch.no_grad():
            bias.copy_(torch.logit(pooled(mean, len(bias)).to(bias), eps=1e-3))


class ContinuousBernoulli(Entrywise):
    """Independent grey levels with density ∝ exp(λ x), λ from a net. Data: in [0, 1], the ends included.

    The Bernoulli's log-density with the constant that makes it a density on [0, 1] (Loaiza-Ganem & Cunningham
    2019). λ is no log-odds: the mean is closer to one half than sigmoid(λ).

    Args:
        net: module of the context giving λ, of the event's shape.
        event_dim: how many rightmost dimensions make one event.

    >>> ContinuousBernoulli(nn.Identity())(torch.tensor([[0.0, 4.0]])).mean
    tensor([[0.5000, 0.7687]])
    """

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the continuous Bernoulli of single pixels."""
        return StableContinuousBernoulli(logits=self.net(*context))

    def start_from(self, x: Tensor) -> None:
        """Start at the mean of ``x`` (N, d), clipped to [.001, .999]."""
        mean = x.mean(0).flatten()
        bias = output_bias(self.net, mean.numel())
        mean = pooled(mean, len(bias))
        low = torch.full_like(mean, -2e3, dtype=torch.float64)
        high, wanted = -low, mean.double().clamp(1e-3, 1 - 1e-3)
        for _ in range(60):  # the mean grows with λ and has no inverse in closed form
            middle = (low + high) / 2
            less = _mean(middle) < wanted
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        with torch.no_grad():
            bias.copy_(low)


class StableContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[misc]
    """The continuous Bernoulli in terms of its logits λ alone: λ exp(λ x) / (exp(λ) - 1).

    torch's keeps probabilities 1e-7 away from 0 and 1, so that beyond λ = ±16, where pixels that are always black
    or white drive it, it does not integrate to 1. Here log-density, mean and quantiles are right for any λ.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each entry, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob: Tensor = self.logits * (value - 0.5) - _log_sinhc(self.logits / 2)
        return log_prob

    @property
    def mean(self) -> Tensor:
        """The mean of each entry."""
        return _mean(self.logits)

    def icdf(self, value: Tensor) -> Tensor:
        """Return quantiles; of the falling density they are -log(1 - u (1 - exp(-|λ|))) / |λ|."""
        rate, rising = self.logits.abs(), self.logits > 0
        u = torch.where(rising, 1 - value, value)
        flat = rate < 1e-3
        steep = rate.where(~flat, 1.0)
        fallen = torch.where(flat, u - rate / 2 * u * (1 - u), -torch.log1p(u * torch.expm1(-steep)) / steep)
        return torch.where(rising, 1 - fallen, fallen)


def _log_sinhc(h: Tensor) -> Tensor:
    """log(sinh(h) / h), for any h."""
    size = h.abs()
    near = size < 0.3
    far = size.where(~near, 1.0)
    square = (h**2).where(near, 0.0)
    series = square * (1 / 6 - square * (1 / 180 - square / 2835))
    return torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))


def _mean(logits: Tensor) -> Tensor:
    """The mean of the continuous Bernoulli, (1 + coth(h) - 1 / h) / 2 with h = λ / 2."""
    h = logits / 2
    near = h.abs() < 0.3
    far = h.where(~near, 1.0)
    small = h.where(near, 0.0)
    square = small**2
    series = small * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    return (1 + torch.where(near, series, 1 / torch.tanh(far) - 1 / far)) / 2


class Beta(Entrywise):
    """Independent Beta(α, β) entries, log α and log β from a net. Data: strictly between 0 and 1.

    At 0 and 1 the density is zero or infinite. Pixels of 8 bits hold both; `ppl_vae.dequantise` moves them inside.

    Args:
        net: module of the context; its output holds log α, and log β after it, along the first event dimension.
        event_dim: how many rightmost dimensions make one event.
    """

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the Beta of single entries, both concentrations within exp(±7)."""
        first, second = self.parts(self.net(*context), 1, 1)
        return OpenBeta(bounded(first).exp(), bounded(second).exp())

    def start_from(self, x: Tensor) -> None:
        """Start at the mean of ``x`` (N, d) and, over all entries together, at its variance."""
        mean = x.mean(0).flatten()
        bias = output_bias(self.net, 2 * mean.numel())
        mean = pooled(mean, len(bias) // 2).clamp(1e-3, 1 - 1e-3)
        spread = (x - x.mean(0)).square().mean()
        total = ((mean * (1 - mean)).mean() / spread - 1).clamp(1.0, 100.0)
        with torch.no_grad():
            bias.copy_(unbounded((total * torch.cat([mean, 1 - mean])).log().to(bias)))


class _Inside(constraints.Constraint):
    """The open unit interval."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "numbers strictly between 0 and 1"


class OpenBeta(dist.Beta):  # type: ignore[misc]
    """torch's Beta, whose support leaves out 0 and 1 as its samples do."""

    support = _Inside()


class StudentT(LocationScale):
    """Independent Student-t entries: a `Normal` that forgives outliers. Data: real numbers.

    Args:
        net: module of the context, as for `Normal`.
        scale: a positive number (fixed) or a `Scale`, per pixel by the net with `NetScale`. It is the standard
            deviation times √((df - 2) / df).
        df: degrees of freedom, a positive number (fixed) or a `LearnedScale`, which may have one for each pixel.
            At 1 or below there is no mean, at 2 or below no variance.
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: a number that is not positive; `OptimalScale`; degrees of freedom by the net.
    """

    def __init__(self, net: nn.Module, scale: float | Scale, df: float | Scale = 5.0, event_dim: int = 1) -> None:
        super().__init__(net, as_scale(scale), event_dim)
        self.df = as_scale(df, "df")
        if isinstance(df, NetScale):
            raise ValueError(
                "df cannot be a NetScale: one datum tells nothing of it; use LearnedScale(5.0, shape=...)"
            )

    def family(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """Return the Student-t."""
        return dist.StudentT(self.df(loc, -self.event_dim)[1], loc, scale)
