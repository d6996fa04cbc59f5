"""Flows: densities by the Jacobian, integrals of 1, draws that follow them, and training without leftovers."""

import copy
import gc
import weakref
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from small import LATENT, WIDTH, pixels
from small import fit as fit_small
from test_steps import agree, update_of
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

import ppl_vae as pv
from ppl_vae.estimators import doubly, pathwise
from ppl_vae.flows import Flow, Flowed, planar, radial
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.scalars import SplineMap
from ppl_vae.triangular import coupling, inverse_autoregressive, masked_autoregressive

SPLINE = SplineMap(bins=3, bound=4.0)
FLOWS = {
    "planar": partial(planar, depth=3),
    "radial": partial(radial, depth=3),
    "inverse autoregressive": partial(inverse_autoregressive, hidden=(5, 6)),
    "masked autoregressive": partial(masked_autoregressive, hidden=(5,)),
    "coupling": partial(coupling, hidden=(5,)),
    "inverse autoregressive, spline": partial(inverse_autoregressive, hidden=(5,), scalar=SPLINE),
    "masked autoregressive, spline": partial(masked_autoregressive, hidden=(5,), scalar=SPLINE),
    "coupling, spline": partial(coupling, hidden=(5,), depth=2, scalar=SPLINE),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def disturbed(module, size=0.4, seed=0):
    """A module in double precision with parameters moved from where they start, always alike."""
    g = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def flowed(name, latent=2, seed=0, context=0):
    with seeded(seed):
        net = torch.nn.Linear(4, context) if context else None
        return Flowed(pv.StandardNormal(latent), *FLOWS[name](latent, context=context), context=net)


def through(conditional, x, *context):
    """Values of the base pushed through, without any caches."""
    for transform in conditional(*context).transforms:
        x = transform(x)
    return x


@every_flow
@pytest.mark.parametrize("context", [0, 3])
def test_flows_start_as_the_identity(name, context):
    conditional = flowed(name, latent=3, context=context).double()
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = (z.new_ones(7, 4),) if context else ()
    torch.testing.assert_close(through(conditional, z, *given), z)
    torch.testing.assert_close(conditional(*given).log_prob(z), conditional.base().log_prob(z))


@every_flow
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("latent", [2, 3])
def test_the_density_is_that_of_the_jacobian(name, context, latent):
    conditional = disturbed(flowed(name, latent, context=context))
    x = torch.randn(6, latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = [torch.linspace(-1, 1, 4).double().expand(6, 4) * i for i in range(6)]
    for i in range(6):
        c = (given[i][0],) if context else ()
        jacobian = torch.autograd.functional.jacobian(lambda v, c=c: through(conditional, v, *c), x[i])
        expected = conditional.base().log_prob(x[i]) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(conditional(*c).log_prob(through(conditional, x[i], *c)), expected)
    assert not torch.allclose(through(conditional, x[i], *c), x[i], atol=0.1)  # a flow that does something


@every_flow
def test_the_density_of_a_draw_is_that_of_its_copy(name):
    conditional = disturbed(flowed(name, 3))
    with seeded(0):
        law = conditional().expand((4, 5))
        z = law.rsample()
    again = conditional()
    torch.testing.assert_close(law.log_prob(z), again.log_prob(z.clone()))
    torch.testing.assert_close(law.log_prob(z), law.log_prob(z.view_as(z)))
    other = law.rsample()  # the latest draw is what is remembered; the first is inverted
    torch.testing.assert_close(law.log_prob(z), again.log_prob(z.clone()))
    assert not torch.equal(law.log_prob(z), law.log_prob(other))


@every_flow
def test_gradients_of_the_density_at_given_values(name):
    """In the value, and in the parameters: through inverses that are found by iteration, too."""
    conditional = disturbed(flowed(name))
    names, values = zip(*conditional.named_parameters(), strict=True)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)

    def density(z, *values):
        class Density(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = conditional

            def forward(self, z):
                return self.inner().log_prob(z)

        return functional_call(Density(), {f"inner.{n}": v for n, v in zip(names, values, strict=True)}, (z,))

    assert torch.autograd.gradcheck(
        density, (z, *[v.detach().requires_grad_() for v in values]), atol=1e-5, fast_mode=True
    )


@every_flow
def test_it_integrates_to_one_and_draws_follow_it(name):
    conditional = disturbed(flowed(name, seed=2), size=0.2)
    axis = torch.linspace(-12, 12, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = conditional().log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
        with seeded(0):
            draws = conditional().sample((20000,))
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)

    def features(z):
        return torch.cat([z.tanh(), z.tanh().square(), (z[:, :1] * z[:, 1:]).tanh()], -1)

    found, error = features(draws).mean(0), features(draws).std(0) / 20000**0.5
    expected = (features(grid) * mass[:, None]).sum(0)
    assert ((found - expected).abs() < 5 * error + 2e-3).all()


@every_flow
@pytest.mark.parametrize("lead", [(), (4,), (3, 4)])
def test_shapes_under_any_leading_dimensions(name, lead):
    prior, followed = disturbed(flowed(name)), disturbed(flowed(name, context=3))
    c = torch.randn(*lead, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (prior(c).batch_shape, prior(c).event_shape) == ((), (2,))
    law = followed(c)
    assert (law.batch_shape, law.event_shape, law.support.event_dim) == (lead, (2,), 1)
    z = law.expand((5, *lead)).rsample()
    assert z.shape == (5, *lead, 2)
    table = law.log_prob(z.clone())
    assert table.shape == (5, *lead)
    torch.testing.assert_close(table[0], law.log_prob(z[0].clone()))
    assert prior().log_prob(z).shape == (5, *lead)
    assert (followed(c + 1).log_prob(z.clone()) - table).abs().min() > 0  # it follows its context


def test_flows_with_and_without_context_together():
    with seeded(0):
        flows = (*planar(2, 1, context=3), *inverse_autoregressive(2), *coupling(2, context=3), *radial(2))
        conditional = disturbed(Flowed(pv.StandardNormal(2), *flows, context=torch.nn.Linear(4, 3)))
        law = conditional(torch.randn(5, 4).double())
        z = law.rsample((3,))
    torch.testing.assert_close(law.log_prob(z), law.log_prob(z.clone()))


@every_flow
def test_what_was_drawn_goes_with_its_distribution(name):
    conditional = flowed(name)
    gc.collect()
    gc.disable()
    try:
        law = conditional()
        z = law.rsample()
        density = law.log_prob(z)
        remembered = [weakref.ref(z), weakref.ref(law.transforms[0])]
        del law, z, density
        assert [r() for r in remembered] == [None, None]
    finally:
        gc.enable()


def vae(name, where, seed=0):
    with seeded(seed):
        prior, posterior = pv.StandardNormal(LATENT), pv.mean_field(pv.MLP(WIDTH, 16, 2 * LATENT))
        if where == "prior":
            prior = Flowed(prior, *FLOWS[name](LATENT))
        elif where == "posterior":
            posterior = Flowed(posterior, *FLOWS[name](LATENT))
        else:
            posterior = Flowed(posterior, *FLOWS[name](LATENT, context=3), context=pv.MLP(WIDTH, 3))
        return pv.VAE(prior, pv.Normal(pv.MLP(LATENT, 16, WIDTH), pv.LearnedScale()), posterior)


def stand_ins(program):
    """Attributes of a program's modules that hold a tensor left over from tracing."""
    return [n for m in program.modules() for n, v in vars(m).items() if isinstance(v, FakeTensor)]


@every_flow
@pytest.mark.parametrize("where", ["prior", "posterior", "amortised"])
def test_two_steps_of_training(name, where):
    program = vae(name, where)
    before = copy.deepcopy(program.state_dict())
    run = fit_small(program, pixels(32), epochs=1, batch_size=16, compile="off", objective=pv.IWAE(3))
    assert run.history[-1]["train"] == run.history[-1]["train"]
    for key, value in program.state_dict().items():
        assert value.isfinite().all()
        if "flows" in key and key.rpartition(".")[2] in ("start", "first"):
            assert not torch.equal(value, before[key])
    assert pv.log_likelihood(program, pixels(8), particles=20).value.isfinite().all()
    assert pv.sample(program, 6).shape == (6, WIDTH)


@pytest.mark.parametrize(
    ("name", "where", "estimator"),
    [(name, "posterior", doubly) for name in FLOWS if name != "masked autoregressive, spline"]
    + [(name, "prior", pathwise) for name in ("planar", "radial", "masked autoregressive", "coupling, spline")]
    + [(name, "amortised", pathwise) for name in ("planar", "radial", "inverse autoregressive", "coupling")],
)
def test_captured_and_as_written(interpreted, name, where, estimator):
    program = vae(name, where)
    disturbed(program, size=0.2).float()
    pair = as_pair(program)
    inspect(pair, (pixels(6),))
    agree(update_of(pair, pv.IWAE(3, estimator=estimator)), pixels(6))
    assert len(interpreted) == 1
    assert stand_ins(program) == []
    copy.deepcopy(program)  # caches on modules could not be copied
    assert pair.program is program
    assert pv.IWAE(3)(pair, pixels(6)).isfinite().all()


@every_flow
def test_the_doubly_reparameterised_estimator(name):
    """The value and the model's gradient of the pathwise one, and the guide's in the mean."""
    program = vae(name, "posterior")
    program.likelihood = pv.Normal(program.likelihood.net, 2.0)  # weights of a finite variance
    disturbed(program, size=0.15)
    pair, x = as_pair(program), pixels(4).double()
    inspect(pair, (x,))
    guide = [*program.posterior.parameters()]
    model = [*program.likelihood.parameters()]
    found = {}
    for estimator in (pathwise, doubly):
        with seeded(0):
            objective = pv.IWAE(2, estimator=estimator)
            value = objective(pair, *[x.repeat(500, 1)]).reshape(500, 4).mean(1)
            pieces = value.reshape(20, 25).mean(1)
            grads = [torch.autograd.grad(p, guide + model, retain_graph=True) for p in pieces]
        flat = [torch.cat([g.flatten() for g in part[: len(guide)]]) for part in grads]
        found[estimator] = value.detach(), torch.stack(flat), grads[0][len(guide) :]
    torch.testing.assert_close(found[doubly][0], found[pathwise][0])
    for a, b in zip(found[doubly][2], found[pathwise][2], strict=True):
        torch.testing.assert_close(a, b)
    difference = found[doubly][1] - found[pathwise][1]
    error = difference.std(0) / 20**0.5
    assert ((difference.mean(0).abs() / (error + 1e-9)) < 6).all()
    assert difference.abs().max() > 1e-4


def test_under_pyros_own_svi():
    program = vae("planar", "posterior")
    program.prior = Flowed(program.prior, *coupling(LATENT, hidden=(4,), depth=1))
    before = {n: p.clone() for n, p in program.named_parameters()}
    with pyro.get_param_store().scope():
        pyro.clear_param_store()
        svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        with seeded(0):
            losses = [svi.step(pixels(16)) for _ in range(3)]
    assert all(loss == loss for loss in losses)
    still = [n for n, p in program.named_parameters() if torch.equal(p, before[n])]
    assert still == []


def test_bad_input():
    base = pv.StandardNormal(2)
    with pytest.raises(ValueError, match="flows: expected at least one"):
        Flowed(base)
    with pytest.raises(ValueError, match="flows: expected Flow modules, got tuple; unpack the factories"):
        Flowed(base, planar(2))
    with pytest.raises(ValueError, match=r"context: flows were made with context=\.\.\., but there is no net"):
        Flowed(base, *planar(2, context=3))
    for make in (planar, radial):
        with pytest.raises(ValueError, match="latent must be at least 1, got 0"):
            make(0)
        with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
            make(2, 0)
        with pytest.raises(ValueError, match="context must be at least 0, got -1"):
            make(2, context=-1)


def test_a_flow_of_ones_own():
    class Shift(Flow):
        def __init__(self):
            super().__init__()
            self.by = torch.nn.Parameter(torch.ones(2))

        def forward(self, *features):
            return torch.distributions.AffineTransform(self.by, 1.0, event_dim=1, cache_size=1)

    law = Flowed(pv.StandardNormal(2), Shift(), *planar(2))()
    torch.testing.assert_close(law.log_prob(torch.ones(2)), pv.StandardNormal(2)().log_prob(torch.zeros(2)))
