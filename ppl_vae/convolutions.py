"""Convolutional feature nets: images (..., C, H, W) to features and back, plain, residual, gated, or normed.

Every stage halves or doubles height and width by a convolution of kernel 4, stride 2 and padding 1, the size at
which a transposed one puts equal weight on all pixels (Odena et al. 2016, "Deconvolution and checkerboard
artifacts"). Leading dimensions are kept, like those of every net: flattened once, before the first layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Unpack

from torch import nn

from ppl_vae.conditionals import at_least_one
from ppl_vae.nets import Batched, Hidden, Residual, Style

__all__ = ["ConvDecoder", "ConvEncoder"]


def ConvEncoder(  # noqa: N802
    shape: Sequence[int],
    channels: Sequence[int],
    outputs: int,
    *,
    blocks: int = 0,
    flat: bool = False,
    spatial: bool = False,
    **style: Unpack[Style],
) -> Batched:
    """Images to features, ``(..., C, H, W) -> (..., outputs)``: strided convolutions, then a linear layer.

    With ``spatial`` the features keep their places, (..., outputs, H / 2^n, W / 2^n).

    After n stages, height and width are H / 2^n and W / 2^n, and a feature sees 3 * 2^n - 2 pixels each way.

    Args:
        shape: (C, H, W).
        channels: width of each stage; with n of them, H and W must be divisible by 2^n.
        outputs: how many features.
        blocks: residual blocks of two 3 x 3 convolutions in each stage (He et al. 2016, "Identity mappings").
        flat: take flat pixels (..., C * H * W), as data sets here have them.
        spatial: end with a convolution of kernel 1, the same linear layer at each place.
        **style: ``activation``, ``norm``, ``gated`` and ``dropout`` of the hidden layers; see `Hidden`.

    Raises:
        ValueError: a shape that is not three positive sizes, or cannot be halved so often; no or bad channels;
            a bad style.

    >>> import torch
    >>> ConvEncoder((1, 28, 28), (32, 64), outputs=2 * 20)(torch.zeros(5, 3, 1, 28, 28)).shape
    torch.Size([5, 3, 40])
    """
    height, width = _smallest("ConvEncoder", shape, channels, blocks)
    at_least_one(outputs=outputs)
    hidden = Hidden(-3, **style)
    layers: list[nn.Module] = [nn.Unflatten(1, tuple(shape))] if flat else []
    for i, (fan_in, fan_out) in enumerate(pairwise((shape[0], *channels))):
        halving = partial(nn.Conv2d, fan_in, kernel_size=4, stride=2, padding=1)
        layers += [*(_ready(hidden, fan_in, blocks) if i else []), *hidden.layer(halving, fan_out)]
    last = channels[-1]
    layers += _ready(hidden, last, blocks)
    if spatial:
        layers.append(nn.Conv2d(last, outputs, 1))
    else:
        layers += [nn.Flatten(), nn.Linear(last * height * width, outputs)]
    return Batched(nn.Sequential(*layers), *((math.prod(shape),) if flat else shape))


def ConvDecoder(  # noqa: N802
    inputs: int,
    channels: Sequence[int],
    shape: Sequence[int],
    outputs_per_pixel: int | None = None,
    *,
    blocks: int = 0,
    flat: bool = False,
    spatial: bool = False,
    **style: Unpack[Style],
) -> Batched:
    """Features to images, ``(..., inputs) -> (..., C', H, W)``: a linear layer, then transposed convolutions.

    With ``spatial`` the features have their places, (..., inputs, H / 2^n, W / 2^n).

    Args:
        inputs: how many features.
        channels: width of each stage, the smallest picture first: a decoder as wide as an encoder has its channels
            reversed. With n of them, H and W must be divisible by 2^n.
        shape: (C, H, W).
        outputs_per_pixel: C', how many numbers a likelihood needs for each of the H * W pixels: C, the default,
            for one per colour; 2 * C for a location and a log-scale each.
        blocks: residual blocks of two 3 x 3 convolutions in each stage, before it doubles the size.
        flat: give flat numbers (..., C' * H * W), all pixels of the first channel first.
        spatial: begin with a convolution of kernel 3.
        **style: ``activation``, ``norm``, ``gated`` and ``dropout`` of the hidden layers; see `Hidden`.

    Raises:
        ValueError: as `ConvEncoder`.

    >>> import torch
    >>> ConvDecoder(20, (64, 32), (1, 28, 28))(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 3, 1, 28, 28])
    """
    height, width = _smallest("ConvDecoder", shape, channels, blocks)
    outputs = shape[0] if outputs_per_pixel is None else outputs_per_pixel
    at_least_one(inputs=inputs, outputs_per_pixel=outputs)
    hidden = Hidden(-3, **style)

    def spread(features: int) -> nn.Module:
        if spatial:
            return nn.Conv2d(inputs, features, 3, padding=1)
        flatly = nn.Linear(inputs, features * height * width)
        return nn.Sequential(flatly, nn.Unflatten(1, (features, height, width)))

    layers = hidden.layer(spread, channels[0])
    for fan_in, fan_out in pairwise(channels):
        layers += [*_ready(hidden, fan_in, blocks), *hidden.layer(_doubling(fan_in), fan_out)]
    layers += [*_ready(hidden, channels[-1], blocks), _doubling(channels[-1])(outputs)]
    event = (inputs, height, width) if spatial else (inputs,)
    return Batched(nn.Sequential(*layers, *([nn.Flatten()] if flat else [])), *event)


def _doubling(width: int) -> Callable[[int], nn.Module]:
    return partial(nn.ConvTranspose2d, width, kernel_size=4, stride=2, padding=1)


def _ready(hidden: Hidden, width: int, blocks: int) -> list[nn.Module]:
    """What stands between two changes of size."""
    return [*(_block(hidden, width) for _ in range(blocks)), *hidden.after(width)]


def _block(hidden: Hidden, width: int) -> Residual:
    """A residual block in the order of pre-activation: norm and activation before each of two convolutions."""
    layers: list[nn.Module] = []
    for _ in range(2):
        same = partial(nn.Conv2d, width, kernel_size=3, padding=1)
        layers += [*hidden.after(width), *hidden.layer(same, width)]
    return Residual(*layers)


def _smallest(name: str, shape: Sequence[int], channels: Sequence[int], blocks: int) -> tuple[int, int]:
    """Height and width after all halvings; raises ValueError where there are none."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name}: shape must be three positive sizes (C, H, W), got {tuple(shape)}")
    if not channels or min(channels) < 1:
        raise ValueError(f"{name}: channels must be one or more positive widths, got {tuple(channels)}")
    if blocks < 0:
        raise ValueError(f"{name}: blocks must be at least 0, got {blocks}")
    _, height, width = shape
    factor = 2 ** len(channels)
    if height % factor or width % factor:
        raise ValueError(
            f"{name}: {height} x {width} pixels cannot be halved {len(channels)} times, once for each of channels "
            f"{tuple(channels)}; give fewer channels, or pad the images to multiples of {factor}"
        )
    return height // factor, width // factor
