import math
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae import arviz_export
from ppl_vae.arviz_export import build, to_arviz
from ppl_vae.batches import Data
from ppl_vae.evaluate import log_likelihood
from ppl_vae.pairs import Pair
from ppl_vae.tails import pareto

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever ArviZ says when it is imported
    import arviz

W = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.3]])
SIGMA = 0.5


class Linear(nn.Module):
    """z ~ N(0, I2), x ~ N(Wz, σ²I), and a guide that is deliberately not the posterior."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.9)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T, SIGMA).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.drop(self.encode(x)), 0.6).to_event(1))


class TwoLevel(nn.Module):
    """u (2x2) above v (scalar) above x and a count y behind an inner plate of 4."""

    def model(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
            v = pyro.sample("v", dist.Normal(u.sum((-1, -2)), 1.0))
            pyro.sample("x", dist.Normal(v[..., None].expand(*v.shape, 3), 1.0).to_event(1), obs=x)
            with pyro.plate("parts", 4, dim=-2):
                w = pyro.sample("w", dist.Normal(v, 0.5))
                pyro.sample("y", dist.Poisson(w.exp()), obs=y.T)

    def guide(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(torch.full((2, 2), 0.1), 0.5).to_event(2))
            v = pyro.sample("v", dist.Normal(x.mean(-1) + 0.1 * u[..., 0, 0], 0.5))
            with pyro.plate("parts", 4, dim=-2):
                pyro.sample("w", dist.Normal(0.3 * v, 0.3))


def values(tree, group, name):
    return np.asarray(tree[group][name].values)


def normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Linear()


@pytest.fixture
def x():
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(arviz_export, "_ROWS", 150)  # 3 data at a time at 50 draws


@pytest.mark.usefixtures("small_chunks")
def test_groups_have_arviz_dimensions_and_the_data_in_order(pair, x):
    tree = to_arviz(pair, x, draws=50)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim")
    assert tree["posterior"]["z"].shape == (1, 50, 7, 2)
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", "x_dim")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert tree["sample_stats"]["log_weight"].dims == ("chain", "draw", "datum")
    assert tree["observed_data"]["x"].dims == ("datum", "x_dim")
    np.testing.assert_array_equal(values(tree, "observed_data", "x"), x.numpy())
    np.testing.assert_array_equal(tree["posterior"]["datum"].values, np.arange(7))


@pytest.mark.usefixtures("small_chunks")
def test_log_densities_belong_to_the_exported_draws(pair, x):
    tree = to_arviz(pair, x, draws=50)
    z = values(tree, "posterior", "z").astype(np.float64)
    with torch.no_grad():
        centre = pair.encode(x).double().numpy()  # exact only if dropout is off
    likelihood = normal(x.double().numpy(), z @ W.T.double().numpy(), SIGMA).sum(-1)
    weight = likelihood + normal(z, 0.0, 1.0).sum(-1) - normal(z, centre, 0.6).sum(-1)
    np.testing.assert_allclose(values(tree, "log_likelihood", "x"), likelihood, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values(tree, "sample_stats", "log_weight"), weight, rtol=1e-4, atol=1e-4)


def test_draws_are_from_the_guide_and_predictions_from_the_same_draws(pair, x):
    tree = to_arviz(pair, x, draws=4000)
    z = values(tree, "posterior", "z")[0]
    with torch.no_grad():
        centre = pair.encode(x).numpy()
    # 14 means of 4000 draws each: five standard errors.
    np.testing.assert_allclose(z.mean(0), centre, atol=5 * 0.6 / math.sqrt(4000))
    noise = values(tree, "posterior_predictive", "x")[0] - z @ W.T.numpy()
    # Noise of other draws of z would have variance σ² + 2 * 0.36 * |w|², at least 4 times as much.
    assert noise.std() == pytest.approx(SIGMA, rel=0.01)
    assert abs(np.corrcoef(noise[..., 0].ravel(), z[..., 0].ravel())[0, 1]) < 5 / math.sqrt(noise[..., 0].size)


def test_chunks_draw_different_noise(pair, x, monkeypatch):
    monkeypatch.setattr(arviz_export, "_ROWS", 1)
    tree = to_arviz(pair, x[:1].expand(4, 3), draws=5)
    z = values(tree, "posterior", "z")[0]
    assert all((z[:, 0] != z[:, k]).all() for k in (1, 2, 3))


def test_seed_decides_and_the_caller_keeps_state_and_mode(pair, x):
    pair.train()
    before = torch.get_rng_state()
    first, again, other = (to_arviz(pair, x, draws=9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert pair.training
    assert pair.drop.training
    for group, name in (("posterior", "z"), ("posterior_predictive", "x")):
        np.testing.assert_array_equal(values(first, group, name), values(again, group, name))
        assert (values(first, group, name) != values(other, group, name)).all()


def test_max_data_and_predictive_bound_the_size(pair, x):
    tree = to_arviz(pair, x, draws=4, max_data=5, predictive=False)
    assert tree["posterior"]["z"].shape == (1, 4, 5, 2)
    groups = tree.children if hasattr(tree, "children") else tree.groups()
    assert set(groups) == {"posterior", "log_likelihood", "sample_stats", "observed_data"}


def test_every_form_of_data_gives_the_same_first_rows(pair, x):
    forms = [x, x.numpy(), (x, torch.arange(7)), Data(x), [x[:2], x[2:4], x[4:]]]
    for data in forms:
        tree = to_arviz(pair, data, draws=2, max_data=3)
        np.testing.assert_array_equal(values(tree, "observed_data", "x"), x[:3].numpy())


def test_a_transform_is_applied_as_the_model_sees_it(pair, x):
    tree = to_arviz(pair, Data(x, transform=lambda batch: 2 * batch), draws=2)
    np.testing.assert_array_equal(values(tree, "observed_data", "x"), 2 * x.numpy())


def test_redrawn_data_are_those_that_are_judged(pair):
    data, seen = Data(torch.full((6, 3), 0.5), transform=torch.bernoulli), []
    encode = pair.encode.forward
    pair.encode.forward = lambda x: seen.append(x.clone()) or encode(x)
    log_likelihood(pair, data, 3, seed=5)
    tree = to_arviz(pair, data, draws=2, seed=5)
    redrawn = values(tree, "observed_data", "x")
    assert set(np.unique(redrawn)) == {0.0, 1.0}
    np.testing.assert_array_equal(redrawn, seen[1].numpy())


@pytest.mark.usefixtures("small_chunks")
def test_inner_plates_several_sites_and_matrix_events():
    y = torch.arange(20.0).reshape(5, 4)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    tree = to_arviz(TwoLevel(), (x, y), draws=50)
    assert tree["posterior"]["u"].dims == ("chain", "draw", "datum", "u_dim_0", "u_dim_1")
    assert tree["posterior"]["v"].dims == ("chain", "draw", "datum")
    assert tree["posterior"]["w"].dims == ("chain", "draw", "datum", "parts")
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "datum", "parts")
    np.testing.assert_array_equal(values(tree, "observed_data", "y"), y.numpy())
    np.testing.assert_array_equal(values(tree, "observed_data", "x"), x.numpy())
    v, w = values(tree, "posterior", "v"), values(tree, "posterior", "w").astype(np.float64)
    factorial = np.vectorize(math.lgamma)(y.numpy() + 1)
    expected = normal(x.numpy(), v[..., None], 1.0).sum(-1) + (y.numpy() * w - np.exp(w) - factorial).sum(-1)
    np.testing.assert_allclose(values(tree, "log_likelihood", "all"), expected, rtol=1e-4)


def test_functions_and_discrete_latents():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))

    tree = to_arviz(Pair(model, guide), torch.tensor([0.0, 2.0]), draws=6)
    z = values(tree, "posterior", "z")
    assert z.dtype.kind == "i"
    np.testing.assert_allclose(
        values(tree, "log_likelihood", "x"), normal(np.array([0.0, 2.0]), z, 1.0), rtol=1e-5
    )


def test_arviz_reads_summarises_and_plots_it(pair, x):
    tree = to_arviz(pair, x, draws=60)
    kind = "DataTree" if int(arviz.__version__.split(".")[0]) >= 1 else "InferenceData"
    assert type(tree).__name__ == kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ and its plotting library speak for themselves here
        table = arviz.summary(tree, var_names=["z"], kind="stats")
        assert len(table) == 7 * 2
        z = values(tree, "posterior", "z")[0, :, 0, 0]
        assert float(table["mean"].iloc[0]) == pytest.approx(z.mean(), abs=0.051)  # rounded to a digit
        # ArviZ 0.23 gives NaN here for log-densities in float32.
        assert np.isfinite(arviz.loo(tree).elpd if kind == "DataTree" else arviz.loo(tree).elpd_loo)
        if kind == "DataTree":
            arviz.plot_trace_dist(tree, coords={"datum": [0]}, backend="none")
            arviz.plot_ppc_dist(tree, num_samples=5, backend="none")
        else:
            import matplotlib as mpl

            mpl.use("Agg")
            arviz.plot_trace(tree, coords={"datum": [0]})
            arviz.plot_ppc(tree, num_pp_samples=5)
            sys.modules["matplotlib.pyplot"].close("all")


def test_importance_weights_reach_the_exact_evidence(pair, x):
    # The posterior's mean and a scale of 0.6, wider than the posterior's (below 0.34): bounded weights.
    with torch.no_grad():
        pair.encode.weight.copy_(torch.linalg.solve(W.T @ W + SIGMA**2 * torch.eye(2), W.T))
        pair.encode.bias.zero_()
    tree = to_arviz(pair, x, draws=5000, predictive=False)
    log_weight = values(tree, "sample_stats", "log_weight")[0]
    estimate = np.logaddexp.reduce(log_weight, axis=0) - math.log(5000)
    stderr = np.exp(log_weight - estimate).std(0) / math.sqrt(5000)
    exact = dist.MultivariateNormal(torch.zeros(3), W @ W.T + SIGMA**2 * torch.eye(3)).log_prob(x).numpy()
    assert (stderr < 0.05).all()
    assert (np.abs(estimate - exact) < 5 * stderr).all()


def test_resampled_draws_are_the_posteriors(pair, x):
    # The posterior's mean and a scale of 0.6, wider than the posterior's.
    precision = W.T @ W / SIGMA**2 + torch.eye(2)
    covariance = torch.linalg.inv(precision)
    with torch.no_grad():
        pair.encode.weight.copy_(covariance @ W.T / SIGMA**2)
        pair.encode.bias.zero_()
    tree = to_arviz(pair, x, draws=2000, resampled=20_000)
    z = values(tree, "posterior", "z")[0]
    exact = (x @ W / SIGMA**2 @ covariance).numpy()
    spread = covariance.diagonal().sqrt().numpy()
    # 2000 draws, some of them repeated; the proposals' error is a third of that or less. Five standard errors.
    np.testing.assert_allclose(z.mean(0), exact, atol=5 * 1.5 * spread.max() / math.sqrt(2000))
    assert np.abs(np.cov(z[:, 0].T) / covariance.numpy() - 1).max() < 0.25  # the guide's has no correlation at all
    # Predictions, likelihoods and weights are those of the draws that were chosen.
    noise = values(tree, "posterior_predictive", "x")[0] - z @ W.T.numpy()
    assert noise.std() == pytest.approx(SIGMA, rel=0.01)
    likelihood = normal(x.numpy(), z @ W.T.numpy(), SIGMA).sum(-1)
    np.testing.assert_allclose(values(tree, "log_likelihood", "x")[0], likelihood, rtol=1e-4, atol=1e-4)
    khat = tree["constant_data"]["khat"]
    assert khat.dims == ("datum",)
    assert (khat.values < 0.3).all()  # bounded weights


def test_as_many_as_are_drawn_are_resampled_too(pair, x):
    plain, chosen = (
        values(to_arviz(pair, x, draws=400, predictive=False, resampled=r), "posterior", "z")[0]
        for r in (None, 400)
    )
    assert len(np.unique(plain[:, 0], axis=0)) == 400 > len(np.unique(chosen[:, 0], axis=0))


def test_weights_that_are_nan_are_named(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("odd", torch.where(x[:, 0] == 9.0, x[:, 0] * math.nan, 0.0 * z))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = x.clone()
    x[4, 0] = 9.0
    with pytest.raises(ValueError, match="log weight of row 4 is NaN"):
        to_arviz(Pair(model, guide), x, draws=30)


def test_khat_is_that_of_the_exported_weights(pair, x):
    tree = to_arviz(pair, x, draws=200, predictive=False)
    weights = torch.tensor(values(tree, "sample_stats", "log_weight")[0])
    np.testing.assert_allclose(tree["constant_data"]["khat"].values, pareto(weights)[0].numpy())
    few = to_arviz(pair, x, draws=5, predictive=False)
    assert "constant_data" not in (few.groups() if callable(few.groups) else few.children)


def test_build_takes_plain_arrays():
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(1, 8, 3, 2)), rng.normal(size=(3, 5))
    groups = {"posterior": {"z": z}, "observed_data": {"x": x}}
    tree = build(groups, {"z": ["datum", "code"], "x": ["datum", "pixel"]}, {"datum": ["a", "b", "c"]})
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "code")
    np.testing.assert_array_equal(tree["posterior"]["z"].sel(datum="b").values, z[:, :, 1])
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws=0"),
        ({"max_data": 0}, "max_data=0"),
        ({"draws": 10**9}, "GiB.*lower draws"),
        ({"resampled": 20}, "resampled must be at least 200"),
    ],
)
def test_bad_sizes(pair, x, change, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(pair, x, **change)


def test_bad_programs_and_data(pair, x):
    with pytest.raises(ValueError, match="NaN"):
        to_arviz(pair, torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="model and a guide"):
        to_arviz(object(), x)

    def clash(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("draw", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'draw'.*rename"):
        to_arviz(Pair(clash, clash), x)
