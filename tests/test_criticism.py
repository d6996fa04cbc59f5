"""Predictive checks: p-values of closed form, exactly K replicates, and statistics that make no sense refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Discrete, Nested, SharedLatent, TwoLevel
from scipy import stats
from small import conditions, cvae, pixels, vae

import ppl_vae as pv
from ppl_vae.criticism import PredictiveCheck, predictive_check
from ppl_vae.pairs import Pair
from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def first(x):
    return x[..., 0]


def close(found, expected, sigmas=5.0):
    return ((found.p["T"] - expected).abs() < sigmas * found.stderr["T"]).all()


# ---- closed forms
@pytest.mark.parametrize("latents", ["guide", "prior"])
def test_p_values_of_a_linear_statistic_are_exact(latents):
    """T = x_1 is normal given the datum, N(μ + W m, W S Wᵀ + σ²), and of the prior, p(x_1)."""
    program = LinearGaussian.random(1, guide="exact")
    x = 1.5 * program.draw(40, seed=0)
    found = predictive_check(program, x, {"T": first}, latents=latents, draws=1500)
    with torch.no_grad():
        if latents == "guide":
            loc, covariance = program.posterior(x)
            mean = (loc @ program.weight.T + program.mean)[:, 0]
            scale = (program.weight @ covariance @ program.weight.T)[0, 0].add(program.variance).sqrt()
        else:
            mean, scale = program.mean[0], program.marginal().covariance_matrix[0, 0].sqrt()
        expected = torch.special.ndtr(-(x[:, 0] - mean) / scale)
    assert close(found, expected)
    assert found.average["T"].mean == pytest.approx(float(found.p["T"].mean()))
    # What the data set has as its mean, against that of a replicated one.
    above = (mean.mean() - x[:, 0].mean()) / scale * math.sqrt(40)
    share = float(torch.special.ndtr(above.detach()))
    assert abs(found.whole["T"].mean - share) < 5 * math.sqrt(max(share * (1 - share), 1e-3) / 1500)


def test_prior_p_values_of_the_models_own_data_are_uniform():
    program = LinearGaussian.random(2)
    x = program.draw(800, seed=0)
    found = predictive_check(
        program, x, {"T": first, "S": lambda x: x.square().sum(-1)}, latents="prior", draws=99
    )
    for name in ("T", "S"):
        ranks = (99 * found.p[name]).round()  # 0, ..., 99, uniform whatever T is
        counts = torch.bincount((ranks // 10).long(), minlength=10)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
        assert abs(found.average[name].mean - 0.5) < 4 * found.average[name].stderr


def test_posterior_p_values_are_nearer_to_one_half_than_uniform_ones():
    """x_1 less its posterior mean is N(0, r) in units of its replicates, and Var Φ(N(0, r)) a closed form."""
    program = LinearGaussian.random(2, guide="exact")
    x = program.draw(500, seed=0)
    p = predictive_check(program, x, {"T": first}, draws=200).p["T"]
    with torch.no_grad():
        covariance, inverse = program.posterior(x)[1], program.marginal().precision_matrix
        ratio = program.variance**2 * inverse[0, 0]
        ratio /= (program.weight @ covariance @ program.weight.T)[0, 0] + program.variance
    exact = math.asin(ratio / (1 + ratio)) / (2 * math.pi)
    squares = (p - 0.5).square() - p * (1 - p) / 199  # less what 200 draws leave of noise
    assert exact < 0.9 / 12
    assert abs(squares.mean() - exact) < 4 * squares.std() / 500**0.5


def test_the_discrepancy_is_chi_square_given_z():
    """-log p(x | z) is ½ |x - W z - μ|² / σ² and a constant, of a replicate ½ χ²."""
    program = LinearGaussian.random(3, guide="exact")
    x = program.draw(30, seed=0) * 1.2
    found = predictive_check(program, x, {"T": "discrepancy"}, draws=1500)
    with torch.no_grad():
        z = program.guide_law(x).sample((4000,))
        distance = (x - z @ program.weight.T - program.mean).square().sum(-1) / program.variance
        expected = torch.special.gammaincc(torch.tensor(3.0).double(), distance / 2)
    spread = (found.stderr["T"].square() + expected.var(0) / 4000).sqrt()
    assert ((found.p["T"] - expected.mean(0)).abs() < 5 * spread).all()
    assert found.observed["T"].shape == found.replicated["T"].shape == (30, 1500)
    constant = 3 * math.log(2 * math.pi * program.variance)
    assert float(found.replicated["T"].mean()) == pytest.approx(constant + 3, abs=0.05)


def test_a_model_too_smooth_for_its_data_is_seen():
    program = LinearGaussian.random(4, guide="exact")
    x = program.draw(200, seed=0) + 1.5 * torch.randn(200, 6).double()
    found = predictive_check(program, x)
    assert found.average["discrepancy"].mean < 0.2
    assert found.whole["discrepancy"].mean == 0
    assert "posterior predictive check, P(T(x_rep) >= T(x)): 200 data, 100 replicates of each" in str(found)
    assert [*found.p] == ["mean", "sd", "discrepancy"]
    torch.testing.assert_close(found.observed["sd"][:, 0], x.std(-1, correction=0))
    torch.testing.assert_close(found.observed["mean"][:, 0], x.mean(-1))
    assert [*predictive_check(program, x, latents="prior").p] == ["mean", "sd"]


# ---- programs of every shape
@pytest.mark.parametrize(
    ("make", "entries"),
    [(vae, 12), (cvae, 12), (Discrete, 4), (TwoLevel, 4), (Nested, 4)],
)
def test_programs_of_every_shape(make, entries):
    program, x = make(), pixels(30)[:, :entries]
    data = (x, conditions(x)) if make is cvae else x
    shapes = []

    def watched(x):
        shapes.append(tuple(x.shape))
        return x.amax(-1)

    found = predictive_check(program, data, {"largest": watched}, draws=7, chunk=5, batch_size=20)
    expected = {(*k, rows, entries) for rows in (20, 10) for k in ((), (5,), (2,))}
    assert set(shapes) == expected
    torch.testing.assert_close(found.observed["largest"][:, 0], x.amax(-1).double())
    assert found.replicated["largest"].shape == (30, 7)
    assert predictive_check(program, data, draws=3).replicated["discrepancy"].isfinite().all()


def test_scalar_data_and_data_without_latents():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Poisson(3.0), obs=x)

    found = predictive_check(Pair(model, lambda x: None), torch.poisson(torch.full((300,), 3.0)))
    assert [*found.p] == ["mean", "discrepancy"]
    assert found.average["mean"].mean > 0.5  # equal counts are counted in
    exact = stats.poisson.sf(found.observed["mean"][:, 0].numpy() - 1, 3.0)
    assert ((found.p["mean"] - torch.from_numpy(exact)).abs() < 5 * found.stderr["mean"]).all()


def test_guides_that_draw_points_are_checked_too():
    program = pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), scale=1.0), pv.Point(pv.MLP(4, 2)))
    assert predictive_check(program, torch.randn(10, 4), draws=5).p["mean"].shape == (10,)


def test_one_of_several_observed_sites():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.5))

    data = (torch.randn(20, 3), torch.ones(20))
    found = predictive_check(Pair(model, guide), data, site="y", draws=20)
    assert set(found.replicated["mean"].unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"site: the model observes \['x', 'y'\]; say which"):
        predictive_check(Pair(model, guide), data)
    with pytest.raises(ValueError, match="does not observe 'w'"):
        predictive_check(Pair(model, guide), data, site="w")


# ---- numbers
def test_p_values_and_their_errors_of_given_statistics():
    replicated = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]).double()
    found = PredictiveCheck({"T": torch.tensor([[2.0], [1.0]]).double()}, {"T": replicated}, "guide")
    assert found.p["T"].tolist() == [0.5, 0.0]
    assert found.stderr["T"].tolist() == pytest.approx([0.25, math.sqrt(5 / 36 / 4)])
    assert found.whole["T"].mean == 0.25  # means 0, ½, 1, 1½ against 1½


def test_the_seed_decides_and_the_callers_stream_is_left_alone():
    program, x, state = vae(), pixels(20), torch.get_rng_state()
    a, again, other = (predictive_check(program, x, draws=3, seed=s).replicated["sd"] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, again)
    assert not torch.equal(a, other)


def test_a_function_alone_is_called_by_its_name():
    assert [*predictive_check(vae(), pixels(5), first, draws=2).p] == ["first"]
    assert [*predictive_check(vae(), pixels(5), "discrepancy", draws=2).p] == ["discrepancy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"latents": "means"}, "latents must be 'guide' or 'prior', got 'means'"),
        ({"statistic": {}}, "statistic: expected one or more by name, got none"),
        ({"statistic": {"T": 3}}, "statistic 'T': expected a function of x, or 'discrepancy', got 3"),
        ({"statistic": "mean"}, "statistic 'mean': expected a function of x, or 'discrepancy'"),
        ({"statistic": "discrepancy", "latents": "prior"}, "give latents='guide'"),
        ({"statistic": {"T": lambda x: x.mean()}}, r"expected one number for each datum, shape \(2, 5\)"),
        ({"statistic": {"T": lambda x: 3.0}}, "got float; reduce the last dimensions"),
        ({"statistic": {"T": lambda x: x.mean(-1).log()}}, "statistic 'T': it is NaN"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        predictive_check(vae(), pixels(5), **({"draws": 2} | arguments))


def test_latents_that_all_data_share_are_refused():
    with pytest.raises(ValueError, match="'w' is outside the data plate"):
        predictive_check(SharedLatent(), torch.randn(5, 4))
