"""Importance sampling: the bound is that of log_likelihood, and defensive mixtures are unbiased."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Discrete, case
from small import pixels, vae
from torch import nn

import ppl_vae as pv
from ppl_vae.batches import Data, Stream
from ppl_vae.pairs import Pair
from ppl_vae.proposals import widened
from ppl_vae.rng import seeded
from ppl_vae.tails import khat_threshold
from ppl_vae.weighing import importance


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


# ---- the bound
SHAPES = ["one level", "two levels", "bottom up", "nested", "handler mask", "law mask", "bare params", "category"]


@pytest.mark.parametrize("name", [*SHAPES, "auto normal"])
def test_the_bound_is_that_of_log_likelihood(name):
    this = case(name)
    sizes = {"particles": 60, "chunk": 25, "seed": 3, "batch_size": 6 if name == "auto normal" else 4}
    found, plain = (call(this.pair, this.batch, **sizes) for call in (importance, pv.log_likelihood))
    torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.stderr, plain.stderr, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.diagnostics["ess"], plain.diagnostics["ess"])
    assert (found.name, found.direction) == ("L_60", "lower")
    assert {d.shape for d in found.diagnostics.values()} == {found.value.shape}


def test_streams_and_redrawn_pixels_are_those_of_log_likelihood():
    columns, grey = pixels(20), Data(pixels(20, "bernoulli") * 0.5, transform=pv.redraw)
    for program, data in ((vae(), lambda: Stream([*columns.split(7)])), (vae("bernoulli"), lambda: grey)):
        found, plain = (call(program, data(), 50, batch_size=8) for call in (importance, pv.log_likelihood))
        torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-9)


def test_with_the_exact_posterior_every_weight_is_p():
    program = LinearGaussian.random(0, guide="exact")
    x = program.draw(7, seed=0)
    found = importance(program, x, 100, chunk=30, batch_size=4)
    exact = program.log_evidence(x).detach()
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.diagnostics["smoothed"], exact, rtol=0, atol=1e-9)
    assert (found.diagnostics["khat"] == -math.inf).all()
    assert found.stderr.max() < 1e-6
    torch.testing.assert_close(found.diagnostics["ess"], torch.full((7,), 100.0).double())


def test_data_that_no_particle_makes_have_minus_infinity():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(torch.where(x > 1, 0.0, z.exp())), obs=x)

    found = importance(Pair(model, standard), torch.tensor([1.0, 4.0, 0.0]), 50, defensive=0.2)
    assert found.value.isfinite().tolist() == [True, False, True]
    assert found.value[1] == found.diagnostics["smoothed"][1] == -math.inf
    assert found.diagnostics["khat"][1] == math.inf
    assert found.diagnostics["ess"][1].isnan()


# ---- defensive mixtures
def standard(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def far(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(100.0, 1.0))


def apart(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(
    ("particles", "chunk", "defensive"),
    [(100, 7, 0.1), (30, 100, 0.5), (25, 1, 1e-6), (40, 9, 1 - 1e-6), (1000, 64, 0.333)],
)
def test_shares_are_exact_whatever_the_chunk(particles, chunk, defensive):
    """The guide is so far off that a weight is 1/α times p(x) from the prior, and zero from the guide."""
    x = torch.randn(3).double()
    found = importance(Pair(apart, far), x, particles, chunk=chunk, defensive=defensive, batch_size=2)
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-6)
    count = min(max(round(defensive * particles), 1), particles - 1)
    torch.testing.assert_close(found.diagnostics["ess"], torch.full((3,), float(count)).double())


def chain(x):
    """h -> z -> x, each a step of a random walk."""
    with pyro.plate("data", len(x), dim=-1):
        h = pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def narrow_chain(x):
    """From the bottom up, and too narrow."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.6 * x, 0.5))
        pyro.sample("h", dist.Normal(0.5 * z, 0.4))


@pytest.mark.parametrize("defensive", [0.1, 0.5, 0.9])
def test_defensive_mixtures_are_unbiased(defensive):
    narrow = LinearGaussian.random(2, latent=2, width=3, widen=0.5)
    normal, x = narrow.draw(1, seed=0), torch.tensor([1.3]).double()
    category, row = Discrete(category=True).double(), torch.randn(1, 4).double()
    for program, datum, exact in (
        (narrow, normal, narrow.log_evidence(normal)),
        (Pair(chain, narrow_chain), x, dist.Normal(0.0, 3**0.5).log_prob(x)),
        (widened(Pair(chain, narrow_chain), 1.7), x, dist.Normal(0.0, 3**0.5).log_prob(x)),
        (category, row, category.log_evidence(row)),
    ):
        found = importance(program, datum.expand(2000, *datum.shape[1:]), 25, batch_size=2000, defensive=defensive)
        ratio = (found.value - exact.detach()).exp()
        error = ratio.std() / len(ratio) ** 0.5
        assert error < 0.05
        assert abs(ratio.mean() - 1) < 4 * error
        assert (found.value - exact.detach()).mean() < 0
        # The standard error does not know that shares are fixed, and is on the high side.
        assert ratio.std() < 1.1 * (found.stderr * ratio).square().mean().sqrt()


def test_defensive_mixtures_agree_with_many_particles_in_inner_plates():
    this = case("nested", torch.float64)
    found = importance(this.pair, this.batch, 4000, defensive=0.3)
    plain = pv.log_likelihood(this.pair, this.batch, 4000)
    error = (found.stderr.square() + plain.stderr.square()).sqrt()
    assert ((found.value - plain.value).abs() < 5 * error + 0.02).all()
    assert error.max() < 0.3


def test_a_narrow_guide_is_found_out_and_mended():
    narrow = LinearGaussian.random(2, latent=3, width=6, widen=0.5)
    assert narrow.weight_variance() == math.inf
    x = narrow.draw(60, seed=0)
    exact, limit = narrow.log_evidence(x).detach(), khat_threshold(1000)
    plain = importance(narrow, x)
    mixed = importance(narrow, x, defensive=0.3)
    wide = importance(widened(narrow, 2.4), x)
    errors = [(found.value - exact).square().mean().sqrt() for found in (plain, mixed, wide)]
    khats = [found.diagnostics["khat"] for found in (plain, mixed, wide)]
    assert (khats[0] > limit).double().mean() > 0.7
    assert (khats[1] > limit).double().mean() < 0.6 * (khats[0] > limit).double().mean()
    assert (khats[2] < limit).double().mean() > 0.9
    share = 100 * float((khats[0] > limit).double().mean())
    assert f"warning: k-hat is above 0.67 for {share:.1f}% of the data" in str(plain)
    assert errors[0] > 1.3 * errors[1] > 3 * errors[2]
    assert (mixed.value - exact).mean() > (plain.value - exact).mean() + 0.03


def test_captured_is_as_written(interpreted):
    program = LinearGaussian.random(0)
    x = program.draw(6, seed=0)
    for found, defensive in ((program, 0.3), (widened(program, 1.3), 0.0)):
        options = {"chunk": 20, "defensive": defensive}
        first, second = (importance(found, x, 50, compile=how, **options) for how in ("off", "require"))
        torch.testing.assert_close(first.value, second.value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(first.diagnostics["khat"], second.diagnostics["khat"], rtol=1e-6, atol=1e-6)
        assert first.engine == "eager" != second.engine
    assert len(interpreted) == 3 + 2  # chunks of 20, 15 and, from the prior, 15; then of 20 and 10


def test_the_seed_decides_and_the_callers_stream_is_left_alone():
    program = LinearGaussian.random(0)
    x = program.draw(6, seed=0)
    state = torch.get_rng_state()
    first, again, other = (importance(program, x, 50, defensive=0.2, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.value, again.value)
    assert not torch.isclose(first.value, other.value).any()


class Spoiled(nn.Module):
    """NaN where the data are negative."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + x.log(), 1.0), obs=x)

    def guide(self, x):
        standard(x)


def test_what_is_refused():
    x, program = torch.rand(4) + 0.1, Pair(apart, far)
    density = pv.Density(pv.Normal(pv.Constant(torch.zeros(1), learned=True), 1.0))
    points = pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), scale=1.0), pv.Point(pv.MLP(4, 2)))
    auto = case("auto normal")
    for call, message in (
        (lambda: importance(program, x, 24), "particles must be at least 25, got 24: .* raise particles"),
        (lambda: importance(program, x, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: importance(program, x, defensive=1.0), r"defensive must lie in \[0, 1\), got 1.0"),
        (lambda: importance(program, x, defensive=-0.1), r"defensive must lie in \[0, 1\), got -0.1"),
        (lambda: importance(program, x, defensive=math.nan), r"defensive must lie in \[0, 1\), got nan"),
        (lambda: importance(density, x[:, None]), "nothing is latent"),
        (lambda: importance(points, torch.rand(3, 4)), "the guide draws a point"),
        (lambda: importance(auto.pair, auto.batch, 50, defensive=0.1), "also draws 'z_unconstrained'"),
        (lambda: importance(Spoiled(), x.index_fill(0, torch.tensor(2), -1.0), 50, batch_size=2), "row 2 is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
