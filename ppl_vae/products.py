"""Matrix products of a captured graph: which library computes each of them, and in which precision.

PyTorch multiplies float32 matrices on the CPU with one library (mostly MKL) though it carries another, oneDNN.
Which is faster depends on the processor, on shapes and on strides, by up to a factor of two: so both are timed
once for every product, and the answer is kept on disk, where later runs find it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.files import write_whole

__all__ = ["DEFAULT", "Bfloat16Products", "Precision", "choose_products", "products_in"]

aten = torch.ops.aten
DEFAULT = "PyTorch's default matrix products"

Precision = Literal["float32", "bf16"]

MARGIN = 0.97  # oneDNN must take less than this share of the other's time: a tie keeps PyTorch's own choice
SECONDS = 0.02  # for timing each library on each product


class Bfloat16Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, matrix products and convolutions of float32 tensors round their operands and results to bfloat16.

    Everything else stays float32: log-densities and their sums, parameters, and the optimizer's state. (Autocast
    would hand bfloat16 on to whatever comes next, and a log-likelihood of -90 nats rounded to 8 bits is off by a
    quarter of a nat.) It acts below autograd, so backward products are covered as well.
    """

    rounded = frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.baddbmm.default,
            aten.convolution.default,
            aten.convolution_backward.default,
        }
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Round the operands of a product, and give its result back as float32."""
        if func not in self.rounded or not any(_single(a) for a in args):
            return func(*args, **(kwargs or {}))
        if func in (aten.addmm.default, aten.baddbmm.default) and not kwargs:  # what is added is not rounded
            product = aten.mm.default if func is aten.addmm.default else aten.bmm.default
            return args[0] + self.__torch_dispatch__(product, types, args[1:])
        low = [a.to(torch.bfloat16) if _single(a) else a for a in args]
        result = func(*low, **(kwargs or {}))
        if isinstance(result, tuple):
            return tuple(r if r is None else r.to(torch.float32) for r in result)
        return result.to(torch.float32)


def products_in(precision: Precision) -> AbstractContextManager[object]:
    """A precision, as a context in which to compute values and gradients.

    Raises:
        ValueError: an unknown one.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision must be 'float32' or 'bf16', got {precision!r}")
    return Bfloat16Products() if precision == "bf16" else nullcontext()


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def choose_products(graph: GraphModule) -> str:
    """Let oneDNN compute those float32 products of a CPU graph that it computes faster; say how many.

    Args:
        graph: a flat graph with ``meta["val"]`` at its nodes, as make_fx leaves them; changed in place.

    Returns:
        A line such as "oneDNN for 5 of 11 matrix products".
    """
    products = [n for n in graph.graph.nodes if n.op == "call_function" and _operands(n) is not None]
    if not products or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return DEFAULT
    known = _Measured()
    chosen = [n for n in products if known.faster(n)]
    known.save()
    for node in chosen:
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(_onednn(), _operands(node))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()
    return f"oneDNN for {len(chosen)} of {len(products)} matrix products"


def _operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """The operands a, b and bias of a node that computes a @ b + bias in float32 on the CPU."""
    args: tuple[Any, ...] = node.args
    found: tuple[Node, Node, Node | None]
    if node.target is aten.mm.default:
        found = (args[0], args[1], None)
    elif node.target is aten.addmm.default and not node.kwargs:
        found = (args[1], args[2], args[0])
    else:
        return None
    values = [n.meta["val"] for n in found if n is not None]
    if any(v.dtype != torch.float32 or v.device.type != "cpu" or not v.numel() for v in values):
        return None
    return found if found[2] is None or values[2].dim() == 1 else None


@cache
def _onednn() -> Callable[..., Tensor]:
    """The operator a @ b + bias by oneDNN, made known to torch when first needed."""
    library = torch.library.Library("ppl_vae", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("onednn_product(Tensor a, Tensor b, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
    linear = torch.ops.mkldnn._linear_pointwise.default

    def multiply(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        flat = bias if bias is None else bias.contiguous()  # its strides are not looked at
        result: Tensor = linear(a, b.t(), flat, "none", [], "")
        return result

    def shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1])

    library.impl("onednn_product", multiply, "CPU")  # type: ignore[no-untyped-call]
    library.impl("onednn_product", shape, "Meta")  # type: ignore[no-untyped-call]
    operator: Callable[..., Tensor] = torch.ops.ppl_vae.onednn_product.default
    operator.__dict__["_ppl_vae_library"] = library
    return operator


class _Measured:
    """Which products oneDNN computes faster here, measured once for each kind of product and kept in a file."""

    def __init__(self) -> None:
        self.path = _folder() / "products.json"
        self.answers: dict[str, bool] = _read(self.path)
        self.new = False

    def faster(self, node: Node) -> bool:
        """Whether oneDNN takes less time than PyTorch's default for a product."""
        operands = [None if n is None else n.meta["val"] for n in _operands(node) or ()]
        key = f"{_machine()} {[None if v is None else (tuple(v.shape), v.stride()) for v in operands]}"
        if key not in self.answers:
            real = [None if v is None else _like(v) for v in operands]
            self.answers[key], self.new = _onednn_wins(real[0], real[1], real[2]), True  # type: ignore[arg-type]
        return self.answers[key]

    def save(self) -> None:
        """Keep the answers for later runs, which then make the same choices, and so the same numbers."""
        if self.new:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self.answers | _read(self.path), indent=0)
                write_whole(self.path, lambda file: file.write_text(text))
            except (OSError, ValueError):  # nowhere to write: every process measures anew
                return


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "ppl_vae"


def _read(path: Path) -> dict[str, bool]:
    """The answers in a file; none where there is no such file or it is damaged: it is only a cache."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): bool(v) for k, v in found.items()} if isinstance(found, dict) else {}


@cache
def _processor() -> str:
    names = [line for line in _text("/proc/cpuinfo").splitlines() if line.startswith(("model", "cpu family"))]
    return " ".join(dict.fromkeys(line.split(":", 1)[-1].strip() for line in names))


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _machine() -> str:
    """What an answer holds for: processor, torch, threads, and how exact products are asked to be."""
    exact = f"{torch.get_float32_matmul_precision()} {torch.are_deterministic_algorithms_enabled()}"
    return f"{_processor()} torch {torch.__version__} threads {torch.get_num_threads()} {exact}"


def _like(value: Tensor) -> Tensor:
    """A real tensor with the size and strides of a fake one; of ones, for denormals would be slow."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)
    return made.fill_(1.0)


def _default(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _onednn_wins(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Time both libraries in alternation, so that a busy moment hits them alike.

    OneDNN wins if its best time does, and four of five rounds: one lucky round on a busy machine must not
    decide, because the answer is kept.
    """
    calls: list[Callable[[], Tensor]] = [partial(f, a, b, bias) for f in (_default, _onednn())]
    for call in calls:
        call()
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + 2 * SECONDS
    while len(times[0]) < 10 or (time.perf_counter() < end and len(times[0]) < 50):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    won = [ours < default for default, ours in zip(*times, strict=True)]
    return min(times[1]) < MARGIN * min(times[0]) and sum(won) > 0.8 * len(won)
