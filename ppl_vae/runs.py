"""Run folders: a config, weights, metrics and figures; made by training, read by everything after it."""

from __future__ import annotations

import csv
import json
import platform
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.checkpoint import Save, load_weights
from ppl_vae.config import OPTIMIZERS, SCHEDULES, Config, build, images_of, objective_of, presented
from ppl_vae.data import Images
from ppl_vae.evaluate import decode, encode, reconstruct, sample
from ppl_vae.files import PathLike, write_whole
from ppl_vae.film import Film
from ppl_vae.hooks import Anneal, EarlyStop, Hook, LogCSV, LogTensorBoard, linear
from ppl_vae.models import CVAE
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
from ppl_vae.train import Run, fit

__all__ = ["RunFolder", "draw_figures", "load_run", "train_run", "write_json"]

FORMAT = 1
RECORD, WEIGHTS, METRICS, RESULTS = "run.json", "weights.safetensors", "metrics.csv", "results.json"


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: its settings, and its program with the weights that training kept."""

    path: Path
    config: Config
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    program: Any

    def images(self) -> Images:
        """The data the run was trained on, loaded again.

        Raises:
            ValueError: they are not there any more, or of another shape.
        """
        images = images_of(self.config)
        if images.shape != self.shape:
            raise ValueError(f"data: {self.config.data} has shape {images.shape}, the run {self.shape}")
        return images


def train_run(
    config: Config, folder: PathLike, *, force: bool = False, progress: bool = True
) -> tuple[Run, RunFolder]:
    """Train what a config says, into a folder: run.json, weights, metrics.csv, figures and a film.

    Everything that can fail for the user's reasons (data, settings, an unwritable folder) fails before training.

    Args:
        config: the settings.
        folder: where to write; must be new or empty unless ``force``.
        force: replace an earlier run in the folder.
        progress: show a bar on a terminal.

    Raises:
        ValueError: bad data or settings, or a folder that is in use or cannot be written.
    """
    images = images_of(config)
    with seeded(config.seed):
        program: Any = build(config, images.shape, len(images.classes))
        program.likelihood.start_from(presented(config, images.train).present(slice(None))[0])
    path = _open_folder(Path(folder), force)
    record = RunFolder(path, config, images.shape, images.classes, program)
    write_json(path / RECORD, _record(record))
    objective, optimizer, scheduler = (
        objective_of(config),
        OPTIMIZERS[config.optimizer],
        SCHEDULES[config.schedule],
    )
    run = fit(
        program,
        presented(config, images.train),
        presented(config, images.valid),
        objective=objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=partial(optimizer, lr=config.learning_rate),
        scheduler=None if scheduler is None else partial(scheduler, T_max=config.epochs),
        clip_norm=config.clip_norm,
        seed=config.seed,
        device=config.device,
        hooks=_hooks(config, path, images, objective),
        progress=progress,
    )
    draw_figures(record, images)
    return run, record


def _hooks(config: Config, path: Path, images: Images, objective: nn.Module) -> list[Hook]:
    hooks: list[Hook] = [LogCSV(path / METRICS), Save(path / WEIGHTS)]
    if config.patience is not None:
        hooks.append(EarlyStop(config.patience))
    if config.warm_up:
        beta = objective.beta
        assert isinstance(beta, Tensor)
        hooks.append(Anneal(beta, linear(0.0, config.beta, config.warm_up)))
    if config.film:
        rows = _followed(config, images)
        hooks.append(Film(path / "figures" / "film.gif", rows, images.shape))
    if find_spec("tensorboard") is not None:  # an extra; metrics.csv holds the same
        hooks.append(LogTensorBoard(path / "tensorboard"))
    return hooks


def _followed(config: Config, images: Images, count: int = 30) -> tuple[Tensor, ...]:
    """The fixed inputs of the film: the first held-out data, and of a conditional model one row per label."""
    with seeded(config.seed):
        x, *labels = presented(config, images.valid).present(slice(0, count))
    return (x, *labels) if config.model == "cvae" else (x,)


def load_run(folder: PathLike) -> RunFolder:
    """Read a run folder; nothing in it is executed.

    Raises:
        ValueError: no run there, or one that is damaged or of a newer format; the message says which.
    """
    path = Path(folder)
    record = path / RECORD
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        made_by = held["format"]
        if made_by != FORMAT:
            raise ValueError(f"run: {path} has format {made_by!r}, this version reads {FORMAT}; upgrade ppl-vae")
        config = Config.from_mapping(held["config"], str(record))
        shape, classes = tuple(int(s) for s in held["shape"]), tuple(str(c) for c in held["classes"])
    except OSError as error:
        raise ValueError(f"run: no run folder at {path} ({error.strerror})") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"run: {record} is damaged ({type(error).__name__}: {error})") from error
    program = build(config, shape, len(classes))
    load_weights(program, path / WEIGHTS)  # type: ignore[arg-type]
    return RunFolder(path, config, shape, classes, program)


def draw_figures(run: RunFolder, images: Images) -> list[Path]:
    """Draw training curves, reconstructions, samples and the latent space of a run; return the files."""
    folder, config, program = run.path / "figures", run.config, run.program
    folder.mkdir(exist_ok=True)
    test = presented(config, images.test)
    with seeded(config.seed):
        batch = test[:1000].present(slice(None))
    shown = batch if isinstance(program, CVAE) else batch[:1]
    labels = images.test.y[:1000] if images.test.y is not None else None
    z = encode(program, *shown)["z"].cpu()
    drawn = {
        "curves.png": curves(_history(run.path / METRICS)),
        "reconstructions.png": reconstructions(
            shown[0][:32], reconstruct(program, *(c[:32] for c in shown)).cpu(), run.shape
        ),
        "latent.png": latent_scatter(z, labels, run.classes),
    }
    if isinstance(program, CVAE):
        rows = torch.arange(len(run.classes)).repeat_interleave(10)
        means = sample(program, len(rows), rows, mean=True).cpu()
        drawn["labels.png"] = label_rows(means, rows, run.shape, run.classes)
    else:
        drawn["samples.png"] = samples(sample(program, 64, mean=True).cpu(), run.shape)
        if config.latent >= 2:
            lift = pca_plane(z)[1] if config.latent > 2 else (lambda plane: plane)
            drawn["plane.png"] = latent_plane(
                lambda plane: decode(program, {"z": lift(plane).float()}).cpu(), run.shape
            )
    return [save(figure, folder / name) for name, figure in drawn.items()]


def write_json(path: PathLike, values: Any) -> Path:
    """Write plain values as JSON, whole or not at all."""
    text = json.dumps(values, indent=2) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _record(run: RunFolder) -> dict[str, Any]:
    packages = ("ppl-vae", "torch", "pyro-ppl", "arviz", "numpy")
    return {
        "format": FORMAT,
        "config": run.config.to_dict(),
        "shape": list(run.shape),
        "classes": list(run.classes),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "command": " ".join(["ppl-vae", *sys.argv[1:]]),
    }


def _open_folder(path: Path, force: bool) -> Path:
    """Make the run folder, or raise ValueError before anything is lost."""
    try:
        if path.exists() and any(path.iterdir()):
            if not (path / RECORD).exists():
                raise ValueError(f"out: {path} is not empty and holds no run; choose another folder")
            if not force:
                raise ValueError(
                    f"out: {path} holds a run already; choose another folder, or --force to replace it"
                )
            for stale in (WEIGHTS, METRICS, RESULTS):
                (path / stale).unlink(missing_ok=True)
        (path / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot write to {path} ({error.strerror})") from error
    return path


def _history(path: Path) -> list[dict[str, float]]:
    """The rows that `LogCSV` wrote."""
    try:
        with path.open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"run: {path} is missing or damaged ({error})") from error
    if not rows:
        raise ValueError(f"run: {path} holds no epoch")
    return rows
