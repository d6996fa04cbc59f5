"""The mean-field posterior: a diagonal normal with mean and scale from the net, and draws that carry gradients."""

import torch
from torch.distributions import Independent, Normal

import ppl_vae as pv


def test_the_mean_field_posterior_is_a_diagonal_normal():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, z = pv.MLP(6, 8, 2 * 3), torch.randn(4, 6), torch.randn(4, 3)
    law = pv.mean_field(net)(x)
    loc, raw = net(x).chunk(2, dim=-1)
    reference = Independent(Normal(loc, (7 * (raw / 7).tanh()).exp()), 1)
    assert (law.batch_shape, law.event_shape) == ((4,), (3,))
    torch.testing.assert_close(law.log_prob(z), reference.log_prob(z))


def test_its_draws_are_reparameterised():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = pv.MLP(6, 2 * 3)
        law = pv.mean_field(net)(torch.randn(4, 6))
        assert law.has_rsample
        z = law.rsample()
    eps = ((z - law.mean) / law.stddev).detach()
    (gradient,) = torch.autograd.grad(z.sum(), net[0].bias, retain_graph=True)
    (by_hand,) = torch.autograd.grad((law.mean + law.stddev * eps).sum(), net[0].bias)  # z = μ + σ ε
    torch.testing.assert_close(gradient, by_hand)
