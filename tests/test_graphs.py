"""Graphs: what is seen anew at every run, what is written, what is drawn, and what cannot be captured."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch.nn.functional import dropout

from ppl_vae import graphs
from ppl_vae.graphs import CaptureError, CudaGraph, capture
from ppl_vae.rng import seeded

interpret = functools.partial(capture, compile=False)
X = torch.arange(12.0).reshape(4, 3) / 10


def same_draws(function, graph, *tensors):
    """What a function and its graph give on the same random numbers."""
    results = []
    for run in (function, graph):
        with seeded(0):
            results.append([t.detach() for t in run(*tensors)])
            results[-1].append(torch.rand(2))  # and they leave the stream at the same place
    return results


def agree(function, graph, *tensors):
    ours, theirs = same_draws(function, graph, *tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b, a)


# ---- what a function uses without being given it
def test_what_a_closed_over_tensor_holds_is_seen_at_every_run():
    scale, shift = torch.tensor(2.0), torch.zeros(3)
    graph = interpret(lambda x: (x * scale.exp() + shift + shift.sum(),), [X])
    assert len(graph.constants) == 2  # each once
    for value in (0.0, 1.0, -3.0):
        scale.fill_(value)
        shift.fill_(value)
        torch.testing.assert_close(graph(X)[0], X * torch.tensor(value).exp() + 4 * value)


def test_gradients_reach_closed_over_parameters_where_they_live():
    net = nn.Linear(3, 2)
    graph = interpret(lambda x: torch.autograd.grad(net(x).square().sum(), [*net.parameters()]), [X])
    for _ in range(2):
        agree(lambda x: torch.autograd.grad(net(x).square().sum(), [*net.parameters()]), graph, X)
        with torch.no_grad():
            net.weight.mul_(-0.5)
    assert not any(t.requires_grad for t in graph(X))


@pytest.mark.parametrize("compile", [False, pytest.param(True)])
def test_a_closed_over_net_keeps_its_statistics_as_it_does_itself(compile):
    def make():
        net = nn.BatchNorm1d(3)
        return net, lambda x: (net(x) + net(2 * x),)

    (net, function), (other, reference) = make(), make()
    before = {name: b.clone() for name, b in net.named_buffers()}
    graph = capture(function, [X], compile=compile)
    assert all(torch.equal(before[name], b) for name, b in net.named_buffers()), "capturing wrote something"
    for _ in range(3):
        torch.testing.assert_close(graph(X)[0], reference(X)[0].detach())
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], buffer)
    assert int(net.num_batches_tracked) == 6


def test_literals_are_what_they_were():
    graph = interpret(lambda x: (x * torch.tensor([2.0, 3.0, 4.0]) + torch.tensor(3.0).item(),), [X])
    for _ in range(2):
        torch.testing.assert_close(graph(X)[0], X * torch.tensor([2.0, 3.0, 4.0]) + 3)


def test_a_graph_without_arguments():
    held = torch.ones(2)
    graph = interpret(lambda: (held * 2,), [])
    held.fill_(4.0)
    assert graph()[0].tolist() == [8.0, 8.0]


def test_what_is_written_in_place_is_written():
    state, given = torch.zeros(3), torch.zeros(3)

    def function(x, given):
        state.add_(x.sum(0))
        given.copy_(state)
        return (given * 2,)

    graph = interpret(function, [X, given])
    assert float(state.sum()) == 0
    graph(X, given)
    graph(X, given)
    torch.testing.assert_close(state, 2 * X.sum(0))
    torch.testing.assert_close(given, state)


# ---- random numbers
def draws(x):
    torch.randn(3)  # not used: drawn all the same
    a, b, c = torch.randn(4, 3), torch.rand(4, 3), torch.randn(4, 3)
    kept, flips = dropout(x, 0.5), torch.bernoulli(torch.full((4, 3), 0.3))
    return c.exp(), kept * b, a + flips + torch.randint(0, 100, (4, 3))


@pytest.mark.parametrize("compile", [False, True])
def test_the_same_draws_in_the_same_order(compile):
    agree(draws, capture(draws, [X], compile=compile), X)


def test_capturing_draws_nothing():
    with seeded(3):
        interpret(draws, [X])
        drawn = torch.rand(2)
    with seeded(3):
        assert torch.equal(torch.rand(2), drawn)


# ---- what cannot be captured
HELD = torch.tensor(1.0)
READING = {
    "item": lambda x: (x * x.sum().item(),),
    "float": lambda x: (x * float(x.mean()),),
    "branch": lambda x: (x if x.sum() > 0 else -x,),
    "rows by a mask": lambda x: (x[x[:, 0] > 0.5].sum(),),
    "nonzero": lambda x: (x.nonzero().sum(),),
    "a held number": lambda x: (x * float(HELD),),
    "made of a held number": lambda x: (x * float(HELD.exp()),),
    "branch on a held number": lambda x: (x if HELD > 0 else -x,),
    "a held list": lambda x: (x * HELD.tolist(),),
    "a held array": lambda x: (x * float(HELD.numpy()),),
    "an array": lambda x: (x * float(x.sum().numpy()),),
}


@pytest.mark.parametrize("name", READING)
def test_reading_a_number_is_named(name):
    with pytest.raises(CaptureError, match="reads a number back from a tensor, or its shapes depend") as e:
        interpret(READING[name], [X])
    assert "\n" not in str(e.value)


def test_other_causes_are_named_and_errors_of_the_function_are_its_own():
    def raises(error):
        def function(x):
            raise error

        return function

    with pytest.raises(CaptureError, match=r"^KeyError: 'mine'$"):
        interpret(raises(KeyError("mine")), [X])
    with pytest.raises(CaptureError, match=r"^TypeError: first line$"):
        interpret(raises(TypeError("\n  first line\nsecond")), [X])
    with pytest.raises(ValueError, match="site 'z'"):
        interpret(raises(ValueError("site 'z'")), [X])
    with pytest.raises(KeyboardInterrupt):
        interpret(raises(KeyboardInterrupt()), [X])


@pytest.mark.parametrize("how", ["compiler missing", "inductor fails"])
def test_no_compiler_is_named(how, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("\nno such thing\nmore")

    with (
        monkeypatch.context() as patch,
        config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
    ):
        if how == "inductor fails":
            patch.setattr(torch._inductor, "standalone_compile", fails)
        with (
            pytest.raises(CaptureError, match="the graph cannot be compiled") as caught,
            warnings.catch_warnings(),
        ):
            capture(lambda x: (x.exp().sin() * 17.25 + x,), [X])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# ---- compiled
def test_a_compiled_graph_is_found_again_and_another_is_not(monkeypatch):
    compiled = []

    def compiling(module, arguments):
        compiled.append(module.code)
        return module, "somehow"

    monkeypatch.setattr(graphs, "_compile", compiling)
    monkeypatch.setattr(graphs, "_compiled", type(graphs._compiled)())

    def scaled(factor, held):
        return lambda x: (x * factor + held,)

    first, second = (capture(scaled(2.0, torch.full((3,), h)), [X]) for h in (1.0, 5.0))
    assert len(compiled) == 1  # what a function holds is an argument
    torch.testing.assert_close(first(X)[0], X * 2 + 1)
    torch.testing.assert_close(second(X)[0], X * 2 + 5)
    assert first.compiled
    assert first.products == "somehow"
    capture(scaled(3.0, torch.zeros(3)), [X])
    capture(scaled(2.0, torch.zeros(3)), [X[:2]])
    capture(scaled(2.0, torch.zeros(3)), [X.T.contiguous().T])
    capture(scaled(2.0, torch.zeros(3)), [X.double()])
    assert len(compiled) == 5
    for i in range(70):
        capture(scaled(float(i + 10), torch.zeros(3)), [X])
    assert len(graphs._compiled) == 64


def test_capturing_leaves_settings_and_loggers_alone():
    import logging

    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level, config.fallback_random, torch.is_grad_enabled()
    with pytest.raises(RuntimeError), graphs._quiet():
        raise RuntimeError
    assert (logger.level, config.fallback_random, torch.is_grad_enabled()) == before


# ---- on a GPU
@pytest.mark.gpu
def test_a_recorded_function_is_the_function():
    with seeded(0, "cuda"):
        weight, x = torch.randn(3, 3, device="cuda"), torch.randn(4, 3, device="cuda")
        total = torch.zeros((), device="cuda")

        def function(x):
            noise = torch.randn_like(x)
            total.add_(1)
            return ((x + noise) @ weight).sum()

        for _ in range(3):
            function(x)
        total.zero_()
        recorded = CudaGraph(function, [x])
        assert float(total) == 0  # recording runs nothing
        for i in range(3):
            results = []
            for run in (recorded, function):
                torch.cuda.manual_seed(i)
                results.append(run(x * i))
            torch.testing.assert_close(*results)
        assert float(total) == 6
        first, second = recorded(x), recorded(2 * x)
        assert first != second  # a result is not written over


@pytest.mark.parametrize("compile", [False, True])
def test_one_tensor_given_twice_is_two_arguments(compile):
    same = torch.tensor([1.0, 2.0])
    graph = capture(lambda a, b: [a - 2 * b], [same, same], compile=compile)
    torch.testing.assert_close(
        graph(torch.tensor([1.0, 1.0]), torch.tensor([5.0, 6.0]))[0], torch.tensor([-9.0, -11.0])
    )


def test_empty_products_are_compiled():
    graph = capture(lambda a, b: [a @ b + 1], [torch.zeros(4, 0), torch.zeros(0, 5)])
    assert torch.equal(graph(torch.zeros(4, 0), torch.zeros(0, 5))[0], torch.ones(4, 5))
