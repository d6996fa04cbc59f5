"""Programs and their parts by name, as the strings of a configuration name them. One row is one choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppl_vae.belief import sigmoid_belief_network
from ppl_vae.conditionals import Conditional, FixedScale, LearnedScale, NetScale, Normal, OptimalScale, Scale
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.counts import NegativeBinomial, Poisson
from ppl_vae.discrete import Bits, Constant, OneHotCategorical, RelaxedBernoulli, RelaxedCategorical, Simplex
from ppl_vae.flows import Flowed, planar, radial
from ppl_vae.hamiltonian import Hamiltonian, Joint
from ppl_vae.hierarchies import HierarchicalVAE, LadderVAE
from ppl_vae.likelihoods import Bernoulli, Beta, ContinuousBernoulli, StudentT
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat, Modulated, OneHot
from ppl_vae.pixels import Categorical, DiscretisedLogistic, LogisticMixture
from ppl_vae.posteriors import FullCovariance, LowRank, MixtureOfNormals, Point, mean_field
from ppl_vae.priors import LearnedNormal, MixturePrior, StandardNormal, VampPrior, conditional_normal, flow_prior
from ppl_vae.scalars import SplineMap
from ppl_vae.triangular import coupling, inverse_autoregressive, masked_autoregressive

if TYPE_CHECKING:
    from ppl_vae.config import Config

__all__ = ["ACTIVATIONS", "LIKELIHOODS", "MODELS", "POSTERIORS", "PRIORS", "SCALES", "Choice", "Plan"]

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
    """

    make: Callable[[Plan], Any]
    about: str
    prior: Callable[[Plan], Conditional] | None = None
    front: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Plan:
    """What is known when parts are made: the settings, and the data's shape.

    Attributes:
        config: the settings.
        shape: of one picture, (H, W) or (C, H, W).
        classes: how many labels there are.
        size: how many training data.
        program: the one that an objective is for.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int = 0
    size: int = 1
    program: Any = None

    @property
    def width(self) -> int:
        """Pixels of one picture."""
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

    def encoder(self, outputs: int) -> nn.Module:
        """A net of the data, and of the label where there is one."""
        labels = self.classes if self.conditional else 0
        if self.config.nets == "conv":
            net = ConvEncoder(self.channels_first, self.config.channels, outputs, flat=True, **self.conv)
            return Modulated(net, labels, OneHot(labels)) if labels else net
        mlp = self.mlp(self.width + labels, *self.config.hidden, outputs)
        return Concat(mlp, None, OneHot(labels)) if labels else mlp

    def decoder(self, outputs: int) -> nn.Module:
        """A net of the latent, and of the label where there is one."""
        labels = self.classes if self.conditional else 0
        if self.config.nets == "conv":
            pixels = math.prod(self.channels_first[1:])
            channels = tuple(reversed(self.config.channels))
            net: nn.Module = ConvDecoder(
                self.latent + labels, channels, self.channels_first, outputs // pixels, flat=True, **self.conv
            )
        else:
            net = self.mlp(self.latent + labels, *reversed(self.config.hidden), outputs)
        front = POSTERIORS[self.config.posterior].front
        if labels:
            return Concat(net, None if front is None else front(), OneHot(labels))
        return net if front is None else nn.Sequential(front(), net)

    @property
    def conditional(self) -> bool:
        """Whether the program takes the label."""
        return self.config.model == "cvae"

    @property
    def channels_first(self) -> tuple[int, ...]:
        """The picture's shape with its channels, (C, H, W)."""
        return (1, *self.shape) if len(self.shape) == 2 else self.shape

    @property
    def conv(self) -> dict[str, Any]:
        """Options of convolutional nets."""
        return {"blocks": int(self.config.residual), **self.style}

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
            chosen = "conditional" if self.conditional else "standard"
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


def _zeros(plan: Plan) -> Tensor:
    return torch.zeros(plan.latent)


def _by_label(plan: Plan) -> Conditional:
    labels = plan.classes
    return conditional_normal(nn.Sequential(OneHot(labels), plan.mlp(labels, 2 * plan.latent)))


def _vamp(plan: Plan) -> Conditional:
    inputs = torch.rand(plan.config.components, plan.width)
    return VampPrior(plan.posterior, inputs, unit=True)


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
}

POSTERIORS: dict[str, Choice] = {
    "mean-field": Choice(lambda p: mean_field(p.encoder(2 * p.latent)), "diagonal normal"),
    "low-rank": Choice(
        lambda p: LowRank(p.encoder(p.latent * (2 + p.config.rank)), p.latent, p.config.rank),
        "normal with a low-rank covariance besides the diagonal",
    ),
    "full-covariance": Choice(
        lambda p: FullCovariance(p.encoder(p.latent * (p.latent + 3) // 2)), "normal with a full covariance"
    ),
    "planar": Choice(lambda p: _flowed(p, planar(p.latent, p.config.depth)), "planar flow"),
    "radial": Choice(lambda p: _flowed(p, radial(p.latent, p.config.depth)), "radial flow"),
    "iaf": Choice(
        lambda p: _flowed(p, inverse_autoregressive(p.latent, _flow_width(p), p.config.depth)),
        "inverse autoregressive flow",
    ),
    "spline": Choice(
        lambda p: _flowed(p, coupling(p.latent, _flow_width(p), p.config.depth, scalar=SplineMap(bound=5.0))),
        "coupling flow of rational splines",
    ),
    "mixture": Choice(
        lambda p: MixtureOfNormals(
            p.encoder(p.config.components * (1 + 2 * p.latent)), p.latent, p.config.components
        ),
        "mixture of diagonal normals",
    ),
    "point": Choice(lambda p: Point(p.encoder(p.latent)), "a point: an autoencoder"),
    "hamiltonian": Choice(
        lambda p: Hamiltonian(
            mean_field(p.encoder(2 * p.latent)), Joint(p.prior, p.likelihood), p.latent, steps=p.config.depth
        ),
        "diagonal normal moved by leapfrog steps",
    ),
    "bernoulli": Choice(
        lambda p: Bernoulli(p.encoder(p.latent)),
        "bits, by scores",
        prior=lambda p: Bernoulli(Constant(_zeros(p), learned=True)),
    ),
    "one-hot": Choice(
        lambda p: OneHotCategorical(p.encoder(p.latent)),
        "one category of as many as latents, by scores",
        prior=lambda p: OneHotCategorical(Constant(_zeros(p))),
    ),
    "relaxed-bernoulli": Choice(
        lambda p: RelaxedBernoulli(p.encoder(p.latent), 2 / 3),
        "bits, relaxed",
        prior=lambda p: RelaxedBernoulli(Constant(_zeros(p)), 1 / 2),
        front=Bits,
    ),
    "relaxed-one-hot": Choice(
        lambda p: RelaxedCategorical(p.encoder(p.latent), 2 / 3),
        "one category of as many as latents, relaxed",
        prior=lambda p: RelaxedCategorical(Constant(_zeros(p)), 1 / 2),
        front=Simplex,
    ),
}

LIKELIHOODS: dict[str, Choice] = {
    "normal": Choice(lambda p: p.located(Normal), "real numbers; σ by --scale"),
    "student-t": Choice(
        lambda p: p.located(partial(StudentT, df=LearnedScale(5.0))), "real numbers with heavy tails"
    ),
    "bernoulli": Choice(lambda p: Bernoulli(p.decoder(p.width)), "0 and 1"),
    "continuous-bernoulli": Choice(lambda p: ContinuousBernoulli(p.decoder(p.width)), "[0, 1]"),
    "beta": Choice(lambda p: Beta(p.decoder(2 * p.width)), "(0, 1), its ends left out"),
    "categorical": Choice(lambda p: Categorical(p.decoder(256 * p.width)), "the 256 levels of 8-bit pixels"),
    "logistic": Choice(
        lambda p: DiscretisedLogistic(p.decoder(2 * p.width), NetScale()), "the same, by a discretised logistic"
    ),
    "logistic-mixture": Choice(
        lambda p: LogisticMixture(p.decoder(3 * p.config.components * p.width), p.config.components),
        "the same, by a mixture of them",
    ),
    "poisson": Choice(lambda p: Poisson(p.decoder(p.width)), "counts"),
    "negative-binomial": Choice(
        lambda p: NegativeBinomial(p.decoder(p.width), LearnedScale(1.0, shape=(p.width,))),
        "counts more spread than a Poisson's",
    ),
    "zero-inflated": Choice(
        lambda p: NegativeBinomial(p.decoder(2 * p.width), LearnedScale(1.0, shape=(p.width,)), inflated=True),
        "the same with more zeros",
    ),
}


def _labelled(plan: Plan) -> CVAE:
    if plan.classes < 1:
        raise ValueError("model: cvae needs labelled data; these have no labels")
    return CVAE(plan.prior, plan.likelihood, plan.posterior)


def _normals(plan: Plan) -> list[Conditional]:
    """Priors of two levels, the upper of half as many dimensions."""
    upper = max(1, plan.latent // 2)
    return [conditional_normal(plan.mlp(upper, *plan.config.hidden[-1:], 2 * plan.latent)), StandardNormal(upper)]


def _hierarchical(plan: Plan) -> HierarchicalVAE:
    upper = max(1, plan.latent // 2)
    second = mean_field(plan.mlp(plan.latent, *plan.config.hidden[-1:], 2 * upper))
    return HierarchicalVAE(_normals(plan), plan.likelihood, [mean_field(plan.encoder(2 * plan.latent)), second])


def _ladder(plan: Plan) -> LadderVAE:
    upper, last = max(1, plan.latent // 2), plan.config.hidden[-1]
    features = [plan.encoder(last), plan.mlp(last, *plan.config.hidden[-1:], last)]
    evidence = [mean_field(nn.Linear(last, 2 * plan.latent)), mean_field(nn.Linear(last, 2 * upper))]
    return LadderVAE(_normals(plan), plan.likelihood, features, evidence)


MODELS: dict[str, Choice] = {
    "vae": Choice(lambda p: VAE(p.prior, p.likelihood, p.posterior), "one latent vector per datum"),
    "cvae": Choice(_labelled, "the same, given the label"),
    "hierarchical": Choice(_hierarchical, "two levels, normals, a guide from the bottom up"),
    "ladder": Choice(_ladder, "two levels, normals, a guide from the top down"),
    "belief": Choice(
        lambda p: sigmoid_belief_network(p.width, p.latent), "binary units over binary data, by scores"
    ),
}
