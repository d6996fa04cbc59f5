"""Feature nets: what they compute, for any leading dimensions, and what they refuse."""

import re
from itertools import product

import pytest
import torch
from small import fit, pixels
from test_steps import agree, update_of
from torch import nn
from torch.nn import functional

import ppl_vae as pv
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.nets import Batched, Modulated, output_bias
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded

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


STYLES = [
    {"norm": "batch"},
    {"norm": "layer", "activation": nn.Tanh},
    {"gated": True},
    {"residual": True},
    {"norm": "layer", "gated": True, "residual": True, "dropout": 0.3},
    {"norm": "batch", "residual": True},
]


@pytest.mark.parametrize("style", STYLES)
def test_styles_keep_leading_dimensions_and_use_every_parameter(style):
    net = pv.MLP(5, 7, 7, 7, 2, **style)
    net(torch.randn(3, 8, 5)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    net.eval()
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(net(x).flatten(0, 1), net(x.flatten(0, 1)))
    for lead in LEADS:
        assert net(torch.randn(*lead, 5)).shape == (*lead, 2)


def linears(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def test_a_gated_layer_by_hand():
    net = pv.MLP(5, 7, 2, gated=True)
    first, last = linears(net)
    x = torch.randn(4, 5)
    a, b = first(x).split(7, -1)
    torch.testing.assert_close(net(x), last(a * torch.sigmoid(b)))


def test_residual_layers_by_hand():
    net = pv.MLP(7, 7, 7, 3, 3, 3, residual=True, norm="layer", activation=nn.Tanh)
    x = torch.randn(4, 7)
    one, two, three, four, out = linears(net)

    def before(h):
        return torch.tanh(functional.layer_norm(h, h.shape[-1:]))

    h = one(x)
    h = h + two(before(h))
    h = three(before(h))
    h = h + four(before(h))
    torch.testing.assert_close(net(x), out(before(h)))  # the first and the last add nothing, though as wide


def test_batch_norm_is_over_data_and_particles():
    net = pv.MLP(5, 7, 2, norm="batch")
    x = torch.randn(3, 4, 5)
    h = net[0](x)
    normed = (h - h.mean((0, 1))) / (h.var((0, 1), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(net(x), net[-1](torch.relu(normed)))


def test_dropout_is_off_outside_training():
    net = pv.MLP(5, 50, 2, dropout=0.5)
    x = torch.ones(4, 5)
    assert not torch.equal(net(x), net(x))
    net.eval()
    torch.testing.assert_close(net(x), net[-1](torch.relu(net[0](x))))


@pytest.mark.parametrize(
    ("sizes", "style", "message"),
    [
        ((3, 4, 2), {"norm": "group"}, "norm must be 'batch', 'layer' or None, got 'group'"),
        ((3, 4, 2), {"dropout": 1.0}, "dropout must be a probability below 1, got 1.0"),
        ((3, 4, 2), {"dropout": -0.1}, "dropout must be a probability below 1, got -0.1"),
        ((4, 4, 4), {"residual": True}, "residual needs hidden layers of the same width"),
        ((3, 4, 5, 4, 2), {"residual": True}, "got (3, 4, 5, 4, 2)"),
    ],
)
def test_an_mlp_refuses_styles(sizes, style, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.MLP(*sizes, **style)


@pytest.mark.parametrize("lead", LEADS)
def test_batched_gives_a_net_one_batch_dimension(lead):
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x.shape)
            return x.sum(-1)

    x = torch.randn(*lead, 2, 5)
    torch.testing.assert_close(Batched(Net(), 2, 5)(x), x.sum(-1))
    assert seen == [(torch.Size(lead).numel(), 2, 5)]


@pytest.mark.parametrize("shape", [(4, 3), (3,), ()])
def test_batched_names_the_shape_it_wants(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected inputs of shape (..., 2, 5), got {shape}")):
        Batched(nn.Identity(), 2, 5)(torch.zeros(shape))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_styled_nets_train_and_their_graph_agrees(interpreted, norm):
    def program():
        with seeded(0):
            return pv.VAE(
                pv.StandardNormal(2),
                pv.Normal(pv.MLP(2, 8, 8, 12, norm=norm, residual=True), 0.2),
                pv.mean_field(pv.MLP(12, 8, 8, 4, norm=norm, gated=True, dropout=0.2)),
            )

    assert fit(program(), pixels(24), epochs=1, batch_size=12, compile="off").step == 2
    agree(update_of(as_pair(program()), pv.ELBO(2)), pixels(24))
    assert len(interpreted) == 1


# ---- conditions


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


MODULATED = [
    (lambda: pv.MLP(5, 7, 6, 2), (5,)),
    (lambda: pv.MLP(5, 7, 7, 2, gated=True, residual=True), (5,)),
    (lambda: pv.MLP(5, 7, 6, 2, norm="batch"), (5,)),
    (lambda: ConvEncoder((2, 4, 4), (3, 4), 2), (2, 4, 4)),
    (lambda: ConvEncoder((2, 4, 4), (3,), 2, norm="layer", blocks=1, flat=True), (32,)),
    (lambda: ConvDecoder(5, (3, 4), (2, 4, 4)), (5,)),
    (lambda: ConvDecoder(5, (4,), (2, 4, 4), norm="batch", gated=True, flat=True), (5,)),
]


@pytest.mark.parametrize(("make", "event"), MODULATED)
def test_a_modulated_net_starts_as_the_plain_one_and_then_depends_on_the_condition(make, event):
    net = Modulated(make(), 3, pv.OneHot(3), event_dim=len(event))
    net.eval()
    x, labels = torch.randn(4, *event), torch.tensor([0, 1, 2, 1])
    assert torch.equal(net(x, labels), net.net(x))
    net.net.zero_grad()
    nn.init.normal_(net.generator.weight)
    y = net(x, labels)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    same = torch.tensor([0, 1, 1, 1]) == labels
    changed = (net(x, torch.tensor([0, 1, 1, 1])) - y).flatten(1).abs().amax(1) > 1e-5
    assert torch.equal(changed, ~same)
    assert torch.equal(net.net(x), net.net(x))  # no hook is left behind
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(("make", "event"), MODULATED)
def test_modulation_broadcasts_latents_and_conditions(make, event):
    net = Modulated(make(), 3, event_dim=len(event))
    nn.init.normal_(net.generator.weight)
    net.eval()
    x, c = torch.randn(5, 4, *event), torch.randn(4, 3)
    y = net(x, c)
    assert y.shape[:2] == (5, 4)
    for k, b in product(range(5), range(4)):
        torch.testing.assert_close(y[k, b], net(x[k, b], c[b]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x[0], c.expand(2, 4, 3))[1], y[0], rtol=1e-4, atol=1e-5)


def test_modulation_by_hand_of_maps_and_of_norms():
    plain = pv.MLP(5, 7, 6, 2)
    net = Modulated(plain, 3)
    nn.init.normal_(net.generator.weight)
    nn.init.normal_(net.generator.bias)
    x, c = torch.randn(4, 5), torch.randn(4, 3)
    g1, b1, g2, b2 = net.generator(c).split([7, 7, 6, 6], -1)
    h = torch.relu((1 + g1) * plain[0](x) + b1)
    h = torch.relu((1 + g2) * plain[2](h) + b2)
    torch.testing.assert_close(net(x, c), plain[4](h))
    normed = pv.MLP(5, 7, 2, norm="layer")
    net = Modulated(normed, 3)
    nn.init.normal_(net.generator.weight)
    g, b = net.generator(c).split(7, -1)
    torch.testing.assert_close(net(x, c), normed[-1](torch.relu((1 + g) * normed[1](normed[0](x)) + b)))


def test_modulation_is_per_channel():
    net = Modulated(ConvEncoder((1, 4, 4), (3,), 2, norm="layer"), 2, event_dim=3)
    assert [*net.places.values()] == [(-3, 3)]
    assert [*Modulated(ConvDecoder(5, (3,), (1, 4, 4), norm="batch"), 2).places.values()] == [(-3, 3)]


def test_there_must_be_something_to_modulate():
    with pytest.raises(ValueError, match="Sequential has no hidden layer to modulate"):
        Modulated(pv.MLP(5, 2), 3)


def test_the_output_bias_is_that_of_the_net_and_not_of_an_embedding():
    net = pv.Concat(pv.MLP(4 + 5, 8, 12), None, pv.MLP(3, 12))  # the embedding is as wide, to be mistaken for it
    assert output_bias(net, 12) is net.net[-1].bias
    assert output_bias(nn.Sequential(pv.MLP(4, 12), nn.Unflatten(-1, (3, 4))), 12).shape == (12,)


@pytest.mark.parametrize("net", [pv.MLP(3, 6, residual=False), pv.MLP(3, 4, 4, 6, residual=True, norm="layer")])
def test_the_output_bias_of_styled_and_modulated_nets(net):
    assert output_bias(net, 6) is net[-1].bias
    if len(net) > 1:
        assert output_bias(Modulated(net, 6, nn.Linear(6, 6)), 6) is net[-1].bias


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU()), "Sequential has no output layer with a bias"),
        (
            nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6, bias=False)),
            "Sequential has no output layer with a bias",
        ),
        (nn.ReLU(), "ReLU has no output layer with a bias"),
        (pv.MLP(3, 5), "its last linear layer gives 5 numbers, the data need 6"),
        # Here the output layer is a convolution, and the linear layer an inner one.
        (
            nn.Sequential(nn.Linear(3, 6), nn.Unflatten(-1, (3, 2, 1)), nn.ConvTranspose2d(3, 4, 3)),
            "gives 4 channels, which do not divide the 6 numbers",
        ),
    ],
)
def test_no_bias_that_could_hold_the_data(net, message):
    with pytest.raises(ValueError, match=message):
        output_bias(net, 6)
