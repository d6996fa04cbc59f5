"""The table of a bench, in Markdown, and its scaling curves, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from crew import Result
from workloads import Workload

__all__ = ["curves", "notes", "table"]

Rows = Sequence[tuple[Workload, dict[str, Result]]]
Curves = dict[str, dict[str, dict[int, list[float]]]]


def table(rows: Rows) -> str:
    """One row for each workload: ours, each peer with its time over ours, memory, and the first call.

    A peer that timed nothing at all has no column.
    """
    seen = dict.fromkeys(name for _, results in rows for name in results)
    peers = [name for name in seen if any(name in r and (r[name].ms or r[name].failed) for _, r in rows)]
    lines = [
        ["workload", *peers, "peak MiB", "first call, s"],
        ["---", *("---:" for _ in peers), "---", "---"],
    ]
    for work, results in rows:
        shown = [results.get(name, Result()) for name in peers]
        memory = " / ".join("–" if r.peak_mib is None else f"{r.peak_mib:.0f}" for r in shown)
        first = " / ".join("–" if r.first_s is None or not r.ms else f"{r.first_s:.1f}" for r in shown)
        cells = [cell(work, r, ratio=i > 0) for i, r in enumerate(shown)]
        lines.append([work.name, *cells, memory, first])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(work: Workload, result: Result, *, ratio: bool) -> str:
    """A time, and for a peer how many times ours it is."""
    if result.failed:
        return "failed"
    if not result.ms:
        return "n/a"
    shown = work.amount(median(result.ms))
    return f"{shown} ({result.ratio:.2f}x)" if ratio and result.ratio is not None else shown


def notes(rows: Rows) -> list[str]:
    """Why there are gaps in the table, each reason once."""
    found = [f"{work.name}: {name}: {r.reason}" for work, rs in rows for name, r in rs.items() if r.failed]
    skipped: dict[tuple[str, str], list[str]] = {}
    for work, results in rows:
        for name, result in results.items():
            if result.reason and not result.failed:
                skipped.setdefault((name, result.reason), []).append(work.name)
    return [*found, *(f"n/a, {name}: {reason} ({'; '.join(at)})" for (name, reason), at in skipped.items())]


def curves(measured: Curves, path: Path, caption: str) -> None:
    """Time per step against each size, one panel for each, one line for each peer: medians and extremes.

    Args:
        measured: panel -> peer -> size -> milliseconds of each round.
        path: where the figure goes.
        caption: on what it was measured.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = plt.subplots(
        1, len(measured), figsize=(4.2 * len(measured), 3.8), layout="constrained", sharey=True
    )
    styles = [("#0072B2", "o", "-"), ("#D55E00", "s", "--")]
    for panel, (title, peers) in zip(panels, measured.items(), strict=True):
        for (name, points), (colour, marker, line) in zip(peers.items(), styles, strict=False):
            sizes = list(points)
            panel.plot(sizes, [median(points[s]) for s in sizes], line, color=colour, marker=marker, label=name)
            low, high = ([f(points[s]) for s in sizes] for f in (min, max))
            panel.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted({s for points in peers.values() for s in points})
        panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
        panel.set_xlabel(title)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds per training step")
    panels[0].legend(frameon=False)
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
