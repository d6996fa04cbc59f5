"""On a GPU: whatever judges a pair takes data from the host, and says what it says on the CPU."""

import copy

import pytest
import torch
from small import vae

import ppl_vae as pv

pytestmark = pytest.mark.gpu
FEW = pv.Annealing(chains=4, distributions=30, leapfrog=3)


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    here = vae()
    return here, copy.deepcopy(here).cuda(), pv.sample(here, 12)


def close(one, other):
    """Two estimates of the same data by other draws: the mean difference is within five of its errors."""
    difference = pv.average(one.value - other.value)
    assert abs(difference.mean) < 5 * difference.stderr + 1e-6
    assert one.value.device == other.value.device == torch.device("cpu")


@pytest.mark.parametrize("compile", ["off", "require"])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_annealing(pairs, compile, start):
    here, there, x = pairs
    settings = pv.Annealing(chains=4, distributions=30, leapfrog=3, start=start)
    close(pv.annealed(here, x, settings, compile="off"), pv.annealed(there, x, settings, compile=compile))


def test_importance_sampling_and_its_proposals(pairs):
    here, there, x = pairs
    for options in ({}, {"defensive": 0.2}):
        one, other = (pv.importance(p, x, 400, **options) for p in (here, there))
        close(one, other)
        assert other.diagnostics["khat"].device.type == "cpu"
    close(pv.importance(here, x, 400), pv.importance(pv.widened(there, 1.1), x, 400))


def test_refinement_and_gaps(pairs):
    here, there, x = pairs
    for family in (pv.local_mean_field, pv.local_full_covariance):
        one, other = (pv.refine(p, x, family, steps=300, compile="off") for p in (here, there))
        close(one.elbo, other.elbo)
    split = pv.gaps(there, x, settings=FEW, steps=50)
    assert torch.isfinite(split.each["approximation"]).all()
    run = pv.fit(there, x, epochs=2, refine=2, device="cuda", compile="off", progress=False)
    assert run.history[-1]["train"] == run.history[-1]["train"]


def test_what_simulates_and_takes_apart(pairs):
    _, there, x = pairs
    assert pv.sandwich(there, 8, settings=FEW).lower.value.isfinite().all()
    assert pv.sbc(there, 50).ranks["z"].device.type == "cpu"
    assert pv.decompose(there, x).size == len(x)
    assert pv.predictive_check(there, x).p["mean"].device.type == "cpu"
    assert "constant_data" in str(pv.to_arviz(there, x, draws=30, resampled=60))
