"""The oracle itself, and every bound held against it: values, errors and laws on linear-Gaussian pairs."""

import math
from itertools import pairwise

import pytest
import torch
from exact import LinearGaussian
from torch.distributions import MultivariateNormal, kl_divergence

import ppl_vae as pv
from ppl_vae.bounds import iwae
from ppl_vae.pairs import as_pair
from ppl_vae.traces import log_terms

# How wide a band is, in standard errors. Of some 100 comparisons with fixed seeds, 4.5 lets all true ones through.
BAND = 4.5


def instance(name, **options):
    """A pair and data drawn from it (the reference instance: its own datum)."""
    if name == "reference":
        program, x = LinearGaussian.reference(**options)
        return program.requires_grad_(False), x
    seed, latent, width = {
        "2 in 5": (0, 2, 5),
        "3 in 6": (2, 3, 6),
        "5 in 4": (4, 5, 4),
        "50 in 784": (5, 50, 784),
    }[name]
    program = LinearGaussian.random(seed, latent, width, **options).requires_grad_(False)
    return program, program.draw(6, seed=seed)


INSTANCES = ["reference", "2 in 5", "3 in 6", "5 in 4", "50 in 784"]
SMALL = [name for name in INSTANCES if name != "50 in 784"]


def within(estimate, exact, slack=0.0):
    """Whether each value lies within the band around what is exact."""
    return bool(((estimate.value - exact).abs() <= BAND * estimate.stderr + slack).all())


# ---------------------------------------------------------------- the oracle
def test_published_numbers():
    """Of the linear VAE: log p, posterior, best mean-field variance, gap and bound."""
    program, x = LinearGaussian.reference()
    loc, covariance = program.requires_grad_(False).posterior(x)
    published = [
        (program.log_evidence(x), [-4.363660541059312], 1e-10),
        (program.mean_field_variance, [0.1111111111, 0.0544662309], 1e-10),
        (program.log_evidence(x) - program.elbo(x), [0.001940337142796622], 1e-10),
        (program.elbo(x), [-4.365600878202109], 1e-10),
        (loc, [[0.25166464, -0.33122722]], 1e-8),  # printed with eight digits
        (covariance, [[0.11154313, -0.00486027], [-0.00486027, 0.05467801]], 1e-8),
    ]
    for ours, theirs, digits in published:
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=digits)


@pytest.mark.parametrize("name", INSTANCES)
def test_bayes(name):
    """p(x) p(z | x) = p(x | z) p(z) at any z, which ties marginal and posterior to the programs."""
    program, x = instance(name)
    loc, covariance = program.posterior(x)
    z = torch.randn(loc.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = program.variance * torch.eye(x.shape[1], dtype=torch.float64)
    unit = torch.eye(loc.shape[1], dtype=torch.float64)
    joint = MultivariateNormal(z @ program.weight.T + program.mean, noise).log_prob(x)
    joint = joint + MultivariateNormal(torch.zeros_like(loc), unit).log_prob(z)
    split = program.log_evidence(x) + MultivariateNormal(loc, covariance).log_prob(z)
    torch.testing.assert_close(joint, split, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_the_mean_field_variance_is_the_best(name):
    """A change of any variance, or of the mean, lowers the bound."""
    program, x = instance(name)
    q, (loc, covariance) = program.guide_law(x), program.posterior(x)
    exact = MultivariateNormal(loc, covariance)
    for factor, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.05)):
        for dim in range(loc.shape[1]):
            scales, moved = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).clone(), q.loc.clone()
            scales[:, dim] *= factor
            moved[:, dim] += shift
            other = program.log_evidence(x) - kl_divergence(
                MultivariateNormal(moved, torch.diag_embed(scales)), exact
            )
            assert bool((other < program.elbo(x)).all())


@pytest.mark.parametrize("guide", ["exact", "mean-field"])
@pytest.mark.parametrize("name", ["reference", "2 in 5"])
def test_weight_variance_by_sampling(name, guide):
    """Var(w) / p(x)², within its error; widened, so that the weights have the moments that the error needs."""
    program, x = instance(name, guide=guide, widen=1.3)
    torch.manual_seed(0)
    relative = log_terms(as_pair(program), x[:1], particles=400_000).weight()[:, 0] - program.log_evidence(x[:1])
    squares = (relative.exp() - 1) ** 2
    error = float(squares.std()) / math.sqrt(len(squares))
    assert float(squares.mean()) == pytest.approx(program.weight_variance(), abs=BAND * error)
    assert error < 0.05 * program.weight_variance()


def test_a_thin_guide_has_infinite_weight_variance():
    assert LinearGaussian.random(1).weight_variance() == math.inf
    assert LinearGaussian.random(1, guide="exact").weight_variance() == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- the ELBO
@pytest.mark.parametrize("widen", [1.0, 1.3])
@pytest.mark.parametrize("kl", ["sampled", "analytic"])
@pytest.mark.parametrize("name", INSTANCES)
def test_elbo_rate_and_distortion(name, kl, widen):
    program, x = instance(name, widen=widen)
    estimate = pv.elbo(program, x, particles=1000, kl=kl)
    rate, distortion = estimate.diagnostics["rate"], estimate.diagnostics["distortion"]
    assert within(estimate, program.elbo(x))
    torch.testing.assert_close(-(rate + distortion), estimate.value, rtol=1e-12, atol=1e-9)
    if kl == "analytic":
        torch.testing.assert_close(rate, program.rate(x), rtol=1e-10, atol=1e-10)
        assert bool(((distortion + program.elbo(x) + program.rate(x)).abs() <= BAND * estimate.stderr).all())
    else:
        torch.manual_seed(0)
        error = log_terms(as_pair(program), x, particles=1000).rate.std(0) / math.sqrt(1000)
        assert bool(((rate - program.rate(x)).abs() <= BAND * error).all())


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_the_errors_of_the_elbo_are_right(kl):
    """One datum 2000 times: the spread of its estimates is the standard error that each of them states."""
    program, x = instance("reference", widen=1.3)
    estimate = pv.elbo(program, x.expand(2000, -1), particles=20, kl=kl, batch_size=500)
    error = float(estimate.value.std()) / math.sqrt(2000)
    assert estimate.mean == pytest.approx(float(program.elbo(x)), abs=BAND * error)
    stated = float(estimate.stderr.square().mean().sqrt())
    assert float(estimate.value.std()) == pytest.approx(stated, rel=BAND / math.sqrt(2 * 2000))
    assert estimate.monte_carlo_stderr == pytest.approx(stated / math.sqrt(2000), rel=1e-6)


# ---------------------------------------------------------------- the importance-weighted bound
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("particles", [1, 10, 1000, 100_000])
def test_importance_weighted_bound(name, particles):
    """L_K lies within its errors of log p(x) less Var(w) / (2 K p²); L_1 is the ELBO."""
    wide = "exact" if name == "5 in 4" else "mean-field"  # there the mean-field weights have no variance
    program, x = instance(name, guide=wide, widen=1.3)
    copies = {1: 20_000, 10: 20_000, 1000: 400, 100_000: 1}[particles]
    x = x[: 1 if particles > 1 else 2]
    rows = x.repeat_interleave(copies, 0)
    estimate = pv.log_likelihood(program, rows, particles, batch_size=2000 if particles <= 10 else 20, chunk=1000)
    variance, exact = program.weight_variance(), program.log_evidence(x)
    for value, truth, bound in zip(estimate.value.split(copies), exact, program.elbo(x), strict=True):
        error = float(value.std()) / math.sqrt(copies) if copies > 1 else float(estimate.stderr)
        if particles == 1:
            assert float(value.mean()) == pytest.approx(float(bound), abs=BAND * error)
            continue
        bias = variance / (2 * particles)
        if particles == 10:  # the expansion's next term is of the order of bias², times the weights' skewness
            assert bound < float(value.mean()) < truth + BAND * error
        else:
            assert float(value.mean()) == pytest.approx(float(truth) - bias, abs=BAND * error + 4 * bias**2)


def test_many_latents_and_pixels():
    """50 latents, 784 pixels: exact with the posterior as guide, within errors if widened, below if mean-field."""
    program, x = instance("50 in 784", guide="exact")
    estimate = pv.log_likelihood(program, x, 20)
    torch.testing.assert_close(estimate.value, program.log_evidence(x), rtol=1e-11, atol=0)
    program, x = instance("50 in 784", guide="exact", widen=1.02)
    estimate = pv.log_likelihood(program, x, 4000, chunk=500)
    assert program.weight_variance() < 0.1
    assert within(estimate, program.log_evidence(x) - program.weight_variance() / 8000)
    program, x = instance("50 in 784")
    estimate = pv.log_likelihood(program, x, 1000)
    assert bool((program.elbo(x) < estimate.value).all())
    assert bool((estimate.value < program.log_evidence(x) + BAND * estimate.stderr).all())


@pytest.mark.parametrize("particles", [50, 100])
def test_the_bias_is_half_the_weight_variance_over_k(particles):
    program, x = instance("reference", guide="exact", widen=2.0)
    copies = 20_000
    estimate = pv.log_likelihood(program, x.expand(copies, -1), particles, batch_size=4000, chunk=100)
    bias = program.weight_variance() / (2 * particles)
    error = float(estimate.value.std()) / math.sqrt(copies)
    assert bias > 5 * error, "the test could not see the bias"
    assert float(program.log_evidence(x) - estimate.value.mean()) == pytest.approx(
        bias, abs=BAND * error + 4 * bias**2
    )


def test_the_errors_of_the_bound_are_right():
    """Their mean square is Var(w) / (K p²), and they cover: one standard error holds what a normal's does."""
    program, x = instance("reference", widen=1.3)
    copies, particles = 4000, 200
    estimate = pv.log_likelihood(program, x.expand(copies, -1), particles, batch_size=2000, chunk=200)
    variance = program.weight_variance()
    stated = float(estimate.stderr.square().mean())
    assert stated == pytest.approx(variance / particles, rel=0.05)
    z = (estimate.value - program.log_evidence(x) + variance / (2 * particles)) / estimate.stderr
    for width, share in ((1.0, 0.6827), (2.0, 0.9545)):
        band = BAND * math.sqrt(share * (1 - share) / copies) + 0.01  # the weights are skewed, their mean hardly
        assert float((z.abs() < width).double().mean()) == pytest.approx(share, abs=band)
    ess = estimate.diagnostics["ess"]
    assert float(ess.mean()) == pytest.approx(particles / (1 + variance), rel=0.02)


# ---------------------------------------------------------------- laws
@pytest.mark.parametrize("name", INSTANCES)
def test_an_exact_guide_is_exact_for_every_k(name):
    """All weights are p(x): no error, no bias, as many effective particles as there are."""
    program, x = instance(name, guide="exact")
    exact = program.log_evidence(x)
    size = exact.abs().max() if name == "50 in 784" else 1.0  # doubles resolve no more
    for particles in (1, 2, 7, 50):
        estimate = pv.log_likelihood(program, x, particles, chunk=3)
        assert float(((estimate.value - exact) / size).abs().max()) < 1e-9
        if particles > 1:
            assert float(estimate.stderr.max()) < 1e-6
            torch.testing.assert_close(
                estimate.diagnostics["ess"], torch.full_like(exact, particles), rtol=1e-9, atol=0
            )
    bound = pv.elbo(program, x, kl="sampled", particles=3)
    assert float(((bound.value - exact) / size).abs().max()) < 1e-9


@pytest.mark.parametrize("widen", [1.0, 1.5])
@pytest.mark.parametrize("name", SMALL)
def test_elbo_below_l_k_below_l_2k_below_log_p(name, widen):
    """On the same draws, for every datum: splitting particles never raises the bound. In the mean: below log p."""
    program, x = instance(name, widen=widen)
    torch.manual_seed(0)
    weight = log_terms(as_pair(program), x[:1].expand(500, -1), particles=64).weight()
    ladder = [torch.stack([iwae(part) for part in weight.split(k)]).mean(0) for k in (1, 2, 4, 8, 16, 32, 64)]
    for lower, higher in pairwise(ladder):
        assert bool((lower <= higher + 1e-9).all())
        assert float((higher - lower).mean()) > 0
    top = ladder[-1]
    error = float(top.std()) / math.sqrt(len(top))
    assert float(top.mean()) < float(program.log_evidence(x[:1])) + BAND * error
    error = float(ladder[0].std()) / math.sqrt(len(top))
    assert float(ladder[0].mean()) == pytest.approx(float(program.elbo(x[:1])), abs=BAND * error)


# ---------------------------------------------------------------- active units
@pytest.mark.parametrize("name", INSTANCES)
def test_active_units(name):
    """E_q[z | x] = A (x - mu), so its variance over data is the diagonal of A Cov(x) A'."""
    program, _ = instance(name)
    count = 4000
    x = program.draw(count, seed=3)
    units = pv.active_units(program, x)
    covariance = torch.linalg.inv(program.precision)
    slope = covariance @ program.weight.T / program.variance  # A, (d, D)
    exact = (slope @ program.marginal().covariance_matrix @ slope.T).diagonal()
    torch.testing.assert_close(units.variance["z"], program.posterior(x)[0].var(0), rtol=1e-6, atol=1e-8)
    relative = (units.variance["z"] / exact - 1).abs()
    assert float(relative.max()) < BAND * math.sqrt(2 / (count - 1)), "beyond a normal sample variance's error"
    assert units.count == {"z": int((exact > 1e-2).sum())}


def test_a_latent_that_the_model_ignores_is_inactive():
    program, _ = instance("3 in 6")
    program.weight[:, 1] = 0.0
    units = pv.active_units(program, program.draw(50, seed=0))
    assert float(units.variance["z"][1]) < 1e-20
    assert units.count == {"z": 2}
    assert str(units) == "z 2 of 3"
    above = float(units.variance["z"].max()) + 1
    assert pv.active_units(program, program.draw(50, seed=0), threshold=above).count == {"z": 0}
