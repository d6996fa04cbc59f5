"""Penalties: what an objective is lowered by besides its bound, such as free bits, total correlation or MMD.

A penalty is a callable ``penalty(model, guide, batch) -> Tensor`` of shape (B,) or (), to be subtracted, its
weight included. ``model`` and ``guide`` are what `ppl_vae.traces.run_pair` gives of one run: site name -> Pyro
site, with values (K, B, *event). Nothing in it reads a number back. Weights and targets are buffers, for a hook to
anneal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae.conditionals import at_least_one
from ppl_vae.nets import refuse_mixing
from ppl_vae.objectives import Part
from ppl_vae.pairs import Batch
from ppl_vae.sites import Site, base, family
from ppl_vae.traces import by_datum, mean_field_problem, site_kl

__all__ = [
    "MMD",
    "Capacity",
    "DecoderL2",
    "FreeBits",
    "GradientPenalty",
    "Penalty",
    "Sites",
    "TotalCorrelation",
    "features",
    "one_latent",
    "squared_mmd",
]

Sites = dict[str, Site]
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of MMD's kernels
Kernel = Literal["imq", "rbf"]


class Penalty(nn.Module, ABC):
    """What an objective is lowered by: ``forward(model, guide, batch) -> (B,) or ()``, nats per datum.

    Args:
        weight: factor of the penalty, a buffer.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    weight: Tensor

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self._number("weight", weight)

    @abstractmethod
    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return what is to be subtracted, for each datum or the same for all."""

    def parts(self) -> tuple[Part, ...]:
        """Optimizer steps that the penalty needs besides the pair's, such as a critic's."""
        return ()

    def _number(self, name: str, value: float) -> None:
        """Keep a number as a buffer, for a hook to change."""
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
        self.register_buffer(name, torch.tensor(float(value)))


class FreeBits(Penalty):
    """Σ_j max(least - KL_j, 0): each group of latents costs at least ``least`` nats (Kingma et al. 2016, eq. 15).

    KL_j is a mean over the batch. With an ELBO, whose KL goes on counting, a group below its allowance costs
    ``least`` and has no gradient to shrink further. That needs the same KL on both sides: ``kl="analytic"`` or
    ``"auto"`` in the ELBO (a sampled one cancels in the mean), and ``weight`` equal to its beta.

    Args:
        least: nats per group, a buffer.
        per: "dimension", each entry of each latent a group, for latents that guide and model draw as independent
            entries; or "site".
        weight: factor of the penalty.

    Raises:
        ValueError: a negative number, unknown ``per``; when run, a site without independent entries.
    """

    least: Tensor

    def __init__(self, least: float, per: Literal["dimension", "site"] = "dimension", weight: float = 1.0) -> None:
        super().__init__(weight)
        if per not in ("dimension", "site"):
            raise ValueError(f"per must be 'dimension' or 'site', got {per!r}")
        self._number("least", least)
        self.per = per

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the missing nats, ()."""
        return self.weight * (self.least - self.groups(model, guide)).relu().sum()

    def groups(self, model: Sites, guide: Sites) -> Tensor:
        """The KL of each group, a mean over particles and data, in nats."""
        kl = _entry_kl if self.per == "dimension" else _whole_kl
        return torch.cat([kl(name, model, guide).mean((0, 1)) for name in _latents(model)])


class Capacity(Penalty):
    """weight * |KL - target|: the KL is held at a number of nats (Burgess et al. 2018, eq. 8).

    The KL is the batch's mean, of all latents together. To be used with ``ELBO(beta=0)``, and a target that rises:
    ``Anneal(capacity.target, linear(0.0, 25.0, steps))``.

    Args:
        weight: γ of the paper.
        target: C of the paper, in nats; a buffer.

    Raises:
        ValueError: a negative number.
    """

    target: Tensor

    def __init__(self, weight: float, target: float) -> None:
        super().__init__(weight)
        self._number("target", target)

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted distance from the target, ()."""
        total = torch.stack([_whole_kl(name, model, guide).mean() for name in _latents(model)]).sum()
        return self.weight * (total - self.target).abs()


class TotalCorrelation(Penalty):
    """weight * KL(q(z) || Π_j q(z_j)), estimated within a batch (Chen et al. 2018, eq. 2 and 3).

    The KL of an ELBO is the sum of index-code mutual information, total correlation and dimension-wise KL. The
    β-TCVAE's β is thus a weight of β - 1 here, beside an ELBO. The aggregate q(z) is taken by minibatch-weighted
    sampling, which is biased: its parts are of use in training, and poor estimates of themselves.

    Args:
        size: N, how many data there are in all.
        weight: of the total correlation.
        site: the latent; may be left out where there is one. Its guide must not depend on other latents.

    Raises:
        ValueError: size below one, a negative weight; when run, no such site, several latents and none named, a
            guide that does not draw independent entries, masks, or plates inside the data plate.
    """

    def __init__(self, size: int, weight: float, site: str | None = None) -> None:
        super().__init__(weight)
        at_least_one(size=size)
        self.size, self.site = size, site

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted total correlation, one term per datum, (B,)."""
        return self.weight * self.decomposition(model, guide)[1]

    def decomposition(self, model: Sites, guide: Sites) -> tuple[Tensor, Tensor, Tensor]:
        """Mutual information, total correlation, dimension-wise KL: three (B,) whose sum is log q - log p."""
        name = one_latent(model, self.site)
        site, z = guide[name], guide[name]["value"]
        entry, event = entries(site), site["fn"].event_dim
        if by_datum(site, z).dim() != 2 + event:
            raise ValueError(f"site {name!r}: it stands in a plate inside the data plate, which has no aggregate")
        at = z.dim() - event - 1  # of the data; plates that the site is not in have left ones before it
        rows = z.shape[at]
        drawn = z.movedim(at, 0).unsqueeze(at + 1)  # (B, K, 1, *event): each datum's draws, under the q of all
        pairs = entry.log_prob(drawn.expand(rows, *z.shape)).reshape(rows, len(z), rows, -1)
        log_count = math.log(self.size * rows)
        joint = (pairs.sum(-1).logsumexp(-1) - log_count).T  # (K, B), log q(z)
        product = (pairs.logsumexp(2) - log_count).sum(-1).T  # Σ log q(z_j)
        given, prior = (s["fn"].log_prob(z).reshape(-1, rows) for s in (site, model[name]))
        return (given - joint).mean(0), (joint - product).mean(0), (product - prior).mean(0)


class MMD(Penalty):
    """weight * MMD²(q(z), p(z)), between a batch's draws and as many from the prior, without bias.

    As the only force on the aggregate it makes a Wasserstein autoencoder: ``ELBO(beta=0)`` (Tolstikhin et al.
    2018, eq. 4 and algorithm 2); beside a weaker KL, the InfoVAE: ``ELBO(beta=1 - alpha)`` (Zhao et al. 2017).
    A single batch's value may be negative.

    Args:
        weight: λ of the former, α + λ - 1 of the latter.
        kernel: "imq", C / (C + |a - b|²), or "rbf", exp(-|a - b|² / C).
        scales: kernels summed; C is a scale times 2 d, the mean squared distance of two draws of N(0, I).
        site: the latent; may be left out where there is one.

    Raises:
        ValueError: a negative weight, an unknown kernel, scales that are not positive; when run, no such site,
            several latents and none named, or a batch of one datum.
    """

    def __init__(
        self,
        weight: float,
        kernel: Kernel = "imq",
        scales: Sequence[float] = SCALES,
        site: str | None = None,
    ) -> None:
        super().__init__(weight)
        if kernel not in ("imq", "rbf"):
            raise ValueError(f"kernel must be 'imq' or 'rbf', got {kernel!r}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be one or more positive numbers, got {scales}")
        self.kernel, self.scales, self.site = kernel, tuple(scales), site

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted discrepancy, ()."""
        name = one_latent(model, self.site)
        prior = model[name]["fn"]
        drawn = prior.rsample() if prior.has_rsample else prior.sample()
        z, fresh = (features(guide[name], v) for v in (guide[name]["value"], drawn))
        return self.weight * squared_mmd(z, fresh, self.kernel, self.scales).mean()  # over particles


def squared_mmd(first: Tensor, second: Tensor, kernel: Kernel = "imq", scales: Sequence[float] = SCALES) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3).

    Args:
        first: points (..., n, d).
        second: points (..., n, d).
        kernel: see `MMD`.
        scales: see `MMD`.

    Returns:
        (...); it may be negative.

    Raises:
        ValueError: n below two.
    """
    count, width = first.shape[-2:]
    if count < 2:
        raise ValueError("MMD compares the data of a batch with each other: it needs two or more")

    def total(a: Tensor, b: Tensor) -> Tensor:
        distance = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        each = [_kernel(kernel, distance, 2 * width * scale).sum((-2, -1)) for scale in scales]
        return torch.stack(each).sum(0)

    same = len(scales) * count  # a point and itself, at kernel 1
    within = total(first, first) + total(second, second) - 2 * same
    return within / (count * (count - 1)) - 2 * total(first, second) / count**2


def _kernel(kind: Kernel, distance: Tensor, scale: float) -> Tensor:
    return scale / (scale + distance) if kind == "imq" else (-distance / scale).exp()


class DecoderL2(Penalty):
    """weight * Σ w² over the weights of a decoder, biases and gains left out (Ghosh et al. 2020).

    Args:
        weight: of the sum of squares.
        *modules: the decoder, such as ``vae.likelihood``.

    Raises:
        ValueError: a negative weight, modules without weights.
    """

    def __init__(self, weight: float, *modules: nn.Module) -> None:
        super().__init__(weight)
        self.modules_penalised = modules  # in a tuple: they are the pair's, and no submodules of this one
        if not self._weights():
            raise ValueError("modules: expected one or more modules with weights")

    def _weights(self) -> list[Tensor]:
        return [p for module in self.modules_penalised for p in module.parameters() if p.dim() > 1]

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted sum of squares, ()."""
        return self.weight * torch.stack([w.square().sum() for w in self._weights()]).sum()


class GradientPenalty(Penalty):
    """weight * |∂ mean(x) / ∂z|², the decoder's squared Frobenius norm at the guide's draws (Ghosh et al. 2020).

    Of the Jacobian J only Jᵀv is computed, for one v ~ N(0, I) per draw: E |Jᵀv|² = |J|² (Hutchinson 1990). Draws
    are held fixed, so that it bears on the decoder alone, which runs once more.

    Args:
        weight: of the squared norm.
        decoder: a net or a conditional, called with (z, *context); the context is the batch less its first tensor.
            Data must not mix in it, as BatchNorm mixes them: Jᵀv would hold the others' slopes, too.
        site: the latent; may be left out where there is one.

    Raises:
        ValueError: a negative weight, a decoder with BatchNorm; when run, no such site, or several latents and
            none named.
    """

    def __init__(self, weight: float, decoder: nn.Module, site: str | None = None) -> None:
        super().__init__(weight)
        refuse_mixing(decoder=decoder)
        self.decoder = (decoder,)  # in a tuple: it is the pair's, and no submodule of this one
        self.site = site

    def forward(self, model: Sites, guide: Sites, batch: Batch) -> Tensor:
        """Return the weighted estimate for each datum, (B,)."""
        site, training = guide[one_latent(model, self.site)], torch.is_grad_enabled()
        with torch.enable_grad(), pyro.validation_enabled(False):  # checks read numbers back
            z = site["value"].detach().requires_grad_()
            out: Any = self.decoder[0](z, *batch[1:])
            mean: Tensor = out if isinstance(out, Tensor) else out.mean
            (pulled,) = torch.autograd.grad(mean, z, torch.randn_like(mean), create_graph=training)
        return self.weight * features(site, pulled.square()).sum(2).mean(0)


def _latents(model: Sites) -> list[str]:
    return [name for name, site in model.items() if not site["is_observed"]]


def one_latent(model: Sites, name: str | None) -> str:
    """The latent named, or the only one."""
    latents = _latents(model)
    if name is None and len(latents) == 1:
        return latents[0]
    if name is None:
        raise ValueError(f"site: the program has several latents, {latents}; name the one to penalise")
    if name not in latents:
        raise ValueError(f"site {name!r}: the model has no such latent, it has {latents}")
    return name


def features(site: Site, value: Tensor) -> Tensor:
    """A value (K, *plates, B, *event) of a site as (K, B, entries)."""
    ordered = by_datum(site, value)
    return ordered.reshape(*ordered.shape[:2], -1)


def entries(site: Site) -> Any:
    """The distribution of a site's entries, which must be independent, univariate and unmasked."""
    fn, entry = site["fn"], base(site["fn"])
    if entry.event_shape:
        raise ValueError(
            f"site {site['name']!r}: the entries of {family(site)} are not independent, so they have no densities "
            "of their own; a distribution such as Normal(...).to_event(1) has"
        )
    masked = site["mask"] is not None
    while fn is not entry:
        masked, fn = masked or isinstance(fn, MaskedDistribution), fn.base_dist
    if masked:
        raise ValueError(f"site {site['name']!r}: it is masked, and a penalty on single entries knows no masks")
    return entry


def _entry_kl(name: str, model: Sites, guide: Sites) -> Tensor:
    """KL(q || p) of each entry of a latent, (K, B, entries), in nats; closed where it may be, else of the draw."""
    q, p, value = entries(guide[name]), entries(model[name]), guide[name]["value"]
    kl: Tensor | None = None
    if mean_field_problem(name, model, guide) is None and not isinstance(q, Delta):
        with suppress(NotImplementedError):  # no closed form is known
            kl = kl_divergence(q, p)
    kl = q.log_prob(value) - p.log_prob(value) if kl is None else kl
    return features(guide[name], kl.expand(value.shape))


def _whole_kl(name: str, model: Sites, guide: Sites) -> Tensor:
    """KL(q || p) of a latent, (K, B, 1), in nats; closed where it may be, else of the draw."""
    return site_kl(name, model, guide, "auto", False).unsqueeze(2)
