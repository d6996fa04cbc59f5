"""Settings of a run: every choice a field, a flag and a key of a TOML file; strings become objects here alone.

Adding a variant to the command line is one row in one of the tables of `ppl_vae.plan` and `ppl_vae.axes`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.axes import AXES, check_objective, check_parts
from ppl_vae.batches import Data
from ppl_vae.capture import Compile
from ppl_vae.data import Images, Split, cifar10, digits, fashion_mnist, from_path, mnist, subset
from ppl_vae.faults import Policy
from ppl_vae.files import PathLike, brief, expanded, look, parse_json, read_text
from ppl_vae.objectives import Objective
from ppl_vae.plan import ACTIVATIONS, SCALES, Plan
from ppl_vae.products import Precision
from ppl_vae.rng import seeded
from ppl_vae.semisupervised import hide_labels
from ppl_vae.settings import check_each, checked, nearest, setting
from ppl_vae.traces import KL
from ppl_vae.transforms import dequantise, redraw, threshold

__all__ = ["Config", "build", "images_of", "objective_of", "presented", "settings_in"]

DATA: dict[str, Callable[[PathLike | None], Images]] = {
    "digits": lambda root: digits(),
    # Fetched into the cache alone: a config of somebody else must not say where files are written.
    "mnist": lambda root: mnist(root, download=root is None),
    "fashion-mnist": lambda root: fashion_mnist(root, download=root is None),
    "cifar10": lambda root: cifar10(root, download=root is None),
}
MOST_TEXT = 64 * 2**10  # bytes of a file of settings
MOST_LINE = 4096  # characters in a line of TOML, the reader of which takes time in proportion to their product
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
POLICIES: dict[str, Policy] = {"stop": "stop", "skip": "skip", "back": "back"}
NETS = ("mlp", "conv")
NORMS = ("none", "batch", "layer")
CONDITIONINGS = ("concat", "film")
LABELS = ("relaxed", "enumerated")
CODE_UPDATES = ("averaged", "learned")


_data, _model, _objective = (partial(setting, group) for group in ("data", "model", "objective"))
_training = partial(setting, "training")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, checked when it is made; equal settings on one machine give equal numbers.

    Raises:
        ValueError: a value of the wrong type, outside its range or choices, or at odds with another.

    >>> Config(latent=8, likelihood="bernoulli", binarise="redraw").latent
    8
    """

    data: str = _data(
        "digits", "digits, mnist, fashion-mnist, cifar10, or a path: .npz, .npy or a folder of pictures"
    )
    data_dir: str | None = _data(
        None, "folder to read mnist, fashion-mnist or cifar10 from; without it they are fetched into the cache"
    )
    limit: int | None = _data(None, "use only the first rows of each split; by default all", least=1)
    binarise: str = _data(
        "none", "pixels as they are, cut at one half, redrawn when shown, or made continuous", choices=BINARISE
    )

    model: str = _model("vae", "the program; a cvae is conditioned on the label", choices=AXES["model"])
    levels: int = _model(2, "of a program with several, each half as wide as the one below", least=1, most=1000)
    path: bool = _model(False, "a deterministic path beside the levels, shared by the ladder's guide")
    labelled: int | None = _model(
        None, "training data whose labels a semi-supervised program sees; by default all", least=1
    )
    labels: str = _model("relaxed", "how such a program draws those it does not see", choices=LABELS)
    label_weight: float = _model(10.0, "of such a program's classifier, for each label seen", least=0)
    latent: int = _model(2, "dimensions of z", least=1)
    prior: str | None = _model(
        None, "of z; by default standard, conditional for a cvae, uniform for a vqvae", choices=AXES["prior"]
    )
    posterior: str = _model("mean-field", "family of q(z | x)", choices=AXES["posterior"])
    likelihood: str = _model(
        "normal", "of the pixels given z; bernoulli takes 0 and 1 only", choices=AXES["likelihood"]
    )
    scale: str = _model(
        "learned",
        "of a normal or student-t: learned, per-pixel (by the decoder), optimal, or a number",
        known=SCALES,
    )
    components: int = _model(10, "of mixtures: priors, posteriors, likelihoods, pseudo-inputs", least=1)
    depth: int = _model(4, "layers of a flow or of a prior over codes, leapfrog steps", least=1, most=10_000)
    rank: int = _model(2, "of a low-rank covariance", least=1)
    temperature: float = _model(2 / 3, "of relaxed posteriors and labels", above=0)
    codebook: int = _model(128, "codes of a vqvae", least=1)
    code_width: int = _model(16, "entries of each", least=1)
    code_updates: str = _model(
        "averaged", "how codes follow features: as their average, or learned by gradients", choices=CODE_UPDATES
    )
    codes: str | None = _model(
        None, "run folder of a vqvae on whose codes to train a prior; all but training is as there"
    )
    prior_width: int = _model(64, "features of a prior over codes at each place", least=1)
    nets: str = _model("mlp", "kind of encoder and decoder; a vqvae's are always conv", choices=NETS)
    hidden: tuple[int, ...] = _model(
        (128, 64), "widths of the encoder's layers; the decoder has them reversed", least=1
    )
    channels: tuple[int, ...] = _model((32, 64), "the same of convolutional nets; each halves a picture", least=1)
    activation: str = _model("relu", "between the layers", choices=ACTIVATIONS)
    norm: str = _model("none", "of the hidden layers", choices=NORMS)
    conditioning: str = _model(
        "concat",
        "how nets take a condition: joined to their inputs, or modulating them; conv always film",
        choices=CONDITIONINGS,
    )
    gated: bool = _model(False, "gated hidden layers")
    residual: bool = _model(False, "residual hidden layers")

    objective: str = _objective("elbo", "the bound to maximise", choices=AXES["objective"])
    particles: int = _objective(1, "draws of z for each datum and step", least=1)
    kl: str = _objective("auto", "the elbo's KL: by draws, in closed form, or closed where it can be", choices=KLS)
    estimator: str = _objective(
        "pathwise", "of the gradient; doubly and sticking take a sampled KL", choices=AXES["estimator"]
    )
    beta: float = _objective(1.0, "weight of the elbo's KL", least=0)
    warm_up: int = _objective(0, "steps in which that weight rises from 0", least=0)
    cycle: int = _objective(0, "steps after which it rises from 0 again; by default never", least=0)
    alpha: float = _objective(0.5, "of the bounds renyi and ciwae")
    groups: int = _objective(4, "of particles, for miwae and piwae", least=1)
    points: tuple[float, ...] = _objective(
        (0.0, 0.01, 0.03, 0.1, 0.3), "of the thermodynamic bound, from 0 to below 1", least=0
    )
    penalise: str = _objective("none", "what the elbo is lowered by", choices=AXES["penalise"])
    penalty: float = _objective(1.0, "weight of that", least=0)
    penalty_target: float = _objective(0.5, "nats: of free-bits per latent, of capacity in all", least=0)
    penalty_rise: int = _objective(0, "steps in which capacity's nats rise from 0", least=0)
    penalty_site: str | None = _objective(None, "the latent to penalise, such as z1, where there are several")
    commitment: float = _objective(0.25, "weight of what draws a vqvae's features to their codes", least=0)

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
    nonfinite: str = _training(
        "stop",
        "what to do when numbers become NaN or infinite: stop, skip the batch, or go back to the start of the "
        "epoch with half the learning rate; ten times at most",
        choices=POLICIES,
    )
    film: bool = _training(True, "make a film of the training")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f, getattr(self, f.name)))
        if not self.data:
            raise ValueError("data must name a data set, a file or a folder, got nothing")
        check_parts(self)
        check_objective(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """A config from plain values.

        Raises:
            ValueError: unknown keys (the nearest known one is named), wrong types or values; ``source`` stands
                first in the message.
        """
        check_each(values, cls.__dataclass_fields__, source)
        return cls(**values)

    @classmethod
    def from_file(cls, path: PathLike, **overrides: Any) -> Config:
        """A config from a TOML file, or a JSON file by its suffix, with some values replaced.

        Raises:
            ValueError: no such file, not readable as TOML or JSON, unknown keys, wrong types or values.
        """
        return cls.from_mapping({**settings_in(path), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def chosen(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    @property
    def given(self) -> str:
        """What the program takes besides the data: "label", "known label", "sum", or nothing."""
        given: str = AXES["model"][self.model].given
        return given

    @property
    def plane(self) -> bool:
        """Whether a plane of codes can be decoded into pictures."""
        whole = bool(AXES["model"][self.model].plane) and AXES["posterior"][self.posterior].prior is None
        return whole and not self.given and not self.counts

    @property
    def counts(self) -> bool:
        """Whether the data are counts, and no pictures."""
        return bool(AXES["likelihood"][self.likelihood].data == "counts")

    @property
    def bits(self) -> tuple[bool, bool]:
        """Whether bounds have a meaning in bits per dimension of 8-bit data, and whether noise was added."""
        noisy = self.binarise == "dequantise"
        return noisy or AXES["likelihood"][self.likelihood].data == "levels", noisy


def settings_in(path: PathLike) -> dict[str, Any]:
    """The settings that a file holds, as plain values, each checked by itself.

    Raises:
        ValueError: as `Config.from_file`.
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = read_text(path, MOST_TEXT)
        values = parse_json(text) if kind == "JSON" else _parse_toml(text)
    except OSError as error:
        raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"config: {path} is no valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold keys and values, got a {type(values).__name__}")
    check_each(values, Config.__dataclass_fields__, str(path))
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    if any(len(line) > MOST_LINE for line in text.split("\n")):
        raise ValueError(f"a line is longer than {MOST_LINE} characters")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def images_of(config: Config) -> Images:
    """Load the data that a config names."""
    loader = DATA.get(config.data)
    if loader is None and look(expanded(config.data), "data") is None:
        unknown = f"{brief(config.data)!r}{nearest(config.data, DATA)}"
        raise ValueError(f"data: no such file, and no known name: {unknown}")
    images = from_path(config.data, counts=config.counts) if loader is None else loader(config.data_dir)
    return images if config.limit is None else subset(images, config.limit)


def presented(config: Config, split: Split, shape: Sequence[int], *, training: bool = False) -> Data:
    """A split as the program takes it: binarised or not, with its labels or sums.

    Args:
        config: the settings.
        split: the data.
        shape: of one datum.
        training: whether a semi-supervised program sees labels: it is judged by data without.
    """
    x, columns = split.x, split.columns[:1]
    if config.model == "deep-markov":
        columns = (x.reshape(len(x), *shape),)
    if config.given == "sum":
        columns = (x, x.sum(1, keepdim=True))
    if config.given == "label":
        columns = split.columns
    if config.given == "known label" and split.y is not None:
        known = int((split.y >= 0).sum())
        kept = (known if config.labelled is None else config.labelled) if training else 0
        if kept > known:
            raise ValueError(f"labelled: {kept} labels are asked for, and {known} training data have one")
        columns = (x, hide_labels(split.y, kept, config.seed))
    return Data(*columns, transform=BINARISE[config.binarise])


def build(config: Config, shape: Sequence[int], classes: int = 0) -> nn.Module:
    """The program of a config, for pictures of a shape, with its initial weights drawn from the config's seed.

    Raises:
        ValueError: a conditional model for unlabelled data; settings that the parts refuse.
    """
    with seeded(config.seed):
        program: nn.Module = AXES["model"][config.model].make(
            Plan(config, tuple(shape), classes, given=config.given)
        )
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
        plan = Plan(config, tuple(shape), classes, size, program, config.given)
        objective: Objective = AXES["objective"][config.objective].make(plan)
    return objective
