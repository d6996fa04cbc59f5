"""Convolutional nets: their sizes, what a feature sees, any leading dimensions, all options, training."""

import math
import re

import pytest
import torch
from small import fit
from test_steps import agree, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.nets import Modulated, output_bias, pooled
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded

SHAPES = [((1, 28, 28), (3, 4)), ((3, 32, 32), (3, 4, 5)), ((2, 4, 12), (3,))]
STYLES = [
    {},
    {"activation": nn.Tanh, "dropout": 0.3},
    {"norm": "batch"},
    {"norm": "layer", "gated": True},
    {"blocks": 1},
    {"blocks": 2, "norm": "batch", "gated": True},
]


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def nets(shape, channels, flat, **options):
    """An encoder to 6 features and a decoder of 4, with the shapes of one input and of one output."""
    pixels = (math.prod(shape),) if flat else shape
    encoder = ConvEncoder(shape, channels, 6, flat=flat, **options)
    decoder = ConvDecoder(4, channels[::-1], shape, flat=flat, **options)
    return (encoder, pixels, (6,)), (decoder, (4,), pixels)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_sizes_for_any_leading_dimensions(shape, channels, flat, style):
    for net, event, result in nets(shape, channels, flat, **style):
        net.eval()
        x = torch.randn(2, 3, *event)
        y = net(x)
        assert y.shape == (2, 3, *result)
        torch.testing.assert_close(y.flatten(0, 1), net(x.flatten(0, 1)))
        torch.testing.assert_close(y[1, 2], net(x[1, 2]))
        assert net(x[:0]).shape == (0, 3, *result)


def test_flat_pixels_are_the_image_row_by_row():
    for options in ({}, {"outputs_per_pixel": 4}):
        with seeded(1):
            flat = ConvDecoder(4, (3,), (2, 4, 6), flat=True, **options)
        with seeded(1):
            image = ConvDecoder(4, (3,), (2, 4, 6), **options)
        z = torch.randn(5, 4)
        assert image(z).shape == (5, options.get("outputs_per_pixel", 2), 4, 6)
        assert torch.equal(flat(z), image(z).flatten(1))
    with seeded(1):
        flat = ConvEncoder((2, 4, 6), (3,), 5, flat=True)
    with seeded(1):
        image = ConvEncoder((2, 4, 6), (3,), 5)
    x = torch.randn(5, 2, 4, 6)
    assert torch.equal(flat(x.flatten(1)), image(x))


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter(style):
    for net, event, _ in nets((1, 28, 28), (3, 4), False, **style):
        net(torch.randn(8, *event)).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_feature_sees_as_many_pixels_as_promised(stages):
    # In the encoder, from the middle of the last picture of features; in the decoder, the other way round.
    channels = (2,) * stages
    encoder = ConvEncoder((1, 64, 64), channels, 3, activation=nn.Identity)
    stack = nn.Sequential(*[m for m in encoder.net if not isinstance(m, nn.Flatten | nn.Linear)])
    x = torch.zeros(1, 1, 64, 64, requires_grad=True)
    y = stack(x)
    assert y.shape == (1, 2, 64 >> stages, 64 >> stages)
    middle = y.shape[-1] // 2
    (seen,) = torch.autograd.grad(y[0, 0, middle, middle], x)
    assert int((seen[0, 0] != 0).any(0).sum()) == 3 * 2**stages - 2


def test_a_residual_block_adds_to_what_it_is_given():
    net = ConvEncoder((1, 4, 4), (3,), 2, blocks=2, gated=True, norm="layer")
    plain = ConvEncoder((1, 4, 4), (3,), 2, gated=True, norm="layer")
    blocks = [m for m in net.net if isinstance(m, pv.nets.Residual)]
    assert len(blocks) == 2
    for block in blocks:
        _, last = [m for m in block if isinstance(m, nn.Conv2d)]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    rest = [m for m in net.net if m not in blocks]
    plain.load_state_dict(dict(zip(plain.state_dict(), nn.Sequential(*rest).state_dict().values(), strict=True)))
    x = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(net(x), plain(x))


def test_layer_norm_is_of_one_datum_and_batch_norm_of_all():
    x = torch.randn(2, 6, 1, 4, 4)
    for norm, alone in (("layer", True), ("batch", False)):
        net = ConvEncoder((1, 4, 4), (3,), 2, norm=norm)
        assert torch.allclose(net(x)[0, :2], net(x[:1, :2])[0], atol=1e-6) == alone
        torch.testing.assert_close(net(x), net(x.flatten(0, 1)).unflatten(0, (2, 6)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvEncoder((1, 28, 28), (3, 4, 5), 6), "28 x 28 pixels cannot be halved 3 times"),
        (lambda: ConvDecoder(4, (3, 4), (1, 6, 8)), "pad the images to multiples of 4"),
        (lambda: ConvEncoder((28, 28), (3,), 6), "ConvEncoder: shape must be three positive sizes (C, H, W), got"),
        (lambda: ConvDecoder(4, (3,), (1, 0, 28)), "ConvDecoder: shape must be three positive sizes"),
        (lambda: ConvEncoder((1, 28, 28), (), 6), "channels must be one or more positive widths, got ()"),
        (lambda: ConvEncoder((1, 28, 28), (3, 0), 6), "channels must be one or more positive widths, got (3, 0)"),
        (lambda: ConvEncoder((1, 28, 28), (3,), 0), "outputs must be at least 1, got 0"),
        (lambda: ConvDecoder(0, (3,), (1, 28, 28)), "inputs must be at least 1, got 0"),
        (lambda: ConvDecoder(4, (3,), (1, 28, 28), 0), "outputs_per_pixel must be at least 1, got 0"),
        (lambda: ConvEncoder((1, 28, 28), (3,), 6, blocks=-1), "blocks must be at least 0, got -1"),
        (lambda: ConvEncoder((1, 28, 28), (3,), 6, norm="group"), "norm must be 'batch', 'layer' or None"),
    ],
)
def test_they_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_data_of_another_shape_are_named():
    with pytest.raises(ValueError, match=re.escape("expected inputs of shape (..., 1, 28, 28), got (5, 784)")):
        ConvEncoder((1, 28, 28), (3,), 6)(torch.zeros(5, 784))


# ---- the bias that starts a likelihood


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("style", [{}, {"gated": True, "norm": "layer", "blocks": 1}])
def test_a_decoders_bias_moves_whole_channels(flat, style):
    decoder = ConvDecoder(4, (3,), (2, 4, 6), 4, flat=flat, **style)
    bias = output_bias(decoder, 4 * 24)
    assert bias.shape == (4,)
    z, step = torch.randn(5, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    before = decoder(z)
    with torch.no_grad():
        bias += step
    change = (decoder(z) - before).reshape(5, 4, 24)
    torch.testing.assert_close(change, step[:, None].expand(5, 4, 24))
    with pytest.raises(ValueError, match="gives 4 channels, which do not divide the 50 numbers"):
        output_bias(decoder, 50)


def test_an_image_is_pooled_to_one_number_per_channel():
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(pooled(x.flatten(), 3), x.mean((1, 2)))
    assert torch.equal(pooled(x.flatten(), 60), x.flatten())


# ---- in programs

SHAPE = (1, 4, 4)
X = torch.rand(24, 16)


def program(**options):
    """A VAE of 4 x 4 pixels, kept flat, with convolutions on both sides."""
    with seeded(0):
        return pv.VAE(
            pv.StandardNormal(2),
            pv.Normal(ConvDecoder(2, (4, 3), SHAPE, 2, flat=True, **options), pv.NetScale()),
            pv.mean_field(ConvEncoder(SHAPE, (3, 4), 2 * 2, flat=True, **options)),
        )


@pytest.mark.parametrize("options", [{}, {"blocks": 1, "gated": True, "norm": "batch", "dropout": 0.2}])
def test_they_train_and_their_graph_agrees(interpreted, options):
    run = fit(program(**options), X, epochs=1, batch_size=12, compile="off")
    assert run.step == 2
    assert math.isfinite(run.history[0]["train"])
    agree(update_of(as_pair(program(**options)), pv.ELBO(2)), X)
    assert len(interpreted) == 1


def test_a_modulated_decoder_trains_and_its_graph_agrees(interpreted):
    def net(inner):
        modulated = Modulated(inner, 3, pv.OneHot(3))
        nn.init.normal_(modulated.generator.weight)
        return modulated

    labels = torch.arange(24) % 3
    cvae = pv.CVAE(
        pv.StandardNormal(2),
        pv.Normal(net(ConvDecoder(2, (3,), SHAPE, flat=True)), 0.2),
        pv.mean_field(net(ConvEncoder(SHAPE, (3,), 2 * 2, flat=True, norm="layer"))),
    )
    agree(update_of(as_pair(cvae), pv.ELBO(2)), X, labels)
    run = fit(cvae, pv.Data(X, labels), epochs=1, batch_size=12, compile="off")
    assert run.step == 2


LIKELIHOODS = {
    "normal": (lambda net: pv.Normal(net(1), 0.1), 0.02),
    "normal, per pixel": (lambda net: pv.Normal(net(2), pv.NetScale()), 0.02),
    "bernoulli": (lambda net: pv.Bernoulli(net(1)), 0.02),
    "continuous bernoulli": (lambda net: pv.ContinuousBernoulli(net(1)), 0.02),
    "beta": (lambda net: pv.Beta(net(2)), 0.05),
    "categorical": (lambda net: pv.Categorical(net(256)), 0.08),
    "logistics": (lambda net: pv.LogisticMixture(net(6), 2), 0.05),
    "poisson": (lambda net: pv.Poisson(net(1)), 0.1),
    "negative binomial": (lambda net: pv.NegativeBinomial(net(1), 2.0), 0.1),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_start_from_the_mean_of_each_channel(name):
    """The bias of a convolution has one number for a channel, and not one for a pixel."""
    make, within = LIKELIHOODS[name]
    shape = (3, 8, 8)
    with seeded(0):
        x = (torch.rand(50, *shape) * torch.tensor([0.2, 0.5, 0.9])[:, None, None]).flatten(1)
        x = (x * 255).round() / 255 if name in ("categorical", "logistics") else x.clamp(0.01, 0.99)
        x = (20 * x).round() if name in ("poisson", "negative binomial") else x
        made = make(lambda parts: pv.ConvDecoder(2, (8, 4), shape, parts * 3, flat=True))
    made.start_from(x)
    with torch.no_grad():
        for layer in [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)][-1:]:
            layer.weight.zero_()
        mean = made(torch.randn(4, 2)).mean.reshape(4, 3, -1).mean(-1)
    wanted = x.reshape(50, 3, -1).mean((0, 2)).expand(4, 3)
    if name == "categorical":  # each level counts as seen once more
        wanted = (50 * wanted + 256 * 0.5) / (50 + 256)
    torch.testing.assert_close(mean, wanted, rtol=within, atol=within)
