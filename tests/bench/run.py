"""Time this project against its peers, in turn, and print one table.

Peers: a training step written by hand in torch, eager and compiled, and Pyro's SVI, in this interpreter; NumPyro
and Pythae where they are installed, here or in an interpreter named by an option or by the environment
(PPL_VAE_BENCH_NUMPYRO, PPL_VAE_BENCH_PYTHAE). MNIST comes from the folder PPL_VAE_DATA; without it, images of the
same size are made up. A ratio is the median over rounds of a peer's time over ours of the same round: above 1, we
are faster. Compilation is kept out of the times; "first call" shows it.

usage: python tests/bench/run.py [--device cuda] [--rounds 5] [--only TEXT ...] [--json FILE] [--scaling FILE.png]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from crew import Peer, Result, Settings, installed, timed_in_turn
from report import curves, notes, table
from workloads import SCALING, WORKLOADS, Workload

OURS = Peer("ours", "ours.py")
PATHWISE = Peer("ours, pathwise", "ours.py")
TORCH = [Peer(name, "peers.py") for name in ("torch eager", "torch compile", "pyro svi")]


def options() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, help="of every peer; default OMP_NUM_THREADS, else all cores")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each peer (default 5)")
    p.add_argument("--seconds", type=float, default=1.0, help="what one measurement of a step takes (default 1)")
    p.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose names hold one of these")
    p.add_argument("--peers", nargs="+", metavar="TEXT", help="peers whose names hold one of these; ours always")
    p.add_argument("--quick", action="store_true", help="two short rounds on little data: whether it all runs")
    p.add_argument("--cold", action="store_true", help="start with an empty inductor cache")
    p.add_argument("--timeout", type=float, default=900.0, help="seconds to wait for an answer (default 900)")
    p.add_argument("--numpyro-python", metavar="PATH", default=os.environ.get("PPL_VAE_BENCH_NUMPYRO"))
    p.add_argument("--pythae-python", metavar="PATH", default=os.environ.get("PPL_VAE_BENCH_PYTHAE"))
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    p.add_argument("--scaling", type=Path, metavar="FILE.png", help="draw scaling curves, and nothing else")
    p.add_argument("--list", action="store_true", help="print the workloads' names, and nothing else")
    chosen = p.parse_args()
    if chosen.rounds < 1 or not chosen.seconds > 0 or (chosen.threads or 1) < 1:
        p.error("--rounds, --threads and --seconds must be positive")
    for package, python in (("numpyro", chosen.numpyro_python), ("pythae", chosen.pythae_python)):
        if python and not (Path(python).is_file() and installed(package, python)):
            p.error(f"{python} is no Python with {package}")
    return chosen


def matching(names: list[str], texts: list[str] | None) -> list[str]:
    """The names that hold one of the texts, or all of them."""
    return [n for n in names if texts is None or any(t.casefold() in n.casefold() for t in texts)]


def contenders(chosen: argparse.Namespace) -> list[Peer]:
    """The peers that are here, less those not asked for; tells of those that are not here."""
    peers = list(TORCH)
    for package, python in (("numpyro", chosen.numpyro_python), ("pythae", chosen.pythae_python)):
        if installed(package, python or sys.executable):
            peers.append(Peer(package, f"{package}_peer.py", python or sys.executable))
        else:
            print(f"{package} is not installed; --{package}-python names an interpreter with it\n", flush=True)
    names = matching([peer.name for peer in peers], chosen.peers)
    return [peer for peer in peers if peer.name in names]


def cores(chosen: argparse.Namespace) -> int:
    """Give this process, and so all workers, as many cores as threads: not every library takes an option."""
    if not hasattr(os, "sched_setaffinity"):
        return chosen.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    here = sorted(os.sched_getaffinity(0))
    threads = min(chosen.threads or int(os.environ.get("OMP_NUM_THREADS") or len(here)), len(here))
    os.sched_setaffinity(0, here[:threads])
    return threads


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), platform.processor())


def compare(works: list[Workload], peers: list[Peer], settings: Settings, machine: dict[str, str]) -> list:
    """All workloads, one after the other."""
    rows = []
    for work in works:
        print(f"... {work.name}", file=sys.stderr, flush=True)
        rivals = [PATHWISE] if work.estimator == "doubly" else peers
        rows.append((work, timed_in_turn([OURS, *rivals], work, settings, machine)))
    return rows


def scaling(path: Path, settings: Settings, machine: dict[str, str], *, quick: bool) -> dict:
    """Draw ours and eager torch against each size; return what was measured."""
    pair, measured = [OURS, TORCH[0]], {}
    for panel, works in SCALING.items():
        sizes = dict(list(works.items())[:2]) if quick else works
        measured[panel] = {peer.name: {} for peer in pair}
        for size, work in sizes.items():
            print(f"... {work.name}", file=sys.stderr, flush=True)
            for name, result in timed_in_turn(pair, work, settings, machine).items():
                if result.failed or result.reason:
                    raise SystemExit(f"{work.name}: {name}: {result.reason}")
                measured[panel][name][size] = result.ms
    where = machine["gpu"] if settings.device == "cuda" else f"{machine['processor']}, threads: {settings.threads}"
    curves(measured, path, f"{where}; 784-400-20 at batch 128, and 784-200-200-50 at batch 20 against K; Adam")
    print(f"scaling curves: {path}")
    return measured


def main() -> int:
    """Run; 1 where ours failed."""
    chosen = options()
    names = matching([work.name for work in WORKLOADS], chosen.only)
    if chosen.list or not names:
        print("\n".join(work.name for work in WORKLOADS))
        return 0 if chosen.list else 2
    works = [work.quick() if chosen.quick else work for work in WORKLOADS if work.name in names]
    settings = Settings(
        device=chosen.device,
        threads=cores(chosen),
        rounds=2 if chosen.quick else chosen.rounds,
        seconds=0.01 if chosen.quick else chosen.seconds,
        timeout=chosen.timeout,
        cold=chosen.cold,
    )
    machine = {"processor": processor(), "python": platform.python_version()}
    report: dict = {"settings": asdict(settings), "quick": chosen.quick, "machine": machine}
    rows: list[tuple[Workload, dict[str, Result]]] = []
    if chosen.scaling:
        report["scaling"] = scaling(chosen.scaling, settings, machine, quick=chosen.quick)
    else:
        rows = compare(works, contenders(chosen), settings, machine)
        report["rows"] = [
            {"workload": asdict(work), "peers": {name: r.row() for name, r in results.items()}}
            for work, results in rows
        ]
        print(table(rows), end="\n\n")
        print(
            f"{settings.device}, threads: {settings.threads}, median of {settings.rounds} rounds. Memory and first"
        )
        print(f"call are in the order of the columns. {', '.join(f'{k} {v}' for k, v in machine.items())}")
        print("".join(f"\n- {note}" for note in notes(rows)))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(results["ours"].failed for _, results in rows))


if __name__ == "__main__":
    sys.exit(main())
