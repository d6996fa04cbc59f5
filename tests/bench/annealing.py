"""Annealed importance sampling of a VAE's decoder, written by hand in torch, as a peer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from workloads import JITTER, LEAPFROG, STEP

__all__ = ["anneal", "sigmoid"]

LogLikelihood = Callable[[Tensor], Tensor]
Place = tuple[Tensor, Tensor, Tensor]


def sigmoid(steps: int) -> list[float]:
    """β_0 = 0 to β_T = 1, closer together at both ends (Wu et al. 2017)."""
    curve = torch.sigmoid(4 * torch.linspace(-1, 1, steps + 1, dtype=torch.float64))
    return ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()


def look(log_likelihood: LogLikelihood, z: Tensor) -> Place:
    """A place (K, B, d), log p(x | z) there, (K, B), and its gradient in z: the only one that costs anything."""
    z = z.detach().requires_grad_()
    value = log_likelihood(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    return z.detach(), value.detach(), slope


def move(log_likelihood: LogLikelihood, here: Place, beta: float) -> Place:
    """Leapfrog steps from one place to another, accepted or not; one gradient for each step."""
    z, value, slope = here
    start = momentum = torch.randn_like(z)
    step = STEP * (1 + JITTER * (2 * torch.rand_like(value).unsqueeze(-1) - 1))
    for _ in range(LEAPFROG):
        half = momentum + 0.5 * step * (beta * slope - z)
        z, value, slope = look(log_likelihood, z + step * half)
        momentum = half + 0.5 * step * (beta * slope - z)
    gain = energy(z, value, momentum, beta) - energy(here[0], here[1], start, beta)
    accepted = torch.rand_like(gain) < gain.clamp(max=0).exp()
    wide = accepted.unsqueeze(-1)
    return (
        torch.where(wide, z, here[0]),
        torch.where(accepted, value, here[1]),
        torch.where(wide, slope, here[2]),
    )


def energy(z: Tensor, value: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The logarithm of p(z) p(x | z)^β and of the momentum's density, less constants, (K, B)."""
    return beta * value - 0.5 * (z.square().sum(-1) + momentum.square().sum(-1))


def anneal(log_likelihood: LogLikelihood, z: Tensor, betas: list[float]) -> Tensor:
    """Log weights (K, B) of particles that were drawn from the prior, (K, B, d)."""
    here = look(log_likelihood, z)
    weight = torch.zeros_like(here[1], dtype=torch.float64)
    for now, then in pairwise(betas):
        weight += (then - now) * here[1].double()
        if then < betas[-1]:
            here = move(log_likelihood, here, then)
    return weight
