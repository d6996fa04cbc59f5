"""Exact sums over discrete latents as an estimator: no scores, no relaxation, and in a captured step.

The particles' dimension holds every category: C categories and K particles make C K rows, and in each row the
discrete draw is set to one of its values. A bound is then averaged over them by their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_vae.bounds import Bound, Grouped, elbo
from ppl_vae.layout import Layout, inspect
from ppl_vae.pairs import Pair
from ppl_vae.sites import Site, base, statements
from ppl_vae.traces import KL, check_table, log_density, run_guide, run_model, tabulate

__all__ = ["enumerated"]

_SCORES = "use an estimator by scores, such as leave_one_out with two particles, or a relaxed distribution"


def enumerated(
    bound: Bound, pair: Pair, *batch: Tensor, particles: int, beta: Tensor | float = 1.0, kl: KL = "sampled"
) -> Tensor:
    """Sum over the values of discrete latents, exactly; gradients of the others are pathwise.

    With y the discrete latents and z_k the others, drawn for each value of y, it returns

        Σ_y q(y | x) f(log w(y, z_1), ..., log w(y, z_K)),   z_k ~ q(z | x, y),

    the mean over q(y | x) of the bound of K particles that share y. For the ELBO this is eq. 7 of Kingma et al.
    (2014), with value and gradient of ``pyro.infer.TraceEnum_ELBO``; for other bounds it is a bound as well, by
    Jensen's inequality, and not the one of particles that each draw a y. There is no noise from y in it.

    The programs run on C K rows, C being how many values y has, or the product of these for several sites. A
    value of probability 0 exactly, as next to a known label, has no part, whatever its weight.

    Raises:
        ValueError: the guide has no discrete latent; one has no list of values, as several bits in one event and
            counts have none, is masked, or is inside an inner plate; the guide draws others before it, and the
            bound is not the ELBO. The message names the site.

    >>> import torch
    >>> import ppl_vae as pv
    >>> prior = pv.OneHotCategorical(pv.Constant(torch.zeros(3)))
    >>> posterior = pv.OneHotCategorical(pv.MLP(4, 8, 3))
    >>> vae = pv.VAE(prior, pv.Normal(pv.MLP(3, 8, 4), 1.0), posterior)
    >>> pv.ELBO(estimator=enumerated)(pv.as_pair(vae), torch.zeros(5, 4)).shape
    torch.Size([5])
    """
    check_table(pair, batch, particles)
    sizes = _sizes(pair.layout or inspect(pair, batch))
    categories = math.prod(sizes.values())
    rows = categories * particles
    with _Set(sizes, particles):
        guide = run_guide(pair, batch, rows)
    model = run_model(pair, batch, rows, guide)
    sites = statements(guide)
    terms = tabulate(model, guide, batch, rows, kl=kl)
    mass = log_density([sites[name] for name in sizes], batch, rows).exp()
    # Where there is no mass, a weight may be infinite; 0 times it, or times its gradient, must be 0.
    weight = terms.weight(beta).masked_fill(mass == 0, 0.0)
    if bound is elbo:  # linear: the probabilities may depend on what was drawn before
        return elbo((mass * weight).reshape(categories, particles, -1).sum(0))
    _require_first(sites, [*sizes])
    each = bound(Grouped(bound, categories).split(weight)).reshape(categories, -1)
    return (mass.reshape(categories, particles, -1)[:, 0] * each).sum(0)


class _Set(Messenger):  # type: ignore[misc]
    """Set discrete sites to their values: with others' combinations, each value on ``particles`` rows at a time.

    Args:
        sizes: site -> how many values it has.
        particles: rows of one combination.
    """

    def __init__(self, sizes: Mapping[str, int], particles: int) -> None:
        super().__init__()
        self.sizes, self.particles = sizes, particles

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.sizes:
            return
        fn, names = msg["fn"], [*self.sizes]
        after = math.prod(self.sizes[n] for n in names[names.index(msg["name"]) + 1 :]) * self.particles
        support = fn.enumerate_support(expand=False)
        size, before = len(support), fn.batch_shape[0] // (len(support) * after)
        one = (*(1 for _ in fn.batch_shape[1:]), *fn.event_shape)
        rows = support.reshape(1, size, 1, *one).expand(before, size, after, *one)
        msg["value"], msg["done"] = rows.flatten(0, 2).expand(fn.batch_shape + fn.event_shape), True


def _sizes(layout: Layout) -> dict[str, int]:
    """The discrete sites of a guide, in its order, and how many values each of them has.

    Raises:
        ValueError: there is none, or one of them cannot be summed over.
    """
    if not layout.values:
        raise ValueError(
            f"site {', '.join(map(repr, layout.latents))}: no discrete latent, so there is nothing to sum over; "
            "use the estimator pathwise"
        )
    for name, values in layout.values.items():
        if isinstance(values, str):
            raise ValueError(f"site {name!r}: {values}; {_SCORES}")
    return {name: values for name, values in layout.values.items() if isinstance(values, int)}


def _require_first(sites: Mapping[str, Site], names: list[str]) -> None:
    """Raise ValueError if draws that differ between particles come before a discrete site."""
    order = list(sites)
    before = order[: max(map(order.index, names))]
    drawn = [n for n in before if n not in names and not isinstance(base(sites[n]["fn"]), Delta)]
    if drawn:
        raise ValueError(
            f"site {names[-1]!r}: the guide draws {drawn[0]!r} before it, so that particles differ in its "
            "probabilities; only the ELBO can be summed then: use it, or draw the discrete latent first"
        )
