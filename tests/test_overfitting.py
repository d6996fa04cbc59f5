"""Training data against held-out data: differences that add up, and an encoder told from a decoder."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import nn

import ppl_vae as pv
from ppl_vae.overfitting import Generalisation, generalisation
from ppl_vae.refining import local_full_covariance
from ppl_vae.rng import seeded

FEW = {"steps": 100, "particles": 100, "compile": "off"}
PARTS = ("decoder", "approximation", "encoder")


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class ByHeart(nn.Module):
    """A linear model with an encoder that is exact for data it remembers, and off by a shift for others."""

    def __init__(self, remembered, shift):
        super().__init__()
        self.exact = LinearGaussian.random(0, guide="exact")
        self.remembered, self.shift = remembered, shift

    def model(self, x):
        self.exact.model(x)

    def guide(self, x):
        loc, _ = self.exact.posterior(x)
        known = (x[:, None] == self.remembered).all(-1).any(1)
        loc = loc + self.shift * (~known)[:, None]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.exact.mean_field_variance.sqrt()).to_event(1))


def test_an_encoder_that_overfits_is_told_from_the_decoder():
    exact = LinearGaussian.random(0)
    train, test = exact.draw(40, seed=1), exact.draw(60, seed=2)
    found = generalisation(ByHeart(train, 0.3), train, test, **FEW)
    assert found.encoder.mean > 4 * found.encoder.stderr
    # The gap is ½ shift² Σ over the precision's entries that a mean-field guide has.
    with torch.no_grad():
        gap = 0.5 * 0.3**2 * float(exact.precision.sum())
    assert found.encoder.mean == pytest.approx(gap, rel=0.05)
    evidence = exact.log_evidence(train).mean() - exact.log_evidence(test).mean()
    assert found.decoder.mean == pytest.approx(float(evidence.detach()), abs=0.05)
    text = str(found)
    assert "the encoder overfits" in text
    assert "the decoder does not overfit by more than the errors" in text
    assert "40 and 60 data" in text


def test_a_decoder_that_overfits_is_told_from_the_encoder():
    """A model with σ of its own training data, whose held-out data are rougher; its guide is exact for both."""
    program = LinearGaussian.random(0, guide="exact")
    train, test = program.draw(50, seed=1), program.draw(50, seed=2)
    test = test + 0.8 * torch.randn(50, 6).double()
    found = generalisation(program, train, test, local_full_covariance, **FEW)
    assert "the decoder overfits" in str(found)
    assert "the encoder does not overfit by more than the errors" in str(found)
    assert abs(found.encoder.mean) < 0.02


def test_the_parts_add_up_and_errors_are_of_two_samples():
    exact = LinearGaussian.random(1)
    train, test = exact.draw(20, seed=1), exact.draw(30, seed=2)
    found = generalisation(ByHeart(train, 0.2), train, test, steps=20, particles=50, compile="off")
    assert isinstance(found, Generalisation)
    assert found.elbo.mean == pytest.approx(sum(getattr(found, part).mean for part in PARTS), abs=1e-9)
    one, other = found.train.before, found.test.before
    assert found.elbo.mean == pytest.approx(one.mean - other.mean)
    assert found.elbo.stderr == pytest.approx(math.hypot(one.mean_stderr, other.mean_stderr))
    assert pv.elbo(ByHeart(train, 0.2), train, 50).mean == pytest.approx(one.mean, abs=0.5)


def test_what_refine_refuses_is_refused():
    exact = LinearGaussian.random(1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        generalisation(exact, exact.draw(5, seed=1), exact.draw(5, seed=2), steps=0)
