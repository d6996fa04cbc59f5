"""Pairs: every parameter of both programs in one module, however it was declared, and none in Pyro's store."""

import copy
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LATENT, PROGRAMS, ROWS, WIDTH, Nested, OneLevel, PyroGuide, PyroProgram, case, closed_over
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from small import pixels, vae
from torch import nn
from torch.distributions import constraints

from ppl_vae.layout import inspect
from ppl_vae.objectives import ELBO, IWAE
from ppl_vae.pairs import Pair, Program, as_pair
from ppl_vae.rng import seeded
from ppl_vae.traces import log_terms

X = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)


@pytest.fixture(autouse=True)
def untouched_store():
    pyro.clear_param_store()
    yield
    assert not dict(pyro.get_param_store())
    assert not pyro.settings.get("module_local_params")


def names(pair):
    return {name for name, _ in pair.named_parameters()}


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], WIDTH), 1.0).to_event(1), obs=x)


def guide_of(loc, scale=1.0):
    """A guide whose location is any expression of x."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc(x), scale).expand([len(x), LATENT]).to_event(1))

    return guide


# ---------------------------------------------------------------- as_pair
def test_the_same_program_has_the_same_pair():
    program = OneLevel()
    pair = as_pair(program)
    assert as_pair(program) is pair
    assert as_pair(pair) is pair
    assert isinstance(program, Program)
    assert pair.program is program
    assert "_ppl_vae_pair" not in dict(program.named_modules())
    assert {id(p) for p in pair.parameters()} == {id(p) for p in program.parameters()}


def test_another_guide_makes_another_pair():
    program = types.SimpleNamespace(model=model, guide=guide_of(lambda x: x[:, :LATENT]))
    first = as_pair(program)
    program.guide = AutoNormal(model)
    second = as_pair(program)
    assert second is not first
    assert as_pair(program) is second
    inspect(second, (X,))
    assert names(second) == {"programs.0.locs.z_unconstrained", "programs.0.scales.z_unconstrained"}


def test_a_copy_of_a_program_is_a_program_of_its_own():
    program = OneLevel()
    as_pair(program)
    twin = copy.deepcopy(program)
    log_terms(as_pair(twin), X)
    with torch.no_grad():
        twin.encoder.bias += 1
    assert as_pair(twin).program is twin
    assert not torch.equal(as_pair(twin).state_dict()["programs.0.encoder.bias"], program.encoder.bias)


def test_any_object_with_two_callables():
    program = types.SimpleNamespace(model=model, guide=guide_of(lambda x: x[:, :LATENT]))
    assert log_terms(as_pair(program), X).weight().shape == (1, ROWS)


@pytest.mark.parametrize(
    "wrong",
    [None, 3, "vae", nn.Linear(2, 2), model, types.SimpleNamespace(model=model), types.SimpleNamespace(model=1)],
)
def test_garbage_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"program: expected an object with a model and a guide.*Pair\(model, guide\)"
    ):
        as_pair(wrong)


def test_an_object_that_cannot_hold_its_pair():
    class Slots:
        __slots__ = ()
        model, guide = model, model

    for program in (Slots(), OneLevel):
        with pytest.raises(ValueError, match=r"give Pair\(program.model, program.guide\)"):
            as_pair(program)


@pytest.mark.parametrize("which", ["model", "guide"])
def test_pair_of_something_not_callable(which):
    given = {"model": model, "guide": model, which: 3}
    with pytest.raises(ValueError, match=f"{which}: expected a callable of a batch, got int"):
        Pair(**given)


# ---------------------------------------------------------------- what becomes a parameter
def test_bare_params_are_created_once_and_constrained():
    c = case("bare params")
    assert names(c.pair) == {"params.scale", "params.mix", "params.slope/of/q", "params.scale_q"}
    before = dict(c.pair.named_parameters())
    for _ in range(3):
        log_terms(c.pair, X)
    assert {n: id(p) for n, p in c.pair.named_parameters()} == {n: id(p) for n, p in before.items()}
    with torch.no_grad():
        for p in c.pair.parameters():
            p.fill_(-3.0)
    terms = log_terms(c.pair, X)
    assert bool(torch.isfinite(terms.weight()).all()), "scales stay positive wherever an optimizer goes"


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (constraints.positive, torch.tensor([0.3, 2.0])),
        (constraints.unit_interval, torch.tensor(0.7)),
        (constraints.simplex, torch.tensor([0.2, 0.5, 0.3])),
        (constraints.interval(-2.0, 5.0), torch.tensor([[1.0], [4.0]])),
        (constraints.lower_cholesky, torch.tensor([[1.0, 0.0], [0.4, 2.0]])),
        (constraints.real, torch.tensor([1.0, -2.0])),
    ],
    ids=str,
)
def test_constrained_values_round_trip(constraint, value):
    pair = Pair(model, model)
    ours = pair.own("a", lambda: value, constraint)
    torch.testing.assert_close(ours.detach(), value)
    assert ours.unconstrained() is pair.params["a"]
    ours.sum().backward()
    assert pair.params["a"].grad is not None
    torch.testing.assert_close(pair.own("a", None, constraints.real).detach(), value)


def test_the_initial_value_is_that_of_the_first_statement_and_a_copy():
    start = torch.tensor([1.0, 2.0])
    pair = Pair(model, guide_of(lambda x: pyro.param("loc", start)))
    log_terms(pair, X)
    start.fill_(9.0)
    log_terms(pair, X)
    assert pair.params["loc"].tolist() == [1.0, 2.0]


def test_an_initial_value_outside_its_constraint():
    pair = Pair(model, guide_of(lambda x: pyro.param("loc", torch.tensor(-1.0), constraint=constraints.positive)))
    with pytest.raises(ValueError, match="param 'loc': its initial value lies outside its constraint"):
        inspect(pair, (X,))


@pytest.mark.parametrize("leaf", [torch.tensor(0.3, requires_grad=True), torch.tensor(0.3)])
def test_a_tensor_is_trained_whether_or_not_it_asks_for_gradients(leaf):
    pair = Pair(model, guide_of(lambda x: pyro.param("loc", leaf.detach().requires_grad_(leaf.requires_grad))))
    log_terms(pair, X).weight().sum().backward()
    assert names(pair) == {"params.loc"}
    assert pair.params["loc"].grad is not None


def test_nets_of_plain_functions_are_used_where_they_live():
    net, frozen = nn.Linear(WIDTH, LATENT), nn.Linear(1, 1).requires_grad_(False).eval()

    def guide(x):
        pyro.module("net", net)
        pyro.module("frozen", frozen)
        guide_of(net)(x)

    pair = Pair(model, guide)
    inspect(pair, (X,))
    assert {id(p) for p in pair.parameters()} == {id(p) for p in net.parameters()}
    assert all("/" not in n or "$$$" in n for n in names(pair))


def test_two_nets_of_one_name_are_refused():
    first, second = nn.Linear(WIDTH, LATENT), nn.Linear(WIDTH, LATENT)

    def guide(x):
        pyro.module("net", first)
        pyro.module("net", second)
        guide_of(second)(x)

    with pytest.raises(ValueError, match=r"param 'net\$\$\$weight': two different parameters have this name"):
        inspect(Pair(model, guide), (X,))


@pytest.mark.parametrize("local", [False, True], ids=["built under Pyro's default", "built with local parameters"])
def test_pyro_modules_however_they_were_built(local):
    with pyro.settings.context(module_local_params=local):
        program, guide = PyroProgram(), PyroGuide()
        auto, vector = AutoNormal(model), AutoMultivariateNormal(model)
    for pair in (as_pair(program), Pair(OneLevel().model, guide), Pair(model, auto), Pair(model, vector)):
        inspect(pair, (X,))
        assert not pair.params, "no parameter twice"
        assert any(name.endswith("_unconstrained") for name in names(pair))
        if vector in pair.programs:
            continue  # it has no table per datum
        gradients = torch.autograd.grad(log_terms(pair, X).weight().sum(), [*pair.parameters()], allow_unused=True)
        assert sum(g is not None for g in gradients) >= 2


def test_a_pyro_module_that_a_function_closes_over():
    """Constrained and plain parameters alike; Pyro states them when it is called."""

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
            self.loc = nn.Parameter(torch.zeros(LATENT))

        def forward(self):
            return self.loc, self.scale

    net = Net()

    def guide(x):
        loc, scale = net()
        guide_of(lambda x: loc, scale)(x)

    pair = Pair(model, guide)
    inspect(pair, (X,))
    assert {id(p) for p in pair.parameters()} == {id(net.loc), id(net.scale_unconstrained)}
    log_terms(pair, X).weight().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_constrained_parameter_object_keeps_its_constraint():
    start = nn.Parameter(torch.tensor(0.5))
    pair = Pair(model, guide_of(lambda x: x[:, :LATENT], 1.0))
    assert pair.own("scale", start, constraints.positive).item() == pytest.approx(0.5)
    asked = []

    def guide(x):
        asked.append(pyro.param("scale", start, constraint=constraints.positive).detach())
        guide_of(lambda x: x[:, :LATENT], asked[-1])(x)

    pair = Pair(model, guide)
    log_terms(pair, X)
    with torch.no_grad():
        pair.params["scale"].fill_(-5.0)
    log_terms(pair, X)
    assert float(asked[-1]) > 0


# ---------------------------------------------------------------- a module like others
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_state_goes_to_a_fresh_pair_and_back(name):
    """Also for statements that have not run: their values wait until they do."""
    trained = case(name)
    with torch.no_grad():
        for i, p in enumerate(trained.pair.parameters()):
            p.add_(0.01 * (i + 1))
    state = {n: v.clone() for n, v in trained.pair.state_dict().items()}
    fresh = case(name)
    if name in ("bare params", "closed over"):
        fresh.pair = Pair(*fresh.pair.callables)  # as after a restart: no statement has run
        waiting = dict(state)
        fresh.pair.expect(waiting)
        assert not waiting
        inspect(fresh.pair, fresh.batch)
        assert not fresh.pair.expected
    else:
        fresh.pair.load_state_dict(state)
    assert {n: v.tolist() for n, v in fresh.pair.state_dict().items()} == {n: v.tolist() for n, v in state.items()}


def test_loaded_weights_of_another_program():
    pair = Pair(model, guide_of(lambda x: pyro.param("loc", torch.zeros(LATENT))))
    pair.expect({"params.loc": torch.zeros(LATENT), "params.other": torch.zeros(3)})
    with pytest.raises(ValueError, match="another program's: it has no 'other'"):
        inspect(pair, (X,))
    pair = Pair(model, guide_of(lambda x: pyro.param("loc", torch.zeros(LATENT))))
    pair.expect({"params.loc": torch.zeros(LATENT + 1)})
    with pytest.raises(
        ValueError, match=r"param 'loc': the loaded weights have shape \(3,\), the program's \(2,\)"
    ):
        inspect(pair, (X,))


@pytest.mark.parametrize("name", ["one level", "bare params", "closed over", "pyro module", "auto normal"])
def test_moving_a_pair_moves_all(name):
    c = case(name)
    c.pair.double()
    weight = log_terms(c.pair, c.batch[0].double(), particles=2).weight()
    assert weight.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in c.pair.parameters())


def test_only_trainable_parameters_are_declared():
    program = OneLevel()
    program.encoder.bias.requires_grad_(False)
    with pyro.poutine.trace(param_only=True) as seen:
        as_pair(program).declare()
    assert sum(node["type"] == "param" for node in seen.trace.nodes.values()) == 3  # of four


# ---------------------------------------------------------------- beside Pyro's own store
def test_the_users_store_is_left_alone():
    """Values, constraints, order, and the very tensors; also where names coincide."""
    pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
    pyro.param("other", torch.tensor([1.0, 2.0]))
    store = pyro.get_param_store()
    before = {name: (id(store[name].unconstrained()), store[name].tolist()) for name in store}
    for name in ("bare params", "pyro module", "auto normal", "closed over"):
        c = case(name)
        log_terms(c.pair, X, particles=2)
    assert {name: (id(store[name].unconstrained()), store[name].tolist()) for name in store} == before
    pyro.clear_param_store()


def test_pyros_svi_trains_a_program_after_us():
    """And Pyro, not we, fills the store with it."""
    program = PyroProgram()
    as_pair(program)
    log_terms(as_pair(program), X)
    before = program.net.bias.detach().clone()
    pair = closed_over()
    svi = SVI(*pair.callables, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    svi.step(X)
    assert set(pyro.get_param_store().keys()) == {
        f"{n}$$${p}" for n in ("encoder", "decoder") for p in ("weight", "bias")
    }
    assert torch.equal(program.net.bias, before)
    pyro.clear_param_store()


def test_mutable_state_of_nested_modules_is_registered():
    """A program's own parameters are there before anything has run."""
    assert names(as_pair(Nested())) == {
        f"programs.0.{n}" for n in ("entry", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    }


# ---------------------------------------------------------------- as one function of its parameters
@pytest.mark.parametrize("objective", [ELBO(kl="analytic"), IWAE(3)])
def test_a_pair_is_a_function_of_its_parameters(objective):
    """Other values can be put in for the parameters, twice, as a captured step does; the pair gains none."""
    program, x = vae(), pixels(8)
    pair = as_pair(program)
    inspect(pair, (x,))
    names = list(pair.state_dict())

    def value(parameters):
        with seeded(0):
            return torch.func.functional_call(Bound(pair, objective), parameters, (x,))

    class Bound(torch.nn.Module):
        def __init__(self, pair, objective):
            super().__init__()
            self.pair, self.objective = pair, objective

        def forward(self, x):
            return self.objective(self.pair, x).mean()

    given = {f"pair.{n}": p.detach().clone().requires_grad_() for n, p in pair.named_parameters()}
    shifted = {n: (p.detach() + 0.01).requires_grad_() for n, p in given.items()}
    same, other = value(given), value(shifted)
    gradients = torch.autograd.grad(other, list(shifted.values()))
    with seeded(0):
        assert float(same.detach()) == pytest.approx(float(objective(pair, x).mean().detach()), rel=1e-6)
    assert float(other.detach()) != pytest.approx(float(same.detach()), rel=1e-6)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert list(pair.state_dict()) == names
