"""Conditional distributions: modules whose ``forward(*context)`` returns a Pyro distribution.

Prior p(z | c), likelihood p(x | z, c) and posterior q(z | x, c) are the same kind of thing. `Normal` is all
three: a mean-field posterior, a conditional prior, and a likelihood with fixed, learned or per-pixel scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.nets import output_bias, pooled

__all__ = [
    "Conditional",
    "Entrywise",
    "FixedScale",
    "LearnedScale",
    "LocationScale",
    "NetScale",
    "Normal",
    "OptimalScale",
    "Scale",
    "as_scale",
    "at_least_one",
    "bounded",
    "unbounded",
]

LOG_SCALE_LIMIT = 7.0  # scales stay within exp(±7), about 1/1100 to 1100
UNSEEN = 1e-6  # weight of a starting value against one batch: it counts while there is nothing else


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


def at_least_one(**sizes: int) -> None:
    """Raise ValueError, naming it, for a size that is no whole number, or below one."""
    for name, size in sizes.items():
        if not hasattr(size, "__index__"):  # as a float has none, however round
            raise ValueError(f"{name} must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def bounded(raw: Tensor, limit: float = LOG_SCALE_LIMIT) -> Tensor:
    """Squash a raw log-scale smoothly into ``(-limit, limit)``: the identity near 0, never NaN far away.

    A decoder that reconstructs a constant pixel exactly would send an unbounded log-scale to -inf and the
    density to +inf, some epochs into a run.

    >>> bounded(torch.tensor([-1e9, 0.0, 0.1, 1e9])).tolist()
    [-7.0, 0.0, 0.0999..., 7.0]
    """
    return limit * torch.tanh(raw / limit)


def unbounded(squashed: Tensor, limit: float = LOG_SCALE_LIMIT) -> Tensor:
    """The raw numbers that `bounded` squashes into these, which are first kept just inside the limit.

    >>> bounded(unbounded(torch.tensor([-100.0, 0.5]))).tolist()
    [-6.92..., 0.5]
    """
    return limit * torch.atanh(squashed.clamp(-0.99 * limit, 0.99 * limit) / limit)


class Scale(nn.Module, ABC):
    """How a conditional such as `Normal` gets its scale: ``forward(raw, dim) -> (loc, scale)``.

    Attributes:
        channels: how many numbers per event dimension the net must give (1, or 2 with the scale's own).
    """

    channels: int = 1

    @abstractmethod
    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Split the net's output ``raw`` along ``dim`` into location and scale, broadcastable shapes."""

    def normal(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The normal of a location and a scale of this kind."""
        return dist.Normal(loc, scale)

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
    """One σ for all data, learned with the nets; its optimum is the root mean squared error.

    Args:
        init: starting value. Start at or below the data's standard deviation: above it, the KL outweighs what
            the latents could explain, the guide collapses onto the prior, and stays there.
        limit: bound on |log σ|.
        shape: of the parameter; () is one σ for all pixels, the shape of one datum one for each of them.

    Raises:
        ValueError: ``init`` outside the bounds.
    """

    def __init__(self, init: float = 0.2, limit: float = LOG_SCALE_LIMIT, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.limit = limit
        self.raw = nn.Parameter(torch.full(tuple(shape), _raw(_checked(init, limit), limit)))

    @property
    def value(self) -> Tensor:
        """The current σ, of the shape given."""
        return bounded(self.raw, self.limit).exp()

    def start_from(self, deviation: float, bias: Tensor) -> None:
        """Start at the data's standard deviation."""
        with torch.no_grad():
            self.raw.fill_(_raw(deviation, self.limit))

    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return ``(raw, σ)``."""
        return raw, self.value


class OptimalScale(Scale):
    """The σ under which a batch is likeliest, in closed form: its root mean squared error (Rybkin et al. 2021).

    While training, the density of a batch is that of N(x; loc, σ*²) with σ*² the mean of (x - loc)² over all
    its particles, data and pixels. There the log-density of a datum depends on the whole batch: it is a
    training objective and no density. In evaluation mode σ is a number, the average over past batches, as
    BatchNorm keeps its statistics; so bounds from `ppl_vae.evaluate` and on validation data are bounds.
    Samples and means use that number in both modes.

    The gradient takes σ* as given. For the ELBO that loses nothing, since the derivative of its likelihood term
    in σ is zero at σ*; and a particle's weight then depends on no other particle. For other bounds σ* is not
    their optimum, because they weigh particles unequally. Pixels that ``poutine.mask`` leaves out count in σ*.

    Args:
        init: σ before any batch was seen.
        momentum: what a new batch counts in the average of σ²; early batches count fully.
        limit: bound on |log σ|.

    Raises:
        ValueError: ``init`` outside the bounds, ``momentum`` outside (0, 1].
    """

    square: Tensor
    weight: Tensor

    def __init__(self, init: float = 0.2, momentum: float = 0.01, limit: float = LOG_SCALE_LIMIT) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
        self.momentum, self.limit = momentum, limit
        self.register_buffer("square", torch.tensor(_checked(init, limit) ** 2 * UNSEEN))
        self.register_buffer("weight", torch.tensor(UNSEEN))

    @property
    def value(self) -> Tensor:
        """The average σ over past batches, a scalar tensor."""
        return (self.square / self.weight).sqrt()

    def start_from(self, deviation: float, bias: Tensor) -> None:
        """Start at the data's standard deviation, as if no batch had been seen."""
        deviation = min(max(deviation, math.exp(-self.limit)), math.exp(self.limit))
        self.square.fill_(deviation**2 * UNSEEN)
        self.weight.fill_(UNSEEN)

    def forward(self, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return ``(raw, σ)`` with the average σ."""
        return raw, self.value

    def normal(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The normal with the average σ; while training, one that finds σ when it is given a batch."""
        if not self.training:
            return super().normal(loc, scale)
        law = OptimalNormal(loc, scale)
        law.keeper = self
        return law

    def of(self, error: Tensor) -> Tensor:
        """The optimal σ for a batch's errors, without gradient; the average follows it."""
        square = error.detach().square().mean().clamp(math.exp(-2 * self.limit), math.exp(2 * self.limit))
        self.square.lerp_(square.to(self.square), self.momentum)
        self.weight.lerp_(torch.ones_like(self.weight), self.momentum)
        return square.sqrt()


class OptimalNormal(dist.Normal):  # type: ignore[misc]
    """A normal whose log-density takes the σ under which the values given are likeliest; see `OptimalScale`."""

    keeper: OptimalScale

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> OptimalNormal:
        """Return it with another batch shape."""
        new: OptimalNormal = super().expand(batch_shape, _instance)
        new.keeper = self.keeper
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log N(value; loc, σ*²) of each entry, in nats."""
        sigma = self.keeper.of(value - self.loc)
        log_prob: Tensor = dist.Normal(self.loc, sigma, validate_args=False).log_prob(value)
        return log_prob


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
            bias[len(bias) // 2 :] = _raw(deviation, self.limit)


def as_scale(value: float | Scale, name: str = "scale") -> Scale:
    """A positive number as a `FixedScale`, a `Scale` as it is.

    Raises:
        ValueError: not a positive number; an `OptimalScale`, which is the optimum of the normal alone.
    """
    if isinstance(value, OptimalScale):
        raise ValueError(f"{name}: OptimalScale is the closed form for Normal alone; use LearnedScale here")
    if isinstance(value, Scale):
        return value
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a Scale, or a number positive and finite, got {value}")
    return FixedScale(value)


def _checked(init: float, limit: float) -> float:
    """A starting scale; raises ValueError where it is outside its bounds."""
    if not math.exp(-limit) < init < math.exp(limit):
        raise ValueError(f"init must lie within exp(±{limit:g}), got {init}")
    return float(init)


def _raw(scale: float, limit: float) -> float:
    """The raw log-scale of a scale, kept just inside the bounds."""
    return float(unbounded(torch.tensor(max(scale, 1e-30), dtype=torch.float64).log(), limit))


class Entrywise(Conditional):
    """Independent entries of a datum, given a net's numbers for each: what most likelihoods are.

    The net's output holds all first numbers of the entries, then all second ones, and so on, along the first
    event dimension: ``(..., n * d)`` for flat data, ``(..., n * C, H, W)`` for pictures.

    Args:
        net: module of the context.
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: ``event_dim`` below one.
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(event_dim=event_dim)
        self.net = net
        self.event_dim = event_dim

    @abstractmethod
    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution of single entries, batch shape ``(..., *event)``."""

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution with batch shape that of the context, event shape that of one datum."""
        return self.law(*context).to_event(self.event_dim)

    def parts(self, raw: Tensor, *numbers: int) -> tuple[Tensor, ...]:
        """Split the net's output into parts that hold so many numbers for each entry.

        Raises:
            ValueError: the output's first event dimension is no multiple of their sum.
        """
        width, total = raw.shape[-self.event_dim], sum(numbers)
        if width % total:
            raise ValueError(
                f"{type(self).__name__}: the net must give {total} numbers for each entry of a datum, along its "
                f"first dimension; {width} is no multiple of {total}"
            )
        sizes = [n * (width // total) for n in numbers]
        return torch.split(raw, sizes, -self.event_dim)


class LocationScale(Entrywise):
    """Independent entries of one family, with the location and perhaps the scale from a net.

    Args:
        net: module of the context; its output holds the location, and for `NetScale` the log-scale after it,
            along the first event dimension: ``(..., 2 * d)`` or ``(..., 2 * C, H, W)``.
        scale: a positive number (fixed scale) or a `Scale`.
        event_dim: how many rightmost dimensions make one event.

    Attributes:
        per_deviation: the family's scale where its standard deviation is 1.
    """

    per_deviation: float = 1.0

    def __init__(self, net: nn.Module, scale: float | Scale, event_dim: int = 1) -> None:
        super().__init__(net, event_dim)
        self.scale = scale if isinstance(scale, Scale) else FixedScale(scale)

    @abstractmethod
    def family(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """Return the distribution of entries with a location and a scale."""

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the family's member that net and scale give."""
        return self.family(*self.scale(self.net(*context), -self.event_dim))

    def start_from(self, x: Tensor) -> None:
        """Start at the best model without latents: the mean of ``x`` (N, d), and its standard deviation."""
        mean = x.mean(0)
        bias = output_bias(self.net, self.scale.channels * mean.numel())
        with torch.no_grad():
            part = bias[: len(bias) // self.scale.channels]
            part.copy_(pooled(mean, len(part)))
        if (deviation := float((x - mean).square().mean().sqrt())) > 0:  # constant data tell nothing of σ
            self.scale.start_from(self.per_deviation * deviation, bias)


class Normal(LocationScale):
    """N(loc(context), diag(scale²)), with the location and perhaps the scale from a net. Data: real numbers.

    Args:
        net: module of the context; its output holds the location, and for `NetScale` the log-scale after it,
            along the first event dimension: ``(..., 2 * d)`` or ``(..., 2 * C, H, W)``.
        scale: a positive number (fixed σ) or a `Scale`.
        event_dim: how many rightmost dimensions make one event.

    >>> from ppl_vae.nets import MLP
    >>> Normal(MLP(784, 200, 2 * 20), NetScale())(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def family(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """Return the normal."""
        return self.scale.normal(loc, scale)
