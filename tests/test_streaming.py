"""Sums over particles: streamed in chunks, captured or not, they are those of all weights at once."""

import math

import pytest
import torch
from exact import LinearGaussian
from programs import case
from small import conditions, cvae, pixels, vae
from torch import nn

import ppl_vae as pv
from ppl_vae import capture
from ppl_vae.batches import Stream, prepare
from ppl_vae.capture import Engine
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.streaming import (
    Streamed,
    add_means,
    add_weights,
    expected_rows,
    mean_stderr,
    weight_stderr,
)
from ppl_vae.traces import LogTerms, log_terms

INFINITE = -math.inf
X = pixels(25)


def table(weight):
    """Terms whose weight it is; rate and distortion are recognisable."""
    return LogTerms(weight + 1, 2 * weight, 2 * weight + 1, {})


def summed(add, start, weight, sizes):
    sums = [torch.full(weight.shape[1:], s, dtype=torch.float64) for s in start]
    for part in weight.split(sizes):
        sums = add(sums, table(part), part)
    return sums


# ---- the sums
@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_sums_of_weights(sizes, shift):
    weight = 3 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    first, second = summed(add_weights, (INFINITE, INFINITE), weight, sizes)
    torch.testing.assert_close(first, weight.logsumexp(0))
    torch.testing.assert_close(second, (2 * weight).logsumexp(0))
    ess = (2 * first - second).exp()
    relative = (weight - weight.logsumexp(0)).exp() * 7
    torch.testing.assert_close(weight_stderr(ess, 7), relative.std(0) / math.sqrt(7))


def test_weights_of_zero_are_an_answer():
    weight = torch.tensor([[INFINITE, 0.0, INFINITE], [INFINITE, INFINITE, 1.0]], dtype=torch.float64)
    first, second = summed(add_weights, (INFINITE, INFINITE), weight, [1, 1])
    assert first.tolist() == [INFINITE, 0.0, 1.0]
    assert second.tolist() == [INFINITE, 0.0, 2.0]


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
@pytest.mark.parametrize("shift", [0.0, -1e6])
def test_sums_of_means(sizes, shift):
    weight = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    sums = summed(add_means, (0.0, 0.0, 0.0, math.nan, 0.0, 0.0), weight, sizes)
    torch.testing.assert_close(sums[0] / 7, weight.mean(0))
    torch.testing.assert_close(sums[1], torch.full((5,), 7.0, dtype=torch.float64))
    torch.testing.assert_close(sums[2] / 7, -(weight + 1).mean(0))
    torch.testing.assert_close(mean_stderr(sums, 7), weight.std(0) / math.sqrt(7), rtol=1e-6, atol=0)


def test_one_particle_has_no_spread():
    assert weight_stderr(torch.ones(3), 1).isnan().all()
    assert mean_stderr([torch.zeros(3)] * 6, 1).isnan().all()


def test_how_many_rows_are_to_come():
    pair = as_pair(vae())
    assert expected_rows(prepare(pair, X, 10), 10) == 30
    assert expected_rows(Stream([X[:10], X[10:]]), 10) == 20
    assert expected_rows(Stream(type("Endless", (), {"__iter__": lambda self: iter([X])})()), 10) == math.inf


# ---- captured and as written
def both(judge):
    """An estimate as written and captured."""
    plain, ours = (judge(how) for how in ("off", "require"))
    assert plain.engine == "eager"
    assert ours.engine.startswith("compiled in")
    torch.testing.assert_close(ours.value, plain.value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.stderr, plain.stderr, rtol=1e-3, atol=1e-4, equal_nan=True)
    for name, theirs in plain.diagnostics.items():
        torch.testing.assert_close(ours.diagnostics[name], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("particles", "chunk", "graphs"), [(7, 3, 4), (6, 3, 2), (5, 10, 2), (1, 1, 2)])
@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
def test_estimates_captured_and_as_written(interpreted, judge, particles, chunk, graphs):
    program = vae()
    options = {"particles": particles, "chunk": chunk, "batch_size": 10}
    both(lambda how: judge(program, X, compile=how, **options))
    assert len(interpreted) == graphs  # for whole and short chunks, of whole and short batches


@pytest.mark.parametrize("name", ["two levels", "bottom up", "nested", "law mask", "given rows", "bernoulli"])
@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
def test_programs_of_every_shape(interpreted, name, judge):
    c = case(name)
    both(lambda how: judge(c.pair, c.batch[0], 5, chunk=3, compile=how))


def test_the_same_estimate_twice(interpreted):
    first, again = (pv.log_likelihood(vae(), X, 5, compile="require") for _ in range(2))
    assert torch.equal(first.value, again.value)


@pytest.mark.parametrize("kl", ["auto", "sampled", "analytic"])
def test_conditional_programs_with_dropout_and_redrawn_pixels(interpreted, kl):
    program = cvae(kind="bernoulli")
    program.posterior.net.net.append(nn.Dropout(0.5))  # off while judging
    data = pv.Data((X.clamp(0, 1) * 255).byte(), conditions(X), transform=pv.redraw)
    both(lambda how: pv.elbo(program, data, 5, kl=kl, batch_size=10, compile=how))
    both(lambda how: pv.log_likelihood(program, data, 5, batch_size=10, compile=how))


def test_an_exact_guide_has_one_weight_whatever_runs_it():
    """And compiled: all float64."""
    program = LinearGaussian.random(0, guide="exact").requires_grad_(False)
    x = program.draw(3, seed=0)
    for how in ("off", "require"):
        estimate = pv.log_likelihood(program, x, 4, chunk=2, compile=how)
        torch.testing.assert_close(estimate.value, program.log_evidence(x), rtol=0, atol=1e-9)


def test_small_estimates_stay_eager_and_large_ones_do_not(interpreted, monkeypatch):
    pv.log_likelihood(vae(), X, 100)
    assert interpreted == []
    monkeypatch.setattr(capture, "WORTH", 2)  # thousands of draws
    pv.log_likelihood(vae(), X, 100, batch_size=25)
    assert len(interpreted) == 1


# ---- weights that are no numbers
class Poisoned(LinearGaussian):
    """A likelihood that turns what the weight is made of, where the datum says so."""

    value = math.nan

    def model(self, x):
        wrong = x[:, :1] > 100
        super().model(torch.where(wrong, x.new_tensor(self.value), x))


@pytest.mark.parametrize("how", ["off", "require"])
@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
def test_weights_that_are_nan_are_named_by_their_row(interpreted, how, judge):
    program = Poisoned.random(0).requires_grad_(False)
    x = program.draw(25, seed=0)
    judge(program, x, 5, batch_size=10, compile=how)
    x[[17, 19]] = 1000.0
    with pytest.raises(ValueError, match=r"data: .* of row 17 is nan"):
        judge(program, x, 5, batch_size=10, compile=how)


@pytest.mark.parametrize("how", ["off", "require"])
def test_a_datum_that_the_model_cannot_make_has_a_bound_of_minus_infinity(interpreted, how):
    program = Poisoned.random(0).requires_grad_(False)
    program.value = math.inf
    x = program.draw(25, seed=0)
    x[17] = 1000.0
    value = pv.log_likelihood(program, x, 5, batch_size=10, compile=how).value
    assert float(value[17]) == INFINITE
    assert value.isfinite().sum() == 24


@pytest.mark.parametrize("how", ["off", "require"])
def test_a_plate_that_does_not_hold_the_batch_is_refused(interpreted, how):
    c = case("drawn rows")
    with pytest.raises(ValueError, match="program: 3 rows in its data plate for a batch of 6"):
        pv.log_likelihood(c.pair, c.batch[0], 5, compile=how)


def test_it_is_the_sum_over_all_particles_at_once():
    pair = as_pair(vae())
    inspect(pair, (X,))
    streamed = Streamed(
        Engine("off"), pair, add_weights, (INFINITE,) * 2, particles=7, chunk=3, batch_size=10, rows=25
    )
    with seeded(0), torch.no_grad():
        weight = torch.cat([log_terms(pair, X, particles=k).weight().double() for k in (3, 3, 1)])
    with seeded(0):
        first, second = streamed((X,))
    torch.testing.assert_close(first, weight.logsumexp(0))
    torch.testing.assert_close(second, (2 * weight).logsumexp(0))
    assert first.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
def test_estimates_on_a_gpu(judge):
    program = cvae().to("cuda")
    data = (X, conditions(X))
    both(lambda how: judge(program, data, 50, chunk=20, batch_size=10, compile=how))
