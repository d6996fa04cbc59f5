"""Local posteriors: the best of their family where it is known, and nothing else changed."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Constrained, Discrete, Nested, SharedLatent, TwoLevel
from small import cvae, pixels, same, vae, weights
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import ppl_vae as pv
from ppl_vae.capture import Engine
from ppl_vae.draws import balanced
from ppl_vae.estimates import IncompleteError
from ppl_vae.evaluate import judging
from ppl_vae.graphs import capture
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.posteriors import NormalMixture
from ppl_vae.refining import (
    Local,
    _Place,
    _Refiner,
    local_flow,
    local_full_covariance,
    local_mean_field,
    refine,
)
from ppl_vae.rng import seeded
from ppl_vae.transforms import redraw


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class Shifted(LinearGaussian):
    """With a guide that is three units off, and too wide."""

    def guide(self, x):
        loc, _ = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc + 3, 1.0).to_event(1))


def normals(program, x, family, steps):
    """What refined normals are: mean (B, d) and covariance (B, d, d)."""
    with judging(program, 0) as pair:
        inspect(pair, (x,))
        refiner = _Refiner(pair, (x,), family, Engine("off"), steps)
        place = refiner.place((x,))
        law = refiner.law(refiner.optimised(place, 0.1, (x,))[1])
    covariance = law.variance.diag_embed() if family is local_mean_field else law.covariance_matrix
    return place.mean + place.scale * law.mean, place.scale[:, :, None] * covariance * place.scale[:, None]


def short_of_evidence(program, x, family, steps):
    """KL(refined q || posterior), in closed form, (B,)."""
    mean, covariance = program.posterior(x)
    exact = MultivariateNormal(mean, covariance.expand(len(x), -1, -1))
    return kl_divergence(MultivariateNormal(*normals(program, x, family, steps)), exact).detach()


# ---- the best of a family
def test_the_published_best_mean_field_bound_is_reached():
    program, x = Shifted.reference()
    gap = short_of_evidence(program, x, local_mean_field, 400)
    assert float(gap) == pytest.approx(0.001940337142796622, abs=1e-4)


@pytest.mark.parametrize(
    ("numbers", "latent", "width", "steps", "tolerance"),
    [([1], 2, 5, 300, 2e-4), pytest.param(range(5), 3, 6, 1000, 1e-6, marks=pytest.mark.slow)],
)
def test_the_best_mean_field_bound_of_random_instances(numbers, latent, width, steps, tolerance):
    for number in numbers:
        options = {"latent": latent, "width": width}
        program, best = Shifted.random(number, **options), LinearGaussian.random(number, **options)
        x = program.draw(5, seed=0)
        gap = (best.log_evidence(x) - best.elbo(x)).detach()
        found = short_of_evidence(program, x, local_mean_field, steps)
        assert (found - gap).min() > -1e-9  # no mean-field posterior is better
        assert (found - gap).max() < tolerance


def test_full_covariance_is_the_exact_posterior():
    program = LinearGaussian.random(0, widen=2.0)
    x = program.draw(6, seed=0)
    found = refine(program, x, local_full_covariance, steps=300, particles=50, compile="off")
    exact = program.log_evidence(x).detach()
    torch.testing.assert_close(found.elbo.value, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bound.value, exact, rtol=0, atol=1e-4)
    assert found.elbo.stderr.max() < 1e-3
    assert found.converged.all()
    mean, covariance = program.posterior(x)
    error = (covariance.diagonal() / 50).sqrt()
    assert ((found.latents["z"] - mean).abs() < 5 * error).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", [local_mean_field, local_full_covariance])
def test_fifty_latents_of_784_dimensions(family):
    program = LinearGaussian.random(0, latent=50, width=784, widen=2.0)
    best = LinearGaussian.random(0, latent=50, width=784)
    x = program.draw(10, seed=0)
    wanted = 0.0 if family is local_full_covariance else (best.log_evidence(x) - best.elbo(x)).detach()
    assert (short_of_evidence(program, x, family, 1500) - wanted).abs().max() < 1e-4


class Bent(nn.Module):
    """A banana and a pair of modes: x = (z_2 + z_1², z_1²) with noise, and a guide as wide as the prior."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = torch.stack([z[..., 1] + z[..., 0] ** 2, z[..., 0] ** 2], -1)
            pyro.sample("x", dist.Normal(loc, torch.tensor([0.2, 1.0])).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def test_a_richer_family_is_nearer_and_flows_bend():
    x = torch.tensor([[0.3, 0.2], [1.0, 0.5], [2.0, 1.5]])
    exact = pv.log_likelihood(Bent(), x, 200_000, chunk=50_000)
    reached = [
        refine(Bent(), x, family, steps=200, particles=4000, chunk=4000, compile="off")
        for family in (local_mean_field, local_full_covariance, local_flow(2))
    ]
    plain, full, flow = (found.elbo for found in reached)
    assert full.mean > plain.mean - 0.02  # the banana is symmetric
    assert flow.mean > plain.mean + 0.15
    for found in reached:
        error = (found.bound.stderr.square() + exact.stderr.square()).sqrt()
        assert (found.elbo.value < exact.value + 4 * error).all()


def noise_of(law, drawn):
    """What draws of normals are made of, (P, B, D)."""
    if isinstance(law, MultivariateNormal):
        return torch.linalg.solve_triangular(law.scale_tril, (drawn - law.loc).unsqueeze(-1), upper=False)[..., 0]
    return (drawn - law.mean) / law.stddev


@pytest.mark.parametrize("family", [local_mean_field, local_full_covariance])
@pytest.mark.parametrize(("latent", "count"), [(1, 2), (2, 4), (3, 8), (3, 32), (7, 16)])
def test_draws_of_normals_have_no_mean_and_no_products_of_two_entries(family, latent, count):
    law = family(latent).law(0.3 * torch.randn(3, family(latent).numbers))
    drawn = balanced(law, count)
    noise = noise_of(law, drawn).double()
    assert noise.shape == (count, 3, latent)
    products = torch.einsum("pbi,pbj->bij", noise, noise) / count
    torch.testing.assert_close(noise.mean(0), torch.zeros(3, latent).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(products, products.diagonal(dim1=1, dim2=2).diag_embed(), rtol=0, atol=1e-5)
    assert noise[0].std() > 0


def test_each_draw_is_of_the_law_also_where_signs_do_not_go_round():
    law = local_full_covariance(5).law(0.3 * torch.randn(1, 20))
    drawn = torch.cat([balanced(law, 4) for _ in range(5000)])  # two rows of signs for five latents
    noise = noise_of(law, drawn)[:, 0].double()
    error = 1 / len(noise) ** 0.5
    assert noise.mean(0).abs().max() < 1e-5
    assert (noise.T @ noise / len(noise) - torch.eye(5)).abs().max() < 5 * 2 * error  # sets of four share squares
    assert ((noise**4).mean(0) - 3).abs().max() < 5 * 2 * 96**0.5 * error


def test_draws_of_flows_are_those_of_balanced_normals():
    law = local_flow(2)(2).law(torch.randn(3, 14))
    base = law.base_dist
    drawn = balanced(law, 8)
    for change in reversed(law.transforms):
        change._cached_x_y = None, None
        drawn = change.inv(drawn)
    torch.testing.assert_close(drawn.mean(0), base.mean, rtol=1e-4, atol=1e-4)


def test_draws_of_laws_that_are_not_symmetric_are_as_they_come():
    law = NormalMixture(torch.tensor([[[0.0], [9.0]]]), torch.full((1, 2, 1), 0.1), torch.tensor([[2.0, 0.0]]))
    drawn = balanced(law, 1024)
    assert drawn.shape == (1024, 1, 1)
    assert drawn.min() > -1
    assert 0.05 < (drawn > 8).double().mean() < 0.25


# ---- programs
def programs():
    x = pixels(4)
    with seeded(3):
        level = TwoLevel()
        return {
            "two levels": (level, torch.randn(4, 4), {"h": (4, 2), "z": (4, 2)}),
            "conditional": (cvae(), (x, (x[:, :2] > 0.5).sum(1)), {"z": (4, 2)}),
            "inner plate": (Nested(), torch.randn(4, 4), {"z": (4,), "u": (4, 4)}),
            "constrained": (Constrained(), torch.rand(4, 2), {"rate": (4,), "share": (4, 3), "odds": (4, 2)}),
        }


@pytest.mark.parametrize("name", list(programs()))
def test_programs_of_every_shape_get_nearer_and_stay_below(name):
    program, data, shapes = programs()[name]
    found = refine(program, data, steps=150, particles=400, compile="off")
    exact = pv.log_likelihood(program, data, 40_000, chunk=20_000)
    error = (found.elbo.stderr.square() + exact.stderr.square()).sqrt()
    assert (found.elbo.value < exact.value + 4 * error).all()
    assert found.elbo.mean > found.before.mean + 0.05
    assert found.bound.mean > found.elbo.mean
    assert {n: tuple(z.shape) for n, z in found.latents.items()} == shapes
    if name == "constrained":
        torch.testing.assert_close(found.latents["share"].sum(-1), torch.ones(4).double())
        assert found.latents["rate"].min() > 0


# ---- what is judged, and what is left alone
def test_the_guide_is_judged_as_by_elbo_on_the_same_redrawn_pixels():
    with seeded(1):
        program = vae("bernoulli")
    data = pv.Data(torch.rand(7, 12), transform=redraw)
    sizes = {"batch_size": 3, "seed": 5, "compile": "off"}
    found = refine(program, data, steps=60, particles=64, **sizes)
    assert torch.equal(found.before.value, pv.elbo(program, data, 64, **sizes).value)
    close = pv.log_likelihood(program, data, 4000, **sizes)
    error = (found.bound.stderr.square() + close.stderr.square()).sqrt()
    assert ((found.bound.value - close.value).abs() < 5 * error + 0.01).all()  # other pixels are nats away
    paired = found.elbo.value - found.before.value
    assert found.improvement.mean == pytest.approx(float(paired.mean()))
    assert found.improvement.stderr == pytest.approx(float(paired.std() / 7**0.5))


def test_nothing_of_the_program_changes_and_the_seed_decides():
    program = vae().train()
    before, state, x = weights(program), torch.get_rng_state(), pixels(5)
    first, again, other = (refine(program, x, steps=5, particles=8, seed=s, compile="off") for s in (1, 1, 2))
    assert same(before, weights(program))
    assert program.training
    assert all(p.requires_grad and p.grad is None for p in program.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.elbo.value, again.elbo.value)
    assert not torch.isclose(first.elbo.value, other.elbo.value).any()


def test_bounds_are_of_exactly_k_draws_in_chunks():
    sizes = []

    class Counting(pv.Conditional):
        def forward(self, table):
            law = local_mean_field(table.shape[-1] // 2).law(table)
            if not table.requires_grad and not torch.is_grad_enabled():
                plain = law.rsample
                law.rsample = lambda shape: sizes.append(shape[0]) or plain(shape)
            return law

    program = LinearGaussian.random(0)
    x = program.draw(3, seed=0)
    family = lambda latent: Local(Counting(), 2 * latent)  # noqa: E731
    found = refine(program, x, family, steps=2, particles=5, chunk=2, compile="off")
    assert sizes == [2, 2, 1] * 2  # late, and in the end
    value = found.elbo
    torch.testing.assert_close(value.value, -(value.diagnostics["rate"] + value.diagnostics["distortion"]))
    assert (found.bound.diagnostics["ess"] <= 5).all()
    assert (value.direction, found.bound.direction, found.bound.name) == ("lower", "lower", "refined L_5")


def test_too_few_steps_are_told():
    program = Shifted.random(0)
    x = program.draw(4, seed=0)
    found = refine(program, x, steps=20, particles=200, compile="off")
    assert not found.converged.any()
    assert (found.elbo.diagnostics["gain"] > 0.01).all()
    (warning,) = found.elbo.warnings
    assert warning == "the last steps still gained 0.01 nat or more for 100.0% of the data; take more steps"
    assert warning in str(found)
    done = refine(program, x, steps=300, particles=200, compile="off")
    assert done.converged.all()
    assert not done.elbo.warnings


@pytest.mark.parametrize("family", [local_mean_field, local_full_covariance, local_flow(2)])
def test_a_captured_step_is_as_written(family):
    program = LinearGaussian.random(0)
    x = program.draw(3, seed=0)
    with judging(program, 0) as pair:
        inspect(pair, (x,))
        refiner = _Refiner(pair, (x,), family, Engine("off"), 10)
        place = refiner.place((x,))
        table = 0.1 * torch.randn(3, refiner.numbers).double()
        given = (table, torch.zeros_like(table), torch.zeros_like(table), torch.tensor(0.1).double(), *place, x)
        step = partial(refiner._step, 8)
        graph = capture(step, given, compile=False)
        found = []
        for run in (graph, step):
            with seeded(1):
                found.append(run(*given))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    assert (found[0][0] - table).abs().max() > 0.01


@pytest.mark.parametrize("family", [local_mean_field, local_full_covariance, local_flow(3)])
def test_families_start_at_the_guide_and_their_gradient_lacks_the_score(family):
    """At the posterior each draw's gradient vanishes, which that of log q itself would not."""
    program = LinearGaussian.random(0, latent=1, width=3, guide="exact")
    x = program.draw(4, seed=0)
    with judging(program, 0) as pair:
        inspect(pair, (x,))
        refiner = _Refiner(pair, (x,), family, Engine("off"), 1)
        mean, covariance = program.posterior(x)
        place = _Place(mean.detach(), covariance.diagonal().sqrt().expand(4, 1).detach())
        table = torch.zeros(4, refiner.numbers).double()
        drawn = refiner.law(table).rsample((20_000,))
        _, first, _ = refiner._step(8, table, table, table, torch.tensor(0.1).double(), *place, x)
    assert drawn.mean(0).abs().max() < 5 / 20_000**0.5
    assert (drawn.var(0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert first.abs().max() < 1e-4


# ---- what is refused
class Spoiled(nn.Module):
    """NaN where the second column is negative."""

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            # The guide does not go there, and the posterior does.
            loc = z + torch.where((c < 0) & (z > 2.5), torch.nan, 0.0)
            pyro.sample("x", dist.Normal(loc[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 0.3))


def test_a_datum_that_gives_nan_is_named_and_the_others_are_kept():
    x, c = torch.full((5, 1), 2.0), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    with pytest.raises(IncompleteError, match="refined ELBO of row 2 is nan") as caught:
        refine(Spoiled(), (x, c), steps=200, compile="off")
    found = caught.value.result
    value = found.elbo.value
    assert value.isnan().tolist() == [False, False, True, False, False]
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x[:, 0]).double()
    assert (value - exact)[[0, 1, 3, 4]].abs().max() < 1e-3
    assert found.converged.tolist() == [True, True, False, True, True]
    clean = refine(Spoiled(), (x, c.abs()), steps=200, compile="off").elbo.value
    assert torch.equal(value[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])  # by the same draws


def test_calls_that_cannot_be_refined():
    x = torch.rand(3, 4)
    density = pv.Density(pv.Normal(pv.Constant(torch.zeros(4), learned=True), 1.0))
    points = pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), scale=1.0), pv.Point(pv.MLP(4, 2)))
    for call, message in (
        (lambda: refine(vae(), pixels(3), steps=0), "steps must be at least 1, got 0"),
        (lambda: refine(vae(), pixels(3), rate=0.0), "rate must be positive and finite, got 0.0"),
        (lambda: refine(vae(), pixels(3), particles=0), "particles must be at least 1, got 0"),
        (lambda: refine(vae(), pixels(3), chunk=0), "chunk must be at least 1, got 0"),
        (lambda: local_flow(depth=0), "depth must be at least 1, got 0"),
        (lambda: refine(density, x), "nothing is latent, so there is nothing to refine"),
        (lambda: refine(Discrete(), x), "site 'z': it is discrete, and has no gradient to be refined along"),
        (lambda: refine(points, x), "the guide draws a point"),
        (lambda: refine(SharedLatent(), x), "'w' is outside the data plate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_guide_of_no_spread_is_widened():
    """Its scale is a unit of length, and may not be zero in single precision."""
    program = pv.VAE(
        pv.StandardNormal(1), pv.Normal(nn.Linear(1, 1), 1.0), pv.Normal(nn.Linear(1, 1), scale=math.exp(-6.9))
    )
    x = torch.full((2, 1), 3.0)
    with torch.no_grad():
        for layer, weight, bias in ((program.likelihood.net, 1.0, 0.0), (program.posterior.net, 0.0, 5000.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    found = refine(program, x, steps=5, particles=10, compile="off")
    assert found.elbo.value.isfinite().all()
    assert as_pair(program).layout.latents == ("z",)


def test_a_guide_that_fails_for_a_datum_leaves_the_others():
    x, c = torch.full((5, 1), 2.0), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])

    class Lost(Spoiled):
        def guide(self, x, c):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0).expand([len(x)]))

    with pytest.raises(IncompleteError, match="ELBO of row 2 is nan") as caught:
        refine(Lost(), (x, c), steps=20, particles=2000, compile="off")
    assert caught.value.result.before.failed.tolist() == [False, False, True, False, False]
    assert not caught.value.result.elbo.failed[[0, 1, 3, 4]].any()
    with pytest.raises(IncompleteError) as caught:
        pv.gaps(Lost(), (x, c), steps=20, particles=2000, settings=pv.Annealing(2, 5, 2), compile="off")
    assert caught.value.result.each["amortisation"].isfinite().sum() == 4


def test_steps_that_are_too_long_are_told():
    program = LinearGaussian.random(0)
    found = refine(program, program.draw(5, seed=0), steps=30, rate=100.0, particles=50, compile="off")
    assert any("the guide has a higher ELBO for 100.0%" in text for text in found.elbo.warnings)
    assert any("effective sample size is below 5" in text for text in found.bound.warnings)
    with pytest.raises(ValueError, match="family: expected a function such as local_full_covariance, got 'full'"):
        refine(program, program.draw(5, seed=0), "full")
    with pytest.raises(ValueError, match=r"steps must be a whole number, got 10\.0"):
        refine(program, program.draw(5, seed=0), steps=10.0)


def test_khat_of_refined_posteriors_tells_good_proposals_from_bad_ones():
    program = LinearGaussian.random(0, widen=0.3)
    x = program.draw(6, seed=0)
    options = {"particles": 500, "chunk": 300, "compile": "off"}
    good = refine(program, x, local_full_covariance, steps=300, **options).bound
    bad = refine(program, x, local_full_covariance, steps=1, rate=1e-6, **options).bound
    assert good.diagnostics["khat"].max() < 0.5 < bad.diagnostics["khat"].median()
    assert not good.warnings
    assert any("k-hat is above 0.63" in text for text in bad.warnings)
    few = refine(program, x, steps=1, particles=10, compile="off").bound
    assert few.diagnostics["khat"].isnan().all()
