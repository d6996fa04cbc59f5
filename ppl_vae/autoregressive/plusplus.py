"""PixelCNN++: shifted convolutions in two streams, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from ppl_vae.autoregressive.grids import Grid
from ppl_vae.autoregressive.laws import Autoregressive, RasterNet, check_context
from ppl_vae.autoregressive.masks import Causal, Grow, Part
from ppl_vae.conditionals import at_least_one

__all__ = ["PixelCNNPlusPlus"]

DOWN = ((1, 0), (1, 1))  # rows i - 1 and i, columns j - 1 to j + 1
RIGHT = ((1, 0), (1, 0))  # rows i - 1 and i, columns j - 1 and j
Window = tuple[tuple[int, int], tuple[int, int]]


class _Block(nn.Module):
    """A gated residual block that also sees ``others`` channels of the same position."""

    def __init__(self, width: int, others: int, window: Window, context: int, dropout: float) -> None:
        super().__init__()
        self.first = Causal(2 * width, width, *window)
        self.link = nn.Conv2d(2 * others, width, 1) if others else None
        self.dropout = nn.Dropout(dropout)
        self.second = Causal(2 * width, 2 * width, *window)
        self.condition = nn.Conv2d(context, 2 * width, 1, bias=False) if context else None

    def forward(self, x: Tensor, other: Tensor | None, context: Tensor | None, part: Part | None) -> Tensor:
        h: Tensor = self.first(_both(x), part)
        if self.link is not None:
            h = h + self.link(_both(cast(Tensor, other)))
        h = self.second(self.dropout(_both(h)), part)
        if self.condition is not None:
            h = h + self.condition(context)
        change, gate = h.chunk(2, 1)
        return x + change * gate.sigmoid()


def _both(x: Tensor) -> Tensor:
    """The ELU of x and of -x, twice the channels (Shang et al. 2016)."""
    return elu(torch.cat([x, -x], 1))


class _Above(NamedTuple):
    """What a level's downward stream gives: features after each block of both halves, and of the level inside."""

    before: list[Tensor]
    after: list[Tensor]
    inside: _Above | None


class _Level(nn.Module):
    """Both streams at one resolution: blocks, the coarser level if there is one, and as many blocks after it."""

    def __init__(self, width: int, blocks: int, levels: int, context: int, dropout: float) -> None:
        super().__init__()

        def half(others: int, window: Window) -> nn.ModuleList:
            return nn.ModuleList(_Block(width, others, window, context, dropout) for _ in range(blocks))

        self.down_before, self.down_after = half(0, DOWN), half(width, DOWN)
        self.right_before, self.right_after = half(width, RIGHT), half(2 * width, RIGHT)
        self.inside: _Level | None = None
        if levels > 1:
            self.inside = _Level(width, blocks, levels - 1, context, dropout)
            self.down_shrink, self.right_shrink = (Causal(width, width, *window, 2) for window in (DOWN, RIGHT))
            self.down_grow, self.right_grow = Grow(width), Grow(width)

    def down(self, u: Tensor, context: Tensor | None, part: Part | None) -> _Above:
        """The downward stream, of rows above."""
        before, after = list[Tensor](), list[Tensor]()
        for block in self.down_before:
            before.append(u := block(u, None, context, part))
        inside = None
        if self.inside is not None:
            coarse, there = _shrunk(self.down_shrink, u, part)
            if coarse is not None:
                inside = self.inside.down(coarse, _every_other(context), there)
            u = self.down_grow(None if inside is None else inside.after[-1], part)
        for block, skip in zip(self.down_after, reversed(before), strict=True):
            after.append(u := block(u, skip, context, part))
        return _Above(before, after, inside)

    def right(self, x: Tensor, above: _Above, context: Tensor | None, part: Part | None) -> Tensor:
        """The rightward stream, of rows above and of what stands to the left."""
        before = list[Tensor]()
        for block, u in zip(self.right_before, above.before, strict=True):
            before.append(x := block(x, _cropped(u, part), context, part))
        if self.inside is not None:
            coarse, there = _shrunk(self.right_shrink, x, part)
            if coarse is not None:
                coarse = self.inside.right(coarse, cast(_Above, above.inside), _every_other(context), there)
            x = self.right_grow(coarse, part)
        for block, u, skip in zip(self.right_after, above.after, reversed(before), strict=True):
            x = block(x, torch.cat([_cropped(u, part), skip], 1), context, part)
        return x


def _shrunk(layer: Causal, x: Tensor, part: Part | None) -> tuple[Tensor | None, Part | None]:
    """A grid of half the size, or the part of it that begins here, if one does; the layer keeps ``x`` anyway."""
    if part is None:
        return layer(x), None
    layer.remember(x, part)
    there = part.coarser()
    return (None if there is None else layer(None, part)), there


def _cropped(u: Tensor, part: Part | None) -> Tensor:
    return u if part is None else part.crop(u)


def _every_other(context: Tensor | None) -> Tensor | None:
    return None if context is None else context[..., ::2, ::2]


class _Net(RasterNet):
    def __init__(self, inputs: int, width: int, blocks: int, levels: int, context: int, dropout: float) -> None:
        super().__init__()
        self.down = Causal(inputs, width, (2, 1), (1, 1))
        self.row_above = Causal(inputs, width, (1, 1), (1, 1))
        self.column_before = Causal(inputs, width, (1, 0), (1, -1))
        self.level = _Level(width, blocks, levels, context, dropout)

    def above(self, x: Tensor | None, context: Tensor | None, part: Part | None = None) -> _Above:
        return self.level.down(self.down(x, part), context, part)

    def beside(self, x: Tensor | None, above: _Above, context: Tensor | None, part: Part | None = None) -> Tensor:
        h = self.row_above(x, part) + self.column_before(x, part)
        return self.level.right(h, above, context, part)

    def entrances(self) -> Sequence[Causal]:
        return self.down, self.row_above, self.column_before


class PixelCNNPlusPlus(Autoregressive):
    """Shifted convolutions in a downward and a rightward stream, with shortcuts (Salimans et al. 2017, section 2).

    At each resolution there are gated residual blocks, the next coarser grid, and as many blocks again, each with
    a shortcut from its counterpart. The authors' weight normalisation is left out, and so are blocks that would
    have no counterpart. With blocks enough each position depends on every one before it.

    Args:
        grid: `LogisticGrid`, as theirs, `LevelGrid` or `CodeGrid`; it holds the width.
        blocks: in each half of a level, for each stream; theirs are 5 to 6.
        levels: resolutions; h and w must be divisible by 2^(levels - 1). Theirs are 3, for 32 x 32 pixels.
        dropout: inside the blocks, while training; theirs is 0.5.
        context: features of the embedded context, as they enter each block; 0 for a law that ignores its context.
        embedding: module applied to the context first, `ppl_vae.OneHot` for labels say; None takes it as it is.
        spatial: whether the embedded context is a map of the grid, (..., context, h, w), and not (..., context).
            Coarser levels see every other entry of it.

    Raises:
        ValueError: no blocks or levels, a grid that cannot be halved so often, a dropout outside [0, 1), an
            embedding without features.

    >>> from ppl_vae.autoregressive.grids import LogisticGrid
    >>> density = PixelCNNPlusPlus(LogisticGrid((3, 8, 8), width=8), blocks=1, levels=2)
    >>> density().sample((2,)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        grid: Grid,
        blocks: int = 2,
        *,
        levels: int = 3,
        dropout: float = 0.0,
        context: int = 0,
        embedding: nn.Module | None = None,
        spatial: bool = False,
    ) -> None:
        at_least_one(blocks=blocks, levels=levels)
        check_context(context, embedding, spatial)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability below 1, got {dropout}")
        factor, (h, w) = 2 ** (levels - 1), grid.size
        if h % factor or w % factor:
            raise ValueError(
                f"levels: a grid of {h} x {w} cannot be halved {levels - 1} times; give fewer levels than {levels}"
            )
        net = _Net(grid.inputs, grid.width, blocks, levels, context, dropout)
        super().__init__(grid, net, context, embedding, spatial)
