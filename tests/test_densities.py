"""The log joint and its gradient in the latents: against closed forms, eager and captured."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from small import pixels, vae

import ppl_vae as pv
from ppl_vae.rng import seeded


class TwoLevels:
    """a ~ N(0, 1), b | a ~ N(2a, 0.5²), x | b ~ N(b, 1): the gradient couples the sites."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(2 * a, 0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(0.0 * x, 1.0))
            pyro.sample("b", dist.Normal(x, 1.0))


@pytest.mark.parametrize("compile", ["off", "require"])
def test_linear_gaussian_pairs_have_the_closed_gradient(compile):
    pair = LinearGaussian.random(3, latent=2, width=5)
    with seeded(1):
        z, x = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    value, gradient = pv.LogJoint(pair, compile=compile)({"z": z}, x)
    mean = z @ pair.weight.T + pair.mean
    scale = torch.tensor(pair.variance, dtype=torch.float64).sqrt()
    expected = torch.distributions.Normal(mean, scale).log_prob(x).sum(-1)
    expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient["z"], ((x - mean) @ pair.weight / pair.variance - z).detach())


def test_every_site_has_its_gradient_whatever_the_order_it_is_named_in():
    with seeded(2):
        a, b, x = torch.randn(5, 3), torch.randn(5, 3), torch.randn(3)
    joint = pv.LogJoint(TwoLevels(), compile="off")
    for latents in ({"a": a, "b": b}, {"b": b, "a": a}):
        _, gradient = joint(latents, x)
        torch.testing.assert_close(gradient["a"], -a + 2 * (b - 2 * a) / 0.25)
        torch.testing.assert_close(gradient["b"], -(b - 2 * a) / 0.25 + (x - b))


def test_captured_and_eager_agree_and_follow_the_parameters():
    program, x = vae(), pixels(6)
    with seeded(3):
        z = torch.randn(7, 6, 2)
    captured, eager = (pv.LogJoint(program, compile=how) for how in ("require", "off"))
    for _ in range(2):
        for found, wanted in zip(captured({"z": z}, x), eager({"z": z}, x), strict=True):
            torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            for parameter in program.parameters():
                parameter.mul_(1.5)
    assert all(p.grad is None for p in program.parameters())


def test_modules_are_as_they_were():
    program = vae().train()
    pv.LogJoint(program, compile="off")({"z": torch.zeros(1, 6, 2)}, pixels(6))
    assert all(module.training for module in program.modules())


def test_what_has_no_gradient_is_refused():
    with pytest.raises(ValueError, match=r"latents 'z': torch.int64 has no gradient"):
        pv.LogJoint(vae(), compile="off")({"z": torch.zeros(1, 6, 2, dtype=torch.int64)}, pixels(6))
    with pytest.raises(ValueError, match="expected values of"):
        pv.LogJoint(vae(), compile="off")({}, pixels(6))


@pytest.mark.parametrize("change", ["assigned", "moved"])
def test_new_weights_are_seen(change):
    program, x = vae(), pixels(6)
    joint = pv.LogJoint(program, compile="require")
    zero = torch.zeros(1, 6, 2)
    joint({"z": zero}, x)
    if change == "assigned":
        program.load_state_dict(vae(seed=5).state_dict(), assign=True)
    else:
        program.double().float()
        with torch.no_grad():
            next(program.likelihood.parameters()).add_(1.0)
    torch.testing.assert_close(joint({"z": zero}, x), pv.LogJoint(program, compile="off")({"z": zero}, x))


def test_sites_may_start_at_one_tensor():
    start, x = torch.zeros(2, 3), torch.zeros(3)
    joint = pv.LogJoint(TwoLevels(), compile="require")
    joint({"a": start, "b": start}, x)
    with seeded(4):
        moved = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    torch.testing.assert_close(joint(moved, x), pv.LogJoint(TwoLevels(), compile="off")(moved, x))
