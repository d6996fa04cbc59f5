"""Training into a run folder: a program or, on the codes of another run, a prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ppl_vae.axes import AXES
from ppl_vae.batches import prepare
from ppl_vae.checkpoint import Save, load_weights, save_weights
from ppl_vae.coding import WatchCodes, code_indices
from ppl_vae.config import (
    COMPILE,
    OPTIMIZERS,
    POLICIES,
    PRECISIONS,
    SCHEDULES,
    Config,
    build,
    images_of,
    objective_of,
    presented,
)
from ppl_vae.data import Images
from ppl_vae.faults import Faults
from ppl_vae.figures import draw_figures
from ppl_vae.files import PathLike, resolved
from ppl_vae.film import Film
from ppl_vae.folders import (
    CHECKPOINTS,
    EVENTS,
    FAULTS,
    FIGURES,
    FILM,
    FIRST,
    METRICS,
    RECORD,
    WEIGHTS,
    RunFolder,
    clear,
    load_run,
    made_of,
    open_folder,
    record_of,
    refuse_if_in_use,
    refuse_links,
    settings_of,
    shape_and_classes,
    shown,
    write_json,
)
from ppl_vae.hooks import Anneal, EarlyStop, Hook, LogCSV, LogTensorBoard, WholeProgram, cyclical, linear
from ppl_vae.models import Density
from ppl_vae.objectives import ELBO, Objective
from ppl_vae.pairs import as_pair
from ppl_vae.ranks import alone, count_ranks, from_first, own_rank
from ppl_vae.records import circumstances
from ppl_vae.resuming import Checkpoints, Resume
from ppl_vae.rng import seeded
from ppl_vae.train import NonFiniteError, Run, as_device, fit

__all__ = ["RunFolder", "load_run", "second_stage", "train_run"]

FILMED, WATCHED = 24, 500  # how many data the film shows, and how many tell the use of codes
OF_PRIOR = ("prior", "depth", "prior_width", "codes", "data_dir")  # what a run may choose besides its training


def second_stage(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a prior learned on the codes of the run that "codes" names: what else is left open is as there.

    Args:
        values: settings by name; those of training are not taken over.

    Raises:
        ValueError: no such run, or one without codes; a setting at odds with it.
    """
    first = load_run(values["codes"])
    _check_agrees(values, first)
    return {**_shared(first.config), **values}


def _shared(config: Config) -> dict[str, Any]:
    """Settings that both stages have in common."""
    training = {f.name for f in fields(config) if f.metadata["group"] == "training"}
    return {n: value for n, value in config.to_dict().items() if n not in training and n not in OF_PRIOR}


def _check_agrees(values: Mapping[str, Any], first: RunFolder) -> None:
    """Raise ValueError where settings differ from those of the run whose codes are taken, or where it has none."""
    if not AXES["model"][first.config.model].codes:
        raise ValueError(f"codes: {first.path} is a run of model {first.config.model!r}, which has none")
    for name, value in _shared(first.config).items():
        given = values.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ValueError(
                f"{name} is {value!r} in {first.path}, whose codes are taken; got {given!r}, leave it out"
            )


def train_run(
    config: Config,
    folder: PathLike,
    *,
    force: bool = False,
    progress: bool = True,
    resume: Resume = "off",
    like: PathLike | None = None,
) -> tuple[Run, RunFolder]:
    """Train what a config says, into a folder.

    With ``codes``, a prior over the codes of another run, which makes a whole program of that run's codebook and
    nets, taken as they are; the folder needs that run no more.

    Of several processes the first alone writes, and the others need no access to the folder, but to that of the
    codes.

    Everything that can fail for the user's reasons (data, settings, device, an unwritable folder) fails before
    training, and before the folder is made or an earlier run in it is touched.

    Args:
        config: the settings.
        folder: where to write; must be new or empty unless ``force``.
        force: replace an earlier run in the folder.
        progress: show a bar on a terminal.
        resume: go on with the run in the folder, of the same settings, as `ppl_vae.Checkpoints` has it; "auto"
            starts one where there is none.
        like: a run on whose data this one must be trained.

    Returns:
        The training run, and the folder with the trained program.

    Raises:
        ValueError: bad data or settings, or at odds with those of the run that has the codes; no such device; a
            folder that is in use or cannot be written; a run to go on with that is not there, has other settings,
            or a damaged checkpoint; data that are not those of that run, or of the one that this is to be like.
        NonFiniteError: the objective became NaN or infinite; the folder holds the last good weights.
    """
    path = Path(folder)
    going_on = from_first(lambda: _goes_on(config, path, force, resume))
    device = as_device(config.device)
    if config.codes is not None and resolved(config.codes, "codes") == resolved(path, "out"):
        raise ValueError(f"out: {path} is the run whose codes are taken; choose another folder")
    if config.codes is None:
        record, images, task = _whole(config, path)
    else:
        record, images, task = _prior(config, path, device, going_on)
    for split in (images.train, images.valid, images.test):
        columns = presented(config, split, images.shape, training=split is images.train)
        prepare(as_pair(record.program), columns)
    made = from_first(lambda: _made(images, device, path if going_on else None, like))
    record = replace(record, made=made)
    writes = own_rank() == 0
    if writes and not going_on:
        open_folder(path)
    try:
        if writes:
            _write_start(record, going_on)
        try:
            run = _fit(record, images, task, device, progress, resume if going_on else "off")
        except NonFiniteError as error:
            if writes:
                write_json(path / RECORD, record_of(_told(record, error.run)))
            raise
        record = _told(record, run)
        if writes:
            write_json(path / RECORD, record_of(record))
    finally:
        if writes and not going_on and not (path / WEIGHTS).exists():  # stopped before there was anything to keep
            clear(path)
    if writes:
        with alone():
            draw_figures(record, images)
    return run, record


def _goes_on(config: Config, path: Path, force: bool, resume: Resume) -> bool:
    """Whether a run in a folder goes on, or a new one begins.

    Raises:
        ValueError: the folder is in use, or has other settings.
    """
    going_on = resume == "last" or (resume == "auto" and (path / RECORD).exists())
    if going_on:
        _check_same(config, path)
    else:
        refuse_if_in_use(path, force)
    return going_on


def _write_start(record: RunFolder, going_on: bool) -> None:
    """Write what a run folder has before training."""
    path = record.path
    write_json(path / RECORD, record_of(record))
    (path / FIGURES).mkdir(exist_ok=True)
    if record.config.codes is not None and not going_on:
        (path / CHECKPOINTS).mkdir(exist_ok=True)
        save_weights(record.program, path / CHECKPOINTS / FIRST)


def _told(record: RunFolder, run: Run) -> RunFolder:
    """A run folder, and what became of its training."""
    return replace(record, engine=run.engine.describe(), faults=tuple(map(str, run.faults)))


def _check_same(config: Config, path: Path) -> None:
    """Raise ValueError, naming the first, where settings are not those of the run that is to go on."""
    refuse_links(path)
    held = settings_of(path).to_dict()
    for name, value in config.to_dict().items():
        if value != held[name] and name != "data_dir":
            raise ValueError(f"resume: {name} is {held[name]!r} in {path}, got {value!r}; leave it out")


def _made(images: Images, device: torch.device, resumed: PathLike | None, like: PathLike | None) -> dict[str, Any]:
    """How a run comes about; of one that goes on, how it did, and when it went on.

    Raises:
        ValueError: its data are not those of the run that it goes on with, or is to be like.
    """
    found = circumstances(images, device)
    for other in (resumed, like):
        if other is not None and made_of(other).get("data", found["data"]) != found["data"]:
            raise ValueError(f"data: {images.name} is not what {other} was trained on; its checksum is another")
    if resumed is None:
        return found
    before = made_of(resumed)
    return before | {"resumed": [*before.get("resumed", []), {n: found[n] for n in ("started", "command")}]}


@dataclass(frozen=True)
class _Task:
    """What is fitted to what; the program of the run, or a part of it."""

    program: Any
    train: Any
    valid: Any
    objective: Objective


def _whole(config: Config, path: Path) -> tuple[RunFolder, Images, _Task]:
    """The task of training a whole program, with what can be started from the data."""
    images = images_of(config)
    program: Any = build(config, images.shape, len(images.classes))
    with seeded(config.seed):
        rows = presented(config, images.train, images.shape).present(slice(None))[0]
        program.likelihood.start_from(rows.flatten(0, -2))
        if start := getattr(getattr(program, "prior", None), "start_at", None):
            start(rows)
    ranks, rest = count_ranks(), len(images.train) % config.batch_size
    if config.norm == "batch" and (config.batch_size < 2 * ranks or 0 < rest < 2 * ranks):
        several = "" if ranks == 1 else f" for one of {ranks} processes"
        raise ValueError(
            f"batch_size: norm 'batch' cannot take a batch of one; {len(images.train)} data in batches of "
            f"{config.batch_size} leave one{several}; choose another batch_size, or norm 'layer'"
        )
    task = _Task(
        program,
        presented(config, images.train, images.shape, training=True),
        presented(config, images.valid, images.shape),
        objective_of(config, program, images.shape, len(images.train.columns[0]), len(images.classes)),
    )
    return RunFolder(path, config, images.shape, images.classes, program), images, task


def _prior(config: Config, path: Path, device: torch.device, going_on: bool) -> tuple[RunFolder, Images, _Task]:
    """The task of training the prior alone, on the codes of another run; its other parts are taken as they are.

    They are copied, so that a run that goes on has those that it began with, whatever became of the other.
    """
    if going_on:
        first = RunFolder(path, config, *shape_and_classes(path), None)
    else:
        first = load_run(str(config.codes))
        _check_agrees(config.to_dict(), first)
    images = first.images(data_dir=config.data_dir)
    program: Any = build(config, first.shape, len(first.classes)).to(device).eval()
    if going_on:
        load_weights(program, path / CHECKPOINTS / FIRST)
    else:
        for part in ("likelihood", "posterior"):
            getattr(program, part).load_state_dict(getattr(first.program, part).state_dict())
    prior = program.prior.prior
    if not [*prior.parameters()]:
        others = [n for n, choice in AXES["prior"].items() if choice.codes and n != (config.prior or "uniform")]
        raise ValueError(f"prior: say which to learn on codes, one of {', '.join(others)}; got {config.prior!r}")
    codes, valid = (
        code_indices(program, presented(config, split, images.shape))["z"]
        for split in (images.train, images.valid)
    )
    prior.start_from(codes)
    task = _Task(Density(prior), codes, valid, ELBO())
    return RunFolder(path, config, first.shape, first.classes, program), images, task


def _fit(
    record: RunFolder, images: Images, task: _Task, device: torch.device, progress: bool, resume: Resume
) -> Run:
    config = record.config
    schedule = SCHEDULES[config.schedule]
    return fit(
        task.program,
        task.train,
        task.valid,
        objective=task.objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=partial(OPTIMIZERS[config.optimizer], lr=config.learning_rate),
        scheduler=None if schedule is None else partial(schedule, T_max=config.epochs),
        clip_norm=config.clip_norm,
        seed=config.seed,
        device=device,
        hooks=_hooks(record, images, task),
        progress=progress,
        compile=COMPILE[config.compile],
        precision=PRECISIONS[config.precision],
        checkpoints=Checkpoints(record.path / CHECKPOINTS, resume),
        faults=Faults(POLICIES[config.nonfinite], folder=record.path / FAULTS),
    )


def _hooks(record: RunFolder, images: Images, task: _Task) -> list[Hook]:
    config, path, objective = record.config, record.path, task.objective
    whole: Callable[[Hook], Hook] = (
        (lambda hook: hook) if config.codes is None else partial(WholeProgram, record.program)
    )
    hooks: list[Hook] = []
    if AXES["model"][config.model].codes and config.codes is None:
        hooks.append(WatchCodes(presented(config, images.valid[:WATCHED], images.shape)))
    hooks += [LogCSV(path / METRICS), whole(Save(path / WEIGHTS))]
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
        rows = shown(record, images.valid[:FILMED])
        hooks.append(whole(Film(path / FIGURES / FILM, rows, images.shape, draws=FILMED)))
    if find_spec("tensorboard") is not None:  # an extra; metrics.csv holds the same
        hooks.append(LogTensorBoard(path / EVENTS))
    return hooks
