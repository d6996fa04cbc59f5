"""Convolutions that see only earlier positions of a grid, whole grids at once or one part after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad, pixel_shuffle

from ppl_vae.conditionals import at_least_one

__all__ = ["Causal", "Grow", "Part", "odd"]


@dataclass(frozen=True)
class Part:
    """A row of a grid, or one position in it, while a sample grows; and what layers were given before.

    Attributes:
        row: which.
        column: which; None for the whole row.
        size: of the grid, (h, w).
        memory: layer -> what it was given so far, over the whole grid; filled in by the layers.
        like: (N,), tells how many samples there are, their dtype and device.
    """

    row: int
    column: int | None
    size: tuple[int, int]
    memory: dict[nn.Module, Tensor]
    like: Tensor

    @property
    def columns(self) -> slice:
        """The columns that belong to it."""
        return slice(0, self.size[1]) if self.column is None else slice(self.column, self.column + 1)

    def crop(self, row: Tensor) -> Tensor:
        """Its columns of features of the row (N, C, 1, w); those of one column are the same everywhere."""
        return row if row.shape[-1] == 1 else row[..., self.columns]

    def coarser(self) -> Part | None:
        """The part of the grid of half the size that begins here, if one does."""
        if self.row % 2 or (self.column or 0) % 2:
            return None
        column = None if self.column is None else self.column // 2
        return replace(self, row=self.row // 2, column=column, size=(self.size[0] // 2, self.size[1] // 2))

    def buffer(self, layer: nn.Module, *shape: int) -> Tensor:
        """The memory of a layer, (N, *shape), zeros to begin with."""
        if layer not in self.memory:
            self.memory[layer] = self.like.new_zeros(len(self.like), *shape)
        return self.memory[layer]


class Causal(nn.Module):
    """A convolution whose window at (i, j) is rows i - top to i - bottom and columns j - left to j + right.

    With ``bottom`` 1 it sees the rows above alone; with ``right`` -1, the columns to the left. Beyond the grid
    there are zeros.

    Args:
        inputs: channels.
        outputs: channels.
        rows: (top, bottom).
        columns: (left, right).
        stride: 1, or 2 to halve the grid: the window then stands at (2 i, 2 j).
        mask: in the last row of the window, "A" sees nothing from column j on, "B" nothing after it (van den Oord
            et al. 2016a, section 3.4).
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
        stride: int = 1,
        mask: Literal["A", "B"] | None = None,
    ) -> None:
        super().__init__()
        (self.top, self.bottom), (self.left, self.right), self.stride = rows, columns, stride
        kernel = (self.top - self.bottom + 1, self.left + self.right + 1)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride)
        seen = torch.ones(kernel)
        seen[-1, self.left + (mask == "B") :] = 0
        self.register_buffer("mask", None if mask is None else seen, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The kernel, masked."""
        return self.conv.weight if self.mask is None else self.conv.weight * self.mask

    def forward(self, x: Tensor | None, part: Part | None = None) -> Tensor:
        """Map ``x`` (N, inputs, h, w) to (N, outputs, h, w), or a part of it to the same part, given those before.

        Where ``x`` is None its part is not known yet, and the window does not see it.
        """
        if part is None:
            padded = pad(cast(Tensor, x), (self.left, self.right, self.top, -self.bottom))
            return conv2d(padded, self.weight, self.conv.bias, self.stride)
        if x is not None:
            self.remember(x, part)
        return self._at(part)

    def remember(self, x: Tensor, part: Part) -> None:
        """Keep a part of the input."""
        columns = part.columns
        place = slice(columns.start + self.left, columns.stop + self.left)
        self._memory(part)[..., part.row + self.top, place] = x[..., 0, :]

    def _at(self, part: Part) -> Tensor:
        """The output at a part, from what was kept."""
        columns = part.columns
        rows = slice(part.row, part.row + self.top - self.bottom + 1)
        window = self._memory(part)[..., rows, columns.start : columns.stop + self.left + self.right]
        if part.column is None:
            return conv2d(window, self.weight, self.conv.bias, self.stride)
        return linear(window.flatten(1), self.weight.flatten(1), self.conv.bias)[..., None, None]

    def _memory(self, part: Part) -> Tensor:
        (h, w), c = part.size, self.conv.in_channels
        return part.buffer(self, c, h + self.top, w + self.left + max(self.right, 0))


class Grow(nn.Module):
    """A transposed convolution of kernel 2 and stride 2: each position becomes four that come no earlier.

    Args:
        width: channels, of the input and of the output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: Tensor | None, part: Part | None = None) -> Tensor:
        """Map (N, width, h / 2, w / 2) to (N, width, h, w), or to a part of it.

        Where ``x`` is None, the coarser grid has no part that begins here: what it gave before counts.
        """
        if part is None:
            return pixel_shuffle(self.conv(x), 2)
        memory = part.buffer(self, self.conv.in_channels, *part.size)
        if x is not None:
            columns = slice(part.columns.start, part.columns.start + 2 * x.shape[-1])
            memory[..., part.row : part.row + 2, columns] = pixel_shuffle(self.conv(x), 2)
        return memory[..., part.row : part.row + 1, part.columns]


def odd(**sizes: int) -> None:
    """Raise ValueError, naming it, for the width of a kernel that is not odd and at least 3."""
    at_least_one(**sizes)
    for name, size in sizes.items():
        if size < 3 or size % 2 == 0:
            raise ValueError(f"{name} must be an odd number, 3 at least, got {size!r}")
