"""Calibration: ranks uniform for the exact posterior, tests of the right size, and words for what is wrong."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import SharedLatent, TwoLevel
from scipy import stats
from small import cvae

import ppl_vae as pv
from ppl_vae.calibration import Calibration, _orthonormal, sbc
from ppl_vae.pairs import Pair
from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def linear(number, **options):
    program = LinearGaussian.random(number, **options)
    program.blank = lambda size: (torch.zeros(size, 6, dtype=torch.float64),)
    return program


def uniform(size, draws, dimensions, number=0):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(draws + 1, (size, dimensions), generator=generator)


def normal(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def moved(shift, scale=0.5**0.5):
    """A guide of `normal`, exact with no shift and this scale."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale))

    return Pair(normal, guide)


# ---- guides
def test_an_exact_guide_passes():
    p_values = []
    for number in range(15):
        found = sbc(linear(number, guide="exact"), 200, level=0.999, seed=number)
        assert found.calibrated
        assert str(found).startswith("0 of 3 dimensions not calibrated at 99.9%")
        p_values.append(found.p_values["z"])
    assert stats.kstest(torch.cat(p_values).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("widen", "word", "sign"), [(0.5, "too narrow", 1), (2.0, "too wide", -1)])
def test_a_guide_of_another_width_does_not(widen, word, sign):
    found = sbc(linear(0, guide="exact", widen=widen), 300, level=0.999)
    assert found.outside["z"].all()
    assert not found.calibrated
    assert (sign * found.components["z"][1] > 5).all()
    assert str(found).count(word) == 3
    lower, upper = found.band()
    assert ((found.difference["z"] < lower[:, None]) | (found.difference["z"] > upper[:, None])).any(0).all()


@pytest.mark.parametrize(("shift", "word"), [(-0.3, "too low"), (0.3, "too high")])
def test_a_biased_guide_is_told_and_which_way(shift, word):
    found = sbc(moved(shift), 400, like=(torch.zeros(400),))
    assert f"z: {word}, p " in str(found)
    assert not found.calibrated
    assert sbc(moved(0.0), 400, level=0.999, like=(torch.zeros(400),)).calibrated


@pytest.mark.parametrize(("shift", "scale", "words"), [(-3.0, 0.7, "too low"), (0.0, 3.0, "too wide")])
def test_a_strong_error_is_not_told_as_another_one_too(shift, scale, words):
    assert f"z: {words}, p " in str(sbc(moved(shift, scale), 400, like=(torch.zeros(400),)))


def test_bias_and_width_are_told_together_the_stronger_first():
    assert "z: too narrow and too low, p " in str(sbc(moved(-0.3, 0.4), 500, like=(torch.zeros(500),)))


def test_a_posterior_of_another_shape():
    """Two narrow peaks, between which no draw lies."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            peaks = dist.Normal(x[..., None] / 2 + torch.tensor([-0.6, 0.6]), 0.1)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), peaks))

    assert "z: of another shape, p " in str(sbc(Pair(normal, guide), 1000, like=(torch.zeros(1000),)))


def test_constrained_latents():
    """A gamma prior of a Poisson rate, of which the posterior is gamma."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x, more=0.0):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("rate", dist.Gamma(2.0 + x + more, 2.5))

    like = (torch.zeros(400),)
    assert sbc(Pair(model, guide), 400, level=0.999, like=like).calibrated
    assert "rate: too high" in str(sbc(Pair(model, lambda x: guide(x, 1.0)), 400, like=like))


@pytest.mark.parametrize("prior_only", [False, True])
def test_discrete_latents_have_their_ties_broken_at_random(prior_only):
    share, places = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([-1.0, 0.0, 1.5])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(share))
            pyro.sample("x", dist.Normal(places[z], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            logits = share.log() + dist.Normal(places, 1.0).log_prob(x[..., None])
            if prior_only:
                logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(len(x), 3)
            pyro.sample("z", dist.Categorical(logits=logits))

    found = sbc(Pair(model, guide), 600, draws=19, level=0.999, like=(torch.zeros(600),))
    assert found.calibrated is not prior_only
    assert len(found.ranks["z"].unique()) == 20


def test_a_latent_that_equals_all_draws_has_any_rank():
    def certain(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(torch.ones(())))

    def model(x):
        certain(x)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    found = sbc(Pair(model, certain), 800, draws=3, like=(torch.zeros(800),))
    assert stats.chisquare(torch.bincount(found.ranks["z"], minlength=4).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_ranks_count_the_draws_below_whatever_the_chunk(chunk):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(torch.full((len(x),), 0.3)))

    seen = []

    def watched(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen.append(z.detach())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = sbc(Pair(watched, guide), 50, draws=23, like=(torch.zeros(50),), batch_size=20, chunk=chunk)
    truth = next(z for z in reversed(seen) if z.shape == (1, 50))
    assert torch.equal(found.ranks["z"], 23 * (truth[0] > 0.3))


def test_programs_of_every_shape():
    def nested(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("entries", 4, dim=-2):
                u = pyro.sample("u", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(u, 1.0), obs=x.T)

    def nested_guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))
            with pyro.plate("entries", 4, dim=-2):
                pyro.sample("u", dist.Normal(x.T, 1.0))

    x = torch.zeros(30, 4)
    for program, given, shapes in (
        (TwoLevel(), {"like": (x,)}, {"h": (30, 2), "z": (30, 2)}),
        (Pair(nested, nested_guide), {"like": (x,)}, {"z": (30,), "u": (30, 4)}),
        (cvae(), {}, {"z": (30, 2)}),
    ):
        context = () if given else (torch.tensor([0, 1, 2] * 10),)
        found = sbc(program, 30, *context, draws=9, batch_size=20, **given)
        assert {n: tuple(r.shape) for n, r in found.ranks.items()} == shapes
        assert {n: tuple(d.shape) for n, d in found.difference.items()} == {
            n: (9, *s[1:]) for n, s in shapes.items()
        }
        for name, rank in found.ranks.items():
            assert rank.min() >= 0
            assert rank.max() <= 9
            assert ((found.pit[name] > 0) & (found.pit[name] < 1)).all()


def test_the_seed_decides_and_the_callers_stream_is_left_alone():
    program, state = linear(0), torch.get_rng_state()
    first, again, other = (sbc(program, 40, seed=s).ranks["z"] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- tests of ranks
@pytest.mark.parametrize("draws", [1, 2, 3, 9, 99, 999])
def test_polynomials_are_orthonormal_under_the_discrete_uniform(draws):
    order = min(4, draws)
    p = _orthonormal(draws, order)
    assert p.shape == (order, draws + 1)
    torch.testing.assert_close(p @ p.T / (draws + 1), torch.eye(order).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(p.sum(1), torch.zeros(order).double(), rtol=0, atol=1e-8)
    assert (p[:, -1] > 0).all()


@pytest.mark.parametrize("draws", [2, 19, 99])
def test_p_values_of_uniform_ranks_are_uniform(draws):
    found = Calibration({"z": uniform(500, draws, 600)}, draws)
    p = found.p_values["z"].numpy()
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    components = found.components["z"]
    assert components.std() == pytest.approx(1, abs=4 / (2 * components.numel()) ** 0.5)


def test_the_verdict_errs_as_often_as_the_level_says():
    wrong = [not Calibration({"z": uniform(300, 99, 20, n)}, 99, level=0.9).calibrated for n in range(400)]
    assert abs(sum(wrong) / 400 - 0.1) < 4 * (0.09 / 400) ** 0.5


def test_p_values_are_adjusted_by_holm():
    ranks = uniform(100, 9, 5)
    for column, count in enumerate((30, 8, 0, 10)):  # some small p-values
        ranks[:count, column] = 0
    found = Calibration({"a": ranks[:, :4].reshape(100, 2, 2), "b": ranks[:, 4]}, 9)
    alone = [*found.p_values["a"].flatten().tolist(), float(found.p_values["b"])]
    largest, expected = 0.0, {}
    for k, p in enumerate(sorted(alone)):
        largest = max(largest, (5 - k) * p)
        expected[p] = min(1.0, largest)
    assert sum(p < 0.05 for p in alone) > 1
    assert found.adjusted["a"].flatten().tolist() == pytest.approx([expected[p] for p in alone[:4]])
    assert float(found.adjusted["b"]) == pytest.approx(expected[alone[4]])


def test_the_worst_dimensions_are_printed_by_name():
    ranks = uniform(300, 99, 60)
    ranks[:, 3:10] = ranks[:, 3:10] // 2
    ranks[:, 7] = ranks[:, 7] // 2
    lines = str(Calibration({"z": ranks.reshape(300, 6, 10)}, 99)).splitlines()
    assert lines[0].startswith(
        "7 of 60 dimensions not calibrated at 95% (300 simulated data, ranks among 99 draws)"
    )
    assert lines[1].startswith("  z[0, 7]: too high")
    assert len(lines) == 7
    assert lines[-1] == "  and 2 more"


def test_the_difference_is_that_of_distribution_functions():
    ranks = uniform(37, 9, 3)
    found = Calibration({"z": ranks, "w": ranks[:, 1]}, 9)
    expected = np.array([[(ranks[:, j] <= k).double().mean() - (k + 1) / 10 for j in range(3)] for k in range(9)])
    np.testing.assert_allclose(found.difference["z"].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(found.difference["w"].numpy(), expected[:, 1], atol=1e-12)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_a_band_covers_a_whole_curve_as_often_as_its_level_says(level):
    found = Calibration({"z": uniform(200, 19, 2000)}, 19)
    lower, upper = found.band(level)
    curves = found.difference["z"]
    inside = ((curves >= lower[:, None] - 1e-12) & (curves <= upper[:, None] + 1e-12)).all(0).double().mean()
    # Counts are whole numbers, so that a band holds with a probability a little above its level.
    assert -4 * (level * (1 - level) * (1 / 2000 + 1 / 1000)) ** 0.5 < inside - level < 0.1
    assert found.band(0.99)[1].sum() > upper.sum()


# ---- what is refused
def same(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x / 2, 1.0).mask(torch.arange(len(x)) > 3))


def masked(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(torch.arange(len(x)) > 3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nothing(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.where(x == 0, float("nan")), 1.0))


def test_what_is_refused():
    x, flat = torch.zeros(20, 4), torch.zeros(20)
    density = pv.Density(pv.Normal(pv.Constant(torch.zeros(4), learned=True), 1.0))
    for call, message in (
        (lambda: sbc(moved(0.0), 0), "size must be at least 1, got 0"),
        (lambda: sbc(moved(0.0), 20, draws=0), "draws must be at least 1, got 0"),
        (lambda: sbc(moved(0.0), 20, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: sbc(moved(0.0), 20, level=1.0), "level must lie between 0 and 1, got 1.0"),
        (lambda: sbc(moved(0.0), 20), "pass like=batch"),
        (lambda: sbc(density, 20, like=(x,)), "nothing is latent"),
        (lambda: sbc(Pair(masked, same), 20, like=(flat,)), "site 'z': it is masked"),
        (lambda: sbc(SharedLatent(), 20, like=(x,)), "'w' is outside the data plate"),
        (lambda: sbc(Pair(normal, nothing), 20, like=(flat,)), "site 'z': the guide draws NaN"),
        (lambda: Calibration({"z": uniform(20, 9, 1)}, 9).band(0.0), "level must lie between 0 and 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
