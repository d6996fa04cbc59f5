"""The shipped programs: plain Pyro that learns under Pyro's own SVI as under `fit`, and by the same steps."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from small import CLASSES, LATENT, LIKELIHOODS, WIDTH, conditions, cvae, fit, pixels, same, vae, weights
from torch.distributions import Bernoulli, Normal, kl_divergence

import ppl_vae as pv
from ppl_vae.batches import Data

LOSSES = [Trace_ELBO, TraceMeanField_ELBO]
PROGRAMS = {f"vae {kind}": partial(vae, kind) for kind in LIKELIHOODS} | {
    f"cvae {condition}": partial(cvae, condition) for condition in ("label", "vector")
}


@pytest.fixture(autouse=True)
def clean_store():
    pyro.clear_param_store()
    with torch.random.fork_rng():
        yield
    pyro.clear_param_store()


@pytest.fixture(params=PROGRAMS)
def case(request):
    """A program and its data."""
    name, variant = request.param.split(" ", 1)
    x = pixels(kind=variant)
    return PROGRAMS[request.param](), (x,) if name == "vae" else (x, conditions(x, variant))


def judged(program, data):
    return pv.elbo(program, data, particles=20).mean


@pytest.mark.parametrize("loss", LOSSES)
def test_every_program_learns_under_pyros_own_svi(case, loss):
    program, data = case
    before = judged(program, data)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), loss())
    torch.manual_seed(0)
    for epoch in range(12):
        for batch in Data(*data).epoch(32, seed=0, epoch=epoch):
            assert math.isfinite(svi.step(*batch))
    assert judged(program, data) > before + 0.5


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_every_program_learns_under_fit(case, loss):
    program, data = case
    before = judged(program, data)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    objective = None if loss is None else loss()
    fit(program, data, epochs=12, batch_size=32, optimizer=optimizer, objective=objective)
    assert judged(program, data) > before + 0.5


@pytest.mark.parametrize(
    ("loss", "objective"), [(Trace_ELBO, pv.ELBO()), (TraceMeanField_ELBO, pv.ELBO(kl="analytic"))]
)
def test_fit_takes_the_steps_of_pyros_svi(case, loss, objective):
    program, data = case
    theirs = copy.deepcopy(program)
    size, rate = 32, 1e-2
    optimizer = partial(torch.optim.SGD, lr=rate)
    run = fit(program, data, objective=objective, epochs=2, batch_size=size, optimizer=optimizer)
    # Pyro sums over the data of a batch, and fit takes their mean: the step is the same at 1/32 of the rate.
    svi = SVI(theirs.model, theirs.guide, pyro.optim.SGD({"lr": rate / size}), loss())
    torch.manual_seed(0)
    values = [[-svi.step(*b) / size for b in Data(*data).epoch(size, 0, epoch)] for epoch in range(2)]
    for ours, other in zip(program.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    assert [row["train"] for row in run.history] == pytest.approx([sum(v) / len(v) for v in values], rel=1e-5)


# ---- the same by hand


def terms_by_hand(program, x, context):
    """E log p(x | z) of one draw, and KL(q || p): from torch's distributions and the program's nets."""

    def normal(net, *inputs):
        loc, raw = net(*inputs).chunk(2, dim=-1)
        return Normal(loc, (7 * (raw / 7).tanh()).exp())

    q = normal(program.posterior.net, x, *context)
    p = normal(program.prior.net, *context) if context else Normal(torch.zeros(LATENT), torch.ones(LATENT))
    z = q.mean + q.stddev * torch.randn(len(x), LATENT)
    given = program.likelihood.net(z, *context)
    if isinstance(program.likelihood, pv.Bernoulli):
        law = Bernoulli(logits=given)
    elif isinstance(program.likelihood.scale, pv.NetScale):
        law = normal(program.likelihood.net, z, *context)
    else:
        law = Normal(given, program.likelihood.scale.value)
    return law.log_prob(x).sum(-1), kl_divergence(q, p).sum(-1), (q.log_prob(z) - p.log_prob(z)).sum(-1)


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.Adam, lr=1e-2)])
def test_many_steps_of_fit_are_those_of_a_loop_by_hand(case, kl, optimizer):
    program, data = case
    twin = copy.deepcopy(program)
    objective = pv.ELBO(kl=kl)
    fit(program, data, objective=objective, epochs=3, batch_size=32, optimizer=optimizer, seed=4)
    by_hand = optimizer(twin.parameters())
    torch.manual_seed(4)
    for epoch in range(3):
        for x, *context in Data(*data).epoch(32, seed=4, epoch=epoch):
            likelihood, closed, sampled = terms_by_hand(twin, x, context)
            by_hand.zero_grad()
            (-(likelihood - (closed if kl == "analytic" else sampled)).mean()).backward()
            by_hand.step()
    for ours, other in zip(program.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=2e-3, atol=2e-5)


# ---- the rest of a program


def test_a_deep_copy_is_a_program_of_its_own(case):
    program, data = case
    fit(program, data, epochs=1)  # its pair exists now
    copied, kept = copy.deepcopy(program), weights(program)
    assert judged(copied, data) == judged(program, data)
    fit(copied, data, epochs=1)
    assert same(weights(program), kept)
    assert not same(weights(copied), kept)
    assert pv.as_pair(copied).program is copied


def test_the_pair_adds_nothing_to_the_programs_parameters(case):
    program, data = case
    names = list(program.state_dict())
    fit(program, data, epochs=1)
    assert list(program.state_dict()) == names
    assert not list(pyro.get_param_store().keys())


def test_an_assigned_part_is_used():
    program, x = vae(), pixels()
    judged(program, x)  # its pair exists now
    program.likelihood.scale = pv.FixedScale(1e3)
    distortion = pv.elbo(program, x).diagnostics["distortion"].mean()
    assert distortion == pytest.approx(WIDTH * (math.log(1e3) + 0.5 * math.log(2 * math.pi)), rel=1e-5)


def test_a_blank_batch_has_the_shape_of_the_data():
    assert [t.shape for t in vae("bernoulli").blank(5)] == [(5, WIDTH)]
    labels = torch.tensor([0, 2, 1])
    x, c = cvae().blank(3, labels)
    assert x.shape == (3, WIDTH)
    assert torch.equal(c, labels)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_cvae_may_ignore_its_condition_in_the_prior(conditional):
    program, x = cvae(), pixels()
    if not conditional:
        program.prior = pv.StandardNormal(LATENT)
    drawn = pv.sample(program, 4, torch.tensor([0, 1, 2, 0]))
    assert drawn.shape == (4, WIDTH)
    assert math.isfinite(judged(program, (x, conditions(x))))


def test_a_cvae_refuses_conditions_that_it_does_not_know():
    program, x = cvae(), pixels()
    labels = conditions(x)
    with pytest.raises(ValueError, match="expected 3 conditions, one per sample, got 2"):
        program.blank(3, labels[:2])
    program.check(x, labels)
    labels[7] = CLASSES
    for use in (program.check, lambda *data: fit(program, data, batch_size=4)):
        with pytest.raises(ValueError, match="unknown label 3 in row 7: labels run from 0 to 2"):
            use(x, labels)


def test_a_cvae_without_conditions_says_what_it_takes():
    for data in (pixels(), [pixels()]):
        with pytest.raises(ValueError, match="the model takes 2 tensors, got 1"):
            fit(cvae(), data)


def density(conditional):
    """p(x | label), or p(x) by numbers of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = (
            pv.Concat(pv.MLP(CLASSES, 8, WIDTH), pv.OneHot(CLASSES))
            if conditional
            else pv.Constant(torch.zeros(WIDTH), learned=True)
        )
        return pv.Density(pv.Normal(net, pv.LearnedScale()))


@pytest.mark.parametrize("conditional", [True, False])
def test_without_latents_every_bound_is_log_p(conditional):
    x = pixels(30)
    context = (conditions(x),) if conditional else ()
    program, data = density(conditional), (x, *context)
    fit(program, data, epochs=3, compile="require")
    exact = program.likelihood(*context).log_prob(x).double().detach()
    for bound in (pv.log_likelihood(program, data, 50, batch_size=7), pv.elbo(program, data, 50)):
        torch.testing.assert_close(bound.value, exact, rtol=1e-6, atol=1e-5)
        assert bound.monte_carlo_stderr == 0
    assert pv.elbo(program, data).diagnostics["rate"].abs().max() == 0
    assert pv.sample(program, 30, *context).shape == x.shape
    assert pv.encode(program, *data) == {}
    with pytest.raises(ValueError, match="nothing is latent, so there are no units"):
        pv.active_units(program, data)


def test_a_density_learns_what_the_data_say():
    """Its maximum likelihood is in closed form: the mean, and the residual spread."""
    x, program = pixels(), density(conditional=False)
    fit(program, x, epochs=600, batch_size=len(x), optimizer=partial(torch.optim.Adam, lr=0.05))
    best = Normal(x.mean(0), (x - x.mean(0)).square().mean().sqrt()).log_prob(x).sum(-1)
    assert pv.log_likelihood(program, x).mean == pytest.approx(float(best.mean()), abs=1e-3)


def test_a_density_refuses_conditions_that_it_does_not_know():
    program, x = density(conditional=True), pixels()
    with pytest.raises(ValueError, match="expected 3 conditions, one per sample, got 2"):
        program.blank(3, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"unknown label . in row 0"):
        fit(program, (x, conditions(x) + CLASSES))


def test_each_of_several_conditions_is_checked_for_what_it_is():
    x = pixels()
    net = pv.Concat(pv.MLP(CLASSES + 2 + 3, 8, WIDTH), pv.OneHot(CLASSES), pv.OneHot(2), None)
    program = pv.Density(pv.Normal(net, pv.LearnedScale()))
    data = (x, conditions(x), (x[:, 3] > 0.5).long(), x[:, :3])
    fit(program, data, epochs=1)
    assert math.isfinite(pv.log_likelihood(program, data).mean)
    with pytest.raises(ValueError, match="unknown label 2 in row 0: labels run from 0 to 1"):
        fit(program, (*data[:2], torch.full((len(x),), 2), data[3]))


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_pictures_may_keep_their_rank(kind):
    # A likelihood over (1, 3, 4) pictures, the latents flattened by the net itself.
    channels = 2 if kind == "per pixel" else 1
    net = torch.nn.Sequential(pv.MLP(LATENT, channels * WIDTH), torch.nn.Unflatten(-1, (channels, 3, 4)))
    scale = {"fixed": 0.2, "learned": pv.LearnedScale(), "per pixel": pv.NetScale()}
    likelihood = pv.Bernoulli(net, 3) if kind == "bernoulli" else pv.Normal(net, scale[kind], 3)
    encoder = torch.nn.Sequential(torch.nn.Flatten(-3), pv.MLP(WIDTH, 2 * LATENT))
    program = pv.VAE(pv.StandardNormal(LATENT), likelihood, pv.mean_field(encoder))
    x = pixels(kind=kind).reshape(-1, 1, 3, 4)
    run = fit(program, x, epochs=1)
    assert math.isfinite(run.history[0]["train"])
    assert pv.log_likelihood(program, x, particles=3).value.shape == (len(x),)
    assert pv.sample(program, 2).shape == (2, 1, 3, 4)
