"""What judging finds: lines of a table, and what goes with them into files."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import plots
from ppl_vae.estimates import Average, Estimate
from ppl_vae.files import write_whole
from ppl_vae.folders import EACH, FIGURES, JUDGED, TABLE, refuse_links

__all__ = ["BITS", "Row", "Verdict", "as_row", "difference"]

BITS = "bits/dim"


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


def as_row(estimate: Estimate, about: str, seconds: float = math.nan, name: str = "", sign: int = 1) -> Row:
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


def difference(
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
        refuse_links(folder)
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
