"""Posteriors q(z | x, c): the families a guide draws its latents from.

Discrete and relaxed ones are in `ppl_vae.discrete`, a few leapfrog steps on any of them in `ppl_vae.hamiltonian`.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.special import ndtr

from ppl_vae.conditionals import Conditional, NetScale, Normal, at_least_one, bounded
from ppl_vae.divergences import FullNormal, LowRankNormal

__all__ = ["FullCovariance", "LowRank", "MixtureOfNormals", "NormalMixture", "Point", "mean_field"]


def mean_field(net: nn.Module) -> Normal:
    """q(z | x) = N(μ(x), diag σ²(x)) (Kingma & Welling 2014, eq. 9); ``net`` gives ``2 * latent`` numbers.

    >>> import torch
    >>> from ppl_vae.nets import MLP
    >>> mean_field(MLP(784, 200, 2 * 20))(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """
    return Normal(net, NetScale())


class FullCovariance(Conditional):
    """q(z | x) = N(μ(x), L(x) L(x)ᵀ), L lower triangular (Kingma & Welling 2019, section 2.5.1).

    L = diag(σ) (I + B / d) with B strictly lower triangular, so that row i of L is σ_i times that of I + B / d.
    Every normal can be had so, and with the small B of an untrained net the latents are almost independent. (With
    the entries of L themselves from the net, the ELBO was 10 nats lower after 3 passes over MNIST, 20 latents.)

    Its KL to a standard or learned diagonal normal is a closed form.

    Args:
        net: module of the context giving d + d (d + 1) / 2 numbers: d of location and d of log σ, as for
            `mean_field`, then the d (d - 1) / 2 entries of B, row by row.

    >>> from ppl_vae.nets import MLP
    >>> FullCovariance(MLP(784, 200, 20 + 210))(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the normal with batch shape that of the context, event (d,).

        Raises:
            ValueError: the width of the net is that of no d.
        """
        raw: Tensor = self.net(*context)
        d = (math.isqrt(9 + 8 * raw.shape[-1]) - 3) // 2
        if d < 1 or d * (d + 3) // 2 != raw.shape[-1]:
            raise ValueError(
                "FullCovariance: the net must give d + d (d + 1) / 2 numbers for d latents (2, 5, 9, 14, ...), "
                f"got {raw.shape[-1]}"
            )
        loc, log_scale, below = _split(raw, [d, d, d * (d - 1) // 2], "FullCovariance")
        row, column = torch.tril_indices(d, d, -1, device=raw.device)
        lower = raw.new_zeros(*raw.shape[:-1], d * d).index_copy(-1, row * d + column, below)
        scale = bounded(log_scale).exp()
        lower = lower.reshape(*raw.shape[:-1], d, d) * (scale / d).unsqueeze(-1)
        return FullNormal(loc, scale_tril=lower + scale.diag_embed())


class LowRank(Conditional):
    """q(z | x) = N(μ(x), W(x) W(x)ᵀ + diag σ²(x)) with W of ``rank`` columns (Ong, Nott & Smith 2018).

    W = diag(σ) B / latent, for the reasons given at `FullCovariance`. Its KL to a standard or learned diagonal
    normal is a closed form.

    Args:
        net: module of the context giving ``latent * (2 + rank)`` numbers: locations and log-scales, as for
            `mean_field`, then B row by row.
        latent: how many latents.
        rank: columns of W, from 1 to ``latent``.

    Raises:
        ValueError: sizes out of range.

    >>> from ppl_vae.nets import MLP
    >>> LowRank(MLP(784, 200, 20 * 4), latent=20, rank=2)(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def __init__(self, net: nn.Module, latent: int, rank: int) -> None:
        super().__init__()
        at_least_one(latent=latent, rank=rank)
        if rank > latent:
            raise ValueError(f"rank must be at most latent, {latent}, got {rank}; for more use FullCovariance")
        self.net, self.latent, self.rank = net, latent, rank

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the normal with batch shape that of the context, event (latent,)."""
        d, r = self.latent, self.rank
        loc, log_scale, factor = _split(self.net(*context), [d, d, d * r], "LowRank")
        scale = bounded(log_scale).exp()
        factor = factor.reshape(*factor.shape[:-1], d, r) * (scale / d).unsqueeze(-1)
        return LowRankNormal(loc, factor, scale.square())


class MixtureOfNormals(Conditional):
    """q(z | x) = Σ π_j(x) N(μ_j(x), diag σ_j²(x)): several modes, with draws that carry gradients, weights' too.

    Args:
        net: module of the context giving ``components * (1 + 2 * latent)`` numbers: logits of the weights, then
            the locations component by component, then the log-scales.
        latent: how many latents.
        components: how many normals.

    Raises:
        ValueError: sizes below one.

    >>> from ppl_vae.nets import MLP
    >>> MixtureOfNormals(MLP(784, 200, 5 * 41), latent=20, components=5)(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def __init__(self, net: nn.Module, latent: int, components: int) -> None:
        super().__init__()
        at_least_one(latent=latent, components=components)
        self.net, self.latent, self.components = net, latent, components

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the mixture with batch shape that of the context, event (latent,)."""
        m, d = self.components, self.latent
        logits, locs, log_scales = _split(self.net(*context), [m, m * d, m * d], "MixtureOfNormals")
        shape = (*logits.shape, d)
        return NormalMixture(locs.reshape(shape), bounded(log_scales).exp().reshape(shape), logits)


class Point(Conditional):
    """q(z | x) = δ(z - f(x)): the encoder of an autoencoder.

    The density of a point counts as 1, so the ELBO is log p(x | z) + log p(z) at z = f(x): with a normal prior an
    autoencoder whose codes are drawn to the origin. With ``beta=0`` the prior is ignored, and it is a plain one.
    Neither is a bound on log p(x).

    Args:
        net: module of the context giving z.
        event_dim: how many rightmost dimensions make one latent.

    >>> from ppl_vae.nets import MLP
    >>> Point(MLP(784, 200, 20))(torch.zeros(3, 784)).event_shape
    torch.Size([20])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        self.net, self.event_dim = net, event_dim

    def forward(self, *context: Tensor) -> TorchDistribution:
        """Return the point with batch shape that of the context."""
        return dist.Delta(self.net(*context), event_dim=self.event_dim)


class NormalMixture(dist.MixtureOfDiagNormals):  # type: ignore[misc]
    """Pyro's mixture of diagonal normals, (..., M, d), with gradients of draws that hold for any d and scale.

    A draw moves with the parameters as the density does: dz/dθ = v solves ∂q/∂θ + ∇·(q v) = 0, the transport
    equation, which makes ∇ E f(z) = E[∇f · v] (Jankowiak & Karaletsos 2019). A component's location and scale
    move it as they move that component, times the component's share of the density at z. Weights move it by a
    flow of mass between components, see ``_flows``. (Pyro's own gradients, as of 1.9.1, are biased in the
    weights, and take ratios of densities, which leave the range of float32 beyond some tens of latents.)
    """

    @property
    def mean(self) -> Tensor:
        """Σ π_j μ_j, (..., d)."""
        mean: Tensor = (self.probs.unsqueeze(-1) * self.locs).sum(-2)
        return mean

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw a component, and from it, (*sample_shape, ..., d)."""
        with torch.no_grad():
            which = self.categorical.sample(sample_shape)[..., None, None]
            index = which.expand(*which.shape[:-1], self.dim)
            loc, scale = (
                p.expand(*sample_shape, *p.shape).gather(-2, index).squeeze(-2)
                for p in (self.locs, self.coord_scale)
            )
            z = loc + scale * torch.randn_like(loc)
        return self.moving(z) if torch.is_grad_enabled() else z

    def moving(self, z: Tensor) -> Tensor:
        """The constant ``z`` (..., d) with the gradient that a draw has in the parameters."""
        with torch.no_grad():
            noise = (z.unsqueeze(-2) - self.locs) / self.coord_scale
            log_each = self.categorical.logits + _log_normal(noise, self.coord_scale).sum(-1)
            share = log_each.softmax(-1).unsqueeze(-1)
            flows = self._flows(z, noise, log_each.logsumexp(-1)[..., None, None])
        moved = (share * (self.locs + self.coord_scale * noise)).sum(-2)
        moved = moved + (self.probs.unsqueeze(-1) * flows).sum(-2)
        draw: Tensor = z + (moved - moved.detach())
        return draw

    def _flows(self, z: Tensor, noise: Tensor, log_q: Tensor) -> Tensor:
        """How z moves per weight given to component j, (..., M, d): ∇·(q v_j) = r - q_j for some density r.

        Weights sum to one, so that r, the same for all j, cancels. On its way there, N(μ_j, σ_j²) shrinks to
        N(μ_j, s²), one dimension after another, with s the least scale of all; then it moves to N(m, s²), with m
        the mean of the mixture, straight on. Either step is a flow in one dimension, a difference of
        distribution functions, times a density of the others. Narrow on the way, its variance is finite.
        """
        least = self.coord_scale.amin(-2, keepdim=True)
        thin = (z.unsqueeze(-2) - self.locs) / least
        log_wide, log_thin = _log_normal(noise, self.coord_scale), _log_normal(thin, least)
        others = log_thin.cumsum(-1) - log_thin + log_wide.sum(-1, keepdim=True) - log_wide.cumsum(-1)
        shrink = (others - log_q).exp() * _probability(noise, thin)
        gap = (self.mean.unsqueeze(-2) - self.locs) / least
        length = gap.norm(dim=-1, keepdim=True)
        ahead = gap / length.clamp_min(torch.finfo(gap.dtype).tiny)
        at = (thin * ahead).sum(-1, keepdim=True)
        beside = log_thin.sum(-1, keepdim=True) + 0.5 * (at.square() + math.log(2 * math.pi))
        move = least * ahead * (beside - log_q).exp() * _probability(at, at - length)
        flows: Tensor = -(shrink + move)
        return flows


def _log_normal(noise: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * (noise.square() + math.log(2 * math.pi)) - scale.log()


def _probability(upper: Tensor, lower: Tensor) -> Tensor:
    """Φ(upper) - Φ(lower), in the tail where both are small: near one, their difference would be rounding."""
    right = upper + lower > 0
    return torch.where(right, ndtr(-lower) - ndtr(-upper), ndtr(upper) - ndtr(lower))


def _split(raw: Tensor, sizes: list[int], family: str) -> tuple[Tensor, ...]:
    """Parts of a net's output along the last dimension."""
    if raw.shape[-1] != sum(sizes):
        raise ValueError(f"{family}: the net must give {sum(sizes)} numbers, got {raw.shape[-1]}")
    return torch.split(raw, sizes, dim=-1)
