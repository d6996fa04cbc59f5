"""What there is to say of a trained run: bounds by several methods, in one table, with figures and files."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import plots
from ppl_vae.amortisation import gaps
from ppl_vae.annealing import annealed, sandwich
from ppl_vae.axes import AXES
from ppl_vae.batches import Data
from ppl_vae.calibration import sbc
from ppl_vae.capture import Compile
from ppl_vae.estimates import Average, Estimate, IncompleteError, average
from ppl_vae.evaluate import elbo, log_likelihood
from ppl_vae.files import write_whole
from ppl_vae.pairs import Batch
from ppl_vae.pixels import bits_per_dimension
from ppl_vae.rng import seeded
from ppl_vae.runs import EACH, FIGURES, JUDGED, TABLE, RunFolder
from ppl_vae.schedules import Annealing
from ppl_vae.tails import FEWEST, khat_threshold
from ppl_vae.weighing import importance

__all__ = ["METHODS", "Asked", "Row", "Verdict", "judge"]

CALIBRATED = 500  # data simulated to see whether the guide is calibrated
BITS = "bits/dim"


@dataclass(frozen=True)
class Asked:
    """How to judge.

    Attributes:
        particles: K of importance sampling.
        chunk: of them held at once.
        seed: fixes the draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`.
        annealing: how to anneal.
        defensive: share of particles drawn from the prior.
        wanted: the gap of the sandwich to get below, by doubling distributions.
        most: how many data are annealed, simulated or refined, which takes thousands of gradients for each.
    """

    particles: int = 1000
    chunk: int = 100
    seed: int = 0
    compile: Compile = "auto"
    annealing: Annealing = Annealing()
    defensive: float = 0.0
    wanted: float | None = None
    most: int = 100

    @property
    def shared(self) -> dict[str, Any]:
        """What all methods take."""
        return {"seed": self.seed, "compile": self.compile}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was estimated.
        mean: over data, in nats per datum.
        stderr: its standard error over data; NaN where it is not known, as of one datum.
        monte_carlo_stderr: its standard error from the draws alone; NaN where it is not known.
        direction: on which side of the truth it lies on average.
        about: what it is, in a few words.
        seconds: what it took; NaN where it came with another.
        warnings: why not to believe it.
    """

    name: str
    mean: float
    stderr: float
    monte_carlo_stderr: float
    direction: str
    about: str
    seconds: float = math.nan
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        draws = "" if math.isnan(self.monte_carlo_stderr) else f"(draws ± {self.monte_carlo_stderr:.3f})"
        took = "" if math.isnan(self.seconds) else f"{self.seconds:.1f} s"
        return (
            f"  {self.name:<32}{self.mean:>10.3f} ± {self.stderr:<8.3f}{draws:<18}{self.direction:<10}{took:>9}"
            f"  {self.about}"
        )


def _row(estimate: Estimate, about: str, seconds: float = math.nan, name: str = "", sign: int = 1) -> Row:
    """The line of an estimate, or of its negative."""
    estimate = estimate.rest
    turned = {"lower": "upper", "upper": "lower"}.get(estimate.direction, estimate.direction)
    return Row(
        name or f"{'-' * (sign < 0)}{estimate.name}",
        sign * estimate.mean,
        estimate.mean_stderr,
        estimate.monte_carlo_stderr,
        estimate.direction if sign > 0 else turned,
        about,
        seconds,
        estimate.warnings if sign > 0 else (),
    )


def _difference(
    name: str, value: Average, about: str, direction: str, seconds: float = math.nan, doubts: tuple[str, ...] = ()
) -> Row:
    """The line of a mean difference."""
    return Row(name, value.mean, value.stderr, math.nan, direction, about, seconds, doubts)


@dataclass
class Verdict:
    """What was found.

    Attributes:
        rows: the table.
        lines: what else is to be printed.
        details: what else goes to the results, by name.
        figures: file name -> picture.
        each: numbers of single data, name -> (N,); those of later rows of the data are NaN where not computed.
        tight: L_K, where there is one.
        annealed: the annealed bound, where there is one.
        engine: how it was computed.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    each: dict[str, Tensor] = field(default_factory=dict)
    tight: Estimate | None = None
    annealed: Estimate | None = None
    engine: str = "eager"

    def __str__(self) -> str:
        warnings = [f"  warning: {row.name}: {text}" for row in self.rows for text in row.warnings]
        return "\n".join([*map(str, self.rows), *warnings, *(f"  {line}" for line in self.lines)])

    @property
    def results(self) -> dict[str, Any]:
        """The table as plain values."""
        rows = {
            row.name: {k: v for k, v in asdict(row).items() if k not in ("name", "about")} for row in self.rows
        }
        bits = rows.pop(BITS, None)
        return {"nats_per_datum": rows, "bits_per_dimension": bits} | self.details if rows else self.details

    def add(self, name: str, estimate: Estimate) -> None:
        """Keep an estimate's numbers of single data, under a name."""
        self.each[name] = estimate.value
        self.each[f"{name} stderr"] = estimate.stderr
        self.each |= {f"{name} {key}": value for key, value in estimate.diagnostics.items() if value.dim() == 1}

    def write(self, folder: Path) -> list[Path]:
        """Write the table and the data's numbers as CSV, and the figures.

        Returns:
            The files written.

        Raises:
            ValueError: one of them cannot be.
        """
        for name in (TABLE, EACH, *(f"{FIGURES}/{name}" for name in JUDGED)):  # of another verdict
            (folder / name).unlink(missing_ok=True)
        written = []
        if self.rows:
            written.append(_write_csv(folder / TABLE, [_plain(row) for row in self.rows]))
        if self.each:
            length = max(map(len, self.each.values()))
            columns = {
                name: [*column.tolist(), *[math.nan] * (length - len(column))]
                for name, column in self.each.items()
            }
            rows = [{"datum": i} | {n: c[i] for n, c in columns.items()} for i in range(length)]
            written.append(_write_csv(folder / EACH, rows))
        (folder / FIGURES).mkdir(exist_ok=True)
        return written + [plots.save(figure, folder / FIGURES / name) for name, figure in self.figures.items()]


def _plain(row: Row) -> dict[str, Any]:
    return asdict(row) | {"warnings": "; ".join(row.warnings)}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows of one kind as CSV, whole or not at all; NaN is left empty."""

    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows({n: "" if v != v else v for n, v in row.items()} for row in rows)

    return write_whole(path, write)


Method = Callable[[Verdict, RunFolder, Data, Asked], None]


def judge(run: RunFolder, data: Data, method: str, asked: Asked) -> Verdict:
    """Judge a run by one method, or by all that can be had for its program.

    Args:
        run: the run, its program on the device to compute on.
        data: as its program takes them.
        method: one of `METHODS`.
        asked: how.

    Raises:
        ValueError: the program cannot be judged so, or data do not suit it.
    """
    found = Verdict()
    if method != "all":
        METHODS[method](found, run, data, asked)
        return found
    for name, one in ALL.items():
        try:
            one(found, run, data, asked)
        except ValueError as error:  # told, and the others are worth having
            found.lines.append(f"{name}: not to be had, {error}")
    return found


def _timed(found: Verdict, compute: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took; where data failed, that of the others, and a line that says so."""
    start = time.perf_counter()
    try:
        result = compute()
    except IncompleteError as error:
        result = error.result
        if isinstance(result, Estimate) and bool(result.failed.all()):
            raise
        if (text := f"warning: {error}") not in found.lines:
            found.lines.append(text)
    return result, time.perf_counter() - start


def _ladder(most: int, least: int = 1) -> list[int]:
    """Powers of ten from ``least`` up to below ``most``, and ``most``."""
    return [n for k in range(9) if least <= (n := 10**k) < most] + [most]


def _by_importance(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """ELBO and L_K, with k-hat where there are particles enough to tell."""
    if not AXES["posterior"][run.config.posterior].density:
        found.lines.append("a guide of points, which has no bound; --method annealed needs none")
        return
    options = asked.shared | {"chunk": asked.chunk}
    lower, seconds = _timed(found, partial(elbo, run.program, data, min(asked.particles, asked.chunk), **options))
    parts = {n: replace(lower, value=lower.diagnostics[n], stderr=lower.stderr * math.nan) for n in RATES}
    found.rows.append(_row(lower, "-(rate + distortion)", seconds))
    found.rows += [_row(replace(p, direction="unbiased"), RATES[n], name=n) for n, p in parts.items()]
    enough = asked.particles >= FEWEST
    how = partial(importance, defensive=asked.defensive) if enough else log_likelihood
    tight, seconds = _timed(found, partial(how, run.program, data, asked.particles, **options))
    found.rows.append(_row(tight, "tighter", seconds))
    found.rows.append(_row(tight, "negative log-likelihood, at most", sign=-1))
    _add_bits(found, run, tight)
    known = tight.rest
    ess = known.diagnostics["ess"]
    found.lines.append(
        f"effective sample size: median {ess.median():.1f}, least {ess.min():.1f} of {asked.particles}"
    )
    found.details["effective_sample_size"] = {"median": float(ess.median()), "least": float(ess.min())}
    found.engine, found.tight = tight.engine, tight
    found.add(lower.name, lower)
    found.add(tight.name, tight)
    if enough:
        limit, khat = khat_threshold(asked.particles), known.diagnostics["khat"]
        share = float((khat > limit).double().mean())
        found.details["khat"] = {"threshold": limit, "share_above": share}
        found.lines.append(f"k-hat above {limit:.2f} for {share:.1%} of the data")
        found.figures["khat.png"] = plots.khat_histogram(khat, limit)
    few = _ladder(asked.particles)[:-1]
    curve = [(k, _timed(found, partial(log_likelihood, run.program, data, k, **options))[0].rest) for k in few]
    found.figures["bounds.png"] = plots.bounds({"L_K": [*curve, (asked.particles, known)]})


RATES = {"rate": "KL(q || p)", "distortion": "-E_q log p(x | z)"}


def _add_bits(found: Verdict, run: RunFolder, tight: Estimate) -> None:
    """Bits per dimension, for 8-bit data."""
    eight_bit, noisy = run.config.bits
    if not eight_bit:
        return
    dims = math.prod(run.shape)
    value = -bits_per_dimension(tight.value, dims, dequantised=noisy)
    bits = replace(tight, value=value, stderr=tight.stderr / (dims * math.log(2)), warnings=())
    found.rows = [row for row in found.rows if row.name != BITS]
    found.rows.append(_row(bits, f"of 8-bit data, at most, by {tight.name}", name=BITS, sign=-1))


def _by_annealing(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Annealing on the first data."""
    some = data[: asked.most]
    curve = []
    for count in _ladder(asked.annealing.distributions, least=10):
        settings = replace(asked.annealing, distributions=count)
        value, seconds = _timed(found, partial(annealed, run.program, some, settings, **asked.shared))
        curve.append((count, value.rest))
    found.rows.append(_row(value, f"of the first {len(some)}", seconds))
    _add_bits(found, run, value)
    found.add("AIS", value)
    if found.tight is not None:
        gain = (value.value - found.tight.value[: len(some)])[~(value.failed | found.tight.failed[: len(some)])]
        name = f"AIS - {found.tight.name}"
        found.rows.append(_difference(name, average(gain), "what importance sampling misses", "lower"))
    found.annealed, found.engine = value, value.engine
    found.details["annealing"] = asdict(asked.annealing) | {"size": len(some)}
    found.figures["annealing.png"] = plots.bounds({"AIS": curve}, "distributions")


def _by_sandwich(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Both bounds, on data drawn from the model."""
    some = _columns(data[: asked.most], asked)
    curve, ladder = [], _ladder(asked.annealing.distributions, least=10)
    for count in ladder:
        settings = replace(asked.annealing, distributions=count)
        options = asked.shared | {"settings": settings, "wanted": asked.wanted if count == ladder[-1] else None}
        value, seconds = _timed(found, partial(sandwich, run.program, len(some[0]), *some[1:], **options))
        curve.append((value.settings.distributions, value))
    about = f"of {len(some[0])} data drawn from the model"
    found.rows.append(_row(value.lower, about, seconds, name=f"simulated: {value.lower.name}"))
    found.rows.append(_row(value.upper, about, name=f"simulated: {value.upper.name}"))
    about = "between both; log p(x) lies in it"
    found.rows.append(_difference("simulated: gap", value.gap, about, "upper", doubts=value.warnings))
    found.engine = value.lower.engine
    found.details["sandwich"] = asdict(value.settings) | {"size": len(some[0])}
    found.figures["sandwich.png"] = plots.bounds(
        {"forwards": [(n, v.lower.rest) for n, v in curve], "backwards": [(n, v.upper.rest) for n, v in curve]},
        "distributions",
        "Bounds on log p(x), data of the model's own",
    )


def _columns(data: Data, asked: Asked) -> Batch:
    """Data as the program takes them, on the CPU; what is redrawn leaves the caller's stream alone."""
    with seeded(asked.seed):
        return data.present(slice(None))


def _by_gaps(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """What the family of posteriors and its net lose, on the first data."""
    posterior = AXES["posterior"][run.config.posterior]
    if not posterior.density:
        raise ValueError("the guide draws points, which have no ELBO")
    some = data[: asked.most]
    options = asked.shared | {"family": posterior.local, "evidence": found.annealed, "settings": asked.annealing}
    split, seconds = _timed(found, partial(gaps, run.program, some, **options))
    about = "log p - best ELBO"
    found.rows.append(
        _difference("approximation gap", split.approximation, about, "lower", seconds, split.warnings)
    )
    found.rows.append(_difference("amortisation gap", split.amortisation, "best ELBO - ELBO", "lower"))
    found.rows.append(_row(split.refined.bound, f"posteriors refined for each of the first {len(some)}"))
    found.add("refined", split.refined.bound)
    parts = {"approximation": split.approximation, "amortisation": split.amortisation}
    found.figures["gaps.png"] = plots.gap_bars({run.config.posterior: parts})


def _by_calibration(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Whether the guide is calibrated on data drawn from the model."""
    given = _columns(data[:CALIBRATED], asked)[1:]  # under conditions there are no more data than these have
    size = len(given[0]) if given else CALIBRATED
    ranks, seconds = _timed(found, lambda: sbc(run.program, size, *given, seed=asked.seed))
    found.lines += str(ranks).splitlines()
    outside = {name: int(o.sum()) for name, o in ranks.outside.items()}
    found.details["calibration"] = {"size": size, "dimensions_outside": outside, "seconds": seconds}
    name = max(ranks.ranks, key=lambda n: int(ranks.outside[n].sum()))
    found.figures["calibration.png"] = plots.calibration(
        ranks.difference[name],
        ranks.points,
        ranks.band(),
        ranks.outside[name],
        f"Calibration of the guide, {name}",
    )


METHODS: Mapping[str, Method] = {
    "importance": _by_importance,
    "annealed": _by_annealing,
    "sandwich": _by_sandwich,
}
ALL: Mapping[str, Method] = {**METHODS, "gaps": _by_gaps, "calibration": _by_calibration}
