"""What Pyro's handlers record of one statement, read in one place."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

__all__ = [
    "CIRCULAR",
    "Site",
    "base",
    "data_first",
    "family",
    "hand_scale",
    "masked",
    "mean_of",
    "plate_shape",
    "statements",
]

Site = dict[str, Any]
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises)  # their support is called real, and is not
WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)


def statements(trace: Any) -> dict[str, Site]:
    """The sample statements of a trace, in order, without subsampling and ``pyro.deterministic``."""
    nodes = prune_subsample_sites(trace).nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    }


def family(site: Site) -> str:
    """The name of a site's distribution, looking inside Independent, Masked and Expanded ones."""
    return type(base(site["fn"])).__name__


def base(fn: Any) -> Any:
    """The distribution of one entry, inside Independent, Masked and Expanded ones; a transformed one is itself."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def masked(fn: Any) -> bool:
    """Whether a distribution is masked, inside Independent and Expanded ones too."""
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def mean_of(site: Site) -> Tensor:
    """The mean of a site's distribution; its value where the distribution has none, as a category has none."""
    value: Tensor = site["value"]
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        return value
    undefined = mean.isnan()
    if bool(undefined.all()):
        return value  # in its own type: a program may index with a category
    return torch.where(undefined, value.to(mean), mean)


def plate_shape(site: Site) -> tuple[int, ...] | None:
    """The shape that a site's plates give its log-density; None if no data plate (dim -1) is among them."""
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    if -1 not in sizes:
        return None
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0))


def data_first(site: Site, value: Tensor) -> Tensor:
    """A value (*plates, B, *event) as (B, *plates, *event), less dimensions of plates that the site is not in."""
    event = site["fn"].event_dim
    depth = value.dim() - event
    sizes = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    if depth < 2 or -1 not in sizes:
        return value
    absent = tuple(depth + dim + 1 for dim in range(-depth, -1) if dim not in sizes)
    return value.movedim(depth - 1, 0).squeeze(absent)


def hand_scale(site: Site) -> Any:
    """A site's scale less the N/B of its data plate: what ``poutine.scale`` and inner plates put on it."""
    factor = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.dim == -1:
            factor = (frame.full_size or frame.size) / frame.size
    scale = site["scale"] / factor
    return scale if torch.is_tensor(scale) else (1.0 if abs(scale - 1.0) < 1e-9 else float(scale))
