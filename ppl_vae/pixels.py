"""Likelihoods of pictures of 8 bits, as probabilities of levels, and bits per dimension.

Pixels are as `ppl_vae.Data` presents bytes: in {0, 1/255, ..., 1}. A probability of levels and a density of
dequantised pixels become comparable as `bits_per_dimension`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from ppl_vae.conditionals import (
    Conditional,
    Entrywise,
    LocationScale,
    Scale,
    as_scale,
    at_least_one,
    bounded,
    unbounded,
)
from ppl_vae.nets import output_bias, pooled
from ppl_vae.transforms import LEVELS

__all__ = ["Categorical", "DiscretisedLogistic", "LogisticMixture", "bits_per_dimension"]

TOP = 255
T = TypeVar("T", float, Tensor)


def bits_per_dimension(log_prob: T, dims: int, *, dequantised: bool = False) -> T:
    """Bits per dimension of a log-probability, or of a bound on one: lower is better.

        -log p(x) / (D log 2)                    for a probability of levels,
        -log p(y) / (D log 2) + log2(256)        for a density of y = (255 x + u) / 256, u uniform on [0, 1).

    The second is an upper bound on the bits of the levels themselves, since log P(x) = log E_u[p(y)] - D log 256
    (Theis et al. 2016, section 3.1). A density of pixels not dequantised has no bits per dimension.

    Args:
        log_prob: nats per datum, of any shape, or a number.
        dims: D, entries of one datum: 784 for 28x28, 3072 for 32x32 in colour.
        dequantised: whether the data went through `ppl_vae.dequantise`.

    Raises:
        ValueError: ``dims`` below one.

    >>> bits_per_dimension(-784 * math.log(256), 784)
    8.0
    """
    at_least_one(dims=dims)
    return -log_prob / (dims * math.log(2)) + (8.0 if dequantised else 0.0)


class Categorical(Entrywise):
    """Independent pixels with a free probability for each of 256 levels. Data: in {0, 1/255, ..., 1}.

    Args:
        net: module of the context; its output holds the 256 logits along the first event dimension, those of
            level 0 of all pixels first: ``(..., 256 * d)`` or ``(..., 256 * C, H, W)``.
        event_dim: how many rightmost dimensions make one event.

    >>> from ppl_vae.nets import MLP
    >>> Categorical(MLP(2, 256 * 9))(torch.zeros(3, 2)).event_shape
    torch.Size([9])
    """

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution of single pixels."""
        (raw,) = self.parts(self.net(*context), TOP + 1)
        return LevelCategorical(_last(raw, TOP + 1, -self.event_dim))

    def start_from(self, x: Tensor) -> None:
        """Start at each pixel's frequencies in ``x`` (N, d), each level counted once more than it is seen.

        The mean is that of the data, drawn towards one half by the extra counts.
        """
        pixels = x.flatten(1)
        bias = output_bias(self.net, (TOP + 1) * pixels.shape[1])
        counts = torch.ones(TOP + 1, pixels.shape[1], device=bias.device)
        seen = _index(pixels).to(bias.device)
        counts.scatter_add_(0, seen, torch.ones_like(seen, dtype=counts.dtype))
        with torch.no_grad():
            bias.copy_(pooled(counts, len(bias)).log())


class DiscretisedLogistic(LocationScale):
    """Independent pixels from a logistic distribution rounded to levels. Data: in {0, 1/255, ..., 1}.

    A level has the mass within half a step around it, levels 0 and 1 all beyond as well (Kingma et al. 2016).
    Location and scale are in units of the data.

    Args:
        net: module of the context, as for `Normal`.
        scale: a positive number (fixed) or a `Scale`: of the logistic, √3/π of its standard deviation.
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: a scale that is not positive; `OptimalScale`.
    """

    per_deviation = math.sqrt(3) / math.pi

    def __init__(self, net: nn.Module, scale: float | Scale, event_dim: int = 1) -> None:
        super().__init__(net, as_scale(scale), event_dim)

    def family(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """Return the rounded logistic."""
        return LevelLogistic(loc, scale)


class LogisticMixture(Conditional):
    """Pixels from mixtures of discretised logistics (Salimans et al. 2017, eq. 2). Data: in {0, 1/255, ..., 1}.

    Args:
        net: module of the context. Its output holds, along the first event dimension, equal parts of weights
            (logits), locations and log-scales; in each, the first component of all entries comes first.
        components: how many logistics, at least one.
        coupled: three channels share a pixel's component, and the locations of green and blue depend linearly
            on the channels before (section 2.2): μ_g + a (r - ½), μ_b + b (r - ½) + c (g - ½), with a, b, c the
            tanh of numbers of the net. The channels must come first, as in (3, H, W) and in such pictures
            flattened. The parts of the net's output are then ten: weights, 3 locations, 3 log-scales, a, b, c.
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: fewer than one component; ``event_dim`` below one.

    >>> from ppl_vae.nets import MLP
    >>> LogisticMixture(MLP(2, 3 * 5 * 9), components=5)(torch.zeros(3, 2)).event_shape
    torch.Size([9])
    """

    def __init__(self, net: nn.Module, components: int, *, coupled: bool = False, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(components=components, event_dim=event_dim)
        self.net, self.components, self.coupled, self.event_dim = net, components, coupled, event_dim
        self.channels, self.numbers = (3, 10) if coupled else (1, 3)

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the mixture with batch shape that of the context, event shape that of one datum."""
        raw, dim = self.net(*context), -self.event_dim
        if raw.shape[dim] % (self.numbers * self.components):
            raise ValueError(
                f"LogisticMixture: the net must give {self.numbers} numbers for each of {self.components} "
                f"components, along its first dimension; {raw.shape[dim]} is no multiple of their product"
            )
        logits, *parts = (_last(part, self.components, dim) for part in raw.chunk(self.numbers, dim))
        locs, scales = parts[: self.channels], [bounded(p).exp() for p in parts[self.channels : 2 * self.channels]]
        if self.coupled:
            return CoupledLogistics(logits, locs, scales, [p.tanh() for p in parts[6:]], self.event_dim)
        mixture = LevelMixture(dist.Categorical(logits=logits), LevelLogistic(locs[0], scales[0]))
        return mixture.to_event(self.event_dim)

    def start_from(self, x: Tensor) -> None:
        """Start with equal components around the mean of ``x`` (N, d), spread by its standard deviation."""
        mean = x.mean(0)
        pixels, k, channels = mean.numel() // self.channels, self.components, self.channels
        bias = output_bias(self.net, self.numbers * k * pixels)
        deviation = (x - mean).square().mean().sqrt().clamp(min=0.5 / TOP).to(bias)
        places = torch.linspace(-1, 1, k + 2)[1:-1].to(bias)  # within one standard deviation
        rows = bias.view(self.numbers, k, -1)  # of a convolution, a channel's pixels are one
        mean = pooled(mean, channels * rows.shape[2]).reshape(channels, 1, -1)
        with torch.no_grad():
            rows.zero_()
            rows[1 : 1 + channels] = mean.to(bias) + deviation * places[:, None]
            rows[1 + channels : 1 + 2 * channels] = unbounded((deviation * math.sqrt(3) / math.pi).log())


class LevelCategorical(TorchDistribution):  # type: ignore[misc]
    """A probability for each of 256 levels, by logits (*batch, 256)."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support = LEVELS

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LevelCategorical:
        """Return it with another batch shape."""
        return LevelCategorical(self.logits.expand(*batch_shape, -1), self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each entry, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])  # type: ignore[no-untyped-call]
        index = _index(value).expand(shape).unsqueeze(-1)
        chosen = self.logits.expand(*shape, -1).gather(-1, index).squeeze(-1)
        return chosen - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels."""
        drawn: Tensor = dist.Categorical(logits=self.logits).sample(sample_shape)
        return drawn.to(self.logits.dtype) / TOP

    @property
    def mean(self) -> Tensor:
        """The mean of each entry."""
        levels = torch.arange(TOP + 1, device=self.logits.device, dtype=self.logits.dtype) / TOP
        return self.logits.softmax(-1) @ levels


class LevelLogistic(TorchDistribution):  # type: ignore[misc]
    """A logistic distribution rounded to the nearest of 256 levels; what lies outside [0, 1], to its ends."""

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    support = LEVELS

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LevelLogistic:
        """Return it with another batch shape."""
        return LevelLogistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each entry, in nats.

        Between edges a < b it is log(σ(b) - σ(a)) = log σ(b) + log σ(-a) + log(1 - exp(a - b)), in which nothing
        cancels, however far out the level lies. At the ends one edge is infinite.
        """
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / TOP
        top, bottom = value > 1 - half, value < half
        below = logsigmoid((value + half - self.loc) / self.scale).masked_fill(top, 0.0)
        above = logsigmoid((self.loc - value + half) / self.scale).masked_fill(bottom, 0.0)
        within = torch.log(-torch.expm1(-2 * half / self.scale))
        return below + above + torch.where(top | bottom, 0.0, within)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        tiny = torch.finfo(u.dtype).eps
        return _level(self.loc + self.scale * torch.logit(u.clamp(tiny, 1 - tiny)))

    @property
    def mean(self) -> Tensor:
        """The mean of each entry, a sum of probabilities to lie above the edges of levels."""
        above = torch.zeros_like(self.loc)
        for level in range(TOP):
            above = above + torch.sigmoid((self.loc - (level + 0.5) / TOP) / self.scale)
        return above / TOP


class LevelMixture(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture of distributions over levels."""

    support = LEVELS


class CoupledLogistics(TorchDistribution):  # type: ignore[misc]
    """Mixtures over pixels of three channels, each given the channels before it; see `LogisticMixture`.

    Args:
        logits: of the weights, (*batch, n, *rest, K), for events (3 n, *rest).
        locs: three, of the same shape.
        scales: three, of the same shape.
        slopes: a, b, c, of the same shape.
        event_dim: dimensions of the event.
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support = LEVELS

    def __init__(
        self,
        logits: Tensor,
        locs: Sequence[Tensor],
        scales: Sequence[Tensor],
        slopes: Sequence[Tensor],
        event_dim: int,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.locs, self.scales, self.slopes = logits, locs, scales, slopes
        batch, (n, *rest, _) = logits.shape[: -1 - event_dim], logits.shape[-1 - event_dim :]
        super().__init__(batch, torch.Size((3 * n, *rest)), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CoupledLogistics:
        """Return it with another batch shape."""
        shape = (*batch_shape, *self.logits.shape[-1 - self.event_dim :])
        given = (self.locs, self.scales, self.slopes)
        locs, scales, slopes = ([p.expand(shape) for p in parts] for parts in given)
        logits = self.logits.expand(shape)
        return CoupledLogistics(logits, locs, scales, slopes, self.event_dim, self._validate_args)

    def channel(self, number: int, before: Sequence[Tensor]) -> LevelLogistic:
        """The components of a channel, (*batch, n, *rest, K), given those before it, of any size there for K."""
        loc, slopes = self.locs[number], (self.slopes[:0], self.slopes[:1], self.slopes[1:])[number]
        for slope, value in zip(slopes, before, strict=True):
            loc = loc + slope * (value - 0.5)
        return LevelLogistic(loc, self.scales[number], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each event, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        colours = [colour.unsqueeze(-1) for colour in value.chunk(3, -self.event_dim)]
        joint = self.logits.log_softmax(-1)
        for number, colour in enumerate(colours):
            joint = joint + self.channel(number, colours[:number]).log_prob(colour)
        return joint.logsumexp(-1).flatten(-self.event_dim).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels."""
        chosen = dist.Categorical(logits=self.logits).sample(sample_shape).unsqueeze(-1)
        colours: list[Tensor] = []
        for number in range(3):
            components = self.channel(number, colours)
            drawn = components.expand((*chosen.shape[:-1], self.logits.shape[-1])).sample()
            colours.append(drawn.gather(-1, chosen))
        return torch.cat(colours, -1 - self.event_dim).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        """The mean of each entry, each component's channels taken at the means of its channels before.

        Locations are linear in these, so it is exact but for what is cut off at 0 and 1, and for rounding.
        """
        colours: list[Tensor] = []
        for number in range(3):
            colours.append(self.channel(number, colours).mean)
        weights = self.logits.softmax(-1)
        return torch.cat([(weights * colour).sum(-1) for colour in colours], -self.event_dim)


def _last(raw: Tensor, size: int, dim: int) -> Tensor:
    """(..., size * n, *rest) as (..., n, *rest, size)."""
    parts: Tensor = raw.unflatten(dim, (size, -1))  # type: ignore[no-untyped-call]
    return parts.movedim(dim - 1, -1)


def _level(value: Tensor) -> Tensor:
    """The nearest level."""
    return (TOP * value).round().clamp(0, TOP) / TOP


def _index(value: Tensor) -> Tensor:
    """The number of a level, 0 to 255."""
    return (TOP * value).round().clamp(0, TOP).long()
