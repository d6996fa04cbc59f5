"""The command line: ``ppl-vae train | evaluate | sample | plot | info``.

Mistakes of the user end in one line on stderr and exit code 2, an interrupted run in 130, one that was asked to
terminate in 143, numbers gone wrong, too little memory or a lost process in 1. Processes that torchrun starts
train and evaluate together; anything else the first of them does alone, and it alone writes and prints.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_vae.axes import AXES
from ppl_vae.batches import Data
from ppl_vae.config import COMPILE, Config, presented, settings_in
from ppl_vae.data import Split
from ppl_vae.evaluate import ActiveUnits, active_units, reconstruct, sample
from ppl_vae.figures import draw_figures
from ppl_vae.files import write_whole
from ppl_vae.flags import parser
from ppl_vae.folders import (
    FAULTS,
    METRICS,
    RECORD,
    RESULTS,
    RunFolder,
    load_run,
    refuse_links,
    settings_of,
    write_json,
)
from ppl_vae.plots import label_rows, samples, save
from ppl_vae.ranks import FirstFailedError, RankError, alone, from_first, own_rank, process_group, said_by_first
from ppl_vae.records import installed
from ppl_vae.runs import second_stage, train_run
from ppl_vae.schedules import Annealing
from ppl_vae.settings import escaped
from ppl_vae.train import NonFiniteError, as_device, default_device
from ppl_vae.verdicts import Asked, judge

__all__ = ["COMMANDS", "main"]

GIVEN = {"label": "log p(x | label)", "sum": "log p(x | sum)", "known label": "log p(x), {labels} labels"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    said = False  # by the first process, which tells what all of them meet
    try:
        args = parser(installed("ppl-vae"), COMMANDS).parse_args(argv)
        with process_group(getattr(args, "device", None)):
            try:
                code = _run(args)
            except FirstFailedError:
                said = True
                raise
            except (ValueError, OSError, NonFiniteError) as error:
                said = said_by_first(str(error))
                raise
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - until the process ends
        return 1
    except (ValueError, OSError) as error:
        return 2 if said else _fail("error", error, 2)
    except (NonFiniteError, RankError, torch.OutOfMemoryError) as error:
        return 1 if said else _fail("failed", error, 1)
    except RuntimeError as error:  # torch's on a CPU has no class of its own
        if "allocate" not in str(error):
            raise
        return _fail("failed", ValueError("too little memory for settings as large"), 1)
    except KeyboardInterrupt:
        print("ppl-vae: interrupted", file=sys.stderr)
        return 130
    return code


def _run(args: argparse.Namespace) -> int:
    """Run a command, in all processes or in the first."""
    command: Callable[[argparse.Namespace], int] = args.run
    if command in (train, evaluate):
        with warnings.catch_warnings():
            if own_rank():  # the first warns
                warnings.simplefilter("ignore")
            return command(args)
    if own_rank():
        return 0
    with alone():
        return command(args)


def _asked(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The settings of a run, and its folder."""
    flags = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    values = (settings_in(args.config) if args.config else {}) | flags
    if args.resume != "off" and args.force:
        raise ValueError("force: it replaces a run, and resume goes on with it; leave one out")
    if args.resume != "off" and args.out is None:
        raise ValueError("resume: say which run to go on with, --out RUN")
    if args.like is not None:
        values = settings_of(args.like).to_dict() | values
    if args.resume == "last" or (args.resume == "auto" and (args.out / RECORD).exists()):
        values = settings_of(args.out).to_dict() | values
    elif values.get("codes") is not None:
        values = second_stage(values)
    config = Config(**values)
    name = f"{Path(config.data).stem}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config.to_dict(), str(args.out or Path("runs", name))


def train(args: argparse.Namespace) -> int:
    """Train a model and write a run folder: settings, weights, metrics, figures."""
    settings, folder_name = from_first(lambda: _asked(args))
    config, out = Config.from_mapping(settings, "settings"), Path(folder_name)
    replaced = {name for name in ("data", "limit") if getattr(args, name) is not None}
    try:
        with _terminated() as signals:
            how: dict[str, Any] = {"force": args.force, "progress": not args.quiet, "resume": args.resume}
            run, folder = train_run(config, out, **how, like=None if replaced else args.like)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} They are saved in {out}.", error.run) from error
    code = (143 if signals else 130) if run.interrupted else 0
    if own_rank():
        return code
    print(f"{run.reason}: {run.epoch} epochs, {run.step} steps, {sum(r['seconds'] for r in run.history):.1f} s")
    if run.trouble:
        print(f"numbers that were not finite: {run.trouble}; see {folder.path / FAULTS}")
    if run.history:
        of = "" if config.codes is None else ", of its codes"
        kept = run.history[(run.best_epoch or run.epoch) - 1]
        print(
            f"kept epoch {kept['epoch']:.0f}: train {kept['train']:.3f}, "
            f"valid {kept['valid']:.3f} ± {kept['valid_stderr']:.3f} nats per datum{of}"
        )
    print(f"run folder {folder.path}: weights, {METRICS}, figures; judge it with: ppl-vae evaluate {folder.path}")
    if run.interrupted:
        print(f"go on with: ppl-vae train --out {folder.path} --resume last")
    return code


@contextmanager
def _terminated() -> Iterator[list[int]]:
    """Let SIGTERM end a run as Ctrl-C does, so that it saves; what came is listed."""
    came: list[int] = []

    def end(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where none can be caught
        yield came
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluate(args: argparse.Namespace) -> int:
    """Bound log p(x) on held-out data, with standard errors, and say whether to believe it."""
    device = as_device(args.device)
    run = load_run(args.folder)
    refuse_links(run.path)
    images = run.images(args.data, args.data_dir)
    split = getattr(images, args.split)[: args.limit]
    data = presented(run.config, split, run.shape)
    run.program.to(device)
    given = {f.name: getattr(args, f.name) for f in fields(Annealing) if hasattr(args, f.name)}
    compile = COMPILE[args.compile]
    options = {"annealing": Annealing(**given), "defensive": args.defensive, "wanted": args.wanted}
    asked = Asked(args.particles, args.chunk, args.seed, compile, **options, most=args.subset)
    _check_weights(run)
    start = time.perf_counter()
    found = _found(run, data, split, args.seed)
    verdict = judge(run, data, args.method, asked)
    seconds = time.perf_counter() - start
    if own_rank():  # all have found the same, and the first tells
        return 0
    what = GIVEN.get(run.config.given, "log p(x)").format(labels=run.config.labels)
    print(f"{run.path}: {what} of {len(data)} {args.split} data of {images.name}, {seconds:.1f} s")
    if verdict.rows:
        print("nats per datum, ± standard error over data (and that of the draws alone)")
    if text := str(verdict):
        print(text)
    for name, value in found.items():
        print(f"  {name.replace('_', ' ')}: {'needs two data' if value is None else value}")
    names = ("split", "particles", "chunk", "seed", "compile", "method")
    how = {
        "engine": verdict.engine,
        "data": images.name,
        "size": len(data),
        "device": str(device),
        "seconds": seconds,
    }
    held = {name: value.count if isinstance(value, ActiveUnits) else value for name, value in found.items()}
    results = {name: getattr(args, name) for name in names} | how | verdict.results | held
    written = [write_json(run.path / RESULTS, results), *verdict.write(run.path)]
    print(f"written to {run.path}: {', '.join(str(path.relative_to(run.path)) for path in written)}")
    return 0


def _check_weights(run: RunFolder) -> None:
    """Raise ValueError, naming the first, for weights that are NaN or infinite."""
    for name, parameter in run.program.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"run: the weights of {name} in {run.path} are not all finite; train it again")


def _found(run: RunFolder, data: Data, split: Split, seed: int) -> dict[str, Any]:
    """What else there is to say of a run, bounds apart."""
    x, *given = data.to(next(run.program.parameters()).device).present(slice(None))
    error = (reconstruct(run.program, x, *given, seed=seed) - x).square().mean()
    found: dict[str, Any] = {"squared_error_of_reconstructions": round(float(error), 5)}
    if not AXES["model"][run.config.model].codes:
        found["active_units"] = active_units(run.program, data, seed=seed) if len(data) > 1 else None
    if (
        split.y is not None
        and bool((split.y >= 0).any())
        and callable(accuracy := getattr(run.program, "accuracy", None))
    ):
        found["accuracy"] = round(accuracy(x, split.y.to(x.device)), 4)
    return found


def draw(args: argparse.Namespace) -> int:
    """Draw from the model: a picture, and the numbers as npy beside it."""
    run = load_run(args.folder)
    if args.label is not None and "label" not in run.config.given:
        raise ValueError("label: this run's model is not conditioned on one")
    if args.out is None:
        refuse_links(run.path)
    out = args.out or run.path / "figures" / "drawn.png"
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out must end in .png, .pdf or .svg, got {out}")
    context = _context(run, args)
    size = len(context[0]) if context else args.size or 64
    x = sample(run.program, size, *context, mean=not args.noise, seed=args.seed)
    if run.pictures:
        title = "Draws from the model" if args.noise else "Draws from the prior (means)"
        if context and args.label is None:
            figure = label_rows(x, context[0], run.shape, run.classes, title=title)
        else:
            figure = samples(x, run.shape, title=title if args.label is None else f"{title}, label {args.label}")
        print(save(figure, out))
    numbers = out.with_suffix(".npy")
    write_whole(numbers, lambda file: _write_array(file, x.numpy()))
    print(numbers)
    return 0


def _context(run: RunFolder, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """The conditions to draw under: labels, or the sums of training data drawn at random."""
    if "label" in run.config.given:
        return (_labels(run, args.label, args.size or (64 if args.label else 8 * len(run.classes))),)
    if run.config.given != "sum":
        return ()
    sums = run.images(args.data, args.data_dir).train.x.sum(1, keepdim=True)
    return (
        sums[torch.randint(len(sums), (args.size or 64,), generator=torch.Generator().manual_seed(args.seed))],
    )


def plot(args: argparse.Namespace) -> int:
    """Draw a run's figures again."""
    run = load_run(args.folder)
    for path in draw_figures(run, run.images(args.data, args.data_dir)):
        print(path)
    return 0


def info(args: argparse.Namespace) -> int:
    """Say what a run folder holds or, without one, what is installed."""
    if args.axes:
        for axis, choices in AXES.items():
            print(axis)
            for name, choice in choices.items():
                print(f"  {name:<22}{choice.about}")
        for f in fields(Config):
            if f.name not in AXES and (known := f.metadata.get("choices", f.metadata.get("known"))):
                print(f"{f.name}: {f.metadata['help']}\n  {', '.join(known)}")
        return 0
    if args.folder is None:
        for package in ("ppl-vae", "torch", "torchvision", "pyro-ppl", "arviz", "matplotlib", "tensorboard"):
            print(f"{package:<12} {installed(package)}")
        print(f"{'device':<12} {default_device()}, {torch.get_num_threads()} threads")
        return 0
    run = load_run(args.folder)
    count = sum(p.numel() for p in run.program.parameters())
    print(f"{run.path}: {run.config.model} of {run.config.data}, shape {run.shape}, {count:,} parameters")
    default = Config().to_dict()
    for name, value in run.config.to_dict().items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        print(f"  {name:<16}{shown}{'  (default)' if value == default[name] else ''}")
    print(f"  {'steps':<16}{escaped(run.engine)}" if run.engine else "  steps           not recorded")
    if run.faults:
        print(escaped(f"  {'not finite':<16}{len(run.faults)} times, first {run.faults[0]}"))
    for name, value in run.made.items():
        for part in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{n} {v}" for n, v in part.items()) if isinstance(part, dict) else part
            print(escaped(f"  {name:<16}{text}"))
    print(run.program)
    return 0


def _fail(kind: str, error: BaseException, code: int) -> int:
    print(f"ppl-vae: {kind}: {escaped(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _labels(run: RunFolder, label: str | None, size: int) -> torch.Tensor:
    if label is None:
        return (torch.arange(size) * len(run.classes)) // size  # rows of every label, in order
    if label not in run.classes:
        raise ValueError(f"unknown label {label!r}; the run knows {', '.join(run.classes)}")
    return torch.full((size,), run.classes.index(label))


COMMANDS = {"train": train, "evaluate": evaluate, "sample": draw, "plot": plot, "info": info}

if __name__ == "__main__":
    sys.exit(main())
