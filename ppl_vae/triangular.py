"""Flows made of nets: each coordinate is mapped with parameters that a net makes of the coordinates before it.

Which direction costs one pass of the nets is what distinguishes `inverse_autoregressive` (drawing: posteriors),
`masked_autoregressive` (density of any value: priors) and `coupling` (both, nearly).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ppl_vae.flows import Flow, Uncycled, check_flow
from ppl_vae.nets import MLP, Concat
from ppl_vae.scalars import AffineMap, ScalarMap

__all__ = ["coupling", "inverse_autoregressive", "masked_autoregressive"]

AFFINE = AffineMap()


class _Triangular(Uncycled):
    """Each coordinate through a scalar map whose parameters a net makes of coordinates before it.

    Pyro has such transforms too; theirs read numbers from tensors (the splines and the inverses), which stops
    capture.

    Args:
        scalar: the map of one coordinate.
        net: of all coordinates, giving the map's parameters.
        rounds: of the inverse; with each, more coordinates are right, from the first on.
        turned: whether the order of coordinates is reversed.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, scalar: ScalarMap, net: Callable[[Tensor], Tensor], rounds: int, turned: bool) -> None:
        super().__init__(cache_size=1)
        self.scalar, self.net, self.rounds, self.turned = scalar, net, rounds, turned

    def turn(self, value: Tensor) -> Tensor:
        return value.flip(-1) if self.turned else value

    def _call(self, x: Tensor) -> Tensor:
        x = self.turn(x)
        y, log_slopes = self.scalar(x, self.net(x))
        self.log_det = log_slopes.sum(-1)
        return self.turn(y)

    def _inverse(self, y: Tensor) -> Tensor:
        y = self.turn(y)
        x = torch.zeros_like(y)
        for _ in range(self.rounds):
            x, log_slopes = self.scalar.inverse(y, self.net(x))
        self.log_det = log_slopes.sum(-1)
        return self.turn(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        before, after = cast(tuple[Tensor | None, Tensor | None], self._cached_x_y)
        if not (x is before and y is after):
            self(x)
        return self.log_det


class _Conditioned(Flow):
    """A triangular map, or its inverse, by a net."""

    def __init__(
        self, scalar: ScalarMap, net: nn.Module, rounds: int, context: int, turned: bool, inverse: bool
    ) -> None:
        super().__init__(context)
        self.scalar, self.net, self.rounds = scalar, net, rounds
        self.turned, self.inverse = turned, inverse

    def forward(self, *features: Tensor) -> Transform:
        made = _Triangular(self.scalar, lambda x: self.net(x, *features), self.rounds, self.turned)
        return made.inv if self.inverse else made


class _Coupled(nn.Module):
    """Parameters of the first half, learned, and of the second, by a net of the first."""

    def __init__(self, latent: int, hidden: Sequence[int], numbers: int, context: int) -> None:
        super().__init__()
        self.head, self.numbers = latent // 2, numbers
        self.first = nn.Parameter(torch.zeros(numbers, self.head))
        net = MLP(self.head + context, *hidden, numbers * (latent - self.head))
        _zero(net[-1])
        self.net = Concat(net, *([None, None] if context else [None]))

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        rest = self.net(x[..., : self.head], *features).unflatten(-1, (self.numbers, -1))
        return torch.cat([self.first.expand(*rest.shape[:-1], self.head), rest], dim=-1)


def _zero(layer: nn.Module) -> None:
    """Let a layer give zeros, for which scalar maps are the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _autoregressive(
    latent: int, hidden: Sequence[int], depth: int, scalar: ScalarMap, context: int, density: bool
) -> tuple[Flow, ...]:
    """Layers with the order of coordinates reversed in every other one; ``density`` for their inverses."""
    check_flow(latent, depth, context, least=2)
    if not hidden or min(hidden) < latent:
        raise ValueError(f"hidden must be one or more widths of at least latent ({latent}), got {tuple(hidden)}")

    def layer(turned: bool) -> Flow:
        order = torch.arange(latent)
        widths, numbers = [*hidden], [scalar.numbers]
        if context:
            net = ConditionalAutoRegressiveNN(latent, context, widths, numbers, order, nonlinearity=nn.ReLU())
        else:
            net = AutoRegressiveNN(latent, widths, numbers, order, nonlinearity=nn.ReLU())
        _zero(net.layers[-1])
        return _Conditioned(scalar, net, latent, context, turned, density)

    return tuple(layer(turned=i % 2 == 1) for i in range(depth))


def inverse_autoregressive(
    latent: int, hidden: Sequence[int] = (64,), depth: int = 2, *, scalar: ScalarMap = AFFINE, context: int = 0
) -> tuple[Flow, ...]:
    """Inverse autoregressive flows (Kingma et al. 2016), for posteriors; the identity before training.

    y_i = f(x_i; parameters of x_1, ..., x_(i-1)), by a masked net (Germain et al. 2015). A draw and its density
    cost one pass of each net. The density of any other value, as the doubly reparameterised estimator asks for,
    costs ``latent`` passes, in which rounding errors grow from coordinate to coordinate.

    Args:
        latent: dimensions of z, at least 2.
        hidden: widths of each net, none below ``latent``.
        depth: how many, with the order of coordinates reversed in every other.
        scalar: f, `AffineMap` or `SplineMap`.
        context: how many features the nets see as well; 0 for none.

    Raises:
        ValueError: sizes below these.
    """
    return _autoregressive(latent, hidden, depth, scalar, context, density=False)


def masked_autoregressive(
    latent: int, hidden: Sequence[int] = (64,), depth: int = 2, *, scalar: ScalarMap = AFFINE, context: int = 0
) -> tuple[Flow, ...]:
    """Masked autoregressive flows (Papamakarios et al. 2017), for priors; the identity before training.

    The inverse of `inverse_autoregressive`, with the same arguments: the density of any value costs one pass of
    each net, and a draw ``latent`` passes.

    Raises:
        ValueError: as by `inverse_autoregressive`.
    """
    return _autoregressive(latent, hidden, depth, scalar, context, density=True)


def coupling(
    latent: int, hidden: Sequence[int] = (64,), depth: int = 4, *, scalar: ScalarMap = AFFINE, context: int = 0
) -> tuple[Flow, ...]:
    """Coupling flows (Dinh et al. 2017, eq. 7 and 8), for priors and posteriors; the identity before training.

    The second half of the coordinates is mapped given the first, by a net, and the first by maps of its own.
    A draw costs one pass of each net, the density of any value two.

    Args:
        latent: dimensions of z, at least 2.
        hidden: widths of each net.
        depth: how many, with the order of coordinates reversed in every other.
        scalar: the map of one coordinate: `AffineMap`, as in RealNVP, or `SplineMap` (Durkan et al. 2019).
        context: how many features the nets see as well; 0 for none.

    Raises:
        ValueError: sizes below these.
    """
    check_flow(latent, depth, context, least=2)

    def layer(turned: bool) -> Flow:
        net = _Coupled(latent, hidden, scalar.numbers, context)
        return _Conditioned(scalar, net, 2, context, turned, inverse=False)

    return tuple(layer(turned=i % 2 == 1) for i in range(depth))
