"""Data that hold NaN are named, and the results of the others are what they would have been."""

from functools import partial

import numpy as np
import pytest
import torch
from exact import LinearGaussian
from small import conditions, cvae, pixels, vae

import ppl_vae as pv
from ppl_vae.estimates import Estimate, IncompleteError

SHORT = pv.Annealing(distributions=5, leapfrog=2, chains=3)
SHARED = {"batch_size": 3, "compile": "off"}
JUDGES = {
    "elbo": partial(pv.elbo, particles=4, **SHARED),
    "log_likelihood": partial(pv.log_likelihood, particles=6, **SHARED),
    "importance": partial(pv.importance, particles=30, **SHARED),
    "annealed": partial(pv.annealed, settings=SHORT, **SHARED),
    "refine": partial(pv.refine, steps=4, particles=30, **SHARED),
    "gaps": partial(pv.gaps, steps=4, particles=30, settings=SHORT, **SHARED),
}


def tensors(found, of=""):
    """Every tensor of a result, by name."""
    if torch.is_tensor(found):
        return {of: found}
    parts = found if isinstance(found, dict) else vars(found) if hasattr(found, "__dict__") else {}
    return {name: t for key, part in parts.items() for name, t in tensors(part, f"{of} {key}").items()}


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_others_have_the_results_of_data_without_it(judge, bad):
    program = LinearGaussian.random(0, latent=2, width=4, widen=1.5)
    x = program.draw(7, seed=0)
    rest = [0, 1, 2, 3, 5]
    clean = x[rest]
    x[4, 1], x[6, 3] = bad, torch.nan
    with pytest.raises(IncompleteError, match=r"column 0: row 4 holds NaN or infinity; .* error's") as e:
        judge(program, x)
    found, wanted = tensors(e.value.result), tensors(judge(program, clean))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert len(value) == 7, name
        torch.testing.assert_close(value[rest], wanted[name], rtol=0, atol=0, equal_nan=True)
        nothing = ~value[[4, 6]] if value.dtype == torch.bool else value[[4, 6]].isnan()
        assert nothing.all(), name


def test_a_model_alone_and_arrays_and_conditions():
    program = LinearGaussian.random(0, latent=2, width=4)
    x = program.draw(4, seed=0).numpy()
    x[3] = np.nan
    with pytest.raises(IncompleteError, match="row 3") as e:
        pv.annealed(program.model, x, SHORT, compile="off")
    assert e.value.result.value.isfinite().tolist() == [True, True, True, False]
    x = pixels(5)
    c = conditions(x, "vector").clone()
    c[1, 0] = torch.nan
    with pytest.raises(IncompleteError, match="data column 1: row 1") as e:
        pv.elbo(cvae("vector"), (x, c), compile="off")
    assert e.value.result.failed.tolist() == [False, True, False, False, False]


def test_a_datum_that_fails_by_itself_is_missing_too():
    program, x = vae("fixed"), pixels(4)
    x[1, 0], x[3, 0] = torch.nan, 3e38  # whose square overflows
    with pytest.raises(IncompleteError, match="row 1 holds NaN") as e:
        pv.elbo(program, x, compile="off")
    found = e.value.result
    assert isinstance(found, Estimate)
    assert found.value.isfinite().tolist() == [True, False, True, False]


def test_columns_that_the_model_does_not_take_may_hold_anything():
    x = pixels(4)
    beside = torch.full((4,), torch.nan)
    found = pv.elbo(vae(), (x, beside), compile="off")
    assert torch.equal(found.value, pv.elbo(vae(), x, compile="off").value)


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
def test_where_nothing_is_left_or_data_come_in_a_stream_it_is_refused(judge):
    program = LinearGaussian.random(0, latent=2, width=4)
    x = program.draw(4, seed=0)
    x[1] = torch.nan
    for data in ([x[:2], x[2:]], x[1:2]):
        with pytest.raises(ValueError, match=r"row . holds NaN or infinity") as e:
            judge(program, data)
        assert not isinstance(e.value, IncompleteError)


def test_data_are_presented_as_before():
    x = (pixels(6) > 0.5).float()
    x[2, 0] = torch.nan
    rest = [0, 1, 3, 4, 5]
    judge = partial(pv.elbo, vae("bernoulli"), seed=3, compile="off")
    with pytest.raises(IncompleteError) as e:
        judge(pv.Data(x, transform=pv.redraw))
    assert torch.equal(e.value.result.value[rest], judge(pv.Data(x[rest], transform=pv.redraw)).value)


def test_warnings_are_of_the_data_that_are_left():
    program = LinearGaussian.random(0, latent=2, width=4, widen=1.5)
    x = program.draw(21, seed=0)
    x[6:] = torch.nan
    with pytest.raises(IncompleteError) as e:
        pv.importance(program, x, 30, compile="off")
    assert e.value.result.warnings == pv.importance(program, x[:6], 30, compile="off").warnings


def test_evidence_of_all_data_is_taken_for_those_that_are_left():
    program = LinearGaussian.random(0, latent=2, width=4, widen=1.5)
    x = program.draw(5, seed=0)
    evidence = Estimate(program.log_evidence(x).detach(), torch.zeros(5).double(), "unbiased")
    x[1] = torch.nan
    with pytest.raises(IncompleteError) as e:
        JUDGES["gaps"](program, x, evidence=evidence)
    found = e.value.result.evidence.value
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(found[[0, 2, 3, 4]], evidence.value[[0, 2, 3, 4]])
