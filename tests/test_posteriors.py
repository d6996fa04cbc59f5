"""Posteriors: densities against torch's, draws that carry the right gradients, exactness on a linear pair."""

import math

import pyro
import pytest
import torch
from exact import LinearGaussian
from small import LATENT, WIDTH, fit, pixels
from test_steps import agree, update_of
from torch import nn
from torch.distributions import Independent, MixtureSameFamily, MultivariateNormal, Normal

import ppl_vae as pv
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.posteriors import FullCovariance, LowRank, MixtureOfNormals, NormalMixture, Point
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms

D = 3


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class Given(nn.Module):
    """A net whose output does not depend on its input: a parameter."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, *context):
        return self.value


# ---- mean-field
def test_the_mean_field_posterior_is_a_diagonal_normal():
    net, x, z = pv.MLP(6, 8, 2 * D), torch.randn(4, 6), torch.randn(4, D)
    law = pv.mean_field(net)(x)
    loc, raw = net(x).chunk(2, dim=-1)
    reference = Independent(Normal(loc, (7 * (raw / 7).tanh()).exp()), 1)
    assert (law.batch_shape, law.event_shape) == ((4,), (D,))
    torch.testing.assert_close(law.log_prob(z), reference.log_prob(z))


def test_its_draws_are_reparameterised():
    net = pv.MLP(6, 2 * D)
    law = pv.mean_field(net)(torch.randn(4, 6))
    assert law.has_rsample
    z = law.rsample()
    eps = ((z - law.mean) / law.stddev).detach()
    (gradient,) = torch.autograd.grad(z.sum(), net[0].bias, retain_graph=True)
    (by_hand,) = torch.autograd.grad((law.mean + law.stddev * eps).sum(), net[0].bias)  # z = μ + σ ε
    torch.testing.assert_close(gradient, by_hand)


# ---- correlated
@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_full_covariance_is_the_normal_that_its_numbers_say(lead, d):
    raw = torch.randn(*lead, d * (d + 3) // 2, dtype=torch.float64)
    law = FullCovariance(Given(raw))(torch.zeros(1))
    loc, log_diagonal, below = raw[..., :d], raw[..., d : 2 * d], raw[..., 2 * d :]
    tril, at = torch.zeros(*lead, d, d, dtype=torch.float64), 0
    for i in range(d):  # row by row
        tril[..., i, i] = (7 * (log_diagonal[..., i] / 7).tanh()).exp()
        for j in range(i):  # in shares of the row's own scale
            tril[..., i, j] = below[..., at] * tril[..., i, i] / d
            at += 1
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (d,), True)
    z = torch.randn(*lead, d, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(z), MultivariateNormal(loc, scale_tril=tril).log_prob(z))


def test_without_numbers_below_the_diagonal_it_is_the_mean_field():
    raw, z = torch.randn(5, 2 * D), torch.randn(5, D)
    full = FullCovariance(Given(torch.cat([raw, torch.zeros(5, D * (D - 1) // 2)], -1)))()
    torch.testing.assert_close(full.log_prob(z), pv.mean_field(Given(raw))().log_prob(z))


@pytest.mark.parametrize("width", [0, 1, 3, 6, 10])
def test_full_covariance_wants_a_width_of_some_latents(width):
    with pytest.raises(ValueError, match=f"numbers for d latents .*, got {width}"):
        FullCovariance(Given(torch.zeros(4, width)))(torch.zeros(4, 1))


@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (4, 1), (4, 3)])
def test_low_rank_is_the_normal_that_its_numbers_say(lead, d, rank):
    raw = torch.randn(*lead, d * (2 + rank), dtype=torch.float64)
    law = LowRank(Given(raw), d, rank)(torch.zeros(1))
    scale = (7 * (raw[..., d : 2 * d] / 7).tanh()).exp()
    factor = scale[..., None] * raw[..., 2 * d :].reshape(*lead, d, rank) / d
    covariance = factor @ factor.mT + (scale**2).diag_embed()
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (d,), True)
    z = torch.randn(*lead, d, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(z), MultivariateNormal(raw[..., :d], covariance).log_prob(z))


@pytest.mark.parametrize("posterior", [FullCovariance, lambda net: LowRank(net, D, 1)])
def test_draws_of_correlated_normals_have_their_moments(posterior):
    law = posterior(Given(torch.randn(9, dtype=torch.float64)))()
    z = law.expand((100_000,)).rsample()
    spread = (z - law.mean).unsqueeze(-1) * (z - law.mean).unsqueeze(-2)
    for draws, exact in ((z, law.mean), (spread, law.covariance_matrix)):
        assert bool(((draws.mean(0) - exact).abs() < 5 * draws.std(0) / math.sqrt(len(z))).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(pv.MLP(2, 2), 0, 1), "latent must be at least 1, got 0"),
        (lambda: LowRank(pv.MLP(2, 2), 2, 0), "rank must be at least 1, got 0"),
        (lambda: LowRank(pv.MLP(2, 2), 2, 3), "rank must be at most latent, 2, got 3"),
        (lambda: LowRank(pv.MLP(2, 5), 2, 1)(torch.zeros(2)), "LowRank: the net must give 6 numbers, got 5"),
        (lambda: MixtureOfNormals(pv.MLP(2, 2), 1, 0), "components must be at least 1, got 0"),
        (lambda: MixtureOfNormals(pv.MLP(2, 5), 2, 3)(torch.zeros(2)), "must give 15 numbers, got 5"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Exact(nn.Module):
    """A linear pair whose guide is a posterior conditional with the numbers of the exact posterior."""

    def __init__(self, pair, raw, posterior):
        super().__init__()
        self.pair, self.posterior = pair, posterior(Given(raw))

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))


def raw_scale(scale):
    return 7 * (scale.log() / 7).atanh()


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_on_the_exact_posterior_the_elbo_is_log_p(kl):
    """And .00194 nats below it with the best mean-field posterior."""
    pair, x = LinearGaussian.reference()
    loc, covariance = pair.requires_grad_(False).posterior(x)
    tril = torch.linalg.cholesky(covariance)
    below = 2 * tril[1:, :1] / tril[1, 1]  # in halves of the row's scale
    full = torch.cat([loc, raw_scale(tril.diagonal())[None], below], -1)
    # rank one: covariance = w w' + diag, which any 2 x 2 is
    factor = covariance[0, 1].abs().sqrt() * torch.tensor([1.0, -1.0], dtype=torch.float64)
    rest = (covariance.diagonal() - factor**2).sqrt()
    low = torch.cat([loc, raw_scale(rest)[None], 2 * (factor / rest)[None]], -1)
    best = torch.cat([loc, raw_scale(pair.mean_field_variance.sqrt())[None]], -1)
    guides = [(full, FullCovariance, 0.0), (low, lambda net: LowRank(net, 2, 1), 0.0)]
    guides += [(best, pv.mean_field, 0.001940337142796622)]
    for raw, posterior, gap in guides:
        terms = log_terms(as_pair(Exact(pair, raw, posterior)), x, particles=20_000 if gap else 200, kl=kl)
        weight = terms.weight().detach()
        error = float(weight.std()) / math.sqrt(len(weight))
        if kl == "sampled" and not gap:
            torch.testing.assert_close(
                weight, weight.new_full(weight.shape, -4.363660541059312), rtol=0, atol=1e-9
            )
        assert float(weight.mean()) == pytest.approx(-4.363660541059312 - gap, abs=5 * error + 1e-9)


@pytest.mark.parametrize("extreme", [1e6, -1e6])
@pytest.mark.parametrize(
    ("posterior", "plain", "scales"),
    [
        (FullCovariance, 3, 3),
        (lambda net: LowRank(net, D, 1), 3, 3),
        (lambda net: MixtureOfNormals(net, D, 2), 8, 6),
    ],
)
def test_extreme_scales_keep_finite_densities_and_gradients(posterior, plain, scales, extreme):
    raw = torch.cat([torch.randn(5, plain), torch.full((5, scales), extreme)], -1)
    net = Given(torch.cat([raw, torch.randn(5, 14 - plain - scales)[:, : 3 if plain == 3 else 0]], -1))
    law = posterior(net)()
    z = law.rsample()
    value = law.log_prob(z).sum() + z.sum()
    value.backward()
    assert value.isfinite()
    assert net.value.grad.isfinite().all()


@pytest.mark.parametrize("posterior", [FullCovariance, lambda net: LowRank(net, D, 1)])
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_strong_correlations_keep_finite_densities_and_gradients(posterior, extreme):
    net = Given(torch.cat([torch.randn(5, 2 * D), torch.full((5, 3), extreme)], -1))
    law = posterior(net)()
    z = law.rsample()
    (law.log_prob(z).sum() + z.sum()).backward()
    assert net.value.grad.isfinite().all()
    spread = law.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = law.covariance_matrix / (spread.unsqueeze(-1) * spread.unsqueeze(-2))
    assert correlation[:, 1, 2].abs().min() > 0.7


# ---- mixtures
def mixture(*lead, m=3, d=2, spread=1.5):
    """Parameters of a mixture in float64: logits, locations, scales."""
    logits = torch.randn(*lead, m, dtype=torch.float64)
    locs = spread * torch.randn(*lead, m, d, dtype=torch.float64)
    scales = 0.4 + torch.rand(*lead, m, d, dtype=torch.float64)
    return [p.requires_grad_() for p in (logits, locs, scales)]


def law_of(logits, locs, scales):
    return NormalMixture(locs, scales, logits)


@pytest.mark.parametrize("lead", [(), (5,), (7, 5)])
@pytest.mark.parametrize("m", [1, 4])
def test_a_mixture_is_the_mixture_that_its_numbers_say(lead, m):
    raw = torch.randn(*lead, m * (1 + 2 * D), dtype=torch.float64)
    law = MixtureOfNormals(Given(raw), D, m)(torch.zeros(1))
    locs = raw[..., m : m * (1 + D)].reshape(*lead, m, D)
    scales = (7 * (raw[..., m * (1 + D) :].reshape(*lead, m, D) / 7).tanh()).exp()
    reference = MixtureSameFamily(
        torch.distributions.Categorical(logits=raw[..., :m]), Independent(Normal(locs, scales), 1)
    )
    assert (law.batch_shape, law.event_shape, law.has_rsample) == (lead, (D,), True)
    z = torch.randn(6, *lead, D, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(law.expand((6, *lead)).log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(law.mean, reference.mean)
    assert law.expand((6, *lead)).rsample().shape == law.rsample((6,)).shape == z.shape


def test_its_density_integrates_to_one_and_its_draws_follow_it():
    law = law_of(*mixture())
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density, step = law.log_prob(grid).exp(), float(axis[1] - axis[0])
        assert float(density.sum()) * step**2 == pytest.approx(1, abs=1e-9)
        z = law.rsample((100_000,))
        for f in (
            lambda v: v[:, 0],
            lambda v: v[:, 1] ** 2,
            lambda v: (v[:, 0] * v[:, 1]).sin(),
            lambda v: v[:, 0] > 0,
        ):
            values = f(z).double()
            exact = float((f(grid) * density).sum()) * step**2
            assert float(values.mean()) == pytest.approx(
                exact, abs=5 * float(values.std()) / math.sqrt(len(z)) + 3e-3
            )


@pytest.mark.parametrize(("m", "d"), [(2, 1), (3, 2), (2, 4)])
def test_draws_of_a_mixture_move_as_its_density_does(m, d):
    """The transport equation ∂q/∂θ + ∇·(q dz/dθ) = 0, for each parameter, at some points."""
    parameters = mixture(m=m, d=d)
    z = 1.2 * torch.randn(6, d, dtype=torch.float64)

    def flux(at):
        """Q dz/dθ, (n, d, parameters)."""
        law, rows = law_of(*parameters), []
        moved = law.moving(at)
        for n in range(len(at)):
            for i in range(d):
                found = torch.autograd.grad(moved[n, i], parameters, retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows).reshape(len(at), d, -1) * law.log_prob(at).exp()[:, None, None].detach()

    step = 1e-4
    divergence = sum(
        (flux(z + shift)[:, i] - flux(z - shift)[:, i]) / (2 * step)
        for i, shift in enumerate(step * torch.eye(d, dtype=torch.float64))
    )
    densities = [law_of(*parameters).log_prob(point).exp() for point in z]
    change = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(q, parameters)]) for q in densities])
    assert float(change.abs().max()) > 1e-3
    torch.testing.assert_close(divergence, -change, rtol=1e-5, atol=1e-8)


def test_gradients_of_means_over_a_mixture():
    """Of E f(z) for f = z_0² + z_0 z_1: by draws, and by the closed form Σ π (μ_0² + σ_0² + μ_0 μ_1)."""
    parameters = mixture(spread=1.0)
    logits, locs, scales = parameters
    exact = (logits.softmax(-1) * (locs[:, 0] ** 2 + scales[:, 0] ** 2 + locs[:, 0] * locs[:, 1])).sum()
    by_hand = torch.autograd.grad(exact, parameters)
    draws = 20_000
    copies = [p.detach().expand(draws, *p.shape).clone().requires_grad_() for p in parameters]
    z = law_of(*copies).rsample()
    found = torch.autograd.grad((z[:, 0] ** 2 + z[:, 0] * z[:, 1]).sum(), copies)
    for each, mean in zip(found, by_hand, strict=True):
        error = each.std(0) / math.sqrt(draws)
        assert bool(((each.mean(0) - mean).abs() < 5 * error).all())
        assert float(error.max()) < 0.1


@pytest.mark.parametrize("scale", [0.02, 1.0, 20.0])
def test_a_mixture_of_many_latents_in_float32(scale):
    """Where densities, 200 factors each, are out of its range."""
    logits, locs, scales = (p.detach() for p in mixture(8, m=3, d=200, spread=0.1 * scale))
    parameters = [p.float().requires_grad_() for p in (logits, scale * locs, scale * scales)]
    law = law_of(*parameters)
    z = law.rsample()
    (z.sum() + law.log_prob(z).sum()).backward()
    assert all(p.grad.isfinite().all() for p in parameters)


def test_components_that_coincide_or_are_alone_are_fine():
    for m in (1, 3):
        parameters = [torch.zeros(m), torch.zeros(m, D), torch.ones(m, D)]
        parameters = [p.requires_grad_() for p in parameters]
        law_of(*parameters).rsample().sum().backward()
        assert float(parameters[0].grad.abs().max()) < 1e-6  # which component it is makes no difference
        torch.testing.assert_close(parameters[1].grad.sum(0), torch.ones(D))


# ---- points
def test_the_elbo_with_a_point_is_the_joint_density_there():
    vae = small_vae(Point(pv.MLP(WIDTH, 16, LATENT)))
    x = pixels()
    z = vae.posterior(x).rsample()
    joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
    for kl in ("sampled", "auto", "analytic"):
        torch.testing.assert_close(pv.ELBO(3, kl=kl)(as_pair(vae), x), joint)
    torch.testing.assert_close(pv.ELBO(beta=0.0)(as_pair(vae), x), vae.likelihood(z).log_prob(x))
    law = vae.posterior(x)
    assert (law.batch_shape, law.event_shape) == ((len(x),), (LATENT,))
    assert torch.equal(law.log_prob(law.rsample()), torch.zeros(len(x)))


# ---- inside a program
def small_vae(posterior):
    return pv.VAE(pv.StandardNormal(LATENT), pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale()), posterior)


POSTERIORS = {
    "full covariance": lambda: FullCovariance(pv.MLP(WIDTH, 16, 5)),
    "low rank": lambda: LowRank(pv.MLP(WIDTH, 16, 6), LATENT, 1),
    "mixture": lambda: MixtureOfNormals(pv.MLP(WIDTH, 16, 15), LATENT, 3),
    "point": lambda: Point(pv.MLP(WIDTH, 16, LATENT)),
}
OBJECTIVES = {
    "elbo": lambda: pv.ELBO(2),
    "auto": lambda: pv.ELBO(kl="auto"),
    "iwae": lambda: pv.IWAE(3),
    "doubly": lambda: pv.IWAE(3, estimator=pv.doubly),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_it_trains(name):
    vae = small_vae(POSTERIORS[name]())
    before = [p.detach().clone() for p in vae.posterior.parameters()]
    run = fit(vae, pixels(), epochs=1, batch_size=48, compile="off", objective=pv.ELBO(kl="auto"))
    assert run.step == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, vae.posterior.parameters(), strict=True))
    if name != "point":  # the weights of which are no importance weights
        assert pv.log_likelihood(vae, pixels(8), particles=5).value.isfinite().all()


@pytest.mark.parametrize("goal", OBJECTIVES)
@pytest.mark.parametrize("name", POSTERIORS)
def test_captured_and_as_written(interpreted, name, goal):
    vae = small_vae(POSTERIORS[name]())
    pair, x = as_pair(vae), pixels(6)
    inspect(pair, (x,))
    agree(update_of(pair, OBJECTIVES[goal]()), x)
    assert len(interpreted) == 1
