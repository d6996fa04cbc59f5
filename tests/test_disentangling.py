"""Disentanglement metrics: codes that are the factors, turned, mixed, or nothing to do with them."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from ppl_vae.disentangling import factor_score, mutual_information, mutual_information_gap

SIZES = (4, 3, 5)
GRID = torch.cartesian_prod(*(torch.arange(n) for n in SIZES))  # every combination once: independent factors
TWO = torch.cartesian_prod(torch.arange(8), torch.arange(8))
TURN = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)


def unrelated(width):
    """The factors beside codes that run through all combinations with them."""
    rows = torch.cartesian_prod(torch.arange(len(GRID)), torch.arange(7), *[torch.arange(2)] * (width - 1))
    return rows[:, 1:].float(), GRID[rows[:, 0]]


def test_codes_that_are_the_factors_score_one():
    """In any order, of any scale and sign, beside latents that are off or empty."""
    codes = torch.stack([-3.0 * GRID[:, 2], torch.zeros(len(GRID)), GRID[:, 0] + 7.0, 0.5 * GRID[:, 1]], 1)
    assert torch.allclose(mutual_information_gap(codes, GRID), torch.ones(3, dtype=torch.float64))
    assert factor_score(codes, GRID) == 1.0


def test_information_is_the_entropy_and_nothing():
    expected = torch.diag(torch.tensor(SIZES).double().log())
    assert torch.allclose(mutual_information(GRID.float(), GRID), expected)


def test_codes_that_have_nothing_to_do_with_the_factors():
    """No information at all; a score as by chance."""
    codes, factors = unrelated(3)
    assert torch.allclose(mutual_information(codes, factors), torch.zeros(3, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(mutual_information_gap(codes, factors), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    score, votes = factor_score(codes, factors, votes=3000), 3000
    assert abs(score - 1 / 3) < 5 * math.sqrt(2 / 9 / votes)


def test_factors_turned_by_45_degrees():
    """Both latents know as much of either factor: no gap, and a vote that a coin decides."""
    codes = TWO.double() @ TURN
    assert torch.allclose(mutual_information_gap(codes, TWO), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    assert mutual_information(codes, TWO).min() > 0.3
    score, votes = factor_score(codes, TWO, votes=3000), 3000
    assert abs(score - 0.5) < 5 * math.sqrt(0.25 / votes)


def test_a_gap_that_can_be_counted():
    """z_1 = v_1 + v_2 of two fair bits, z_2 = v_1: z_1 has half a bit of either, z_2 the whole of v_1 alone."""
    bits = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(2, 1)
    gap = mutual_information_gap(torch.stack([bits.sum(1), bits[:, 0]], 1).float(), bits)
    assert torch.allclose(gap, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_information_agrees_with_scikit_learn():
    """Of continuous codes in bins of equal width."""
    torch.manual_seed(0)
    codes, factors = torch.randn(500, 2), torch.randint(4, (500, 3))
    codes[:, 0] += factors[:, 1]
    mine = mutual_information(codes, factors, bins=10)
    for j in range(2):
        edges = torch.linspace(float(codes[:, j].min()), float(codes[:, j].max()), 11)[1:-1]
        place = torch.bucketize(codes[:, j].contiguous(), edges, right=True)
        for k in range(3):
            assert float(mine[j, k]) == pytest.approx(mutual_info_score(place, factors[:, k]), abs=1e-6)


def test_factors_may_have_any_values():
    values = torch.tensor([0.1, 0.25, 0.7, 12.0])[GRID[:, :1]]
    assert torch.allclose(mutual_information(GRID.float(), values), mutual_information(GRID.float(), GRID[:, :1]))


def test_latents_that_follow_the_prior_have_no_vote():
    """One that hardly moves, and by chance moves least, would take every vote."""
    still = torch.where(torch.arange(len(GRID)) == 0, 0.5, 0.0)[:, None]  # it moves in one datum alone
    assert 0 < float(still.var()) < 0.01
    codes = torch.cat([still, GRID.float()], 1)
    assert factor_score(codes, GRID) == 1.0
    assert factor_score(codes, GRID, least=0.0) < 0.7


def test_scales_of_latents_do_not_matter():
    torch.manual_seed(0)
    codes = TWO + 3 * torch.randn(len(TWO), 2)
    assert factor_score(codes * torch.tensor([1.0, 100.0]), TWO) == pytest.approx(factor_score(codes, TWO))
    assert 0.5 < factor_score(codes, TWO) < 1


def test_what_was_learned_by_heart_does_not_count():
    """One vote to learn from is always told right itself; another one as by chance."""
    codes, factors = unrelated(3)
    scores = [factor_score(codes, factors, votes=1, seed=s) for s in range(100)]
    assert abs(sum(scores) / 100 - 1 / 3) < 5 * math.sqrt(2 / 9 / 100)


def test_no_latent_varies():
    score, votes = factor_score(torch.zeros(len(GRID), 2), GRID, votes=2000), 2000
    assert abs(score - 1 / 3) < 5 * math.sqrt(2 / 9 / votes)


def test_votes_are_seeded_and_leave_the_stream_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    codes = TWO.double() @ TURN
    first = factor_score(codes, TWO, votes=50)
    assert first == factor_score(codes, TWO, votes=50)
    assert len({factor_score(codes, TWO, votes=50, seed=s) for s in range(5)}) > 1
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("metric", [mutual_information_gap, factor_score])
@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (torch.zeros(60), GRID, "codes: expected one row"),
        (torch.zeros(60, 2), GRID[:, 0], "factors: expected one row"),
        (torch.zeros(60, 0), GRID, "codes: expected one row"),
        (torch.zeros(59, 2), GRID, "got 59 and 60"),
        (torch.full((60, 2), math.nan), GRID, "codes: hold NaN"),
        (torch.zeros(60, 2), torch.cat([GRID, 0 * GRID[:, :1]], 1), "column 3 has 1 values"),
        (torch.zeros(60, 2), torch.randn(60, 1), "Sort a continuous factor into bins"),
    ],
)
def test_what_is_refused(metric, codes, factors, message):
    with pytest.raises(ValueError, match=message):
        metric(codes, factors)


def test_settings_that_are_refused():
    codes = GRID.float()
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        mutual_information(codes, GRID, bins=1)
    with pytest.raises(ValueError, match="two or more latents"):
        mutual_information_gap(codes[:, :1], GRID)
    with pytest.raises(ValueError, match="got 0 and 64"):
        factor_score(codes, GRID, votes=0)
    with pytest.raises(ValueError, match="got 800 and 1"):
        factor_score(codes, GRID, rows=1)
