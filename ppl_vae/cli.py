"""The command line: ``ppl-vae train | evaluate | sample | plot | info``.

Mistakes of the user end in one line on stderr and exit code 2, an interrupted run in 130, numbers gone wrong
or too little memory in 1.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from ppl_vae.axes import AXES
from ppl_vae.config import COMPILE, Config, presented
from ppl_vae.evaluate import ActiveUnits, Estimate, active_units, elbo, log_likelihood, sample
from ppl_vae.files import write_whole
from ppl_vae.plots import label_rows, samples, save
from ppl_vae.runs import (
    METRICS,
    RESULTS,
    RunFolder,
    draw_figures,
    installed,
    load_run,
    takes_condition,
    train_run,
    write_json,
)
from ppl_vae.train import NonFiniteError, as_device, default_device

__all__ = ["main"]

EXAMPLES = {
    "train": "ppl-vae train --data digits --latent 8 --out runs/digits",
    "evaluate": "ppl-vae evaluate runs/digits --particles 5000",
    "sample": "ppl-vae sample runs/digits -n 100 --out draws.png",
    "plot": "ppl-vae plot runs/digits",
    "info": "ppl-vae info runs/digits",
}
METAVARS = {"int": "N", "float": "X", "tuple[int, ...]": "N", "str": "TEXT"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - until the process ends
        return 1
    except (ValueError, OSError) as error:
        return _fail("error", error, 2)
    except (NonFiniteError, torch.OutOfMemoryError) as error:
        return _fail("failed", error, 1)
    except KeyboardInterrupt:
        print("ppl-vae: interrupted", file=sys.stderr)
        return 130
    return code


def train(args: argparse.Namespace) -> int:
    """Train a model and write a run folder: settings, weights, metrics, figures."""
    flags = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    config = Config.from_file(args.config, **flags) if args.config else Config(**flags)
    name = f"{Path(config.data).stem}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = args.out or Path("runs", name)
    try:
        run, folder = train_run(config, out, force=args.force, progress=not args.quiet)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} They are saved in {out}.", error.run) from error
    print(f"{run.reason}: {run.epoch} epochs, {run.step} steps, {sum(r['seconds'] for r in run.history):.1f} s")
    if run.history:
        kept = run.history[(run.best_epoch or run.epoch) - 1]
        print(
            f"kept epoch {kept['epoch']:.0f}: train {kept['train']:.3f}, "
            f"valid {kept['valid']:.3f} ± {kept['valid_stderr']:.3f} nats per datum"
        )
    print(f"run folder {folder.path}: weights, {METRICS}, figures; judge it with: ppl-vae evaluate {folder.path}")
    return 130 if run.interrupted else 0


def evaluate(args: argparse.Namespace) -> int:
    """Bound log p(x) on held-out data, with standard errors."""
    device = as_device(args.device)
    run = load_run(args.folder)
    images = run.images(args.data, args.data_dir)
    data = presented(run.config, getattr(images, args.split)[: args.limit])
    run.program.to(device)
    start = time.perf_counter()
    settings = {"seed": args.seed, "compile": COMPILE[args.compile]}
    lower = elbo(run.program, data, min(args.particles, args.chunk), **settings)
    tight = log_likelihood(run.program, data, args.particles, chunk=args.chunk, **settings)
    units = active_units(run.program, data, seed=args.seed) if len(data) > 1 else None
    seconds = time.perf_counter() - start
    given = "log p(x | label)" if takes_condition(run.program) else "log p(x)"
    print(
        f"{run.path}: {given} of {len(data)} {args.split} data of {images.name}, {seconds:.1f} s\n"
        "nats per datum, ± standard error over data (and that of the draws alone)"
    )
    bounds = _bounds(lower, tight)
    for name, (estimate, sign, text) in bounds.items():
        draws = "" if np.isnan(estimate.monte_carlo_stderr) else f"(draws ± {estimate.monte_carlo_stderr:.3f})"
        print(f"  {name:<12}{sign * estimate.mean:>10.3f} ± {estimate.mean_stderr:<8.3f}{draws:<18}{text}")
    ess = tight.diagnostics["ess"]
    print(f"  effective sample size: median {ess.median():.1f}, least {ess.min():.1f} of {args.particles}")
    print(f"  active units: {'needs two data' if units is None else units}")
    asked = {name: getattr(args, name) for name in ("split", "particles", "chunk", "seed", "compile")}
    found = {
        "engine": tight.engine,
        "data": images.name,
        "size": len(data),
        "device": str(device),
        "seconds": seconds,
    }
    write_json(run.path / RESULTS, asked | found | _results(bounds, tight, units))
    print(f"written to {run.path / RESULTS}")
    return 0


def _bounds(lower: Estimate, tight: Estimate) -> dict[str, tuple[Estimate, int, str]]:
    """Name -> estimate, the sign to show it with, and what it is."""
    unknown = torch.full_like(lower.value, torch.nan)
    rate, distortion = (Estimate(lower.diagnostics[n], unknown, "unbiased") for n in ("rate", "distortion"))
    return {
        "ELBO": (lower, 1, "lower bound, -(rate + distortion)"),
        "rate": (rate, 1, "KL(q || p)"),
        "distortion": (distortion, 1, "-E_q log p(x | z)"),
        tight.name: (tight, 1, "lower bound, tighter"),
        f"-{tight.name}": (tight, -1, "negative log-likelihood, at most"),
    }


def _results(
    bounds: dict[str, tuple[Estimate, int, str]], tight: Estimate, units: ActiveUnits | None
) -> dict[str, Any]:
    """What was found, for results.json."""
    directions = {1: "lower", -1: "upper"}
    nats = {
        name: {
            "mean": sign * estimate.mean,
            "stderr": estimate.mean_stderr,
            "monte_carlo_stderr": estimate.monte_carlo_stderr,
            "direction": directions[sign] if estimate.direction == "lower" else estimate.direction,
        }
        for name, (estimate, sign, _) in bounds.items()
    }
    ess = tight.diagnostics["ess"]
    return {
        "nats_per_datum": nats,
        "effective_sample_size": {"median": float(ess.median()), "least": float(ess.min())},
        "active_units": None if units is None else units.count,
    }


def draw(args: argparse.Namespace) -> int:
    """Draw from the model: a picture, and the numbers as npy beside it."""
    run = load_run(args.folder)
    by_label = takes_condition(run.program)
    if args.label is not None and not by_label:
        raise ValueError("label: this run's model is not conditioned on one")
    size = args.size or (8 * len(run.classes) if by_label and args.label is None else 64)
    context = (_labels(run, args.label, size),) if by_label else ()
    out = args.out or run.path / "figures" / "drawn.png"
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out must end in .png, .pdf or .svg, got {out}")
    x = sample(run.program, size, *context, mean=not args.noise, seed=args.seed)
    title = "Draws from the model" if args.noise else "Draws from the prior (means)"
    if context and args.label is None:
        figure = label_rows(x, context[0], run.shape, run.classes, title=title)
    else:
        figure = samples(x, run.shape, title=title if args.label is None else f"{title}, label {args.label}")
    picture, numbers = save(figure, out), out.with_suffix(".npy")
    write_whole(numbers, lambda file: _write_array(file, x.numpy()))
    print(f"{picture}\n{numbers}")
    return 0


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
        print(f"  {name:<14}{shown}{'  (default)' if value == default[name] else ''}")
    print(f"  {'steps':<14}{run.engine}" if run.engine else "  steps         not recorded")
    print(run.program)
    return 0


def _fail(kind: str, error: BaseException, code: int) -> int:
    print(f"ppl-vae: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
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


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints become ValueErrors, so that all mistakes are told in one way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is answered with the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for flag in parsed.parser._option_string_actions if flag.startswith("--")]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.7)
            parsed.parser.error(
                f"unknown argument: {' '.join(unknown)}{f'; did you mean {close[0]}?' if close else ''}"
            )
        return parsed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ppl-vae",
        description="Variational autoencoders as Pyro programs: train, judge, look.",
        epilog="`ppl-vae COMMAND --help` lists what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"ppl-vae {installed('ppl-vae')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _train_flags(_command(commands, "train", train))

    p = _command(commands, "evaluate", evaluate, folder="")
    p.add_argument("--particles", type=_count, default=1000, metavar="K", help="draws per datum (default: 1000)")
    p.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="which data (default: test)"
    )
    p.add_argument("--limit", type=_count, metavar="N", help="judge only the first N data; by default all")
    p.add_argument("--chunk", type=_count, default=100, metavar="N", help="draws held at once (default: 100)")
    _seed_flag(p)
    p.add_argument(
        "--compile", choices=COMPILE, default="auto", help="capture and compile: where it pays, always, or never"
    )
    p.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1, ...; by default CUDA when present")
    _place_flags(p)

    p = _command(commands, "sample", draw, folder="")
    p.add_argument("--size", "-n", type=_count, metavar="N", help="how many; by default 64, or 8 of each label")
    p.add_argument("--label", metavar="NAME", help="condition of a cvae; by default some of each")
    p.add_argument("--noise", action="store_true", help="draw the pixels too, instead of showing their means")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="png, pdf or svg; by default figures/drawn.png in the run folder"
    )
    _seed_flag(p)

    _place_flags(_command(commands, "plot", plot, folder=""))
    p = _command(commands, "info", info, folder="?")
    p.add_argument("--axes", action="store_true", help="list what models and objectives are made of")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], folder: str | None = None
) -> argparse.ArgumentParser:
    """A command; ``folder`` is the run folder's nargs, "" for exactly one, None where the command takes none."""
    text = (run.__doc__ or "").splitlines()[0]
    p: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}"
    )
    if folder is not None:
        p.add_argument("folder", metavar="RUN", nargs=folder or None, type=Path, help="run folder")
    p.set_defaults(run=run, parser=p)
    return p


def _train_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", type=Path, metavar="FILE", help="TOML or JSON file of settings; flags override it")
    p.add_argument("--out", type=Path, metavar="RUN", help="run folder; by default a new one in runs/")
    p.add_argument("--force", action="store_true", help="replace the run that the folder holds")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    groups: dict[str, Any] = {}
    for f in fields(Config):
        name = f.metadata["group"]
        groups[name] = groups.get(name) or p.add_argument_group(f"settings: {name}")
        _flag(groups[name], f)


def _flag(parser: Any, f: Any) -> None:
    """One flag for one setting, typed and documented by the config's field."""
    kind, text = f.type.removesuffix(" | None"), f.metadata["help"]
    shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    options: dict[str, Any] = {"dest": f.name, "default": None, "help": text}
    if kind == "bool":
        options |= {
            "action": argparse.BooleanOptionalAction,
            "help": f"{text} (default: {'yes' if f.default else 'no'})",
        }
    else:
        options["help"] = text if f.default is None else f"{text} (default: {shown})"
        if "choices" in f.metadata:
            options["choices"] = list(f.metadata["choices"])
        else:
            options |= {"type": {"float": float, "str": str}.get(kind, int), "metavar": METAVARS[kind]}
    if kind.startswith("tuple"):
        options["nargs"] = "+"
    parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def _seed_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="fixes the draws (default: 0)")


def _place_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="TEXT", help="other data, or where the run's data are now")
    p.add_argument("--data-dir", metavar="DIR", help="where the files of mnist or fashion-mnist are now")


def _count(text: str) -> int:
    return _at_least(1, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
