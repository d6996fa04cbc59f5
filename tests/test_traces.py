"""From pairs to tables of log-densities: shapes, masks, scales, closed KLs; the log-joint at given latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import LATENT, PROGRAMS, ROWS, WIDTH, Discrete, PyroProgram, case
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.pairs import Pair, as_pair
from ppl_vae.predictive import predict
from ppl_vae.traces import (
    by_datum,
    joint_terms,
    log_joint,
    log_posterior,
    log_terms,
    run_guide,
    run_model,
    run_pair,
    tabulate,
    with_values,
)

PER_DATUM = [n for n in PROGRAMS if n not in ("shared latent", "auto diagonal", "scaled", "nested, subsampled")]


# ---------------------------------------------------------------- the table
@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", PER_DATUM)
def test_particles_by_data(name, particles):
    """(K, B) for every program, latents (K, B, *event) or with their inner plates between."""
    c = case(name)
    terms = log_terms(c.pair, *c.batch, particles=particles, kl="auto")
    rows = 3 if name == "drawn rows" else ROWS
    for table in (terms.likelihood, terms.prior, terms.posterior, terms.kl, terms.weight()):
        assert table.shape == (particles, rows)
    for z in terms.samples.values():
        assert z.shape[0] == particles
        assert rows in z.shape[1:]
    torch.testing.assert_close(terms.weight(2.0), terms.likelihood - 2.0 * terms.kl)


def test_by_hand():
    """The three densities of a one-level pair, from its nets."""
    c = case("one level", torch.float64)
    (x,), program = c.batch, c.pair.program
    terms = log_terms(c.pair, x, particles=3)
    z = terms.samples["z"]
    loc, raw = program.encoder(x).chunk(2, -1)
    out, out_raw = program.decoder(z).chunk(2, -1)
    torch.testing.assert_close(terms.posterior, Normal(loc, raw.exp()).log_prob(z).sum(-1))
    torch.testing.assert_close(terms.prior, Normal(0, 1).log_prob(z).sum(-1))
    torch.testing.assert_close(terms.likelihood, Normal(out, out_raw.exp()).log_prob(x).sum(-1))
    torch.testing.assert_close(terms.rate, terms.posterior - terms.prior)
    assert z.shape == (3, ROWS, LATENT)


def test_particles_differ():
    """All particles of a datum are draws of their own, and so are those of data."""
    z = log_terms(case("one level").pair, torch.ones(ROWS, WIDTH), particles=5).samples["z"].reshape(-1, LATENT)
    assert len(z.unique(dim=0)) == 5 * ROWS


def test_no_subsampling_scale_in_any_density():
    """50 data in the plate, 6 in the batch: the densities are those of a plate of 6."""
    whole, part = case("one level", torch.float64), case("given rows", torch.float64)
    part.pair.load_state_dict(whole.pair.state_dict())
    tables = []
    for c in (whole, part):
        torch.manual_seed(0)
        tables.append(log_terms(c.pair, *c.batch, particles=4))
    for name in ("likelihood", "prior", "posterior"):
        assert torch.equal(getattr(tables[0], name), getattr(tables[1], name))


@pytest.mark.parametrize("name", ["handler mask", "law mask"])
def test_a_masked_row_has_no_latent(name):
    c = case(name)
    keep = c.batch[0][:, 0] > 0
    assert bool(keep.any())
    assert not bool(keep.all())
    terms = log_terms(c.pair, *c.batch, particles=3, kl="auto")
    for table in (terms.prior, terms.posterior, terms.kl):
        assert bool((table[:, ~keep] == 0).all())
        assert bool((table[:, keep] != 0).all())
    assert bool((terms.likelihood != 0).all())


def test_inner_plates_are_summed():
    """Latents and pixels of a plate of entries belong to their datum; checked against one event of the entries."""
    c = case("nested", torch.float64)
    terms = log_terms(c.pair, *c.batch, particles=3)
    z, u = terms.samples["z"], terms.samples["u"]
    assert z.shape == (3, 1, ROWS)
    assert u.shape == (3, WIDTH, ROWS)
    prior = Normal(0, 1).log_prob(z)[:, 0] + Normal(0.5 * z, 1).log_prob(u).sum(1)
    torch.testing.assert_close(terms.prior, prior)


def test_two_levels_add_up():
    c = case("two levels", torch.float64)
    terms = log_terms(c.pair, *c.batch, particles=3, kl="analytic")
    h = terms.samples["h"]
    loc, raw = c.pair.program.first(c.batch[0]).chunk(2, -1)
    outer = kl_divergence(Normal(loc, raw.exp()), Normal(0, 1)).sum(-1)
    joined = torch.cat([c.batch[0].expand(3, -1, -1), h], -1)
    q_loc, q_raw = c.pair.program.second(joined).chunk(2, -1)
    p_loc, p_raw = c.pair.program.low(h).chunk(2, -1)
    inner = kl_divergence(Normal(q_loc, q_raw.exp()), Normal(p_loc, p_raw.exp())).sum(-1)
    torch.testing.assert_close(terms.kl, outer + inner)


def test_closed_kl_is_the_mean_of_the_sampled_one():
    program, x = LinearGaussian.reference(widen=1.2)
    terms = log_terms(as_pair(program.requires_grad_(False)), x, particles=20_000, kl="analytic")
    rate = (terms.posterior - terms.prior)[:, 0]
    torch.testing.assert_close(terms.kl, program.rate(x).expand(20_000, 1))
    assert float(rate.mean()) == pytest.approx(
        float(program.rate(x)), abs=4.5 * float(rate.std()) / math.sqrt(20_000)
    )


def test_auto_samples_what_has_no_closed_form():
    """A full-covariance guide against a diagonal prior."""
    program, x = LinearGaussian.reference(guide="exact")
    terms = log_terms(as_pair(program), x, particles=3, kl="auto")
    torch.testing.assert_close(terms.kl, terms.posterior - terms.prior)
    with pytest.raises(
        ValueError, match=r"site 'z': no closed form between MultivariateNormal and Normal.*kl='auto'"
    ):
        log_terms(as_pair(program), x, kl="analytic")


def test_the_density_that_a_delta_carries_counts():
    """AutoNormal maps a normal draw to a positive latent: log q is in the Delta's log_density."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.tensor([0.5, 2.0])
    pair = Pair(model, guide)
    log_terms(pair, x)
    with torch.no_grad():
        guide.locs.z_unconstrained += 0.7
    sampled, auto = [log_terms(pair, x, particles=4, kl=kl) for kl in ("sampled", "auto") if torch.manual_seed(0)]
    torch.testing.assert_close(auto.weight(), sampled.weight())
    q = dist.LogNormal(guide.locs.z, guide.scales.z).log_prob(sampled.samples["z"])
    torch.testing.assert_close(sampled.posterior, q)


def test_factors_and_deterministics():
    """``pyro.factor`` in the model is part of the likelihood; ``pyro.deterministic`` is nothing."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("x", -((x - z) ** 2))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    x = torch.tensor([1.0, -2.0, 0.3])
    terms = log_terms(Pair(model, guide), x, particles=4)
    assert list(terms.samples) == ["z"]
    torch.testing.assert_close(terms.likelihood, -((x - terms.samples["z"]) ** 2))


def test_a_model_without_latents():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.tensor([1.0, -2.0])
    for kl in ("sampled", "analytic", "auto"):
        weight = log_terms(Pair(model, lambda x: None), x, particles=3, kl=kl).weight()
        torch.testing.assert_close(weight, Normal(0, 1).log_prob(x).expand(3, 2))


def test_a_discrete_draw_is_scored():
    program = Discrete()
    terms = log_terms(as_pair(program), torch.zeros(ROWS, WIDTH), particles=3)
    torch.testing.assert_close(terms.prior, Bernoulli(logits=program.logits).log_prob(terms.samples["z"]).sum(-1))
    assert terms.score_only == ("z",)
    assert log_terms(as_pair(PyroProgram()), torch.zeros(ROWS, WIDTH)).score_only == ()


def test_gradients_reach_every_parameter():
    for name in ("one level", "two levels", "nested", "bare params", "pyro module", "auto normal"):
        c = case(name)
        used = [p for n, p in c.pair.named_parameters() if not (name == "auto normal" and "encoder" in n)]
        gradients = torch.autograd.grad(
            log_terms(c.pair, *c.batch).weight().sum(), used, allow_unused=name == "pyro module"
        )
        assert all(isinstance(p, nn.Parameter) for p in used)
        assert all(g is not None and bool((g != 0).any()) for g in gradients), name


# ---------------------------------------------------------------- in parts
def test_the_parts_make_the_whole():
    c = case("drawn rows", torch.float64)
    torch.manual_seed(0)
    whole = log_terms(c.pair, *c.batch, particles=4, kl="auto")
    torch.manual_seed(0)
    guide = run_guide(c.pair, c.batch, 4)
    terms = tabulate(run_model(c.pair, c.batch, 4, guide), guide, c.batch, 4, kl="auto")
    for name in ("likelihood", "prior", "posterior", "kl"):
        assert torch.equal(getattr(terms, name), getattr(whole, name))


def test_the_guide_run_again_on_detached_draws_has_only_its_scores():
    """Draws, rows among them, are those of the first run; the parameters move the density alone."""
    c = case("two levels", torch.float64)
    drawn = run_guide(c.pair, c.batch, 3)
    fixed = with_values(drawn, torch.Tensor.detach)
    again = run_guide(c.pair, c.batch, 3, fixed)
    terms = tabulate(run_model(c.pair, c.batch, 3, fixed), again, c.batch, 3)
    assert all(torch.equal(z, drawn.nodes[n]["value"]) and not z.requires_grad for n, z in terms.samples.items())
    assert drawn.nodes["z"]["value"].requires_grad, "the first run is as it was"
    loc, raw = c.pair.program.first(c.batch[0]).chunk(2, -1)
    by_hand = Normal(loc, raw.exp()).log_prob(terms.samples["h"]).sum()
    bias = c.pair.program.first.bias
    first, second = (torch.autograd.grad(v, bias)[0] for v in (by_hand, terms.posterior.sum()))
    torch.testing.assert_close(first, second)
    assert torch.autograd.grad(terms.prior.sum() + terms.likelihood.sum(), bias, allow_unused=True) == (None,)


# ---------------------------------------------------------------- the log-joint
def latents_of(c, particles):
    """Draws of the model's latents as `log_joint` takes them, with what log p(x, z) is there."""
    model = run_pair(c.pair, c.batch, particles)[0]
    joint = sum(scaled(s) for s in model.values())
    return {n: by_datum(s, s["value"]).detach() for n, s in model.items() if not s["is_observed"]}, joint


def scaled(site):
    log_prob = dist.util.scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return log_prob.flatten(1, -2).sum(1) if log_prob.dim() > 2 else log_prob


@pytest.mark.parametrize("name", [n for n in PER_DATUM if n not in ("drawn rows", "auto normal")])
def test_the_three_densities_at_given_latents(name):
    """Those of the table, at its own draws, with nothing drawn again."""
    c = case(name, torch.float64 if name not in ("bernoulli", "category", "baseline") else torch.float32)
    model, guide = run_pair(c.pair, c.batch, 3)
    latents = {n: by_datum(s, s["value"]).detach() for n, s in guide.items()}
    state = torch.get_rng_state()
    prior, likelihood = joint_terms(c.pair, latents, *c.batch)
    posterior = log_posterior(c.pair, latents, *c.batch)
    assert torch.equal(torch.get_rng_state(), state), "something was drawn"
    torch.testing.assert_close(prior, sum(scaled(s) for n, s in model.items() if n in latents))
    torch.testing.assert_close(likelihood, sum(scaled(s) for n, s in model.items() if n not in latents))
    torch.testing.assert_close(posterior, sum(scaled(s) for s in guide.values()))


def test_a_posterior_wants_the_guides_latents():
    c = case("two levels")
    with pytest.raises(ValueError, match=r"latents: expected values of \['h', 'z'\], got \['z'\]"):
        log_posterior(c.pair, {"z": torch.zeros(2, ROWS, 2)}, *c.batch)


@pytest.mark.parametrize("name", [n for n in PER_DATUM if n != "drawn rows"])
def test_log_joint_is_likelihood_and_prior(name):
    """At the guide's draws; inner plates stand right of the data."""
    c = case(name, torch.float64 if name not in ("bernoulli", "category", "baseline") else torch.float32)
    latents, joint = latents_of(c, 3)
    state = torch.get_rng_state()
    ours = log_joint(c.pair, latents, *c.batch)
    assert torch.equal(torch.get_rng_state(), state), "something was drawn"
    assert ours.shape == (3, ROWS)
    torch.testing.assert_close(ours, joint)
    if name in ("one level", "two levels", "bare params"):
        torch.manual_seed(0)
        terms = log_terms(c.pair, *c.batch, particles=2)
        again = log_joint(c.pair, terms.samples, *c.batch)
        torch.testing.assert_close(again, terms.likelihood + terms.prior)


def test_log_joint_and_its_gradients_in_closed_form():
    program = LinearGaussian.random(0)
    x, pair = program.draw(4, seed=0), as_pair(program)
    z = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    ours = log_joint(pair, {"z": z}, x)
    loc, covariance = program.posterior(x)
    posterior = torch.distributions.MultivariateNormal(loc, covariance.expand(4, -1, -1))
    exact = program.log_evidence(x) + posterior.log_prob(z)
    torch.testing.assert_close(ours, exact)
    inputs = [z, program.weight, program.mean]
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(exact.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["two levels", "nested", "handler mask", "bare params"])
def test_log_joint_is_captured_with_its_gradient(name):
    c = case(name)
    latents, _ = latents_of(c, 3)

    def step(latents, *batch):
        leaves = {n: z.detach().requires_grad_() for n, z in latents.items()}
        value = log_joint(c.pair, leaves, *batch)
        return [value, *torch.autograd.grad(value.sum(), list(leaves.values()))]

    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(latents, *c.batch)
    other = {n: z + 0.3 for n, z in latents.items()}
    for eager, captured in zip(step(other, *c.batch), graph(other, *c.batch), strict=True):
        torch.testing.assert_close(captured, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, u: {"z": z}, r"latents: expected values of \['u', 'z'\], got \['z'\]"),
        (lambda z, u: {"z": z, "u": u, "v": u}, r"latents: expected .*got \['u', 'v', 'z'\]"),
        (lambda z, u: {"z": z, "u": u, "x": u}, r"latents: expected .*got \['u', 'x', 'z'\]"),
        (lambda z, u: {}, r"latents: expected .*got \[\]"),
        (lambda z, u: {"z": z, "u": u[:2]}, r"latents 'u': expected shape \(3, 6, 4\), got \(2, 6, 4\)"),
        (lambda z, u: {"z": z, "u": u.mT}, r"latents 'u': expected shape \(3, 6, 4\), got \(3, 4, 6\)"),
        (lambda z, u: {"z": z[..., None], "u": u}, r"latents 'z': expected shape \(3, 6\), got \(3, 6, 1\)"),
        (lambda z, u: {"z": z[0, 0], "u": u[0]}, r"latents 'z': expected shape \(6, 6\), got \(\)"),
        (lambda z, u: {"z": z[:0], "u": u[:0]}, "particles must be at least 1, got 0"),
    ],
)
def test_log_joint_refuses_other_latents(change, message):
    c = case("nested")
    latents, _ = latents_of(c, 3)
    with pytest.raises(ValueError, match=message):
        log_joint(c.pair, change(**latents), *c.batch)


@pytest.mark.parametrize("name", ["scaled", "shared latent"])
def test_log_joint_refuses_what_has_no_table(name):
    c = case(name)
    with pytest.raises(ValueError, match=r"site '.' is (scaled|outside the data plate)"):
        log_joint(c.pair, {"z" if name == "scaled" else "w": torch.zeros(2, ROWS, LATENT)}, *c.batch)


# ---------------------------------------------------------------- the caller's world
@pytest.mark.parametrize("name", PROGRAMS)
def test_settings_and_store_are_left_as_they_were(name):
    pyro.clear_param_store()
    c = case(name)
    with pyro.validation_enabled(True):
        before = (pyro.settings.get(), torch.distributions.Distribution._validate_args)
        if name in PER_DATUM:
            log_terms(c.pair, *c.batch, particles=2)
        else:
            with pytest.raises(ValueError, match="site"):
                log_terms(c.pair, *c.batch, particles=2)
        if name not in ("shared latent", "auto diagonal"):
            predict(c.pair, *c.batch)
        assert (pyro.settings.get(), torch.distributions.Distribution._validate_args) == before
    assert not dict(pyro.get_param_store())


def test_settings_come_back_after_an_error():
    def model(x):
        raise ZeroDivisionError

    before = pyro.settings.get()
    with pytest.raises(ZeroDivisionError):
        log_terms(Pair(model, lambda x: None), torch.zeros(3))
    assert pyro.settings.get() == before


# ---------------------------------------------------------------- refusals
def undeclared_event(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(LATENT, 1), 1.0))


def no_plate(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


@pytest.mark.parametrize("program", [undeclared_event, no_plate])
def test_a_site_that_breaks_the_shapes_is_named(program):
    with pytest.raises(ValueError, match=r"site 'z'.*(to_event|data plate \(dim=-1\))"):
        log_terms(Pair(program, program), torch.zeros(5, WIDTH))


def test_a_net_that_drops_leading_dimensions_is_explained():
    """It ran on a batch alone; Pyro's or torch's error about particles gets a note that says what to do."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :LATENT], 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.reshape(len(x), LATENT) @ torch.ones(LATENT, WIDTH), 1.0).to_event(1), obs=x
            )

    with pytest.raises(RuntimeError) as error:
        log_terms(Pair(model, guide), torch.zeros(ROWS, WIDTH), particles=2)
    assert "must keep leading dimensions" in error.value.__notes__[0]


@pytest.mark.parametrize("particles", [0, -1])
def test_particles_must_be_positive(particles):
    with pytest.raises(ValueError, match="particles must be at least 1"):
        log_terms(case("one level").pair, torch.zeros(ROWS, WIDTH), particles=particles)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.full((ROWS,), 2.0)])
def test_scaling_by_hand_is_named_or_kept(scale):
    c = case("one level")
    model = poutine.scale(c.pair.callables[0], scale=scale)
    pair = Pair(model, c.pair.callables[1])
    with pytest.raises(ValueError, match=r"site '[zx]' is scaled by poutine\.scale"):
        log_terms(pair, *c.batch)
    tables = []
    for p in (pair, c.pair):
        torch.manual_seed(0)
        tables.append(log_terms(p, *c.batch, keep_scales=True).likelihood)
    torch.testing.assert_close(tables[0], scale * tables[1])


def test_auto_diagonal_normal_has_no_bound_per_datum():
    """It draws all data's latents as one vector."""
    model = case("one level").pair.callables[0]
    with pytest.raises(ValueError, match="site '_AutoDiagonalNormal_latent' is outside the data plate"):
        log_terms(Pair(model, AutoDiagonalNormal(model)), torch.zeros(ROWS, WIDTH))
