"""Small shipped programs, and data with structure that they can learn."""

from functools import partial

import torch

import ppl_vae as pv
from ppl_vae.rng import seeded

WIDTH, LATENT, CLASSES = 12, 2, 3
SCALES = {"fixed": lambda: 0.2, "learned": pv.LearnedScale, "per pixel": pv.NetScale}
fit = partial(pv.fit, device="cpu", progress=False)  # the same everywhere

LIKELIHOODS = ["fixed", "learned", "per pixel", "bernoulli"]


def likelihood(kind, net):
    """One of the four likelihoods; `net` makes a net of the width asked for."""
    if kind == "bernoulli":
        return pv.Bernoulli(net(WIDTH))
    return pv.Normal(net(2 * WIDTH if kind == "per pixel" else WIDTH), SCALES[kind]())


def vae(kind="learned", seed=0):
    """A VAE of 12 pixels and 2 latents, always the same for the same arguments."""
    with seeded(seed):
        return pv.VAE(
            pv.StandardNormal(LATENT),
            likelihood(kind, lambda width: pv.MLP(LATENT, 16, width)),
            pv.mean_field(pv.MLP(WIDTH, 16, 2 * LATENT)),
        )


def cvae(condition="label", kind="learned", seed=0):
    """A CVAE with the condition in prior, likelihood and posterior: a label, or a vector of CLASSES numbers."""

    def embedding():
        return pv.OneHot(CLASSES) if condition == "label" else None

    with seeded(seed):
        return pv.CVAE(
            pv.conditional_normal(pv.Concat(pv.MLP(CLASSES, 8, 2 * LATENT), embedding())),
            likelihood(kind, lambda width: pv.Concat(pv.MLP(LATENT + CLASSES, 16, width), None, embedding())),
            pv.mean_field(pv.Concat(pv.MLP(WIDTH + CLASSES, 16, 2 * LATENT), None, embedding())),
        )


def pixels(count=96, kind="learned", seed=0):
    """Pixels in [0, 1] on a curved surface with two coordinates, binary for the Bernoulli: (count, WIDTH)."""
    g = torch.Generator().manual_seed(seed)
    map_generator = torch.Generator().manual_seed(99)
    z = torch.randn(count, LATENT, generator=g)
    x = 0.5 + 0.4 * torch.sin(2 * z @ torch.randn(LATENT, WIDTH, generator=map_generator))
    return (x > 0.5).float() if kind == "bernoulli" else x + 0.05 * torch.randn(count, WIDTH, generator=g)


def conditions(x, condition="label"):
    """The condition of each datum: how many of its first two pixels are bright, or its first three pixels."""
    return (x[:, :2] > 0.5).sum(1) if condition == "label" else x[:, :3]


def weights(program):
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in program.state_dict().items()}


def same(first, second):
    """Whether two copies hold exactly the same numbers."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
