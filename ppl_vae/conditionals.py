"""Conditional distributions: modules whose ``forward(*context)`` returns a Pyro distribution.

Prior p(z | c), likelihood p(x | z, c) and posterior q(z | x, c) are the same kind of thing. `Normal` is all
three: a mean-field posterior, a conditional prior, and a likelihood with fixed, learned or per-pixel scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.nets import output_bias

__all__ = ["Conditional", "FixedScale", "LearnedScale", "NetScale", "Normal", "Scale", "bounded"]

LOG_SCALE_LIMIT = 7.0  # scales stay within exp(±7), about 1/1100 to 1100


class Conditional(nn.Module, ABC):
    """A distribution given a context: ``forward(*context) -> Distribution``.

    The context has any leading dimensions, ``(..., features)``; the distribution has them as its batch shape
    (or none, if it ignores the context) and the shape of one datum or latent as its event shape.
    """

    @abstractmethod
    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution given ``context``."""

    def start_from(self, x: Tensor) -> None:
        """Set the output layer's bias so that, before training, the mean is that of the data ``x`` (N, *event).

        Raises:
            ValueError: this conditional has no output layer to set.
        """
        raise ValueError(f"{type(self).__name__} cannot start from the mean of data")


def bounded(raw: Tensor, limit: float = LOG_SCALE_LIMIT) -> Tensor:
    """Squash a raw log-scale smoothly into ``(-limit, limit)``: the identity near 0, never NaN far away.

    A decoder that reconstructs a constant pixel exactly would send an unbounded log-scale to -inf and the
    density to +inf, some epochs into a run.

    >>> bounded(torch.tensor([-1e9, 0.0, 0.1, 1e9])).tolist()
    [-7.0, 0.0, 0.0999..., 7.0]
    """
    return limit * torch.tanh(raw / limit)


class Scale(nn.Module, ABC):
    """How a `Normal` gets its standard deviation: ``forward(raw, dim) -> (loc, scale)``.

    Attributes:
        channels: how many numbers per event dimension the net must give (1, or 2 with the scale's own).
    """

    channels: int = 1

    @abstractmethod
    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Split the net's output ``raw`` along ``dim`` into location and scale, broadcastable shapes."""

    def start_from(self, deviation: float, bias: Tensor) -> None:
        """Start at the data's standard deviation; ``bias`` is that of the net's output layer."""


class FixedScale(Scale):
    """A constant σ. The choice of σ weighs reconstruction against KL; see the maths page before taking 1.

    Raises:
        ValueError: ``value`` is not positive and finite.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        if not 0 < value < math.inf:
            raise ValueError(f"scale must be positive and finite, got {value}")
        self.register_buffer("value", torch.tensor(float(value)))
        self.value: Tensor

    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return ``(raw, σ)``."""
        return raw, self.value


class LearnedScale(Scale):
    """One σ for all pixels and data, learned with the nets; its optimum is the root mean squared error.

    Args:
        init: starting value. Start at or below the data's standard deviation: above it, the KL outweighs what
            the latents could explain, the guide collapses onto the prior, and stays there.
        limit: bound on |log σ|.

    Raises:
        ValueError: ``init`` outside the bounds.
    """

    def __init__(self, init: float = 0.2, limit: float = LOG_SCALE_LIMIT) -> None:
        super().__init__()
        if not math.exp(-limit) < init < math.exp(limit):
            raise ValueError(f"init must lie within exp(±{limit:g}), got {init}")
        self.limit = limit
        self.raw = nn.Parameter(torch.tensor(_unbounded(init, limit)))

    @property
    def value(self) -> Tensor:
        """The current σ, a scalar tensor."""
        return bounded(self.raw, self.limit).exp()

    def start_from(self, deviation: float, bias: Tensor) -> None:
        """Start at the data's standard deviation."""
        with torch.no_grad():
            self.raw.fill_(_unbounded(deviation, self.limit))

    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return ``(raw, σ)``."""
        return raw, self.value


class NetScale(Scale):
    """σ given by the net itself, one per dimension of the event: f_v(z) for a decoder, σ(x) for an encoder."""

    channels = 2

    def __init__(self, limit: float = LOG_SCALE_LIMIT) -> None:
        super().__init__()
        if not 0 < limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {limit}")
        self.limit = limit

    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Split ``raw`` in two halves along ``dim``: location and bounded log-scale."""
        if raw.shape[dim] % 2:
            raise ValueError(
                f"NetScale: the net must give 2 numbers (location, log-scale) per dimension; "
                f"got an odd number, {raw.shape[dim]}"
            )
        loc, log_scale = raw.chunk(2, dim=dim)
        return loc, bounded(log_scale, self.limit).exp()

    def start_from(self, deviation: float, bias: Tensor) -> None:
        """Start all dimensions at the data's standard deviation."""
        with torch.no_grad():
            bias[len(bias) // 2 :] = _unbounded(deviation, self.limit)


def _unbounded(scale: float, limit: float) -> float:
    """The raw log-scale that `bounded` takes to log(scale), kept just inside the bounds."""
    log_scale = min(max(math.log(max(scale, 1e-30)), -0.99 * limit), 0.99 * limit)
    return limit * math.atanh(log_scale / limit)


class Normal(Conditional):
    """N(loc(context), diag(scale²)), with the location and perhaps the scale from a net.

    Args:
        net: module of the context; its output holds the location, and for `NetScale` the log-scale after it,
            along the first event dimension: ``(..., 2 * d)`` or ``(..., 2 * C, H, W)``.
        scale: a positive number (fixed σ) or a `Scale`.
        event_dim: how many rightmost dimensions make one event.

    >>> from ppl_vae.nets import MLP
    >>> Normal(MLP(784, 200, 2 * 20), NetScale())(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def __init__(self, net: nn.Module, scale: float | Scale, event_dim: int = 1) -> None:
        super().__init__()
        self.net = net
        self.scale = scale if isinstance(scale, Scale) else FixedScale(scale)
        self.event_dim = event_dim

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the normal with batch shape that of the context, event shape that of the location."""
        loc, scale = self.scale(self.net(*context), -self.event_dim)
        return dist.Normal(loc, scale).to_event(self.event_dim)

    def start_from(self, x: Tensor) -> None:
        """Start at the best model without latents: the mean of ``x`` (N, d), and its standard deviation as σ."""
        mean = x.mean(0)
        bias = output_bias(self.net, self.scale.channels * mean.numel())
        with torch.no_grad():
            bias[: mean.numel()] = mean.flatten().to(bias)
        if (deviation := float((x - mean).square().mean().sqrt())) > 0:  # constant data tell nothing of σ
            self.scale.start_from(deviation, bias)
