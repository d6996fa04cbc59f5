"""K-hat and smoothed means are ArviZ's, find the shape of a tail, and are sane where there is none."""

import math
import warnings

import numpy as np
import pytest
import torch

from ppl_vae.rng import seeded
from ppl_vae.tails import khat_threshold, pareto

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever ArviZ says when it is imported
    import arviz

ROUNDED_UP = hasattr(arviz, "psislw")  # before ArviZ 1, as in the paper; later the tail's length is rounded down
EVEN = (100, 225, 400, 900, 10_000)  # with tails of one length in both


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def arviz_psis(log_weights):
    """K-hat and the log mean of smoothed weights, by whichever ArviZ is installed."""
    if ROUNDED_UP:
        smoothed, khat = arviz.psislw(log_weights.T.copy())
    else:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-log_weights, axis=0)
    # Its weights are normalised. One that is not smoothed tells by how much.
    columns, body = np.arange(log_weights.shape[1]), np.argsort(log_weights, 0)[len(log_weights) // 2]
    total = log_weights[body, columns] - smoothed[columns, body]
    return khat, total - math.log(len(log_weights))


def judged(log_weights):
    """K-hat and the log mean of smoothed weights, by ours."""
    khat, smoothed = pareto(log_weights)
    return khat, smoothed.logsumexp(0) - math.log(len(smoothed))


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 0.90808155), (0.7, 0.63714595), (0.9, 0.27494481), (0.99, 0.08018355)]
)
def test_khat_of_published_weights(scale, expected):
    z = np.random.default_rng(42).normal(0, scale, (50_000, 3))
    log_weights = (-0.5 * z**2 + 0.5 * (z / scale) ** 2 + math.log(scale)).sum(1)
    khat, smoothed = judged(torch.tensor(log_weights)[:, None])
    assert float(khat) == pytest.approx(expected, abs=1e-6)
    assert abs(float(smoothed)) < {0.5: 0.2, 0.7: 0.05}.get(scale, 0.005)


@pytest.mark.parametrize("particles", [*EVEN, *((25, 101, 333, 1000) if ROUNDED_UP else ())])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, *((300.0,) if ROUNDED_UP else ())])  # ArviZ 1 overflows
def test_khat_and_smoothed_mean_are_arvizs(particles, spread):
    random = np.random.default_rng(particles)
    log_weights = random.normal(-90, spread, (particles, 20))
    log_weights[random.random(log_weights.shape) < 0.2] = -math.inf
    khat, smoothed = judged(torch.tensor(log_weights))
    theirs, mean = arviz_psis(log_weights)
    np.testing.assert_allclose(khat.numpy(), theirs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(smoothed.numpy(), mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_khat_finds_the_shape_of_a_tail(shape):
    khat, smoothed = judged(-shape * torch.rand(10_000, 200).double().log())
    wanted = (300 * shape + 5) / 310  # its prior counts as 10 draws of shape a half
    assert abs(khat.mean() - wanted) < 4 * khat.std() / 200**0.5 + 0.01
    if shape < 0.5:
        assert abs(smoothed.exp().mean() - 1 / (1 - shape)) < 4 * smoothed.exp().std() / 200**0.5


def test_weights_without_a_tail():
    wide = torch.randn(400).double()
    few, none, tied = torch.full((3, 400), -math.inf).double()
    few[[3, 50, 70]] = torch.tensor([1.0, 2.0, 0.5]).double()
    tied[:100], tied[200:250] = -2.0, torch.linspace(0, 1, 50).double()
    same = torch.full((400,), -700.0).double()
    table = torch.stack([wide, same, same + 1e-7 * wide, few, none, tied, wide - 5000], 1)
    khat, smoothed = judged(table)
    assert khat[1:5].tolist() == [-math.inf, -math.inf, math.inf, math.inf]
    raw = table.logsumexp(0) - math.log(400)
    torch.testing.assert_close(smoothed[1:5], raw[1:5])
    assert smoothed[4] == -math.inf
    alone = [judged(column[:, None]) for column in table.T]  # one tail does not depend on others of other lengths
    torch.testing.assert_close(khat, torch.cat([k for k, _ in alone]))
    torch.testing.assert_close(smoothed, torch.cat([mean for _, mean in alone]))
    torch.testing.assert_close(khat[6], khat[0])
    torch.testing.assert_close(smoothed[6], smoothed[0] - 5000)
    longest = pareto(torch.cat([torch.full((350,), -2.0).double(), tied[200:250]])[:, None])[0]
    torch.testing.assert_close(khat[5:6], longest)  # what lies under the cutoff has no say in the shape


def test_smoothing_changes_the_tail_alone_and_keeps_its_order():
    weights = 3 * torch.randn(400, 3).double()
    smoothed = pareto(weights)[1]
    ranks = weights.argsort(0).argsort(0)
    assert torch.equal(smoothed[ranks < 400 - 60], weights[ranks < 400 - 60])
    assert (smoothed[ranks >= 400 - 60] != weights[ranks >= 400 - 60]).all()
    assert torch.equal(smoothed.argsort(0).argsort(0), ranks)
    assert (smoothed.amax(0) <= weights.amax(0)).all()


def test_float32_weights_are_judged_in_float64():
    log_weights = torch.randn(100, 3)
    for single, double in zip(pareto(log_weights), pareto(log_weights.double()), strict=True):
        assert torch.equal(single, double)


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.zeros(24, 2), "particles must be at least 25, got 24"),
        (torch.zeros(100), r"expected a table \(K, B\), got shape \(100,\)"),
    ],
)
def test_weights_that_have_no_khat(log_weights, message):
    with pytest.raises(ValueError, match=message):
        pareto(log_weights)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_weight_that_is_no_number_spoils_its_own_datum_alone(odd):
    weights = torch.randn(100, 3).double()
    spoiled = weights.clone()
    spoiled[7, 1] = odd
    for clean, found in zip(pareto(weights), pareto(spoiled), strict=True):
        assert found[..., 1].isnan().all()
        assert torch.equal(found[..., [0, 2]], clean[..., [0, 2]])


def test_the_threshold_rises_to_seven_tenths():
    found = [khat_threshold(particles) for particles in (25, 320, 1000, 2155, 10**6)]
    assert found == pytest.approx([0.284662, 0.600824, 2 / 3, 0.7, 0.7], abs=1e-4)
    with pytest.raises(ValueError, match="particles must be at least 25, got 10"):
        khat_threshold(10)
