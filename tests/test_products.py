"""Matrix products: oneDNN's are PyTorch's, the faster is chosen and remembered, and bfloat16 rounds them alone."""

import functools
import itertools
import json

import pytest
import torch
from programs import case
from small import fit, pixels, vae
from torch import nn

import ppl_vae as pv
from ppl_vae import graphs, products
from ppl_vae.graphs import capture
from ppl_vae.products import Bfloat16Products, choose_products
from ppl_vae.rng import seeded
from ppl_vae.steps import Stepper
from ppl_vae.updates import Update

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the operator
LAYOUTS = {
    "rows": lambda n, m: draw(n, m),
    "columns": lambda n, m: draw(m, n).t(),
    "every other": lambda n, m: draw(2 * n, 2 * m)[::2, ::2],
    "part": lambda n, m: draw(n + 3, m + 5)[3:, 2:-3],
    "one row repeated": lambda n, m: draw(1, m).expand(n, m),
    "one column repeated": lambda n, m: draw(n, 1).expand(n, m),
    "one number": lambda n, m: draw(1).expand(n, m),
}
SIZES = [(5, 7, 3), (1, 7, 3), (5, 1, 3), (5, 7, 1), (1, 1, 1)]


@needs_onednn
@pytest.mark.parametrize(("first", "second"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_onednn_multiplies_whatever_the_memory_order(first, second):
    multiply = products._onednn()
    for n, m, k in SIZES:
        a, b = LAYOUTS[first](n, m), LAYOUTS[second](m, k)
        result = multiply(a, b, None)
        torch.testing.assert_close(result, torch.mm(a, b))
        assert result.stride() == torch.mm(a, b).stride()
        for bias in (draw(k), draw(1).expand(k), draw(2 * k)[::2]):
            torch.testing.assert_close(multiply(a, b, bias), torch.addmm(bias, a, b))


@needs_onednn
def test_the_operator_has_a_shape_before_it_has_numbers():
    a, b = draw(5, 7).to("meta"), draw(7, 3).to("meta")
    assert products._onednn()(a, b, None).shape == (5, 3)


# ---- the choice
def layers(x, w, v, c, t):
    return (
        x @ w,
        torch.addmm(c, x, v),
        x.double() @ w.double(),
        torch.addmm(c, x, v, beta=2.0),
        torch.addmm(t, x, w),
    )


ARGUMENTS = (draw(5, 7), draw(7, 3), draw(7, 4), draw(4), draw(5, 3))


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """Measurements in a folder of their own, with an answer instead of a clock; which products were measured."""
    asked = []

    def wins(a, b, bias):
        asked.append((tuple(a.shape), tuple(b.shape), bias is not None))
        return bias is None

    monkeypatch.setattr(products, "_folder", lambda: tmp_path / "made" / "ppl_vae")
    monkeypatch.setattr(products, "_onednn_wins", wins)
    return asked, tmp_path / "made" / "ppl_vae" / "products.json"


def operators(module):
    return [str(n.target) for n in module.graph.nodes if "mm" in str(n.target) or "product" in str(n.target)]


@needs_onednn
def test_what_was_measured_faster_is_rewritten_and_nothing_else(chosen):
    asked, path = chosen
    module = graphs._traced(layers, ARGUMENTS)[0]
    assert choose_products(module) == "oneDNN for 1 of 2 matrix products"
    assert asked == [((5, 7), (7, 3), False), ((5, 7), (7, 4), True)]
    mm, addmm = "aten.mm.default", "aten.addmm.default"
    assert operators(module) == ["ppl_vae.onednn_product.default", addmm, mm, addmm, addmm]
    for ours, theirs in zip(module(*ARGUMENTS), layers(*ARGUMENTS), strict=True):
        torch.testing.assert_close(ours, theirs)
    # A later run, another process say, finds the answers, and the same graph comes of them.
    again = graphs._traced(layers, ARGUMENTS)[0]
    choose_products(again)
    assert len(asked) == 2
    assert again.code == module.code
    assert sorted(json.loads(path.read_text()).values()) == [False, True]


@needs_onednn
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"a"', "\udcff"])
def test_a_damaged_file_is_measured_anew(chosen, text):
    asked, path = chosen
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert choose_products(graphs._traced(layers, ARGUMENTS)[0]) == "oneDNN for 1 of 2 matrix products"
    assert len(asked) == 2
    assert len(json.loads(path.read_text())) == 2


@needs_onednn
def test_nowhere_to_write_is_no_error(chosen):
    asked, path = chosen
    path.parent.parent.write_text("a file where the folder should be")
    for _ in range(2):
        choose_products(graphs._traced(layers, ARGUMENTS)[0])
    assert len(asked) == 4


@needs_onednn
def test_an_answer_holds_for_strides_threads_and_processor(chosen, monkeypatch):
    asked, _ = chosen
    product = lambda a, b: (a @ b,)  # noqa: E731
    turned = draw(7, 5).t()
    for a in (draw(5, 7), turned, draw(5, 7), turned):
        choose_products(graphs._traced(product, (a, draw(7, 3)))[0])
    assert len(asked) == 2
    monkeypatch.setattr(products, "_processor", lambda: "another")
    choose_products(graphs._traced(product, (draw(5, 7), draw(7, 3)))[0])
    assert len(asked) == 3


def test_without_products_or_without_onednn_nothing_is_measured(chosen, monkeypatch):
    asked, path = chosen
    alone, _ = graphs._traced(lambda x: (x.exp(),), [draw(3)])
    assert choose_products(alone) == "PyTorch's default matrix products"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_products(graphs._traced(layers, ARGUMENTS)[0]) == "PyTorch's default matrix products"
    assert asked == []
    assert not path.exists()


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_measuring_times_both_whatever_the_memory_order(layout, monkeypatch):
    monkeypatch.setattr(products, "SECONDS", 0.0)
    tensors = LAYOUTS[layout](5, 7), draw(7, 3), draw(3)
    module, _ = graphs._traced(lambda a, b, c: (torch.addmm(c, a, b),), tensors)
    (node,) = [n for n in module.graph.nodes if "addmm" in str(n.target)]
    a, b, c = (products._like(n.meta["val"]) for n in products._operands(node))
    assert a.stride() == LAYOUTS[layout](5, 7).stride()
    assert products._onednn_wins(a, b, c) in (True, False)


@needs_onednn
@pytest.mark.parametrize(("ours", "expected"), [(1.0, False), (0.99, False), (0.9, True), (2.0, False)])
def test_a_tie_keeps_pytorchs_own(monkeypatch, ours, expected):
    clock = [0.0]

    def taking(seconds):
        def call(a, b, bias):
            clock[0] += seconds

        return call

    monkeypatch.setattr(products, "_default", taking(1.0))
    monkeypatch.setattr(products, "_onednn", lambda: taking(ours))
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock[0])
    assert products._onednn_wins(draw(2, 2), draw(2, 2), None) == expected


@needs_onednn
def test_a_compiled_graph_with_onednn_products(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "_folder", lambda: tmp_path)
    monkeypatch.setattr(products, "_onednn_wins", lambda *_: True)

    def function(x, w, c):
        w = w.detach().requires_grad_()
        hidden = torch.addmm(c, x, w).tanh()
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [w])]

    arguments = (draw(6, 7), draw(7, 3), draw(3))
    graph = capture(function, arguments)
    assert graph.products == "oneDNN for 2 of 2 matrix products"
    for ours, theirs in zip(graph(*arguments), function(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


# ---- bfloat16
def outputs(function, x, w):
    """Values and gradients of products of every kind."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    return [
        y.detach(),
        *torch.autograd.grad((y * torch.linspace(-1, 1.3, y.numel()).to(y).view_as(y)).sum(), [x, w]),
    ]


KINDS = {
    "mm": (lambda x, w: x @ w, (6, 7), (7, 5)),
    "linear": (lambda x, w: nn.functional.linear(x, w, torch.ones(5)), (6, 7), (5, 7)),
    "linear, particles": (lambda x, w: nn.functional.linear(x, w), (3, 6, 7), (5, 7)),
    "bmm": (lambda x, w: x @ w, (3, 6, 7), (3, 7, 5)),
    "einsum": (lambda x, w: torch.einsum("kbi,io->kbo", x, w), (3, 6, 7), (7, 5)),
    "convolution": (lambda x, w: nn.functional.conv2d(x, w, torch.ones(4)), (2, 3, 6, 6), (4, 3, 3, 3)),
    "transposed": (lambda x, w: nn.functional.conv_transpose2d(x, w), (2, 3, 4, 4), (3, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("captured", [False, True])
def test_products_are_rounded_forward_and_backward(kind, captured):
    function, *shapes = KINDS[kind]
    x, w = (draw(*s, seed=i) for i, s in enumerate(shapes))

    def rounded(x, w):
        with Bfloat16Products():
            return outputs(function, x, w)

    run = capture(rounded, (x, w), compile=False) if captured else rounded
    for low, exact in zip(run(x, w), outputs(function, x, w), strict=True):
        assert low.dtype == torch.float32
        error = float((low - exact).norm() / exact.norm())
        assert 1e-4 < error < 2**-7, "products are rounded, to eight bits"
    if captured:
        assert all(torch.equal(a, b) for a, b in zip(run(x, w), rounded(x, w), strict=True))


def test_what_is_no_product_of_float32_is_not_rounded():
    x = 1 + torch.linspace(0, 1e-3, 1000)
    with Bfloat16Products():
        for function in (torch.sum, torch.exp, lambda t: t.logsumexp(0), lambda t: t * t, torch.cumsum):
            again = functools.partial(function, dim=0) if function is torch.cumsum else function
            inside = again(x)
            with torch.utils._python_dispatch._disable_current_modes():
                assert torch.equal(inside, again(x))
        double = draw(4, 4).double()
        assert (double @ double).dtype == torch.float64
    assert torch.equal(double @ double, torch.mm(double, double))
    assert double.equal(double)


@pytest.mark.parametrize("name", ["one level", "two levels", "nested"])
def test_the_bound_in_bfloat16_is_near(interpreted, name):
    """Densities and their sums stay float32: the value moves by thousandths, and captured as it does eagerly."""
    c = case(name)
    values = {}
    for precision, how in itertools.product(("float32", "bf16"), ("off", "require")):
        optimizer = torch.optim.SGD(c.pair.parameters(), lr=0.1)
        update = Update("objective", c.pair, pv.ELBO(3), optimizer, precision=precision)
        with seeded(0):
            values[precision, how] = Stepper(update, how).gradients(*c.batch)
    for low, same, exact in zip(
        values["bf16", "off"], values["bf16", "require"], values["float32", "off"], strict=True
    ):
        assert low.dtype == same.dtype == torch.float32
        torch.testing.assert_close(same, low, rtol=1e-5, atol=1e-5)
        assert float((low - exact).norm()) < 0.05 * float(exact.norm()) + 1e-3
    assert values["bf16", "off"][0] != values["float32", "off"][0]


def test_training_in_bfloat16():
    x = pixels(64)
    options = {"epochs": 30, "batch_size": 16, "optimizer": functools.partial(torch.optim.Adam, lr=1e-2)}
    exact, low = (fit(vae(), x, x, precision=p, **options) for p in ("float32", "bf16"))
    values = [run.history[-1]["valid"] for run in (exact, low)]
    gain = values[0] - exact.history[0]["valid"]
    assert gain > 2
    assert values[0] != values[1]
    assert abs(values[1] - values[0]) < 0.25 * gain
    assert all(p.dtype == torch.float32 for p in low.pair.parameters())


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bf16', got 'half'"):
        fit(vae(), pixels(16), precision="half")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_products_on_a_gpu_are_rounded(kind):
    function, *shapes = KINDS[kind]
    if kind in ("linear", "convolution"):
        pytest.skip("its bias lies on the CPU")
    x, w = (draw(*s, seed=i).cuda() for i, s in enumerate(shapes))
    with Bfloat16Products():
        low = outputs(function, x, w)
    for a, b in zip(low, outputs(function, x, w), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 2**-7
