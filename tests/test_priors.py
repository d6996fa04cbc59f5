"""Priors: the standard normal ignores its context, the conditional one follows it."""

import pytest
import torch
from scipy import stats

import ppl_vae as pv


@pytest.mark.parametrize("context", [(), (torch.zeros(5, 2),), (torch.zeros(5), torch.ones(5, 3))])
def test_the_standard_normal_whatever_the_context(context):
    prior = pv.StandardNormal(4)
    law = prior(*context)
    assert law.batch_shape == ()
    assert law.event_shape == (4,)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = torch.from_numpy(stats.norm.logpdf(z.numpy()).sum(-1))
    torch.testing.assert_close(law.log_prob(z), by_hand)
    assert not list(prior.parameters())


def test_it_moves_with_its_module():
    assert pv.StandardNormal(2).double()().sample().dtype == torch.float64


@pytest.mark.parametrize("latent", [0, -3])
def test_a_prior_needs_a_latent(latent):
    with pytest.raises(ValueError, match=f"latent must be at least 1, got {latent}"):
        pv.StandardNormal(latent)


@pytest.mark.parametrize("lead", [(5,), (3, 5)])
def test_the_conditional_normal_is_the_nets_mean_and_scale(lead):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, c = pv.MLP(3, 8, 2 * 2), torch.randn(*lead, 3)
    law = pv.conditional_normal(net)(c)
    loc, raw = net(c).chunk(2, dim=-1)
    assert (law.batch_shape, law.event_shape) == (lead, (2,))
    torch.testing.assert_close(law.mean, loc)
    torch.testing.assert_close(law.stddev, (7 * (raw / 7).tanh()).exp())
