"""The command line: ``ppl-vae train | evaluate | sample | plot | info``.

Mistakes of the user end in one line on stderr and exit code 2, an interrupted run in 130, numbers gone wrong
in 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_vae.config import Config, presented
from ppl_vae.evaluate import Estimate, active_units, elbo, log_likelihood, sample
from ppl_vae.files import write_whole
from ppl_vae.models import CVAE
from ppl_vae.plots import label_rows, samples, save
from ppl_vae.runs import METRICS, RESULTS, RunFolder, draw_figures, load_run, train_run, write_json
from ppl_vae.train import NonFiniteError, default_device

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except ValueError as error:
        print(f"ppl-vae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"ppl-vae: training failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ppl-vae: interrupted", file=sys.stderr)
        return 130
    return code


def train(args: argparse.Namespace) -> int:
    """Train into a run folder."""
    flags = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    config = Config.from_file(args.config, **flags) if args.config else Config.from_mapping(flags, "flags")
    out = args.out or Path("runs") / f"{config.data}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    run, folder = train_run(config, out, force=args.force, progress=not args.quiet)
    last = run.history[(run.best_epoch or len(run.history)) - 1] if run.history else None
    print(f"{run.reason}; {run.epoch} epochs, {run.step} steps, {sum(r['seconds'] for r in run.history):.1f} s")
    if last is not None:
        print(
            f"kept epoch {last['epoch']:.0f}: train {last['train']:.3f}, "
            f"valid {last['valid']:.3f} ± {last['valid_stderr']:.3f} nats per datum"
        )
    print(f"run folder {folder.path}: weights, {METRICS}, figures; judge it with: ppl-vae evaluate {folder.path}")
    return 130 if run.interrupted else 0


def evaluate(args: argparse.Namespace) -> int:
    """Bound log p(x) on a split of the run's data."""
    run = load_run(args.folder)
    images = run.images()
    data = presented(run.config, getattr(images, args.split))
    data = data if args.limit is None else data[: args.limit]
    run.program.to(args.device or default_device())
    start = time.perf_counter()
    lower = elbo(run.program, data, seed=args.seed)
    tight = log_likelihood(run.program, data, args.particles, chunk=args.chunk, seed=args.seed)
    units = active_units(run.program, data, seed=args.seed)
    seconds = time.perf_counter() - start
    rate = Estimate(lower.diagnostics["rate"], lower.stderr, "unbiased")
    distortion = Estimate(lower.diagnostics["distortion"], lower.stderr, "unbiased")
    rows = {"ELBO": lower, "rate": rate, "distortion": distortion, f"L_{args.particles}": tight}
    print(f"{run.path}: {args.split}, {len(data)} data, {seconds:.1f} s; nats per datum, ± s.e. over data")
    notes = {"ELBO": "lower bound", "rate": "KL(q || p)", "distortion": "-E_q log p(x | z)"}
    for name, row in rows.items():
        print(f"  {name:<12}{row.mean:>10.3f} ± {row.mean_stderr:.3f}  {notes.get(name, 'lower bound')}")
    name = f"-L_{args.particles}"
    print(f"  {name:<12}{-tight.mean:>10.3f} ± {tight.mean_stderr:.3f}  negative log-likelihood, at most")
    ess = tight.diagnostics["ess"]
    print(f"  effective sample size: median {ess.median():.0f}, least {ess.min():.1f} of {args.particles}")
    print(f"  active units: {units}; Monte Carlo s.e. of L_{args.particles}: {tight.monte_carlo_stderr:.4f}")
    summary = {n: {"mean": r.mean, "stderr": r.mean_stderr, "direction": r.direction} for n, r in rows.items()}
    summary[f"L_{args.particles}"]["monte_carlo_stderr"] = tight.monte_carlo_stderr
    extra = {"split": args.split, "data": len(data), "seconds": seconds, "seed": args.seed}
    write_json(run.path / RESULTS, {**extra, "nats_per_datum": summary, "active_units": units.count})
    return 0


def draw(args: argparse.Namespace) -> int:
    """Draw from the model: a picture of means or noisy draws, and the numbers as npy."""
    run = load_run(args.folder)
    context: tuple[torch.Tensor, ...] = ()
    if isinstance(run.program, CVAE):
        context = (_labels(run, args.label, args.size),)
    elif args.label is not None:
        raise ValueError("label: this run's model has no condition")
    x = sample(run.program, args.size, *context, mean=not args.noise, seed=args.seed)
    title = "Draws from the model" if args.noise else "Means of draws from the prior"
    figure = (
        samples(x, run.shape, title=title) if not context else label_rows(x, context[0], run.shape, run.classes)
    )
    out = Path(args.out) if args.out else run.path / "figures" / "drawn.png"
    array = write_whole(out.with_suffix(".npy"), lambda file: _write_array(file, x.numpy()))
    print(f"{save(figure, out)} and {array}: {tuple(x.shape)}")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw a run's figures again."""
    run = load_run(args.folder)
    for path in draw_figures(run, run.images()):
        print(path)
    return 0


def info(args: argparse.Namespace) -> int:
    """Say what is installed, or what a run folder holds."""
    if args.folder is None:
        for package in ("ppl-vae", "torch", "torchvision", "pyro-ppl", "arviz", "matplotlib"):
            print(f"{package:<12} {version(package)}")
        print(f"{'device':<12} {default_device()}, {torch.get_num_threads()} threads")
        return 0
    run = load_run(args.folder)
    count = sum(p.numel() for p in run.program.parameters())
    print(f"{run.path}: {run.config.model} of {run.config.data}, shape {run.shape}, {count:,} parameters")
    default = Config()
    for name, value in run.config.to_dict().items():
        print(f"  {name:<14}{value}{'' if value != default.to_dict()[name] else '  (default)'}")
    print(run.program)
    return 0


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _labels(run: RunFolder, label: str | None, size: int) -> torch.Tensor:
    if label is None:
        return (torch.arange(size) * len(run.classes)) // size  # rows of every label, in order
    if label not in run.classes:
        raise ValueError(f"unknown label {label!r}; the run knows {', '.join(run.classes)}")
    return torch.full((size,), run.classes.index(label))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ppl-vae", description="Variational autoencoders as Pyro programs.")
    parser.add_argument("--version", action="version", version=f"ppl-vae {version('ppl-vae')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = _command(commands, "train", train, folder=None)
    p.add_argument("--config", type=Path, metavar="FILE", help="TOML or JSON file of settings; flags override it")
    p.add_argument("--out", type=Path, metavar="RUN", help="run folder; by default a new one in runs/")
    p.add_argument("--force", action="store_true", help="replace the run that the folder holds")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    for f in fields(Config):
        _flag(p, f)

    p = _command(commands, "evaluate", evaluate)
    p.add_argument("--particles", type=int, default=1000, help="draws per datum (default 1000)")
    p.add_argument("--chunk", type=int, default=100, help="draws held in memory at once (default 100)")
    p.add_argument("--split", choices=("train", "valid", "test"), default="test")
    p.add_argument("--limit", type=int, help="judge the first data only")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device")

    p = _command(commands, "sample", draw)
    p.add_argument("--size", "-n", type=int, default=64, help="how many (default 64)")
    p.add_argument("--label", help="condition of a cvae; by default some of each")
    p.add_argument("--noise", action="store_true", help="draw pixels too, instead of showing their means")
    p.add_argument("--out", metavar="PNG", help="the picture; the numbers go beside it as npy")
    p.add_argument("--seed", type=int, default=0)

    _command(commands, "plot", plot)
    _command(commands, "info", info, folder="?")
    return parser


def _command(commands: Any, name: str, run: Any, folder: str | None = "") -> argparse.ArgumentParser:
    text = run.__doc__.splitlines()[0]
    p: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if folder is not None:
        p.add_argument("folder", metavar="RUN", nargs=folder or None, help="run folder")
    p.set_defaults(run=run)
    return p


def _flag(parser: argparse.ArgumentParser, f: Any) -> None:
    """One flag for one setting, typed and documented by the config's field."""
    kind, default = f.type.removesuffix(" | None"), f.default
    options: dict[str, Any] = {
        "dest": f.name,
        "default": None,
        "help": f"{f.metadata['help']} (default {default})",
    }
    assert default is not MISSING
    if kind == "bool":
        options["action"] = argparse.BooleanOptionalAction
    elif "choices" in f.metadata:
        options["choices"] = list(f.metadata["choices"])
    else:
        options["type"] = {"int": int, "float": float, "tuple[int, ...]": int}.get(kind, str)
    if kind == "tuple[int, ...]":
        options |= {"nargs": "+", "help": f"{f.metadata['help']} (default {' '.join(map(str, default))})"}
    if "choices" not in options and kind not in ("bool",):
        options["metavar"] = {"int": "N", "float": "X", "tuple[int, ...]": "N"}.get(kind, "S")
    parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


if __name__ == "__main__":
    sys.exit(main())
