"""A captured run trains as well as an eager one: 20 epochs of MNIST, against held-out images."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import ppl_vae as pv

EPOCHS = 20


def trained(images, compile):
    """The last row of a run's history."""
    torch.manual_seed(0)
    mlp = partial(pv.MLP, activation=nn.Softplus)
    vae = pv.VAE(pv.StandardNormal(20), pv.Bernoulli(mlp(20, 400, 784)), pv.mean_field(mlp(784, 400, 2 * 20)))
    train, valid = (pv.Data(split.x, transform=pv.redraw) for split in (images.train, images.valid))
    run = pv.fit(
        vae, train, valid, objective=pv.ELBO(kl="analytic"), epochs=EPOCHS, compile=compile, device="cpu",
        progress=False,
    )  # fmt: skip
    print(f"{compile}: valid {run.history[-1]['valid']:.3f} ± {run.history[-1]['valid_stderr']:.3f}, ", end="")
    print(f"{sum(row['seconds'] for row in run.history):.1f} s, {run.engine.describe()}")
    return run.history[-1]


@pytest.mark.slow
@pytest.mark.data
def test_captured_and_eager_runs_reach_the_same_bound(real_data):
    images = pv.mnist(real_data)
    captured, eager = (trained(images, compile) for compile in ("require", "off"))
    # The same seed, so the same batches and draws: what differs is rounding, which training amplifies. The
    # standard error is that of a bound on 10,000 images, of either run.
    assert abs(captured["valid"] - eager["valid"]) < math.hypot(captured["valid_stderr"], eager["valid_stderr"])
