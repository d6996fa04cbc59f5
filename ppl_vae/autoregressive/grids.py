"""What stands on a grid, codes or pixels: how a net sees it, and how the net's features tell what comes next.

All colours of a position are seen together by the positions after it, and follow from each other in the head. So
nets need no masks for colours, and a position costs one pass of the net to draw.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.conditionals import at_least_one
from ppl_vae.nets import output_bias
from ppl_vae.pixels import TOP, Categorical, LogisticMixture
from ppl_vae.transforms import LEVELS

__all__ = ["CodeGrid", "Grid", "LevelGrid", "LogisticGrid"]


class Grid(nn.Module, ABC):
    """Both ends of an autoregressive net: the embedding of what stands on the grid, and the law of a position.

    Attributes:
        event: shape of one datum.
        channels: numbers at a position.
        size: (h, w).
        width: features that the net gives at each position.
        inputs: channels of the embedding.
        support: of single entries.
    """

    support: Any

    def __init__(self, event: Sequence[int], width: int, inputs: int) -> None:
        super().__init__()
        self.event = tuple(event)
        self.channels = event[0] if len(event) == 3 else 1
        self.size: tuple[int, int] = (event[-2], event[-1])
        self.width, self.inputs = width, inputs

    @abstractmethod
    def embed(self, value: Tensor) -> Tensor:
        """What the net sees of ``value`` (N, channels, h, w): (N, inputs, h, w)."""

    @abstractmethod
    def log_prob(self, features: Tensor, value: Tensor) -> Tensor:
        """Log-probability of each grid in nats, (N,).

        Args:
            features: what the net gives of the positions before, (N, width, h, w).
            value: (N, channels, h, w).
        """

    @abstractmethod
    def draw(self, features: Tensor) -> Tensor:
        """Draw positions (N, channels, h, w) given their features (N, width, h, w)."""

    @abstractmethod
    def start_from(self, x: Tensor) -> None:
        """Set the output's bias such that positions have the frequencies of the data ``x`` (N, *event)."""


class CodeGrid(Grid):
    """A grid of codes 0 .. codes - 1, integers, seen through an embedding, with a free probability for each.

    Args:
        codes: how many there are.
        shape: of the grid, (h, w); it is the event's.
        width: features of the net at each position, and of the embedding.

    Raises:
        ValueError: sizes below one; a shape that is not (h, w).

    >>> CodeGrid(512, (7, 7), width=64).event
    (7, 7)
    """

    def __init__(self, codes: int, shape: Sequence[int], width: int) -> None:
        at_least_one(codes=codes, width=width)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be two positive sizes (h, w), got {tuple(shape)}")
        super().__init__(shape, width, width)
        self.support = constraints.integer_interval(0, codes - 1)  # type: ignore[no-untyped-call]
        self.codes = codes
        self.embedding = nn.Embedding(codes, width)
        self.readout = nn.Sequential(*_hidden(width), nn.Conv2d(width, codes, 1))

    def embed(self, value: Tensor) -> Tensor:
        """What the net sees: vectors of the codes."""
        seen: Tensor = self.embedding(value[:, 0].long())
        return seen.movedim(-1, 1)

    def log_prob(self, features: Tensor, value: Tensor) -> Tensor:
        """Log-probability of each grid in nats, (N,)."""
        chances: Tensor = self.readout(features).log_softmax(1)
        return chances.gather(1, value.long()).flatten(1).sum(1)

    def draw(self, features: Tensor) -> Tensor:
        """Draw codes."""
        drawn: Tensor = dist.Categorical(logits=self.readout(features).movedim(1, -1)).sample()
        return drawn.unsqueeze(1)

    def start_from(self, x: Tensor) -> None:
        """Start at the frequencies of codes, each counted once more than it is seen."""
        bias = output_bias(self.readout, math.prod(self.size) * self.codes)
        seen = torch.bincount(x.flatten().long(), minlength=len(bias)).to(bias)
        with torch.no_grad():
            bias.copy_(((seen + 1) / (x.numel() + len(bias))).log())


class _Pixels(Grid):
    """A picture in {0, 1/255, ..., 1}. The net sees it within -1 and 1, and ones, which tell where its edges are.

    Args:
        shape: (C, h, w), the event's.
        width: features of the net at each position.
    """

    support = LEVELS

    def __init__(self, shape: Sequence[int], width: int) -> None:
        at_least_one(width=width)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be three positive sizes (C, h, w), got {tuple(shape)}")
        super().__init__(shape, width, shape[0] + 1)

    def embed(self, value: Tensor) -> Tensor:
        """What the net sees."""
        return torch.cat([2 * value - 1, torch.ones_like(value[:, :1])], 1)


class LevelGrid(_Pixels):
    """A picture in {0, 1/255, ..., 1} with a free probability for each of the 256 levels, colour after colour.

    Red is drawn given the net's features, green given them and red, and so on: the colours before are added to
    the features, through a linear map, ahead of the last activation.

    Args:
        shape: (C, h, w), the event's; any number of channels.
        width: features of the net at each position.

    Raises:
        ValueError: sizes below one; a shape that is not (C, h, w).

    >>> LevelGrid((3, 32, 32), width=64).event
    (3, 32, 32)
    """

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__(shape, width)
        self.hidden = nn.Sequential(*_hidden(width)[:-1])
        self.before = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in range(1, self.channels))
        self.colours = nn.ModuleList(
            Categorical(nn.Conv2d(width, TOP + 1, 1), event_dim=3) for _ in range(self.channels)
        )

    def colour(self, number: int, hidden: Tensor, before: Tensor) -> Any:
        """The law of a channel of all pixels, given the channels before, (N, number, h, w)."""
        if number:
            hidden = hidden + self.before[number - 1](2 * before - 1)
        return cast(dist.Independent, self.colours[number](hidden.relu())).base_dist

    def log_prob(self, features: Tensor, value: Tensor) -> Tensor:
        """Log-probability of each grid in nats, (N,)."""
        hidden = self.hidden(features)
        each = [self.colour(c, hidden, value[:, :c]).log_prob(value[:, c : c + 1]) for c in range(self.channels)]
        return torch.cat(each, 1).flatten(1).sum(1)

    def draw(self, features: Tensor) -> Tensor:
        """Draw pixels."""
        hidden: Tensor = self.hidden(features)
        drawn = hidden[:, :0]
        for c in range(self.channels):
            drawn = torch.cat([drawn, self.colour(c, hidden, drawn).sample()], 1)
        return drawn

    def start_from(self, x: Tensor) -> None:
        """Start at the frequencies of each colour's levels, each counted once more than it is seen."""
        for c, colour in enumerate(self.colours):
            colour.start_from(x[:, c : c + 1])  # type: ignore[operator]


class LogisticGrid(_Pixels):
    """A picture in {0, 1/255, ..., 1} from mixtures of discretised logistics (Salimans et al. 2017, section 2.2).

    The parameters are those of `ppl_vae.LogisticMixture`; three channels are coupled as there, and drawn red,
    green, blue.

    Args:
        shape: (C, h, w), the event's, with C 1 or 3.
        width: features of the net at each position.
        components: how many logistics.

    Raises:
        ValueError: sizes below one; a shape that is not (C, h, w), or has another number of channels.

    >>> LogisticGrid((3, 32, 32), width=64).event
    (3, 32, 32)
    """

    def __init__(self, shape: Sequence[int], width: int, components: int = 10) -> None:
        super().__init__(shape, width)
        at_least_one(components=components)
        if self.channels not in (1, 3):
            raise ValueError(
                f"shape: mixtures of logistics are of 1 or 3 channels, got {self.channels}; use LevelGrid"
            )
        numbers = 10 if self.channels == 3 else 3
        readout = nn.Sequential(*_hidden(width), nn.Conv2d(width, numbers * components, 1))
        self.mixture = LogisticMixture(readout, components, coupled=self.channels == 3, event_dim=3)

    def log_prob(self, features: Tensor, value: Tensor) -> Tensor:
        """Log-probability of each grid in nats, (N,)."""
        log_prob: Tensor = self.mixture(features).log_prob(value)
        return log_prob

    def draw(self, features: Tensor) -> Tensor:
        """Draw pixels."""
        drawn: Tensor = self.mixture(features).sample()
        return drawn

    def start_from(self, x: Tensor) -> None:
        """Start around the mean of each colour, spread by its standard deviation."""
        self.mixture.start_from(x)


def _hidden(width: int) -> list[nn.Module]:
    """What every position's features go through before the output."""
    return [nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()]
