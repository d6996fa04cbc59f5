"""What all workers share: JSON lines in and out, the clock, the peak of memory.

A worker is a process that holds one peer. It announces itself by one line of JSON, then answers each request, a
line of JSON, by one line: ``{"prepare": workload, "seconds": s}`` builds the work, warms it up and settles how
many repetitions take so long; ``{"measure": true}`` times these. Between requests it sleeps.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from workloads import Workload

__all__ = ["Build", "Job", "Skip", "clocked", "resident_peak", "serve"]

Job = Callable[[int], float]
"""Repeat the work so many times; return the seconds that took."""
Build = Callable[[Workload], Job]


class Skip(Exception):  # noqa: N818 - it is an answer, not a failure
    """This peer does not do this work; the message says why."""


def clocked(once: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Job:
    """Time repetitions of one call; ``wait`` blocks until the device has finished."""

    def job(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            once()
        wait()
        return time.perf_counter() - start

    return job


def resident_peak() -> float:
    """The most memory this process has held so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Worker:
    """One peer, and the work it is at."""

    def __init__(self, build: Build, peak: Callable[[], float]) -> None:
        self.build, self.peak = build, peak
        self.job: Job | None = None
        self.count = 1

    def prepare(self, work: Workload, seconds: float) -> dict[str, Any]:
        """Build and warm up: the first repetition apart, then as many as fill a quarter of a measurement."""
        self.job, self.count = None, 1  # what the last work held goes first
        start = time.perf_counter()
        try:
            job = self.build(work)
        except Skip as reason:
            return {"skipped": str(reason)}
        job(1)
        first = time.perf_counter() - start
        if not work.once:
            job(3)
            while (taken := job(self.count)) < seconds / 4:
                self.count *= 2
            self.count = max(1, round(self.count * seconds / taken))
        self.job = job
        return {"first_s": first}

    def measure(self) -> dict[str, Any]:
        """Milliseconds per repetition, and memory."""
        if self.job is None:
            raise RuntimeError("asked to measure before anything was prepared")
        return {"ms": self.job(self.count) / self.count * 1e3, "count": self.count, "peak_mib": self.peak()}


def serve(build: Build, about: dict[str, str], peak: Callable[[], float] = resident_peak) -> None:
    """Answer requests until there are no more. What a library prints goes to the standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(build, peak)
    print(json.dumps(about), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            reply = worker.prepare(Workload.of(request["prepare"]), request["seconds"])
        else:
            reply = worker.measure()
        print(json.dumps(reply), file=replies)
