"""Objectives: the same draws give Pyro's value and gradient; everything else runs through Pyro itself."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from programs import PROGRAMS, ROWS, agree, case, vectorised
from pyro import infer
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal

from ppl_vae.bounds import elbo
from ppl_vae.estimators import doubly, pathwise
from ppl_vae.objectives import ELBO, IWAE, BoundObjective, PyroObjective, as_objective
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.traces import log_terms

OUTSIDE = {"bernoulli", "category", "baseline", "shared latent", "auto diagonal"}
LOWERED = [name for name in PROGRAMS if name not in OUTSIDE]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def untouched_store():
    """Nothing of ours writes to Pyro's global store."""
    pyro.clear_param_store()
    yield
    assert not dict(pyro.get_param_store())


# ---------------------------------------------------------------- lowered to our own bounds
@DTYPES
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("particles", [1, 3])
def test_trace_elbo(name, particles, dtype):
    c = case(name, dtype)
    loss = Trace_ELBO() if particles == 1 else vectorised(Trace_ELBO, c.nesting)
    agree(c.ours(PyroObjective(loss)), c.reference(loss))


@DTYPES
@pytest.mark.parametrize("name", [n for n in LOWERED if n != "bottom up"])
@pytest.mark.parametrize("particles", [1, 3])
def test_trace_mean_field_elbo(name, particles, dtype):
    c = case(name, dtype)
    loss = TraceMeanField_ELBO() if particles == 1 else vectorised(TraceMeanField_ELBO, c.nesting)
    agree(c.ours(PyroObjective(loss)), c.reference(loss))


@pytest.mark.parametrize(
    ("name", "kl", "loss"),
    [
        (name, kl, loss)
        for name in LOWERED
        for kl, loss in (("sampled", Trace_ELBO), ("auto", TraceMeanField_ELBO))
        if name not in ("scaled", "nested, subsampled")  # which ours refuse
        if (name, kl) != ("bottom up", "auto")  # where Pyro's closed KL does not hold
    ],
)
def test_our_elbo_is_pyros(name, kl, loss):
    """So a program moves from Pyro's SVI to `fit` without a change."""
    c = case(name, torch.float64)
    agree(c.ours(ELBO(3, kl=kl)), c.reference(vectorised(loss, c.nesting)))


def test_subsampling_does_not_change_the_bound_per_datum():
    """The same rows, whether they are all data or 6 of 50: no N/B in value or weights."""
    whole, part = case("one level", torch.float64), case("given rows", torch.float64)
    part.pair.load_state_dict(whole.pair.state_dict())
    for objective in (ELBO(4), IWAE(4), PyroObjective(vectorised())):
        agree(part.ours(objective), whole.ours(objective), 1e-12)


def test_beta_is_pyros_scale():
    """Higgins's beta: ours as an argument, Pyro's users' as a scale on the latent in both programs."""
    scaled, plain = case("scaled", torch.float64), case("one level", torch.float64)
    plain.pair.load_state_dict(scaled.pair.state_dict())
    agree(plain.ours(ELBO(beta=0.3)), scaled.reference(Trace_ELBO()))
    agree(plain.ours(ELBO(beta=0.3, kl="analytic")), scaled.reference(TraceMeanField_ELBO()))


@pytest.mark.parametrize(("make", "doubled"), [(ELBO, True), (IWAE, True), (IWAE, False)])
def test_the_estimator_of_the_gradient_is_a_choice(make, doubled):
    """The same value and model gradient; another gradient of the guide."""
    c = case("two levels", torch.float64)
    value, plain = c.ours(make(4))
    same, ours = c.ours(make(4, estimator=doubly if doubled else pathwise))
    assert same == pytest.approx(value, rel=1e-12)
    for name, gradient in plain.items():
        guide = ".first." in name or ".second." in name
        assert torch.allclose(ours[name], gradient) == (not (guide and doubled)), name


def test_beta_is_known_to_the_estimator():
    """At beta = 0 there is no density of the guide in the weight, and no score to replace."""
    c = case("one level", torch.float64)
    first, second = (c.ours(BoundObjective(IWAE(4).bound, e, particles=4, beta=0.0)) for e in (pathwise, doubly))
    agree(first, second, 1e-9)


@pytest.mark.parametrize("kl", ["analytic", "auto"])
def test_no_closed_kl_without_scores(kl):
    c = case("one level")
    with pytest.raises(ValueError, match=f"kl must be 'sampled'.*got '{kl}'"):
        ELBO(kl=kl, estimator=doubly)(c.pair, *c.batch)


def test_estimators_are_functions():
    with pytest.raises(ValueError, match=r"estimator: expected a function such as .*, got 'doubly'"):
        IWAE(5, estimator="doubly")


def test_beta_weighs_the_rate():
    c = case("one level", torch.float64)
    free, half, full = (c.ours(ELBO(beta=b, kl="analytic"))[0] for b in (0.0, 0.5, 1.0))
    assert half == pytest.approx((free + full) / 2, rel=1e-12)
    annealed = ELBO(kl="analytic", beta=0.0)
    annealed.beta.fill_(0.5)  # a hook does this
    assert c.ours(annealed)[0] == pytest.approx(half, rel=1e-12)
    assert "beta" in dict(annealed.named_buffers())


# ---------------------------------------------------------------- the mean-field condition
A, B, C, S, T = 0.8, 0.4, 0.6, 0.7, 0.9


def bottom_up_model(x):
    with pyro.plate("data", len(x), dim=-1):
        h = pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(A * h, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def bottom_up_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(B * x, S))
        pyro.sample("h", dist.Normal(C * z, T))


def bottom_up_elbo(x):
    """By second moments: z = B x + S e1, h = C z + T e2, so z - A h = (1 - A C) z - A T e2."""
    second = (B * x) ** 2 + S**2
    squares = (x - B * x) ** 2 + S**2 + (1 - A * C) ** 2 * second + (A * T) ** 2 + C**2 * second + T**2
    entropy = Normal(0, S).entropy() + Normal(0, T).entropy()
    return -1.5 * math.log(2 * math.pi) - 0.5 * squares + entropy


@pytest.mark.parametrize(
    "objective", [ELBO(20_000, kl="auto"), ELBO(20_000), None], ids=["auto", "sampled", "pyro"]
)
def test_closed_kl_where_the_guide_turns_the_order_round(objective):
    """The closed KL of z would hold h fixed though h depends on z: it is sampled instead, and unbiased."""
    loss = vectorised(TraceMeanField_ELBO, particles=20_000)
    objective, x = objective or PyroObjective(loss), torch.tensor([1.5], dtype=torch.float64)
    pair = Pair(bottom_up_model, bottom_up_guide)
    torch.manual_seed(0)
    value = float(objective(pair, x))
    band = 5 * float(log_terms(pair, x, particles=20_000).weight().std()) / math.sqrt(20_000)
    assert value == pytest.approx(float(bottom_up_elbo(x)), abs=band)
    with pytest.warns(UserWarning, match="mean field"):
        pyros = -loss.loss(bottom_up_model, bottom_up_guide, x)
    assert abs(pyros - float(bottom_up_elbo(x))) > 2 * band, "the trap that this test is about is gone"


def test_analytic_kl_refuses_the_other_order():
    with pytest.raises(ValueError, match=r"site 'z'.*'h' after it.*kl='auto'"):
        ELBO(kl="analytic")(Pair(bottom_up_model, bottom_up_guide), torch.zeros(3))


# ---------------------------------------------------------------- through Pyro
ADAPTED = {
    "bernoulli": [Trace_ELBO, infer.TraceGraph_ELBO, infer.JitTrace_ELBO],
    "category": [Trace_ELBO, infer.TraceGraph_ELBO],
    "baseline": [infer.TraceGraph_ELBO],
    "shared latent": [Trace_ELBO, TraceMeanField_ELBO, infer.TraceGraph_ELBO],
    "one level": [infer.TraceGraph_ELBO, infer.RenyiELBO, infer.ReweightedWakeSleep, infer.JitTraceMeanField_ELBO],
    "given rows": [infer.TraceGraph_ELBO],
    "drawn rows": [infer.TraceGraph_ELBO],
    "two levels": [infer.RenyiELBO],
    "bare params": [infer.RenyiELBO, infer.TraceGraph_ELBO, infer.JitTrace_ELBO],
    "closed over": [infer.RenyiELBO],
    "pyro module": [infer.RenyiELBO],
    "pyro guide": [infer.RenyiELBO],
    "auto normal": [infer.TraceGraph_ELBO],
    "auto diagonal": [Trace_ELBO, infer.TraceGraph_ELBO],
}


@pytest.mark.parametrize(("name", "loss"), [(n, loss) for n, losses in ADAPTED.items() for loss in losses])
def test_adapter(name, loss):
    """Value and gradient are those of Pyro's own loss_and_grads, divided by the number of data."""
    options = {"num_particles": 2, "vectorize_particles": True} if loss is infer.RenyiELBO else {}
    options |= {"strict_enumeration_warning": False} if loss is infer.ReweightedWakeSleep else {}
    options |= {"ignore_jit_warnings": True} if loss.__name__.startswith("Jit") else {}
    c = case(name, torch.float32)
    made = loss(max_plate_nesting=c.nesting, **options)
    plain = {"JitTrace_ELBO": Trace_ELBO, "JitTraceMeanField_ELBO": TraceMeanField_ELBO}.get(loss.__name__)
    agree(c.ours(as_objective(made)), c.reference(made if plain is None else plain(max_plate_nesting=c.nesting)))


def test_enumeration_in_the_guide():
    c = case("category")
    c.pair = Pair(c.pair.callables[0], infer.config_enumerate(c.pair.callables[1], "parallel"))
    loss = infer.TraceEnum_ELBO(max_plate_nesting=1)
    agree(c.ours(PyroObjective(loss)), c.reference(loss))


def test_enumeration_in_the_model_is_exact():
    """A latent that the guide leaves to TraceEnum_ELBO is summed over: the value is log p(x) itself."""
    c = case("category")
    model, program = c.pair.callables[0], c.pair.program
    pair = Pair(infer.config_enumerate(model, "parallel"), lambda x: None)
    value = PyroObjective(infer.TraceEnum_ELBO(max_plate_nesting=1))(pair, *c.batch).detach()
    assert float(value.mean()) == pytest.approx(float(program.log_evidence(*c.batch).detach().mean()), rel=1e-5)
    for objective in (ELBO(), IWAE(3), PyroObjective(Trace_ELBO()), PyroObjective(infer.TraceGraph_ELBO())):
        with pytest.raises(ValueError, match=r"site 'z'.*enumerates.*TraceEnum_ELBO"):
            objective(pair, *c.batch)


def test_adapter_restores_gradients_and_leaves_the_store():
    c = case("bare params")
    pyro.param("slope.of.q", torch.tensor(7.0))  # the user's own
    before = {p: torch.full_like(p, 3.0) for p in c.pair.parameters()}
    for p, grad in before.items():
        p.grad = grad
    value = PyroObjective(infer.TraceGraph_ELBO())(c.pair, *c.batch).mean()
    assert all(p.grad is grad and bool((grad == 3.0).all()) for p, grad in before.items())
    gradient = torch.autograd.grad(value, list(before), retain_graph=True)
    value.backward()
    assert all(torch.equal(p.grad, 3.0 + g) for p, g in zip(before, gradient, strict=True))
    assert dict(pyro.get_param_store()) == {"slope.of.q": torch.tensor(7.0)}
    pyro.clear_param_store()


def test_decaying_baseline_is_kept_between_steps_and_apart():
    """TraceGraph_ELBO stores its baselines by pyro.param; they live with the objective."""
    c, objective = case("baseline"), PyroObjective(infer.TraceGraph_ELBO())
    seen = []
    for _ in range(2):
        objective(c.pair, *c.batch)
        seen.append(objective.store["params"]["__baseline_avg_downstream_cost_z"].detach().clone())
    assert not torch.equal(*seen)


def test_adapter_without_gradients():
    c, objective = case("bernoulli"), PyroObjective(Trace_ELBO())
    with torch.no_grad():
        value = objective(c.pair, *c.batch)
    assert value.shape == (ROWS,)
    assert not value.requires_grad
    assert float(value.mean()) < 0, "higher is better: minus the loss"


def test_shared_latent_has_no_bound_per_datum():
    c = case("shared latent")
    for objective in (ELBO(), IWAE(5)):
        with pytest.raises(ValueError, match=r"site 'w'.*data plate \(dim=-1\).*pyro.infer"):
            objective(c.pair, *c.batch)


def test_a_pyro_objective_does_not_change_the_loss_given():
    jitted = infer.JitTrace_ELBO()
    objective = as_objective(jitted)
    assert type(jitted) is infer.JitTrace_ELBO
    assert type(objective.loss) is Trace_ELBO


# ---------------------------------------------------------------- settings and refusals
@pytest.mark.parametrize("name", ["bernoulli", "category"])
@pytest.mark.parametrize("objective", [ELBO(), IWAE(5), ELBO(2, kl="auto")], ids=repr)
def test_pathwise_refuses_what_is_not_reparameterised(name, objective):
    c = case(name)
    with pytest.raises(ValueError, match=r"site 'z'.*reparameterised.*Trace_ELBO"):
        objective(c.pair, *c.batch)


def test_hand_scales_are_refused_by_name():
    """Inside a logsumexp they would temper the weights; an inner plate's subsampling does the same."""
    for name, site in (("scaled", "z"), ("nested, subsampled", "[ux]")):
        c = case(name)
        for objective in (ELBO(), IWAE(5)):
            with pytest.raises(ValueError, match=f"site '{site}' is scaled.*beta.*Trace_ELBO"):
                objective(c.pair, *c.batch)


@pytest.mark.parametrize("make", [ELBO, IWAE])
@pytest.mark.parametrize("particles", [0, -3])
def test_particles_must_be_positive(make, particles):
    with pytest.raises(ValueError, match=f"particles must be at least 1, got {particles}"):
        make(particles)


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_beta_must_be_finite_and_not_negative(beta):
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        ELBO(beta=beta)


def test_kl_must_be_known():
    with pytest.raises(ValueError, match="kl must be 'sampled', 'analytic' or 'auto', got 'exact'"):
        ELBO(kl="exact")


@pytest.mark.parametrize("wrong", [elbo, "elbo", Trace_ELBO, None, 3, infer.TraceTailAdaptive_ELBO()])
def test_as_objective_refuses_other_things(wrong):
    with pytest.raises(ValueError, match=r"objective: (expected|TraceTailAdaptive_ELBO gives no value)"):
        as_objective(wrong)


def test_as_objective_keeps_ours():
    mine = ELBO()
    assert as_objective(mine) is mine


@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3), PyroObjective(Trace_ELBO())], ids=repr)
def test_one_value_per_datum(objective):
    """And each datum's value is its own: rows do not share weights."""
    program, _ = LinearGaussian.reference()
    x = program.draw(5, seed=0)
    pair = as_pair(program)
    torch.manual_seed(0)
    value = objective(pair, x)
    assert value.shape == (5,)
    moved = x.clone()
    moved[3] += 4.0
    torch.manual_seed(0)
    change = objective(pair, moved) - value
    assert (change != 0).tolist() == [False, False, False, True, False]


def test_objectives_say_what_they_are():
    assert "iwae, particles=5, kl=sampled, estimator=doubly" in repr(IWAE(5, estimator=doubly))
    assert "Trace_ELBO, particles=1" in repr(PyroObjective(Trace_ELBO()))
    assert "particles=2" in repr(BoundObjective(lambda w: w.mean(0), particles=2))


def test_objectives_can_be_copied():
    c, twin = case("one level"), copy.deepcopy(ELBO(2))
    agree(c.ours(twin), c.ours(ELBO(2)))
