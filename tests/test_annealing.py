"""Annealing: paths, moves that leave them as they are, unbiased weights, and bounds that enclose exact values."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import Constrained, Discrete, Nested, SharedLatent, TwoLevel
from small import cvae, pixels
from torch import nn
from torch.distributions import MultivariateNormal

import ppl_vae as pv
from ppl_vae.annealing import _weights, annealed, sandwich
from ppl_vae.capture import Engine
from ppl_vae.estimates import IncompleteError
from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.paths import Path
from ppl_vae.rng import seeded
from ppl_vae.schedules import Annealing, pilot, schedule, spaced
from ppl_vae.traces import joint_terms, log_posterior

FEW = Annealing(chains=16, distributions=60, leapfrog=4)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def few(**changes):
    return Annealing(**({"chains": 16, "distributions": 60, "leapfrog": 4} | changes))


def path_of(program, *batch, start="prior"):
    pair = as_pair(program).eval()
    inspect(pair, batch)
    return Path(pair, batch, start, Engine("off"))


# ---- coordinates
def test_latents_of_all_supports_are_real_vectors_and_back():
    x = torch.randn(5, 2)
    path = path_of(Constrained(), x)
    state = torch.randn(3, 5, 1 + 2 + 2)
    latents, volume = path.coordinates.unpack(state)
    shapes = {n: tuple(z.shape) for n, z in latents.items()}
    assert shapes == {"rate": (3, 5), "share": (3, 5, 3), "odds": (3, 5, 2)}
    assert (latents["rate"] > 0).all()
    torch.testing.assert_close(latents["share"].sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(path.coordinates.pack(latents), state, rtol=1e-4, atol=1e-5)

    def free(vector):  # the simplex by its first two entries
        z = path.coordinates.unpack(vector.reshape(1, 1, -1))[0]
        return torch.cat([z["rate"].reshape(1), z["share"][0, 0, :2], z["odds"][0, 0]])

    jacobian = torch.autograd.functional.jacobian(free, state[1, 2])
    torch.testing.assert_close(volume[1, 2], jacobian.det().abs().log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["prior", "guide"])
@pytest.mark.parametrize("program", [Constrained, TwoLevel, Nested])
def test_densities_and_slopes_on_the_path(program, start):
    program = program()
    x = torch.randn(5, 2 if isinstance(program, Constrained) else 4)
    path = path_of(program, x, start=start)
    state = path.draw((x,), 3)
    here = path.at(state, (x,))
    latents, volume = path.coordinates.unpack(state)
    prior, likelihood = joint_terms(path.pair, latents, x)
    first = prior if start == "prior" else log_posterior(path.pair, latents, x)
    torch.testing.assert_close(here.first, first.detach() + volume)
    torch.testing.assert_close(here.ratio, (prior + likelihood - first).detach(), rtol=1e-4, atol=1e-4)
    direction, h = torch.randn_like(state), 1e-2
    up, down = (path.at(state + s * h * direction, (x,)) for s in (1, -1))
    for value, slope in (("first", "first_slope"), ("ratio", "ratio_slope")):
        numeric = (getattr(up, value) - getattr(down, value)) / (2 * h)
        exact = (getattr(here, slope) * direction).sum(-1)
        torch.testing.assert_close(numeric, exact, rtol=0.02, atol=0.05)


# ---- moves
def test_a_trajectory_runs_backwards_and_keeps_its_energy():
    program = LinearGaussian.random(0)
    x = program.draw(4, seed=0)
    path = path_of(program, x)
    here, beta, step = path.at(path.draw((x,), 3), (x,)), torch.tensor(0.7).double(), torch.full((4, 1), 0.002)
    momentum = torch.randn_like(here.state)

    def leap(point, p):
        state, p, *rest = path.leapt(point.state, p, point.first_slope, point.ratio_slope, beta, step.double(), x)
        return type(point)(state, *rest), p

    there, after = here, momentum
    for _ in range(10):
        there, after = leap(there, after)
    energies = [p.first + beta * p.ratio - 0.5 * m.square().sum(-1) for p, m in ((here, momentum), (there, after))]
    assert (energies[0] - energies[1]).abs().max() < 1e-2
    assert (there.state - here.state).abs().max() > 0.01
    back, p = there, -after
    for _ in range(10):
        back, p = leap(back, p)
    torch.testing.assert_close(back.state, here.state)
    torch.testing.assert_close(-p, momentum)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_moves_leave_the_path_as_it_is(beta):
    """From exact draws of f_β, normal here, to draws of its mean and covariance, at a step often refused."""
    program, count = LinearGaussian.random(0, latent=2, width=3), 40_000
    x = program.draw(1, seed=0)
    path = path_of(program, x)
    weight = program.weight.detach()
    precision = torch.eye(2).double() + beta * weight.T @ weight / program.variance
    covariance = torch.linalg.inv(precision)
    mean = beta * (x - program.mean.detach()) @ weight @ covariance / program.variance
    law = MultivariateNormal(mean, covariance)
    here = path.at(law.sample((count,)), (x,))
    step = torch.full((1, 1), 0.9 * float(covariance.diagonal().min().sqrt())).double()
    there, probability = path.move(here, torch.tensor(beta).double(), step, 3, (x,))
    assert 0.3 < probability.mean() < 0.99
    z = (there.state[:, 0] - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T  # standard normal
    assert (z.mean(0).abs() < 5 / count**0.5).all()
    assert ((z.T @ z / count - torch.eye(2).double()).abs() < 5 * (2 / count) ** 0.5).all()
    moved = (there.state != here.state).any(-1).double().mean()
    assert moved == pytest.approx(float(probability.mean()), abs=0.02)


# ---- weights
def posterior_draws(program, x, count):
    loc, covariance = program.requires_grad_(False).posterior(x)
    return MultivariateNormal(loc, covariance).sample((count,))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_weights_are_unbiased(start):
    """E[w] = p(x), by so few distributions that single log weights are nats away."""
    program = LinearGaussian.random(1, latent=2, width=3, widen=2.0)
    x = program.draw(4, seed=0)
    exact = program.log_evidence(x).detach()
    settings = Annealing(chains=40_000, distributions=4, leapfrog=2, start=start, chunk=20_000)
    found = annealed(program, x, settings, compile="off")
    weights = (found.diagnostics["log_weights"] - exact[:, None]).exp()
    error = weights.std(1) / 200
    assert ((weights.mean(1) - 1).abs() < 4 * error).all()
    assert (error < 0.1).all()
    assert (found.diagnostics["log_weights"].mean(1) < exact - 0.05).all()


@pytest.mark.parametrize("kind", ["sigmoid", "adaptive"])
def test_errors_are_those_of_replicas_and_the_schedule_may_be_any(kind):
    """Many copies of one datum: reported errors are the spread of their values; E w = p(x) again."""
    program = LinearGaussian.random(1, latent=2, width=3)
    x = program.draw(1, seed=0).expand(500, -1)
    settings = Annealing(chains=64, distributions=12, leapfrog=3, schedule=kind)
    found = annealed(program, x, settings, batch_size=500, compile="off")
    assert found.stderr.square().mean().sqrt() == pytest.approx(float(found.value.std()), rel=0.25)
    shares = (found.diagnostics["log_weights"].flatten() - program.log_evidence(x[:1]).detach()).exp()
    assert abs(shares.mean() - 1) < 4 * shares.std() / len(shares) ** 0.5


def test_reverse_weights_are_unbiased():
    """E[w] = 1 / p(x) from exact draws of the posterior, many of one datum as data of their own."""
    program = LinearGaussian.random(1, latent=2, width=3)
    x = program.draw(1, seed=0).expand(3000, -1)
    path, settings = path_of(program, x), Annealing(chains=1, distributions=5, leapfrog=2)
    exact = path.coordinates.pack({"z": posterior_draws(program, x, 1)})
    weights, _ = _weights(path, settings, pilot(path, settings, (x,)), (x,), exact)
    shares = (weights[:, 0] + program.log_evidence(x).detach()).exp()
    assert abs(shares.mean() - 1) < 4 * shares.std() / 3000**0.5
    assert shares.std() / 3000**0.5 < 0.1


@pytest.mark.parametrize("distributions", [2, 7])
@pytest.mark.parametrize("kind", ["sigmoid", "linear"])
def test_from_the_exact_posterior_every_weight_is_p(distributions, kind):
    program = LinearGaussian.random(0, guide="exact")
    x = program.draw(5, seed=0)
    settings = few(distributions=distributions, start="guide", schedule=kind)
    found = annealed(program, x, settings, compile="off")
    exact = program.log_evidence(x).detach()
    torch.testing.assert_close(found.diagnostics["log_weights"], exact[:, None].expand(-1, 16), rtol=0, atol=1e-9)
    assert found.monte_carlo_stderr < 1e-6


@pytest.mark.parametrize(
    ("latent", "width", "kind", "start", "distributions"),
    [
        (3, 6, "sigmoid", "prior", 120),
        (3, 6, "adaptive", "prior", 120),
        (3, 6, "linear", "guide", 40),
        pytest.param(8, 40, "sigmoid", "prior", 2000, marks=pytest.mark.slow),
        pytest.param(50, 784, "adaptive", "prior", 4000, marks=pytest.mark.slow),
    ],
)
def test_the_sandwich_encloses_the_exact_value(latent, width, kind, start, distributions):
    program = LinearGaussian.random(2, latent=latent, width=width)
    program.blank = lambda size: (torch.zeros(size, width, dtype=torch.float64),)
    settings = few(distributions=distributions, start=start, schedule=kind)
    found = sandwich(program, 30, settings=settings, compile="auto")
    with seeded(0):  # the same data, from the same stream
        x = pv.sample(program, 30, seed=0)
    exact = program.log_evidence(x).detach()
    low, high = exact - found.lower.value, found.upper.value - exact
    for distance in (low, high):
        error = distance.std() / 30**0.5
        assert distance.mean() > -3 * error
        assert distance.mean() < 0.3 + 3 * error
    assert found.gap.mean == pytest.approx(float((low + high).mean()))
    assert found.gap.stderr == pytest.approx(float((low + high).std() / 30**0.5))
    assert (found.lower.direction, found.upper.direction) == ("lower", "upper")


def test_more_distributions_are_tighter_until_the_gap_is_as_wanted():
    program = LinearGaussian.random(2, latent=4, width=10)
    program.blank = lambda size: (torch.zeros(size, 10, dtype=torch.float64),)
    start = few(distributions=4)
    rough = sandwich(program, 60, settings=start, compile="off")
    found = sandwich(program, 60, settings=start, wanted=1.2, compile="off")
    assert rough.gap.mean > 1.5
    assert found.gap.mean + 2 * found.gap.stderr < 1.2
    assert found.settings.distributions > 4
    assert math.log2(found.settings.distributions / 4) % 1 == 0
    stopped = sandwich(program, 20, settings=start, wanted=1e-9, most=10, compile="off")
    assert stopped.settings.distributions == 8


def two_levels():
    """h -> z -> x, all linear and normal, with log p(x)."""
    with seeded(3):
        return TwoLevel().double()


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_two_levels_and_conditions_agree_with_importance_sampling(start):
    """Where L_K of very many particles is as good as exact."""
    x = pixels(12)
    labels = (x[:, :2] > 0.5).sum(1)
    for program, data in ((cvae(), (x, labels)), (two_levels(), torch.randn(12, 4).double())):
        found = annealed(program, data, few(distributions=80, start=start), compile="off")
        close = pv.importance(program, data, 40_000, defensive=0.5, chunk=4000)
        distance = found.value - close.value
        error = (found.stderr.square() + close.stderr.square()).sqrt()
        assert (distance.abs() < 5 * error + 0.05).all()
        assert found.diagnostics["acceptance"].min() > 0.3


def test_latents_of_constrained_support():
    x = torch.rand(6, 2) + 0.2
    found = annealed(Constrained(), x, few(distributions=80), compile="off")
    close = pv.log_likelihood(Constrained(), x, 40_000, chunk=4000)
    error = (found.stderr.square() + close.stderr.square()).sqrt()
    assert ((found.value - close.value).abs() < 5 * error + 0.02).all()


def test_a_mixture_prior():
    program = pv.VAE(
        pv.MixturePrior(2, 3), pv.Normal(pv.MLP(2, 8, 4), scale=0.5), pv.mean_field(pv.MLP(4, 8, 2 * 2))
    )
    x = torch.randn(5, 4)
    found = annealed(program, x, few(distributions=60), compile="off")
    close = pv.log_likelihood(program, x, 40_000, chunk=4000)
    error = (found.stderr.square() + close.stderr.square()).sqrt()
    assert ((found.value - close.value).abs() < 5 * error + 0.02).all()


def test_a_sandwich_of_two_levels_conditions_and_inner_plates():
    """Programs with their own shapes: the lower bound stays below the upper one, and bounds get no error alone."""
    labels = torch.tensor([0, 1, 2] * 8)
    x = torch.randn(24, 4)
    for found in (
        sandwich(cvae(), 24, labels, settings=few(distributions=100), batch_size=10, compile="off"),
        sandwich(two_levels(), 24, like=(x.double(),), settings=few(distributions=100), compile="off"),
        sandwich(Constrained(), 24, like=(x[:, :2],), settings=few(distributions=100), compile="off"),
    ):
        assert found.gap.mean > -3 * found.gap.stderr
        assert found.gap.mean < 1
        assert found.upper.stderr.isnan().all()
        assert "gap" in str(found)


# ---- how it runs
def test_captured_is_as_written():
    """Move by move; in a long run the rounding of each move grows in the next, as in any dynamics."""
    program = LinearGaussian.random(0)
    x = program.draw(6, seed=0)
    pair = as_pair(program).eval()
    inspect(pair, (x,))
    found = []
    for engine in (Engine("off"), Engine("require")):
        path = Path(pair, (x,), "guide", engine)
        with seeded(1), torch.no_grad():
            here = path.at(path.draw((x,), 4), (x,))
            for beta in (0.1, 0.5, 1.0):
                here, _ = path.move(here, torch.tensor(beta).double(), torch.full((6, 1), 0.1).double(), 3, (x,))
        found.append(here)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    assert engine.describe().startswith("compiled")


def test_a_short_last_batch_is_captured_apart_and_is_as_written(interpreted):
    program = LinearGaussian.random(0)
    x, settings = program.draw(7, seed=0), few(chains=3, distributions=4, leapfrog=1)
    found = annealed(program, x, settings, batch_size=5, compile="require")
    assert len(interpreted) == 2  # one graph for each length
    plain = annealed(program, x, settings, batch_size=5, compile="off")
    torch.testing.assert_close(found.diagnostics["log_weights"], plain.diagnostics["log_weights"])
    torch.testing.assert_close(found.diagnostics["acceptance"], plain.diagnostics["acceptance"])


def test_a_stream_is_annealed_as_its_batches_are():
    program = LinearGaussian.random(0)
    x = program.draw(7, seed=0)
    found, streamed = (
        annealed(program, data, few(distributions=5, leapfrog=1), batch_size=5, compile="off")
        for data in (x, pv.Stream([x[:5], x[5:]]))
    )
    assert torch.equal(found.value, streamed.value)


def test_redrawn_pixels_are_those_that_importance_sampling_judges():
    """Of a model whose pixels depend on no latent, so that every weight is p(x) itself."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    program = pv.VAE(pv.StandardNormal(1), pv.Bernoulli(pv.Constant(logits)), pv.StandardNormal(1))
    grey = torch.randint(0, 256, (9, 4), dtype=torch.uint8)
    data = pv.Data(grey, transform=pv.redraw)
    settings = few(chains=2, distributions=5, leapfrog=1)
    first, other = (annealed(program, data, settings, batch_size=4, seed=s, compile="off").value for s in (1, 2))
    close = pv.log_likelihood(program, data, 1, batch_size=4, seed=1, compile="off").value
    torch.testing.assert_close(first, close, rtol=0, atol=1e-4)
    assert not torch.isclose(first, other).all()


def test_the_seed_decides_and_the_callers_stream_is_left_alone():
    program = LinearGaussian.random(0)
    x = program.draw(6, seed=0)
    state = torch.get_rng_state()
    first, again, other = (annealed(program, x, FEW, seed=s, compile="off") for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.value, again.value)
    assert not torch.isclose(first.value, other.value).any()
    assert first.diagnostics["log_weights"].shape == (6, 16)


@pytest.mark.parametrize(("chains", "chunk"), [(5, 2), (4, 2), (1, 1), (3, 64)])
def test_exactly_so_many_chains(chains, chunk):
    program = LinearGaussian.random(0)
    settings = few(chains=chains, chunk=chunk, distributions=5, leapfrog=1)
    found = annealed(program, program.draw(3, seed=0), settings, batch_size=2, compile="off")
    assert found.diagnostics["log_weights"].shape == (3, chains)
    assert (found.diagnostics["acceptance"] <= 1).all()


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_schedules(kind, steps):
    betas = schedule(kind, steps)
    assert (betas[0], betas[-1], len(betas)) == (0, 1, steps + 1)
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas, 1 - betas.flip(0))
    if kind == "sigmoid" and steps > 3:
        assert betas.diff()[0] < 0.2 * betas.diff()[steps // 2]


@pytest.mark.parametrize("spreads", [[0.0] * 5, [0, 0, 1, 2, 1], [1, 1, 1, 0, 0], [1e20, 1, 1, 1, 1]])
def test_an_adaptive_schedule_goes_from_0_to_1(spreads):
    betas = spaced(torch.linspace(0, 1, 5).double(), torch.tensor(spreads).double(), 20)
    assert (betas[0], betas[-1], len(betas)) == (0, 1, 21)
    assert (betas.diff() >= 0).all()


def test_an_adaptive_schedule_leaves_out_data_that_fail():
    x, c = torch.rand(5, 1), torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0])
    with pytest.raises(IncompleteError, match="row 2") as caught:
        annealed(Spoiled(), (x, c), few(schedule="adaptive"), compile="off")
    assert caught.value.result.value.isnan().sum() == 1


# ---- what is refused
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"chains": 0}, "chains must be at least 1, got 0"),
        ({"distributions": 1}, "distributions must be at least 2, got 1; one is importance sampling"),
        ({"leapfrog": 0}, "leapfrog must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"start": "middle"}, "start must be one of prior, guide, got 'middle'"),
        ({"schedule": "cosine"}, "schedule must be one of linear, sigmoid, adaptive, got 'cosine'"),
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"step_size": math.nan}, "step_size must be positive and finite, got nan"),
        ({"acceptance": 1.0}, "acceptance must lie between 0 and 1, got 1.0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Annealing(**setting)


def uniform(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Uniform(z, z + 1))
        pyro.sample("x", dist.Normal(u[..., None], 1.0).to_event(1), obs=x)


def observed_apart(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=2 * x)


def same_latents(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def walk(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        before = torch.nn.functional.pad(x[:, :-1], (1, 0)) + z[..., None]
        pyro.sample("x", dist.Normal(before, 0.1).to_event(1), obs=x)


def turned(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = x.reshape(-1, 2, 2).transpose(1, 2)
        loc = z[..., None, None] + torch.tensor([[0.0, 10.0], [20.0, 30.0]])
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(2), obs=x)


def circle(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.VonMises(0.0, 1.0))


def sphere(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.ProjectedNormal(torch.ones(3)))


def some_rows(x):
    with pyro.plate("data", len(x), subsample_size=2, dim=-1) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x[rows])


def some_rows_guide(x):
    with pyro.plate("data", len(x), subsample_size=2, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def points():
    return pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), scale=1.0), pv.Point(pv.MLP(4, 2)))


def test_programs_that_cannot_be_annealed():
    x = torch.rand(4, 1)
    density = pv.Density(pv.Normal(pv.Constant(torch.zeros(1), learned=True), 1.0))
    apart = Pair(observed_apart, same_latents)
    for call, message in (
        (lambda: annealed(Discrete(), torch.rand(3, 4), FEW), "'z': it is discrete, .*: Bernoulli with events"),
        (
            lambda: annealed(Pair(uniform, uniform_guide), x, FEW),
            "support of Uniform has tensors",
        ),
        (lambda: annealed(density, x, FEW), "nothing is latent"),
        (lambda: sandwich(apart, 4, settings=FEW, like=(x,)), "site 'x': what the model observes is no tensor"),
        (lambda: sandwich(apart, 0), "size must be at least 1, got 0"),
        (lambda: sandwich(apart, 2, wanted=0.0), "wanted must be positive, in nats, got 0.0"),
        (lambda: sandwich(apart, 1, wanted=1.0), "size must be at least 2"),
        (
            lambda: sandwich(Pair(walk, same_latents), 4, settings=FEW, like=(x.repeat(1, 5),)),
            "depends on x itself",
        ),
        (
            lambda: sandwich(Pair(turned, same_latents), 4, settings=FEW, like=(x.repeat(1, 4),)),
            "in another order",
        ),
        (lambda: annealed(Pair(circle, circle), x, FEW), "site 'z': no map from real numbers .* VonMises"),
        (lambda: annealed(Pair(sphere, sphere), x, FEW), "site 'z': no map from real numbers .* ProjectedNormal"),
        (lambda: annealed(Pair(some_rows, some_rows_guide), x, FEW), "2 rows in its data plate for a batch of 4"),
        (lambda: annealed(SharedLatent(), torch.rand(3, 4), FEW), "'w' is outside the data plate"),
        (lambda: annealed(points(), torch.rand(3, 4), few(start="guide")), "the guide draws a point"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def uniform_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Uniform(z, z + 1))


class Spoiled(nn.Module):
    """NaN where the second column is negative."""

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((z + c.log())[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        same_latents(x)


def test_a_datum_that_gives_nan_is_named_and_the_others_are_kept():
    x, c = torch.rand(5, 1), torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0])
    program = Spoiled()
    with pytest.raises(IncompleteError, match="AIS, 16 x 60 of row 2 is nan") as caught:
        annealed(program, (x, c), FEW, compile="off")
    value = caught.value.result.value
    assert value.isnan().tolist() == [False, False, True, False, False]
    clean = annealed(program, (x, c.abs()), FEW, compile="off").value
    exact = dist.Normal(c.abs().log(), math.sqrt(2)).log_prob(x[:, 0]).double()
    assert (clean - exact).abs().max() < 0.5
    assert (value - exact)[[0, 1, 3, 4]].abs().max() < 0.5


def test_a_step_size_that_is_far_too_great_only_refuses_moves():
    program = LinearGaussian.random(0)
    x = program.draw(3, seed=0)
    found = annealed(program, x, few(step_size=1e6, distributions=5), compile="off")
    assert found.value.isfinite().all()
