"""The parts of programs by name, as the strings of a configuration name them. One row is one choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ppl_vae.autoregressive import CodeGrid, GatedPixelCNN, PixelCNN, PixelCNNPlusPlus
from ppl_vae.conditionals import Conditional, FixedScale, LearnedScale, NetScale, Normal, OptimalScale, Scale
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.counts import NegativeBinomial, Poisson
from ppl_vae.discrete import Bits, Constant, OneHotCategorical, RelaxedBernoulli, RelaxedCategorical, Simplex
from ppl_vae.flows import Flowed, planar, radial
from ppl_vae.hamiltonian import Hamiltonian, Joint
from ppl_vae.likelihoods import Bernoulli, Beta, ContinuousBernoulli, StudentT
from ppl_vae.nets import MLP, Concat, Modulated, OneHot
from ppl_vae.pixels import Categorical, DiscretisedLogistic, LogisticMixture
from ppl_vae.posteriors import FullCovariance, LowRank, MixtureOfNormals, Point, mean_field
from ppl_vae.priors import (
    LearnedNormal,
    MixturePrior,
    StandardNormal,
    UniformCodes,
    VampPrior,
    conditional_normal,
    flow_prior,
)
from ppl_vae.refining import LocalFamily, local_full_covariance, local_mean_field
from ppl_vae.scalars import SplineMap
from ppl_vae.triangular import coupling, inverse_autoregressive, masked_autoregressive

if TYPE_CHECKING:
    from ppl_vae.config import Config

__all__ = ["ACTIVATIONS", "LIKELIHOODS", "POSTERIORS", "PRIORS", "SCALES", "Choice", "Plan"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}
SCALES: dict[str, Callable[[], Scale]] = {
    "learned": LearnedScale,
    "per-pixel": NetScale,
    "optimal": OptimalScale,
}


@dataclass(frozen=True)
class Choice:
    """A row: what makes the thing, and what it is in a few words.

    Attributes:
        make: `Plan` -> the thing.
        about: shown by ``ppl-vae info --axes``.
        prior: for posteriors that need one of their own: `Plan` -> it.
        front: for the same: what maps their draws to what a decoder takes.
        density: for posteriors, whether they have one, and with it bounds.
        local: for posteriors, the family in which that of each datum is refined to see what its net loses.
        data: for likelihoods, what they are of: any real numbers, those of [0, 1], bits, 256 levels, or counts.
        given: for programs, what they take besides the data: the label, as far as it is known, or the sum.
        own: for programs with a prior and a posterior of their own.
        plane: for programs, whether any point of a plane of their codes is a code, and shows a whole datum.
        codes: for programs, whether their latent is a grid of codes of a codebook; for priors, whether of such.
    """

    make: Callable[[Plan], Any]
    about: str
    prior: Callable[[Plan], Conditional] | None = None
    front: Callable[[], nn.Module] | None = None
    density: bool = True
    local: LocalFamily = local_mean_field
    data: Literal["real", "unit", "binary", "levels", "counts"] = "real"
    given: Literal["", "label", "known label", "sum"] = ""
    own: bool = False
    plane: bool = True
    codes: bool = False


class _Log(nn.Module):
    """log(1 + x): counts as nets want them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


@dataclass(frozen=True)
class Plan:
    """What is known when parts are made: the settings, and the data's shape.

    Attributes:
        config: the settings.
        shape: of one datum: a picture, (H, W) or (C, H, W), or (D,) where it is none.
        classes: how many labels there are.
        size: how many training data.
        program: the one that an objective is for.
        given: what the program takes besides the data, as in `Choice`.
        code: width of what the decoder takes, where it is not z.
        spatial: whether nets are convolutions whose features, those of codes, keep their places.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int = 0
    size: int = 1
    program: Any = None
    given: str = ""
    code: int | None = None
    spatial: bool = False

    @property
    def width(self) -> int:
        """Numbers of one datum."""
        return math.prod(self.shape)

    @property
    def latent(self) -> int:
        """Dimensions of z."""
        return self.config.latent

    @property
    def style(self) -> dict[str, Any]:
        """Options of hidden layers."""
        c = self.config
        norm = None if c.norm == "none" else c.norm
        return {"activation": ACTIVATIONS[c.activation], "norm": norm, "gated": c.gated}

    def mlp(self, *sizes: int) -> nn.Module:
        """A multilayer perceptron in the configured style."""
        return MLP(*sizes, residual=self.config.residual, **self.style)

    def encoder(self, outputs: int, given: bool = True) -> nn.Module:
        """A net of the data and, with ``given``, of what is given besides."""
        first = _Log() if LIKELIHOODS[self.config.likelihood].data == "counts" else None
        if self.spatial or self.config.nets == "conv":
            net: nn.Module = ConvEncoder(self.channels_first, self.config.channels, outputs, **self.conv)
            return Modulated(net, *self.condition) if given and self.given else net
        return self._joined(self.width, outputs, first, self.config.hidden, given and bool(self.given))

    def decoder(self, outputs: int) -> nn.Module:
        """A net of the latent and, unless a likelihood takes that itself, of what is given besides."""
        make, given = POSTERIORS[self.config.posterior].front, self.given not in ("", "sum")
        front, code = None if make is None else make(), self.latent if self.code is None else self.code
        if self.config.nets == "mlp" and not self.spatial:
            return self._joined(code, outputs, front, tuple(reversed(self.config.hidden)), given)
        pixels, channels = math.prod(self.channels_first[1:]), tuple(reversed(self.config.channels))
        net: nn.Module = ConvDecoder(code, channels, self.channels_first, outputs // pixels, **self.conv)
        net = net if front is None else nn.Sequential(front, net)
        return Modulated(net, *self.condition) if given else net

    def _joined(
        self, inputs: int, outputs: int, first: nn.Module | None, hidden: tuple[int, ...], given: bool
    ) -> nn.Module:
        """A perceptron of inputs mapped by ``first`` and of what is given, joined to them or modulating layers."""
        if given and self.config.conditioning == "concat":
            width, embedding = self.condition
            return Concat(self.mlp(inputs + width, *hidden, outputs), first, embedding)
        net = self.mlp(inputs, *hidden, outputs)
        net = net if first is None else nn.Sequential(first, net)
        return Modulated(net, *self.condition) if given else net

    @property
    def condition(self) -> tuple[int, nn.Module]:
        """The width of what is given besides the data, as nets take it, and what makes that of it."""
        if self.given == "sum":
            return 1, _Log()
        return self.classes, OneHot(self.classes) if self.given == "label" else nn.Identity()

    @property
    def channels_first(self) -> tuple[int, ...]:
        """The picture's shape with its channels, (C, H, W)."""
        if len(self.shape) < 2:
            raise ValueError(f"nets: conv takes pictures, and these data have shape {self.shape}; use mlp")
        return (1, *self.shape) if len(self.shape) == 2 else self.shape

    @property
    def conv(self) -> dict[str, Any]:
        """Options of convolutional nets."""
        return {"blocks": int(self.config.residual), "flat": True, "spatial": self.spatial, **self.style}

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a grid of codes: each of the channels halves those of a picture."""
        _, height, width = self.channels_first
        times = len(self.config.channels)
        return height >> times, width >> times

    def scale(self) -> Scale:
        """The scale of likelihoods that have one."""
        named = SCALES.get(self.config.scale)
        return FixedScale(float(self.config.scale)) if named is None else named()

    def located(self, make: Callable[..., Conditional]) -> Conditional:
        """A likelihood with a location by the decoder, and the configured scale."""
        scale = self.scale()
        return make(self.decoder(scale.channels * self.width), scale)

    @cached_property
    def prior(self) -> Conditional:
        """The prior."""
        own, chosen = POSTERIORS[self.config.posterior].prior, self.config.prior
        if own is not None:
            return own(self)
        if chosen is None:
            chosen = "uniform" if self.spatial else "conditional" if self.given == "label" else "standard"
        made: Conditional = PRIORS[chosen].make(self)
        return made

    @cached_property
    def likelihood(self) -> Conditional:
        """The likelihood."""
        if self.program is not None:
            found: Conditional = self.program.likelihood
            return found
        made: Conditional = LIKELIHOODS[self.config.likelihood].make(self)
        return made

    @cached_property
    def posterior(self) -> Conditional:
        """The posterior."""
        made: Conditional = POSTERIORS[self.config.posterior].make(self)
        return made


def _flow_width(plan: Plan) -> tuple[int]:
    return (max(64, plan.latent),)


def _flowed(plan: Plan, flows: Any) -> Conditional:
    return Flowed(mean_field(plan.encoder(2 * plan.latent)), *flows)


def _relaxed(plan: Plan, family: Callable[..., Conditional], prior: bool = False) -> Conditional:
    """A relaxed posterior, or the prior beside it, which is three quarters as warm (2/3 and 1/2 in the paper)."""
    heat = plan.config.temperature
    return family(Constant(_zeros(plan)), 0.75 * heat) if prior else family(plan.encoder(plan.latent), heat)


def _zeros(plan: Plan) -> Tensor:
    return torch.zeros(plan.latent)


def _by_label(plan: Plan) -> Conditional:
    width, embedding = plan.condition
    return conditional_normal(nn.Sequential(embedding, plan.mlp(width, 2 * plan.latent)))


def _vamp(plan: Plan) -> Conditional:
    inputs = torch.rand(plan.config.components, plan.width)
    return VampPrior(plan.posterior, inputs, unit=LIKELIHOODS[plan.config.likelihood].data != "counts")


def _code_grid(plan: Plan) -> CodeGrid:
    return CodeGrid(plan.config.codebook, plan.grid, plan.config.prior_width)


def _levels(grid: tuple[int, int]) -> int:  # resolutions: a grid is halved while both sides are even
    return next(levels for levels in (3, 2, 1) if all(side % 2 ** (levels - 1) == 0 for side in grid))


PRIORS: dict[str, Choice] = {
    "standard": Choice(lambda p: StandardNormal(p.latent), "N(0, I)"),
    "learned": Choice(lambda p: LearnedNormal(p.latent), "diagonal normal, learned"),
    "mixture": Choice(lambda p: MixturePrior(p.latent, p.config.components), "mixture of diagonal normals"),
    "vamp": Choice(_vamp, "VampPrior: the posteriors of learned pseudo-inputs"),
    "flow": Choice(
        lambda p: flow_prior(p.latent, *masked_autoregressive(p.latent, _flow_width(p), p.config.depth)),
        "masked autoregressive flow",
    ),
    "conditional": Choice(_by_label, "diagonal normal given the label"),
    "uniform": Choice(lambda p: UniformCodes(p.config.codebook, p.grid), "over codes, all alike", codes=True),
    "pixelcnn": Choice(
        lambda p: PixelCNN(_code_grid(p), p.config.depth), "over codes, --depth blocks", codes=True
    ),
    "gated-pixelcnn": Choice(
        lambda p: GatedPixelCNN(_code_grid(p), p.config.depth), "the same without a blind spot", codes=True
    ),
    "pixelcnn++": Choice(
        lambda p: PixelCNNPlusPlus(_code_grid(p), p.config.depth, levels=_levels(p.grid)),
        "the same at up to three resolutions, --depth blocks in each half of one",
        codes=True,
    ),
}

POSTERIORS: dict[str, Choice] = {
    "mean-field": Choice(lambda p: mean_field(p.encoder(2 * p.latent)), "diagonal normal"),
    "low-rank": Choice(
        lambda p: LowRank(p.encoder(p.latent * (2 + p.config.rank)), p.latent, p.config.rank),
        "normal with a low-rank covariance besides the diagonal",
        local=local_full_covariance,
    ),
    "full-covariance": Choice(
        lambda p: FullCovariance(p.encoder(p.latent * (p.latent + 3) // 2)),
        "normal with a full covariance",
        local=local_full_covariance,
    ),
    "planar": Choice(
        lambda p: _flowed(p, planar(p.latent, p.config.depth)), "planar flow", local=local_full_covariance
    ),
    "radial": Choice(
        lambda p: _flowed(p, radial(p.latent, p.config.depth)), "radial flow", local=local_full_covariance
    ),
    "iaf": Choice(
        lambda p: _flowed(p, inverse_autoregressive(p.latent, _flow_width(p), p.config.depth)),
        "inverse autoregressive flow",
        local=local_full_covariance,
    ),
    "spline": Choice(
        lambda p: _flowed(p, coupling(p.latent, _flow_width(p), p.config.depth, scalar=SplineMap(bound=5.0))),
        "coupling flow of rational splines",
        local=local_full_covariance,
    ),
    "mixture": Choice(
        lambda p: MixtureOfNormals(
            p.encoder(p.config.components * (1 + 2 * p.latent)), p.latent, p.config.components
        ),
        "mixture of diagonal normals",
        local=local_full_covariance,
    ),
    "point": Choice(
        lambda p: Point(p.encoder(p.latent)), "a point: an autoencoder, which has no bound", density=False
    ),
    "hamiltonian": Choice(
        lambda p: Hamiltonian(
            mean_field(p.encoder(2 * p.latent)), Joint(p.prior, p.likelihood), p.latent, steps=p.config.depth
        ),
        "diagonal normal moved by leapfrog steps",
        local=local_full_covariance,
    ),
    "bernoulli": Choice(
        lambda p: Bernoulli(p.encoder(p.latent)),
        "bits, by scores; with their own prior",
        prior=lambda p: Bernoulli(Constant(_zeros(p), learned=True)),
    ),
    "one-hot": Choice(
        lambda p: OneHotCategorical(p.encoder(p.latent)),
        "one category of as many as latents, by scores or enumerated; under a uniform prior",
        prior=lambda p: OneHotCategorical(Constant(_zeros(p))),
    ),
    "relaxed-bernoulli": Choice(
        lambda p: _relaxed(p, RelaxedBernoulli),
        "bits, relaxed, with --temperature",
        prior=lambda p: _relaxed(p, RelaxedBernoulli, prior=True),
        front=Bits,
    ),
    "relaxed-one-hot": Choice(
        lambda p: _relaxed(p, RelaxedCategorical),
        "one category of as many as latents, relaxed, with --temperature",
        prior=lambda p: _relaxed(p, RelaxedCategorical, prior=True),
        front=Simplex,
    ),
}


def _negative_binomial(plan: Plan, inflated: bool = False) -> Conditional:
    net = plan.decoder((1 + inflated) * plan.width)
    spread = LearnedScale(1.0, shape=(plan.width,))
    return NegativeBinomial(net, spread, inflated=inflated, sized=plan.given == "sum")


def _logistics(plan: Plan, coupled: bool = False) -> Conditional:
    if coupled and (len(plan.shape) < 3 or plan.shape[0] != 3):
        raise ValueError(f"likelihood: coupled channels need pictures in colour, (3, H, W), got {plan.shape}")
    numbers = plan.config.components * plan.width * 3
    return LogisticMixture(
        plan.decoder(numbers * 10 // 9 if coupled else numbers), plan.config.components, coupled=coupled
    )


LIKELIHOODS: dict[str, Choice] = {
    "normal": Choice(lambda p: p.located(Normal), "real numbers; σ by --scale"),
    "student-t": Choice(
        lambda p: p.located(partial(StudentT, df=LearnedScale(5.0))), "real numbers with heavy tails"
    ),
    "bernoulli": Choice(lambda p: Bernoulli(p.decoder(p.width)), "0 and 1", data="binary"),
    "continuous-bernoulli": Choice(lambda p: ContinuousBernoulli(p.decoder(p.width)), "[0, 1]", data="unit"),
    "beta": Choice(lambda p: Beta(p.decoder(2 * p.width)), "(0, 1), its ends left out", data="unit"),
    "categorical": Choice(
        lambda p: Categorical(p.decoder(256 * p.width)), "the 256 levels of 8-bit pixels", data="levels"
    ),
    "logistic": Choice(
        lambda p: DiscretisedLogistic(p.decoder(2 * p.width), NetScale()),
        "the same, by a discretised logistic",
        data="levels",
    ),
    "logistic-mixture": Choice(_logistics, "the same, by a mixture of them", data="levels"),
    "coupled-logistics": Choice(
        partial(_logistics, coupled=True), "the same, in colour, each channel given those before", data="levels"
    ),
    "poisson": Choice(lambda p: Poisson(p.decoder(p.width), sized=p.given == "sum"), "counts", data="counts"),
    "negative-binomial": Choice(_negative_binomial, "counts more spread than a Poisson's", data="counts"),
    "zero-inflated": Choice(partial(_negative_binomial, inflated=True), "the same with more zeros", data="counts"),
}
