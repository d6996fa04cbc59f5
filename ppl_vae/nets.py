"""Feature nets: plain torch modules that map the last dimension and keep all leading ones.

Every net here takes ``(..., inputs)`` to ``(..., outputs)`` for any number of leading dimensions, because
particles and data stand on the left: a decoder sees latents of shape ``(K, B, d)`` as easily as ``(B, d)``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "Concat", "OneHot", "output_bias"]


def MLP(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:  # noqa: N802
    """A multilayer perceptron ``(..., sizes[0]) -> (..., sizes[-1])`` with a linear last layer.

    Weights and biases start as ``torch.nn.Linear`` starts them.

    Args:
        *sizes: widths of all layers, input and output included; at least two.
        activation: module class put between the linear layers.

    Raises:
        ValueError: fewer than two sizes, or a size below one.

    >>> MLP(784, 200, 200, 50)(torch.zeros(5, 3, 784)).shape
    torch.Size([5, 3, 50])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"MLP: sizes must be two or more positive widths, got {sizes}")
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        layers += [activation(), linear] if i else [linear]
    return nn.Sequential(*layers)


class OneHot(nn.Module):
    """Labels ``(...)`` of integers to indicator vectors ``(..., classes)``.

    Args:
        classes: number of labels; valid ones are ``0 .. classes - 1``.

    >>> OneHot(3)(torch.tensor([2, 0]))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"OneHot: classes must be at least 1, got {classes}")
        self.classes = classes

    def check(self, labels: Tensor) -> None:
        """Raise ValueError, naming the first offending row, unless every label is a known class."""
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be integers, got {labels.dtype}; convert them with .long()")
        unknown = (labels < 0) | (labels >= self.classes)
        if bool(unknown.any()):
            row = int(unknown.flatten().nonzero()[0])
            raise ValueError(
                f"unknown label {int(labels.flatten()[row])} in row {row}: labels run from 0 to {self.classes - 1}"
            )

    def forward(self, labels: Tensor) -> Tensor:
        """Return the indicator vectors; unlike ``F.one_hot`` it never waits for the device."""
        return (labels.unsqueeze(-1) == torch.arange(self.classes, device=labels.device)).float()


class Concat(nn.Module):
    """A net of several inputs: each is embedded, broadcast over leading dimensions, and joined.

    Args:
        net: net of the joined features.
        *embeddings: one module per input, applied to it first; ``None`` takes the input as it is.

    >>> net = Concat(MLP(20 + 10, 64, 784), None, OneHot(10))      # decoder of (z, label)
    >>> net(torch.zeros(5, 3, 20), torch.tensor([1, 2, 3])).shape
    torch.Size([5, 3, 784])
    """

    def __init__(self, net: nn.Module, *embeddings: nn.Module | None) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Identity() if e is None else e for e in embeddings)
        self.net = net  # registered last: it holds the output layer

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs with last dimensions ``(i1, i2, ...)`` to the net of their concatenation."""
        if len(inputs) != len(self.embeddings):
            raise ValueError(f"Concat: expected {len(self.embeddings)} inputs, got {len(inputs)}")
        parts = [embed(x) for embed, x in zip(self.embeddings, inputs, strict=True)]
        lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))  # type: ignore[no-untyped-call]
        joined: Tensor = self.net(torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], dim=-1))
        return joined


def output_bias(net: nn.Module, size: int) -> nn.Parameter:
    """The bias of the last linear layer of ``net``: where a likelihood puts the data's mean before training.

    Args:
        net: module that registers its output layer last.
        size: how many numbers the net gives for one datum.

    Raises:
        ValueError: the net has no linear layer with a bias, or the last one does not give ``size`` numbers.
    """
    biases = [m.bias for m in net.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    if not biases:
        raise ValueError(f"{type(net).__name__} has no linear layer with a bias to start from the data")
    if len(biases[-1]) != size:
        raise ValueError(
            f"{type(net).__name__}: its last linear layer gives {len(biases[-1])} numbers, the data need {size}; "
            "start_from sets the bias of a linear output layer as wide as the data"
        )
    return biases[-1]
