"""Sigmoid belief networks: exact by summing over all codes, and trained by estimators that use the score."""

import itertools
import re

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch.distributions import Bernoulli
from trials import answers, captured_as_written, trains_under_fit, trains_under_svi, unbiased

import ppl_vae as pv
from ppl_vae.belief import sigmoid_belief_network
from ppl_vae.layout import inspect
from ppl_vae.objectives import as_objective
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.scores import NVIL, leave_one_out, vimco
from ppl_vae.traces import log_terms

SIZES = (4, 3, 2)
X = (torch.rand(6, SIZES[0], generator=torch.Generator().manual_seed(0)) > 0.4).float()
HIDDEN = {"linear": (), "non-linear": (5, 6)}


def network(kind="linear", sizes=SIZES):
    with seeded(0):
        program = sigmoid_belief_network(*sizes, hidden=HIDDEN[kind])
        with torch.no_grad():
            program.priors[-1].net.value.normal_()
    return program


def codes(width):
    """All binary vectors, (2**width, width)."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=width)))


def law(net, value):
    return Bernoulli(logits=net(value))


def log_evidence(program, x):
    """Log p(x), (B,), summed over all codes of both layers."""
    z1, z2 = codes(SIZES[1]), codes(SIZES[2])
    top = Bernoulli(logits=program.priors[-1].net.value).log_prob(z2).sum(-1)  # (4,)
    low = law(program.priors[0].net, z2).log_prob(z1[:, None]).sum(-1)  # (8, 4)
    data = law(program.likelihood.net, z1).log_prob(x[:, None]).sum(-1)  # (B, 8)
    return (data[:, :, None] + low + top).flatten(1).logsumexp(1)


def exact_elbo(program, x):
    """Σ_z q(z | x) log p(x, z) / q(z | x), (B,), summed over all codes of both layers."""
    z1, z2 = codes(SIZES[1]), codes(SIZES[2])
    top = Bernoulli(logits=program.priors[-1].net.value).log_prob(z2).sum(-1)
    low = law(program.priors[0].net, z2).log_prob(z1[:, None]).sum(-1)
    data = law(program.likelihood.net, z1).log_prob(x[:, None]).sum(-1)
    q1 = law(program.posteriors[0].net, x[:, None]).log_prob(z1).sum(-1)  # (B, 8)
    q2 = law(program.posteriors[1].net, z1[:, None]).log_prob(z2).sum(-1)  # (8, 4)
    log_q = q1[:, :, None] + q2
    return (log_q.exp() * (data[:, :, None] + low + top - log_q)).flatten(1).sum(1)


@pytest.mark.parametrize("kind", HIDDEN)
def test_weights_are_unbiased(kind):
    program = network(kind)
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(program), X, particles=20_000).weight()
    unbiased(weight, log_evidence(program, X))
    error = weight.std(0) / len(weight) ** 0.5
    assert bool(((weight.mean(0) - exact_elbo(program, X)).abs() < 5 * error).all())


def test_the_networks_probabilities_sum_to_one():
    assert float(log_evidence(network(), codes(SIZES[0])).exp().sum().detach()) == pytest.approx(1, rel=1e-5)


def test_samples_follow_the_evidence():
    program = network()
    drawn = pv.sample(program, 20_000)
    each = codes(SIZES[0])
    share = (drawn[:, None] == each).all(-1).double().mean(0)
    expected = log_evidence(program, each).exp().detach().double()
    assert bool(((share - expected).abs() < 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all())


SCORES = {
    "TraceGraph_ELBO": lambda k: TraceGraph_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
    "leave one out": lambda k: pv.ELBO(k, estimator=leave_one_out),
    "vimco": lambda k: pv.ELBO(k, estimator=vimco),
}


@pytest.mark.parametrize("goal", SCORES)
def test_the_score_gradient_is_that_of_the_exact_bound(goal):
    program = network()
    parameters = list(program.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact_elbo(program, X).sum(), parameters)])
    pair, objective, drawn = as_pair(program), as_objective(SCORES[goal](200)), []
    inspect(pair, (X,))
    with seeded(0):
        for _ in range(60):
            found = torch.autograd.grad(objective(pair, X).sum(), parameters)
            drawn.append(torch.cat([g.flatten() for g in found]))
    error = torch.stack(drawn).std(0) / len(drawn) ** 0.5
    assert bool(((torch.stack(drawn).mean(0) - exact).abs() < 5 * error + 1e-4).all())


GOALS = {
    "vimco": lambda: pv.IWAE(5, estimator=vimco),
    "nvil": lambda: pv.ELBO(2, estimator=NVIL(pv.MLP(SIZES[0], 3, 1))),
}


@pytest.mark.parametrize("goal", GOALS)
def test_it_trains_by_scores_captured_and_as_written(interpreted, goal):
    trains_under_fit(network(), GOALS[goal](), X)
    trains_under_fit(network(), GOALS[goal](), X, compile="require")
    assert interpreted


def test_captured_and_as_written(interpreted):
    captured_as_written(network("non-linear"), GOALS["vimco"](), X)


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO])
def test_it_trains_and_answers(kind, loss):
    program = network(kind)
    trains_under_svi(program, loss(), X)
    answers(trains_under_fit(program, loss(), X), X)


@pytest.mark.parametrize("sizes", [(4, 3), (5, 4, 3, 2)])
def test_any_number_of_layers(sizes):
    x = torch.ones(6, sizes[0])
    terms = log_terms(as_pair(network(sizes=sizes)), x, particles=5)
    assert [z.shape[-1] for z in terms.samples.values()] == list(sizes[1:])
    assert all(bool(((z == 0) | (z == 1)).all()) for z in terms.samples.values())
    assert terms.score_only == tuple(terms.samples)


def test_pathwise_gradients_are_refused():
    with pytest.raises(ValueError, match="site 'z1': its distribution has no reparameterised sampler"):
        trains_under_fit(network(), pv.ELBO(), X)


def test_deterministic_layers_stand_between():
    linear, curved = network("linear"), network("non-linear")
    assert [m.out_features for m in linear.likelihood.modules() if isinstance(m, torch.nn.Linear)] == [4]
    assert [m.out_features for m in curved.likelihood.modules() if isinstance(m, torch.nn.Linear)] == [5, 6, 4]
    assert [m.out_features for m in curved.posteriors[1].modules() if isinstance(m, torch.nn.Linear)] == [5, 6, 2]


def test_grey_pixels_are_refused():
    with pytest.raises(ValueError, match="site 'x': Bernoulli takes"):
        trains_under_fit(network(), TraceGraph_ELBO(), X / 2)


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0), (0, 3), (4, -2, 3)])
def test_sizes_are_checked(sizes):
    message = f"sizes: expected those of the data and of one or more layers .* got {re.escape(str(sizes))}"
    with pytest.raises(ValueError, match=message):
        sigmoid_belief_network(*sizes)


def test_hidden_layers_are_checked():
    with pytest.raises(
        ValueError, match=r"hidden must be positive widths, or none for a linear network; got \(5, 0\)"
    ):
        sigmoid_belief_network(4, 3, hidden=(5, 0))
