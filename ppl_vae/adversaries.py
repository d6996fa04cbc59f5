"""Penalties that a critic estimates: the log-ratio of two densities that only draws are known of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from ppl_vae.objectives import Objective, Part
from ppl_vae.pairs import Batch, Pair
from ppl_vae.penalties import Penalty, Sites, features, one_latent
from ppl_vae.traces import run_pair

__all__ = ["Adversary", "Contrast", "Critic"]

Contrast = Literal["prior", "product"]


class Adversary(Penalty):
    """weight * E_q[log r(z)], with r a density ratio that a critic learns in a step of its own.

    Against the "product" of the aggregate's marginals, log r estimates the total correlation (FactorVAE, Kim &
    Mnih 2018, eq. 3); against the "prior", KL(q(z) || p(z)), which with ``ELBO(beta=0)`` makes an adversarial
    autoencoder (Makhzani et al. 2016, with the ratio's loss in place of the non-saturating one). The estimate is
    as good as the critic, and no bound.

    Args:
        weight: of the penalty.
        critic: module (..., d) -> (..., 1), the logit of "drawn by the guide".
        against: "product" or "prior".
        site: the latent; may be left out where there is one.
        optimizer: parameters -> torch optimizer of the critic; by default as the pair's.

    Raises:
        ValueError: a negative weight, unknown ``against``; when run, no such site, or several and none named.
    """

    def __init__(
        self,
        weight: float,
        critic: nn.Module,
        against: Contrast = "product",
        site: str | None = None,
        optimizer: Callable[[list[nn.Parameter]], Any] | None = None,
    ) -> None:
        super().__init__(weight)
        if against not in ("product", "prior"):
            raise ValueError(f"against must be 'product' or 'prior', got {against!r}")
        self.critic, self.against, self.site, self.optimizer = critic, against, site, optimizer

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted log-ratio, a mean over particles for each datum, (B,)."""
        site = guide[one_latent(model, self.site)]
        z = features(site, site["value"])
        # What the pair maximises must not move the critic, which is trained to tell, and not to be told.
        held = {name: p.detach() for name, p in self.critic.named_parameters()}
        ratio: Tensor = functional_call(self.critic, held, (z,)).squeeze(-1)
        return self.weight * ratio.mean(0)

    def parts(self) -> tuple[Part, ...]:
        """The critic's step."""
        return (Part("the critic's objective", Critic(self), (self.critic,), self.optimizer),)


class Critic(Objective):
    """What a critic maximises: log D of the guide's draws, and log(1 - D) of the others."""

    def __init__(self, adversary: Adversary) -> None:
        super().__init__()
        self.adversary = adversary

    def forward(self, pair: Pair, *batch: Tensor) -> Tensor:
        """Return the log-likelihood of telling them apart, (B,)."""
        with torch.no_grad():
            model, guide = run_pair(pair, batch, 1)
            name = one_latent(model, self.adversary.site)
            z = features(guide[name], guide[name]["value"])[0]
            other = _permuted(z) if self.adversary.against == "product" else _from_prior(model[name], guide[name])
        critic = self.adversary.critic
        return (logsigmoid(critic(z)) + logsigmoid(-critic(other))).squeeze(-1)


def _from_prior(model: Any, guide: Any) -> Tensor:
    """As many draws from the prior, (B, d)."""
    return features(guide, model["fn"].sample())[0]


def _permuted(z: Tensor) -> Tensor:
    """Each column in an order of its own, (B, d): draws from the product of the marginals."""
    return z.gather(0, torch.rand_like(z).argsort(0))
