"""Likelihoods of counts: probabilities against scipy, that sum to 1; rates of their own and shares of a size."""

from functools import partial

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from small import fit, weights
from test_steps import agree, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.conditionals import OptimalScale, unbounded
from ppl_vae.counts import LIMIT, NegativeBinomial, Poisson
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded

G = 5
RATES = torch.tensor([0.02, 0.5, 3.0, 40.0, 700.0], dtype=torch.float64)
THETA, GATE = 2.5, -0.7
KINDS = {
    "poisson": Poisson,
    "inflated poisson": partial(Poisson, inflated=True),
    "negative binomial": partial(NegativeBinomial, concentration=THETA),
    "by the net": partial(NegativeBinomial, concentration=pv.NetScale()),
    "inflated negative binomial": partial(NegativeBinomial, concentration=THETA, inflated=True),
    "inflated, by the net": partial(NegativeBinomial, concentration=pv.NetScale(), inflated=True),
}
kinds = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def raw(name, rates=RATES):
    """What a net would give: log-rates, perhaps log θ, perhaps the log-odds of extra zeros."""
    parts = [unbounded(rates.log(), LIMIT)]
    if "by the net" in name:
        parts.append(unbounded(torch.full_like(rates, THETA).log()))
    if "inflated" in name:
        parts.append(torch.full_like(rates, GATE))
    return torch.cat(parts, -1)


def by_hand(name, x, rates):
    """Scipy's log-probabilities of single counts."""
    law = stats.poisson(rates) if "poisson" in name else stats.nbinom(THETA, THETA / (THETA + rates))
    chance = 1 / (1 + np.exp(-GATE)) if "inflated" in name else 0.0
    return np.log(chance * (x == 0) + (1 - chance) * law.pmf(x))


@kinds
@pytest.mark.parametrize("lead", [(), (4,), (3, 4)])
def test_probabilities_are_scipys(name, lead):
    law = KINDS[name](nn.Identity())(raw(name).expand(*lead, -1))
    assert (law.batch_shape, law.event_shape) == (lead, (G,))
    x = torch.poisson(RATES.expand(*lead, G)) * torch.randint(0, 2, (*lead, G))
    wanted = by_hand(name, x.numpy(), RATES.numpy()).sum(-1)
    np.testing.assert_allclose(law.log_prob(x), wanted, rtol=1e-8)


@kinds
def test_probabilities_sum_to_one_with_the_stated_mean(name):
    law = KINDS[name](nn.Identity())(raw(name)).base_dist
    x = torch.arange(30_000, dtype=torch.float64)[:, None].expand(-1, G)
    chances = law.log_prob(x).exp()
    torch.testing.assert_close(chances.sum(0), torch.ones(G, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close((x * chances).sum(0), law.mean, rtol=1e-6, atol=0)
    chance = 1 / (1 + np.exp(-GATE)) if "inflated" in name else 0.0
    torch.testing.assert_close(law.mean, (1 - chance) * RATES)


@kinds
def test_samples_agree_with_probabilities(name):
    n = 40_000
    law = KINDS[name](nn.Identity())(raw(name).expand(n, -1))
    drawn = law.sample()
    mean, variance = law.mean[0], law.variance[0]
    assert ((drawn.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    for value in (0.0, 1.0, 3.0):
        chance = law.base_dist.log_prob(torch.full((n, G), value, dtype=torch.float64))[0].exp()
        error = ((drawn == value).double().mean(0) - chance).abs()
        assert (error < 5 * (chance * (1 - chance) / n).sqrt() + 1e-4).all()


@kinds
def test_rates_of_a_size_are_shares_of_it(name):
    size = torch.tensor([[10.0], [2000.0]], dtype=torch.float64)
    law = KINDS[name](nn.Identity(), sized=True)(raw(name).expand(3, 2, -1), size)
    assert law.batch_shape == (3, 2)
    rates = size * RATES / RATES.sum()
    x = torch.poisson(rates)
    wanted = by_hand(name, x.numpy(), rates.numpy()).sum(-1)
    np.testing.assert_allclose(law.log_prob(x)[1], wanted, rtol=1e-8)


def test_shares_are_of_the_whole_event():
    law = Poisson(nn.Identity(), sized=True, event_dim=2)(torch.randn(4, 2, 3), torch.full((4, 1), 30.0))
    assert law.event_shape == (2, 3)
    torch.testing.assert_close(law.mean.sum((-2, -1)), torch.full((4,), 30.0))


def test_an_empty_datum_has_a_likelihood_and_a_negative_size_has_none():
    shares = torch.zeros(2, G, requires_grad=True)
    value = Poisson(nn.Identity(), sized=True)(shares, torch.tensor([[0.0], [5.0]])).log_prob(torch.zeros(2, G))
    value.sum().backward()
    assert abs(value[0].item()) < 1e-4
    assert shares.grad.isfinite().all()
    with pyro.validation_enabled(False):  # as programs run
        wrong = Poisson(nn.Identity(), sized=True)(torch.zeros(1, G), torch.tensor([[-1.0]]))
    assert wrong.base_dist.rate.isnan().all()


@kinds
@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_extreme_outputs_give_finite_probabilities_and_gradients(name, extreme):
    numbers = raw(name).numel() // G
    given = torch.full((2, numbers * G), extreme, requires_grad=True)
    x = torch.tensor([0.0, 1.0, 10.0, 1e3, 1e5]).expand(2, -1)
    for likelihood, context in (
        (KINDS[name](nn.Identity()), ()),
        (KINDS[name](nn.Identity(), sized=True), (x.sum(-1, keepdim=True),)),
    ):
        value = likelihood(given, *context).log_prob(x).sum()
        (gradient,) = torch.autograd.grad(value, given)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("event", [(6,), (2, 3)])
@pytest.mark.parametrize("sized", [False, True])
@kinds
def test_before_training_the_rates_are_the_means(name, sized, event):
    numbers = raw(name).numel() // G
    flat = pv.MLP(2, 8, 6 * numbers)
    net = nn.Sequential(flat, nn.Unflatten(-1, (numbers * event[0], *event[1:])))
    likelihood = KINDS[name](net, sized=sized, event_dim=len(event))
    x = torch.poisson(torch.linspace(0.5, 60, 6).expand(400, -1)).reshape(400, *event)
    x[:, 0] *= len(event) > 1  # the first count of flat data is always 0
    likelihood.start_from(x)
    nn.init.zeros_(flat[-1].weight)
    size = (x.flatten(1).sum(1, keepdim=True),) if sized else ()
    mean = likelihood(torch.randn(400, 2), *size).mean.mean(0)
    torch.testing.assert_close(mean, x.mean(0), rtol=0.02 if "inflated" in name else 1e-3, atol=2e-3)


def test_shares_start_right_however_large_the_counts_are():
    x = 1e6 * torch.tensor([[1.0, 2.0, 4.0]])  # beyond the bound on rates
    likelihood = Poisson(nn.Linear(2, 3), sized=True)
    likelihood.start_from(x)
    torch.testing.assert_close(likelihood(torch.zeros(1, 2), x.sum(1, keepdim=True)).mean, x, rtol=1e-4, atol=0)


def test_the_concentration_may_be_one_for_each_count_and_is_learned():
    rates, theta = torch.tensor([5.0, 20.0]), torch.tensor([0.8, 6.0])
    x = torch.poisson(torch.distributions.Gamma(theta, theta / rates).sample((8000,)))
    net = nn.Linear(1, 2)
    likelihood = NegativeBinomial(net, pv.LearnedScale(1.0, shape=(2,)))
    likelihood.start_from(x)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -likelihood(torch.zeros(1, 1)).log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(likelihood.concentration.value.detach(), theta, rtol=0.1, atol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="concentration must be a Scale, or a number positive and finite, got -1"):
        NegativeBinomial(nn.Identity(), -1)
    with pytest.raises(ValueError, match="concentration: OptimalScale is the closed form for Normal alone"):
        NegativeBinomial(nn.Identity(), OptimalScale())
    with pytest.raises(ValueError, match="event_dim must be at least 1"):
        Poisson(nn.Identity(), event_dim=0)
    with pytest.raises(ValueError, match=r"the net must give 2 numbers.*5 is no multiple of 2"):
        Poisson(nn.Identity(), inflated=True)(torch.zeros(3, 5))
    for context in ((), (torch.zeros(3),), (torch.zeros(3, 2),)):
        with pytest.raises(ValueError, match=r"Poisson: sized=True takes the size of each datum, \(\.\.\., 1\)"):
            Poisson(nn.Identity(), sized=True)(torch.zeros(3, 5), *context)
    vae = around(Poisson(pv.MLP(2, G)))
    x = torch.ones(300, G)
    x[280, 1] = 0.5
    with pytest.raises(ValueError, match=r"Poisson takes whole numbers 0, 1, 2, \.\.\. .*, got 0.5 in row 280"):
        fit(vae, x, epochs=1)
    with pytest.raises(
        ValueError, match=r"in floating point \(bytes are pixels, x / 255\), got 0.00392157 in row 0"
    ):
        fit(vae, torch.ones(300, G, dtype=torch.uint8), epochs=1)


@kinds
def test_data_that_are_no_counts_are_named_in_words(name):
    program = around(KINDS[name](pv.MLP(2, raw(name).numel())))
    with pytest.raises(ValueError, match=r"site 'x': \w+ takes whole numbers 0, 1, 2, \.\.\. in floating point"):
        fit(program, torch.full((4, G), -1.0), epochs=1)


def around(likelihood):
    """A small VAE around a likelihood of G counts."""
    return pv.VAE(pv.StandardNormal(2), likelihood, pv.mean_field(pv.MLP(G, 8, 4)))


def sized(name):
    """A program whose guide looks at the counts alone, and whose rates are shares of the condition."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pv.MLP(G, 8, 4)

        def forward(self, x, size):
            return self.net(torch.log1p(x))

    likelihood = KINDS[name](pv.MLP(2, 8, raw(name).numel()), sized=True)
    return pv.CVAE(pv.StandardNormal(2), likelihood, pv.mean_field(Encoder()))


X = torch.poisson(torch.tensor([0.1, 1.0, 5.0, 20.0, 50.0]).expand(40, -1), torch.Generator().manual_seed(0))
SIZE = X.sum(1, keepdim=True)


@kinds
def test_they_train_and_evaluate(name):
    vae = sized(name)
    before = weights(vae.likelihood)
    fit(vae, (X, SIZE), epochs=1, batch_size=20, compile="off")
    after = weights(vae.likelihood)
    assert all(not torch.equal(before[n], after[n]) for n, _ in vae.likelihood.named_parameters())
    assert pv.log_likelihood(vae, (X, SIZE), particles=5).value.isfinite().all()
    assert pv.sample(vae, 40, SIZE).shape == X.shape


@kinds
def test_captured_and_as_written(interpreted, name):
    for program, batch in (
        (around(KINDS[name](pv.MLP(2, raw(name).numel()))), (X[:6],)),
        (sized(name), (X[:6], SIZE[:6])),
    ):
        pair = as_pair(program)
        inspect(pair, batch)
        agree(update_of(pair, pv.IWAE(3, estimator=pv.doubly)), *batch)
    assert len(interpreted) == 2
