"""Settings of a run: every choice a field, a flag and a key of a TOML file; strings become objects here alone.

Adding a variant to the command line is one row in one of the tables of `ppl_vae.plan` and `ppl_vae.axes`.
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

from ppl_vae.axes import AXES
from ppl_vae.batches import Data
from ppl_vae.capture import Compile
from ppl_vae.data import Images, Split, digits, fashion_mnist, from_path, mnist, subset
from ppl_vae.files import PathLike
from ppl_vae.objectives import Objective
from ppl_vae.plan import ACTIVATIONS, SCALES, Plan
from ppl_vae.rng import seeded
from ppl_vae.traces import KL
from ppl_vae.transforms import dequantise, redraw, threshold
from ppl_vae.updates import Precision

__all__ = ["Config", "build", "images_of", "objective_of", "presented"]

DATA: dict[str, Callable[[PathLike | None], Images]] = {
    "digits": lambda root: digits(),
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}
BINARISE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "threshold": threshold(),
    "redraw": redraw,
    "dequantise": dequantise,
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
KLS: dict[str, KL] = {"sampled": "sampled", "analytic": "analytic", "auto": "auto"}
COMPILE: dict[str, Compile] = {"auto": "auto", "require": "require", "off": "off"}
PRECISIONS: dict[str, Precision] = {"float32": "float32", "bf16": "bf16"}
NETS = ("mlp", "conv")
NORMS = ("none", "batch", "layer")


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
    binarise: str = _data(
        "none", "pixels as they are, cut at one half, redrawn when shown, or made continuous", choices=BINARISE
    )

    model: str = _model("vae", "the program; a cvae is conditioned on the label", choices=AXES["model"])
    latent: int = _model(2, "dimensions of z", least=1)
    prior: str | None = _model(None, "of z; by default standard, or conditional for a cvae", choices=AXES["prior"])
    posterior: str = _model("mean-field", "family of q(z | x)", choices=AXES["posterior"])
    likelihood: str = _model(
        "normal", "of the pixels given z; bernoulli takes 0 and 1 only", choices=AXES["likelihood"]
    )
    scale: str = _model(
        "learned", "of a normal or student-t: learned, per-pixel (by the decoder), optimal, or a number"
    )
    components: int = _model(10, "of mixtures: priors, posteriors, likelihoods, pseudo-inputs", least=1)
    depth: int = _model(4, "layers of a flow, leapfrog steps", least=1)
    rank: int = _model(2, "of a low-rank covariance", least=1)
    nets: str = _model("mlp", "kind of encoder and decoder", choices=NETS)
    hidden: tuple[int, ...] = _model(
        (128, 64), "widths of the encoder's layers; the decoder has them reversed", least=1
    )
    channels: tuple[int, ...] = _model((32, 64), "the same of convolutional nets", least=1)
    activation: str = _model("relu", "between the layers", choices=ACTIVATIONS)
    norm: str = _model("none", "of the hidden layers", choices=NORMS)
    gated: bool = _model(False, "gated hidden layers")
    residual: bool = _model(False, "residual hidden layers")

    objective: str = _objective("elbo", "the bound to maximise", choices=AXES["objective"])
    particles: int = _objective(1, "draws of z for each datum and step", least=1)
    kl: str = _objective(
        "analytic", "the elbo's KL: by draws, in closed form, or closed where it can be", choices=KLS
    )
    estimator: str = _objective(
        "pathwise", "of the gradient; doubly and sticking take a sampled KL", choices=AXES["estimator"]
    )
    beta: float = _objective(1.0, "weight of the elbo's KL", least=0)
    warm_up: int = _objective(0, "steps in which that weight rises from 0", least=0)
    alpha: float = _objective(0.5, "of the bounds renyi and ciwae")
    groups: int = _objective(4, "of particles, for miwae and piwae", least=1)
    penalise: str = _objective("none", "what the elbo is lowered by", choices=AXES["penalise"])
    penalty: float = _objective(1.0, "weight of that", least=0)
    penalty_target: float = _objective(0.5, "nats: of free-bits per latent, of capacity in all", least=0)

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
        _check_parts(self)
        _check_objective(self)

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
        return {**asdict(self), "hidden": list(self.hidden), "channels": list(self.channels)}


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
        ValueError: a conditional model for unlabelled data; settings that the parts refuse.
    """
    with seeded(config.seed):
        program: nn.Module = AXES["model"][config.model].make(Plan(config, tuple(shape), classes))
    return program


def objective_of(
    config: Config,
    program: nn.Module | None = None,
    shape: Sequence[int] = (),
    size: int = 1,
    classes: int = 0,
) -> Objective:
    """The objective of a config.

    Args:
        config: the settings.
        program: what it is for; some penalties look at its decoder.
        shape: of one picture.
        size: how many training data there are.
        classes: how many labels.
    """
    with seeded(config.seed):
        plan = Plan(config, tuple(shape), classes, size, program)
        objective: Objective = AXES["objective"][config.objective].make(plan)
    return objective


def _check_parts(c: Config) -> None:
    """Raise ValueError where settings of the model do not go together."""
    if c.scale != "learned" and c.likelihood not in ("normal", "student-t"):
        raise ValueError(f"scale is that of the normal and student-t likelihoods; {c.likelihood} has none")
    if c.scale not in SCALES and not _positive(c.scale):
        raise ValueError(f"scale must be {', '.join(SCALES)} or a positive number, got {c.scale!r}")
    own = AXES["posterior"][c.posterior].prior is not None
    if own and c.prior is not None:
        raise ValueError(f"prior: posterior {c.posterior!r} comes with its own; leave prior out")
    if c.prior == "conditional" and c.model != "cvae":
        raise ValueError("prior 'conditional' is given the label, which only model 'cvae' takes")
    if c.prior == "vamp" and (c.model != "vae" or c.posterior == "hamiltonian"):
        raise ValueError("prior 'vamp' needs model 'vae' and a posterior with a density, other than hamiltonian")
    if c.norm == "batch" and (c.prior == "vamp" or c.posterior == "hamiltonian" or c.penalise == "gradient"):
        raise ValueError(
            "norm 'batch' mixes data, which prior 'vamp', posterior 'hamiltonian' and penalise 'gradient' forbid"
        )
    if c.model not in ("vae", "cvae") and (c.prior is not None or c.posterior != "mean-field"):
        raise ValueError(f"model {c.model!r} has a prior and a posterior of its own; leave both out")
    if c.model == "belief" and c.likelihood != "bernoulli":
        raise ValueError("model 'belief' has binary data; likelihood must be 'bernoulli'")


def _check_objective(c: Config) -> None:
    """Raise ValueError where settings of the objective do not go together."""
    if (c.beta != 1 or c.warm_up) and c.objective != "elbo":
        raise ValueError("beta and warm_up weigh the KL of the elbo; the other bounds have none to weigh")
    if c.estimator in ("doubly", "sticking") and c.objective == "elbo" and c.kl != "sampled":
        raise ValueError(
            f"estimator {c.estimator!r} needs the elbo's KL by draws; kl must be 'sampled', got {c.kl!r}"
        )
    if c.penalise != "none" and (c.objective != "elbo" or c.estimator != "pathwise"):
        raise ValueError("penalise: penalties belong to the elbo, with estimator 'pathwise'")
    if c.penalise == "free-bits" and (c.kl == "sampled" or c.penalty != c.beta or c.warm_up):
        raise ValueError(
            "penalise 'free-bits' offsets the KL: kl must not be 'sampled', penalty as beta, warm_up 0"
        )
    if c.objective == "piwae" and c.posterior == "hamiltonian":
        raise ValueError(
            "objective 'piwae' trains model and guide apart; posterior 'hamiltonian' is made of the model"
        )
    if c.estimator != "pathwise" and c.objective == "rws":
        raise ValueError("objective 'rws' has gradients of its own; leave estimator out")


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


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
