"""The Bernoulli likelihood: densities from logits, extremes, and the start from the data's mean."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import ppl_vae as pv


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("lead", [(5,), (7, 5)])
@pytest.mark.parametrize("event", [(6,), (1, 2, 3)])
def test_the_density_is_the_bernoullis(lead, event):
    net = nn.Sequential(pv.MLP(2, 8, 6), nn.Unflatten(-1, event))
    z, x = torch.randn(*lead, 2), torch.randint(0, 2, (*lead, *event)).float()
    law = pv.Bernoulli(net, event_dim=len(event))(z)
    assert (law.batch_shape, law.event_shape) == (lead, event)
    chance = torch.sigmoid(net(z)).detach().double().numpy()
    by_hand = stats.bernoulli(chance).logpmf(x.numpy()).reshape(*lead, -1).sum(-1)
    np.testing.assert_allclose(law.log_prob(x).detach().numpy(), by_hand, rtol=1e-5)
    torch.testing.assert_close(law.mean, torch.sigmoid(net(z)))


@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_extreme_logits_give_finite_densities_and_gradients(extreme):
    net = nn.Linear(2, 6)
    nn.init.constant_(net.bias, extreme)
    value = pv.Bernoulli(net)(torch.randn(4, 2)).log_prob(torch.eye(6)[:4]).sum()
    value.backward()
    assert value.isfinite()
    assert net.bias.grad.isfinite().all()


@pytest.mark.parametrize("event", [(4,), (1, 2, 2)])
def test_before_training_the_logits_are_those_of_the_clipped_mean(event):
    x = torch.tensor([[0.0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1]]).reshape(4, *event)
    flat = pv.MLP(2, 8, 4)
    bernoulli = pv.Bernoulli(nn.Sequential(flat, nn.Unflatten(-1, event)), event_dim=len(event))
    bernoulli.start_from(x)
    nn.init.zeros_(flat[-1].weight)
    mean = bernoulli(torch.randn(3, 2)).mean
    wanted = torch.tensor([0.001, 0.999, 0.25, 0.999]).reshape(event)
    torch.testing.assert_close(mean, wanted.expand(3, *event))


def test_a_net_of_another_width_is_refused():
    with pytest.raises(ValueError, match="gives 5 numbers, the data need 4"):
        pv.Bernoulli(pv.MLP(2, 5)).start_from(torch.ones(3, 4))
