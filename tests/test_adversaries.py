"""Critics: what each step trains, what they tell, and that both steps run captured as they run as written."""

import warnings
from functools import partial

import pytest
import torch
from small import LATENT, fit, pixels, vae, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.adversaries import Adversary, Critic
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import run_pair

X = pixels(96)


def critic(width=LATENT):
    with seeded(4):
        return pv.MLP(width, 16, 1)


def owners(value, **modules):
    """Which modules a value has a gradient for."""
    named = {name: [*m.parameters()] for name, m in modules.items()}
    flat = [p for ps in named.values() for p in ps]
    found = iter(torch.autograd.grad(value, flat, allow_unused=True))
    return {name for name, ps in named.items() if sum(next(found) is not None for _ in ps)}


@pytest.mark.parametrize("against", ["product", "prior"])
def test_who_is_moved_by_what(against):
    program, penalty = vae(), Adversary(2.0, critic(), against)
    pair = as_pair(program)
    with seeded(0):
        value = pv.ELBO(penalties=[penalty])(pair, X[:8]).sum()
    modules = {"posterior": program.posterior, "likelihood": program.likelihood, "critic": penalty.critic}
    assert owners(value, **modules) == {"posterior", "likelihood"}
    with seeded(0):
        told = Critic(penalty)(pair, X[:8])
    assert told.shape == (8,)
    assert owners(told.sum(), **modules) == {"critic"}


def test_the_penalty_is_the_critics_log_ratio():
    program, penalty = vae(), Adversary(2.0, critic())
    pair = as_pair(program)
    with seeded(0):
        value = pv.ELBO(3, penalties=[penalty])(pair, X[:8])
    with seeded(0):
        plain = pv.ELBO(3)(pair, X[:8])
    with seeded(0):
        _, guide = run_pair(pair, (X[:8],), 3)
    torch.testing.assert_close(plain - value, 2 * penalty.critic(guide["z"]["value"])[..., 0].mean(0))


def test_the_critics_value_is_the_likelihood_of_telling():
    """At even odds it is 2 log 1/2; the two draws are the guide's and, for a prior far off, far from it."""
    program, penalty = vae(), Adversary(1.0, nn.Linear(LATENT, 1), "prior")
    nn.init.zeros_(penalty.critic.weight), nn.init.zeros_(penalty.critic.bias)
    told = Critic(penalty)(as_pair(program), X[:8])
    torch.testing.assert_close(told, torch.full((8,), -2 * torch.tensor(2.0).log().item()))
    program.prior.loc.fill_(100.0)
    nn.init.constant_(penalty.critic.weight, -1.0)
    nn.init.constant_(penalty.critic.bias, 50.0)
    assert float(Critic(penalty)(as_pair(program), X[:8]).detach().min()) > -1e-6


def test_a_trained_critic_estimates_the_divergence():
    """Of draws N(m, 1) from the prior N(0, 1): m² / 2 per dimension, which a linear critic can tell."""
    program = vae()
    program.posterior = pv.Normal(nn.Linear(X.shape[1], LATENT), 1.0)
    with torch.no_grad():
        program.posterior.net.weight.zero_()
        program.posterior.net.bias.copy_(torch.tensor([1.0, -0.5]))
    program.requires_grad_(False)
    program.likelihood.scale.raw.requires_grad_(True)  # something is to be trained
    penalty = Adversary(1.0, nn.Linear(LATENT, 1), "prior", optimizer=partial(torch.optim.Adam, lr=5e-2))
    big = X.repeat(20, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not registered in the param store")
        fit(program, big, objective=pv.ELBO(penalties=[penalty]), epochs=20, batch_size=480)
        with torch.no_grad(), seeded(1):
            model, guide = run_pair(as_pair(program), (big,), 20)
    with torch.no_grad():
        estimate = float(penalty(model, guide, (big,)).mean())
    assert estimate == pytest.approx((1.0 + 0.25) / 2, abs=0.08)


@pytest.mark.parametrize("against", ["product", "prior"])
def test_captured_and_as_written(interpreted, against):
    ends = []
    for how in ("off", "require"):
        program, penalty = vae(), Adversary(0.5, critic(), against)
        goal = pv.ELBO(beta=0.5, penalties=[penalty])
        run = fit(program, X, X[:32], objective=goal, epochs=3, batch_size=32, compile=how)
        assert [update.name for update in run.updates] == ["objective", "the critic's objective"]
        ends.append(([row["train"] for row in run.history], weights(program) | weights(penalty)))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-4)
    for name, theirs in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], theirs, rtol=1e-3, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="against must be 'product' or 'prior', got 'data'"):
        Adversary(1.0, critic(), "data")
    with pytest.raises(ValueError, match="weight must be finite and not negative, got -1"):
        Adversary(-1.0, critic())
    with pytest.raises(ValueError, match="penalties have pathwise gradients"):
        pv.ELBO(estimator=pv.doubly, penalties=[Adversary(1.0, critic())])
