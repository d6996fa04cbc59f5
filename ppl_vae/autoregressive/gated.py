"""Gated PixelCNN: a vertical and a horizontal stack, which leave no blind spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ppl_vae.autoregressive.grids import Grid
from ppl_vae.autoregressive.laws import Autoregressive, RasterNet, check_context
from ppl_vae.autoregressive.masks import Causal, Part, odd
from ppl_vae.conditionals import at_least_one

__all__ = ["GatedPixelCNN"]


class _Layer(nn.Module):
    """A layer of both stacks (van den Oord et al. 2016b, figure 2); the first does not see the position itself."""

    def __init__(self, inputs: int, width: int, kernel: int, context: int, first: bool) -> None:
        super().__init__()
        reach = kernel // 2
        self.vertical = Causal(inputs, 2 * width, (reach, int(first)), (reach, reach))
        self.horizontal = Causal(inputs, 2 * width, (0, 0), (reach, -int(first)))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.conditions = nn.ModuleList(
            nn.Conv2d(context, 2 * width, 1, bias=False) for _ in range(2 * bool(context))
        )

    def down(self, v: Tensor | None, context: Tensor | None, part: Part | None) -> tuple[Tensor, Tensor]:
        """The vertical stack's next features, and what the horizontal one gets of them."""
        change = self._told(0, self.vertical(v, part), context)
        return _gated(change), self.link(change)

    def right(self, h: Tensor | None, link: Tensor, context: Tensor | None, part: Part | None) -> Tensor:
        """The horizontal stack's next features."""
        change = self._told(1, self.horizontal(h, part) + link, context)
        return self.out(_gated(change))  # type: ignore[no-any-return]

    def _told(self, stack: int, change: Tensor, context: Tensor | None) -> Tensor:
        return change + self.conditions[stack](context) if self.conditions else change


def _gated(x: Tensor) -> Tensor:
    """tanh(a) σ(b) of both halves of the channels (eq. 2)."""
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class _Net(RasterNet):
    def __init__(self, inputs: int, width: int, layers: int, kernel: int, first: int, context: int) -> None:
        super().__init__()
        entrance = _Layer(inputs, width, first, context, first=True)
        others = (_Layer(width, width, kernel, context, first=False) for _ in range(layers))
        self.layers = nn.ModuleList([entrance, *others])

    def above(self, x: Tensor | None, context: Tensor | None, part: Part | None = None) -> list[Tensor]:
        links: list[Tensor] = []
        v = x
        for layer in self._stacked():
            v, link = layer.down(v, context, part)
            links.append(link)
        return links

    def beside(
        self, x: Tensor | None, above: list[Tensor], context: Tensor | None, part: Part | None = None
    ) -> Tensor:
        links = above if part is None else [part.crop(link) for link in above]
        entrance, *layers = self._stacked()
        h = entrance.right(x, links[0], context, part)
        for layer, link in zip(layers, links[1:], strict=True):
            h = h + layer.right(h, link, context, part)
        return h

    def entrances(self) -> Sequence[Causal]:
        entrance = self._stacked()[0]
        return entrance.vertical, entrance.horizontal

    def _stacked(self) -> list[_Layer]:
        return cast(list[_Layer], [*self.layers])


class GatedPixelCNN(Autoregressive):
    """Gated convolutions over a grid, in two stacks (van den Oord et al. 2016b, section 2).

    The vertical stack sees all rows above, the horizontal one what stands to the left, and the vertical one. With
    layers enough each position depends on every one before it. As decoder p(x | z) the context is z, or a map that
    an embedding such as `ppl_vae.ConvDecoder` makes of it (section 2.3).

    Args:
        grid: `CodeGrid`, `LevelGrid` or `LogisticGrid`; it holds the width.
        layers: gated layers after the first.
        kernel: width of their convolutions, odd.
        first: width of the first one, odd.
        context: features of the embedded context, as they enter each layer; 0 for a law that ignores its context.
        embedding: module applied to the context first, `ppl_vae.OneHot` for labels say; None takes it as it is.
        spatial: whether the embedded context is a map of the grid, (..., context, h, w), and not (..., context).

    Raises:
        ValueError: no layers, kernels that are not odd, an embedding without features.

    >>> from ppl_vae.autoregressive.grids import CodeGrid
    >>> from ppl_vae.nets import OneHot
    >>> prior = GatedPixelCNN(CodeGrid(512, (7, 7), width=16), 3, context=10, embedding=OneHot(10))
    >>> prior(torch.tensor([3, 1, 4])).sample().shape
    torch.Size([3, 7, 7])
    """

    def __init__(
        self,
        grid: Grid,
        layers: int = 8,
        *,
        kernel: int = 3,
        first: int = 7,
        context: int = 0,
        embedding: nn.Module | None = None,
        spatial: bool = False,
    ) -> None:
        at_least_one(layers=layers)
        check_context(context, embedding, spatial)
        odd(kernel=kernel, first=first)
        net = _Net(grid.inputs, grid.width, layers, kernel, first, context)
        super().__init__(grid, net, context, embedding, spatial)
