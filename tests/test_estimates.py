"""What evaluation gives back: its means, its warnings, and what is no estimate."""

import math

import pytest
import torch

import ppl_vae as pv
from ppl_vae.estimates import Estimate, Sandwich, whole

INF, NAN = math.inf, math.nan


def estimate(values, direction="lower", stderr=0.1, **options):
    value = torch.tensor(values).double()
    return Estimate(value, torch.full_like(value, stderr), direction, {"ess": value.abs()}, "it", **options)


@pytest.mark.parametrize(
    ("direction", "failed"),
    [
        ("lower", [False, False, True, True]),  # minus infinity is a bound from below, of what cannot be made
        ("upper", [False, True, False, True]),
        ("unbiased", [False, False, True, True]),
    ],
)
def test_what_is_no_estimate(direction, failed):
    found = estimate([1.0, -INF, INF, NAN], direction)
    assert found.failed.tolist() == failed
    kept = [i for i, wrong in enumerate(failed) if not wrong]
    assert found.rest.value.tolist() == found.value[kept].tolist()
    assert len(found.rest.diagnostics["ess"]) == len(found.rest.stderr) == len(kept)
    with pytest.raises(pv.IncompleteError, match=f"data: it of row {failed.index(True)} is") as caught:
        whole("the result", estimate([0.0]), found)
    assert caught.value.result == "the result"
    assert whole("the result", estimate([0.0])) == "the result"


def test_warnings_are_printed_under_an_estimate():
    text = str(estimate([1.0, 2.0], warnings=("this", "that")))
    assert text.splitlines()[1:] == ["  warning: this", "  warning: that"]


@pytest.mark.parametrize(
    ("lower", "upper", "wanted", "told"),
    [
        ([1.0, 2.0], [1.1, 2.1], None, None),
        ([1.0, 2.0], [3.0, 4.1], None, "the gap may be above 1 nat"),
        ([1.0], [300.0], None, "the gap may be above 1 nat"),  # one datum has no error
        ([-INF, 2.0], [1.0, 2.1], None, "the gap may be above 1 nat"),
        ([1.0, 2.0], [1.5, 2.4], 0.1, "the gap may be above 0.1 nat"),
        ([1.0, 2.0], [1.05, 2.05], 0.1, None),
        ([5.0, 6.0], [1.0, 2.1], None, "the lower bound lies above the upper one"),
    ],
)
def test_a_gap_that_is_not_to_be_believed_is_told(lower, upper, wanted, told):
    found = Sandwich(estimate(lower), estimate(upper, "upper"), pv.Annealing(), wanted)
    assert [text.startswith(told or "") for text in found.warnings] == [True] * (told is not None)
    assert ("warning" in str(found)) == (told is not None)
