"""The law of a grid, position by position in raster order, and the conditionals that have it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.autoregressive.grids import Grid
from ppl_vae.autoregressive.masks import Causal, Part
from ppl_vae.conditionals import Conditional
from ppl_vae.transforms import LEVELS

__all__ = ["Autoregressive", "GridLaw", "RasterNet", "check_context"]


class RasterNet(nn.Module, ABC):
    """A net of a grid whose output at a position depends on the positions before it alone, in raster order.

    It is in two halves, because features of the rows above are known for a whole row at once. Both take a whole
    grid, or a part of it and the memory of what they were given before.
    """

    @abstractmethod
    def above(self, x: Tensor | None, context: Tensor | None, part: Part | None = None) -> Any:
        """What the rows above tell, of the embedded grid ``x`` (N, inputs, h, w), for `beside`."""

    @abstractmethod
    def beside(self, x: Tensor | None, above: Any, context: Tensor | None, part: Part | None = None) -> Tensor:
        """The features (N, width, h, w), from what stands to the left as well."""

    @abstractmethod
    def entrances(self) -> Sequence[Causal]:
        """The layers that see the grid itself, which they must be given as it grows."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map the embedded grid (N, inputs, h, w) to features (N, width, h, w)."""
        return self.beside(x, self.above(x, context), context)


class GridLaw(TorchDistribution):  # type: ignore[misc]
    """p(x | c) = Π p(x_i | x_1, ..., x_{i-1}, c) over the positions of a grid in raster order, by a net.

    Args:
        net: of the positions before.
        grid: what stands at them.
        context: c, (*batch, features, h or 1, w or 1); None where there is none.
        batch: the batch shape.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        net: RasterNet,
        grid: Grid,
        context: Tensor | None,
        batch: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.net, self.grid, self.context = net, grid, context
        super().__init__(torch.Size(batch), torch.Size(grid.event), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Of single entries."""
        return self.grid.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GridLaw:
        """Return it with another batch shape."""
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, *context.shape[-3:])
        return type(self)(self.net, self.grid, context, batch_shape, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each event, in nats.

        Raises:
            ValueError: ``value`` does not end in the event's shape.
        """
        at = value.dim() - len(self.event_shape)
        if value.shape[max(at, 0) :] != self.event_shape:
            expected = ", ".join(map(str, self.event_shape))
            raise ValueError(f"value: expected shape (..., {expected}), got {tuple(value.shape)}")
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[:at], self.batch_shape)  # type: ignore[no-untyped-call]
        # Without context the law is the same for all, and a value that is repeated need not be judged again.
        each = value.shape[:at] if self.context is None else lead
        flat = value.expand(*each, *self.event_shape).reshape(math.prod(each), self.grid.channels, *self.grid.size)
        features = self.net(self.grid.embed(flat), self._contexts(each))
        with pyro.validation_enabled(self._validate_args):  # the laws of positions check what this one checks
            return self.grid.log_prob(features, flat).reshape(each).expand(lead)

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), *, cached: bool = True) -> Tensor:
        """Draw grids, position by position.

        Args:
            sample_shape: how many.
            cached: compute features once for each position, and keep what later ones need of them: a few numbers
                for each layer, position and sample. Otherwise the whole net is computed at each position; the
                draws are the same, but for rounding.
        """
        shape = torch.Size((*sample_shape, *self.batch_shape))
        grow = self._grow if cached else self._grow_anew
        with pyro.validation_enabled(self._validate_args):
            return grow(math.prod(shape), self._contexts(shape)).reshape(*shape, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError("the mean of an autoregressive grid has no closed form; average samples")

    def _contexts(self, lead: Sequence[int]) -> Tensor | None:
        """The context for flattened leading dimensions."""
        if self.context is None:
            return None
        c = self.context
        return c.expand(*lead, *c.shape[-3:]).reshape(math.prod(lead), *c.shape[-3:])

    def _grow(self, count: int, context: Tensor | None) -> Tensor:
        like = next(self.net.parameters()).new_zeros(count)
        memory: dict[nn.Module, Tensor] = {}
        rows: list[Tensor] = []
        for i in range(self.grid.size[0]):
            row = Part(i, None, self.grid.size, memory, like)
            seen = self.net.above(None, _cut(context, row), row)
            drawn: list[Tensor] = []
            for j in range(self.grid.size[1]):
                part = Part(i, j, self.grid.size, memory, like)
                drawn.append(self.grid.draw(self.net.beside(None, seen, _cut(context, part), part)))
                x = self.grid.embed(drawn[-1])
                for layer in self.net.entrances():
                    layer.remember(x, part)
            rows.append(torch.cat(drawn, -1))
        return torch.cat(rows, -2)

    def _grow_anew(self, count: int, context: Tensor | None) -> Tensor:
        like = next(self.net.parameters())
        value = like.new_zeros(count, self.grid.channels, *self.grid.size)
        for i in range(self.grid.size[0]):
            for j in range(self.grid.size[1]):
                features = self.net(self.grid.embed(value), context)
                drawn = self.grid.draw(features[..., i : i + 1, j : j + 1])
                value = value.to(drawn.dtype)
                value[..., i : i + 1, j : j + 1] = drawn
        return value


class PixelLaw(GridLaw):
    """The law of a picture, whose support is known from its kind: data are checked against it before training."""

    support = LEVELS


class Autoregressive(Conditional):
    """A conditional whose law is a grid's, by a net of the positions before; see its kinds.

    Args:
        grid: what stands on the grid.
        net: of the positions before.
        context: features of the embedded context; 0 for a law that ignores its context.
        embedding: module applied to the context first, `ppl_vae.OneHot` for labels say; None takes it as it is.
        spatial: whether the embedded context is a map of the grid, (..., context, h, w), and not (..., context).
    """

    def __init__(
        self, grid: Grid, net: RasterNet, context: int, embedding: nn.Module | None, spatial: bool
    ) -> None:
        super().__init__()
        self.context, self.spatial = context, spatial
        self.embedding = nn.Identity() if embedding is None else embedding
        self.net, self.grid = net, grid

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the law with batch shape that of the context, or none where it ignores that.

        Raises:
            ValueError: a context is missing, or of another shape; several contexts without an embedding.
        """
        law = PixelLaw if self.grid.support is LEVELS else GridLaw
        if not self.context:
            return law(self.net, self.grid, None)
        if not context:
            raise ValueError(f"{type(self).__name__}: it wants a context of {self.context} features, got none")
        if len(context) > 1 and isinstance(self.embedding, nn.Identity):
            raise ValueError(
                f"{type(self).__name__}: got {len(context)} contexts; give it an embedding of all of them, "
                "such as Concat around a net"
            )
        c = self.embedding(*context)
        shape = (self.context, *self.grid.size) if self.spatial else (self.context,)
        at = c.dim() - len(shape)
        if c.shape[max(at, 0) :] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"context: expected shape (..., {expected}) once embedded, got {tuple(c.shape)}")
        batch = c.shape[:at]
        return law(self.net, self.grid, c if self.spatial else c[..., None, None], batch)

    def start_from(self, x: Tensor) -> None:
        """Set the output layer's bias such that positions have the frequencies, or the mean, of the data ``x``.

        Args:
            x: (N, *event).

        Raises:
            ValueError: of another shape, or with entries that the law does not know.
        """
        if x.shape[1:] != self.grid.event:
            expected = ", ".join(map(str, self.grid.event))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        if not bool(self.grid.support.check(x).all()):
            raise ValueError(f"x: it has entries that are not {self.grid.support}")
        self.grid.start_from(x)


def check_context(context: int, embedding: nn.Module | None, spatial: bool) -> None:
    """Raise ValueError for features below zero, or of none for an embedding or a map."""
    if context < 0:
        raise ValueError(f"context must be at least 0, got {context}")
    if not context and (embedding is not None or spatial):
        raise ValueError("context must tell how many features the embedded context has, got 0")


def _cut(context: Tensor | None, part: Part) -> Tensor | None:
    """The context of a part."""
    if context is None or context.shape[-2:] == (1, 1):
        return context
    return context[..., part.row : part.row + 1, part.columns]
