"""Penalties: exact values on small cases, estimators against loops and limits, gradients, and capture."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LATENT, WIDTH, case
from pyro import poutine
from small import conditions, cvae, fit, pixels, vae
from test_steps import agree, update_of
from torch import nn

import ppl_vae as pv
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.penalties import (
    MMD,
    Capacity,
    DecoderL2,
    FreeBits,
    GradientPenalty,
    TotalCorrelation,
    squared_mmd,
)
from ppl_vae.rng import seeded
from ppl_vae.traces import log_density, run_pair

X = pixels(24)
LOC = torch.tensor([[0.5, -1.0, 0.0], [1.5, 0.2, 0.0]])
SCALE = torch.tensor([[1.0, 0.3, 1.0], [0.5, 2.0, 1.0]])


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def sites(q, p=None, particles=1):
    """Sites of a run where the guide draws z from q, the model from p, by default N(0, I)."""
    rows = q.batch_shape[-1]
    p = dist.Normal(torch.zeros(q.event_shape), 1.0).to_event(q.event_dim) if p is None else p

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Normal(z.sum(-1) if q.event_dim else z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q)

    return run_pair(Pair(model, guide), (torch.zeros(rows),), particles)


def normal(loc=LOC, scale=SCALE):
    return dist.Normal(loc, scale).to_event(1)


def gaussian_kl(loc=LOC, scale=SCALE):
    """KL from N(0, 1) of each entry, by its formula."""
    return (loc**2 + scale**2 - 1) / 2 - scale.log()


class Penalised(pv.Objective):
    """The ELBO with penalties."""

    def __init__(self, *penalties, particles=2):
        super().__init__()
        self.penalties, self.particles = nn.ModuleList(penalties), particles

    def forward(self, pair, *batch):
        model, guide = run_pair(pair, batch, self.particles)
        bound = log_density(model.values(), batch, self.particles) - log_density(
            guide.values(), batch, self.particles
        )
        for penalty in self.penalties:
            bound = bound - penalty(model, guide, batch)
        return bound.mean(0)


# ---- free bits and capacity


@pytest.mark.parametrize("least", [0.0, 0.2, 0.5, 30.0])
def test_free_bits_by_hand(least):
    kl = gaussian_kl().mean(0)
    penalty = FreeBits(least, weight=0.5)
    model, guide = sites(normal(), particles=3)
    torch.testing.assert_close(penalty.groups(model, guide), kl)
    torch.testing.assert_close(penalty(model, guide, ()), 0.5 * sum(torch.clamp(least - k, min=0) for k in kl))
    whole = FreeBits(least, per="site")(model, guide, ())
    torch.testing.assert_close(whole, torch.clamp(least - kl.sum(), min=0))


def test_below_its_allowance_a_group_has_no_gradient_and_above_that_of_the_elbo():
    loc = LOC.clone().requires_grad_()
    q = dist.Normal(loc, SCALE).to_event(1)
    model, guide = sites(q)
    kl = gaussian_kl(loc).sum(1).mean()
    kls = gaussian_kl().mean(0)
    least = float(kls.sort().values[1] + 0.01)  # two of three groups are below
    (slope,) = torch.autograd.grad(kl + FreeBits(least)(model, guide, ()), loc)
    torch.testing.assert_close(slope, torch.where(kls > least, LOC / 2, 0.0))


@pytest.mark.parametrize("particles", [1, 3])
def test_free_bits_of_latents_in_levels_plates_and_scalars(particles):
    for name, count in (("two levels", 2 * LATENT), ("nested", 1 + WIDTH)):
        c = case(name)
        found = run_pair(c.pair, c.batch, particles)
        groups = FreeBits(1.0).groups(*found)
        assert len(groups) == count
        torch.testing.assert_close(groups.sum(), FreeBits(1.0, per="site").groups(*found).sum())
    model, guide = sites(dist.Normal(LOC[:, 0], SCALE[:, 0]), particles=particles)
    torch.testing.assert_close(FreeBits(1.0).groups(model, guide), gaussian_kl().mean(0)[:1])


def test_without_a_closed_form_the_draws_are_used():
    q, p = dist.StudentT(5.0, LOC, SCALE).to_event(1), dist.Normal(torch.zeros(3), 1.0).to_event(1)
    model, guide = sites(q, particles=4)
    z = guide["z"]["value"]
    each = q.base_dist.log_prob(z) - p.base_dist.log_prob(z)
    torch.testing.assert_close(FreeBits(1.0).groups(model, guide), each.mean((0, 1)))
    torch.testing.assert_close(FreeBits(1.0, per="site").groups(model, guide), each.sum(-1).mean()[None])


def test_a_point_keeps_its_own_density():
    # Pyro's closed KL of a Delta leaves it out.
    model, guide = sites(dist.Delta(LOC, log_density=0.3).to_event(1))
    each = 0.3 - dist.Normal(0.0, 1.0).log_prob(LOC)
    torch.testing.assert_close(FreeBits(1.0).groups(model, guide), each.mean(0))


def test_where_the_closed_form_does_not_hold_the_draws_are_used():
    c = case("bottom up")
    model, guide = run_pair(c.pair, c.batch, 3)
    latents = [n for n, s in model.items() if not s["is_observed"]]
    sampled = {
        n: guide[n]["fn"].log_prob(guide[n]["value"]) - model[n]["fn"].log_prob(guide[n]["value"]) for n in latents
    }
    groups = FreeBits(1.0).groups(model, guide)
    whole = FreeBits(1.0, per="site").groups(model, guide)
    torch.testing.assert_close(groups.sum(), whole.sum())
    wrong = [n for n, kl in zip(latents, whole, strict=True) if torch.isclose(kl, sampled[n].mean())]
    assert wrong  # at least one of them


@pytest.mark.parametrize("target", [0.0, 1.0, 5.0])
def test_capacity_by_hand(target):
    kl = gaussian_kl().sum(1).mean()
    loc = LOC.clone().requires_grad_()
    value = Capacity(3.0, target)(*sites(normal(loc), particles=2), ())
    torch.testing.assert_close(value, 3 * (kl - target).abs())
    (slope,) = torch.autograd.grad(value, loc)
    torch.testing.assert_close(slope, 3 * torch.sign(kl - target) * LOC / 2)


def test_masks_count_for_whole_sites_and_are_refused_for_entries():
    def model(x):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", normal())

    found = run_pair(Pair(model, guide), (torch.zeros(2),), 1)
    kl = gaussian_kl()[0].sum() / 2
    torch.testing.assert_close(FreeBits(9.0, per="site")(*found, ()), 9 - kl)
    torch.testing.assert_close(Capacity(1.0, 9.0)(*found, ()), 9 - kl)
    for penalty in (FreeBits(1.0), TotalCorrelation(2, 1.0)):
        with pytest.raises(ValueError, match="site 'z': it is masked"):
            penalty(*found, ())
    with pytest.raises(ValueError, match="site 'z': it is masked"):
        FreeBits(1.0)(*sites(normal().mask(torch.tensor([True, False]))), ())


@pytest.mark.parametrize("penalty", [FreeBits(1.0), TotalCorrelation(2, 1.0)])
def test_entries_must_be_independent(penalty):
    q = dist.MultivariateNormal(LOC, torch.eye(3))
    p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match="site 'z': the entries of MultivariateNormal are not independent"):
        penalty(*sites(q, p), ())


# ---- total correlation


@pytest.mark.parametrize("particles", [1, 3])
def test_total_correlation_against_a_loop(particles):
    loc, scale = torch.randn(4, 2), torch.rand(4, 2) + 0.3
    model, guide = sites(normal(loc, scale), particles=particles)
    z, size = guide["z"]["value"], 50
    density = torch.zeros(particles, 4, 4, 2)  # of draw (k, i) under datum m, in each entry
    for k in range(particles):
        for i in range(4):
            for m in range(4):
                density[k, i, m] = dist.Normal(loc[m], scale[m]).log_prob(z[k, i]).exp()
    joint = (density.prod(-1).sum(2) / (size * 4)).log()
    product = (density.sum(2) / (size * 4)).log().sum(-1)
    own = torch.diagonal(density.prod(-1), dim1=1, dim2=2).log()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    penalty = TotalCorrelation(size, weight=2.0)
    expected = [(own - joint).mean(0), (joint - product).mean(0), (product - prior).mean(0)]
    for part, by_hand in zip(penalty.decomposition(model, guide), expected, strict=True):
        torch.testing.assert_close(part, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty(model, guide, ()), 2 * expected[1], rtol=1e-4, atol=1e-5)


def test_the_three_parts_sum_to_the_kl():
    pair = as_pair(vae())
    model, guide = run_pair(pair, (X,), 2)
    parts = TotalCorrelation(1000, 1.0).decomposition(model, guide)
    z = guide["z"]["value"]
    rate = guide["z"]["fn"].log_prob(z) - model["z"]["fn"].log_prob(z)
    torch.testing.assert_close(sum(parts), rate.mean(0), rtol=1e-4, atol=1e-4)
    assert all(part.shape == (24,) for part in parts)


def test_the_total_correlation_of_a_gaussian_aggregate():
    # q(z | x) = N(x, s²), x ~ N(0, S): the aggregate is N(0, S + s² I), its total correlation -½ log det of the
    # correlations. size=1 takes the batch for all there is; any other adds (d - 1) log N.
    s, covariance = 0.5, torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    x = torch.randn(1500, 2) @ torch.linalg.cholesky(covariance).T
    model, guide = sites(normal(x, torch.full_like(x, s)))
    values = TotalCorrelation(1, 1.0)(model, guide, ())
    rho = 0.8 / (1 + s**2)
    exact = -0.5 * math.log(1 - rho**2)
    assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(1500) + 0.01
    torch.testing.assert_close(TotalCorrelation(700, 1.0)(model, guide, ()), values + math.log(700))


def test_independent_latents_without_information_have_none():
    model, guide = sites(normal(torch.zeros(50, 2), torch.ones(50, 2)))
    for part in TotalCorrelation(1, 1.0).decomposition(model, guide):
        torch.testing.assert_close(part, torch.zeros(50), rtol=0, atol=1e-5)


def test_a_plate_inside_the_data_plate_has_no_aggregate():
    c = case("nested")
    found = run_pair(c.pair, c.batch, 2)
    with pytest.raises(ValueError, match="site 'u': it stands in a plate inside the data plate"):
        TotalCorrelation(10, 1.0, site="u")(*found, c.batch)
    z = found[1]["z"]["value"]
    rate = (found[1]["z"]["fn"].log_prob(z) - found[0]["z"]["fn"].log_prob(z)).mean((0, 1))
    torch.testing.assert_close(sum(TotalCorrelation(10, 1.0, site="z").decomposition(*found)), rate)


# ---- MMD

KERNELS = {"imq": lambda r, c: c / (c + r), "rbf": lambda r, c: math.exp(-r / c)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_against_a_double_loop(kernel):
    a, b, scales = torch.randn(2, 5, 3), torch.randn(2, 5, 3) + 1, (0.5, 2.0)

    def k(u, v):
        return sum(KERNELS[kernel](float((u - v).square().sum()), 2 * 3 * s) for s in scales)

    for row in range(2):
        value = 0.0
        for i in range(5):
            for j in range(5):
                value -= 2 * k(a[row, i], b[row, j]) / 25
                value += (k(a[row, i], a[row, j]) + k(b[row, i], b[row, j])) / 20 if i != j else 0
        assert float(squared_mmd(a, b, kernel, scales)[row]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_zero_in_the_mean_for_equal_distributions_and_positive_for_others(kernel):
    penalty = MMD(1.0, kernel)
    prior = normal(torch.zeros(6, 3), torch.ones(6, 3))
    values = torch.stack([penalty(*sites(prior, particles=50), ()) for _ in range(20)])
    assert abs(float(values.mean())) < 5 * float(values.std()) / math.sqrt(20)
    assert float(values.std()) < 0.1
    far = torch.stack(
        [penalty(*sites(normal(torch.ones(6, 3), torch.ones(6, 3)), particles=50), ()) for _ in range(5)]
    )
    assert float(far.min()) > 0.1


def test_mmd_draws_from_the_models_prior_and_teaches_it():
    mean = torch.tensor([3.0, -2.0], requires_grad=True)
    q = normal(torch.tensor([3.0, -2.0]).expand(40, 2), torch.ones(40, 2))
    value = MMD(1.0)(*sites(q, dist.Normal(mean, 1.0).to_event(1), particles=20), ())
    assert abs(float(value.detach())) < 0.05
    (slope,) = torch.autograd.grad(value, mean)
    assert bool(slope.any())


def test_mmd_has_a_finite_gradient_at_equal_points():
    z = torch.zeros(1, 4, 2, requires_grad=True)
    value = squared_mmd(z, torch.zeros(1, 4, 2), "imq", (1.0,))
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert bool(slope.isfinite().all())


def test_mmd_needs_two_data():
    with pytest.raises(ValueError, match="it needs two or more"):
        MMD(1.0)(*sites(normal(LOC[:1], SCALE[:1]), particles=5), ())


# ---- decoders


def test_decoder_weights_by_hand():
    program = vae()
    penalty = DecoderL2(0.1, program.likelihood)
    maps = [m for m in program.likelihood.modules() if isinstance(m, nn.Linear)]
    expected = 0.1 * sum(m.weight.square().sum().item() for m in maps)
    assert penalty({}, {}, ()).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected one or more modules with weights"):
        DecoderL2(0.1, nn.ReLU())
    with pytest.raises(ValueError, match="expected one or more modules with weights"):
        DecoderL2(0.1)


def test_penalties_do_not_own_the_decoder():
    # Validation puts an objective's state back to what it was when training began.
    program = vae()
    for penalty in (DecoderL2(0.1, program.likelihood), GradientPenalty(0.1, program.likelihood)):
        assert [*penalty.state_dict()] == ["weight"]
        assert not [*penalty.parameters()]


@pytest.mark.parametrize("name", ["net", "conditional"])
def test_the_gradient_penalty_is_the_decoders_squared_norm(name):
    program = vae()
    decoder = program.likelihood.net if name == "net" else program.likelihood
    model, guide = run_pair(as_pair(program), (X[:3],), 3)
    z = guide["z"]["value"]
    with torch.no_grad():
        draws = torch.stack([GradientPenalty(2.0, decoder)(model, guide, (X[:3],)) for _ in range(500)])
    norms = torch.zeros(3, 3)
    for k in range(3):
        for i in range(3):
            norms[k, i] = torch.func.jacrev(program.likelihood.net)(z[k, i].detach()).square().sum()
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - 2 * norms.mean(0)).abs() < 5 * error).all())


def test_the_gradient_penalty_bears_on_the_decoder_alone():
    program = cvae()
    batch = (X, conditions(X))
    value = GradientPenalty(1.0, program.likelihood)(*run_pair(as_pair(program), batch, 2), batch)
    assert value.shape == (24,)
    value.sum().backward()
    assert all(p.grad is None for p in program.posterior.parameters())
    weights = [m.weight for m in program.likelihood.modules() if isinstance(m, nn.Linear)]
    assert all(bool(w.grad.any()) for w in weights)


# ---- all of them

PENALTIES = {
    "free bits": lambda v: FreeBits(0.5),
    "free bits per site": lambda v: FreeBits(0.5, per="site"),
    "capacity": lambda v: Capacity(2.0, 1.0),
    "total correlation": lambda v: TotalCorrelation(96, 3.0),
    "mmd": lambda v: MMD(10.0),
    "mmd rbf": lambda v: MMD(10.0, "rbf", (1.0,)),
    "decoder": lambda v: DecoderL2(0.01, v.likelihood),
    "gradient": lambda v: GradientPenalty(0.1, v.likelihood),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_captured_and_as_written(interpreted, name):
    program = vae()
    agree(update_of(as_pair(program), Penalised(PENALTIES[name](program))), X)
    assert len(interpreted) == 1


def test_they_train_together_are_validated_and_annealed(interpreted):
    program = vae()
    penalties = {name: make(program) for name, make in PENALTIES.items()}
    capacity = penalties["capacity"]
    hook = pv.Anneal(capacity.target, pv.linear(0.0, 4.0, 4))
    objective = Penalised(*penalties.values())
    run = fit(program, X, X, objective=objective, epochs=1, batch_size=6, hooks=[hook], compile="require")
    assert run.step == 4
    assert float(capacity.target) == 3.0
    assert all(math.isfinite(row[key]) for row in run.history for key in ("train", "valid"))


@pytest.mark.parametrize("name", [n for n in PENALTIES if "mmd" not in n and n != "gradient"])
def test_a_weight_of_zero_takes_nothing_away(name):
    program = vae()
    penalty = PENALTIES[name](program)
    penalty.weight.zero_()
    value = penalty(*run_pair(as_pair(program), (X,), 2), (X,))
    assert value.shape in {(), (24,)}
    assert not bool(value.any())


@pytest.mark.parametrize("make", [lambda site: TotalCorrelation(9, 1.0, site), lambda site: MMD(1.0, site=site)])
def test_one_latent_is_named_where_there_are_several(make):
    c = case("two levels")
    found = run_pair(c.pair, c.batch, 1)
    first = next(iter(found[1]))
    assert bool(make(first)(*found, c.batch).isfinite().all())
    with pytest.raises(ValueError, match="site: the program has several latents"):
        make(None)(*found, c.batch)
    with pytest.raises(ValueError, match="site 'w': the model has no such latent"):
        make("w")(*found, c.batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreeBits(-1.0), "least must be finite and not negative, got -1.0"),
        (lambda: FreeBits(math.nan), "least must be finite and not negative, got nan"),
        (lambda: FreeBits(1.0, per="pixel"), "per must be 'dimension' or 'site', got 'pixel'"),
        (lambda: FreeBits(1.0, weight=math.inf), "weight must be finite and not negative, got inf"),
        (lambda: Capacity(1.0, -2.0), "target must be finite and not negative, got -2.0"),
        (lambda: TotalCorrelation(0, 1.0), "size must be at least 1, got 0"),
        (lambda: MMD(1.0, "linear"), "kernel must be 'imq' or 'rbf', got 'linear'"),
        (lambda: MMD(1.0, scales=()), "scales must be one or more positive numbers, got ()"),
        (lambda: MMD(1.0, scales=(1.0, 0.0)), "scales must be one or more positive numbers, got (1.0, 0.0)"),
        (
            lambda: GradientPenalty(1.0, pv.Normal(pv.MLP(2, 5, 3, norm="batch"), 0.1)),
            "decoder: it holds a BatchNorm1d at 'net.1.net', which mixes the data of a batch",
        ),
        (lambda: GradientPenalty(1.0, nn.BatchNorm2d(3)), "decoder: it holds a BatchNorm2d, which mixes the data"),
        (lambda: DecoderL2(-1.0, nn.Linear(2, 2)), "weight must be finite and not negative, got -1.0"),
    ],
)
def test_they_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
