"""A posterior refined by a few leapfrog steps along log p(x, z), with a density of draws and momenta together.

z_0 ~ q(z | x) and ρ_0 ~ N(0, I / β_0) move without chance to z_K and ρ_K, and volumes stay. Hence
log p(x, z_K) + log N(ρ_K; 0, I) - log q(z_0) - log N(β_0^½ ρ_0; 0, I) is the log of an unbiased estimate of p(x)
(Caterini, Doucet & Sejdinovic 2018, algorithm 1; after Salimans, Kingma & Welling 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.conditionals import LOG_SCALE_LIMIT, Conditional, at_least_one, bounded
from ppl_vae.nets import refuse_mixing

__all__ = ["Hamiltonian", "HamiltonianLaw", "Joint", "leapfrog"]

LogDensity = Callable[..., Tensor]


class Joint:
    """Log p(x, z | c) of a prior and a likelihood: ``joint(z, x, *c) -> (...)``, in nats.

    It is no module, and so does not register the two once more with the posterior that holds it: they are part of
    the program already.

    Raises:
        ValueError: a prior or likelihood with BatchNorm, which mixes data: see `Hamiltonian`.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.nets import MLP
    >>> from ppl_vae.priors import StandardNormal
    >>> Joint(StandardNormal(2), Bernoulli(MLP(2, 8)))(torch.zeros(5, 3, 2), torch.ones(3, 8)).shape
    torch.Size([5, 3])
    """

    def __init__(self, prior: Conditional, likelihood: Conditional) -> None:
        refuse_mixing(prior=prior, likelihood=likelihood)
        self.prior, self.likelihood = prior, likelihood

    def __call__(self, z: Tensor, x: Tensor, *condition: Tensor) -> Tensor:
        """Return log p(z | c) + log p(x | z, c) for z (..., B, d), x (B, *event)."""
        log_joint: Tensor = self.prior(*condition).log_prob(z) + self.likelihood(z, *condition).log_prob(x)
        return log_joint


class Hamiltonian(Conditional):
    """A base posterior followed by leapfrog steps along log p(x, z), with learned step sizes.

    The density of a draw is known at that draw alone, and together with momenta. So bounds hold, and estimators
    that differentiate them through draws; what asks for q(z | x) elsewhere raises ValueError: closed KLs,
    `doubly` and scores. Data must not mix inside ``log_joint``, as BatchNorm mixes them in training: the slope at
    one datum's z would be that of the others' densities, too. `Joint`, and a ``log_joint`` that is a module, are
    looked through for it.

    Args:
        base: q(z | x), with reparameterised draws (d,).
        log_joint: ``log_joint(z, *context)`` -> log p(x, z), one number for each z; such as `Joint`.
        latent: d.
        steps: K, leapfrog steps; each takes one gradient of ``log_joint``.
        step_size: where the step sizes start, one per dimension.
        temperature: 1 / β_0 of the momenta at first, which cools to 1 over the steps, by a schedule
            quadratic in k as in the paper, and is learned if greater than 1.

    Raises:
        ValueError: sizes out of range; a ``log_joint`` with BatchNorm.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.nets import MLP
    >>> from ppl_vae.posteriors import mean_field
    >>> from ppl_vae.priors import StandardNormal
    >>> joint = Joint(StandardNormal(2), Bernoulli(MLP(2, 8)))
    >>> q = Hamiltonian(mean_field(MLP(8, 4)), joint, latent=2, steps=3)(torch.ones(5, 8))
    >>> q.log_prob(q.rsample()).shape
    torch.Size([5])
    """

    def __init__(
        self,
        base: Conditional,
        log_joint: LogDensity,
        latent: int,
        *,
        steps: int = 3,
        step_size: float = 0.05,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        at_least_one(latent=latent, steps=steps)
        refuse_mixing(log_joint=log_joint)
        if not math.exp(-LOG_SCALE_LIMIT) < step_size < math.exp(LOG_SCALE_LIMIT):
            raise ValueError(f"step_size must lie within exp(±{LOG_SCALE_LIMIT:g}), got {step_size}")
        if not 1 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 1, got {temperature}")
        self.base, self.log_joint, self.steps = base, log_joint, steps
        raw = LOG_SCALE_LIMIT * math.atanh(math.log(step_size) / LOG_SCALE_LIMIT)
        self.raw_step = nn.Parameter(torch.full((latent,), raw))
        heat = math.sqrt(temperature) - 1  # how much wider the first momenta are than the last
        self.log_heat = nn.Parameter(torch.tensor(math.log(heat))) if heat > 0 else None

    @property
    def step_size(self) -> Tensor:
        """The current step sizes, (d,)."""
        return bounded(self.raw_step).exp()

    @property
    def spread(self) -> Tensor:
        """Standard deviations β_k^-½ of momenta after k = 0 .. K steps, (K + 1,); the last is 1."""
        done = torch.linspace(0, 1, self.steps + 1, dtype=self.raw_step.dtype, device=self.raw_step.device)
        return torch.ones_like(done) if self.log_heat is None else 1 + self.log_heat.exp() * (1 - done.square())

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution with batch shape that of the context, event (d,).

        Raises:
            ValueError: the base draws without gradients, or another number of latents.
        """
        base = self.base(*context)
        if not base.has_rsample or base.event_shape != self.raw_step.shape:
            raise ValueError(
                f"Hamiltonian: base must have reparameterised draws of shape {tuple(self.raw_step.shape)}, got "
                f"{type(base).__name__} of shape {tuple(base.event_shape)}"
            )
        target = partial(_with_context, self.log_joint, context)
        return HamiltonianLaw(base, partial(leapfrog, target, step_size=self.step_size, spread=self.spread))


class HamiltonianLaw(TorchDistribution):  # type: ignore[misc]
    """Draws of a base distribution, moved: see `Hamiltonian`.

    Args:
        base: distribution with event (d,).
        move: map of draws and standard normal noise, (..., d), to moved draws and momenta, that keeps volumes.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: TorchDistribution, move: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.base, self.move = base, move
        self.drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> HamiltonianLaw:
        """Return one of a greater batch shape, with draws of its own for each of it."""
        return HamiltonianLaw(self.base.expand(batch_shape), self.move)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw from the base, and momenta, and move them, (*sample_shape, ..., d)."""
        start = self.base.rsample(sample_shape)
        noise = torch.randn_like(start)
        end, momentum = self.move(start, noise)
        gain = 0.5 * (momentum.square() - noise.square()).sum(-1)  # log N(noise) - log N(momentum)
        self.drawn = end, self.base.log_prob(start) + gain
        return end

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(z_0) + log N(noise; 0, I) - log N(ρ_K; 0, I) of the latest draw, in nats.

        Raises:
            ValueError: ``value`` is not that draw itself.
        """
        if self.drawn is None or value is not self.drawn[0]:
            raise ValueError(
                "Hamiltonian: its density is known at its own latest draw alone, not at other or changed values; "
                "use the estimator pathwise with a sampled KL, or its base as posterior"
            )
        return self.drawn[1]


def leapfrog(
    log_density: Callable[[Tensor], Tensor], z: Tensor, noise: Tensor, *, step_size: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """Hamiltonian dynamics of z and a momentum in steps that keep volumes (Neal 2011, section 2.3).

    Args:
        log_density: of z (..., d), one number for each, so that data do not mix.
        z: where to start, (..., d).
        noise: the momentum to start with in units of ``spread[0]``, (..., d).
        step_size: (d,).
        spread: standard deviations of momenta after 0 .. K steps, (K + 1,): all 1 if nothing is tempered, and in
            any case the last, so that (z, noise) keeps its volume.

    Returns:
        Position and momentum after K steps.
    """
    momentum = spread[0] * noise
    slope = _slope(log_density, z)
    for cooling in spread[1:] / spread[:-1]:
        half = momentum + 0.5 * step_size * slope
        z = z + step_size * half
        slope = _slope(log_density, z)
        momentum = cooling * (half + 0.5 * step_size * slope)
    return z, momentum


def _slope(log_density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """∇ log p at z, which is differentiable if gradients are on, and found if they are off, too."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        at = z if z.requires_grad else z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(log_density(at).sum(), at, create_graph=again)
    return slope


def _with_context(log_joint: LogDensity, context: tuple[Tensor, ...], z: Tensor) -> Tensor:
    return log_joint(z, *context)
