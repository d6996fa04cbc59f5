"""From pairs to tables of log-densities: shapes, masks, scales, closed KLs; runs with the observations free."""

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

from ppl_vae.pairs import Pair, as_pair
from ppl_vae.traces import guide_means, log_terms, predict

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


# ---------------------------------------------------------------- means and predictions
def test_guide_means_of_one_level_are_the_guides():
    program = LinearGaussian.random(3)
    x = program.draw(4, seed=0)
    torch.testing.assert_close(guide_means(as_pair(program), x)["z"], program.posterior(x)[0].detach())


def test_guide_means_of_a_second_level_average_the_first():
    c = case("two levels", torch.float64)
    for layer in (c.pair.program.first, c.pair.program.second):
        layer.weight.data.mul_(0.3)
    torch.manual_seed(0)
    means = guide_means(c.pair, *c.batch, particles=4000)
    loc, raw = c.pair.program.first(c.batch[0]).detach().chunk(2, -1)
    torch.testing.assert_close(means["h"], loc)
    linear = c.pair.program.second(torch.cat([c.batch[0], loc], -1)).detach()[:, :LATENT]  # linear in h
    slope = c.pair.program.second.weight[:LATENT, WIDTH:].detach()
    error = ((raw.exp() ** 2) @ (slope.T**2)).sqrt() / math.sqrt(4000)
    assert bool(((means["z"] - linear).abs() <= 4.5 * error).all())


def test_guide_means_put_data_first():
    """Whatever plates a latent is in."""
    c = case("nested")
    means = guide_means(c.pair, *c.batch, particles=3)
    assert {name: m.shape for name, m in means.items()} == {"z": (ROWS,), "u": (ROWS, WIDTH)}
    slope = c.pair.program.entry[0].detach()
    torch.testing.assert_close(means["u"], slope * c.batch[0])


def test_means_of_discrete_latents():
    """A Bernoulli's mean is its probability; a category has none, and keeps the type to index with."""
    c = case("bernoulli")
    torch.testing.assert_close(
        guide_means(c.pair, *c.batch)["z"], c.pair.program.encoder(c.batch[0]).sigmoid().detach()
    )
    c = case("category")
    drawn, _, means = predict(c.pair, *c.batch, latents="means")
    assert not drawn["z"].is_floating_point()
    torch.testing.assert_close(means["x"], c.pair.program.table[drawn["z"]].detach())
    assert guide_means(c.pair, *c.batch, particles=50)["z"].shape == (ROWS,)


def test_predict_from_each_source():
    c = case("one level", torch.float64)
    (x,), program = c.batch, c.pair.program
    q = program.encoder(x).chunk(2, -1)[0].detach()
    drawn, values, means = predict(c.pair, x, latents="means")
    torch.testing.assert_close(drawn["z"][0], q)
    torch.testing.assert_close(means["x"][0], program.decoder(q).chunk(2, -1)[0].detach())
    assert not torch.equal(values["x"], means["x"])
    given = torch.ones(ROWS, LATENT, dtype=torch.float64)
    drawn, _, means = predict(c.pair, x, latents={"z": given}, particles=2)
    torch.testing.assert_close(means["x"], program.decoder(given).chunk(2, -1)[0].expand(2, -1, -1).detach())
    for source, loc, scale in (("prior", 0.0, 1.0), ("guide", q, program.encoder(x).chunk(2, -1)[1].exp())):
        torch.manual_seed(0)
        z = predict(c.pair, x, latents=source, particles=4000)[0]["z"]
        standard = ((z - loc) / scale).detach()
        assert float(standard.mean(0).abs().max()) < 4.5 / math.sqrt(4000)
        assert float((standard.std(0) - 1).abs().max()) < 4.5 / math.sqrt(2 * 4000)


def test_predictions_carry_no_gradient_and_do_not_copy_the_observation():
    c = case("one level")
    _, values, means = predict(c.pair, *c.batch, latents="prior")
    assert not values["x"].requires_grad
    assert not means["x"].requires_grad
    assert not torch.equal(values["x"][0], c.batch[0])


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


def test_predictions_and_given_latents_have_data_first():
    """(K, B, *plates, *event) comes out, (B, *plates, *event) goes in."""
    c = case("nested")
    drawn, values, means = predict(c.pair, *c.batch, particles=3)
    assert {n: v.shape for n, v in drawn.items()} == {"z": (3, ROWS), "u": (3, ROWS, WIDTH)}
    assert values["x"].shape == means["x"].shape == (3, ROWS, WIDTH)
    given = {n: v[0] for n, v in drawn.items()}
    again, _, mean = predict(c.pair, *c.batch, latents=given, particles=2)
    for name, value in given.items():
        assert torch.equal(again[name], value.expand(2, *value.shape))
    torch.testing.assert_close(mean["x"], means["x"][0].expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"latents 'z': expected shape \(6,\), got \(6, 1\)"):
        predict(c.pair, *c.batch, latents={"z": given["z"][:, None]})
