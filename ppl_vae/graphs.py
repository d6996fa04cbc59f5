"""A function of tensors, captured once as a flat graph of tensor operations and replayed without its Python.

Pyro's handlers, distributions and modules run while a graph is captured, and never again. A graph is compiled by
inductor where a compiler is at hand, interpreted elsewhere; on CUDA it can be replayed as one launch.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ppl_vae.products import DEFAULT, choose_products
from ppl_vae.rewrites import draws_in_order, fewer_logarithms, quicker_tanh

__all__ = [
    "CaptureError",
    "CompileError",
    "CudaGraph",
    "Graph",
    "Live",
    "capture",
    "capturing",
    "first_line",
    "kind",
    "same",
    "traced",
]

Function = Callable[..., Sequence[Tensor]]


class CaptureError(RuntimeError):
    """A function cannot be captured; the message tells the cause in one line."""


class CompileError(CaptureError):
    """A function can be captured, but its graph not be compiled."""


@dataclass
class Graph:
    """A captured function: takes tensors of the shapes, types and devices it was captured with.

    Attributes:
        run: the graph, as a function of the arguments and then the constants.
        constants: tensors that the function used without being given them, where they live: a value written
            into one of them is seen by the next run, and so is other data that it is given.
        compiled: whether it was compiled; else it is interpreted.
        products: which library computes its matrix products.
        text: its operations, as `text` gives them.
    """

    run: Function
    constants: tuple[Tensor, ...]
    compiled: bool
    products: str
    text: str

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run the graph; what the function wrote in place is written in place."""
        with torch.no_grad():
            return self.run(*tensors, *self.live())

    @cached_property
    def live(self) -> Live:
        """The constants as they are now."""
        return Live(lambda: self.constants)


class Live:
    """Tensors as they are now, detached; their data may have been put elsewhere (``p.data = ...``).

    Args:
        read: gives the tensors, which keep their shapes, types and devices.
    """

    def __init__(self, read: Callable[[], Sequence[Tensor]]) -> None:
        self.read, self.pointers = read, [-1]
        self.detached: list[Tensor] = []
        self.kinds = [kind(t) for t in read()]

    def __call__(self) -> list[Tensor]:
        """Return them.

        Raises:
            ValueError: one has another shape, type or device than at first.
        """
        tensors = self.read()
        pointers = [t.data_ptr() for t in tensors]
        if pointers != self.pointers:
            for tensor, expected in zip(tensors, self.kinds, strict=True):
                if kind(tensor) != expected:
                    raise ValueError(
                        f"a tensor of the program is now {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                        f"and was {tuple(expected[0])} when its graph was captured; use compile='off'"
                    )
            self.pointers, self.detached = pointers, [t.detach() for t in tensors]
        return self.detached


def capture(function: Function, tensors: Sequence[Tensor], *, compile: bool = True) -> Graph:
    """Capture a function of tensors.

    It is traced once on stand-ins without data, so no number is drawn and nothing is written. Random numbers are
    drawn anew at every run, from torch's default generators, in the same order as by the function itself.
    What is no tensor (a float attribute, a Python branch, the number of particles) becomes part of the graph.

    Args:
        function: of tensors, returning a sequence of tensors; it may compute gradients inside.
        tensors: arguments of the shapes to come.
        compile: whether to compile; the compiled form of an equal graph is found again within the process, and
            on disk.

    Raises:
        CaptureError: the function reads numbers back from tensors.
        CompileError: there is no working compiler, or it fails.
        ValueError: raised by the function itself.
    """
    if compile and any(t.device.type == "cpu" for t in tensors):
        _probing()
    module, constants = _traced(function, tensors)
    code = module.code
    if not compile:
        return Graph(cast(Function, module), constants, False, DEFAULT, code)
    arguments = [*tensors, *(c.detach() for c in constants)]
    key = (code, tuple(kind(t) for t in arguments), torch.get_num_threads())
    if key not in _compiled:
        _compiled[key] = _compile(module, arguments)
        while len(_compiled) > 64:
            _compiled.popitem(last=False)
    _compiled.move_to_end(key)
    run, products = _compiled[key]
    return Graph(run, constants, True, products, code)


def traced(function: Function, tensors: Sequence[Tensor]) -> tuple[str, tuple[Tensor, ...]]:
    """The operations that a function performs now, as code, and their constants.

    Raises:
        CaptureError, ValueError: as by `capture`.
    """
    module, constants = _traced(function, tensors)
    return module.code, constants


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether constants are the same tensors or, made anew as literals are, have the same values."""
    return len(first) == len(second) and all(
        a is b or (kind(a) == kind(b) and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )


def capturing() -> bool:
    """Whether a function is being traced at this moment: what runs now sees stand-ins."""
    return get_proxy_mode() is not None


# A program is traced anew whenever it is captured, since its Python may have changed; what is compiled already,
# for the same graph, is found here. Every tensor of a graph is an argument, so its text says all there is.
_compiled: OrderedDict[tuple[Any, ...], tuple[Function, str]] = OrderedDict()


def _traced(function: Function, tensors: Sequence[Tensor]) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """A function's graph, with its constants as further arguments, and these."""
    used = _StandIns()

    def inside(*given: Tensor) -> Sequence[Tensor]:
        with used, _NoReading():
            return function(*given)

    apart = [t.detach() for t in tensors]  # one tensor given twice is two arguments all the same
    try:
        with _without_onednn():
            module = make_fx(inside, tracing_mode="fake", _allow_non_fake_inputs=True)(*apart)
    except (ValueError, CaptureError):
        raise
    except Exception as error:
        raise CaptureError(_cause(error)) from error
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        if any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in sizes):
            raise CaptureError(_READS.format(node.target))
    return module, _lifted(module, {id(inside): own for own, inside in used.found.values()})


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Without oneDNN, an LSTM is traced as what it is made of; oneDNN's own does not run in a graph."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


_READS = "it reads a number back from a tensor, or its shapes depend on values ({})"


class _StandIns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While tracing, stand-ins for tensors that a function uses without being given them.

    Left to itself, make_fx takes such a tensor for a constant: it reads numbers from it, which would never change
    again, and writes into it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # a literal, made while tracing
            args, kwargs = tree_map_only(Tensor, self.stand_in, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def stand_in(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.found:
            self.found[id(tensor)] = tensor, tensor.detach()
        return self.found[id(tensor)][1]


class _NoReading(TorchFunctionMode):
    """While tracing, refuses to read numbers out of real tensors without an operation that could be seen."""

    reading = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.reading and not isinstance(args[0], FakeTensor):
            raise CaptureError(_READS.format(f"Tensor.{func.__name__}"))
        return func(*args, **(kwargs or {}))


def first_line(error: Exception) -> str:
    """What an error says, in one line; its type's name, if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _cause(error: Exception) -> str:
    """One line on why a function could not be traced."""
    text = first_line(error)
    reads = ("_local_scalar_dense", "data-dependent", "DataDependent", "nonzero", "not guard", ".numpy()")
    if any(word in f"{type(error).__name__} {text}" for word in reads):
        return _READS.format(text)
    return f"{type(error).__name__}: {text}"


def _lifted(module: GraphModule, originals: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """Turn the constants of a graph into further arguments, in order: compiled in, they would never change."""
    graph = module.graph
    constants: list[Tensor] = []
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor):
            continue
        with graph.inserting_after(arguments[-1]) if arguments else graph.inserting_before(None):
            new = graph.placeholder(f"constant_{len(constants)}")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        arguments.append(new)
        constants.append(originals.get(id(value), value))
    module.recompile()
    return tuple(constants)


def kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph is made for."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@cache
def _probing() -> ThreadPoolExecutor:
    """Have inductor try the processor's vector instructions, all at once and while a program is traced.

    For each kind it compiles and loads a test, which takes seconds the first time; left to itself, one after the
    other.
    """
    with _quiet():
        from torch._inductor import cpu_vec_isa
        from torch.utils import cpp_extension  # noqa: F401 - the threads want it, and it tells of GPUs not found

    pool = ThreadPoolExecutor()
    has = cpu_vec_isa.x86_isa_checker()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        if all(flag in has for flag in str(isa).split()):
            pool.submit(copy_context().run, bool, isa)  # with inductor's settings as they are here
    return pool


def _compile(module: GraphModule, arguments: list[Tensor]) -> tuple[Function, str]:
    """The compiled form of a graph, run once on stand-ins' sizes only, and which library multiplies in it."""
    with _quiet():
        import torch._inductor
        from torch._inductor import config

        ordered = draws_in_order()
    options: dict[str, Any] = {"fallback_random": True}  # the same draws as without compilation
    if ordered is not None:
        options |= {"post_grad_custom_post_pass": ordered, "reorder_for_locality": False}
    products = DEFAULT
    try:
        if all(t.device.type == "cpu" for t in arguments):
            _probing().shutdown()  # which waits: what is timed next must be alone
            products = choose_products(module)
            fewer_logarithms(module)
            quicker_tanh(module)
            # Weights change at every step, and with them would their copies in another layout.
            options["layout_optimization"] = False
        with _quiet(), config.patch(options), torch.no_grad():
            apart: list[Any] = [t.detach() for t in arguments]
            run = torch._inductor.standalone_compile(module, apart, dynamic_shapes="from_example_inputs")
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise CompileError(f"the graph cannot be compiled ({cause})") from error
    return cast(Function, run), products


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what the compiler's own modules warn and log of: deprecations, tools not found."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class CudaGraph:
    """A function of CUDA tensors, replayed as one launch.

    Make it once the function has run a few times: what is set up at first use cannot be recorded. Making it
    records and runs nothing.

    Args:
        function: of tensors of fixed shapes, returning one tensor. It may write in place to others, which must
            stay where they are.
        tensors: arguments of the shapes to come.
    """

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() for t in tensors]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # another may be pinning memory
            self.output = function(*self.inputs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Copy the arguments in, replay, and copy the result out: the next replay writes over it."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output.clone()
