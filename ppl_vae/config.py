"""Settings of a run: every choice a field, a flag and a key of a TOML file; strings become objects here alone.

Adding a variant to the command line is one row in one of the tables of `ppl_vae.plan` and `ppl_vae.axes`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
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
from ppl_vae.products import Precision
from ppl_vae.rng import seeded
from ppl_vae.semisupervised import hide_labels
from ppl_vae.settings import check_each, checked, nearest, setting
from ppl_vae.traces import KL
from ppl_vae.transforms import dequantise, redraw, threshold

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
CONDITIONINGS = ("concat", "film")
LABELS = ("relaxed", "enumerated")
SITED = ("mmd", "total-correlation", "factor", "adversarial")  # penalties of one latent


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

    data: str = _data("digits", "digits, mnist, fashion-mnist, or a path: .npz, .npy or a folder of pictures")
    data_dir: str | None = _data(
        None, "folder with the files of mnist or fashion-mnist; by default they are fetched"
    )
    limit: int | None = _data(None, "use only the first rows of each split; by default all", least=1)
    binarise: str = _data(
        "none", "pixels as they are, cut at one half, redrawn when shown, or made continuous", choices=BINARISE
    )

    model: str = _model("vae", "the program; a cvae is conditioned on the label", choices=AXES["model"])
    levels: int = _model(2, "of a program with several, each half as wide as the one below", least=1)
    path: bool = _model(False, "a deterministic path beside the levels, shared by the ladder's guide")
    labelled: int | None = _model(
        None, "training data whose labels a semi-supervised program sees; by default all", least=1
    )
    labels: str = _model("relaxed", "how such a program draws those it does not see", choices=LABELS)
    label_weight: float = _model(10.0, "of such a program's classifier, for each label seen", least=0)
    latent: int = _model(2, "dimensions of z", least=1)
    prior: str | None = _model(None, "of z; by default standard, or conditional for a cvae", choices=AXES["prior"])
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
    depth: int = _model(4, "layers of a flow, leapfrog steps", least=1)
    rank: int = _model(2, "of a low-rank covariance", least=1)
    temperature: float = _model(2 / 3, "of relaxed posteriors and labels", above=0)
    nets: str = _model("mlp", "kind of encoder and decoder", choices=NETS)
    hidden: tuple[int, ...] = _model(
        (128, 64), "widths of the encoder's layers; the decoder has them reversed", least=1
    )
    channels: tuple[int, ...] = _model((32, 64), "the same of convolutional nets", least=1)
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
            object.__setattr__(self, f.name, checked(f, getattr(self, f.name)))
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
        check_each(values, cls.__dataclass_fields__, source)
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
        check_each(values, cls.__dataclass_fields__, str(path))
        return cls.from_mapping({**values, **overrides})

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


def images_of(config: Config) -> Images:
    """Load the data that a config names."""
    loader = DATA.get(config.data)
    if loader is None and not Path(config.data).expanduser().exists():
        raise ValueError(f"data: no such file, and no known name: {config.data!r}{nearest(config.data, DATA)}")
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


def _check_parts(c: Config) -> None:
    """Raise ValueError where settings of the model do not go together."""
    model, posterior = AXES["model"][c.model], AXES["posterior"][c.posterior]
    if c.scale != "learned" and c.likelihood not in ("normal", "student-t"):
        raise ValueError(f"scale is that of the normal and student-t likelihoods; {c.likelihood} has none")
    if c.scale not in SCALES and not _positive(c.scale):
        raise ValueError(f"scale must be {', '.join(SCALES)} or a positive number, got {c.scale!r}")
    if posterior.prior is not None and c.prior is not None:
        raise ValueError(f"prior: posterior {c.posterior!r} comes with its own; leave prior out")
    if c.prior == "conditional" and c.given not in ("label", "known label"):
        raise ValueError("prior 'conditional' is given the label, which only 'cvae' and 'semi-supervised' take")
    if c.prior == "vamp" and (c.model != "vae" or c.posterior == "hamiltonian" or not posterior.density):
        raise ValueError("prior 'vamp' needs model 'vae' and a posterior with a density, other than hamiltonian")
    if c.norm == "batch" and (c.prior == "vamp" or c.posterior == "hamiltonian" or c.penalise == "gradient"):
        raise ValueError(
            "norm 'batch' mixes data, which prior 'vamp', posterior 'hamiltonian' and penalise 'gradient' forbid"
        )
    if model.own and (c.prior is not None or c.posterior != "mean-field"):
        raise ValueError(f"model {c.model!r} has a prior and a posterior of its own; leave both out")
    if c.model == "belief" and (c.likelihood != "bernoulli" or c.nets != "mlp" or c.path):
        raise ValueError(
            "model 'belief' is linear, over bits: likelihood must be 'bernoulli', nets 'mlp', no path"
        )
    if AXES["likelihood"][c.likelihood].data == "levels" and c.binarise != "none":
        raise ValueError(
            f"likelihood {c.likelihood!r} is of 256 levels; binarise must be 'none', got {c.binarise!r}"
        )
    if c.given == "sum" and not (c.counts and c.binarise == "none"):
        raise ValueError(
            f"model {c.model!r} is one of counts; likelihood must be one of counts, and binarise 'none'"
        )
    for name in ("labelled", "labels", "label_weight"):
        if c.given != "known label" and c.chosen(name):
            raise ValueError(f"{name}: model {c.model!r} has no labels to hide; it is for 'semi-supervised'")
    if c.chosen("conditioning") and not c.given:
        raise ValueError(f"conditioning: model {c.model!r} is given no condition")
    if c.path and c.model not in ("hierarchical", "ladder"):
        raise ValueError(f"path: model {c.model!r} has no levels to go along; 'hierarchical' and 'ladder' have")


def _check_objective(c: Config) -> None:
    """Raise ValueError where settings of the objective do not go together."""
    if (c.beta != 1 or c.warm_up) and c.objective != "elbo":
        raise ValueError("beta and warm_up weigh the KL of the elbo; the other bounds have none to weigh")
    if c.chosen("kl") and c.objective != "elbo":
        raise ValueError(f"kl is the elbo's; objective {c.objective!r} takes weights of draws; leave kl out")
    if c.chosen("points") and c.objective != "thermodynamic":
        raise ValueError(f"points are those of objective 'thermodynamic'; got {c.objective!r}")
    if c.chosen("alpha") and c.objective not in ("renyi", "ciwae"):
        raise ValueError(f"alpha is that of objectives 'renyi' and 'ciwae'; got {c.objective!r}")
    if not AXES["posterior"][c.posterior].density and c.objective != "elbo":
        raise ValueError(f"posterior {c.posterior!r} has no weights for a bound; objective must be 'elbo'")
    if c.cycle and not 0 < c.warm_up <= c.cycle:
        raise ValueError(f"cycle is what warm_up is a part of: give warm_up from 1 to {c.cycle}, got {c.warm_up}")
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
    if c.penalise == "gradient" and (AXES["model"][c.model].own or c.given == "known label"):
        raise ValueError(f"penalise 'gradient' is for decoders of one latent; model {c.model!r} has another kind")
    if c.penalty_site is not None and c.penalise not in SITED:
        raise ValueError(f"penalty_site is for penalise {', '.join(SITED)}; penalise is {c.penalise!r}")
    if c.penalty_rise and c.penalise != "capacity":
        raise ValueError(f"penalty_rise raises the nats of penalise 'capacity'; penalise is {c.penalise!r}")
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
