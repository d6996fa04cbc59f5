"""Feature nets: what they compute, for any leading dimensions, and what they refuse."""

import re
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

import ppl_vae as pv
from ppl_vae.nets import output_bias

LEADS = [(), (1,), (4,), (3, 4), (2, 3, 4)]


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_an_mlp_is_affine_maps_with_activations_between_them(lead, activation):
    net = pv.MLP(5, 7, 6, 2, activation=activation)
    a, b, c = (m for m in net if isinstance(m, nn.Linear))
    x = torch.randn(*lead, 5)
    f = activation()
    by_hand = f(f(x @ a.weight.T + a.bias) @ b.weight.T + b.bias) @ c.weight.T + c.bias
    assert net(x).shape == (*lead, 2)
    torch.testing.assert_close(net(x), by_hand)


def test_its_layers_start_as_torchs_own():
    net = pv.MLP(5, 7, 2)
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Linear(7, 2)]
    for ours, theirs in zip([net[0], net[2]], layers, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2)])
def test_an_mlp_refuses(sizes):
    with pytest.raises(ValueError, match=re.escape(f"two or more positive widths, got {sizes}")):
        pv.MLP(*sizes)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_one_hot_agrees_with_torch(lead, dtype):
    labels = torch.randint(0, 4, lead).to(dtype)
    indicators = pv.OneHot(4)(labels)
    assert indicators.dtype == torch.float32
    assert torch.equal(indicators, functional.one_hot(labels.long(), 4).float())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 2, 3, 9]), "unknown label 3 in row 2: labels run from 0 to 2"),
        (torch.tensor([0, -1]), "unknown label -1 in row 1: labels run from 0 to 2"),
        (torch.tensor([0.0, 1.0]), "labels must be integers, got torch.float32; convert them with .long()"),
        (torch.tensor([1j]), "labels must be integers, got torch.complex64"),
    ],
)
def test_one_hot_names_what_it_does_not_know(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.OneHot(3).check(labels)


def test_one_hot_takes_all_it_knows_and_needs_a_class():
    pv.OneHot(3).check(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        pv.OneHot(0)


@pytest.mark.parametrize("lead", [(), (6,), (5, 6)])
def test_concat_joins_latents_of_many_particles_with_one_label_each(lead):
    net = pv.Concat(pv.MLP(4 + 3, 8, 2), None, pv.OneHot(3))
    z, labels = torch.randn(*lead, 4), torch.randint(0, 3, lead[-1:])
    joined = net(z, labels)
    assert joined.shape == (*lead, 2)
    for index in product(*map(range, lead)):
        label = functional.one_hot(labels[index[-1:]], 3).float()
        torch.testing.assert_close(joined[index], net.net(torch.cat([z[index], label])))


def test_concat_broadcasts_in_both_directions_and_embeds():
    embedding = nn.Linear(5, 2)
    net = pv.Concat(nn.Identity(), None, embedding)
    a, b = torch.randn(1, 4, 3), torch.randn(7, 1, 5)
    joined = net(a, b)
    assert joined.shape == (7, 4, 5)
    assert torch.equal(joined[..., :3], a.expand(7, 4, 3))
    torch.testing.assert_close(joined[..., 3:], embedding(b).expand(7, 4, 2))


def test_concat_counts_its_inputs():
    with pytest.raises(ValueError, match="expected 2 inputs, got 1"):
        pv.Concat(nn.Identity(), None, None)(torch.zeros(3, 1))


def test_the_output_bias_is_that_of_the_net_and_not_of_an_embedding():
    net = pv.Concat(pv.MLP(4 + 5, 8, 12), None, pv.MLP(3, 12))  # the embedding is as wide, to be mistaken for it
    assert output_bias(net, 12) is net.net[-1].bias
    assert output_bias(nn.Sequential(pv.MLP(4, 12), nn.Unflatten(-1, (3, 4))), 12).shape == (12,)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU()), "Sequential has no linear layer with a bias"),
        (pv.MLP(3, 5), "its last linear layer gives 5 numbers, the data need 6"),
        # Here the output layer is a convolution, and the linear layer an inner one.
        (
            nn.Sequential(nn.Linear(3, 8), nn.Unflatten(-1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 3)),
            "gives 8 numbers",
        ),
    ],
)
def test_no_bias_that_could_hold_the_data(net, message):
    with pytest.raises(ValueError, match=message):
        output_bias(net, 6)
