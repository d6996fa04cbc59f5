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

from ppl_vae.graphs import CaptureError, Graph, capture, first_line

__all__ = ["Captured", "Compile", "Engine", "shapes"]

Compile = Literal["auto", "require", "off"]
Call = Callable[..., Sequence[Tensor]]

WORTH = 1000  # runs of one shape from which compiling is earned back, some seconds at some milliseconds each
MOST = 8  # graphs of one function: beyond them its shapes are taken to change for ever


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

    def capture(
        self, function: Call, tensors: Sequence[Tensor], obstacle: str | None = None, *, noted: bool = True
    ) -> Graph | None:
        """Capture and compile; failing that, under "auto", capture only; failing that, None.

        Raises:
            ValueError: it cannot be, under "require".
        """
        start = time.perf_counter()
        graph: Graph | None
        try:
            if obstacle:
                raise CaptureError(obstacle)
            graph, how = capture(function, tensors), "compiled"
        except CaptureError as error:
            graph, how = self.without(function, tensors, error, obstacle)
        if graph is not None and noted:
            self.note(f"{how} in {time.perf_counter() - start:.1f} s, {graph.products}")
        return graph

    def without(
        self, function: Call, tensors: Sequence[Tensor], error: CaptureError, obstacle: str | None
    ) -> tuple[Graph | None, str]:
        """What is left when compiling has failed: the graph interpreted, or nothing."""
        if self.compile == "require":
            raise ValueError(f"compile='require': {error}") from error
        try:
            if obstacle:
                raise error
            graph = capture(function, tensors, compile=False)
        except CaptureError as cause:
            self.warn(f"{cause}; it runs uncaptured, at a half to a quarter of the speed")
            self.note(f"eager: {cause}")
            return None, ""
        self.warn(f"{error}; it runs captured but not compiled, at about two thirds of the speed")
        return graph, "captured, not compiled"

    def warn(self, what: str) -> None:
        """Warn, once for all that this engine runs; under "require", raise.

        Raises:
            ValueError: under "require".
        """
        if self.compile == "require":
            raise ValueError(f"compile='require': {what}")
        if not self.warned:
            warnings.warn(f"compile='auto': {what}; compile='off' silences this", stacklevel=6)
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
        modules: whose parameters and buffers it uses; while it is in use, these stay where they are.
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
        self.running: tuple[Any, ...] = ()  # the key of the arguments at hand

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the function."""
        return self.run(self.key(arguments), arguments)

    def key(self, arguments: Sequence[Tensor]) -> tuple[Any, ...]:
        """What a graph is made for: shapes, strides and types, and the modules' modes."""
        return (*shapes(arguments), *[module.training for module in self.modules])

    def run(self, key: tuple[Any, ...], arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the function on arguments that have this key."""
        self.running = key
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
        if not self.engine.wants(self.uses(*arguments)):
            return None
        if len(self.graphs) == MOST:
            self.engine.warn(f"the shapes of batches keep changing, and no more than {MOST} are captured")
            return None
        self.graphs[key] = self.made(arguments)
        return self.graphs[key]

    def made(self, arguments: Sequence[Tensor]) -> _Ready | None:
        """Capture the function for such arguments."""
        own = self.holder.state()
        state = [t.detach() for t in own.values()]
        buffers = [name for name, _ in self.holder.named_buffers()]

        def pure(*tensors: Tensor) -> Sequence[Tensor]:
            inside = dict(zip(own, tensors, strict=False))
            before = {name: inside[name] for name in buffers}
            results = self.outputs(inside, tensors[len(own) :])
            for name, buffer in before.items():
                if inside[name] is not buffer:  # a module has put another tensor in its place
                    buffer.copy_(inside[name].detach())
            return results

        with _clean(self.holder):
            graph = self.engine.capture(pure, [*state, *arguments], self.obstacle, noted=self.noted)
        return None if graph is None else _Ready(graph, [*own.values()])

    def outputs(self, state: dict[str, Tensor], arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """The function's results with other tensors in place of the modules' own; ``state`` is what they leave."""
        results: Sequence[Tensor] = functional_call(self.holder, state, tuple(arguments))
        return results


def shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is made for."""
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors)
