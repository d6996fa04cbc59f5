"""Settings of a run: every choice a field, a flag and a key of a TOML file; strings become objects here alone.

Adding a variant to the command line is one row in one of the tables below.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.batches import Data
from ppl_vae.capture import Compile
from ppl_vae.conditionals import Conditional, FixedScale, LearnedScale, NetScale, Normal, Scale
from ppl_vae.data import Images, Split, digits, fashion_mnist, from_path, mnist, subset
from ppl_vae.estimators import Estimator, doubly, pathwise
from ppl_vae.files import PathLike
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat, OneHot
from ppl_vae.objectives import ELBO, IWAE, Objective
from ppl_vae.posteriors import mean_field
from ppl_vae.priors import StandardNormal, conditional_normal
from ppl_vae.rng import seeded
from ppl_vae.traces import KL
from ppl_vae.transforms import redraw, threshold
from ppl_vae.updates import Precision

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
KLS: dict[str, KL] = {"sampled": "sampled", "analytic": "analytic", "auto": "auto"}
ESTIMATORS: dict[str, Estimator] = {"pathwise": pathwise, "doubly": doubly}
COMPILE: dict[str, Compile] = {"auto": "auto", "require": "require", "off": "off"}
PRECISIONS: dict[str, Precision] = {"float32": "float32", "bf16": "bf16"}
OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "elbo": lambda c: ELBO(c.particles, kl=KLS[c.kl], beta=c.beta, estimator=ESTIMATORS[c.estimator]),
    "iwae": lambda c: IWAE(c.particles, estimator=ESTIMATORS[c.estimator]),
}
LIKELIHOODS: dict[str, Callable[[Config, Callable[[int], nn.Module], int], Conditional]] = {
    "normal": lambda c, net, d: _normal(c, net, d),
    "bernoulli": lambda c, net, d: Bernoulli(net(d)),
}
MODELS: dict[str, Callable[[Config, int, int], nn.Module]] = {
    "vae": lambda c, d, classes: _vae(c, d),
    "cvae": lambda c, d, classes: _cvae(c, d, classes),
}


def _setting(group: str, default: Any, text: str, **limits: Any) -> Any:
    """A field with what the command line shows: ``choices`` (a table), ``least`` or ``above`` (a number)."""
    return field(default=default, metadata={"group": group, "help": text, **limits})


_data, _model, _objective = (partial(_setting, group) for group in ("data", "model", "objective"))
_training = partial(_setting, "training")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, checked when it is made; equal settings on one machine give equal numbers.

    Raises:
        ValueError: a value of the wrong type, outside its range or choices, or at odds with another.

    >>> Config(latent=8, likelihood="bernoulli", binarise="redraw").latent
    8
    """

    data: str = _data("digits", "digits, mnist, fashion-mnist, or a path: .npz, .npy or a folder of pictures")
    data_dir: str | None = _data(
        None, "folder with the files of mnist or fashion-mnist; by default they are fetched"
    )
    limit: int | None = _data(None, "use only the first rows of each split; by default all", least=1)
    binarise: str = _data("none", "pixels as they are, cut at one half, or redrawn when shown", choices=BINARISE)

    model: str = _model("vae", "the program; a cvae is conditioned on the label", choices=MODELS)
    latent: int = _model(2, "dimensions of z", least=1)
    hidden: tuple[int, ...] = _model(
        (128, 64), "widths of the encoder's layers; the decoder has them reversed", least=1
    )
    activation: str = _model("relu", "between the layers", choices=ACTIVATIONS)
    likelihood: str = _model("normal", "of the pixels given z; bernoulli takes 0 and 1 only", choices=LIKELIHOODS)
    scale: str = _model("learned", "σ of the normal likelihood: learned, per-pixel (by the decoder), or a number")

    objective: str = _objective("elbo", "the bound to maximise", choices=OBJECTIVES)
    particles: int = _objective(1, "draws of z for each datum and step", least=1)
    kl: str = _objective(
        "analytic", "the elbo's KL: by draws, in closed form, or closed where it can be", choices=KLS
    )
    estimator: str = _objective("pathwise", "of the gradient; doubly takes a sampled KL", choices=ESTIMATORS)
    beta: float = _objective(1.0, "weight of the elbo's KL", least=0)
    warm_up: int = _objective(0, "steps in which that weight rises from 0", least=0)

    epochs: int = _training(100, "passes over the training data", least=1)
    batch_size: int = _training(64, "rows per step", least=1)
    optimizer: str = _training("adam", "of torch", choices=OPTIMIZERS)
    learning_rate: float = _training(1e-3, "its learning rate", above=0)
    schedule: str = _training(
        "constant", "of the learning rate; cosine falls to 0 by the last epoch", choices=SCHEDULES
    )
    clip_norm: float | None = _training(None, "largest norm of a gradient; by default none", above=0)
    patience: int | None = _training(
        None, "stop after so many epochs without a rise of the validation bound; by default never", least=1
    )
    seed: int = _training(0, "fixes initial weights, the order of the data and every draw", least=0)
    device: str | None = _training(None, "cpu, cuda, cuda:1, ...; by default CUDA when present")
    compile: str = _training(
        "auto", "capture and compile the step: where it pays, always, or never", choices=COMPILE
    )
    precision: str = _training("float32", "of matrix products while training", choices=PRECISIONS)
    film: bool = _training(True, "make a film of the training")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if not self.data:
            raise ValueError("data must name a data set, a file or a folder, got nothing")
        if (self.beta != 1 or self.warm_up) and self.objective != "elbo":
            raise ValueError("beta and warm_up weigh the KL of the elbo; the other bounds have none to weigh")
        if self.estimator == "doubly" and self.objective == "elbo" and self.kl != "sampled":
            raise ValueError(
                f"estimator 'doubly' needs the elbo's KL by draws; kl must be 'sampled', got {self.kl!r}"
            )
        if self.scale != "learned" and self.likelihood != "normal":
            raise ValueError(f"scale is the σ of the normal likelihood; {self.likelihood} has none")
        _scale(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """A config from plain values.

        Raises:
            ValueError: unknown keys (the nearest known one is named), wrong types or values; ``source`` stands
                first in the message.
        """
        _check_each(values, source)
        return cls(**values)

    @classmethod
    def from_file(cls, path: PathLike, **overrides: Any) -> Config:
        """A config from a TOML file, or a JSON file by its suffix, with some values replaced.

        Raises:
            ValueError: no such file, not readable as TOML or JSON, unknown keys, wrong types or values.
        """
        path = Path(path)
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"config: {path} is no valid {kind}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold keys and values, got a {type(values).__name__}")
        _check_each(values, str(path))
        return cls.from_mapping({**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "hidden": list(self.hidden)}


def images_of(config: Config) -> Images:
    """Load the data that a config names."""
    loader = DATA.get(config.data)
    if loader is None and not Path(config.data).expanduser().exists():
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
    with seeded(config.seed):
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


def _check_each(values: Mapping[str, Any], source: str) -> None:
    """Check names and, one by one, values; what they must be together is checked when a `Config` is made."""
    known = {f.name: f for f in fields(Config)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: unknown key {name!r}{_nearest(name, known)}")
        try:
            _checked(known[name], value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def _checked(f: Field[Any], value: Any) -> Any:
    """A value as its field's type; raises ValueError where it is of another, or outside its range or choices."""
    kind = str(f.type).removesuffix(" | None")
    if value is None and kind != f.type:
        return None
    if f.name == "scale" and type(value) in (int, float):
        value = str(value)
    name, convert = TYPES[kind]
    if (converted := convert(value)) is None:
        raise ValueError(f"{f.name} must be {name}, got {value!r}")
    choices = f.metadata.get("choices")
    if choices is not None and converted not in choices:
        raise ValueError(f"{f.name}: unknown choice {value!r}{_nearest(value, choices)}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and (limit := _missed(number, **f.metadata)):
            raise ValueError(f"{f.name} must be {limit}, got {value}")
    return converted


def _missed(number: float, least: float = -math.inf, above: float = -math.inf, **_: Any) -> str:
    """The limit that a number does not keep, in words."""
    if number < least:
        return f"at least {least}"
    if number <= above:
        return f"above {above}"
    return "" if number < 2**63 else "finite" if isinstance(number, float) else "below 2**63"  # NaN is not below


def _whole(value: Any) -> int | None:
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _real(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def _wholes(value: Any) -> tuple[int, ...] | None:
    numbers = [_whole(v) for v in value] if isinstance(value, list | tuple) else []
    return tuple(n for n in numbers if n is not None) if numbers and None not in numbers else None


TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("text", lambda value: os.fspath(value) if isinstance(value, str | os.PathLike) else None),
    "bool": ("true or false", lambda value: value if isinstance(value, bool) else None),
    "int": ("a whole number", _whole),
    "float": ("a number", _real),
    "tuple[int, ...]": ("a list of one or more whole numbers", _wholes),
}
