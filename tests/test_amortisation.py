"""The two gaps against closed forms: they add up, and each is what it is said to be."""

import math

import pytest
import torch
from exact import LinearGaussian
from programs import Discrete
from small import vae

import ppl_vae as pv
from ppl_vae.amortisation import Gaps, gaps
from ppl_vae.annealing import Annealing
from ppl_vae.estimates import Estimate
from ppl_vae.refining import local_full_covariance, local_mean_field
from ppl_vae.rng import seeded
from ppl_vae.transforms import redraw


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def known(program, x):
    value = program.log_evidence(x).detach()
    return Estimate(value, torch.zeros_like(value), "unbiased")


@pytest.mark.parametrize("widen", [1.0, 1.7])
def test_both_gaps_are_the_exact_ones(widen):
    program, best = (LinearGaussian.random(1, latent=2, width=3, widen=w) for w in (widen, 1.0))
    x = program.draw(30, seed=0)
    found = gaps(program, x, evidence=known(program, x), steps=300, particles=2000, compile="off")
    family = (best.log_evidence(x) - best.elbo(x)).detach()
    net = (best.elbo(x) - program.elbo(x)).detach()
    error = found.refined.elbo.stderr
    assert ((found.each["approximation"] - family).abs() < 4 * error + 1e-3).all()
    error = (error.square() + found.refined.before.stderr.square()).sqrt()
    assert ((found.each["amortisation"] - net).abs() < 4 * error + 1e-3).all()
    assert family.min() > 0.02
    assert (net.min() > 0.3) if widen > 1 else (net.abs().max() < 1e-9)


def test_they_add_up_to_the_whole():
    program = LinearGaussian.random(1, widen=1.5)
    x = program.draw(8, seed=0)
    found = gaps(program, x, evidence=known(program, x), steps=20, particles=20, compile="off")
    total = found.evidence.value - found.refined.before.value
    torch.testing.assert_close(sum(found.each.values()), total, rtol=0, atol=1e-12)
    assert found.total.mean == pytest.approx(found.approximation.mean + found.amortisation.mean)
    assert found.total.mean == pytest.approx(float(total.mean()))
    assert found.total.stderr == pytest.approx(float(total.std() / math.sqrt(8)))
    assert found.amortisation.stderr == pytest.approx(float(found.each["amortisation"].std() / math.sqrt(8)))


def test_a_family_that_holds_the_posterior_has_no_approximation_gap():
    program = LinearGaussian.random(0)
    x = program.draw(6, seed=0)
    options = {"evidence": known(program, x), "steps": 300, "particles": 50, "compile": "off"}
    found = gaps(program, x, family=local_full_covariance, **options)
    assert found.each["approximation"].abs().max() < 1e-4
    assert found.amortisation.mean > 0.1


def test_evidence_is_annealed_unless_given_on_the_same_redrawn_pixels():
    with seeded(1):
        program = vae("bernoulli")
    data = pv.Data(torch.rand(5, 12), transform=redraw)
    settings = Annealing(chains=8, distributions=30, leapfrog=2)
    shared = {"batch_size": 3, "seed": 5, "compile": "off"}
    found = gaps(program, data, settings=settings, steps=150, particles=500, **shared)
    close = pv.log_likelihood(program, data, 4000, **shared)
    assert ((found.evidence.value - close.value).abs() < 5 * found.evidence.stderr + 0.05).all()
    assert (found.each["approximation"] > -5 * found.evidence.stderr - 0.05).all()  # other pixels are nats away
    assert not found.warnings
    lines = str(found).splitlines()
    assert "AIS, 8 x 30: total and approximation gap are lower bounds" in lines[-1]
    assert f"approximation   {found.approximation}" in lines[1]
    assert f"amortisation    {found.amortisation}" in lines[2]


def test_evidence_below_the_refined_bound_and_steps_that_are_missing_are_told():
    program = LinearGaussian.random(0, widen=3.0)
    x = program.draw(4, seed=0)
    value = program.elbo(x).detach()
    loose = Estimate(value, torch.full_like(value, 0.01), "lower", warnings=("loose",))
    found = gaps(program, x, evidence=loose, steps=10, particles=300, compile="off")
    assert isinstance(found, Gaps)
    first, *rest = found.warnings
    assert first == "loose"
    assert "the last steps still gained" in rest[0]
    assert rest[1] == (
        "the evidence lies below the refined ELBO for 100.0% of the data; anneal by more distributions"
    )
    assert all(text in str(found) for text in found.warnings)


def test_calls_that_have_no_gaps():
    program = LinearGaussian.random(0)
    x = program.draw(3, seed=0)
    with pytest.raises(ValueError, match="evidence: expected an estimate of the same 3 data, got one of 2"):
        gaps(program, x, evidence=known(program, x[:2]), steps=2, particles=2, compile="off")
    with pytest.raises(ValueError, match="site 'z': it is discrete"):
        gaps(Discrete(), torch.rand(3, 4), family=local_mean_field)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        gaps(program, x, steps=0)
