"""Rewrites of graphs: the same numbers from fewer operations, and nothing rewritten that is something else."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import binary_cross_entropy_with_logits

from ppl_vae.graphs import capture
from ppl_vae.rewrites import fewer_logarithms, quicker_tanh
from ppl_vae.rng import seeded

SHAPES = [(2, 3, 784), (4, 3072), (1, 5, 3, 32, 32), (7, 64), (2, 128)]


def log_prob(logits, x):
    """As a program has it: pixels broadcast over particles, the event summed."""
    event = 3 if logits.dim() > 3 else 1
    return Independent(Bernoulli(logits=logits, validate_args=False), event, validate_args=False).log_prob(x)


def inputs(shape, scale=3.0):
    with seeded(0):
        return scale * torch.randn(shape), torch.rand(shape).round()


def rewritten(function, *tensors):
    """The rewritten graph, and how many sums it has in another form."""
    graph = make_fx(function, tracing_mode="fake")(*tensors)
    count = fewer_logarithms(graph)
    assert any("prod" in str(node.target) for node in graph.graph.nodes) == (count > 0)
    return graph, count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_sums_of_densities_are_the_same(shape, scale):
    logits, x = inputs(shape, scale)
    graph, count = rewritten(log_prob, logits, x)
    assert count == 1
    exact = log_prob(logits.double(), x.double())
    theirs, ours = ((v.double() - exact).abs().max() for v in (log_prob(logits, x), graph(logits, x)))
    assert ours <= 2 * theirs + 1e-6 * exact.abs().max()  # no less exact than what it replaces


def test_edges_are_the_same():
    logits = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 120.0, -120.0, 1e4]).repeat(16).expand(3, 128)
    for x in (torch.zeros(3, 128), torch.ones(3, 128), torch.full((3, 128), 0.3)):
        graph, count = rewritten(log_prob, logits.contiguous(), x)
        assert count == 1
        torch.testing.assert_close(graph(logits, x), log_prob(logits, x))
    graph, _ = rewritten(log_prob, torch.zeros(2, 64), torch.zeros(2, 64))
    endless = torch.zeros(2, 64).index_fill(1, torch.tensor([5]), torch.inf)
    assert torch.equal(graph(endless, torch.zeros(2, 64)), torch.full((2,), -torch.inf))  # impossible, not unknown
    assert torch.equal(graph(-endless, torch.ones(2, 64)), torch.full((2,), -torch.inf))
    broken = torch.zeros(2, 64).index_fill(1, torch.tensor([5]), torch.nan)
    assert graph(broken, torch.zeros(2, 64)).isnan().all()


def test_pixels_may_be_broadcast_over_particles():
    logits, _ = inputs((5, 4, 112))
    with seeded(1):
        x = torch.rand(4, 112)
    graph, count = rewritten(log_prob, logits, x)
    assert count == 1
    torch.testing.assert_close(graph(logits, x), log_prob(logits, x))


def test_gradients_are_as_they_were():
    def both(logits, x):
        logits = logits.detach().requires_grad_()
        value = log_prob(logits, x)
        return value, torch.autograd.grad(value.sum(), logits)[0]

    logits, x = inputs((3, 4, 96))
    graph, count = rewritten(both, logits, x)
    assert count == 1
    for ours, theirs in zip(graph(logits, x), both(logits, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "function",
    [
        lambda logits, x: log_prob(logits.double(), x.double()),
        lambda logits, x: log_prob(logits[:, :50], x[:, :50]),  # no divisor leaves whole registers
        lambda logits, x: -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(0),
        lambda logits, x: -binary_cross_entropy_with_logits(logits, x, reduction="sum"),
        lambda logits, x: (-binary_cross_entropy_with_logits(logits, x, x, reduction="none")).sum(-1),
        lambda logits, x: (-binary_cross_entropy_with_logits(logits, x, pos_weight=x, reduction="none")).sum(-1),
        lambda logits, x: (-logits).sum(-1),
        lambda logits, x: (-binary_cross_entropy_with_logits(logits, x, reduction="none")).sum(-1, keepdim=True),
    ],
)
def test_anything_else_stays(function):
    logits, x = inputs((3, 64))
    graph, count = rewritten(function, logits, x)
    assert count == 0
    assert torch.equal(graph(logits, x), function(logits, x))


def test_densities_that_are_used_otherwise_too_are_kept():
    def both(logits, x):
        density = -binary_cross_entropy_with_logits(logits, x, reduction="none")
        return density.sum(-1), density.exp()

    logits, x = inputs((3, 64))
    graph, count = rewritten(both, logits, x)
    assert count == 1
    for ours, theirs in zip(graph(logits, x), both(logits, x), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- tanh
def units(values):
    """Errors of tanh at float32 numbers, in units in the last place, by its graph compiled."""
    ours, exact = capture(lambda x: [x.tanh()], [values])(values)[0], values.double().tanh()
    nearest = exact.abs().float()
    return (ours.double() - exact).abs() / (torch.nextafter(nearest, torch.tensor(2.0)) - nearest).double()


def test_tanh_is_as_exact_as_the_librarys():
    grid = torch.cat([torch.linspace(-10, 10, 1_000_001), torch.logspace(-37, 2, 500_001)])
    edges = torch.tensor([0.625]) + torch.arange(-200, 200) * 2.0**-24
    errors = units(torch.cat([grid, edges, -edges]))
    assert float(errors.max()) < 1.5
    assert float(errors.mean()) < 0.25  # rounding alone


def test_tanh_at_its_edges():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-44, -1e-44, 88.0, -88.0, 200.0, 3e38, torch.nan])
    graph = make_fx(torch.tanh, tracing_mode="fake")(x)
    assert quicker_tanh(graph) == 1
    ours, theirs = graph(x), x.tanh()
    assert torch.equal(ours[:-1], theirs[:-1])
    assert torch.equal(ours.signbit()[:-1], theirs.signbit()[:-1])
    assert bool(ours[-1].isnan())
    assert bool((graph(torch.randn(1000) * 5).abs() <= 1).all())


def test_other_types_keep_their_tanh():
    for kind in (torch.float64, torch.bfloat16):
        assert quicker_tanh(make_fx(torch.tanh, tracing_mode="fake")(torch.ones(3, dtype=kind))) == 0
