"""The bounds that 50 epochs of MNIST must reach: the main claim on real data, held against published figures."""

from __future__ import annotations

import pytest
import torch
from mnist import ROWS, judge, train

import ppl_vae as pv


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_trained_and_judged(name):
    """On 200 pictures that are noise, for the programs and objectives themselves."""
    x = torch.rand(500, 784, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    program = ROWS[name].program(x)
    pv.fit(
        program, pv.Data(x[:200], transform=pv.redraw), objective=ROWS[name].objective(), epochs=1, batch_size=100
    )
    bound = pv.log_likelihood(program, pv.Data(x[:10], transform=pv.redraw), particles=20)
    assert bound.value.isfinite().all()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("row", "rate", "at_most"), [("VAE", 3e-3, 90.8), ("IWAE-5", 2e-3, 90.0)])
def test_negative_log_likelihood(real_data, row, rate, at_most):
    """Published after 3280 epochs: 86.76 (ELBO) and 85.54 (IWAE, K = 5); Burda et al. (2016), Table 1."""
    images = pv.mnist(real_data)
    program, _ = train(images, row, epochs=50, learning_rate=rate)
    bound, _ = judge(program, images, particles=5000)
    assert -bound.mean <= at_most
