"""Priors p(z | c): conditionals of nothing, or of the condition c alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import LOG_SCALE_LIMIT, Conditional, NetScale, Normal, at_least_one, bounded, unbounded
from ppl_vae.flows import Flow, Flowed
from ppl_vae.nets import refuse_mixing

__all__ = [
    "LearnedNormal",
    "MixturePrior",
    "StandardNormal",
    "UniformCodes",
    "VampPrior",
    "conditional_normal",
    "flow_prior",
]


class StandardNormal(Conditional):
    """N(0, I) over ``latent`` dimensions, whatever the context.

    Raises:
        ValueError: ``latent`` below one.

    >>> StandardNormal(20)().event_shape
    torch.Size([20])
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        at_least_one(latent=latent)
        self.register_buffer("loc", torch.zeros(latent))
        self.register_buffer("scale", torch.ones(latent))
        self.loc: Tensor
        self.scale: Tensor

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return N(0, I) without batch shape: the plate around the site expands it."""
        return dist.Normal(self.loc, self.scale).to_event(1)


def conditional_normal(net: nn.Module) -> Normal:
    """p(z | c) = N(μ(c), diag σ²(c)) (Sohn et al. 2015, section 4.1); ``net`` gives ``2 * latent`` numbers."""
    return Normal(net, NetScale())


class LearnedNormal(Conditional):
    """N(μ, diag σ²) with learned μ and σ, whatever the context; N(0, I) before training.

    Raises:
        ValueError: ``latent`` below one.

    >>> LearnedNormal(20)().event_shape
    torch.Size([20])
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        at_least_one(latent=latent)
        self.loc = nn.Parameter(torch.zeros(latent))
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the normal without batch shape."""
        return dist.Normal(self.loc, bounded(self.log_scale).exp()).to_event(1)


class _Mixture(Conditional):
    """A mixture of M components, whatever the context."""

    @torch.no_grad()
    def responsibilities(self, z: Tensor) -> Tensor:
        """p(m | z) = π_m p_m(z) / p(z): which component a code belongs to.

        Args:
            z: codes (..., latent).

        Returns:
            Probabilities (..., M); they sum to one.
        """
        mixture = self()
        each = mixture.component_distribution.log_prob(z.unsqueeze(-1 - len(mixture.event_shape)))
        belongs: Tensor = (mixture.mixture_distribution.logits + each).softmax(-1)
        return belongs


class MixturePrior(_Mixture):
    """Σ_m π_m N(μ_m, diag σ_m²) with learned weights, means and scales, whatever the context.

    Before training the weights are equal, the means drawn from N(0, spread²) and the scales such that the mixture
    as a whole is about as wide as N(0, I): apart, so that components can take different parts of the latents.

    Args:
        latent: dimensions of z.
        components: M.
        spread: standard deviation of the first means, between 0 and 1.

    Raises:
        ValueError: ``latent`` or ``components`` below one; ``spread`` not between 0 and 1.

    >>> MixturePrior(20, components=10)().event_shape
    torch.Size([20])
    """

    def __init__(self, latent: int, components: int, *, spread: float = 0.8) -> None:
        super().__init__()
        at_least_one(latent=latent, components=components)
        if not 0 < spread < 1:
            raise ValueError(f"spread must lie between 0 and 1, got {spread}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(spread * torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.full((components, latent), math.log(1 - spread**2) / 2))

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale: Tensor, weights: Tensor | None = None) -> None:
        """Put the components where something else found them, EM on codes say.

        Args:
            loc: means (M, latent).
            scale: standard deviations (M, latent), between exp(-7) and exp(7).
            weights: π (M,), positive; they are made to sum to one. Left out, all are equal.

        Raises:
            ValueError: other shapes, or numbers out of range; nothing is changed then.
        """
        weights = torch.ones_like(self.logits) if weights is None else weights
        least, most = math.exp(-LOG_SCALE_LIMIT), math.exp(LOG_SCALE_LIMIT)
        allowed = {"loc": (-math.inf, math.inf), "scale": (least, most), "weights": (0.0, math.inf)}
        shapes = {"loc": self.loc.shape, "scale": self.loc.shape, "weights": self.logits.shape}
        for (name, (low, high)), value in zip(allowed.items(), (loc, scale, weights), strict=True):
            if value.shape != shapes[name]:
                raise ValueError(f"{name}: expected shape {tuple(shapes[name])}, got {tuple(value.shape)}")
            if bool((wrong := ~((value > low) & (value < high))).any()):  # NaN is wrong, too
                raise ValueError(
                    f"{name} must lie between {low:.3g} and {high:.3g}, got {float(value[wrong][0]):.3g}"
                )
        self.loc.copy_(loc)
        self.log_scale.copy_(unbounded(scale.log()))
        self.logits.copy_((weights / weights.sum()).log())

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the mixture without batch shape."""
        components = dist.Normal(self.loc, bounded(self.log_scale).exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


class VampPrior(_Mixture):
    """The mixture of posteriors at learned pseudo-inputs, Σ_m π_m q(z | u_m) (Tomczak & Welling 2018, eq. 9).

    Its parameters are u and π; those of the posterior are the program's, which registers it. The prior refers to
    the posterior that it was given: another, put in the program later, needs another prior.

    Args:
        posterior: q(z | x) of x alone, whose distribution has a density at values of any broadcast shape. It must
            not mix data, as BatchNorm does: in training, q(z | u) would depend on the other pseudo-inputs.
        inputs: the first pseudo-inputs (M, *event), as the posterior takes them.
        unit: keep them between 0 and 1, through a sigmoid, as data in [0, 1] are; the first ones are then pulled
            to within [.01, .99]. Without it they are free, as suits data of any scale.
        learned_weights: learn π, equal in the beginning, instead of keeping 1 / M (section 2.3 has it constant).

    Raises:
        ValueError: inputs that are not rows of numbers in floating point or, with ``unit``, not in [0, 1]; a
            posterior with BatchNorm.

    >>> from ppl_vae.nets import MLP
    >>> posterior = Normal(MLP(784, 200, 2 * 20), NetScale())
    >>> VampPrior(posterior, torch.rand(50, 784), unit=True)().event_shape
    torch.Size([20])
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], TorchDistribution],
        inputs: Tensor,
        *,
        unit: bool = False,
        learned_weights: bool = False,
    ) -> None:
        super().__init__()
        refuse_mixing(posterior=posterior)
        if inputs.dim() < 2 or not inputs.is_floating_point():
            raise ValueError(
                f"inputs: expected rows in floating point, (M, *event), got {tuple(inputs.shape)} {inputs.dtype}"
            )
        self.__dict__["posterior"] = posterior  # unregistered: its weights are the program's, and saved there
        self.unit = unit
        self.raw = nn.Parameter(self._unconstrained(inputs))
        weights = torch.zeros(len(inputs))
        self.logits: Tensor
        if learned_weights:
            self.logits = nn.Parameter(weights)
        else:
            self.register_buffer("logits", weights)

    @classmethod
    def from_data(
        cls,
        posterior: Callable[[Tensor], TorchDistribution],
        x: Tensor,
        components: int,
        *,
        unit: bool = False,
        learned_weights: bool = False,
    ) -> VampPrior:
        """A prior whose first pseudo-inputs are rows of the data, drawn without replacement.

        Args:
            posterior: as above.
            x: data (N, *event), as the posterior takes them; uint8 pixels count as x / 255.
            components: M, at most N.
            unit: as above.
            learned_weights: as above.

        Raises:
            ValueError: fewer than one component, or more than there are data.
        """
        if not 1 <= components <= len(x):
            raise ValueError(f"components must be from 1 to the {len(x)} rows of the data, got {components}")
        return cls(posterior, _drawn(x, components), unit=unit, learned_weights=learned_weights)

    @torch.no_grad()
    def start_at(self, x: Tensor) -> None:
        """Put the pseudo-inputs at rows of the data, drawn as `from_data` draws them, with replacement if N < M.

        Args:
            x: data (N, *event), as there.

        Raises:
            ValueError: no data, or of another shape than the pseudo-inputs; with ``unit``, not in [0, 1].
        """
        if not len(x) or x.shape[1:] != self.raw.shape[1:]:
            expected = ", ".join(map(str, self.raw.shape[1:]))
            raise ValueError(f"x: expected one or more rows, (N, {expected}), got {tuple(x.shape)}")
        self.raw.copy_(self._unconstrained(_drawn(x, len(self.raw))))

    def _unconstrained(self, inputs: Tensor) -> Tensor:
        """What `raw` is at pseudo-inputs."""
        if self.unit and not 0 <= float(inputs.min()) <= float(inputs.max()) <= 1:
            raise ValueError(
                "pseudo-inputs: with unit=True they must lie in [0, 1]; rescale the data, or use unit=False"
            )
        return torch.logit(inputs, eps=0.01) if self.unit else inputs.clone()

    @property
    def inputs(self) -> Tensor:
        """The pseudo-inputs, (M, *event), as the posterior sees them."""
        return self.raw.sigmoid() if self.unit else self.raw

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the mixture without batch shape."""
        posterior: Callable[[Tensor], TorchDistribution] = self.__dict__["posterior"]
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), posterior(self.inputs))


def _drawn(x: Tensor, count: int) -> Tensor:
    """So many rows of ``x``, drawn with replacement only where there are fewer, bytes as x / 255."""
    order = torch.randint(len(x), (count,)) if len(x) < count else torch.randperm(len(x))[:count]
    rows = x[order.to(x.device)]
    return rows / 255 if rows.dtype == torch.uint8 else rows


def flow_prior(latent: int, *flows: Flow) -> Flowed:
    """N(0, I) pushed through flows, p(z) = N(f⁻¹(z); 0, I) |det ∂f⁻¹/∂z|; N(0, I) before training.

    Take flows whose density at a given z is cheap: `ppl_vae.masked_autoregressive`, `ppl_vae.coupling` or
    `ppl_vae.radial`. The others work too, through their inverses.

    Raises:
        ValueError: ``latent`` below one; no flows.

    >>> from ppl_vae.triangular import masked_autoregressive
    >>> flow_prior(20, *masked_autoregressive(20))().event_shape
    torch.Size([20])
    """
    return Flowed(StandardNormal(latent), *flows)


class UniformCodes(Conditional):
    """Codes 0 .. codes - 1, each as likely as any other, at every place of a grid; nothing is learned.

    Args:
        codes: how many there are.
        shape: of the grid, such as (7, 7); it is the event's. (): one code for a datum.

    Raises:
        ValueError: fewer than one code, or a grid without places.

    >>> UniformCodes(512, (7, 7))().event_shape
    torch.Size([7, 7])
    """

    def __init__(self, codes: int, shape: Sequence[int]) -> None:
        super().__init__()
        at_least_one(codes=codes)
        if min(shape, default=1) < 1:
            raise ValueError(f"shape must be positive lengths, got {tuple(shape)}")
        self.register_buffer("logits", torch.zeros(*shape, codes))
        self.logits: Tensor

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution without batch shape."""
        return dist.Categorical(logits=self.logits).to_event(self.logits.dim() - 1)
