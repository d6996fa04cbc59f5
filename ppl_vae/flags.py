"""The flags of the command line; those of training are the fields of `ppl_vae.config.Config`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ppl_vae.config import COMPILE, PRECISIONS, Config
from ppl_vae.schedules import SCHEDULES, STARTS, Annealing
from ppl_vae.verdicts import METHODS

__all__ = ["parser"]

EXAMPLES = {
    "train": "ppl-vae train --data digits --latent 8 --out runs/digits",
    "evaluate": "ppl-vae evaluate runs/digits --particles 5000",
    "sample": "ppl-vae sample runs/digits -n 100 --out draws.png",
    "plot": "ppl-vae plot runs/digits",
    "info": "ppl-vae info runs/digits",
}
METAVARS = {"int": "N", "float": "X", "tuple[int, ...]": "N", "tuple[float, ...]": "X", "str": "TEXT"}

Command = Callable[[argparse.Namespace], int]


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


def parser(version: str, runs: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        version: of the package.
        runs: what each command runs; the first line of its docstring describes it.
    """
    whole = _Parser(
        prog="ppl-vae",
        description="Variational autoencoders as Pyro programs: train, judge, look.",
        epilog="`ppl-vae COMMAND --help` lists what a command takes.",
    )
    whole.add_argument("--version", action="version", version=f"ppl-vae {version}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _train_flags(_command(commands, "train", runs["train"]))

    p = _command(commands, "evaluate", runs["evaluate"], folder="")
    p.add_argument("--particles", type=_count, default=1000, metavar="K", help="draws per datum (default: 1000)")
    p.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="which data (default: test)"
    )
    p.add_argument("--limit", type=_count, metavar="N", help="judge only the first N data; by default all")
    p.add_argument(
        "--chunk", type=_count, default=100, metavar="N", help="draws, or chains, held at once (default: 100)"
    )
    p.add_argument(
        "--defensive", type=float, default=0.0, metavar="X", help="share of draws from the prior (default: 0)"
    )
    p.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="importance",
        help="importance sampling, annealing, annealing both ways on data drawn from the model, or all of these "
        "with gaps and calibration (default: importance)",
    )
    _annealing_flags(p)
    _seed_flag(p)
    p.add_argument(
        "--compile", choices=COMPILE, default="auto", help="capture and compile: where it pays, always, or never"
    )
    p.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1, ...; by default CUDA when present")
    _place_flags(p)

    p = _command(commands, "sample", runs["sample"], folder="")
    p.add_argument("--size", "-n", type=_count, metavar="N", help="how many; by default 64, or 8 of each label")
    p.add_argument("--label", metavar="NAME", help="condition of a cvae; by default some of each")
    p.add_argument("--noise", action="store_true", help="draw the pixels too, instead of showing their means")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="png, pdf or svg; by default figures/drawn.png in the run folder"
    )
    _seed_flag(p)
    _place_flags(p)

    _place_flags(_command(commands, "plot", runs["plot"], folder=""))
    p = _command(commands, "info", runs["info"], folder="?")
    p.add_argument("--axes", action="store_true", help="list what models and objectives are made of")
    return whole


def _command(commands: Any, name: str, run: Command, folder: str | None = None) -> argparse.ArgumentParser:
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
    p.add_argument(
        "--resume",
        choices=("last", "auto"),
        default="off",
        help="go on with the run in --out, from its last checkpoint; auto: from an earlier one where that is "
        "damaged, and from the start where there is no run",
    )
    p.add_argument("--like", type=Path, metavar="RUN", help="take all settings, and the data, of that run")
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
            one = kind.removeprefix("tuple[").removesuffix(", ...]")
            options |= {"type": {"float": float, "str": str}.get(one, int), "metavar": METAVARS[kind]}
    if kind.startswith("tuple"):
        options["nargs"] = "+"
    parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def _annealing_flags(p: argparse.ArgumentParser) -> None:
    """Flags of the settings that `Annealing` has, with its defaults."""
    group, default = p.add_argument_group("annealing, refining and simulating"), Annealing()
    texts = {
        "chains": "particles per datum",
        "distributions": "steps from the start to the posterior",
        "leapfrog": "steps of one move",
    }
    for name, text in texts.items():
        value = getattr(default, name)
        flag = f"--{name}"
        group.add_argument(flag, type=_count, default=value, metavar="N", help=f"{text} (default: {value})")
    for name, choices in (("start", STARTS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
        value = getattr(default, name)
        text = {"start": "where particles start", "schedule": "how steps are spaced"}.get(
            name, "of matrix products"
        )
        group.add_argument(f"--{name}", choices=choices, default=value, help=f"{text} (default: {value})")
    group.add_argument(
        "--wanted", type=float, metavar="X", help="double distributions until the sandwich's gap is below X nats"
    )
    group.add_argument(
        "--subset", type=_count, default=100, metavar="N", help="how many data this is done for (default: 100)"
    )


def _seed_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="fixes the draws (default: 0)")


def _place_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="TEXT", help="other data, or where the run's data are now")
    p.add_argument("--data-dir", metavar="DIR", help="folder with the files of mnist, fashion-mnist or cifar10")


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
