"""Wider guides: laws and densities of the scale asked for, parameters shared, the rest refused."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import bare_params, case
from small import pixels, vae

import ppl_vae as pv
from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.proposals import widened
from ppl_vae.rng import seeded
from ppl_vae.sites import base, statements
from ppl_vae.traces import log_posterior, log_terms, run_guide
from ppl_vae.weighing import importance


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["mean-field", "exact"])
def test_a_widened_guide_is_the_law_of_that_scale(kind, factor):
    plain, meant = (LinearGaussian.random(1, guide=kind, widen=w) for w in (1.0, factor))
    x, pair = plain.draw(5, seed=0), widened(plain, factor)
    z = torch.randn(4, 5, 3).double()
    inspect(pair, (x,))
    torch.testing.assert_close(log_posterior(pair, {"z": z}, x), meant.guide_law(x).log_prob(z))
    first, second = (terms_of(p, x, 4) for p in (pair, as_pair(meant)))
    torch.testing.assert_close(first.samples["z"], second.samples["z"])
    torch.testing.assert_close(first.weight(), second.weight())
    for judge in (pv.log_likelihood, partial(importance, defensive=0.1), partial(pv.elbo, kl="sampled")):
        torch.testing.assert_close(judge(pair, x, 50).value, judge(meant, x, 50).value, rtol=0, atol=1e-9)
    if kind == "mean-field":
        torch.testing.assert_close(pv.elbo(pair, x, kl="analytic").value, pv.elbo(meant, x, kl="analytic").value)
    torch.testing.assert_close(pv.encode(pair, x)["z"], plain.posterior(x)[0].detach())


def terms_of(pair, x, particles):
    with seeded(7):
        return log_terms(pair, x, particles=particles)


def drawn(*laws):
    """A guide of given laws, z0, z1, ..., and a model of standard normals."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            for number, law in enumerate(laws):
                pyro.sample(f"z{number}", dist.Normal(torch.zeros(law.event_shape), 1.0).to_event(law.event_dim))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            for number, law in enumerate(laws):
                pyro.sample(f"z{number}", law)

    return Pair(model, guide)


def test_densities_of_other_families_change_with_their_volume():
    loc, scale = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, 1.5, 1.0])
    masks = torch.tensor([True, False, True])
    families = [
        lambda f: dist.Laplace(loc, f * scale),
        lambda f: dist.StudentT(5.0, loc, f * scale).to_event(1),
        lambda f: dist.Normal(loc, f * scale).mask(masks).to_event(1),
        lambda f: dist.Logistic(loc, f * scale).mask(masks).to_event(1),
        lambda f: dist.LowRankMultivariateNormal(loc, f * scale[:, None], f**2 * scale),
        lambda f: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([f * loc, -f * loc], -1), f * scale[:, None])
        ),
    ]
    pair, x = widened(drawn(*(make(1.0) for make in families)), 1.4), torch.zeros(3)
    inspect(pair, (x,))
    sites = statements(run_guide(pair, (x,), 2))
    for site, make in zip(sites.values(), families, strict=True):
        torch.testing.assert_close(site["fn"].log_prob(site["value"]), make(1.4).log_prob(site["value"]))
        torch.testing.assert_close(site["fn"].mean, make(1.4).mean.expand_as(site["fn"].mean))


@pytest.mark.parametrize("name", ["two levels", "bottom up", "nested", "bare params", "auto normal"])
def test_each_site_is_spread_about_its_mean_given_the_latents_before_it(name):
    this, factor = case(name), 1.6
    wide = run_guide(widened(this.pair, factor), this.batch, 3)
    sites = statements(wide)
    for site, plain in zip(
        sites.values(), statements(run_guide(this.pair, this.batch, 3, wide)).values(), strict=True
    ):
        law, z = plain["fn"], site["value"]
        if isinstance(base(law), dist.Delta):  # of an automatic guide
            torch.testing.assert_close(site["fn"].log_prob(z), law.log_prob(z))
            continue
        density = law.log_prob(law.mean + (z - law.mean) / factor) - law.event_shape.numel() * math.log(factor)
        torch.testing.assert_close(site["fn"].log_prob(z), density)


def test_from_the_exact_posterior_made_narrow_and_wide_again_every_weight_is_p():
    program = LinearGaussian.random(0, guide="exact", widen=0.5)
    x = program.draw(3, seed=0)
    exact, pair = program.log_evidence(x).detach(), widened(program, 2.0)
    settings = pv.Annealing(chains=2, distributions=2, leapfrog=1, start="guide")
    for found in (importance(pair, x, 50), pv.log_likelihood(pair, x, 10), pv.annealed(pair, x, settings)):
        torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-9)


def test_a_widened_pair_has_the_parameters_of_the_first_and_leaves_it_as_it_is():
    for name in ("one level", "bare params", "closed over", "pyro module", "auto normal"):
        this = case(name)
        wide, layout = widened(this.pair, 1.5), this.pair.layout
        this.pair.train()
        pv.log_likelihood(wide, this.batch, 3)
        assert this.pair.layout is layout
        assert all(module.training for module in this.pair.modules())
        assert {id(p) for p in wide.parameters()} == {id(p) for p in this.pair.parameters()}
    fresh = vae()
    before = pv.log_likelihood(fresh, pixels(), 5).value
    pv.fit(widened(fresh, 1.2), pixels(), epochs=2, device="cpu", progress=False)
    assert not torch.isclose(pv.log_likelihood(fresh, pixels(), 5).value, before).all()


def test_loaded_weights_reach_statements_that_have_not_run():
    this, fresh = case("bare params"), bare_params()
    for parameter in this.pair.parameters():
        parameter.data += 0.1
    wide = widened(fresh, 1.5)
    wide.expect(this.pair.state_dict())
    for pair, meant in ((wide, widened(this.pair, 1.5)), (fresh, this.pair)):
        torch.testing.assert_close(*(pv.log_likelihood(p, this.batch, 5).value for p in (pair, meant)))


def test_factors_multiply_and_one_changes_nothing():
    this = case("two levels")
    for pair, meant in (
        (widened(this.pair, 1.0), this.pair),
        (widened(widened(this.pair, 1.5), 0.8), widened(this.pair, 1.2)),
    ):
        first, second = (pv.log_likelihood(p, this.batch, 20).value for p in (pair, meant))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_widened():
    x, one = torch.rand(3), torch.ones(3)
    flowed = dist.TransformedDistribution(dist.Normal(0 * one, one), [dist.transforms.TanhTransform()])
    open_flow = dist.TransformedDistribution(dist.Normal(0 * one, one), [dist.transforms.ELUTransform()])
    real_flow = dist.TransformedDistribution(dist.Normal(0 * one, one), [dist.transforms.LeakyReLUTransform()])
    for law, message in (
        (dist.Gamma(one, one), "site 'z0': the support of Gamma is not all real numbers"),
        (dist.Beta(one, one).to_event(1), "site 'z0': the support of Beta is not all"),
        (dist.Bernoulli(0.5 * one), "site 'z0': the support of Bernoulli is not all"),
        (dist.VonMises(one, one), "site 'z0': the support of VonMises is not all"),
        (flowed, "site 'z0': the support of TransformedDistribution"),
        (open_flow, "site 'z0': the support of TransformedDistribution"),
        (real_flow, "site 'z0': no finite mean of TransformedDistribution is known"),
        (dist.Cauchy(one, one), "site 'z0': no finite mean of Cauchy is known"),
    ):
        with pytest.raises(ValueError, match=message):
            pv.log_likelihood(widened(drawn(law), 1.5), x, 3)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"factor must be positive and finite, got {factor}"):
            widened(vae(), factor)
