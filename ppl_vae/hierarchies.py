"""Programs with several levels of latents, z_L -> ... -> z_1 -> x, and their two kinds of guide.

The model draws from the top down. A guide from the bottom up (Burda et al. 2016) reads z_1 off x, z_2 off z_1,
and so on; the ladder (Sønderby et al. 2016) draws from the top down too, and corrects what the model itself
expects of each level by what x says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional

__all__ = ["HierarchicalVAE", "LadderVAE"]


class _Levels(nn.Module):
    """The generative half: z_L ~ p(z_L), z_l ~ p(z_l | s_{l+1}), x ~ p(x | s_1), and s_l = z_l without a path."""

    def __init__(
        self, priors: Sequence[Conditional], likelihood: Conditional, path: Sequence[nn.Module] | None
    ) -> None:
        super().__init__()
        if not priors:
            raise ValueError("priors: expected one per level, p(z1 | z2), ..., p(zL), got none")
        self.priors = nn.ModuleList(priors)
        self.likelihood = likelihood
        self.path = None if path is None else self._per_level("path", path)

    def _per_level(self, name: str, parts: Sequence[nn.Module]) -> nn.ModuleList:
        if len(parts) != len(self.priors):
            raise ValueError(f"{name}: expected one per level, as priors, {len(self.priors)}, got {len(parts)}")
        return nn.ModuleList(parts)

    def _register(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                pyro.module(name, getattr(self, name))

    def _descend(self, draw: Callable[[int, TorchDistribution], Tensor]) -> Tensor:
        """Draw every level from the top down, ``draw(level, prior)`` with levels from 0, and return s_1."""
        above: tuple[Tensor, ...] = ()
        for level in reversed(range(len(self.priors))):
            z = draw(level, self.priors[level](*above))
            above = (z if self.path is None else self.path[level](z, *above),)
        return above[0]

    def model(self, x: Tensor) -> None:
        """Declare z_L ~ p(z_L), ..., z_1 ~ p(z_1 | z_2), x ~ p(x | z_1) for a batch ``x`` (B, *event)."""
        self._register("priors", "likelihood", "path")
        with pyro.plate("data", len(x), dim=-1):
            state = self._descend(lambda level, prior: pyro.sample(_site(level), prior))
            pyro.sample("x", self.likelihood(state), obs=x)

    @torch.no_grad()
    def blank(self, size: int) -> tuple[Tensor, ...]:
        """A batch of the right shape, for sampling from the model: x is zeros (size, *event)."""
        state = self._descend(lambda level, prior: prior.sample())  # only its shape is used
        return (state.new_zeros(size, *self.likelihood(state).event_shape),)


class HierarchicalVAE(_Levels):
    """Any number of levels under a guide from the bottom up: q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1}).

    With two levels it is the deeper model of Burda et al. (2016, section 5). The guide draws in another order
    than the model, so that a closed KL holds for the top level alone: use ``kl="auto"`` or "sampled".

    Args:
        priors: p(z_1 | s_2), ..., p(z_{L-1} | s_L), p(z_L): one per level, from the level next to the data up.
        likelihood: p(x | s_1).
        posteriors: q(z_1 | x), q(z_2 | z_1), ..., q(z_L | z_{L-1}), in the same order.
        path: modules of a deterministic path, in the same order: s_L = path_L(z_L), s_l = path_l(z_l, s_{l+1}),
            for instance a `Concat`. Without one, s_l = z_l.

    Shapes: x is (B, *event); site "z1" is (K, B, d1) under K particles, and so on up.

    Raises:
        ValueError: no levels, or another number of posteriors or path modules than of priors.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.nets import MLP
    >>> from ppl_vae.posteriors import mean_field
    >>> from ppl_vae.priors import StandardNormal, conditional_normal
    >>> vae = HierarchicalVAE(
    ...     [conditional_normal(MLP(3, 8, 2 * 5)), StandardNormal(3)],
    ...     Bernoulli(MLP(5, 8, 16)),
    ...     [mean_field(MLP(16, 8, 2 * 5)), mean_field(MLP(5, 8, 2 * 3))],
    ... )
    >>> vae.blank(4)[0].shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        priors: Sequence[Conditional],
        likelihood: Conditional,
        posteriors: Sequence[Conditional],
        path: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__(priors, likelihood, path)
        self.posteriors = self._per_level("posteriors", posteriors)

    def guide(self, x: Tensor) -> None:
        """Declare z_1 ~ q(z_1 | x), z_2 ~ q(z_2 | z_1), ... for a batch ``x`` (B, *event)."""
        self._register("posteriors")
        with pyro.plate("data", len(x), dim=-1):
            below = x
            for level, posterior in enumerate(self.posteriors):
                below = pyro.sample(_site(level), posterior(below))


class LadderVAE(_Levels):
    """The ladder: any number of levels under a guide from the top down (Sønderby et al. 2016, section 2).

    A deterministic path goes up, d_1 = f_1(x), d_l = f_l(d_{l-1}), and gives each level its evidence
    N(z_l; m_l(d_l), v_l(d_l)). From the top down, q(z_L | x) is the evidence itself, and every level below it
    joins the evidence with the model's own p(z_l | s_{l+1}), weighted by their precisions: the generative path
    is shared. The guide draws in the model's order, so ``kl="analytic"`` holds.

    Args:
        priors: p(z_1 | s_2), ..., p(z_L), as in `HierarchicalVAE`; all but the last diagonal normals.
        likelihood: p(x | s_1).
        features: nets f_1 of x, f_2 of d_1, ..., f_L.
        evidence: diagonal normals given d_1, ..., d_L, for instance ``mean_field(nn.Linear(64, 2 * 5))``.
        path: modules of a deterministic path, shared by model and guide, as in `HierarchicalVAE`.

    Raises:
        ValueError: no levels, or another number of features, evidence or path modules than of priors; in use,
            evidence or a prior below the top that is no diagonal normal.
    """

    def __init__(
        self,
        priors: Sequence[Conditional],
        likelihood: Conditional,
        features: Sequence[nn.Module],
        evidence: Sequence[Conditional],
        path: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__(priors, likelihood, path)
        self.features = self._per_level("features", features)
        self.evidence = self._per_level("evidence", evidence)

    def guide(self, x: Tensor) -> None:
        """Declare z_L ~ q(z_L | x), ..., z_1 ~ q(z_1 | z_2, x) for a batch ``x`` (B, *event)."""
        self._register("features", "evidence", "priors", "path")
        found, below = [], x
        for net, evidence in zip(self.features, self.evidence, strict=True):
            below = net(below)
            found.append(evidence(below))

        def draw(level: int, prior: TorchDistribution) -> Any:
            top = level == len(found) - 1
            return pyro.sample(_site(level), found[level] if top else _joined(level, found[level], prior))

        with pyro.plate("data", len(x), dim=-1):
            self._descend(draw)


def _site(level: int) -> str:
    return f"z{level + 1}"


def _joined(level: int, evidence: TorchDistribution, prior: TorchDistribution) -> TorchDistribution:
    """The normal proportional to the product of two: means weighted by precisions, precisions added."""
    first, second = (getattr(d, "base_dist", d) for d in (evidence, prior))
    for fn in (first, second):
        if not isinstance(fn, dist.Normal):
            raise ValueError(
                f"site {_site(level)!r}: the ladder joins diagonal normals, got {type(fn).__name__}; below the "
                "top, give normal priors and evidence, such as conditional_normal(net) and mean_field(net)"
            )
    norm = torch.hypot(first.scale, second.scale)
    weight = (second.scale / norm).square()  # of the evidence: its precision's share
    loc = second.loc + weight * (first.loc - second.loc)
    return dist.Normal(loc, first.scale * (second.scale / norm)).to_event(evidence.event_dim)
