"""Posteriors that are points of a codebook, and priors over such points: the two sides of a VQ-VAE's latent.

The latent is the grid of code vectors itself, channels first as convolutions take them: (K, B, D, *grid), or
(K, B, D) for one vector. Its draw carries the straight-through gradient, and the model needs nothing but z
(van den Oord et al. 2017). A code is one of finitely many and drawn for certain, so q(z | x) = 1 there, and
log p(x | z) + log p(z) is a lower bound on log p(x).

A VQ-VAE is thus a `ppl_vae.VAE` of ``CodePrior(UniformCodes(512, (7, 7)), book)``, any likelihood, and
``Quantised(net, book, event_dim=3)``, trained on ``ELBO(penalties=[Commitment()])``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.codebooks import Quantiser
from ppl_vae.conditionals import Conditional, at_least_one

__all__ = ["CodePrior", "EmbeddedCodes", "Quantised", "QuantisedPoint", "check_usage", "perplexity", "usage"]


class Quantised(Conditional):
    """q(z | x): the codes nearest to a net's features, for certain (van den Oord et al. 2017, eq. 1 and 2).

    Statistics of the codebook are taken whenever it runs in training mode; see `ppl_vae.codebooks.Codebook`.

    Args:
        net: module of the context giving features, (..., D, *grid).
        codebook: of features of D entries.
        event_dim: how many rightmost dimensions make one latent: 1 for a vector, 3 for a grid of height and width.

    Raises:
        ValueError: ``event_dim`` below one.

    >>> from ppl_vae.codebooks import Codebook
    >>> from ppl_vae.nets import MLP
    >>> Quantised(MLP(784, 200, 16), Codebook(512, 16))(torch.zeros(3, 784)).event_shape
    torch.Size([16])
    """

    def __init__(self, net: nn.Module, codebook: Quantiser, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(event_dim=event_dim)
        self.net, self.codebook, self.event_dim = net, codebook, event_dim

    def forward(self, *context: Tensor) -> QuantisedPoint:
        """Return the point with batch shape that of the context.

        Raises:
            ValueError: the net's features are not as wide as those of the codebook.
        """
        features, vectors, indices = self.codebook(self._features(*context))
        place = -self.event_dim
        return QuantisedPoint(
            features.movedim(-1, place),
            vectors.movedim(-1, place),
            indices,
            self.codebook,
            self.event_dim,
        )

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Put the codes at the k-means of the features of ``x`` (N, *event), in the mode that the net is in.

        Raises:
            ValueError: fewer features than codes; features of another width than the codebook's.
        """
        self.codebook.start_from(self._features(x))

    def _features(self, *context: Tensor) -> Tensor:
        """What the net gives, (..., *grid, D)."""
        features: Tensor = self.net(*context)
        if features.dim() < self.event_dim or features.shape[-self.event_dim] != self.codebook.width:
            grid = ", *grid" if self.event_dim > 1 else ""
            raise ValueError(
                f"net: with event_dim={self.event_dim} it must give features (..., {self.codebook.width}{grid}), "
                f"as wide as those of the codebook, got {tuple(features.shape)}"
            )
        return features.movedim(-self.event_dim, -1)


class QuantisedPoint(TorchDistribution):  # type: ignore[misc]
    """The code vectors of features, with probability one; a draw has the features' gradient, straight through.

    Args:
        features: (*batch, D, *grid).
        vectors: the codes that they were quantised to, of the same shape.
        indices: which codes these are, (*batch, *grid), or (*batch, *grid, books) of several codebooks.
        codebook: what quantised them.
        event_dim: how many rightmost dimensions make one latent.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - as torch has it
    has_rsample = True

    def __init__(
        self,
        features: Tensor,
        vectors: Tensor,
        indices: Tensor,
        codebook: Quantiser,
        event_dim: int = 1,
    ) -> None:
        self.features, self.vectors, self.indices, self.codebook = features, vectors, indices, codebook
        at = features.dim() - event_dim
        super().__init__(features.shape[:at], features.shape[at:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Code vectors."""
        return _CodeVectors(self.event_dim)

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.rsample()

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The code vectors, exactly, (*sample_shape, *batch, D, *grid); their gradient is that of the features."""
        moved = self.features - self.features.detach()  # zero: added to the vectors it rounds nothing
        point = self.vectors.detach() + self.codebook.share * moved
        return point.expand(*sample_shape, *point.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero where ``value`` is the point, which it is one of finitely many; minus infinity elsewhere."""
        same = (value == self.vectors).flatten(-self.event_dim).all(-1)
        return torch.where(same, 0.0, -torch.inf).to(value.dtype)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> QuantisedPoint:
        """Return it with another batch shape."""
        parts = (self.features, self.vectors, self.indices)
        at = len(self.batch_shape)
        features, vectors, indices = (part.expand(*batch_shape, *part.shape[at:]) for part in parts)
        return QuantisedPoint(features, vectors, indices, self.codebook, self.event_dim)


class CodePrior(Conditional):
    """p(z | c) over code vectors, from a conditional of their indices, such as `ppl_vae.UniformCodes`.

    Args:
        prior: conditional of whole numbers 0 .. K - 1, events (*grid), or (*grid, books) for several codebooks.
        codebook: that of the posterior, which registers it: its vectors are saved and moved there.

    >>> from ppl_vae.codebooks import Codebook
    >>> from ppl_vae.priors import UniformCodes
    >>> CodePrior(UniformCodes(512, (7, 7)), Codebook(512, 16))().event_shape
    torch.Size([16, 7, 7])
    """

    def __init__(self, prior: Conditional, codebook: Quantiser) -> None:
        super().__init__()
        self.prior = prior
        self.__dict__["codebook"] = codebook  # unregistered: one tensor is saved under one name

    def forward(self, *context: Tensor) -> EmbeddedCodes:
        """Return the distribution with batch shape that of the prior over indices.

        Raises:
            ValueError: that prior has more values than there are codes, or events of no grid of indices.
        """
        codebook: Quantiser = self.__dict__["codebook"]
        law = self.prior(*context)
        values, books = _most(law.support), codebook.books
        if values is not None and values > codebook.codes:
            raise ValueError(
                f"prior: it has {values} values at each place, and the codebook {codebook.codes} codes"
            )
        if books is not None and law.event_shape[-1:] != (books,):
            raise ValueError(
                f"prior: its events must be (*grid, {books}) for {books} codebooks, got {tuple(law.event_shape)}"
            )
        return EmbeddedCodes(law, codebook)


def _most(support: Any) -> int | None:
    """How many values whole numbers from zero have, within a support; None where it does not tell."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    most = getattr(support, "upper_bound", None)
    return most + 1 if isinstance(most, int) else None


class EmbeddedCodes(TorchDistribution):  # type: ignore[misc]
    """A distribution of grids of indices, as one of the grids of their vectors.

    Args:
        law: of indices, events (*grid), or (*grid, books).
        codebook: what has the vectors.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - as torch has it

    def __init__(self, law: TorchDistribution, codebook: Quantiser) -> None:
        self.law, self.codebook = law, codebook
        grid = law.event_shape if codebook.books is None else law.event_shape[:-1]
        super().__init__(law.batch_shape, torch.Size((codebook.parts, *grid)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Code vectors."""
        return _CodeVectors(self.event_dim)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw, (*sample_shape, *batch, D, *grid)."""
        return self._embedded(self.law.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the indices of ``value``, in nats; minus infinity where it is no code.

        Gradients go to the distribution of indices, and never to ``value``: a step away it has no probability.
        """
        with torch.no_grad():
            indices = self.codebook.find(value.movedim(-self.event_dim, -1))
            near = torch.isclose(self._embedded(indices), value, rtol=1e-4, atol=1e-6)
        log_prob: Tensor = self.law.log_prob(indices)
        return torch.where(near.flatten(-self.event_dim).all(-1), log_prob, -torch.inf)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> EmbeddedCodes:
        """Return it with another batch shape."""
        return EmbeddedCodes(self.law.expand(batch_shape), self.codebook)

    def _embedded(self, indices: Tensor) -> Tensor:
        return self.codebook.embed(indices).movedim(-1, -self.event_dim)


class _CodeVectors(constraints.Constraint):
    """Grids of code vectors: finitely many, so that no density, slope or transformation of them makes sense."""

    is_discrete = True

    def __init__(self, event_dim: int) -> None:
        self._event_dim = event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """How many rightmost dimensions make one grid."""
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        """Whether values are finite; ``log_prob`` tells whether they are codes."""
        return value.isfinite().flatten(-self._event_dim).all(-1)


def usage(indices: Tensor, codes: int) -> float:
    """The share of a codebook's codes that occur in ``indices``, of any shape.

    Raises:
        ValueError: no indices, or some that are no codes.

    >>> usage(torch.tensor([0, 0, 3]), codes=8)
    0.25
    """
    return float((_shares(indices, codes) > 0).double().mean())


def perplexity(indices: Tensor, codes: int) -> float:
    """exp(-Σ p log p) of the shares p of codes in ``indices``: how many codes are in use, counted by how much.

    Args:
        indices: of one codebook, of any shape; ``indices[..., i]`` where there are several.
        codes: K, which is the most that it can be; 1 is the least.

    Raises:
        ValueError: no indices, or some that are no codes.

    >>> round(perplexity(torch.tensor([0, 1, 2, 3]), codes=8), 6)
    4.0
    """
    return float(torch.special.entr(_shares(indices, codes)).sum().exp())


def check_usage(indices: Tensor, codes: int) -> None:
    """Warn of a collapsed codebook: a perplexity below 2, or less than a tenth in use of the codes that could be.

    Args:
        indices: codes of many data, of one codebook.
        codes: K.

    Raises:
        ValueError: no indices, or some that are no codes.
    """
    used, effective = round(usage(indices, codes) * codes), perplexity(indices, codes)
    if effective < min(2.0, codes / 2) or used < min(codes, indices.numel()) / 10:
        warnings.warn(
            f"usage: {used} of {codes} codes are in use, with a perplexity of {effective:.1f}: the codebook has "
            "collapsed; put its codes at the data with start_from, revive unused ones sooner, or change the "
            "weight of Commitment",
            UserWarning,
            stacklevel=2,
        )


def _shares(indices: Tensor, codes: int) -> Tensor:
    """How often each code occurs, (codes,), of a sum of one."""
    at_least_one(codes=codes)
    if not indices.numel() or indices.is_floating_point():
        raise ValueError(f"indices: expected whole numbers, got shape {tuple(indices.shape)} {indices.dtype}")
    if int(indices.min()) < 0 or int(indices.max()) >= codes:
        raise ValueError(f"indices must lie in 0 .. {codes - 1}, got {int(indices.min())} .. {int(indices.max())}")
    return torch.bincount(indices.flatten(), minlength=codes).double() / indices.numel()
