"""Run folders: settings, weights, metrics and figures; made by training, read by everything after it.

```
RUN/run.json              settings, shape of a picture, names of the labels, versions
RUN/weights.safetensors   the weights kept: best by the validation bound, or the last good ones
RUN/metrics.csv           one row per epoch
RUN/results.json          what `ppl-vae evaluate` found
RUN/figures/              pictures, and the film of the training
RUN/tensorboard/          event files, where TensorBoard is installed
```
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ppl_vae.batches import prepare
from ppl_vae.checkpoint import Save, load_weights
from ppl_vae.config import (
    COMPILE,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    Config,
    build,
    images_of,
    objective_of,
    presented,
)
from ppl_vae.data import Images, Split
from ppl_vae.evaluate import decode, encode, reconstruct, sample
from ppl_vae.files import PathLike, write_whole
from ppl_vae.film import Film
from ppl_vae.hooks import Anneal, EarlyStop, Hook, LogCSV, LogTensorBoard, cyclical, linear
from ppl_vae.pairs import as_pair
from ppl_vae.plots import (
    curves,
    label_rows,
    latent_plane,
    latent_scatter,
    pca_plane,
    reconstructions,
    samples,
    save,
)
from ppl_vae.rng import seeded
from ppl_vae.train import Run, as_device, fit

__all__ = ["RunFolder", "draw_figures", "installed", "load_run", "train_run", "write_json"]

FORMAT = 1
RECORD, WEIGHTS, METRICS, RESULTS = "run.json", "weights.safetensors", "metrics.csv", "results.json"
TABLE, EACH = "results.csv", "per_datum.csv"
FIGURES, EVENTS, FILM = "figures", "tensorboard", "film.gif"
DRAWN = ("curves.png", "reconstructions.png", "latent.png", "labels.png", "samples.png", "plane.png")
JUDGED = ("bounds.png", "khat.png", "annealing.png", "sandwich.png", "gaps.png", "calibration.png")
FILMED, SCATTERED, MOST_ROWS = 24, 1000, 50  # how many data the film and the scatter show, how many labels


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: its settings, and its program with the weights that training kept."""

    path: Path
    config: Config
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    program: Any
    engine: str = ""  # how its steps were run

    def images(self, data: PathLike | None = None, data_dir: PathLike | None = None) -> Images:
        """The data the run was trained on, loaded again, or others in their place.

        Args:
            data: other data, or where the same ones are now.
            data_dir: where the files of mnist or fashion-mnist are now.

        Raises:
            ValueError: they are not there, of another shape, or for a conditional model of other labels.
        """
        config = self.config
        config = config if data is None else replace(config, data=os.fspath(data))
        config = config if data_dir is None else replace(config, data_dir=os.fspath(data_dir))
        images = images_of(config)
        if images.shape != self.shape:
            raise ValueError(
                f"data: pictures of {config.data} have shape {images.shape}, those of the run {self.shape}"
            )
        if "label" in config.given and images.classes != self.classes:
            raise ValueError(f"data: {config.data} has labels {images.classes}, the run {self.classes}")
        return images

    @property
    def pictures(self) -> bool:
        """Whether the data can be shown."""
        return len(self.shape) > 1


def train_run(
    config: Config, folder: PathLike, *, force: bool = False, progress: bool = True
) -> tuple[Run, RunFolder]:
    """Train what a config says, into a folder.

    Everything that can fail for the user's reasons (data, settings, device, an unwritable folder) fails before
    training, and before the folder is made or an earlier run in it is touched.

    Args:
        config: the settings.
        folder: where to write; must be new or empty unless ``force``.
        force: replace an earlier run in the folder.
        progress: show a bar on a terminal.

    Returns:
        The training run, and the folder with the trained program.

    Raises:
        ValueError: bad data or settings, no such device, or a folder that is in use or cannot be written.
        NonFiniteError: the objective became NaN or infinite; the folder holds the last good weights.
    """
    _refuse_if_in_use(Path(folder), force)
    device, images = as_device(config.device), images_of(config)
    program: Any = build(config, images.shape, len(images.classes))
    with seeded(config.seed):
        rows = presented(config, images.train, images.shape).present(slice(None))[0]
        program.likelihood.start_from(rows.flatten(0, -2))
        if start := getattr(getattr(program, "prior", None), "start_at", None):
            start(rows)
    if config.norm == "batch" and 1 in (config.batch_size, len(images.train) % config.batch_size):
        raise ValueError(
            f"batch_size: norm 'batch' cannot take a batch of one; {len(images.train)} data in batches of "
            f"{config.batch_size} leave one; choose another batch_size, or norm 'layer'"
        )
    for split in (images.train, images.valid, images.test):
        prepare(as_pair(program), presented(config, split, images.shape, training=split is images.train))
    path = _open_folder(Path(folder))
    record = RunFolder(path, config, images.shape, images.classes, program)
    try:
        write_json(path / RECORD, _record(record))
        run = _fit(record, images, device, progress)
        record = replace(record, engine=run.engine.describe())
        write_json(path / RECORD, _record(record))
    finally:
        if not (path / WEIGHTS).exists():  # stopped before there was anything to keep
            _clear(path)
    draw_figures(record, images)
    return run, record


def _fit(record: RunFolder, images: Images, device: torch.device, progress: bool) -> Run:
    config, size = record.config, len(images.train.columns[0])
    objective = objective_of(config, record.program, images.shape, size, len(images.classes))
    schedule = SCHEDULES[config.schedule]
    return fit(
        record.program,
        presented(config, images.train, images.shape, training=True),
        presented(config, images.valid, images.shape),
        objective=objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=partial(OPTIMIZERS[config.optimizer], lr=config.learning_rate),
        scheduler=None if schedule is None else partial(schedule, T_max=config.epochs),
        clip_norm=config.clip_norm,
        seed=config.seed,
        device=device,
        hooks=_hooks(record, images, objective),
        progress=progress,
        compile=COMPILE[config.compile],
        precision=PRECISIONS[config.precision],
    )


def _hooks(record: RunFolder, images: Images, objective: nn.Module) -> list[Hook]:
    config, path = record.config, record.path
    hooks: list[Hook] = [LogCSV(path / METRICS), Save(path / WEIGHTS)]
    if config.patience is not None:
        hooks.append(EarlyStop(config.patience))
    if config.warm_up:
        rise = linear(0.0, config.beta, config.warm_up)
        if config.cycle:
            rise = cyclical(0.0, config.beta, config.cycle, config.warm_up / config.cycle)
        hooks.append(Anneal(objective.get_buffer("beta"), rise))
    if config.penalty_rise:
        target = objective.get_buffer("penalties.0.target")
        hooks.append(Anneal(target, linear(0.0, config.penalty_target, config.penalty_rise)))
    if config.film and record.pictures:
        rows = _shown(record, images.valid[:FILMED])
        hooks.append(Film(path / FIGURES / FILM, rows, images.shape, draws=FILMED))
    if find_spec("tensorboard") is not None:  # an extra; metrics.csv holds the same
        hooks.append(LogTensorBoard(path / EVENTS))
    return hooks


def _shown(run: RunFolder, split: Split) -> tuple[Tensor, ...]:
    """All rows of a split as the program takes them."""
    with seeded(run.config.seed):
        return presented(run.config, split, run.shape).present(slice(None))


def load_run(folder: PathLike) -> RunFolder:
    """Read a run folder; nothing in it is executed.

    Raises:
        ValueError: no run there, or one that is damaged or of a newer format; the message says which.
    """
    path = Path(folder)
    held = _read_record(path)
    try:
        config = Config.from_mapping(held["config"], str(path / RECORD))
        shape, classes = tuple(held["shape"]), tuple(held["classes"])
        if len(shape) not in (1, 2, 3) or not all(type(side) is int and side > 0 for side in shape):
            raise TypeError(f"shape {shape}")
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes {classes}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run: {path / RECORD} is damaged ({type(error).__name__}: {error})") from error
    program = build(config, shape, len(classes))
    try:
        load_weights(program, path / WEIGHTS)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"run: {str(error).removeprefix('path: ')}") from error
    return RunFolder(path, config, shape, classes, program, str(held.get("engine", "")))


def _read_record(path: Path) -> dict[str, Any]:
    """What run.json holds, if it is of this format."""
    try:
        held = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"run: no run folder at {path} ({error.strerror}: {RECORD})") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"run: {path / RECORD} is damaged ({error})") from error
    if not isinstance(held, dict) or "format" not in held:
        raise ValueError(f"run: {path / RECORD} is damaged (it names no format)")
    if held["format"] != FORMAT:
        raise ValueError(
            f"run: {path} has format {held['format']!r}, this version reads {FORMAT}; upgrade ppl-vae to read it"
        )
    return held


def draw_figures(run: RunFolder, images: Images) -> list[Path]:
    """Draw training curves, reconstructions, samples and the latent space of a run, on the test split.

    Returns:
        The files written. Curves need an epoch, the latent plane two data and two dimensions of z.

    Raises:
        ValueError: metrics.csv is missing or damaged, or a file cannot be written.
    """
    folder = run.path / FIGURES
    history = _history(run.path / METRICS)
    figures: dict[str, Figure] = {"curves.png": curves(history)} if history else {}
    figures |= _inferred(run, images) | (_generated(run) if run.pictures else {})
    folder.mkdir(exist_ok=True)
    return [save(figure, folder / name) for name, figure in figures.items()]


def _inferred(run: RunFolder, images: Images) -> dict[str, Figure]:
    """Figures of held-out data: reconstructions, codes, and the plane that the codes spread in."""
    program, split = run.program, images.test[:SCATTERED]
    shown = _shown(run, split)
    some = tuple(column[:30] for column in shown)
    figures = {}
    if run.pictures:
        figures["reconstructions.png"] = reconstructions(some[0], reconstruct(program, *some).cpu(), run.shape)
    codes = encode(program, *shown)
    name = "z" if "z" in codes else min(codes)  # of several levels, that next to the data
    z = codes[name].cpu()
    flat = z.shape[1] <= 2
    if not flat and len(z) < 2:
        return figures  # no plane through a single code
    of = "" if len(codes) == 1 else f" {name}"
    figures["latent.png"] = latent_scatter(z, split.y, images.classes, f"Latent codes{of}")
    if z.shape[1] > 1 and run.config.plane:
        lift = _plane(z) if not flat else None
        rest = {other: code.mean(0) for other, code in codes.items() if other != name}
        figures["plane.png"] = latent_plane(
            lambda plane: decode(
                program,
                {name: plane if lift is None else lift(plane)}
                | {other: mean.expand(len(plane), *mean.shape) for other, mean in rest.items()},
            ).cpu(),
            run.shape,
            title=f"Decoded latent plane{of} (means)",
            names=("$z_1$", "$z_2$") if flat else ("principal component 1", "principal component 2"),
        )
    return figures


def _plane(z: Tensor) -> Callable[[Tensor], Tensor]:
    """The plane of the first principal components of codes, in standard deviations: few priors are N(0, I)."""
    project, lift = pca_plane(z)
    spread = project(z).std(0)
    return lambda plane: lift(plane * spread)


def _generated(run: RunFolder) -> dict[str, Figure]:
    """Means of draws from the prior; of a model that takes labels, a row for each."""
    if not run.config.given:
        return {"samples.png": samples(sample(run.program, 64, mean=True).cpu(), run.shape)}
    rows = torch.arange(min(len(run.classes), MOST_ROWS)).repeat_interleave(10)
    means = sample(run.program, len(rows), rows, mean=True).cpu()
    return {"labels.png": label_rows(means, rows, run.shape, run.classes)}


def write_json(path: PathLike, values: Mapping[str, Any]) -> Path:
    """Write plain values as JSON, whole or not at all; NaN and infinity, which JSON lacks, become null.

    Raises:
        ValueError: the file cannot be written.
    """
    text = json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def installed(package: str) -> str:
    """The version of an installed package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _record(run: RunFolder) -> dict[str, Any]:
    packages = ("ppl-vae", "torch", "pyro-ppl", "arviz", "numpy")
    return {
        "format": FORMAT,
        "config": run.config.to_dict(),
        "shape": list(run.shape),
        "classes": list(run.classes),
        "engine": run.engine,
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in packages},
    }


def _refuse_if_in_use(path: Path, force: bool) -> None:
    """Raise ValueError for a folder with something else in it or, unless ``force``, with a run."""
    try:
        if not path.exists() or not any(path.iterdir()):
            return
    except OSError as error:
        raise ValueError(f"out: cannot write to {path} ({error.strerror})") from error
    if not (path / RECORD).exists():
        raise ValueError(f"out: {path} is not empty and holds no run; choose another folder")
    if not force:
        raise ValueError(f"out: {path} holds a run already; choose another folder, or --force to replace it")


def _open_folder(path: Path) -> Path:
    """Make the run folder; an earlier run in it is deleted."""
    try:
        _clear(path)
        (path / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot write to {path} ({error.strerror})") from error
    return path


def _clear(path: Path) -> None:
    """Delete what a run writes, and nothing else."""
    figures = (f"{FIGURES}/{name}" for name in (*DRAWN, *JUDGED, FILM))
    for name in (RECORD, WEIGHTS, METRICS, RESULTS, TABLE, EACH, *figures):
        (path / name).unlink(missing_ok=True)
    if (path / EVENTS).is_dir():
        shutil.rmtree(path / EVENTS)
    for folder in (path / FIGURES, path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _history(path: Path) -> list[dict[str, float]]:
    """The rows that `LogCSV` wrote."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"run: {path} is missing or damaged ({error})") from error
