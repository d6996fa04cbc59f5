"""Priors: densities that are what they are called, and parameters that training reaches."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from small import LATENT, WIDTH, fit, pixels
from test_steps import agree, update_of

import ppl_vae as pv
from ppl_vae.estimators import doubly, pathwise
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.priors import LearnedNormal, MixturePrior, UniformCodes, VampPrior, flow_prior
from ppl_vae.rng import seeded
from ppl_vae.triangular import masked_autoregressive


@pytest.mark.parametrize("context", [(), (torch.zeros(5, 2),), (torch.zeros(5), torch.ones(5, 3))])
def test_the_standard_normal_whatever_the_context(context):
    prior = pv.StandardNormal(4)
    law = prior(*context)
    assert law.batch_shape == ()
    assert law.event_shape == (4,)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = torch.from_numpy(stats.norm.logpdf(z.numpy()).sum(-1))
    torch.testing.assert_close(law.log_prob(z), by_hand)
    assert not list(prior.parameters())


def test_it_moves_with_its_module():
    assert pv.StandardNormal(2).double()().sample().dtype == torch.float64


@pytest.mark.parametrize("latent", [0, -3])
def test_a_prior_needs_a_latent(latent):
    with pytest.raises(ValueError, match=f"latent must be at least 1, got {latent}"):
        pv.StandardNormal(latent)


@pytest.mark.parametrize("lead", [(5,), (3, 5)])
def test_the_conditional_normal_is_the_nets_mean_and_scale(lead):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, c = pv.MLP(3, 8, 2 * 2), torch.randn(*lead, 3)
    law = pv.conditional_normal(net)(c)
    loc, raw = net(c).chunk(2, dim=-1)
    assert (law.batch_shape, law.event_shape) == (lead, (2,))
    torch.testing.assert_close(law.mean, loc)
    torch.testing.assert_close(law.stddev, (7 * (raw / 7).tanh()).exp())


# ---- learned ones
def learned(kind, seed=0, **options):
    """A prior of each kind with two latents and a posterior for it, always alike."""
    with seeded(seed):
        posterior = pv.mean_field(pv.MLP(WIDTH, 16, 2 * LATENT))
        make = {
            "learned": lambda: LearnedNormal(LATENT),
            "mixture": lambda: MixturePrior(LATENT, 5),
            "vamp": lambda: VampPrior.from_data(posterior, pixels(40), 5, **options),
            "flow": lambda: flow_prior(LATENT, *masked_autoregressive(LATENT, (8,))),
        }
        return make[kind](), posterior


every_prior = pytest.mark.parametrize("kind", ["learned", "mixture", "vamp", "flow"])


def disturbed(prior, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in prior.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return prior


@every_prior
def test_densities_integrate_to_one_and_draws_follow_them(kind):
    prior = disturbed(learned(kind)[0])
    axis = torch.linspace(-12, 12, 401)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = prior().log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
        with seeded(0):
            draws = prior().sample((20000,))
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)

    def features(z):
        return torch.cat([z.tanh(), z.tanh().square(), (z[:, :1] * z[:, 1:]).tanh()], -1)

    error = features(draws).std(0) / len(draws) ** 0.5
    expected = (features(grid) * mass[:, None]).sum(0)
    assert ((features(draws).mean(0) - expected).abs() < 5 * error + 1e-3).all()


@every_prior
@pytest.mark.parametrize("lead", [(), (4,), (3, 4)])
def test_priors_ignore_the_context_and_take_any_leading_dimensions(kind, lead):
    prior = learned(kind)[0]
    law = prior(torch.zeros(6, 2))
    assert (law.batch_shape, law.event_shape, law.support.event_dim) == ((), (LATENT,), 1)
    z = torch.randn(*lead, LATENT, generator=torch.Generator().manual_seed(0))
    for wide in (law, law.expand(lead)):
        table = wide.log_prob(z)
        assert table.shape == lead
        torch.testing.assert_close(table.flatten()[-1], law.log_prob(z.reshape(-1, LATENT)[-1]))
    assert law.expand(lead).sample().shape == (*lead, LATENT)


@every_prior
def test_two_steps_of_training_move_every_parameter(kind):
    prior, posterior = learned(kind)
    program = pv.VAE(prior, pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale()), posterior)
    before = {n: p.clone() for n, p in prior.named_parameters()}
    run = fit(program, pixels(32), epochs=1, batch_size=16, compile="off")
    assert run.history[-1]["train"] == run.history[-1]["train"]
    frozen = [n for n, p in prior.named_parameters() if torch.equal(p, before[n])]
    assert all(
        "layers.0" in n for n in frozen
    )  # behind a layer that starts at zero, they move from the second step
    assert pv.log_likelihood(program, pixels(8), particles=20).value.isfinite().all()


@every_prior
@pytest.mark.parametrize("estimator", [pathwise, doubly])
def test_captured_and_as_written(interpreted, kind, estimator):
    prior, posterior = learned(kind)
    program = pv.VAE(disturbed(prior), pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale()), posterior)
    pair = as_pair(program)
    inspect(pair, (pixels(6),))
    agree(update_of(pair, pv.IWAE(3, estimator=estimator)), pixels(6))
    assert len(interpreted) == 1
    assert pv.IWAE(3)(pair, pixels(6)).isfinite().all()


@every_prior
def test_under_pyros_own_svi(kind):
    prior, posterior = learned(kind)
    program = pv.VAE(disturbed(prior), pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale()), posterior)
    before = {n: p.clone() for n, p in program.named_parameters()}
    with pyro.get_param_store().scope():
        pyro.clear_param_store()
        svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        with seeded(0):
            for _ in range(2):
                assert math.isfinite(svi.step(pixels(16)))
    assert [n for n, p in program.named_parameters() if torch.equal(p, before[n])] == []


def test_the_learned_normal_is_scipys():
    prior = disturbed(LearnedNormal(3))
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scale = (7 * (prior.log_scale / 7).tanh()).exp().detach()
    expected = stats.norm.logpdf(z.numpy(), prior.loc.detach().numpy(), scale.numpy()).sum(-1)
    torch.testing.assert_close(prior().log_prob(z).detach(), torch.from_numpy(expected).float())
    torch.testing.assert_close(LearnedNormal(3)().log_prob(z), pv.StandardNormal(3)().log_prob(z))


def test_the_learned_normal_has_a_closed_kl():
    prior, posterior = learned("learned")
    closed = torch.distributions.kl_divergence(posterior(pixels(4)), disturbed(prior)().expand((4,)))
    with seeded(0):
        q = posterior(pixels(4))
        z = q.sample((20000,))
        sampled = q.log_prob(z) - prior().log_prob(z)
    assert ((sampled.mean(0) - closed).abs() < 5 * sampled.std(0) / 20000**0.5).all()


def test_the_mixture_is_torchs():
    prior = disturbed(MixturePrior(3, 4))
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scale = (7 * (prior.log_scale / 7).tanh()).exp()
    parts = torch.distributions.Independent(torch.distributions.Normal(prior.loc, scale), 1)
    weights = torch.distributions.Categorical(logits=prior.logits)
    expected = torch.distributions.MixtureSameFamily(weights, parts).log_prob(z)
    torch.testing.assert_close(prior().log_prob(z), expected)
    by_hand = torch.stack([w * parts.log_prob(zi).exp() for zi in z for w in [weights.probs]]).sum(-1).log()
    torch.testing.assert_close(prior().log_prob(z), by_hand)


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_responsibilities_are_bayes_rule(name):
    prior = disturbed(learned(name)[0])
    z = torch.randn(7, 3, LATENT, generator=torch.Generator().manual_seed(0))
    found = prior.responsibilities(z)
    law = prior()
    for m, weight in enumerate(law.mixture_distribution.probs):
        component = torch.distributions.Normal(
            law.component_distribution.mean[m], law.component_distribution.stddev[m]
        )
        joint = weight * component.log_prob(z).sum(-1).exp()
        torch.testing.assert_close(found[..., m], joint / law.log_prob(z).exp())
    torch.testing.assert_close(found.sum(-1), torch.ones(7, 3))


def test_a_mixture_starts_where_it_is_put():
    prior = MixturePrior(2, 3)
    loc, scale, weights = torch.randn(3, 2), torch.rand(3, 2) + 0.01, torch.tensor([1.0, 2.0, 5.0])
    prior.start_at(loc, scale.double(), weights)
    law = prior()
    torch.testing.assert_close(law.mixture_distribution.probs, weights / 8)
    torch.testing.assert_close(law.component_distribution.mean, loc)
    torch.testing.assert_close(law.component_distribution.stddev, scale)
    prior.start_at(loc, scale)
    torch.testing.assert_close(prior().mixture_distribution.probs, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(2, 2)}, r"loc: expected shape \(3, 2\), got \(2, 2\)"),
        ({"loc": torch.full((3, 2), torch.inf)}, "loc must lie between -inf and inf, got inf"),
        ({"loc": torch.full((3, 2), torch.nan)}, "loc must lie between -inf and inf, got nan"),
        ({"scale": torch.ones(2)}, r"scale: expected shape \(3, 2\), got \(2,\)"),
        ({"scale": torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])}, r"scale must lie .*1\.1e\+03, got 0"),
        ({"scale": torch.full((3, 2), 1e-6)}, r"scale must lie between 0.000912 and .*, got 1e-06"),
        ({"weights": torch.ones(2)}, r"weights: expected shape \(3,\), got \(2,\)"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "weights must lie between 0 and inf, got -1"),
    ],
)
def test_what_a_mixture_starts_at_is_checked(change, message):
    prior = MixturePrior(2, 3)
    before = [p.clone() for p in prior.parameters()]
    with pytest.raises(ValueError, match=message):
        prior.start_at(**({"loc": torch.zeros(3, 2), "scale": torch.ones(3, 2)} | change))
    assert all(map(torch.equal, before, prior.parameters()))


@pytest.mark.parametrize("spread", [0.3, 0.8, 0.95])
def test_a_mixture_starts_as_wide_as_the_standard_normal(spread):
    with seeded(0):
        prior = MixturePrior(2, 4000, spread=spread)
    assert prior().variance.tolist() == pytest.approx([1, 1], abs=0.1)
    assert prior.loc.std().item() == pytest.approx(spread, abs=0.05)


@pytest.mark.parametrize("lead", [(7,), (3, 7)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_the_vamp_prior_is_the_mixture_written_out(lead, weighted, unit):
    prior, posterior = learned("vamp", unit=unit, learned_weights=weighted)
    disturbed(prior)
    z = torch.randn(*lead, LATENT, generator=torch.Generator().manual_seed(0))
    terms = [posterior(prior.inputs[m]).log_prob(z) for m in range(5)]
    weights = prior.logits.softmax(0) if weighted else torch.full((5,), 0.2)
    expected = (weights * torch.stack(terms, -1).exp()).sum(-1).log()
    torch.testing.assert_close(prior().log_prob(z), expected)
    assert (prior.logits.std() > 0.01) == weighted


class Full(pv.Conditional):
    """A posterior with full covariance."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(WIDTH, LATENT + LATENT**2)

    def forward(self, *context):
        loc, raw = self.net(*context).split([LATENT, LATENT**2], -1)
        lower = 0.3 * raw.unflatten(-1, (LATENT, LATENT)).tril(-1) + torch.eye(LATENT)
        return dist.MultivariateNormal(loc, scale_tril=lower)


def test_the_vamp_prior_of_a_posterior_with_full_covariance():
    with seeded(0):
        posterior, z = Full(), torch.randn(3, 4, LATENT)
        prior = VampPrior(posterior, pixels(6))
    expected = torch.stack([posterior(u).log_prob(z) for u in pixels(6)], -1).logsumexp(-1) - math.log(6)
    torch.testing.assert_close(prior().expand((3, 4)).log_prob(z), expected)
    assert prior().expand((3, 4)).sample().shape == (3, 4, LATENT)


def test_the_vamp_prior_leaves_the_posterior_to_the_program():
    prior, posterior = learned("vamp")
    program = pv.VAE(prior, pv.Normal(pv.MLP(LATENT, WIDTH), 0.2), posterior)
    assert {n for n, _ in prior.named_parameters()} == {"raw"}
    assert not [n for n in program.state_dict() if n.startswith("prior.posterior")]
    twin = copy.deepcopy(program)
    assert twin.prior.__dict__["posterior"] is twin.posterior
    program.double()
    assert program.prior().log_prob(torch.zeros(LATENT).double()).dtype == torch.float64
    gradient = torch.autograd.grad(
        prior().log_prob(torch.zeros(2, LATENT).double()).sum(), [*posterior.parameters()]
    )
    assert all(g.abs().sum() > 0 for g in gradient)  # the prior's density trains the posterior, too


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", ["real", "unit", "bytes"])
def test_pseudo_inputs_start_at_rows_of_the_data(kind, later):
    rows = pixels(40).clamp(0, 1)
    rows = (255 * rows).byte() if kind == "bytes" else rows
    x = rows / 255 if kind == "bytes" else rows
    with seeded(0):
        posterior = pv.mean_field(pv.MLP(WIDTH, 2 * LATENT))
        first = 0 * x if later else rows
        prior = VampPrior.from_data(posterior, first, 40, unit=kind == "unit")
        if later:
            prior.start_at(rows)
    order = torch.cdist(prior.inputs, x).argmin(1)
    assert order.unique().numel() == 40
    torch.testing.assert_close(prior.inputs.detach(), x[order], atol=0.0101 if kind == "unit" else 1e-6, rtol=0)


def test_pseudo_inputs_repeat_where_data_are_fewer():
    rows = torch.tensor([[0.2, 0.4], [0.9, 0.5]])
    prior = VampPrior(posterior_of, torch.full((30, 2), 0.5), unit=True)
    with seeded(0):
        prior.start_at(rows)
    near = torch.cdist(prior.inputs.detach(), rows)
    assert float(near.min(1).values.max()) < 1e-5
    assert sorted(near.argmin(1).unique().tolist()) == [0, 1]


def batch_normed():
    return pv.mean_field(pv.MLP(3, 5, 4, norm="batch"))


def test_codes_are_equally_likely():
    prior = UniformCodes(5, (2, 3))
    law = prior(torch.zeros(7, 3)).expand((4, 7))
    assert (law.batch_shape, law.event_shape) == ((4, 7), (2, 3))
    with seeded(0):
        codes = law.sample((500,))
    assert codes.shape == (500, 4, 7, 2, 3)
    torch.testing.assert_close(law.log_prob(codes), torch.full((500, 4, 7), -6 * math.log(5)))
    share = torch.bincount(codes.flatten(), minlength=5) / codes.numel()
    assert share.tolist() == pytest.approx([0.2] * 5, abs=5 * (0.16 / codes.numel()) ** 0.5)
    every = torch.cartesian_prod(*[torch.arange(5)] * 6).reshape(-1, 2, 3)
    assert float(prior().log_prob(every).exp().sum()) == pytest.approx(1, rel=1e-4)
    assert not list(prior.parameters())
    assert bool(prior().support.check(every[-1]))
    assert not bool(prior().support.check(every[-1] + 1))


def posterior_of(x):
    return dist.Normal(x[..., :2], 1.0).to_event(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedNormal(0), "latent must be at least 1, got 0"),
        (lambda: MixturePrior(2, 0), "components must be at least 1, got 0"),
        (lambda: MixturePrior(0, 2), "latent must be at least 1, got 0"),
        (lambda: MixturePrior(2, 2, spread=1.0), "spread must lie between 0 and 1, got 1.0"),
        (lambda: VampPrior(posterior_of, torch.zeros(3)), r"inputs: expected rows .* got \(3,\) torch.float32"),
        (lambda: VampPrior(posterior_of, torch.zeros(3, 2).long()), r"inputs: expected rows .* torch.int64"),
        (lambda: VampPrior(posterior_of, 2 * torch.ones(3, 2), unit=True), r"must lie in \[0, 1\]; rescale"),
        (lambda: VampPrior(posterior_of, torch.full((3, 2), math.nan), unit=True), r"must lie in \[0, 1\]"),
        (
            lambda: VampPrior.from_data(posterior_of, torch.zeros(3, 2), 4),
            "from 1 to the 3 rows of the data, got 4",
        ),
        (
            lambda: VampPrior.from_data(posterior_of, torch.zeros(3, 2), 0),
            "from 1 to the 3 rows of the data, got 0",
        ),
        (
            lambda: VampPrior(batch_normed(), torch.zeros(3, 3)),
            r"posterior: it holds a BatchNorm1d at 'net.1.net', which mixes the data .* use layer norm",
        ),
        (lambda: VampPrior.from_data(batch_normed(), torch.zeros(5, 3), 2), "posterior: it holds a BatchNorm1d"),
        (
            lambda: VampPrior(posterior_of, torch.zeros(3, 2)).start_at(torch.zeros(9, 1)),
            r"x: expected one or more rows, \(N, 2\), got \(9, 1\)",
        ),
        (lambda: VampPrior(posterior_of, torch.zeros(3, 2)).start_at(torch.zeros(0, 2)), r"got \(0, 2\)"),
        (
            lambda: VampPrior(posterior_of, torch.zeros(3, 2), unit=True).start_at(torch.full((9, 2), 2.0)),
            r"must lie in \[0, 1\]; rescale",
        ),
        (lambda: flow_prior(2), "flows: expected at least one"),
        (lambda: UniformCodes(0, (2,)), "codes must be at least 1, got 0"),
        (lambda: UniformCodes(3, (2, 0)), r"shape must be positive lengths, got \(2, 0\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
