"""Evaluation: how many particles, which seed, whose modes; programs of every kind; and every refusal."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import LATENT, ROWS, WIDTH, Discrete, OneLevel, case
from small import conditions, cvae, pixels, vae
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

import ppl_vae as pv
from ppl_vae.evaluate import Estimate, decode, encode
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.rng import derived, seeded

X = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)
BAND = 4.5


class Counting(OneLevel):
    """Counts the particles that its guide draws for a batch."""

    def __init__(self):
        super().__init__()
        self.drawn, self.largest = 0, 0

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.encoder(x)[:, :LATENT], 1.0).to_event(1))
        if z.dim() == 3:  # not the first look, which has no particles
            self.drawn += z.shape[0]
            self.largest = max(self.largest, z.shape[0])


# ---------------------------------------------------------------- particles
@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("particles", [1, 7, 10])
def test_exactly_k_particles(particles, chunk):
    """K not a multiple of the chunk, a chunk larger than K: K draws, and log K taken off."""
    program = Counting()
    estimate = pv.log_likelihood(program, X, particles, chunk=chunk, batch_size=100)
    assert program.drawn == particles
    assert program.largest == min(particles, chunk)
    assert estimate.name == f"L_{particles}"


def test_chunks_change_the_draws_and_nothing_else():
    """An exact guide has one weight for all draws, so any particle too many or too few would show."""
    program = LinearGaussian.random(0, guide="exact").requires_grad_(False)
    x = program.draw(3, seed=0)
    exact = program.log_evidence(x)
    for particles, chunk in ((7, 2), (7, 7), (7, 50), (1, 3)):
        value = pv.log_likelihood(program, x, particles, chunk=chunk).value
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-9)


def test_batches_do_not_share_weights():
    """A bound per datum, not one for the batch: its sum is not that of joint weights."""
    program = LinearGaussian.random(0).requires_grad_(False)
    x = program.draw(40, seed=0)
    estimate = pv.log_likelihood(program, x, 200)
    assert estimate.value.shape == (40,)
    gap = float((program.log_evidence(x) - estimate.value).sum())
    assert gap < 2.0, "joint weights of 40 data with 200 particles would lose tens of nats"


def test_a_subsampled_plate_does_not_temper_the_weights():
    """Rows of a plate of 50 have the bound that they have alone."""
    whole, part = case("one level"), case("given rows")
    part.pair.load_state_dict(whole.pair.state_dict())
    for judge in (pv.log_likelihood, pv.elbo):
        ours, alone = judge(part.pair, X, 20), judge(whole.pair, X, 20)
        assert torch.equal(ours.value, alone.value)
        assert torch.equal(ours.stderr, alone.stderr)


# ---------------------------------------------------------------- seeds and modes
class Noisy(OneLevel):
    """A guide with dropout, which evaluation turns off."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 2 * LATENT), nn.Dropout(0.5))
        self.modes = set()

    def guide(self, x):
        self.modes.add((self.training, self.encoder.training))
        super().guide(x)


JUDGES = {
    "log_likelihood": lambda p, seed: pv.log_likelihood(p, X, 5, seed=seed).value,
    "elbo": lambda p, seed: pv.elbo(p, X, 5, seed=seed, kl="sampled").value,
    "active_units": lambda p, seed: pv.active_units(p, X, seed=seed).variance["z"],
    "encode": lambda p, seed: encode(p, X, seed=seed)["z"],
    "reconstruct": lambda p, seed: pv.reconstruct(p, X, seed=seed),
    "sample": lambda p, seed: pv.sample(p, ROWS, like=(X,), seed=seed),
}


@pytest.mark.parametrize("name", JUDGES)
def test_seeds_and_modes(name):
    program, judge = Noisy(), JUDGES[name]
    program.encoder.train()
    program.decoder.eval()
    modes = [m.training for m in program.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = judge(program, 0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's stream is left alone"
    torch.manual_seed(12)
    assert torch.equal(judge(program, 0), first), "the same seed, the same value"
    if name in ("log_likelihood", "elbo", "sample"):
        assert not torch.equal(judge(program, 1), first)
    assert [m.training for m in program.modules()] == modes
    assert program.modes <= {(False, False)}, "no dropout while judging"
    assert not first.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back_after_an_error(training):
    program = Noisy().train(training)
    with pytest.raises(ValueError, match="batch"):
        pv.log_likelihood(program, torch.zeros(2, WIDTH + 1), 3)
    assert program.training is training
    assert program.encoder.training is training


def test_the_shipped_programs():
    """With and without a condition; every function gives what its name says."""
    x = pixels(20)
    for program, context in ((vae(), ()), (cvae(), (conditions(x),))):
        data = (x, *context)
        bound = pv.elbo(program, data, 50)
        tighter = pv.log_likelihood(program, data, 50)
        assert tighter.mean > bound.mean - 3 * bound.monte_carlo_stderr
        assert pv.sample(program, 20, *context).shape == x.shape
        assert pv.reconstruct(program, *data).shape == x.shape
        z = encode(program, *data)["z"]
        assert z.shape == (20, 2)
        torch.testing.assert_close(decode(program, {"z": z}, *context), pv.reconstruct(program, *data))
        assert pv.active_units(program, data).variance["z"].shape == (2,)


def test_decode_draws_the_latents_left_out():
    """Each under the seed given: the levels below those kept."""
    with seeded(0):
        program = pv.HierarchicalVAE(
            [pv.conditional_normal(pv.MLP(2, 8, 2 * 3)), pv.StandardNormal(2)],
            pv.Bernoulli(pv.MLP(3, 8, WIDTH)),
            [pv.mean_field(pv.MLP(WIDTH, 8, 2 * 3)), pv.mean_field(pv.MLP(3, 8, 2 * 2))],
        )
        z2 = torch.randn(5, 2)
    first, again, other = (decode(program, {"z2": z2}, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


@pytest.mark.parametrize("compile", ["off", "require"])
def test_modules_made_as_the_program_runs_warn_of_nothing(compile):
    """As in examples/your_own_model.py: a list of nets that is new, and so in training mode, at every run."""

    class Bundled(OneLevel):
        def model(self, x):
            pyro.module("nets", nn.ModuleList([self.decoder]))
            super().model(x)

    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("error")
        pair = as_pair(Bundled())
        pv.fit(pair, X, epochs=1, device="cpu", progress=False, compile=compile)
        assert math.isfinite(pv.log_likelihood(pair, X, 5, compile=compile).mean)


# ---------------------------------------------------------------- posteriors of every kind
@pytest.mark.parametrize("category", [False, True])
def test_a_discrete_latent(category):
    """Against the sum over all its states."""
    program = Discrete(category).requires_grad_(False)
    exact = program.log_evidence(X)
    estimate = pv.log_likelihood(program, X, 20_000, chunk=5000)
    assert bool(((estimate.value - exact).abs() <= BAND * estimate.stderr).all())
    assert float(estimate.stderr.max()) < 0.02
    bound = pv.elbo(program, X, 2000, kl="sampled")
    assert bool((bound.value - BAND * bound.stderr < exact).all())
    assert bool((bound.value < exact + BAND * bound.stderr).all())


def test_the_exact_posterior_of_one_bit():
    """Bayes' rule as guide: every particle has the weight p(x)."""
    prior, loc = torch.tensor(0.3, dtype=torch.float64), torch.tensor([-1.0, 1.5], dtype=torch.float64)

    def joint(x):
        return torch.stack(
            [Normal(loc[i], 1.0).log_prob(x) + Bernoulli(prior).log_prob(torch.tensor(i * 1.0)) for i in (0, 1)]
        )

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(prior))
            pyro.sample("x", dist.Normal(loc[0] + z * (loc[1] - loc[0]), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(joint(x).softmax(0)[1]))

    x = torch.tensor([-2.0, 0.1, 3.0])
    for particles in (1, 4, 33):
        estimate = pv.log_likelihood(Pair(model, guide), x, particles, chunk=10)
        torch.testing.assert_close(estimate.value, joint(x.double()).logsumexp(0), rtol=0, atol=1e-6)


def pointed(program, prior, cast):
    """A guide that draws the posterior's mean, cast to what the prior is of."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior.expand([program.weight.shape[1]]).to_event(1))
            loc = z.double() @ program.weight.T + program.mean
            pyro.sample("x", dist.Normal(loc, math.sqrt(program.variance)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(cast(program.posterior(x)[0]), event_dim=1))

    return Pair(model, guide)


def test_a_point_has_no_bound():
    """A mass compared with a density is no weight; the means are still to be had."""
    program = LinearGaussian.random(0).requires_grad_(False)
    pair, x = pointed(program, dist.Normal(0.0, 1.0), Tensor.double), program.draw(3, seed=0)
    for judge in (pv.log_likelihood, pv.elbo):
        with pytest.raises(ValueError, match=r"site 'z': the guide draws a point.*judge it by `reconstruct`"):
            judge(pair, x, 7)
    z = program.posterior(x)[0]
    torch.testing.assert_close(encode(pair, x)["z"], z)
    torch.testing.assert_close(pv.reconstruct(pair, x), z @ program.weight.T + program.mean)


def test_a_point_among_whole_numbers_has_a_probability():
    program = LinearGaussian.random(0).requires_grad_(False)
    pair = pointed(program, dist.Poisson(2.0), lambda z: z.abs().round().long())
    x = program.draw(3, seed=0)
    z = program.posterior(x)[0].abs().round()
    joint = Normal(z @ program.weight.T + program.mean, math.sqrt(program.variance)).log_prob(x).sum(-1)
    joint = joint + dist.Poisson(2.0).log_prob(z).sum(-1)
    for estimate in (pv.log_likelihood(pair, x, 7), pv.elbo(pair, x, 7)):
        torch.testing.assert_close(estimate.value, joint)


def test_codes_as_draws():
    """Draws follow the posterior, whose mean and covariance are exact, under a seed of their own."""
    program = LinearGaussian.random(0).requires_grad_(False)
    x = program.draw(1, seed=0).expand(4000, -1).contiguous()
    z = encode(program, x, draw=True, seed=3)["z"]
    law = program.guide_law(x[:1])
    spread = law.stddev[0]
    assert float(((z.mean(0) - law.mean[0]) / spread).abs().max()) < 5 / math.sqrt(4000)
    assert float((z.std(0) / spread - 1).abs().max()) < 5 / math.sqrt(2 * 4000)
    assert torch.equal(z, encode(program, x, draw=True, seed=3)["z"])
    assert not torch.equal(z, encode(program, x, draw=True, seed=4)["z"])
    levels = case("two levels")
    drawn = encode(levels.pair, *levels.batch, draw=True)
    means = encode(levels.pair, *levels.batch)
    assert {n: c.shape for n, c in drawn.items()} == {n: c.shape for n, c in means.items()}


def test_missing_pixels():
    """A mask on the likelihood leaves pixels out: the marginal of the others is in closed form."""
    program = LinearGaussian.random(1, 2, 5).requires_grad_(False)
    x = program.draw(3, seed=0)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)

    def model(x, keep):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            loc = z @ program.weight.T + program.mean
            pyro.sample("x", dist.Normal(loc, math.sqrt(program.variance)).mask(keep.bool()).to_event(1), obs=x)

    def guide(x, keep):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).expand([len(x), 2]).to_event(1))

    law, exact = program.marginal(), []
    for row, seen in zip(x, keep, strict=True):
        exact.append(MultivariateNormal(law.mean[seen], law.covariance_matrix[seen][:, seen]).log_prob(row[seen]))
    estimate = pv.log_likelihood(Pair(model, guide), (x, keep), 40_000, chunk=10_000)
    assert bool(((estimate.value - torch.stack(exact)).abs() <= BAND * estimate.stderr).all())
    assert float(estimate.stderr.max()) < 0.1


@pytest.mark.parametrize("name", ["handler mask", "law mask"])
def test_rows_without_a_latent(name):
    """Where a mask takes a row's latent out of both programs, the likelihood at the guide's draws is left."""
    c = case(name)
    masked = X[:, 0] <= 0
    bound, weighted = pv.elbo(c.pair, X, 10, kl="sampled"), pv.log_likelihood(c.pair, X, 10)
    assert bool((bound.diagnostics["rate"][masked] == 0).all())
    assert bool((bound.diagnostics["rate"][~masked] != 0).all())
    torch.testing.assert_close(bound.value[masked], -bound.diagnostics["distortion"][masked])
    assert bool((weighted.value > bound.value).all()), "the same draws"


@pytest.mark.parametrize("name", ["two levels", "bottom up", "nested", "bare params", "pyro guide", "auto normal"])
def test_programs_of_every_shape(name):
    """The bound rises with K, on average over data and within its errors."""
    c = case(name)
    one, many = (pv.log_likelihood(c.pair, c.batch, k, seed=1) for k in (1, 2000))
    bound = pv.elbo(c.pair, c.batch, 2000, kl="sampled")
    slack = BAND * (bound.monte_carlo_stderr + many.monte_carlo_stderr)
    assert bound.mean < many.mean + slack
    assert math.isnan(one.monte_carlo_stderr)
    assert not dict(pyro.get_param_store())


# ---------------------------------------------------------------- estimates
def test_an_estimate_adds_up():
    value, stderr = torch.tensor([-1.0, -3.0], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)
    estimate = Estimate(value, stderr, "lower", name="L_9")
    assert estimate.mean == -2.0, "per datum, not in total; log p, not minus log p"
    assert estimate.mean_stderr == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert estimate.monte_carlo_stderr == pytest.approx(0.25)
    assert str(estimate) == "L_9 = -2.000 ± 1.000 nats per datum (lower bound; 2 data; Monte Carlo s.e. 0.250)"
    assert math.isnan(Estimate(value[:1], stderr[:1], "upper").mean_stderr)


def test_float64_on_the_cpu_and_the_direction():
    for judge in (pv.log_likelihood, pv.elbo):
        estimate = judge(vae(), pixels(5), 3)
        assert estimate.direction == "lower"
        for table in (estimate.value, estimate.stderr, *estimate.diagnostics.values()):
            assert table.dtype == torch.float64
            assert table.shape == (5,)


def test_one_particle_says_nothing_of_its_error():
    for judge in (pv.log_likelihood, pv.elbo):
        assert bool(judge(vae(), pixels(5), 1).stderr.isnan().all())


def test_samples_are_those_of_the_model():
    """Mean and covariance of x are those of p(x); the mean of p(x | z) has the noise's variance less."""
    program, _ = LinearGaussian.reference()
    law, count = program.requires_grad_(False).marginal(), 20_000
    like = (torch.zeros(count, 3, dtype=torch.float64),)
    noise = program.variance * torch.eye(3, dtype=torch.float64)
    for mean, covariance in ((False, law.covariance_matrix), (True, law.covariance_matrix - noise)):
        x = pv.sample(program, count, like=like, mean=mean)
        scale = covariance.diagonal().sqrt()
        assert bool(((x.mean(0) - law.mean).abs() <= BAND * scale / math.sqrt(count)).all())
        spread = (scale[:, None] * scale) * math.sqrt(2 / count)
        assert bool(((x.T.cov() - covariance).abs() <= BAND * spread).all())


def test_reconstructions_are_means_without_noise():
    program = LinearGaussian.random(0).requires_grad_(False)
    x = program.draw(4, seed=0)
    expected = program.posterior(x)[0] @ program.weight.T + program.mean
    torch.testing.assert_close(pv.reconstruct(program, x), expected)


# ---------------------------------------------------------------- refusals
def two_outputs(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])
        pyro.sample("b", dist.Normal(z, 1.0), obs=x[:, 1])


def unit_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
@pytest.mark.parametrize(
    ("program", "data", "options", "message"),
    [
        (vae(), pixels(4), {"particles": 0}, "particles must be at least 1, got 0"),
        (vae(), pixels(4), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (vae(), pixels(4)[:, :5], {}, r"cannot take a batch of \(4, 5\)"),
        (vae(), torch.zeros(0, 12), {}, "empty"),
        (None, pixels(4), {}, "program: expected an object with a model and a guide"),
        (case("drawn rows").pair, X, {}, "3 rows in its data plate for a batch of 6; .*must hold the whole batch"),
        (case("shared latent").pair, X, {}, "site 'w' is outside the data plate"),
        (case("scaled").pair, X, {}, "site 'z' is scaled by poutine.scale"),
    ],
)
def test_refusals(judge, program, data, options, message):
    with pytest.raises(ValueError, match=message):
        judge(program, data, **options)


def test_more_refusals():
    program, x = as_pair(OneLevel()), X
    for call, message in (
        (lambda: pv.log_likelihood(program, x, 5, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: pv.active_units(program, x[:1]), "at least two data, got 1"),
        (lambda: pv.sample(program, 0, like=(x,)), "size must be at least 1, got 0"),
        (lambda: pv.sample(program, 3), "no `blank` method that tells its shapes; pass like=batch"),
        (lambda: pv.sample(program, 3, like=(x,)), "like: expected a batch of 3 rows, got 6"),
        (lambda: pv.sample(program, 6, like=(x,), site="y"), r"site: the model does not observe 'y', but \['x'\]"),
        (lambda: pv.reconstruct(program, x, site="z"), "does not observe 'z'"),
        (lambda: decode(program, {}, like=(x,)), r"latents: expected tensors of one length, got lengths \[\]"),
        (lambda: decode(program, {"z": x, "y": x[:2]}, like=(x,)), r"one length, got lengths \[2, 6\]"),
        (lambda: decode(program, {"y": x}, like=(x,)), r"latents: the model has no latent 'y', but \['z'\]"),
        (lambda: decode(program, {"z": x[:, :2]}), "no `blank` method"),
        (lambda: pv.sample(cvae(), 3, torch.tensor([0, 1])), "c: expected 3 conditions, one per sample, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_which_observed_site():
    pair = Pair(two_outputs, unit_guide)
    with pytest.raises(ValueError, match=r"site: the model observes \['a', 'b'\]; say which"):
        pv.reconstruct(pair, X)
    assert pv.reconstruct(pair, X, site="b").shape == (ROWS,)
    with seeded(0):
        assert pv.log_likelihood(pair, X, 3).value.shape == (ROWS,)


# ---------------------------------------------------------------- what is given is checked
def test_what_encode_and_reconstruct_are_given_is_checked():
    """As `fit` checks it: nothing is broadcast, and nothing passes through as NaN."""
    x, labels = pixels(6), conditions(pixels(6))
    spoiled = x.clone()
    spoiled[2, 1] = math.nan
    for look in (pv.reconstruct, encode):
        for program, batch, message in (
            (vae(), (x[0],), r"observed value has shape \(12,\)"),
            (vae(), (x[:, :5],), r"cannot take a batch of \(6, 5\)"),
            (vae(), (spoiled,), "row 2 holds NaN"),
            (vae(), (x, labels), "the model takes 1 tensors, got 2"),
            (vae(), (), "at least one column"),
            (cvae(), (x,), "takes 2 tensors, got 1"),
            (cvae(), (x, labels[:3]), r"same number of rows, got \[6, 3\]"),
            (cvae(), (x, labels + 100), "label"),
        ):
            with pytest.raises(ValueError, match=message):
                look(program, *batch)
    program = vae()
    torch.testing.assert_close(pv.reconstruct(program, x.numpy()), pv.reconstruct(program, x))
    dark = (x > 0.5).byte() * 255  # bytes are pixels, as in data
    torch.testing.assert_close(pv.reconstruct(program, dark), pv.reconstruct(program, (x > 0.5).float()))


def test_what_sample_and_decode_are_given_is_checked():
    z, labels, nan = torch.zeros(3, 2), torch.tensor([0, 1, 0]), torch.full((3, 2), math.nan)
    plain, conditional = vae(), cvae()
    for call, message in (
        (lambda: pv.sample(plain, 3, labels), "1 conditions do not suit"),
        (lambda: pv.sample(conditional, 3), "0 conditions do not suit"),
        (lambda: pv.sample(conditional, 3, labels + 100), "label"),
        (lambda: pv.sample(conditional, 3, labels[:, None]), "label|batch shape|cannot take"),
        (lambda: pv.sample(conditional, 3, labels, like=(pixels(3), labels)), "give either `like` or conditions"),
        (lambda: pv.sample(OneLevel(), 3, like=(torch.zeros(3, WIDTH + 1),)), "cannot take a batch"),
        (lambda: decode(plain, {"z": nan}), "latents 'z': row 0 holds NaN"),
        (lambda: decode(plain, {"z": z[:, :1]}), r"latents 'z': expected shape \(3, 2\), got \(3, 1\)"),
        (lambda: decode(plain, {"z": z[None]}), r"latents 'z': expected shape \(1, 2\), got \(1, 3, 2\)"),
        (lambda: decode(conditional, {"z": z}, labels + 100), "label"),
        (lambda: decode(plain, {"z": "z"}), "expected a tensor or an array, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    torch.testing.assert_close(decode(plain, {"z": z.numpy()}), decode(plain, {"z": z}))
    torch.testing.assert_close(
        pv.sample(conditional, 3, labels.numpy(), seed=4), pv.sample(conditional, 3, labels, seed=4)
    )


def test_a_blank_need_not_be_a_datum():
    """Zeros tell the shape, also where the likelihood cannot make them."""

    class Positive(OneLevel):
        def model(self, x):
            with self.plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.LogNormal(self.decoder(z)[..., :WIDTH], 1.0).to_event(1), obs=x)

        def blank(self, size):
            return (torch.zeros(size, WIDTH),)

    program = Positive()
    assert bool((pv.sample(program, 5) > 0).all())
    with pytest.raises(ValueError, match="LogNormal"):
        pv.reconstruct(program, torch.zeros(2, WIDTH))


def test_data_come_first_whatever_the_plates():
    """(B, *plates, *event) in and out, so that what `encode` gives, `decode` takes."""
    c = case("nested")
    (x,), program = c.batch, c.pair.program
    codes = encode(c.pair, x)
    means = pv.reconstruct(c.pair, x)
    pairs = torch.stack([codes["z"][:, None].expand_as(codes["u"]), codes["u"]], -1)
    torch.testing.assert_close(means, program.decoder(pairs)[..., 0].detach())
    torch.testing.assert_close(decode(c.pair, codes, like=(x,)), means)
    assert pv.sample(c.pair, 3, like=(x[:3],)).shape == (3, WIDTH)
    with pytest.raises(ValueError, match=r"latents 'u': expected shape \(6, 4\), got \(6, 3\)"):
        decode(c.pair, {**codes, "u": codes["u"][:, :3]}, like=(x,))


# ---------------------------------------------------------------- pixels, chunks, broken weights
class Watched(OneLevel):
    """Remembers the data that its model sees under particles."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def guide(self, x):
        self.seen.append(x.clone())
        super().guide(x)


def test_every_estimate_judges_the_same_redrawn_pixels():
    """Whatever K and the chunk: pixels have a stream of their own."""
    grey = pv.batches.Data(torch.full((7, WIDTH), 0.5), transform=torch.bernoulli)

    def pixels_of(judge, *args, **options):
        program = Watched()
        judge(program, grey, *args, batch_size=3, **options)
        batches = []  # a batch stays while its particles come in chunks; the first look is not an estimate
        for x in program.seen[1:]:
            if not batches or (x is not batches[-1] and not torch.equal(x, batches[-1])):
                batches.append(x)
        return torch.cat(batches)

    first = pixels_of(pv.elbo, 1)
    assert len(first) == 7
    for judge, args, options in (
        (pv.elbo, (50,), {"chunk": 7}),
        (pv.log_likelihood, (5,), {}),
        (pv.log_likelihood, (20,), {"chunk": 3}),
        (pv.active_units, (), {}),
    ):
        assert torch.equal(pixels_of(judge, *args, **options), first)
    assert not torch.equal(pixels_of(pv.elbo, 1, seed=1), first)


@pytest.mark.parametrize(("particles", "chunk"), [(1, 100), (10, 3), (10, 1), (10, 1000)])
def test_the_elbo_draws_exactly_k_in_chunks(particles, chunk):
    program = Counting()
    pv.elbo(program, X, particles, chunk=chunk)
    assert program.drawn == particles
    assert program.largest == min(particles, chunk)


def test_streamed_means_and_errors_are_those_of_all_draws():
    """The weights that were drawn chunk by chunk, taken together."""
    pair = case("one level").pair
    estimate = pv.elbo(pair, X, 25, chunk=10, kl="sampled", seed=3)
    with seeded(derived(3, "weights")), torch.no_grad():
        tables = [pv.log_terms(pair, X, particles=k) for k in (10, 10, 5)]
    weight = torch.cat([t.weight() for t in tables]).double()
    torch.testing.assert_close(estimate.value, weight.mean(0))
    torch.testing.assert_close(estimate.stderr, weight.std(0) / 5)
    rate = torch.cat([t.rate for t in tables]).double().mean(0)
    torch.testing.assert_close(estimate.diagnostics["rate"], rate)
    torch.testing.assert_close(estimate.value, -(rate + estimate.diagnostics["distortion"]))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        pv.elbo(pair, X, chunk=0)


@pytest.mark.parametrize("judge", [pv.log_likelihood, pv.elbo])
@pytest.mark.parametrize("particles", [1, 5])
def test_a_broken_weight_is_an_error_and_an_impossible_datum_is_not(judge, particles):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("odd", torch.where(x == 3.0, x.log() * math.nan, 0.0 * z))
            pyro.factor("never", torch.where(x == 2.0, -math.inf, 0.0 * z))

    pair, x = Pair(model, unit_guide), torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match=r"(L_|ELBO).* of row 4 is nan"):
        judge(pair, x, particles, batch_size=2, chunk=2)
    value = judge(pair, x[:4], particles, batch_size=3, chunk=2).value
    assert value.tolist() == [0.0, 0.0, -math.inf, 0.0]
