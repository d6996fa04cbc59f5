"""Distributions moved and widened: what proposals and refined guides make of what a guide draws from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import AffineTransform, Independent, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint

from ppl_vae.graphs import capturing
from ppl_vae.pairs import Pair
from ppl_vae.sites import CIRCULAR, Site, base

__all__ = ["Moving", "Within", "moved"]


def moved(fn: TorchDistribution, factor: Tensor | float, shift: Tensor | None = None) -> TorchDistribution:
    """The law of m + shift s + factor (z - m), for z of a distribution of mean m and standard deviation s.

    Inside of masks, which leave nothing of the change of volume. A normal remains one, with its closed KL.

    Args:
        fn: the distribution, over all real numbers.
        factor: of the spread, a number, or one for each entry of a draw.
        shift: in standard deviations, likewise; none where it is left out.
    """
    if isinstance(fn, Independent):
        return moved(fn.base_dist, factor, shift).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return moved(fn.base_dist, factor, shift).mask(fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return moved(fn.base_dist, factor, shift).expand(fn.batch_shape)
    mean = fn.mean
    centre = mean if shift is None else mean + shift * fn.stddev
    if isinstance(fn, torch.distributions.Normal):
        return dist.Normal(centre, factor * fn.scale)
    return _Moved(fn, [AffineTransform(centre - factor * mean, factor, event_dim=fn.event_dim)])


class _Moved(dist.TransformedDistribution):  # type: ignore[misc]
    """A distribution moved by an affine map of each entry, and its mean with it."""

    @property
    def mean(self) -> Tensor:
        (change,) = self.transforms
        mean: Tensor = change(self.base_dist.mean)
        return mean


class Moving(Messenger):  # type: ignore[misc]
    """Put something else in the place of each distribution that a guide draws from; points stay points.

    Args:
        change: a site -> what to draw from instead.
        advice: what to do about a site that cannot be moved.
        spread: whether its standard deviation is needed too.
    """

    def __init__(self, change: Callable[[Site], TorchDistribution], advice: str, spread: bool = False) -> None:
        super().__init__()
        self.change, self.advice, self.spread = change, advice, spread

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or isinstance(base(msg["fn"]), Delta):
            return
        if not capturing():  # looked at when the program runs as it is, as it does first
            self.check(msg)
        msg["fn"] = self.change(msg)

    def check(self, site: Site) -> None:
        """Raise ValueError, naming the site, if its distribution cannot be moved."""
        name, fn, family = site["name"], site["fn"], type(base(site["fn"])).__name__
        support = fn.support
        while isinstance(support, constraints.independent | MixtureSameFamilyConstraint):
            support = support.base_constraint
        if support is not constraints.real or isinstance(base(fn), CIRCULAR):
            raise ValueError(
                f"site {name!r}: the support of {family} is not all real numbers, and what is moved leaves it; "
                f"{self.advice}"
            )
        known = "mean and standard deviation" if self.spread else "mean"
        unknown = f"site {name!r}: no finite {known} of {family} is known, by which to move it; {self.advice}"
        try:
            found = fn.mean + fn.stddev if self.spread else fn.mean
        except NotImplementedError as error:
            raise ValueError(unknown) from error
        location = getattr(
            base(fn), "loc", found
        )  # which training may have brought to NaN: another error tells that
        if bool((location.isfinite() & ~found.isfinite()).any()):
            raise ValueError(unknown)


class Within(Pair):
    """A pair that runs another one's programs, the guide within a context, and shares its parameters.

    Args:
        pair: the other one.
        context: gives the context, anew for each run.
    """

    original: Pair

    def __init__(self, pair: Pair, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(*pair.callables)
        self.params, self.expected, self.layout = pair.params, pair.expected, pair.layout
        self.__dict__["original"] = pair  # no submodule: its modules are registered above, under the same names
        self.context = context

    def model(self, *batch: Tensor, **options: Any) -> Any:
        """Run the model."""
        return self.original.model(*batch, **options)

    def guide(self, *batch: Tensor, **options: Any) -> Any:
        """Run the guide, in its context."""
        with self.context():
            return self.original.guide(*batch, **options)
