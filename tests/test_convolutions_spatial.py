"""Convolutional nets whose features keep their places: shapes, one place as without, what each place sees."""

import math
import re

import pytest
import torch
from test_convolutions import SHAPES, STYLES
from test_steps import agree, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.nets import output_bias
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def grid(shape, channels):
    """Height and width of the features."""
    return tuple(size // 2 ** len(channels) for size in shape[1:])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_features_keep_their_places_for_any_leading_dimensions(shape, channels, flat, style):
    pixels, places = (math.prod(shape),) if flat else shape, grid(shape, channels)
    encoder = ConvEncoder(shape, channels, 6, flat=flat, spatial=True, **style).eval()
    decoder = ConvDecoder(4, channels[::-1], shape, flat=flat, spatial=True, **style).eval()
    for net, event, result in ((encoder, pixels, (6, *places)), (decoder, (4, *places), pixels)):
        x = torch.randn(2, 3, *event)
        y = net(x)
        assert y.shape == (2, 3, *result)
        torch.testing.assert_close(y.flatten(0, 1), net(x.flatten(0, 1)))
        torch.testing.assert_close(y[1, 2], net(x[1, 2]))
        assert net(x[:0]).shape == (0, 3, *result)


@torch.no_grad()
def take_over(spatial, plain):
    """The weights of a net without places; a linear layer's become those of a convolution's middle."""
    for ours, theirs in zip(spatial.parameters(), plain.parameters(), strict=True):
        middle = ours.shape[-1] // 2
        (ours if ours.dim() == theirs.dim() else ours[..., middle, middle]).copy_(theirs)


@pytest.mark.parametrize("style", STYLES)
def test_of_one_place_they_are_what_they_are_without(style):
    encoder, decoder = (
        [make(spatial).eval() for spatial in (True, False)]
        for make in (
            lambda spatial: ConvEncoder((2, 4, 4), (3, 5), 6, spatial=spatial, **style),
            lambda spatial: ConvDecoder(6, (5, 3), (2, 4, 4), spatial=spatial, **style),
        )
    )
    take_over(*encoder)
    take_over(*decoder)
    x, z = torch.randn(7, 3, 2, 4, 4), torch.randn(7, 3, 6)
    torch.testing.assert_close(encoder[0](x), encoder[1](x)[..., None, None])
    torch.testing.assert_close(decoder[0](z[..., None, None]), decoder[1](z))


def test_a_picture_moved_by_a_stride_has_its_features_moved_by_a_place():
    encoder = ConvEncoder((2, 32, 32), (3, 4), 5, spatial=True)
    x = torch.zeros(1, 2, 32, 32)
    x[..., 12:18, 12:18] = torch.randn(2, 6, 6)
    with torch.no_grad():
        here, there = encoder(x), encoder(x.roll((4, 8), (-2, -1)))
    assert float((here - there)[..., 1:-1, 1:-1].abs().max()) > 0.01
    torch.testing.assert_close(there[..., 3:7, 3:7], here[..., 2:6, 1:5])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_place_sees_and_shows_a_window_of_pixels(stages):
    channels, options = (2,) * stages, {"activation": nn.Identity, "spatial": True}
    size, middle = 16 << stages, 8
    x = torch.randn(1, 1, size, size, requires_grad=True)
    y = ConvEncoder((1, size, size), channels, 3, **options)(x)
    (seen,) = torch.autograd.grad(y[0, 0, middle, middle], x)
    z = torch.zeros(2, 3, 16, 16)
    z[0, :, middle, middle] = 1.0
    with torch.no_grad():
        shown = ConvDecoder(3, channels, (1, size, size), **options)(z).diff(dim=0)
    for change, window in ((seen, 3 * 2**stages - 2), (shown, 5 * 2**stages - 2)):
        places = change[0, 0].nonzero()
        assert (places.amax(0) - places.amin(0) + 1).tolist() == [window, window]
        assert abs(float(places.float().mean()) - (middle + 0.5) * 2**stages) <= 1


@pytest.mark.parametrize("flat", [False, True])
def test_the_bias_of_a_likelihood_moves_whole_channels(flat):
    decoder = ConvDecoder(4, (3,), (2, 4, 6), 4, flat=flat, spatial=True)
    z, step = torch.randn(5, 4, 2, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])
    before = decoder(z)
    with torch.no_grad():
        output_bias(decoder, 4 * 24).add_(step)
    change = (decoder(z) - before).reshape(5, 4, 24)
    torch.testing.assert_close(change, step[:, None].expand(5, 4, 24))


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter(style):
    encoder = ConvEncoder((1, 8, 8), (3, 4), 6, spatial=True, **style)
    decoder = ConvDecoder(6, (4, 3), (1, 8, 8), spatial=True, **style)
    decoder(encoder(torch.randn(16, 1, 8, 8))).square().sum().backward()
    assert all(bool(p.grad.any()) for net in (encoder, decoder) for p in net.parameters())


def test_captured_steps_agree(interpreted):
    book = pv.Codebook(6, 3)
    program = pv.VAE(
        pv.CodePrior(pv.UniformCodes(6, (2, 2)), book),
        pv.Normal(ConvDecoder(3, (4, 3), (1, 8, 8), spatial=True), 0.3, event_dim=3),
        pv.Quantised(ConvEncoder((1, 8, 8), (3, 4), 3, spatial=True), book, event_dim=3),
    ).eval()  # lest the first of the two runs move codes
    agree(update_of(as_pair(program), pv.ELBO(penalties=[pv.Commitment()])), torch.randn(24, 1, 8, 8))
    assert len(interpreted) == 1


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (ConvEncoder((1, 4, 4), (3,), 6, spatial=True), (5, 1, 4, 6), "(..., 1, 4, 4), got (5, 1, 4, 6)"),
        (ConvDecoder(4, (3,), (1, 4, 6), spatial=True), (5, 4), "(..., 4, 2, 3), got (5, 4)"),
        (ConvDecoder(4, (3,), (1, 4, 6), spatial=True), (5, 4, 3, 2), "(..., 4, 2, 3), got (5, 4, 3, 2)"),
    ],
)
def test_inputs_of_another_shape_are_named(net, shape, message):
    with pytest.raises(ValueError, match=re.escape(f"expected inputs of shape {message}")):
        net(torch.zeros(shape))
