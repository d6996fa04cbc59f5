"""The deep Markov model: exact against a Kalman filter, masks against shorter sequences, training."""

from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal
from trials import answers, captured_as_written, trains_under_fit, trains_under_svi, unbiased

import ppl_vae as pv
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.sequences import BackwardGRU, DeepMarkovModel, combiner, gated_transition
from ppl_vae.traces import log_terms

STEPS, WIDTH, LATENT = 4, 3, 2


def ends(*lengths, steps=STEPS):
    """A mask of sequences of these lengths."""
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def dmm(latent=LATENT, width=WIDTH, features=6, likelihood=None):
    with seeded(0):
        return DeepMarkovModel(
            pv.StandardNormal(latent),
            gated_transition(latent, 5),
            likelihood or pv.Normal(pv.MLP(latent, 7, width, activation=nn.Tanh), 0.5),
            BackwardGRU(width, features),
            combiner(latent, features),
        )


def sequences(count=6, steps=STEPS, width=WIDTH):
    g = torch.Generator().manual_seed(1)
    return 0.5 * torch.randn(count, steps, width, generator=g)


X, MASK = sequences(), ends(4, 1, 3, 2, 4, 3)


# ---- against a Kalman filter


def linear(seed=0):
    """z_1 ~ N(0, I), z_t ~ N(A z, q²), x_t ~ N(C z, r²), and its matrices; the guide does not know the future."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    a, c = 0.6 * draw(LATENT, LATENT), draw(WIDTH, LATENT)
    q, r = 0.7, 0.9
    transition, emission = nn.Linear(LATENT, LATENT, bias=False), nn.Linear(LATENT, WIDTH, bias=False)
    # Given z_{t-1} and x_t alone, z_t is normal with precision I / q² + C'C / r².
    covariance = torch.linalg.inv(torch.eye(LATENT) / q**2 + c.T @ c / r**2)
    filtering = nn.Linear(LATENT + WIDTH, LATENT, bias=False)
    with torch.no_grad():
        transition.weight.copy_(a)
        emission.weight.copy_(c)
        filtering.weight.copy_(covariance @ torch.cat([a / q**2, c.T / r**2], 1))
    program = DeepMarkovModel(
        pv.StandardNormal(LATENT),
        pv.Normal(transition, q),
        pv.Normal(emission, r),
        Itself(),
        pv.Normal(pv.Concat(filtering, None, None), 1.3 * float(covariance.diagonal().max().sqrt())),
    ).double()
    return program, (a, c, q, r)


class Itself(nn.Module):
    """The data as their own summary."""

    def forward(self, x, mask=None):
        return x


def kalman(x, a, c, q, r):
    """Log p(x_1 ... x_T) of sequences (B, T, D), (B,)."""
    eye = torch.eye(LATENT, dtype=x.dtype)
    mean, cov, total = x.new_zeros(len(x), LATENT), eye, x.new_zeros(len(x))
    for t in range(x.shape[1]):
        seen = c @ cov @ c.T + r**2 * torch.eye(WIDTH, dtype=x.dtype)
        total = total + MultivariateNormal(mean @ c.T, seen).log_prob(x[:, t])
        gain = torch.linalg.solve(seen, c @ cov).T
        mean = mean + (x[:, t] - mean @ c.T) @ gain.T
        cov = cov - gain @ c @ cov
        mean, cov = mean @ a.T, a @ cov @ a.T + q**2 * eye
    return total


def joint_gaussian(x, a, c, q, r):
    """The same by the covariance of all steps."""
    steps = x.shape[1]
    eye = torch.eye(LATENT, dtype=x.dtype)
    marginal, cov = eye, x.new_zeros(steps, LATENT, steps, LATENT)
    for s in range(steps):
        power = marginal
        for t in range(s, steps):
            cov[t, :, s], cov[s, :, t] = power, power.T
            power = a @ power
        marginal = a @ marginal @ a.T + q**2 * eye
    seen = torch.einsum("di,sitj,ej->sdte", c, cov, c).reshape(steps * WIDTH, steps * WIDTH)
    noise = r**2 * torch.eye(steps * WIDTH, dtype=x.dtype)
    return MultivariateNormal(x.new_zeros(steps * WIDTH), seen + noise).log_prob(x.flatten(1))


def test_the_kalman_filter_is_right():
    _, numbers = linear()
    torch.testing.assert_close(kalman(X.double(), *numbers), joint_gaussian(X.double(), *numbers))


def test_weights_are_unbiased():
    program, numbers = linear()
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(program), X.double(), particles=50_000).weight()
    assert weight.std(0).min() > 0.1
    unbiased(weight, kalman(X.double(), *numbers))


def test_masked_weights_are_unbiased_for_the_shorter_sequences():
    program, numbers = linear()
    padded = torch.where(MASK[:, :, None], X.double(), 7.0)
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(program), padded, MASK, particles=50_000).weight()
    short = [kalman(x[None, :n], *numbers)[0] for x, n in zip(X.double(), MASK.sum(1).tolist(), strict=True)]
    unbiased(weight, torch.stack(short))


# ---- masks


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_a_masked_tail_gives_the_shorter_sequences_terms(kl):
    program = dmm()
    latents = {f"z{t + 1}": torch.randn(5, 6, LATENT) for t in range(STEPS)}
    padded = torch.where(ends(*[3] * 6)[:, :, None], X, 9.0)
    whole = pv.log_joint(as_pair(program), latents, padded, ends(*[3] * 6))
    latents.pop("z4")
    torch.testing.assert_close(whole, pv.log_joint(as_pair(program), latents, X[:, :3].clone()))
    bounds = [
        pv.elbo(program, data, particles=3000, kl=kl, compile="off")
        for data in ((padded, ends(*[3] * 6)), (X[:, :3].clone(),))
    ]
    error = (bounds[0].stderr.square() + bounds[1].stderr.square()).sqrt()
    assert bool(((bounds[0].value - bounds[1].value).abs() < 5 * error).all())


def test_padding_has_no_part_in_values_or_gradients():
    program = dmm()
    results = []
    for padding in (0.0, 50.0):
        padded = torch.where(MASK[:, :, None], X, padding)
        with seeded(0):
            value = pv.ELBO(2)(as_pair(program), padded, MASK)
        results.append([value, *torch.autograd.grad(value.sum(), list(program.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_full_mask_is_no_mask():
    program = dmm()
    values = []
    for batch in ((X,), (X, ends(*[STEPS] * 6))):
        with seeded(0):
            values.append(pv.IWAE(3)(as_pair(program), *batch))
    torch.testing.assert_close(*values)


def test_the_closed_kl_agrees_with_sampling():
    with seeded(0), torch.no_grad():
        terms = log_terms(as_pair(dmm()), X, MASK, particles=20_000, kl="analytic")
    difference = terms.posterior - terms.prior - terms.kl
    assert bool((difference.mean(0).abs() < 5 * difference.std(0) / len(difference) ** 0.5).all())


def test_the_guide_draws_each_step_from_the_last_and_from_what_is_left():
    program = dmm()
    with seeded(0):
        terms = log_terms(as_pair(program), X, MASK, particles=3)
    summary, z, by_hand = program.features(X, MASK), torch.zeros(LATENT), 0
    for t in range(STEPS):
        law, z = program.posterior(z, summary[:, t]), terms.samples[f"z{t + 1}"]
        by_hand = by_hand + MASK[:, t] * law.log_prob(z)
    torch.testing.assert_close(terms.posterior, by_hand)


# ---- its parts


@pytest.mark.parametrize("lengths", [None, (4, 1, 3, 2, 4, 3)])
def test_the_gru_reads_each_sequence_backwards_from_its_end(lengths):
    net = BackwardGRU(WIDTH, 5)
    found = net(X, None if lengths is None else ends(*lengths))
    assert found.shape == (6, STEPS, 5)
    for row, length in enumerate(lengths or [STEPS] * 6):
        state = torch.zeros(1, 1, 5)
        for t in reversed(range(length)):
            _, state = net.gru(X[row : row + 1, t : t + 1], state)
            torch.testing.assert_close(found[row, t], state[0, 0])


def test_the_gate_mixes_a_linear_map_and_a_net():
    law, z = gated_transition(LATENT, 5), torch.randn(7, 6, LATENT)
    with torch.no_grad():
        law.net.gate[-1].weight.zero_()
        law.net.gate[-1].bias.fill_(-100.0)
        torch.testing.assert_close(law(z).mean, z)  # W is the identity at first
        law.net.gate[-1].bias.fill_(100.0)
        torch.testing.assert_close(law(z).mean, law.net.proposal(z))
        law.net.gate[-1].bias.zero_()
        torch.testing.assert_close(law(z).mean, (z + law.net.proposal(z)) / 2)
    assert law(z).batch_shape == (7, 6)
    law.net.log_scale.bias.data.fill_(-1e6)
    assert bool((law(z).stddev > 0).all())


def test_the_combiner_is_the_mean_of_both_sources():
    law, z, h = combiner(LATENT, 5), torch.randn(7, 6, LATENT), torch.randn(6, 5)
    expected = law.net.out((law.net.lift[0](z).tanh() + h) / 2).chunk(2, -1)[0]
    torch.testing.assert_close(law(z, h).mean, expected)
    assert law(torch.zeros(LATENT), h).batch_shape == (6,)


# ---- as every program

CASES = {"no mask": (X,), "mask": (X, MASK)}
GOALS = {"analytic": partial(pv.ELBO, kl="analytic"), "iwae": partial(pv.IWAE, 3)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_it_trains_under_pyros_svi(case, loss):
    trains_under_svi(dmm(), loss(), *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_it_trains_under_fit_and_answers(interpreted, case):
    trains_under_fit(dmm(), pv.ELBO(), *CASES[case], compile="require")
    assert interpreted
    program = trains_under_fit(dmm(), pv.ELBO(), *CASES[case])
    if case == "mask":
        answers(program, *CASES[case], context=(MASK,))
    else:
        assert pv.reconstruct(program, X).shape == X.shape
        assert pv.sample(program, 6, like=(X,)).shape == X.shape


@pytest.mark.parametrize("goal", GOALS)
def test_captured_and_as_written(interpreted, goal):
    captured_as_written(dmm(), GOALS[goal](), X, MASK)


def test_doubly_without_a_mask_and_not_with_one(interpreted):
    objective = pv.IWAE(3, estimator=pv.doubly)
    captured_as_written(dmm(), objective, X)
    with pytest.raises(ValueError, match=r"as masks and Delta make it.*use pathwise"):
        objective(as_pair(dmm()), X, MASK)


def test_other_data_and_lengths():
    program = dmm(likelihood=pv.Bernoulli(pv.MLP(LATENT, WIDTH)))
    x = (X > 0).float()
    trains_under_fit(program, pv.ELBO(), x, MASK)
    for steps in (1, 3):
        assert log_terms(as_pair(program), x[:, :steps].clone(), particles=2).likelihood.shape == (2, 6)
    with pytest.raises(ValueError, match="site 'x': Bernoulli takes"):
        trains_under_fit(program, pv.ELBO(), X, MASK)


def test_masks_are_checked():
    fit = partial(trains_under_fit, dmm(), pv.ELBO())
    with pytest.raises(ValueError, match=r"mask: expected shape \(6, 4\), \(B, T\), as the data, got \(6, 3\)"):
        fit(X, MASK[:, :3])
    for row, bad in enumerate(
        [[0, 0, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [1, 0.5, 0, 0], [1, 2, 0, 0], [1, 1, -1, 0]]
    ):
        wrong = MASK.float()
        wrong[row] = torch.tensor(bad)
        with pytest.raises(ValueError, match=f"mask: row {row} must be True from the first step to the last"):
            fit(X, wrong)
    with pytest.raises(ValueError, match=r"x: expected sequences \(B, T, \*event\), got shape \(6, 4\)"):
        fit(X[:, :, 0])
    with pytest.raises(ValueError, match=r"mask: expected shape \(3, steps\), one row per sample, got \(6, 4\)"):
        pv.sample(dmm(), 3, MASK)


def test_widths_are_checked():
    with pytest.raises(ValueError, match="BackwardGRU: inputs and features must be at least 1, got 0 and 3"):
        BackwardGRU(0, 3)
    for make in (gated_transition, combiner):
        with pytest.raises(ValueError, match="sizes must be two or more positive widths"):
            make(0, 3)
