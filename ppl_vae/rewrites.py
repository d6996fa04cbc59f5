"""Rewrites of a captured graph: the same sums at less cost."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["fewer_logarithms"]

aten = torch.ops.aten

MOST = 32  # factors in one logarithm, each between 1 and 2: their product stays far below float32's largest
LANES = 16  # float32 numbers in the widest vector register


def fewer_logarithms(graph: GraphModule) -> int:
    """Rewrite sums over pixels of Bernoulli log-densities, so that one logarithm serves many pixels.

    For logits l and pixels x, log p = (x - 1) max(l, 0) + x min(l, 0) - log(1 + exp(-|l|)), and

        Σ_i log(1 + exp(-|l_i|)) = Σ_g log Π_{i in g} (1 + exp(-|l_i|)).

    Logarithms are what such a sum spends most of its time on; it takes well under half of it this way, and its
    rounding errors are no larger.

    Args:
        graph: a flat graph with ``meta["val"]`` at its nodes, as make_fx leaves them; changed in place.

    Returns:
        How many sums were rewritten.
    """
    found = [(node, terms) for node in graph.graph.nodes if (terms := _summed(node)) is not None]
    for node, (logits, pixels, size, group) in found:
        with graph.graph.inserting_before(node):
            new = _grouped(graph, logits, pixels, size, group)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    if found:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return len(found)


def _summed(node: Node) -> tuple[Node, Node, list[int], int] | None:
    """Logits and pixels of a sum of Bernoulli log-densities, the shape it is taken in, and a group's length."""
    if node.target is not aten.sum.dim_IntList or node.kwargs or node.args[1:] != ([-1],):
        return None
    inner: Any = node.args[0]
    size = list(inner.meta["val"].shape)
    if inner.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        inner = inner.args[0]
    if inner.target is not aten.neg.default:
        return None
    density: Any = inner.args[0]
    if density.target is not aten.binary_cross_entropy_with_logits.default:
        return None
    logits, pixels, *rest = density.args
    group = _group(size[-1])
    plain = [*rest, None, None, 0][:3] == [None, None, 0] and not density.kwargs
    kinds = {logits.meta["val"].dtype, pixels.meta["val"].dtype}
    same = logits.meta["val"].shape == pixels.meta["val"].shape == density.meta["val"].shape
    if not plain or not same or kinds != {torch.float32} or group is None:
        return None
    return logits, pixels, size, group


def _group(length: int) -> int | None:
    """How many factors go into one logarithm: a divisor that leaves whole registers; None where there is none."""
    fitting = [g for g in range(MOST, 3, -1) if length % g == 0 and length // g % LANES == 0]
    return min(fitting, key=lambda g: abs(g - 8)) if fitting else None


def _grouped(graph: GraphModule, logits: Node, pixels: Node, size: list[int], group: int) -> Node:
    """The nodes of the sum, group by group."""
    call = graph.graph.call_function
    logits, pixels = (call(aten.reshape.default, (n, size)) for n in (logits, pixels))
    above, below = call(aten.relu.default, (logits,)), call(aten.clamp.default, (logits, None, 0))
    above = call(aten.mul.Tensor, (call(aten.sub.Tensor, (pixels, 1)), above))
    linear = call(aten.add.Tensor, (above, call(aten.mul.Tensor, (pixels, below))))
    small = call(aten.exp.default, (call(aten.neg.default, (call(aten.abs.default, (logits,)),)),))
    factors = call(aten.add.Tensor, (small, 1.0))
    grouped = call(aten.reshape.default, (factors, [*size[:-1], group, size[-1] // group]))
    products = call(aten.prod.dim_int, (grouped, -2))
    logarithms = call(aten.sum.dim_IntList, (call(aten.log.default, (products,)), [-1]))
    return call(aten.sub.Tensor, (call(aten.sum.dim_IntList, (linear, [-1])), logarithms))
