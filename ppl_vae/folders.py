"""Run folders: settings, weights, metrics and figures; made by training, read by everything after it.

```
RUN/run.json              settings, shape of a picture, names of the labels, how it came about
RUN/weights.safetensors   the weights kept: best by the validation bound, or the last good ones
RUN/metrics.csv           one row per epoch
RUN/results.json          what `ppl-vae evaluate` found
RUN/figures/              pictures, and the film of the training
RUN/checkpoints/          what training needs to go on, of the last epochs
RUN/faults/               batches on which numbers went wrong, and the state of the run then
RUN/tensorboard/          event files, where TensorBoard is installed
```
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ppl_vae.checkpoint import load_weights
from ppl_vae.config import Config, build, images_of, presented
from ppl_vae.data import Images, Split
from ppl_vae.files import PathLike, brief, look, parse_json, read_text, resolved, write_whole
from ppl_vae.limits import BeyondError, Bounded
from ppl_vae.packing import read_entries
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded
from ppl_vae.settings import printable

__all__ = ["CHECKPOINTS", "EACH", "EVENTS", "FAULTS", "FIGURES", "FILM", "FIRST", "JUDGED", "METRICS", "RECORD"]
__all__ += ["RESULTS", "TABLE", "WEIGHTS", "RunFolder", "clear", "load_run", "made_of", "open_folder", "record_of"]
__all__ += ["refuse_if_in_use", "refuse_links", "settings_of", "shape_and_classes", "shown", "write_json"]

FORMAT = 1
MOST_RECORD = 16 * 2**20  # bytes of run.json
RECORD, WEIGHTS, METRICS, RESULTS = "run.json", "weights.safetensors", "metrics.csv", "results.json"
TABLE, EACH = "results.csv", "per_datum.csv"
FIGURES, EVENTS, FILM, CHECKPOINTS, FAULTS = "figures", "tensorboard", "film.gif", "checkpoints", "faults"
FIRST = "first-stage.safetensors"  # in the folder of checkpoints: the program before its prior is learned
CUT_OFF = re.compile(r"\..+\.\d+\.part")  # what a kill leaves of a file
DRAWN = ("curves.png", "reconstructions.png", "latent.png", "labels.png", "samples.png", "plane.png", "codes.png")
JUDGED = ("bounds.png", "khat.png", "annealing.png", "sandwich.png", "gaps.png", "calibration.png")


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: its settings, and its program with the weights that training kept."""

    path: Path
    config: Config
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    program: Any
    engine: str = ""  # how its steps were run
    made: dict[str, Any] = field(default_factory=dict)  # how it came about, see `ppl_vae.records`
    faults: tuple[str, ...] = ()  # numbers that went wrong, each in one line

    def images(self, data: PathLike | None = None, data_dir: PathLike | None = None) -> Images:
        """The data the run was trained on, loaded again, or others in their place.

        Args:
            data: other data, or where the same ones are now.
            data_dir: where the files of mnist, fashion-mnist or cifar10 are now.

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


def shown(run: RunFolder, split: Split) -> tuple[Tensor, ...]:
    """All rows of a split as the program takes them."""
    with seeded(run.config.seed):
        return presented(run.config, split, run.shape).present(slice(None))


def load_run(folder: PathLike) -> RunFolder:
    """Read a run folder, its program in evaluation mode; nothing in it is executed, and nothing written.

    While the program is built it takes memory in proportion to its weights, whatever the settings say.

    Raises:
        ValueError: no run there, or one that is damaged or of a newer format; the message says which.
    """
    path = Path(folder)
    held = _read_record(path)
    config, shape, classes = _known(path, held)
    if (found := look(path / WEIGHTS, "run")) is None or not stat.S_ISREG(found.st_mode):
        raise ValueError(f"run: no weights at {path / WEIGHTS}")
    try:
        entries = read_entries(path / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"run: {str(error).removeprefix('path: ')}") from error
    # Once for what is kept, and as much for what passes, twice over.
    within = Bounded(2**24 + 4 * sum(entry.size for entry in entries.values()), 1000 + 16 * len(entries))
    try:
        with within:
            program = build(config, shape, len(classes))
    except BeyondError as error:
        larger = f"{path / RECORD} describes a program far larger than the weights in {WEIGHTS} ({error})"
        raise ValueError(f"run: {larger}; one of the two is not the run's own: copy both again") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"run: {path / RECORD} describes no program that can be built: {why}") from error
    program.eval()  # a codebook in training moves whenever it is run
    try:
        load_weights(program, path / WEIGHTS)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"run: {str(error).removeprefix('path: ')}") from error
    faults = held.get("faults")
    lines = tuple(map(str, faults)) if isinstance(faults, list) else ()
    return RunFolder(path, config, shape, classes, program, str(held.get("engine", "")), _made(held), lines)


def settings_of(folder: PathLike) -> Config:
    """The settings of a run, whether or not it has weights yet.

    Raises:
        ValueError: no run there, or one that is damaged or of a newer format.
    """
    path = Path(folder)
    return _known(path, _read_record(path))[0]


def shape_and_classes(folder: PathLike) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The shape of a run's pictures, and the names of its labels.

    Raises:
        ValueError: as for `settings_of`.
    """
    path = Path(folder)
    return _known(path, _read_record(path))[1:]


def made_of(folder: PathLike) -> dict[str, Any]:
    """How a run came about; empty where it does not tell.

    Raises:
        ValueError: as for `settings_of`.
    """
    return _made(_read_record(Path(folder)))


def _made(held: Mapping[str, Any]) -> dict[str, Any]:
    found = held.get("made")
    return found if isinstance(found, dict) and isinstance(found.get("resumed", []), list) else {}


def _known(path: Path, held: Mapping[str, Any]) -> tuple[Config, tuple[int, ...], tuple[str, ...]]:
    """Settings, shape and labels, as run.json holds them."""
    try:
        config = Config.from_mapping(held["config"], str(path / RECORD))
        shape, classes = tuple(held["shape"]), tuple(held["classes"])
        if len(shape) not in (1, 2, 3) or not all(type(side) is int and side > 0 for side in shape):
            raise TypeError(f"shape {shape}")
        if not isinstance(held["classes"], list) or not all(isinstance(n, str) and printable(n) for n in classes):
            raise TypeError("classes that are no text to show")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run: {path / RECORD} is damaged ({type(error).__name__}: {error})") from error
    return config, shape, classes


def _read_record(path: Path) -> dict[str, Any]:
    """What run.json holds, if it is of this format."""
    try:
        held = parse_json(read_text(path / RECORD, MOST_RECORD))
    except OSError as error:
        raise ValueError(f"run: no run folder at {brief(path)} ({error.strerror}: {RECORD})") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"run: {path / RECORD} is damaged ({error})") from error
    if not isinstance(held, dict) or "format" not in held:
        raise ValueError(f"run: {path / RECORD} is damaged (it names no format)")
    if held["format"] != FORMAT:
        raise ValueError(
            f"run: {path} has format {held['format']!r}, this version reads {FORMAT}; upgrade ppl-vae to read it"
        )
    return held


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


def record_of(run: RunFolder) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "format": FORMAT,
        "config": run.config.to_dict(),
        "shape": list(run.shape),
        "classes": list(run.classes),
        "engine": run.engine,
        "made": run.made,
        "faults": list(run.faults),
    }


def refuse_if_in_use(path: Path, force: bool) -> None:
    """Raise ValueError for a folder with something else in it or, unless ``force``, with a run."""
    refuse_links(path)
    try:
        if not path.exists() or all(CUT_OFF.fullmatch(file.name) for file in path.iterdir()):
            return
    except OSError as error:
        raise ValueError(f"out: cannot write to {path} ({error.strerror})") from error
    if not (path / RECORD).exists():
        raise ValueError(f"out: {path} is not empty and holds no run; choose another folder")
    if not force:
        raise ValueError(f"out: {path} holds a run already; choose another folder, or --force to replace it")


def refuse_links(path: Path) -> None:
    """Raise ValueError where writing into a run folder would write, or delete, outside it: a link leads there."""
    inside = resolved(path, "run")
    for name in (RECORD, WEIGHTS, METRICS, RESULTS, TABLE, EACH, FIGURES, EVENTS, CHECKPOINTS, FAULTS):
        try:
            linked = (path / name).is_symlink()
        except OSError as error:
            raise ValueError(f"run: cannot look into {path} ({error.strerror}); make it readable") from error
        if linked and not resolved(path / name, "run").is_relative_to(inside):
            raise ValueError(f"run: {path / name} is a link that leads out of the folder; remove it first")


def open_folder(path: Path) -> Path:
    """Make the run folder; an earlier run in it is deleted."""
    try:
        clear(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot write to {path} ({error.strerror})") from error
    return path


def clear(path: Path) -> None:
    """Delete what a run writes, and nothing else; what makes it a run goes last, in case this is cut off."""
    figures = (f"{FIGURES}/{name}" for name in (*DRAWN, *JUDGED, FILM))
    for name in (WEIGHTS, METRICS, RESULTS, TABLE, EACH, *figures):
        (path / name).unlink(missing_ok=True)
    if (path / EVENTS).is_dir():
        shutil.rmtree(path / EVENTS)
    Checkpoints(path / CHECKPOINTS).clear()
    (path / CHECKPOINTS / FIRST).unlink(missing_ok=True)
    for file in (path / FAULTS).glob("step-*.safetensors"):
        file.unlink()
    (path / RECORD).unlink(missing_ok=True)
    for folder in (path / FIGURES, path / CHECKPOINTS, path / FAULTS, path):
        for file in [] if not folder.is_dir() else [f for f in folder.iterdir() if CUT_OFF.fullmatch(f.name)]:
            file.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
