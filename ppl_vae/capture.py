"""The engine: runs what training and evaluation compute, captured as graphs where that can be and pays.

A `Captured` is a function of tensors that uses a pair's parameters. It is captured once for each shape of its
arguments, with every parameter and buffer as an argument of the graph, so that a graph never goes stale. The
engine knows no model: what it captures is whatever tensor operations a pair and an objective perform.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

from ppl_vae.graphs import CaptureError, CompileError, Graph, capture, capturing, first_line, kind, text

__all__ = ["Captured", "Compile", "Engine"]

Compile = Literal["auto", "require", "off"]
Call = Callable[..., Sequence[Tensor]]

WORTH = 1000  # runs of one shape from which compiling is earned back, some seconds at some milliseconds each
MOST = 8  # graphs of one function: beyond them, what they are made for is taken to change for ever
UNCAPTURED = "it runs uncaptured, at a half to a quarter of the speed"
PLAIN = frozenset({bool, int, float, str, type(None)})


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


class _Together(nn.Module):
    """Several modules under one name space, and a function that uses them."""

    def __init__(self, modules: Sequence[nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.__dict__["function"] = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.__dict__["function"](*arguments)

    def state(self) -> dict[str, Tensor]:
        """All parameters and buffers, each once."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def held(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """What a graph holds fixed of all modules: modes, numbers in attributes, which parameters are trained."""
        parts, seen = [*self.parts], set[int]()
        for part in parts:  # it grows
            if id(part) in seen:
                continue
            seen.add(id(part))
            for name, value in part.__dict__.items():
                if type(value) in PLAIN:
                    yield part, name, value
            for name, parameter in part._parameters.items():
                yield part, name, parameter is not None and parameter.requires_grad
            parts.extend(child for child in part._modules.values() if child is not None)


class _Ready:
    """A graph, and the modules' tensors that it takes."""

    def __init__(self, graph: Graph, own: list[Tensor]) -> None:
        self.graph, self.own, self.ran = graph, own, False
        self.pointers: list[int] = []
        self.detached: list[Tensor] = []

    def state(self) -> list[Tensor]:
        """The tensors as they are now; a parameter's data may have been put elsewhere (``p.data = ...``)."""
        pointers = [t.data_ptr() for t in self.own]
        if pointers != self.pointers:
            self.pointers, self.detached = pointers, [t.detach() for t in self.own]
        return self.detached


@contextmanager
def _clean(holder: nn.Module) -> Iterator[None]:
    """Take back what modules have set on themselves meanwhile, if it is a stand-in: caches that tracing filled."""
    before = [(m, dict(vars(m))) for m in holder.modules()]
    try:
        yield
    finally:
        for module, held in before:
            for name in [n for n, v in vars(module).items() if isinstance(v, FakeTensor)]:
                if name in held:
                    vars(module)[name] = held[name]
                else:
                    del vars(module)[name]


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
        self.holder = _Together(modules, function)
        self.graphs: dict[tuple[Any, ...], _Ready | None] = {}
        self.held: list[tuple[nn.Module, str, Any]] = []  # by modules, when the latest graph was made
        self.given_up = False
        self.running: tuple[Any, ...] = ()  # the key of the arguments at hand

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the function."""
        return self.run(self.key(arguments), arguments)

    def key(self, arguments: Sequence[Tensor]) -> tuple[Any, ...]:
        """What a graph is made for: shapes, strides, types and devices, and what modules hold."""
        return (*map(kind, arguments), *[value for _, _, value in self.holder.held()])

    def run(self, key: tuple[Any, ...], arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the function on arguments that have this key."""
        self.running = key
        if capturing():  # part of a larger function, and of its graph
            return self.plain(*arguments)
        found = self.graphs[key] if key in self.graphs else self.graph(key, arguments)
        if found is None:
            return self.plain(*arguments)
        if not found.ran:
            return self.first(key, found, arguments)
        return found.graph(*found.state(), *arguments)

    def first(self, key: tuple[Any, ...], found: _Ready, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run a graph for the first time: what compiles may still fail to run."""
        try:
            results = found.graph(*found.state(), *arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, or raised under "require"
            self.engine.warn(f"the graph cannot be run ({type(error).__name__}: {first_line(error)})")
            self.graphs[key] = None
            return self.plain(*arguments)
        found.ran = True
        return results

    def plain(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the function as it is."""
        return self.function(*arguments)

    def graph(self, key: tuple[Any, ...], arguments: Sequence[Tensor]) -> _Ready | None:
        """A new graph and the tensors of the modules that it takes; None where the function runs as it is."""
        if self.given_up or not self.engine.wants(self.uses(*arguments)):
            return None
        if len(self.graphs) == MOST:
            if what := self.differing():
                self.give_up(f"{what} changed again, and has had {MOST} graphs captured")
            else:
                self.engine.warn(f"the shapes of batches keep changing, and no more than {MOST} are captured")
            return None
        found = self.made(arguments)
        if self.key(arguments) != key:  # the program changes what it holds: once, as caches do, or at every run
            found = self.made(arguments)
            if what := self.differing():
                self.give_up(f"running the program changes {what}")
                return None
        self.graphs[self.key(arguments)] = found
        return found

    def made(self, arguments: Sequence[Tensor]) -> _Ready | None:
        """Capture the function for such arguments."""
        self.held = [*self.holder.held()]
        own, pure = self.pure(arguments)
        with _clean(self.holder):
            graph, how = self.engine.capture(pure, [*(t.detach() for t in own), *arguments], self.obstacle)
        if self.noted:
            self.engine.note(how)
        return None if graph is None else _Ready(graph, own)

    def differing(self) -> str:
        """What modules hold otherwise than when the latest graph was made: the first such name."""
        pairs = zip(self.held, self.holder.held(), strict=False)
        names = (f"{type(now[0]).__name__}.{now[1]}" for then, now in pairs if then[1:] != now[1:])
        return next(names, "")

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
        own, pure = self.pure(arguments)
        with _clean(self.holder):
            same = text(pure, [*(t.detach() for t in own), *arguments]) == found.graph.text
        if not same:
            self.give_up("the program computes other things than at first")
        return same

    def pure(self, arguments: Sequence[Tensor]) -> tuple[list[Tensor], Call]:
        """The modules' tensors, and the function as one of them and of such arguments."""
        own = self.holder.state()
        buffers = [name for name, _ in self.holder.named_buffers()]

        def pure(*tensors: Tensor) -> Sequence[Tensor]:
            inside = dict(zip(own, tensors, strict=False))
            before = {name: inside[name] for name in buffers}
            results = self.outputs(inside, tensors[len(own) :])
            for name, buffer in before.items():
                if inside[name] is not buffer:  # a module has put another tensor in its place
                    buffer.copy_(inside[name].detach())
            return results

        return [*own.values()], pure

    def outputs(self, state: dict[str, Tensor], arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """The function's results with other tensors in place of the modules' own; ``state`` is what they leave."""
        results: Sequence[Tensor] = functional_call(self.holder, state, tuple(arguments))
        return results
