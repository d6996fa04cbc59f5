"""Generators alone: exact densities of linear ones, nets as GANs have them, and the σ that suits data best."""

import math
from collections import OrderedDict

import pytest
import torch
from exact import LinearGaussian
from small import same, weights
from torch import nn

import ppl_vae as pv
from ppl_vae import capture, generators, graphs
from ppl_vae.annealing import annealed
from ppl_vae.estimates import IncompleteError
from ppl_vae.generators import FittedScale, Generator, fit_scale
from ppl_vae.rng import seeded
from ppl_vae.schedules import Annealing

FEW = Annealing(chains=16, distributions=50, leapfrog=3)
ROUGH = Annealing(chains=4, distributions=10, leapfrog=2)
LATENT, WIDTH = 2, 8


@pytest.fixture(autouse=True)
def seed(interpreted):  # what Pyro does at each of thousands of steps is done once
    with seeded(0):
        yield


def linear(exact, scale=None):
    """The generator of a linear-Gaussian pair."""
    width, latent = exact.weight.shape
    net = nn.Linear(latent, width).double()
    with torch.no_grad():
        net.weight.copy_(exact.weight)
        net.bias.copy_(exact.mean)
    return Generator(net, latent, math.sqrt(exact.variance) if scale is None else scale).double()


class Flat(nn.Module):
    """As GANs have them: one leading dimension, no other; a norm over the batch; pixels from -1 to 1."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(LATENT, 4 * 4 * 4)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)

    def forward(self, z):
        count, _ = z.shape
        h = self.norm(self.first(z).reshape(count, 4, 4, 4)).relu()
        return self.last(h).tanh()


def pictures(scale=0.2):
    net = Flat()
    net(torch.randn(200, LATENT))  # the norm has statistics then
    return Generator(net, LATENT, scale, event_dim=3)


@torch.no_grad()
def on_a_grid(generator, x):
    """log p(x) of pictures by two latents, summed over a grid of cells; (B,)."""
    line = torch.linspace(-5, 5, 201)
    z = torch.cartesian_prod(line, line)
    means = generator.likelihood.net.net.eval()(z).double()
    generator.train()
    sigma = generator.likelihood.scale.value.double()
    densities = torch.distributions.Normal(means[:, None], sigma).log_prob(x).sum((-3, -2, -1))
    prior = torch.distributions.Normal(0, 1).log_prob(z.double()).sum(-1)
    return (densities + prior[:, None]).logsumexp(0) + 2 * (line[1] - line[0]).log()


def components(x, latent):
    """Probabilistic PCA of data by maximum likelihood, and its σ (Tipping & Bishop 1999, eq. 7 and 8)."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    variance = float(values[:-latent].mean())
    weight = vectors[:, -latent:] * (values[-latent:] - variance).sqrt()
    return LinearGaussian(weight, x.mean(0), variance), math.sqrt(variance)


# ---- densities
def test_a_linear_generator_has_the_exact_bound_and_the_prior_for_a_guide():
    exact = LinearGaussian.random(2, latent=LATENT, width=WIDTH)
    generator, x = linear(exact), exact.draw(20, seed=1)
    found = pv.elbo(generator, x, particles=2000, chunk=2000, compile="require")
    square = (x - exact.mean).square().sum(1) + exact.weight.square().sum()
    bound = (-0.5 * WIDTH * math.log(2 * math.pi * exact.variance) - square / (2 * exact.variance)).detach()
    assert ((found.value - bound).abs() < 5 * found.stderr).all()
    assert (found.stderr < 0.05 * bound.abs()).all()
    assert not found.diagnostics["rate"].any()
    close = pv.log_likelihood(generator, x[:3], 20_000, chunk=20_000, compile="require")
    assert ((close.value - exact.log_evidence(x[:3]).detach()).abs() < 5 * close.stderr).all()
    assert close.diagnostics["ess"].min() > 50


def test_annealing_and_the_sandwich_enclose_the_exact_value():
    exact = LinearGaussian.random(2, latent=LATENT, width=WIDTH)
    generator, x = linear(exact), exact.draw(20, seed=1)
    found = annealed(generator, x, FEW, compile="require")
    below = exact.log_evidence(x).detach() - found.value
    assert below.mean() > -3 * found.monte_carlo_stderr
    assert below.mean() < 0.2
    both = pv.sandwich(generator, 20, settings=FEW, compile="require")
    x = pv.sample(generator, 20)
    value = exact.log_evidence(x).detach()
    for distance in (value - both.lower.value, both.upper.value - value):
        error = float(distance.std()) / 20**0.5
        assert -3 * error < distance.mean() < 0.2 + 3 * error


def test_a_prior_of_ones_own():
    exact = LinearGaussian.random(2, latent=LATENT, width=WIDTH)
    plain = linear(exact).likelihood.net.net
    mixture = pv.MixturePrior(LATENT, 3)
    generator = Generator(plain, LATENT, math.sqrt(exact.variance), prior=mixture).double()
    with torch.no_grad():
        mixture.loc.mul_(3)
    x = pv.sample(generator, 6)
    found = annealed(generator, x, FEW, compile="require")
    total = torch.zeros(6).double()
    law = mixture()
    for share, loc, scale in zip(
        law.mixture_distribution.probs,
        law.component_distribution.base_dist.loc,
        law.component_distribution.base_dist.scale,
        strict=True,
    ):
        part = LinearGaussian(exact.weight * scale, exact.weight @ loc + exact.mean, exact.variance)
        total += share * part.log_evidence(x).exp()
    assert ((found.value - total.log()).abs() < 5 * found.stderr + 0.1).all()


# ---- nets
def test_pictures_of_a_net_that_takes_one_leading_dimension():
    generator = pictures()
    before = weights(generator)
    assert generator.blank(3)[0].shape == (3, 1, 8, 8)
    x = pv.sample(generator, 4)
    found = annealed(generator, x, FEW, compile="require")
    assert ((found.value - on_a_grid(generator, x)).abs() < 5 * found.stderr + 0.05).all()
    assert same(before, weights(generator))
    assert generator.training
    generator.likelihood.net.eval().requires_grad_(False)
    frozen = annealed(generator, x, FEW, compile="require")
    assert torch.equal(frozen.value, found.value)
    assert (pv.sample(generator, 4, mean=True).abs() <= 1).all()


def test_data_of_another_shape_are_refused():
    generator = pictures()
    with pytest.raises(ValueError, match=r"event_dim=3 a batch has 4 dimensions, got shape \(5, 64\)"):
        annealed(generator, torch.zeros(5, 64), FEW)
    with pytest.raises(ValueError, match=r"observed value has shape \(5, 1, 8, 9\)"):
        annealed(generator, torch.zeros(5, 1, 8, 9), FEW)
    with pytest.raises(ValueError, match="latent must be at least 1, got 0"):
        Generator(nn.Linear(2, 3), 0, 1.0)
    with pytest.raises(ValueError, match=r"expected inputs of shape \(..., 5\), got \(1, 2\)"):
        Generator(nn.Linear(2, 3), 5, 1.0, prior=pv.StandardNormal(2)).blank(1)


# ---- σ
@pytest.fixture
def exactly(monkeypatch):
    """The exact log p(x) of linear generators in place of annealing."""

    def log_evidence(generator, x, settings, **options):
        weight, mean = generator.likelihood.net.net.parameters()
        exact = LinearGaussian(weight, mean, float(generator.likelihood.scale.value) ** 2)
        value = exact.log_evidence(x).detach()
        return pv.Estimate(value, torch.zeros_like(value), "lower")

    monkeypatch.setattr(generators, "annealed", log_evidence)


def test_the_scale_found_is_that_of_probabilistic_pca():
    x = LinearGaussian.random(3, latent=LATENT, width=100).draw(30, seed=1)
    exact, sigma = components(x, LATENT)
    generator = linear(exact, scale=0.1)
    options = {"low": 0.4 * sigma, "high": 2 * sigma, "tolerance": 0.05, "compile": "require"}
    found = fit_scale(generator, x, settings=FEW, **options)
    assert found.scale == pytest.approx(sigma, rel=0.05)
    assert float(generator.likelihood.scale.value) == pytest.approx(found.scale, rel=1e-6)
    assert list(found.curve) == sorted(found.curve)
    assert found.estimate.mean == max(estimate.mean for estimate in found.curve.values())
    assert found.estimate.mean == pytest.approx(float(exact.log_evidence(x).detach().mean()), abs=0.5)
    assert (found.estimate.direction, len(found.estimate.value)) == ("lower", 30)
    assert f"σ = {found.scale:.4g}, the best of {len(found.curve)} tried" in str(found)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("tolerance", [0.1, 0.001])
def test_the_search_comes_as_near_as_is_wanted(tolerance):
    x = LinearGaussian.random(3, latent=LATENT, width=WIDTH).draw(150, seed=1)
    exact, sigma = components(x, LATENT)
    found = fit_scale(linear(exact), x, low=0.01, high=20.0, tolerance=tolerance)
    assert abs(math.log(found.scale / sigma)) < tolerance
    assert len(found.curve) < 20


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize(("low", "high", "name"), [(0.01, 0.1, "high"), (2.0, 5.0, "low")])
def test_an_optimum_at_the_border_is_refused_and_the_scale_put_back(low, high, name):
    exact = LinearGaussian.random(3, latent=LATENT, width=WIDTH)
    generator = linear(exact, scale=0.7)
    with pytest.raises(ValueError, match=rf"^{name}: data are likeliest at σ = .*, next to {name}="):
        fit_scale(generator, exact.draw(10, seed=1), low=low, high=high)
    assert float(generator.likelihood.scale.value) == pytest.approx(0.7)


def test_every_scale_is_judged_under_the_same_seed_by_what_is_compiled_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(capture, "capture", graphs.capture)
    monkeypatch.setattr(graphs, "_compiled", OrderedDict())
    monkeypatch.setattr(graphs, "_compile", lambda module, arguments: (compiled.append(1) or module, "none"))
    exact = LinearGaussian.random(3, latent=LATENT, width=WIDTH)
    x, generator, state = exact.draw(10, seed=1), linear(exact), torch.get_rng_state()
    options = {"low": 0.1, "high": 3.0, "tolerance": 0.5, "seed": 3, "compile": "require"}
    found = fit_scale(generator, x, settings=ROUGH, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(compiled) == 1
    assert len(found.curve) > 2
    for sigma, estimate in [*found.curve.items()][:2]:
        generator.likelihood.scale.value.fill_(sigma)
        alone = annealed(generator, x, ROUGH, seed=3, compile="require")
        assert torch.equal(alone.value, estimate.value)
        assert estimate.engine.startswith("compiled")


def test_a_search_that_fails_puts_the_scale_back():
    generator = linear(LinearGaussian.random(3, latent=LATENT, width=WIDTH), scale=0.7)
    with torch.no_grad():
        generator.likelihood.net.net.bias[0] = math.nan
    with pytest.raises(IncompleteError, match="NaN"):
        fit_scale(generator, torch.zeros(3, WIDTH).double(), settings=FEW, compile="require")
    assert float(generator.likelihood.scale.value) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "low, high: expected 0 < low < high, got 1.0 and 0.1"),
        ({"low": 0.0}, "low, high: expected 0 < low < high, got 0.0 and 1.0"),
        ({"high": math.inf}, "low, high: expected"),
        ({"low": math.nan}, "low, high: expected"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"tolerance": 2.0}, r"less than a quarter of log\(high / low\), 4.61, got 2.0"),
    ],
)
def test_a_range_that_is_none(change, message):
    generator = linear(LinearGaussian.random(3, latent=LATENT, width=WIDTH))
    with pytest.raises(ValueError, match=message):
        fit_scale(generator, torch.zeros(3, WIDTH).double(), settings=FEW, **change)


def test_a_scale_that_is_learned_is_not_fitted():
    generator = Generator(nn.Linear(LATENT, WIDTH), LATENT, pv.LearnedScale())
    with pytest.raises(ValueError, match="must be a FixedScale to be set, got LearnedScale"):
        fit_scale(generator, torch.zeros(3, WIDTH))


def test_a_result_prints_its_scale_and_its_bound():
    estimate = pv.Estimate(
        torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double(), "lower", name="AIS, 8 x 200"
    )
    shown = str(FittedScale(0.1234, {0.1: estimate, 0.1234: estimate}))
    assert shown.splitlines()[0] == "σ = 0.1234, the best of 2 tried"
    assert shown.splitlines()[1].startswith("AIS, 8 x 200 = 1.500 ± 0.500")


@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.importance])
def test_a_judge_does_not_draw_the_latents_behind_the_data(judge, size):
    """The guide is the prior, and data of the same seed would be met by the very draws that made them."""
    exact = LinearGaussian.random(0, latent=10, width=40)
    generator = linear(exact, scale=exact.variance**0.5)
    x = pv.sample(generator, size)
    found = judge(generator, x, 100)
    assert (found.value < exact.log_evidence(x.double()).detach() + 2).all()
