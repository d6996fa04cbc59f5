"""The ELBO taken apart: parts by quadrature, identities, what cannot be told apart, and curves over β."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Discrete, HandlerMask, Nested, SharedLatent, TwoLevel
from small import conditions, cvae, pixels, same, vae, weights
from torch import nn
from torch.distributions import kl_divergence

import ppl_vae as pv
from ppl_vae.decomposition import decompose, rate_distortion
from ppl_vae.pairs import Pair
from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


class Placed(nn.Module):
    """z ~ N(0, I) and q(z | x) = N(x, scale²), so that data say where posteriors are."""

    def __init__(self, scale=0.3):
        super().__init__()
        self.scale = scale

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, self.scale).to_event(1))


def by_quadrature(program, x, side=401, reach=7.0):
    """Parts of the rate for two latents, over a grid."""
    axis = torch.linspace(-reach, reach, side).double()
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0])
    with torch.no_grad():
        each = program(x, grid)  # log q(z | x_n), (cells, N)
        prior = dist.Normal(torch.zeros(()).double(), 1.0).log_prob(grid).sum(-1)
        joint = each.logsumexp(1) - math.log(len(x))
    density = joint.exp().reshape(side, side)
    sides = [(density.sum(k) * cell).clamp_min(1e-300) for k in (1, 0)]
    product = (sides[0].log()[:, None] + sides[1].log()).flatten()
    area = cell**2

    def mean(value):
        return float((joint.exp() * value).sum() * area)

    information = float((each.exp() * (each - joint[:, None])).nan_to_num(0.0).sum() * area) / len(x)
    return information, mean(joint - prior), mean(joint - product), mean(product - prior)


def check(found, expected, sigmas=4.5):
    for name, value in expected.items():
        part = getattr(found, name)
        assert abs(part.mean - value) < sigmas * part.stderr + 1e-6, name
        assert part.stderr < 0.05


NAMES = ("mutual_information", "aggregated_kl", "total_correlation", "dimension_wise")


# ---- closed forms
def test_the_parts_are_those_of_quadrature():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.8], [-1.0, -1.2], [1.5, 1.0], [0.2, -0.3]]).double()
    expected = by_quadrature(lambda x, z: dist.Normal(x, 0.3).to_event(1).log_prob(z[:, None]), x)
    found = decompose(Placed(), x, 3000, chunk=700, batch_size=2)
    check(found, dict(zip(NAMES, expected, strict=True)))
    assert found.total_correlation.mean > 0.3
    assert found.reason == ""
    kl = kl_divergence(dist.Normal(x, 0.3), dist.Normal(torch.zeros(()).double(), 1.0))
    distortion = 2 * math.log(0.5 * math.sqrt(2 * math.pi)) + 2 * 0.3**2 / 0.5
    check(found, {"rate": float(kl.sum(-1).mean()), "reconstruction": -distortion})


@pytest.mark.parametrize("guide", ["mean-field", "exact"])
def test_a_linear_model_against_quadrature(guide):
    program = LinearGaussian.random(3, latent=2, width=3, guide=guide)
    x = program.draw(6, seed=0)
    law = program.guide_law(x)
    expected = dict(zip(NAMES, by_quadrature(lambda x, z: law.log_prob(z[:, None]), x), strict=True))
    found = decompose(program, x, 3000)
    apart = guide == "mean-field"
    check(found, {n: v for n, v in expected.items() if apart or n in NAMES[:2]})
    check(found, {"rate": float(program.rate(x).mean().detach()), "elbo": float(program.elbo(x).mean().detach())})
    if not apart:
        assert found.total_correlation is None
        assert found.dimension_wise is None
        assert "the entries of MultivariateNormal are not independent" in str(found)


def test_errors_are_those_of_repetition():
    program = LinearGaussian.random(0)
    x = program.draw(30, seed=0)
    runs = [decompose(program, x, 3, seed=n) for n in range(60)]
    for name in ("elbo", "reconstruction", "rate", *NAMES):
        values = torch.tensor([getattr(run, name).mean for run in runs])
        told = torch.tensor([getattr(run, name).stderr for run in runs])
        assert float(told.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.35), name


def test_a_guide_that_is_the_prior_has_no_parts():
    program = Pair(Placed().model, lambda x: Placed(1.0).guide(torch.zeros_like(x)))
    found = decompose(program, torch.randn(20, 3))
    for name in ("rate", *NAMES):
        assert getattr(found, name).mean == pytest.approx(0, abs=1e-5)


def test_information_is_at_most_log_n_and_is_that_for_codes_far_apart():
    x = 100.0 * torch.arange(8.0)[:, None]
    found = decompose(Placed(0.1), x, 5)
    assert found.mutual_information.mean == pytest.approx(math.log(8), abs=1e-6)
    assert decompose(Placed(0.5), torch.randn(30, 2), 5).mutual_information.mean < math.log(30)


@pytest.mark.parametrize(("particles", "batch_size", "chunk"), [(5, 100, 100), (5, 7, 2), (5, 1, 3)])
def test_the_identities_hold_whatever_the_chunks(particles, batch_size, chunk):
    x = pixels(20)
    found = decompose(vae(), x, particles, batch_size=batch_size, chunk=chunk)
    assert found.elbo.mean == pytest.approx(found.reconstruction.mean - found.rate.mean, abs=1e-9)
    assert found.rate.mean == pytest.approx(found.mutual_information.mean + found.aggregated_kl.mean, abs=1e-9)
    parts = found.total_correlation.mean + found.dimension_wise.mean
    assert found.aggregated_kl.mean == pytest.approx(parts, abs=1e-9)
    bound = pv.elbo(vae(), x, 4000)
    error = math.hypot(found.elbo.stderr, bound.monte_carlo_stderr)
    assert abs(found.elbo.mean - bound.mean) < 5 * error
    assert found.size == 20


def test_one_draw_has_no_error():
    found = decompose(vae(), pixels(10), 1)
    assert math.isnan(found.rate.stderr)
    assert "log N = 2.303" in str(found)


# ---- programs of other shapes
def test_several_latents_are_taken_together():
    x = torch.randn(8, 4)
    found = decompose(TwoLevel(), x, 400)
    assert found.total_correlation is None
    assert "several latents, ['h', 'z']" in found.reason
    assert found.rate.mean == pytest.approx(found.mutual_information.mean + found.aggregated_kl.mean, abs=1e-9)
    assert 0 < found.mutual_information.mean < math.log(8)
    assert "total correlation" not in str(found)


def test_a_latent_in_an_inner_plate():
    """Two entries as a plate are two entries as an event."""

    class Plated(Placed):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1), pyro.plate("entries", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1), pyro.plate("entries", 2, dim=-2):
                pyro.sample("z", dist.Normal(x.T, self.scale))

    x = torch.randn(6, 2)
    found, flat = decompose(Plated(), x, 1500), decompose(Placed(), x, 1500)
    for name in ("rate", "reconstruction", *NAMES):
        a, b = getattr(found, name), getattr(flat, name)
        assert abs(a.mean - b.mean) < 4.5 * math.hypot(a.stderr, b.stderr), name
    assert "several latents" in decompose(Nested(), torch.randn(6, 4)).reason


def test_a_prior_of_each_datum_leaves_the_information_alone():
    x = pixels(12)
    found = decompose(cvae(), (x, conditions(x)), 200)
    assert found.aggregated_kl is None
    assert found.total_correlation is None
    assert 0 < found.mutual_information.mean <= math.log(12)
    assert "each datum has a prior of its own" in str(found)


def test_discrete_latents_by_enumeration():
    program, x = Discrete(), torch.randn(7, 4)
    with torch.no_grad():
        q = torch.sigmoid(program.encoder(x)).double()  # (N, 2), P(z_j = 1)
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2).double()
        each = (states * q[:, None] + (1 - states) * (1 - q[:, None])).prod(-1)  # (N, 4)
        joint, p = each.mean(0), torch.sigmoid(program.logits).double()
        prior = (states * p + (1 - states) * (1 - p)).prod(-1)
        sides = q.mean(0)
        product = (states * sides + (1 - states) * (1 - sides)).prod(-1)
    expected = {
        "mutual_information": float((each * (each / joint).log()).sum() / 7),
        "aggregated_kl": float((joint * (joint / prior).log()).sum()),
        "total_correlation": float((joint * (joint / product).log()).sum()),
        "dimension_wise": float((joint * (product / prior).log()).sum()),
    }
    check(decompose(program, x, 2000), expected)


def test_a_flow_is_inverted_at_other_data():
    posterior = pv.Flowed(pv.mean_field(pv.MLP(12, 4)), *pv.planar(2, depth=2))
    program = pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 12), scale=0.5), posterior)
    found = decompose(program, pixels(6), 50)
    assert "not independent" in found.reason
    assert found.mutual_information.mean <= math.log(6) + 1e-4


def test_the_seed_decides_and_the_callers_stream_is_left_alone():
    x, state = pixels(10), torch.get_rng_state()
    first, again, other = (decompose(vae(), x, seed=s).rate.mean for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other


def points():
    return pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), scale=1.0), pv.Point(pv.MLP(4, 2)))


def extra(x):
    with pyro.plate("data", len(x), dim=-1):
        u = pyro.sample("u", dist.Normal(x, 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(u, 1.0).to_event(1))


def far(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.where(x < 9, float("nan")), 1.0).to_event(1))


def test_what_is_refused():
    x = torch.randn(5, 4)
    wrong = torch.zeros(5, 2)
    wrong[3] = 9.0
    density = pv.Density(pv.Normal(pv.Constant(torch.zeros(4), learned=True), 1.0))
    for call, message in (
        (lambda: decompose(vae(), pixels(5), 0), "particles must be at least 1, got 0"),
        (lambda: decompose(vae(), pixels(5), chunk=0), "chunk must be at least 1, got 0"),
        (lambda: decompose(density, x), "nothing is latent"),
        (lambda: decompose(points(), x), "the guide draws a point"),
        (lambda: decompose(HandlerMask(), x), "site 'z': it is masked"),
        (lambda: decompose(SharedLatent(), x), "'w' is outside the data plate"),
        (lambda: decompose(Pair(Placed().model, extra), x), "the guide also draws 'u'"),
        (lambda: decompose(Pair(Placed().model, far), wrong, batch_size=3), "draws of row 3 are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- rate and distortion
def test_a_low_beta_buys_a_low_distortion_at_a_high_rate():
    state = torch.get_rng_state()
    x = pixels(200)
    options = {"epochs": 8, "device": "cpu", "progress": False, "compile": "off", "batch_size": 25}
    options["optimizer"] = partial(torch.optim.Adam, lr=0.02)
    begun = []

    def make():
        program = pv.VAE(
            pv.StandardNormal(2), pv.Normal(pv.MLP(2, 16, 12), scale=0.2), pv.mean_field(pv.MLP(12, 16, 4))
        )
        begun.append(weights(program))
        return program

    found = rate_distortion(make, x[:150], x[150:], [0.1, 8.0], particles=5, valid=x[:20], **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same(begun[0], other) for other in begun[1:])
    low, high = found.points
    assert low.rate.mean > high.rate.mean + 0.5
    assert low.distortion.mean < high.distortion.mean
    for point in found.points:
        assert point.elbo.mean == pytest.approx(-(point.rate.mean + point.distortion.mean), abs=1e-6)
    again = pv.elbo(low.program, x[150:], 5)
    assert again.mean == pytest.approx(low.elbo.mean)
    lines = str(found).splitlines()
    assert lines[0].split() == ["beta", "rate", "distortion", "ELBO"]
    assert [line.split()[0] for line in lines[1:]] == ["0.1", "8"]


def test_curves_that_are_refused():
    x, program = pixels(10), vae()
    options = {"epochs": 1, "device": "cpu", "progress": False, "compile": "off"}
    for call, message in (
        (lambda: rate_distortion(vae, x, x, []), "betas: expected one or more"),
        (lambda: rate_distortion(vae, x, x, [1.0, -1.0]), "beta must be finite and not negative, got -1.0"),
        (lambda: rate_distortion(vae, x, x, [1.0], particles=0), "particles must be at least 1, got 0"),
        (lambda: rate_distortion(vae, x, x, [1.0], objective=pv.ELBO()), "objective: each point"),
        (lambda: rate_distortion(lambda: program, x, x, [1.0, 2.0], **options), "gave the same program twice"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
