"""Normalising flows: a conditional pushed through invertible maps, as a posterior or as a prior.

A `Flow` is to a transform what a `Conditional` is to a distribution: a module whose ``forward`` returns one, made
anew at every call. Pyro's transform modules remember their latest input and output; kept on a module, these would
outlive the step they belong to, and under capture be stand-ins. Here they live as long as the distribution.

Every flow has an inverse at any value. A draw is scored from what was computed when drawing it; other values, as
priors and the doubly reparameterised estimator need them, through the inverse. Flows made of nets, autoregressive
and coupling ones, are in `ppl_vae.triangular`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import normalize, softplus

from ppl_vae.conditionals import Conditional

__all__ = ["Flow", "Flowed", "Uncycled", "check_flow", "planar", "radial"]

SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of it is 1
HALVINGS = 20  # to a millionth of the interval; the Newton step after them squares the error


class Flow(nn.Module, ABC):
    """An invertible map of latents with learned parameters: ``forward(*features) -> Transform``.

    The transform is a new one at each call, with a cache of one value (``cache_size=1``), for ``(..., latent)``
    with any leading dimensions.

    Args:
        context: how many features of the context the map depends on; 0 for none.
    """

    def __init__(self, context: int = 0) -> None:
        super().__init__()
        self.context = context

    @abstractmethod
    def forward(self, *features: Tensor) -> Transform:
        """Return the transform given features (..., context), or given nothing."""


class Flowed(Conditional):
    """What a base conditional draws, pushed through flows (Rezende & Mohamed 2015, eq. 5).

    z = f_T ∘ ... ∘ f_1(z_0), log q(z) = log q_0(z_0) - Σ log |det ∂f_t/∂z_(t-1)|. As a posterior, the base is
    amortised, such as `mean_field`; the flows are the same for all data, or follow features of the datum.

    Args:
        base: conditional over vectors.
        *flows: in the order in which they are applied to a draw of the base.
        context: net of the context, giving the features that flows made with ``context=`` follow.

    Raises:
        ValueError: no flow; something that is no `Flow`; flows that want features without a net to give them.

    >>> from ppl_vae.conditionals import NetScale, Normal
    >>> from ppl_vae.nets import MLP
    >>> posterior = Flowed(Normal(MLP(784, 200, 2 * 20), NetScale()), *planar(20, depth=4))
    >>> posterior(torch.zeros(3, 784)).rsample((5,)).shape
    torch.Size([5, 3, 20])
    """

    def __init__(self, base: Conditional, *flows: Flow, context: nn.Module | None = None) -> None:
        super().__init__()
        if not flows:
            raise ValueError("flows: expected at least one, such as *planar(latent)")
        for flow in flows:
            if not isinstance(flow, Flow):
                raise ValueError(
                    f"flows: expected Flow modules, got {type(flow).__name__}; unpack the factories, as in "
                    "Flowed(base, *planar(latent)), and return a transform of your own from a Flow's forward"
                )
        if context is None and any(flow.context for flow in flows):
            raise ValueError(
                "context: flows were made with context=..., but there is no net that gives the features"
            )
        self.base = base
        self.flows = nn.ModuleList(flows)
        self.context = context

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the transformed distribution, with the base's event and batch shape."""
        base = self.base(*context)
        features = () if self.context is None else (self.context(*context),)
        for given in features:
            base = base.expand(torch.broadcast_shapes(base.batch_shape, given.shape[:-1]))  # type: ignore[no-untyped-call]
        return dist.TransformedDistribution(base, [f(*features[: bool(f.context)]) for f in self.flows])


def check_flow(latent: int, depth: int, context: int, least: int = 1) -> None:
    """Raise ValueError, naming it, for a size that no flow has."""
    for name, size, limit in (("latent", latent, least), ("depth", depth, 1), ("context", context, 0)):
        if size < limit:
            raise ValueError(f"{name} must be at least {limit}, got {size}")


class _Numbers(nn.Module):
    """Numbers that are learned or, with a context, linear in it; in the beginning they are ``start``."""

    def __init__(self, start: Tensor, context: int) -> None:
        super().__init__()
        self.start = nn.Parameter(start)
        self.slope = nn.Linear(context, len(start), bias=False) if context else None
        if self.slope is not None:
            nn.init.zeros_(self.slope.weight)

    def forward(self, *features: Tensor) -> Tensor:
        return self.start if self.slope is None else self.start + self.slope(*features)


class Uncycled(Transform):
    """A transform that its inverse refers to, and not the other way round.

    With torch's cycle, the draws that a transform remembers, and all that they were computed from, would stay in
    memory until the garbage collector comes by.
    """

    @property
    def inv(self) -> Transform:
        """The inverse, made anew."""
        made = super().inv
        self._inv = None
        return made


class _Planar(Uncycled, ConditionedPlanar):  # type: ignore[misc]
    """Pyro's planar transform, with an inverse."""

    def _inverse(self, y: Tensor) -> Tensor:
        bias, u, w = self._params
        u = self.u_hat(u, w)
        along = _solve_tanh((w * y).sum(-1, keepdim=True), (w * u).sum(-1, keepdim=True), bias)
        x: Tensor = y - u * torch.tanh(along + bias)
        self._call(x)  # type: ignore[no-untyped-call]  # it keeps the determinant at x
        return x


def _solve_tanh(target: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """The a with a + slope tanh(a + bias) = target, where slope > -1; differentiable once in all three."""
    with torch.no_grad():
        low, high = target - slope.abs(), target + slope.abs()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = middle + slope * torch.tanh(middle + bias) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        middle = (low + high) / 2
    act = torch.tanh(middle + bias)
    steepness = 1 + slope * (1 - act.square())
    return middle + (target - middle - slope * act) / steepness.detach()  # Newton's step has the root's gradient


class _Radial(Uncycled, ConditionedRadial):  # type: ignore[misc]
    """Pyro's radial transform, with an inverse."""

    def _inverse(self, y: Tensor) -> Tensor:
        x0, alpha, total = self._params[0], softplus(self._params[1]), softplus(self._params[2])
        beta, away = total - alpha, y - x0
        far = away.norm(dim=-1, keepdim=True)
        # far = r + beta r / (alpha + r) is quadratic in r; of its root, the form in which nothing cancels.
        middle = total - far
        root = (middle.square() + 4 * alpha * far).sqrt()
        r = torch.where(middle > 0, 2 * alpha * far / (root + middle.abs()), (root - middle) / 2)
        x: Tensor = x0 + away / (1 + beta / (alpha + r))
        self._call(x)  # type: ignore[no-untyped-call]  # it keeps the determinant at x
        return x


class _Simple(Flow):
    """A transform made of a vector of numbers, split in parts."""

    def __init__(self, make: Callable[..., Transform], start: Tensor, parts: Sequence[int], context: int) -> None:
        super().__init__(context)
        self.make, self.parts, self.numbers = make, tuple(parts), _Numbers(start, context)

    def forward(self, *features: Tensor) -> Transform:
        return self.make(self.numbers(*features).split(self.parts, dim=-1))


def planar(latent: int, depth: int = 8, *, context: int = 0) -> tuple[Flow, ...]:
    """Planar flows z + û tanh(wᵀz + b) (Rezende & Mohamed 2015, eq. 10), the identity before training.

    Drawing is cheap. The inverse at other values is found along w by bisection; it has first derivatives only.

    Args:
        latent: dimensions of z.
        depth: how many, one after the other.
        context: how many features u, w and b depend on linearly; 0 for none.

    Raises:
        ValueError: ``latent`` or ``depth`` below one.
    """
    check_flow(latent, depth, context)

    def start() -> Tensor:
        w = normalize(torch.randn(latent), dim=0)
        return torch.cat([torch.zeros(1), SOFTPLUS_ONE * w, w])  # for this u, û is zero

    return tuple(_Simple(_Planar, start(), (1, latent, latent), context) for _ in range(depth))


def radial(latent: int, depth: int = 8, *, context: int = 0) -> tuple[Flow, ...]:
    """Radial flows z + β (z - z₀) / (α + |z - z₀|) (Rezende & Mohamed 2015, eq. 14), at first the identity.

    Both directions are cheap.

    Args:
        latent: dimensions of z.
        depth: how many, one after the other.
        context: how many features z₀, α and β depend on linearly; 0 for none.

    Raises:
        ValueError: ``latent`` or ``depth`` below one.
    """
    check_flow(latent, depth, context)

    def start() -> Tensor:
        return torch.cat([torch.randn(latent), torch.full((2,), SOFTPLUS_ONE)])  # α = 1 and β = 0

    return tuple(_Simple(_Radial, start(), (latent, 1, 1), context) for _ in range(depth))
