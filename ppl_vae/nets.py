"""Feature nets: plain torch modules that map the last dimension and keep all leading ones.

Every net here takes ``(..., inputs)`` to ``(..., outputs)`` for any number of leading dimensions, because
particles and data stand on the left: a decoder sees latents of shape ``(K, B, d)`` as easily as ``(B, d)``.
Convolutional ones are in `ppl_vae.convolutions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "MLP",
    "Batched",
    "Concat",
    "Hidden",
    "Modulated",
    "Norm",
    "OneHot",
    "Residual",
    "Style",
    "output_bias",
    "pooled",
    "refuse_mixing",
]

Norm = Literal["batch", "layer"]


class Style(TypedDict, total=False):
    """Options of hidden layers, the same for every net; `Hidden` says what they do."""

    activation: Callable[[], nn.Module]
    norm: Norm | None
    gated: bool
    dropout: float


@dataclass(frozen=True)
class Hidden:
    """How hidden layers are made: a linear map or a convolution, then norm, activation and dropout.

    Attributes:
        axis: where features stand: -1, or -3 for channels of images (N, C, H, W).
        activation: module class.
        norm: "batch" normalises over all data and particles, which makes a bound depend on the rest of the batch
            in training and needs more than one datum there; "layer" over the features of each datum (and, for
            images, over pixels: GroupNorm of one group); None leaves it out.
        gated: a linear map of twice the width, halves a and b, gives a * sigmoid(b), in place of the activation
            (Dauphin et al. 2017, eq. 1).
        dropout: probability that a feature is zero in training. The doubly reparameterised estimator refuses it
            in a guide.

    Raises:
        ValueError: an unknown norm, a dropout outside [0, 1).
    """

    axis: Literal[-1, -3]
    activation: Callable[[], nn.Module] = nn.ReLU
    norm: Norm | None = None
    gated: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "layer", None):
            raise ValueError(f"norm must be 'batch', 'layer' or None, got {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability below 1, got {self.dropout}")

    def layer(self, make: Callable[[int], nn.Module], width: int) -> list[nn.Module]:
        """A linear map or convolution to ``width`` features; ``make`` makes one of a width given."""
        return [make(2 * width), nn.GLU(self.axis)] if self.gated else [make(width)]

    def after(self, width: int) -> list[nn.Module]:
        """What follows a layer of ``width`` features, before the next one."""
        layers = [] if self.norm is None else [self._norm(width)]
        layers += [] if self.gated else [self.activation()]
        return [*layers, nn.Dropout(self.dropout)] if self.dropout else layers

    def _norm(self, width: int) -> nn.Module:
        if self.axis == -1:
            return nn.LayerNorm(width) if self.norm == "layer" else Batched(nn.BatchNorm1d(width), width)
        return nn.GroupNorm(1, width) if self.norm == "layer" else nn.BatchNorm2d(width)


def MLP(*sizes: int, residual: bool = False, **style: Unpack[Style]) -> nn.Sequential:  # noqa: N802
    """A multilayer perceptron ``(..., sizes[0]) -> (..., sizes[-1])`` with a linear last layer.

    Weights and biases start as ``torch.nn.Linear`` starts them.

    Args:
        *sizes: widths of all layers, input and output included; at least two.
        residual: a hidden layer as wide as the one before it adds its output to its input, norm and activation
            standing before its linear map (He et al. 2016, "Identity mappings", eq. 3).
        **style: of the hidden layers: ``activation`` (ReLU), ``norm`` ("batch", "layer"), ``gated``, ``dropout``;
            see `Hidden`.

    Raises:
        ValueError: fewer than two sizes, or a size below one; ``residual`` where no two hidden layers that follow
            each other have the same width; a bad style.

    >>> MLP(784, 200, 200, 50)(torch.zeros(5, 3, 784)).shape
    torch.Size([5, 3, 50])
    >>> MLP(784, 200, 200, 50, norm="layer", gated=True, residual=True)(torch.zeros(5, 3, 784)).shape
    torch.Size([5, 3, 50])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"MLP: sizes must be two or more positive widths, got {sizes}")
    hidden, layers = Hidden(-1, **style), list[nn.Module]()
    width, *widths, outputs = sizes
    if residual and not any(a == b for a, b in pairwise(widths)):
        raise ValueError(
            f"MLP: residual needs hidden layers of the same width that follow each other, got {sizes}"
        )
    for i, wider in enumerate(widths):
        step = [*(hidden.after(width) if i else []), *hidden.layer(partial(nn.Linear, width), wider)]
        layers += [Residual(*step)] if residual and i and wider == width else step
        width = wider
    layers += hidden.after(width) if widths else []
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Residual(nn.Sequential):
    """Layers whose output is added to their input.

    >>> Residual(nn.ReLU())(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  4.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus what the layers make of it."""
        change: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + change


class Batched(nn.Module):
    """Any leading dimensions for a net that wants exactly one, as convolutions and BatchNorm do.

    They are flattened before the net and restored after it. A BatchNorm hence normalises over all of them.

    Args:
        net: module (N, *shape) -> (N, *anything).
        *shape: shape of one input.

    >>> Batched(nn.Conv2d(1, 4, 3), 1, 28, 28)(torch.zeros(5, 3, 1, 28, 28)).shape
    torch.Size([5, 3, 4, 26, 26])
    """

    def __init__(self, net: nn.Module, *shape: int) -> None:
        super().__init__()
        self.net = net
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., *shape) to (..., *anything).

        Raises:
            ValueError: ``x`` does not end in ``shape``.
        """
        at = x.dim() - len(self.shape)
        lead, shape = x.shape[: max(at, 0)], x.shape[max(at, 0) :]
        if shape != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"net: expected inputs of shape (..., {expected}), got {tuple(x.shape)}")
        y: Tensor = self.net(x.reshape(math.prod(lead), *shape))
        return y.reshape(*lead, *y.shape[1:])


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


class Modulated(nn.Module):
    """A net whose hidden features a condition scales and shifts: FiLM (Perez et al. 2018, eq. 2).

    Each hidden feature h becomes (1 + γ(c)) h + β(c), one γ and one β per unit or channel, linear in the embedded
    condition c. They start at zero, where the net is the plain one. Modulated are the outputs of the net's norms
    or, where it has none, of its linear maps and convolutions but the last; so a net needs a hidden layer. With
    `Concat` the condition enters at the input alone.

    Args:
        net: net of one input, such as `MLP` or `ConvDecoder`.
        features: width of the embedded condition.
        embedding: module applied to the condition first; ``None`` takes it as it is.
        event_dim: how many dimensions one input of ``net`` has: 3 for images (..., C, H, W).

    Raises:
        ValueError: the net has no hidden layer.

    >>> net = Modulated(MLP(20, 64, 784), 10, OneHot(10))      # decoder of (z, label)
    >>> net(torch.zeros(5, 3, 20), torch.tensor([1, 2, 3])).shape
    torch.Size([5, 3, 784])
    """

    def __init__(
        self, net: nn.Module, features: int, embedding: nn.Module | None = None, event_dim: int = 1
    ) -> None:
        super().__init__()
        self.places = _hidden(net)
        if not self.places:
            raise ValueError(f"Modulated: {type(net).__name__} has no hidden layer to modulate")
        self.event_dim = event_dim
        self.embedding = nn.Identity() if embedding is None else embedding
        self.generator = nn.Linear(features, 2 * sum(width for _, width in self.places.values()))
        nn.init.zeros_(self.generator.weight)
        nn.init.zeros_(self.generator.bias)
        self.net = net  # registered last: it holds the output layer

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``x`` (..., *event) under ``condition``; their leading dimensions are broadcast."""
        changes: Tensor = self.generator(self.embedding(condition))
        at = x.dim() - self.event_dim
        lead = torch.broadcast_shapes(x.shape[:at], changes.shape[:-1])  # type: ignore[no-untyped-call]
        widths = [width for _, width in self.places.values() for _ in ("γ", "β")]
        parts = iter(torch.split(changes.expand(*lead, -1), widths, dim=-1))
        with ExitStack() as stack:
            for name, (axis, _) in self.places.items():
                hook = partial(_modulate, axis, next(parts), next(parts))
                stack.enter_context(self.net.get_submodule(name).register_forward_hook(hook))
            y: Tensor = self.net(x.expand(*lead, *x.shape[at:]))
        return y


def _modulate(axis: int, scale: Tensor, shift: Tensor, module: nn.Module, args: object, h: Tensor) -> Tensor:
    """Scale and shift features ``h`` along an axis; leading dimensions may have been flattened in them."""
    at = h.dim() + axis + 1
    shape = (*h.shape[:at], *(1 for _ in h.shape[at:]))
    return (1 + scale.reshape(shape)) * h + shift.reshape(shape)


def _hidden(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of the layers to modulate -> (axis of the features, how many); norms, else all maps but the last."""
    norms, maps = dict[str, tuple[int, int]](), dict[str, tuple[int, int]]()
    for name, module in net.named_modules():
        match module:
            case nn.Linear():
                maps[name] = -1, module.out_features
            case nn.Conv2d() | nn.ConvTranspose2d():
                maps[name] = -3, module.out_channels
            case nn.BatchNorm1d():
                norms[name] = -1, module.num_features
            case nn.LayerNorm():
                norms[name] = -1, module.normalized_shape[-1]
            case nn.BatchNorm2d():
                norms[name] = -3, module.num_features
            case nn.GroupNorm():
                norms[name] = -3, module.num_channels
    return norms or dict([*maps.items()][:-1])


def refuse_mixing(**parts: object) -> None:
    """Raise ValueError, naming it, for a part with a BatchNorm; only modules can be looked through."""
    for argument, part in parts.items():
        for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, _BatchNorm):
                place = f" at {name!r}" if name else ""
                raise ValueError(
                    f"{argument}: it holds a {type(module).__name__}{place}, which mixes the data of a batch, and "
                    "they must stay apart here; use layer norm (norm='layer'), or none"
                )


def output_bias(net: nn.Module, size: int) -> nn.Parameter:
    """The bias of the output layer of ``net``: where a likelihood puts the data's mean before training.

    That of a linear layer has one number for each that the net gives; that of a convolution one per channel, to
    be set to a mean over pixels: see `pooled`.

    Args:
        net: module that registers its output layer last.
        size: how many numbers the net gives for one datum.

    Raises:
        ValueError: the net has no linear or convolutional layer, the last one has no bias, or cannot give ``size``
            numbers.
    """
    name = type(net).__name__
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    if not layers or layers[-1].bias is None:
        raise ValueError(f"{name} has no output layer with a bias to start from the data")
    bias = cast(nn.Parameter, layers[-1].bias)
    if isinstance(layers[-1], nn.Linear) and len(bias) != size:
        raise ValueError(
            f"{name}: its last linear layer gives {len(bias)} numbers, the data need {size}; "
            "start_from sets the bias of an output layer that is linear and as wide as the data, or a convolution"
        )
    if size % len(bias):
        raise ValueError(
            f"{name}: its last convolution gives {len(bias)} channels, which do not divide the {size} numbers "
            "that the data need"
        )
    return bias


def pooled(values: Tensor, size: int) -> Tensor:
    """Values of one datum, channels first, averaged to ``size`` numbers: over pixels, for a bias of channels.

    >>> pooled(torch.tensor([[1.0, 3.0], [5.0, 6.0]]), 2)
    tensor([2.0000, 5.5000])
    """
    return values.reshape(size, -1).mean(1)
