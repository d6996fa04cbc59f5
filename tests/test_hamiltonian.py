"""Leapfrog steps on a posterior: volumes, reversibility, unbiased weights, tighter bounds, one draw's density."""

import copy
import math

import pyro
import pytest
import torch
from exact import LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from small import LATENT, WIDTH, conditions, fit, pixels
from test_steps import agree, update_of
from torch import nn
from torch.autograd.functional import jacobian

import ppl_vae as pv
from ppl_vae.discrete import Constant, OneHotCategorical
from ppl_vae.hamiltonian import Hamiltonian, Joint, leapfrog
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def warped(z):
    """A density that is no Gaussian."""
    return -0.5 * z.square().sum(-1) + (1.3 * z).sin().sum(-1) + 0.3 * z[..., 0] * z[..., -1]


def spread(steps, heat):
    return 1 + heat * (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64).square())


STEP = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_it_keeps_volumes(heat):
    """Of draws and noise together, with tempering too."""

    def flow(start):
        return torch.cat(leapfrog(warped, start[:3], start[3:], step_size=STEP, spread=spread(4, heat)))

    for _ in range(3):
        found = jacobian(flow, torch.randn(6, dtype=torch.float64))
        assert float(found.det()) == pytest.approx(1, abs=1e-10)
        assert float((found - torch.eye(6)).abs().max()) > 0.5  # it does move


def test_it_can_be_reversed():
    z, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    end, momentum = leapfrog(warped, z, noise, step_size=STEP, spread=spread(6, 0.0))
    back, start = leapfrog(warped, end, -momentum, step_size=STEP, spread=spread(6, 0.0))
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(start, -noise)


def test_small_steps_keep_energy():
    z, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    losses = []
    for refine in (1, 2):
        end, momentum = leapfrog(warped, z, noise, step_size=STEP / refine, spread=spread(6 * refine, 0.0))
        before, after = (0.5 * m.square().sum(-1) - warped(at) for at, m in ((z, noise), (end, momentum)))
        losses.append(float((after - before).detach().abs().mean()))
    assert losses[1] < losses[0] / 3  # of second order


class Exact(nn.Module):
    """The reference pair with a poor guide, refined or not."""

    def __init__(self, steps=0, **options):
        super().__init__()
        self.pair, self.x = LinearGaussian.reference()
        self.pair.requires_grad_(False)
        base = pv.Normal(Constant(torch.tensor([0.5, -0.6], dtype=torch.float64)), 0.5)
        self.posterior = base
        if steps:
            options = {"step_size": 0.15} | options
            self.posterior = Hamiltonian(base, self.log_joint, latent=2, steps=steps, **options).double()

    def log_joint(self, z, x):
        likelihood = torch.distributions.Normal(z @ self.pair.weight.T + self.pair.mean, self.pair.variance**0.5)
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + likelihood.log_prob(x).sum(-1)

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x).expand((len(x),)))


LOG_P = -4.363660541059312


def weights(program, particles):
    with torch.no_grad():
        return log_terms(as_pair(program), program.x, particles=particles).weight()[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_weights_are_unbiased(steps, temperature):
    ratio = (weights(Exact(steps, temperature=temperature), 200_000) - LOG_P).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.02
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * error)


def test_the_bound_is_tighter_than_the_bases():
    bounds = [weights(Exact(steps), 200_000) for steps in (0, 1, 3)]
    means = [float(w.mean()) for w in bounds]
    errors = [float(w.std()) / math.sqrt(len(w)) for w in bounds]
    assert means[0] + 5 * (errors[0] + errors[1]) < means[1]
    assert means[1] + 5 * (errors[1] + errors[2]) < means[2] < LOG_P + 5 * errors[2]


def test_evaluation_with_gradients_off_gives_the_same():
    program = Exact(2)
    with seeded(1), torch.no_grad():
        off = log_terms(as_pair(program), program.x, particles=3)
    with seeded(1):
        on = log_terms(as_pair(program), program.x, particles=3)
    torch.testing.assert_close(off.weight(), on.weight().detach())
    assert not off.samples["z"].requires_grad
    assert on.samples["z"].requires_grad
    estimate = pv.log_likelihood(program, program.x, particles=1000)
    assert float(estimate.value) == pytest.approx(LOG_P, abs=5 * float(estimate.stderr))


def test_gradients_are_those_of_the_bound():
    """Of the step sizes and of the base, against finite differences on the same noise."""
    program = Exact(2, temperature=2.0)
    program.posterior.base.net = Constant(torch.tensor([0.5, -0.6], dtype=torch.float64), learned=True)
    parameters = [p for p in program.posterior.parameters() if p.requires_grad]
    assert len(parameters) == 3

    def value():
        with seeded(2):
            return log_terms(as_pair(program), program.x, particles=5).weight().mean()

    gradients = torch.autograd.grad(value(), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        for i in range(p.numel()):
            ends = []
            for shift in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[i] += shift
                    ends.append(float(value()))
                    p.view(-1)[i] -= shift
            assert float(gradient.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_particles_are_drawn_apart():
    program = Exact(2)
    law = program.posterior(program.x).expand((4, 3))
    z = law.rsample()
    assert z.shape == (4, 3, 2)
    assert len({round(float(v), 9) for v in z.detach().flatten()}) == 24
    assert law.log_prob(z).shape == (4, 3)
    assert law.rsample((5,)).shape == (5, 4, 3, 2)


def test_the_density_is_that_of_its_own_draw_alone():
    law = Exact(2).posterior(LinearGaussian.reference()[1])
    with pytest.raises(ValueError, match="known at its own latest draw alone"):
        law.log_prob(torch.zeros(2))
    z = law.rsample()
    assert law.log_prob(z).isfinite()
    for other in (z.clone(), z.detach()):
        with pytest.raises(ValueError, match="known at its own latest draw alone"):
            law.log_prob(other)
    with pytest.raises(ValueError, match="known at its own latest draw alone"):
        law.expand((3,)).log_prob(z)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: pv.IWAE(3, estimator=pv.doubly), "own latest draw alone.*pathwise"),
        (lambda: pv.ELBO(kl="analytic"), "no closed form between HamiltonianLaw and Normal"),
    ],
)
def test_what_it_cannot_be_used_for_says_so(objective, message):
    vae, x = small_vae(), pixels(6)
    with pytest.raises(ValueError, match=message):
        objective()(as_pair(vae), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"step_size": 0.0}, "step_size must lie within"),
        ({"step_size": math.nan}, "step_size must lie within"),
        ({"temperature": 0.5}, "temperature must be finite and at least 1, got 0.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Hamiltonian(pv.mean_field(pv.MLP(2, 4)), warped, **({"latent": 2} | options))


def batch_normed(inputs, outputs):
    return pv.MLP(inputs, 8, outputs, norm="batch")


class Energy(nn.Module):
    """A log p(x, z) that is a module, with a net made for it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, x):
        return -self.net(z).square().sum(-1)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Joint(pv.StandardNormal(2), pv.Bernoulli(batch_normed(2, 8))), "likelihood"),
        (lambda: Joint(pv.conditional_normal(batch_normed(3, 4)), pv.Bernoulli(pv.MLP(2, 8))), "prior"),
        (lambda: Hamiltonian(pv.mean_field(pv.MLP(8, 4)), Energy(batch_normed(2, 8)), latent=2), "log_joint"),
    ],
)
def test_data_must_not_mix_in_the_joint(make, argument):
    with pytest.raises(ValueError, match=f"{argument}: it holds a BatchNorm1d at 'net.1.net'.* use layer norm"):
        make()


def test_layer_norm_does_not_mix_and_the_base_may():
    base, likelihood = pv.mean_field(batch_normed(8, 4)), pv.Bernoulli(pv.MLP(2, 8, 8, norm="layer"))
    posterior = Hamiltonian(base, Joint(pv.StandardNormal(2), likelihood), latent=2)
    assert posterior(torch.ones(5, 8)).rsample().isfinite().all()
    Hamiltonian(base, Energy(pv.MLP(2, 8, 8, norm="layer")), latent=2)


@pytest.mark.parametrize(
    "base", [pv.mean_field(pv.MLP(4, 6)), OneHotCategorical(pv.MLP(4, 2))], ids=["3 latents", "discrete"]
)
def test_a_base_that_does_not_fit(base):
    with pytest.raises(ValueError, match=r"base must have reparameterised draws of shape \(2,\), got"):
        Hamiltonian(base, warped, latent=2)(torch.zeros(3, 4))


def test_settings_are_where_they_start():
    posterior = Hamiltonian(pv.mean_field(pv.MLP(2, 4)), warped, 2, steps=4, step_size=0.2, temperature=4.0)
    torch.testing.assert_close(posterior.step_size, torch.full((2,), 0.2))
    torch.testing.assert_close(posterior.spread, 1 + (1 - torch.tensor([0, 1, 4, 9, 16]) / 16))
    assert "log_heat" not in dict(Hamiltonian(pv.mean_field(pv.MLP(2, 4)), warped, 2).named_parameters())


# ---- inside a program
def small_vae(**options):
    prior, likelihood = pv.StandardNormal(LATENT), pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale())
    base = pv.mean_field(pv.MLP(WIDTH, 16, 2 * LATENT))
    return pv.VAE(prior, likelihood, Hamiltonian(base, Joint(prior, likelihood), LATENT, steps=2, **options))


def test_nothing_is_registered_twice_and_copies_stand_alone():
    vae = small_vae()
    names = list(vae.state_dict())
    assert sum(name.startswith("posterior.") for name in names) == 5  # of the base, and the step sizes
    assert len({p.data_ptr() for p in vae.parameters()}) == len([*vae.parameters()])
    again = copy.deepcopy(vae)
    assert again.posterior.log_joint.likelihood is again.likelihood
    assert again.posterior.log_joint.prior is again.prior


def test_the_joint_density_of_conditionals():
    x = pixels(6)
    vae = small_vae()
    z = torch.randn(4, 6, LATENT)
    expected = pv.log_joint(as_pair(vae), {"z": z}, x)
    torch.testing.assert_close(vae.posterior.log_joint(z, x), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_trains(temperature):
    vae = small_vae(temperature=temperature)
    before = [p.detach().clone() for p in vae.parameters()]
    run = fit(vae, pixels(), epochs=1, batch_size=48, compile="off", objective=pv.ELBO(2))
    assert run.step == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    assert pv.log_likelihood(vae, pixels(8), particles=5).value.isfinite().all()
    assert pv.reconstruct(vae, pixels(8)).shape == (8, WIDTH)


@pytest.mark.parametrize(
    "goal", [lambda: pv.ELBO(2), lambda: pv.IWAE(3), Trace_ELBO], ids=["elbo", "iwae", "pyro"]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_captured_and_as_written(interpreted, goal, temperature):
    pair, x = as_pair(small_vae(temperature=temperature)), pixels(6)
    inspect(pair, (x,))
    agree(update_of(pair, goal()), x)
    assert len(interpreted) == 1


def test_with_a_condition():
    c = conditions(pixels(), "vector")

    def joined(first, *sizes):
        return pv.Concat(pv.MLP(first + 3, *sizes), None, None)

    prior = pv.conditional_normal(pv.MLP(3, 2 * LATENT))
    likelihood = pv.Normal(joined(LATENT, 16, WIDTH), 0.3)
    base = pv.mean_field(joined(WIDTH, 16, 2 * LATENT))
    cvae = pv.CVAE(prior, likelihood, Hamiltonian(base, Joint(prior, likelihood), LATENT))
    assert fit(cvae, (pixels(), c), epochs=1, batch_size=48, compile="off", objective=pv.IWAE(2)).step == 2


def test_pyros_own_inference_takes_it():
    vae, x = small_vae(), pixels(6)
    with pyro.get_param_store().scope():
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert all(math.isfinite(svi.step(x)) for _ in range(2))
