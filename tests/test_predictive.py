"""Means of the guide, and runs of the model with the observations free."""

import math

import pytest
import torch
from exact import LinearGaussian
from programs import LATENT, ROWS, WIDTH, case

from ppl_vae.pairs import as_pair
from ppl_vae.predictive import guide_means, predict


def test_guide_means_of_one_level_are_the_guides():
    program = LinearGaussian.random(3)
    x = program.draw(4, seed=0)
    torch.testing.assert_close(guide_means(as_pair(program), x)["z"], program.posterior(x)[0].detach())


def test_guide_means_of_a_second_level_average_the_first():
    c = case("two levels", torch.float64)
    for layer in (c.pair.program.first, c.pair.program.second):
        layer.weight.data.mul_(0.3)
    torch.manual_seed(0)
    means = guide_means(c.pair, *c.batch, particles=4000)
    loc, raw = c.pair.program.first(c.batch[0]).detach().chunk(2, -1)
    torch.testing.assert_close(means["h"], loc)
    linear = c.pair.program.second(torch.cat([c.batch[0], loc], -1)).detach()[:, :LATENT]  # linear in h
    slope = c.pair.program.second.weight[:LATENT, WIDTH:].detach()
    error = ((raw.exp() ** 2) @ (slope.T**2)).sqrt() / math.sqrt(4000)
    assert bool(((means["z"] - linear).abs() <= 4.5 * error).all())


def test_guide_means_put_data_first():
    """Whatever plates a latent is in."""
    c = case("nested")
    means = guide_means(c.pair, *c.batch, particles=3)
    assert {name: m.shape for name, m in means.items()} == {"z": (ROWS,), "u": (ROWS, WIDTH)}
    slope = c.pair.program.entry[0].detach()
    torch.testing.assert_close(means["u"], slope * c.batch[0])


def test_means_of_discrete_latents():
    """A Bernoulli's mean is its probability; a category has none, and keeps the type to index with."""
    c = case("bernoulli")
    torch.testing.assert_close(
        guide_means(c.pair, *c.batch)["z"], c.pair.program.encoder(c.batch[0]).sigmoid().detach()
    )
    c = case("category")
    drawn, _, means = predict(c.pair, *c.batch, latents="means")
    assert not drawn["z"].is_floating_point()
    torch.testing.assert_close(means["x"], c.pair.program.table[drawn["z"]].detach())
    assert guide_means(c.pair, *c.batch, particles=50)["z"].shape == (ROWS,)


def test_predict_from_each_source():
    c = case("one level", torch.float64)
    (x,), program = c.batch, c.pair.program
    q = program.encoder(x).chunk(2, -1)[0].detach()
    drawn, values, means = predict(c.pair, x, latents="means")
    torch.testing.assert_close(drawn["z"][0], q)
    torch.testing.assert_close(means["x"][0], program.decoder(q).chunk(2, -1)[0].detach())
    assert not torch.equal(values["x"], means["x"])
    given = torch.ones(ROWS, LATENT, dtype=torch.float64)
    drawn, _, means = predict(c.pair, x, latents={"z": given}, particles=2)
    torch.testing.assert_close(means["x"], program.decoder(given).chunk(2, -1)[0].expand(2, -1, -1).detach())
    for source, loc, scale in (("prior", 0.0, 1.0), ("guide", q, program.encoder(x).chunk(2, -1)[1].exp())):
        torch.manual_seed(0)
        z = predict(c.pair, x, latents=source, particles=4000)[0]["z"]
        standard = ((z - loc) / scale).detach()
        assert float(standard.mean(0).abs().max()) < 4.5 / math.sqrt(4000)
        assert float((standard.std(0) - 1).abs().max()) < 4.5 / math.sqrt(2 * 4000)


def test_predictions_carry_no_gradient_and_do_not_copy_the_observation():
    c = case("one level")
    _, values, means = predict(c.pair, *c.batch, latents="prior")
    assert not values["x"].requires_grad
    assert not means["x"].requires_grad
    assert not torch.equal(values["x"][0], c.batch[0])


def test_predictions_and_given_latents_have_data_first():
    """(K, B, *plates, *event) comes out, (B, *plates, *event) goes in."""
    c = case("nested")
    drawn, values, means = predict(c.pair, *c.batch, particles=3)
    assert {n: v.shape for n, v in drawn.items()} == {"z": (3, ROWS), "u": (3, ROWS, WIDTH)}
    assert values["x"].shape == means["x"].shape == (3, ROWS, WIDTH)
    given = {n: v[0] for n, v in drawn.items()}
    again, _, mean = predict(c.pair, *c.batch, latents=given, particles=2)
    for name, value in given.items():
        assert torch.equal(again[name], value.expand(2, *value.shape))
    torch.testing.assert_close(mean["x"], means["x"][0].expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"latents 'z': expected shape \(6,\), got \(6, 1\)"):
        predict(c.pair, *c.batch, latents={"z": given["z"][:, None]})
