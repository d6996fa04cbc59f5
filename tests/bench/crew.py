"""Worker processes: started, asked, and stopped; and the rounds in which they are timed in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

from workloads import Workload

__all__ = ["WorkerError", "Peer", "Result", "Settings", "Worker", "installed", "timed_in_turn"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A contender: its name, the worker script that has it, and the interpreter to run that in."""

    name: str
    script: str
    python: str = sys.executable


@dataclass(frozen=True)
class Settings:
    """What all measurements share.

    Attributes:
        device: "cpu" or "cuda".
        threads: of every worker.
        rounds: measurements of each peer.
        seconds: what one measurement of a step is to take.
        timeout: seconds after which a worker that does not answer is given up.
        cold: whether inductor's cache starts empty.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    seconds: float = 1.0
    timeout: float = 900.0
    cold: bool = False


@dataclass
class Result:
    """What became of one peer at one workload.

    Attributes:
        ms: milliseconds per repetition, one number for each round.
        first_s: seconds to build the work and run it once, compilation included.
        peak_mib: most memory of the worker, or of its tensors on the GPU.
        count: repetitions in a measurement.
        ratio: median over rounds of its time over ours.
        reason: why there are no times.
        failed: whether that is a failure.
    """

    ms: list[float] = field(default_factory=list)
    first_s: float | None = None
    peak_mib: float | None = None
    count: int | None = None
    ratio: float | None = None
    reason: str = ""
    failed: bool = False

    def row(self) -> dict[str, Any]:
        """All of it, with the median and the extremes, for JSON."""
        spread = {"median": median(self.ms), "min": min(self.ms), "max": max(self.ms)} if self.ms else {}
        return {**asdict(self), **spread}


class WorkerError(RuntimeError):
    """A worker died or did not answer; the message ends with its last words."""


class Worker:
    """A worker process, ended when the block that it is used in ends."""

    def __init__(self, peer: Peer, settings: Settings) -> None:
        self.peer, self.timeout = peer, settings.timeout
        self.stack = ExitStack()
        self.errors = self.stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        threads = str(settings.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if settings.cold:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory())
            environment["TORCHINDUCTOR_CACHE_DIR"] = folder
        options = {"--peer": peer.name, "--device": settings.device, "--threads": threads}
        self.process = subprocess.Popen(
            [peer.python, HERE / peer.script, *chain(*options.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # it may leave of itself, and clean up
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.stack.close()

    def hear(self) -> dict[str, Any]:
        """The next line of the worker.

        Raises:
            WorkerError: it died, or was given up.
        """
        timer = Timer(self.timeout, self.process.kill)
        timer.start()
        line = "-"
        while line and not line.startswith("{"):  # what a library prints while it is imported is passed over
            line = self.process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            words = [f"no answer within {self.timeout:g} s"] if late else self.errors.read().strip().splitlines()
            raise WorkerError(f"{self.peer.name}: {' | '.join(words[-2:]) or 'it died without a word'}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """A request and its reply.

        Raises:
            WorkerError: as `hear`.
        """
        with suppress(BrokenPipeError):  # it is dead: hear tells why
            print(json.dumps(request), file=self.process.stdin)
        return self.hear()


def installed(package: str, python: str) -> bool:
    """Whether an interpreter has a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def timed_in_turn(
    peers: Sequence[Peer], work: Workload, settings: Settings, versions: dict[str, str]
) -> dict[str, Result]:
    """Time peers at one workload, in rounds; each round starts with another peer.

    The first peer is ours: the others' ratios are to it. All workers are there all the while, and all but one
    asleep, so that whatever slows the machine for a while slows all of them. ``versions`` is added to.
    """
    results = {peer.name: Result() for peer in peers}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(peer, settings)) for peer in peers]
        workers = [w for w in workers if _prepared(w, work, settings, results[w.peer.name], versions)]
        for turn in range(settings.rounds):
            first = turn % max(1, len(workers))
            for worker in [*workers[first:], *workers[:first]]:
                _measured(worker, results[worker.peer.name])
    mine = results[peers[0].name]
    for result in results.values():
        if result.ms and mine.ms and not (result.failed or mine.failed):
            result.ratio = median(theirs / ours for theirs, ours in zip(result.ms, mine.ms, strict=True))
    return results


def _prepared(
    worker: Worker, work: Workload, settings: Settings, result: Result, versions: dict[str, str]
) -> bool:
    """Have a worker build its work; whether it did."""
    try:
        versions |= worker.hear()
        reply = worker.ask(prepare=asdict(work), seconds=settings.seconds)
    except WorkerError as failure:
        result.reason, result.failed = str(failure), True
        return False
    result.first_s, result.reason = reply.get("first_s"), reply.get("skipped", "")
    return not result.reason


def _measured(worker: Worker, result: Result) -> None:
    """One measurement, unless the worker has failed before."""
    if result.failed:
        return
    try:
        reply = worker.ask(measure=True)
    except WorkerError as failure:
        result.reason, result.failed = str(failure), True
        return
    result.ms.append(reply["ms"])
    result.count, result.peak_mib = reply["count"], reply["peak_mib"]
