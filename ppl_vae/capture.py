"""The engine: runs what training and evaluation compute, captured as graphs where that can be and pays.

A `Captured` is a function of tensors that uses a pair's parameters. It is captured once for each shape of its
arguments, with every parameter and buffer as an argument of the graph, so that a graph never goes stale. The
engine knows no model: what it captures is whatever tensor operations a pair and an objective perform.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

from torch import Tensor, nn

from ppl_vae.graphs import (
    CaptureError,
    CompileError,
    Graph,
    Live,
    capture,
    capturing,
    first_line,
    kind,
    same,
    traced,
)
from ppl_vae.holding import Holder, Key

__all__ = ["Captured", "Compile", "Engine"]

Compile = Literal["auto", "require", "off"]
Call = Callable[..., Sequence[Tensor]]

WORTH = 1000  # runs of one shape from which compiling is earned back, some seconds at some milliseconds each
MOST = 8  # graphs of one function: beyond them, what they are made for is taken to change for ever
PATIENCE = 4  # runs as written, for what a program makes when it is first run, on each of its ways
UNCAPTURED = "it runs uncaptured, at a half to a quarter of the speed"


class Engine:
    """How to run, captured or not; and what became of it.

    Args:
        compile: "auto" captures and compiles what will run often enough, and where that cannot be warns once
            and goes on without; "require" compiles everything, and raises where that cannot be; "off" runs
            everything as it is written.

    Raises:
        ValueError: an unknown choice.
    """

    def __init__(self, compile: Compile = "auto") -> None:
        if compile not in ("auto", "require", "off"):
            raise ValueError(f"compile must be 'auto', 'require' or 'off', got {compile!r}")
        self.compile = compile
        self.notes: list[str] = []
        self.warned = False

    def wants(self, uses: float) -> bool:
        """Whether to capture what will run so often."""
        return self.compile == "require" or (self.compile == "auto" and uses >= WORTH)

    def capture(self, function: Call, tensors: Sequence[Tensor], obstacle: str | None) -> tuple[Graph | None, str]:
        """Capture and compile; failing that, under "auto", capture only; failing that, None.

        Returns:
            The graph, and what became of it, in one line.

        Raises:
            ValueError: it cannot be, under "require".
        """
        start, how = time.perf_counter(), "compiled"
        try:
            if obstacle:
                raise CaptureError(obstacle)
            try:
                graph = capture(function, tensors)
            except CompileError as error:
                self.warn(str(error), "it runs captured but not compiled, at about two thirds of the speed", error)
                graph, how = capture(function, tensors, compile=False), "captured, not compiled"
        except CaptureError as error:
            self.warn(str(error), UNCAPTURED, error)
            return None, f"eager: {error}"
        return graph, f"{how} in {time.perf_counter() - start:.1f} s, {graph.products}"

    def warn(self, what: str, instead: str = UNCAPTURED, error: Exception | None = None) -> None:
        """Warn of a failure, once for all that this engine runs, and say what is done instead; or raise.

        Raises:
            ValueError: under "require".
        """
        if self.compile == "require":
            raise ValueError(f"compile='require': {what}") from error
        if not self.warned:
            message = f"compile='auto': {what}; {instead}; compile='off' silences this"
            warnings.warn(message, stacklevel=6)
        self.warned = True

    def note(self, what: str) -> None:
        """Remember what became of a function, for `describe`."""
        if what not in self.notes:
            self.notes.append(what)

    def describe(self) -> str:
        """How the first of the functions runs."""
        return self.notes[0] if self.notes else "eager"


class _Ready:
    """A graph, and the modules' tensors that it takes."""

    def __init__(self, graph: Graph, slots: Sequence[tuple[dict[str, Any], str]]) -> None:
        self.graph, self.ran = graph, False
        self.state = Live(lambda: [store[name] for store, name in slots])


class Captured:
    """A function of tensors that uses modules: run as it is, or as a graph for each shape of its arguments.

    Args:
        engine: how to run.
        modules: whose parameters and buffers it uses; while it is in use, these stay where they are. Where a
            number in an attribute, a mode or a parameter's ``requires_grad`` changes, it is captured anew.
        function: of tensors, returning a sequence of tensors.
        uses: arguments -> how often such shapes are expected.
        obstacle: why it cannot be captured, where that is known beforehand.
        noted: whether the engine's description may be of this function.
    """

    def __init__(
        self,
        engine: Engine,
        modules: Sequence[nn.Module],
        function: Call,
        uses: Callable[..., float] = lambda *_: math.inf,
        obstacle: str | None = None,
        noted: bool = True,
    ) -> None:
        self.engine, self.modules, self.function, self.uses = engine, modules, function, uses
        self.obstacle, self.noted = obstacle, noted
        self.holder = Holder(modules)
        self.graphs: dict[Key, _Ready | None] = {}
        self.held = self.holder.held()  # when the latest graph was made
        self.given_up, self.unsettled = False, 0
        self.running: Key = ()  # of the arguments at hand

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the function."""
        return self.run(self.key(arguments), arguments)

    def key(self, arguments: Sequence[Tensor]) -> Key:
        """What a graph is made for: shapes, strides, types and devices, and what modules hold."""
        return (*map(kind, arguments), *self.holder.key())

    def run(self, key: Key, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the function on arguments that have this key."""
        self.running = key
        if capturing():  # part of a larger function, and of its graph
            return self.plain(*arguments)
        found = self.graphs[key] if key in self.graphs else self.graph(arguments)
        if found is None:
            return self.plain(*arguments)
        if not found.ran:
            return self.first(found, arguments)
        return found.graph(*found.state(), *arguments)

    def first(self, found: _Ready, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run a graph for the first time: what compiles may still fail to run."""
        try:
            results = found.graph(*found.state(), *arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, or raised under "require"
            self.engine.warn(f"the graph cannot be run ({type(error).__name__}: {first_line(error)})")
            self.graphs[self.running] = None
            return self.plain(*arguments)
        found.ran = True
        return results

    def plain(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the function as it is."""
        return self.function(*arguments)

    def graph(self, arguments: Sequence[Tensor]) -> _Ready | None:
        """A new graph and the tensors of the modules that it takes; None where the function runs as it is."""
        if self.given_up or not self.engine.wants(self.uses(*arguments)):
            return None
        if len(self.graphs) == MOST:
            if what := self.differing(self.held):
                self.give_up(f"{what} changed again, and has had {MOST} graphs captured")
            else:
                self.engine.warn(f"the shapes of batches keep changing, and no more than {MOST} are captured")
            return None
        self.held = self.holder.held()
        found, changed = self.made(arguments)
        if changed and not self.settled(found, changed, arguments):
            return None
        self.running = self.key(arguments)
        self.graphs[self.running] = found
        return found

    def settled(self, found: _Ready | None, changed: set[tuple[int, str]], arguments: Sequence[Tensor]) -> bool:
        """Whether what running the program changes in it does not matter, because it is written and never read.

        Such are notes that a layer makes of its latest input: they are left out of account from now on. Other
        changes, as caches and first runs make them, are made by running the program as it is; where they come
        again and again, it is given up.
        """
        code, constants = "", tuple[Tensor, ...]()
        with suppress(CaptureError, ValueError):
            code, constants = self.traced(arguments, blank=changed)
        if found is not None and code == found.graph.text and same(constants, found.graph.constants):
            self.holder.ignore(changed)
            return True
        self.unsettled += 1
        if self.unsettled > PATIENCE:
            self.give_up(f"running the program changes {self.named(changed)}")
        return False

    def named(self, changed: set[tuple[int, str]]) -> str:
        """The first of some attributes, by its class and name."""
        owners = {id(part.owner): part.owner for part in self.holder.parts()}
        return min(f"{type(owners[owner]).__name__}.{name}" for owner, name in changed)

    def own(self) -> list[Tensor]:
        """The modules' tensors, each once."""
        return [store[name] for store, name in self.holder.slots()]

    def made(self, arguments: Sequence[Tensor]) -> tuple[_Ready | None, set[tuple[int, str]]]:
        """Capture the function for such arguments; and which attributes running it changes."""
        own, slots = self.own(), self.holder.slots()
        with self.holder.untouched() as changed:
            given = [*(t.detach() for t in own), *arguments]
            graph, how = self.engine.capture(self.pure(own), given, self.obstacle)
        if self.noted:
            self.engine.note(how)
        return None if graph is None else _Ready(graph, slots), changed

    def traced(
        self, arguments: Sequence[Tensor], blank: Iterable[tuple[int, str]] = ()
    ) -> tuple[str, tuple[Tensor, ...]]:
        """What the function computes now, as code and constants, with some attributes left blank."""
        own = self.own()
        with self.holder.untouched(blank=blank):
            return traced(self.pure(own), [*(t.detach() for t in own), *arguments])

    def differing(self, before: dict[tuple[int, str], tuple[Any, Any]]) -> str:
        """What modules hold otherwise than before: the first such name."""
        for name, (owner, value) in self.holder.held().items():
            if name not in self.holder.ignored and before.get(name, (None, None))[1] != value:
                return f"{type(owner).__name__}.{name[1]}"
        return ""

    def give_up(self, why: str) -> None:
        """From now on, run the function as it is.

        Raises:
            ValueError: under "require".
        """
        self.given_up, self.graphs = True, {}
        if self.noted:
            self.engine.notes[:] = [f"eager: {why}"]
        self.engine.warn(f"{why}; keep what changes in a tensor, such as a buffer")

    def recheck(self, arguments: Sequence[Tensor]) -> bool:
        """Whether the function still is what was captured; if not, warn, and from now on run it as it is.

        What modules hold is looked at before every run. This sees the rest, by tracing again: Python numbers that
        are global or closed over, lists, and whatever else decides what a program computes.

        Raises:
            ValueError: it is not, under "require".
        """
        self.running = self.key(arguments)
        found = self.graphs.get(self.running)
        if found is None:
            return True
        try:
            code, constants = self.traced(arguments)
        except CaptureError as error:
            self.give_up(str(error))
            return False
        if code == found.graph.text and same(constants, found.graph.constants):
            return True
        self.give_up("the program computes other things than at first")
        return False

    def pure(self, own: Sequence[Tensor]) -> Call:
        """The function, as one of the modules' tensors and of its arguments."""
        return lambda *tensors: self.outputs(own, tensors[: len(own)], tensors[len(own) :])

    def outputs(
        self, own: Sequence[Tensor], given: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The function's results with other tensors in place of the modules' own."""
        with self.holder.standing_in(own, given):
            return self.function(*arguments)
