"""Settings of a run: every choice a field, a flag and a key of a TOML file; strings become objects here alone.

Adding a variant to the command line is one row in one of the tables below.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.batches import Data
from ppl_vae.conditionals import Conditional, FixedScale, LearnedScale, NetScale, Normal, Scale
from ppl_vae.data import Images, Split, digits, fashion_mnist, from_path, mnist, redraw, subset, threshold
from ppl_vae.files import PathLike
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat, OneHot
from ppl_vae.objectives import ELBO, IWAE, Objective
from ppl_vae.posteriors import mean_field
from ppl_vae.priors import StandardNormal, conditional_normal

__all__ = ["Config", "build", "images_of", "objective_of", "presented"]

DATA: dict[str, Callable[[PathLike | None], Images]] = {
    "digits": lambda root: digits(),
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}
BINARISE: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "threshold": threshold(), "redraw": redraw}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
SCHEDULES: dict[str, Callable[..., Any] | None] = {
    "constant": None,
    "cosine": torch.optim.lr_scheduler.CosineAnnealingLR,
}
SCALES: dict[str, Callable[[], Scale]] = {"learned": LearnedScale, "per-pixel": NetScale}
OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "elbo": lambda c: ELBO(c.particles, kl=c.kl, beta=c.beta),  # type: ignore[arg-type]
    "iwae": lambda c: IWAE(c.particles),
}
LIKELIHOODS: dict[str, Callable[[Config, Callable[[int], nn.Module], int], Conditional]] = {
    "normal": lambda c, net, d: _normal(c, net, d),
    "bernoulli": lambda c, net, d: Bernoulli(net(d)),
}
MODELS: dict[str, Callable[[Config, int, int], nn.Module]] = {
    "vae": lambda c, d, classes: _vae(c, d),
    "cvae": lambda c, d, classes: _cvae(c, d, classes),
}


def _choice(default: str, table: Mapping[str, Any], text: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": table})


def _value(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. Unknown names and impossible values raise ValueError when it is made.

    >>> Config(latent=8, likelihood="bernoulli", binarise="redraw").latent
    8
    """

    data: str = _value("digits", "digits, mnist, fashion-mnist, or a path: npz, npy or a folder of images")
    data_dir: str | None = _value(None, "folder with the files of mnist or fashion-mnist")
    limit: int | None = _value(None, "use the first rows of each split only")
    binarise: str = _choice("none", BINARISE, "pixels: as they are, cut at one half, or redrawn when presented")
    model: str = _choice("vae", MODELS, "the program; cvae is conditioned on the label")
    latent: int = _value(2, "dimensions of z")
    hidden: tuple[int, ...] = _value((128, 64), "widths of the encoder's hidden layers; the decoder's reversed")
    activation: str = _choice("relu", ACTIVATIONS, "between the layers")
    likelihood: str = _choice("normal", LIKELIHOODS, "of a pixel given z")
    scale: str = _value("learned", "of the normal likelihood: learned, per-pixel, or a number (fixed)")
    objective: str = _choice("elbo", OBJECTIVES, "the bound to maximise")
    particles: int = _value(1, "draws per datum in the objective")
    kl: str = _choice("analytic", dict.fromkeys(("sampled", "analytic", "auto")), "how the elbo takes the KL")
    beta: float = _value(1.0, "weight of the KL in the elbo")
    warm_up: int = _value(0, "steps in which the KL's weight rises from 0 to beta")
    epochs: int = _value(100, "passes over the training data")
    batch_size: int = _value(64, "rows per step")
    optimizer: str = _choice("adam", OPTIMIZERS, "torch's optimizer")
    learning_rate: float = _value(1e-3, "its learning rate")
    schedule: str = _choice("constant", SCHEDULES, "of the learning rate over the epochs")
    clip_norm: float | None = _value(None, "largest norm of the gradient")
    patience: int | None = _value(None, "stop after this many epochs without a rise of the validation bound")
    seed: int = _value(0, "fixes initial weights, order of the data, and every draw")
    device: str | None = _value(None, "cpu, cuda, cuda:1 ...; CUDA when present by default")
    film: bool = _value(True, "make a film of the training")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices is not None and value not in choices:
                raise ValueError(f"{f.name}: unknown choice {value!r}{_nearest(value, choices)}")
        for name in ("latent", "particles", "epochs", "batch_size", "limit", "patience"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be one or more positive widths, got {self.hidden}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up must not be negative, got {self.warm_up}")
        if (self.beta != 1 or self.warm_up) and self.objective != "elbo":
            raise ValueError("beta and warm_up weigh the KL of the elbo; the other bounds have none to weigh")
        _scale(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """A config from plain values; raises ValueError for unknown keys and wrong types, naming them."""
        known = {f.name: f for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{source}: unknown key {name!r}{_nearest(name, known)}")
        return cls(**{name: _typed(source, known[name], value) for name, value in values.items()})

    @classmethod
    def from_file(cls, path: PathLike, **overrides: Any) -> Config:
        """A config from a TOML or JSON file, with some values replaced.

        Raises:
            ValueError: no such file, not readable as TOML or JSON, unknown keys, wrong types.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"config: {path} is no valid {path.suffix.lstrip('.') or 'TOML'}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold keys and values, got a {type(values).__name__}")
        return cls.from_mapping({**values, **overrides}, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "hidden": list(self.hidden)}


def images_of(config: Config) -> Images:
    """Load the data that a config names."""
    loader = DATA.get(config.data)
    if loader is None and not Path(config.data).exists():
        raise ValueError(f"data: no such file, and no known name: {config.data!r}{_nearest(config.data, DATA)}")
    images = from_path(config.data) if loader is None else loader(config.data_dir)
    return images if config.limit is None else subset(images, config.limit)


def presented(config: Config, split: Split) -> Data:
    """A split of the images as the program sees it: binarised or not, with labels where there are any."""
    return Data(*split.columns, transform=BINARISE[config.binarise])


def build(config: Config, shape: Sequence[int], classes: int = 0) -> nn.Module:
    """The program of a config, for pictures of a shape, with its initial weights drawn from the config's seed.

    Raises:
        ValueError: a conditional model for unlabelled data.
    """
    width = 1
    for size in shape:
        width *= size
    return MODELS[config.model](config, width, classes)


def objective_of(config: Config) -> Objective:
    """The objective of a config."""
    return OBJECTIVES[config.objective](config)


def _mlp(config: Config) -> Callable[..., nn.Module]:
    return partial(MLP, activation=ACTIVATIONS[config.activation])


def _vae(config: Config, width: int) -> VAE:
    mlp = _mlp(config)

    def decoder(outputs: int) -> nn.Module:
        return mlp(config.latent, *reversed(config.hidden), outputs)

    return VAE(
        prior=StandardNormal(config.latent),
        likelihood=LIKELIHOODS[config.likelihood](config, decoder, width),
        posterior=mean_field(mlp(width, *config.hidden, 2 * config.latent)),
    )


def _cvae(config: Config, width: int, classes: int) -> CVAE:
    if classes < 1:
        raise ValueError("model: cvae needs labelled data; these have no labels")
    mlp = _mlp(config)

    def decoder(outputs: int) -> nn.Module:
        net = mlp(config.latent + classes, *reversed(config.hidden), outputs)
        return Concat(net, None, OneHot(classes))

    encoder = mlp(width + classes, *config.hidden, 2 * config.latent)
    return CVAE(
        prior=conditional_normal(nn.Sequential(OneHot(classes), mlp(classes, 2 * config.latent))),
        likelihood=LIKELIHOODS[config.likelihood](config, decoder, width),
        posterior=mean_field(Concat(encoder, None, OneHot(classes))),
    )


def _normal(config: Config, net: Callable[[int], nn.Module], width: int) -> Normal:
    scale = _scale(config)
    return Normal(net(scale.channels * width), scale)


def _scale(config: Config) -> Scale:
    if config.scale in SCALES:
        return SCALES[config.scale]()
    try:
        return FixedScale(float(config.scale))
    except ValueError as error:
        raise ValueError(f"scale must be learned, per-pixel or a positive number, got {config.scale!r}") from error


def _nearest(name: object, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _typed(source: str, f: Any, value: Any) -> Any:
    """Check a plain value against a field's type; numbers may stand for floats and for the scale."""
    kind = f.type.removesuffix(" | None")
    if value is None and kind != f.type:
        return None
    if kind == "tuple[int, ...]" and isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "float" and type(value) in (int, float):
        return float(value)
    if kind == "str" and type(value) in (int, float) and f.name == "scale":
        return str(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{source}: {f.name} must be {f.type}, got {value!r}")
    return value
