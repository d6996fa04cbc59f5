"""Estimators: the gradient of a bound, against gradients in closed form."""

import math

import pytest
import torch
from exact import LinearGaussian
from programs import case

from ppl_vae.bounds import elbo, iwae
from ppl_vae.estimators import doubly, pathwise, require_reparameterised
from ppl_vae.pairs import as_pair
from ppl_vae.traces import log_terms


def gradient(value, program):
    """The gradient of a scalar as one vector."""
    parts = torch.autograd.grad(value, list(program.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


@pytest.mark.parametrize(("estimator", "kl"), [(pathwise, "sampled"), (pathwise, "analytic"), (doubly, "sampled")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_the_elbo_is_unbiased(seed, estimator, kl):
    """In the mean over draws it is that of the closed form, through model and guide alike."""
    program = LinearGaussian.random(seed, widen=1.2)
    x = program.draw(1, seed=seed)
    exact = gradient(program.elbo(x).sum(), program)
    torch.manual_seed(seed)
    values = estimator(elbo, as_pair(program), x.expand(400, -1), particles=20, kl=kl)
    draws = torch.stack([gradient(value, program) for value in values])
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all())
    assert float(error.norm() / exact.norm()) < 0.1, "too noisy to tell"


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("bound", [elbo, iwae])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_exact_guide_gives_the_exact_gradient(seed, bound, particles):
    """With the posterior as guide, whatever the parameters, log w is log p(x), draw by draw."""
    program = LinearGaussian.random(seed, guide="exact")
    x = program.draw(4, seed=seed)
    ours = gradient(pathwise(bound, as_pair(program), x, particles=particles).sum(), program)
    torch.testing.assert_close(ours, gradient(program.log_evidence(x).sum(), program), rtol=1e-8, atol=1e-8)


def test_the_gradient_of_the_importance_weighted_bound_is_its_own():
    """By finite differences of the same draws, so that no path is left out or counted twice."""
    program = LinearGaussian.random(0, widen=1.3)
    x, pair = program.draw(3, seed=0), as_pair(program)

    def value():
        torch.manual_seed(0)
        return pathwise(iwae, pair, x, particles=6).sum()

    ours, step, numeric = gradient(value(), program), 1e-6, []
    for p in program.parameters():
        for i in range(p.numel()):
            with torch.no_grad():
                p.view(-1)[i] += step
                above = value()
                p.view(-1)[i] -= 2 * step
                numeric.append((above - value()) / (2 * step))
                p.view(-1)[i] += step
    torch.testing.assert_close(ours, torch.stack(numeric), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", [pathwise, doubly])
def test_beta_is_inside_the_weight(estimator):
    """The bound is taken of log p(x | z) - beta * rate, not of the weights' bound afterwards."""
    program = LinearGaussian.random(0)
    x, pair = program.draw(3, seed=0), as_pair(program)
    torch.manual_seed(0)
    ours = estimator(iwae, pair, x, particles=6, beta=0.3)
    torch.manual_seed(0)
    terms = log_terms(pair, x, particles=6)
    torch.testing.assert_close(ours, iwae(terms.likelihood - 0.3 * (terms.posterior - terms.prior)))
    assert not torch.allclose(ours, iwae(terms.weight()))


@pytest.mark.parametrize("name", ["bernoulli", "category"])
def test_no_pathwise_gradient_through_a_discrete_latent(name):
    c = case(name)
    with pytest.raises(ValueError, match=r"site 'z'.*no reparameterised sampler.*Trace_ELBO.*relaxed"):
        pathwise(elbo, c.pair, *c.batch, particles=2)
    require_reparameterised(log_terms(case("one level").pair, *c.batch))
