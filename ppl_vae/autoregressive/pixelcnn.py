"""PixelCNN: one stack of masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ppl_vae.autoregressive.grids import Grid
from ppl_vae.autoregressive.laws import Autoregressive, RasterNet, check_context
from ppl_vae.autoregressive.masks import Causal, Part, odd
from ppl_vae.conditionals import at_least_one

__all__ = ["PixelCNN"]


class _Block(nn.Module):
    """A residual block of half the width inside (van den Oord et al. 2016a, figure 5)."""

    def __init__(self, width: int, kernel: int, context: int) -> None:
        super().__init__()
        half, reach = max(width // 2, 1), kernel // 2
        self.narrow = nn.Conv2d(width, half, 1)
        self.masked = Causal(half, half, (reach, 0), (reach, reach), mask="B")
        self.condition = nn.Conv2d(context, half, 1, bias=False) if context else None
        self.widen = nn.Conv2d(half, width, 1)

    def forward(self, x: Tensor, context: Tensor | None, part: Part | None) -> Tensor:
        h: Tensor = self.masked(self.narrow(x.relu()).relu(), part)
        if self.condition is not None:
            h = h + self.condition(context)
        change: Tensor = self.widen(h.relu())
        return x + change


class _Net(RasterNet):
    def __init__(self, inputs: int, width: int, blocks: int, kernel: int, first: int, context: int) -> None:
        super().__init__()
        reach = first // 2
        self.first = Causal(inputs, width, (reach, 0), (reach, reach), mask="A")
        self.blocks = nn.ModuleList(_Block(width, kernel, context) for _ in range(blocks))

    def above(self, x: Tensor | None, context: Tensor | None, part: Part | None = None) -> None:
        """Nothing: rows above and positions to the left go through the same layers."""

    def beside(self, x: Tensor | None, above: None, context: Tensor | None, part: Part | None = None) -> Tensor:
        h: Tensor = self.first(x, part)
        for block in self.blocks:
            h = block(h, context, part)
        return h

    def entrances(self) -> Sequence[Causal]:
        return (self.first,)


class PixelCNN(Autoregressive):
    """Masked convolutions over a grid (van den Oord, Kalchbrenner & Kavukcuoglu 2016, section 3.4).

    A convolution of mask A, then residual blocks of mask B. There is a blind spot to the upper right, which stays
    out of sight however many blocks there are; `GatedPixelCNN` has none.

    Args:
        grid: `CodeGrid`, `LevelGrid` or `LogisticGrid`; it holds the width.
        blocks: residual blocks.
        kernel: width of their convolutions, odd.
        first: width of the first one, odd.
        context: features of the embedded context, as they enter each block; 0 for a law that ignores its context.
        embedding: module applied to the context first, `ppl_vae.OneHot` for labels say; None takes it as it is.
        spatial: whether the embedded context is a map of the grid, (..., context, h, w), and not (..., context).

    Raises:
        ValueError: no blocks, kernels that are not odd, an embedding without features.

    >>> from ppl_vae.autoregressive.grids import CodeGrid
    >>> prior = PixelCNN(CodeGrid(512, (7, 7), width=16), blocks=2)
    >>> prior().sample((3,)).shape
    torch.Size([3, 7, 7])
    """

    def __init__(
        self,
        grid: Grid,
        blocks: int = 5,
        *,
        kernel: int = 3,
        first: int = 7,
        context: int = 0,
        embedding: nn.Module | None = None,
        spatial: bool = False,
    ) -> None:
        at_least_one(blocks=blocks)
        check_context(context, embedding, spatial)
        odd(kernel=kernel, first=first)
        net = _Net(grid.inputs, grid.width, blocks, kernel, first, context)
        super().__init__(grid, net, context, embedding, spatial)
