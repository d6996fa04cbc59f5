"""The engine: when it captures, what it says where it cannot, and runs that are the same however they run."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO
from small import WIDTH, conditions, cvae, fit, pixels, same, vae, weights
from torch import nn
from torch._inductor import config
from torch.optim.lr_scheduler import ExponentialLR

import ppl_vae as pv
from ppl_vae import capture, graphs
from ppl_vae.capture import Captured, Engine
from ppl_vae.estimators import doubly
from ppl_vae.graphs import CaptureError
from ppl_vae.rng import seeded

X, HELD_OUT = pixels(56), pixels(40, seed=1)  # 16, 16, 16 and 8 rows


class Net(nn.Module):
    """A net with a buffer, and a function of it."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.linear, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)
        self.register_buffer("beta", torch.tensor(1.0))

    def forward(self, x):
        return [self.dropout(self.linear(x)) * self.beta]


def captured(engine, net=None, **options):
    net = net or Net()
    return net, Captured(Engine(engine) if isinstance(engine, str) else engine, [net], net, **options)


def warned_once(function, message):
    """Run a function, which warns once."""
    with pytest.warns(UserWarning, match=message) as caught:
        function()
    assert len(caught) == 1


def timeless(run):
    return [[v for k, v in row.items() if k not in ("seconds", "per_second")] for row in run.history]


# ---- what is captured
def test_unknown_choices():
    with pytest.raises(ValueError, match="compile must be 'auto', 'require' or 'off', got 'yes'"):
        Engine("yes")
    with pytest.raises(ValueError, match="compile must be 'auto', 'require' or 'off', got True"):
        fit(vae(), X, compile=True)


def test_what_runs_seldom_is_not_captured(interpreted):
    _, run = captured("auto", uses=lambda x: capture.WORTH - 1)
    run(torch.ones(2, 3))
    assert interpreted == []
    _, run = captured("auto", uses=lambda x: capture.WORTH * (len(x) - 1))
    for rows in (1, 2, 2, 1):
        run(torch.ones(rows, 3))
    assert len(interpreted) == 1
    for engine, expected in (("off", 0), ("require", 1)):
        interpreted.clear()
        _, run = captured(engine, uses=lambda x: 0)
        run(torch.ones(2, 3))
        assert len(interpreted) == expected


def test_a_graph_for_each_shape_type_memory_order_and_mode(interpreted):
    net, run = captured("require")
    plain = Net()
    x = torch.rand(4, 3)
    for training in (True, False):
        net.train(training), plain.train(training)
        for given in (x, x[:2], x.T.contiguous().T, x, x[:2]):
            with seeded(0):
                ours = run(given)[0]
            with seeded(0):
                torch.testing.assert_close(ours, plain(given)[0].detach())
    assert len(interpreted) == 6


def test_parameters_and_buffers_are_seen_as_they_are(interpreted):
    net, run = captured("require")
    net.eval()
    x = torch.rand(4, 3)
    for factor in (1.0, 2.0, -1.0):
        net.beta.fill_(factor)
        with torch.no_grad():
            net.linear.weight.mul_(factor)
        torch.testing.assert_close(run(x)[0], net(x)[0].detach())
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    torch.testing.assert_close(run(x)[0], net(x)[0].detach())
    assert len(interpreted) == 1


@pytest.mark.parametrize("engine", ["auto", "require"])
def test_shapes_that_keep_changing_are_given_up(interpreted, engine):
    net, run = captured(engine)
    net.eval()
    for rows in range(1, capture.MOST + 1):
        run(torch.ones(rows, 3))
    message = (
        rf"^compile='{engine}': the shapes of batches keep changing, and no more than {capture.MOST} are captured"
    )
    if engine == "require":
        with pytest.raises(ValueError, match=message):
            run(torch.ones(30, 3))
    else:

        def others():
            for rows in (30, 31, 2, 30):
                torch.testing.assert_close(run(torch.ones(rows, 3))[0], net(torch.ones(rows, 3))[0])

        warned_once(others, message)
    assert len(interpreted) == capture.MOST


# ---- what cannot be captured, or not be compiled
@pytest.mark.parametrize("net", [lambda x: [x * float(x.sum())], lambda x: [x if x.sum() > 0 else -x]])
def test_a_function_that_reads_numbers_runs_as_it_is(interpreted, net):
    engine = Engine("auto")
    run = Captured(engine, [nn.Module()], net)
    reason = r"it reads a number back from a tensor, or its shapes depend on values \(.*\)"

    def runs():
        for x in (torch.ones(3), -torch.ones(3), torch.ones(2)):
            assert torch.equal(run(x)[0], net(x)[0])

    warned_once(runs, f"^compile='auto': {reason}; it runs uncaptured, .*'off' silences")
    assert engine.describe().startswith("eager: it reads a number back")
    with pytest.raises(ValueError, match=f"^compile='require': {reason}$"):
        Captured(Engine("require"), [nn.Module()], net)(torch.ones(3))


def test_errors_of_a_function_are_its_own(interpreted):
    def refuses(x):
        raise ValueError("site 'z': no")

    for how in ("auto", "require", "off"):
        with pytest.raises(ValueError, match=r"^site 'z': no$"):
            Captured(Engine(how), [nn.Module()], refuses)(torch.ones(3))


@pytest.mark.parametrize("how", ["compiler missing", "compiling fails"])
def test_without_a_compiler_it_is_captured_all_the_same(monkeypatch, how):
    net = Net()
    engine, x = Engine("auto"), torch.rand(5, 3)
    if how == "compiling fails":
        monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *a, **k: 1 / 0)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        monkeypatch.setattr(graphs, "_compiled", type(graphs._compiled)())
        run = Captured(engine, [net], net)
        message = "^compile='auto': the graph cannot be compiled .*it runs captured but not compiled"

        def runs():
            for rows in (5, 4):
                with seeded(0):
                    ours = run(x[:rows])[0]
                with seeded(0):
                    torch.testing.assert_close(ours, net(x[:rows])[0].detach())

        warned_once(runs, message)
        with pytest.raises(ValueError, match="compile='require': the graph cannot be compiled"):
            Captured(Engine("require"), [net], net)(x)
    assert engine.describe().startswith("captured, not compiled in ")
    assert all(not ready.graph.compiled for ready in run.graphs.values())


def test_notes_are_kept_once():
    engine = Engine()
    assert engine.describe() == "eager"
    for note in ("a", "b", "a"):
        engine.note(note)
    assert engine.notes == ["a", "b"]
    assert engine.describe() == "a"


# ---- runs
RUNS = {
    "elbo": (vae, X, {}),
    "iwae": (vae, X, {"objective": pv.IWAE(3)}),
    "doubly": (vae, X, {"objective": pv.IWAE(3, estimator=doubly)}),
    "mean field": (vae, X, {"objective": TraceMeanField_ELBO(), "clip_norm": 1.0}),
    "conditional": (cvae, (X, conditions(X)), {"scheduler": partial(ExponentialLR, gamma=0.5)}),
    "redrawn": (
        partial(vae, "bernoulli"),
        pv.Data((X.clamp(0, 1) * 255).byte(), transform=pv.redraw),
        {"scheduler": partial(ExponentialLR, gamma=0.9), "scheduler_every": "step"},
    ),
    "foreign transform": (vae, pv.Data(X, transform=lambda x: x * float(x.mean() > -9)), {}),
    "stream": (vae, [X[:16], X[16:32], X[32:48], X[48:]], {}),
    "sgd, bf16": (vae, X, {"optimizer": partial(torch.optim.SGD, lr=1e-3), "precision": "bf16"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_captured_run_is_the_run_as_written(interpreted, name):
    make, data, options = RUNS[name]
    runs = {}
    for number, how in enumerate(("off", "require", "require")[: 3 if name in ("elbo", "redrawn") else 2]):
        held_out = data if name in ("conditional", "redrawn") else HELD_OUT
        program = make()
        run = fit(program, data, held_out, epochs=3, batch_size=16, compile=how, report_every=3, **options)
        runs[number] = timeless(run), weights(program)
        assert run.engine.describe().startswith("eager" if how == "off" else "compiled in")
    (plain, ends), (first, mine), *more = runs.values()
    for again, yours in more:
        assert first == again
        assert same(mine, yours)
    for ours, theirs in zip(first, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4, nan_ok=True)
    for key in ends:
        torch.testing.assert_close(mine[key], ends[key], rtol=1e-3, atol=1e-4)
    assert len(interpreted) == 4 * (1 + len(more))  # steps and validation, full batches and the short last one


def test_a_compiled_run_is_the_run_as_written():
    runs = []
    for how in ("off", "require"):
        program = vae("bernoulli")
        data = pv.Data((X[:48].clamp(0, 1) * 255).byte(), transform=pv.redraw)
        run = fit(program, data, epochs=4, batch_size=16, compile=how, objective=pv.ELBO(kl="analytic"))
        runs.append((timeless(run), weights(program)))
    assert run.engine.describe().startswith("compiled in")
    for ours, theirs in zip(runs[1][0], runs[0][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    for key, theirs in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][key], theirs, rtol=1e-3, atol=1e-4)


def test_short_runs_stay_eager_and_long_ones_do_not(interpreted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = fit(vae(), X, HELD_OUT, epochs=2)
        assert run.engine.describe() == "eager"
        assert interpreted == []
        fit(vae(), X[:48], epochs=334, batch_size=16)  # 1,002 steps
    assert len(interpreted) == 1


def test_a_stream_is_captured_once_it_has_shown_that_it_goes_on(interpreted, monkeypatch):
    batches = [pixels(16), pixels(16, seed=1), pixels(16, seed=2), pixels(9)]
    plain = fit(vae(), batches, epochs=60, compile="off")
    short = fit(vae(), batches, epochs=60)  # 240 steps
    assert short.engine.describe() == "eager"
    assert timeless(short) == timeless(plain)
    monkeypatch.setattr(capture, "WORTH", 100)
    long = fit(vae(), batches, epochs=60)
    assert len(interpreted) == 2
    for ours, theirs in zip(timeless(long), timeless(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)


class Ragged:
    """Batches of ever other lengths."""

    def __iter__(self):
        return (X[:n] for n in range(2, 22))


def test_batches_of_ever_other_lengths(interpreted):
    plain = fit(vae(), Ragged(), epochs=2, compile="off")
    with pytest.raises(ValueError, match="compile='require': the shapes of batches keep changing"):
        fit(vae(), Ragged(), epochs=2, compile="require")
    assert len(interpreted) == capture.MOST
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timeless(fit(vae(), Ragged(), epochs=2)) == timeless(plain)


def test_annealing_and_schedules_are_seen_by_one_graph(interpreted):
    runs = []
    for how in ("off", "require"):
        goal, program = pv.ELBO(beta=0.0), vae()
        anneal = pv.Anneal(goal.beta, pv.linear(0.0, 2.0, 10))
        run = fit(
            program, X[:48], objective=goal, hooks=[anneal], epochs=5, batch_size=16, compile=how,
            scheduler=partial(ExponentialLR, gamma=0.7), scheduler_every="step",
        )  # fmt: skip
        runs.append((timeless(run), weights(program)))
    assert len(interpreted) == 1
    for ours, theirs in zip(runs[1][0], runs[0][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    other = fit(vae(), X[:48], objective=pv.ELBO(beta=0.0), epochs=5, batch_size=16, compile="require")
    assert timeless(other)[-1][2] != pytest.approx(runs[1][0][-1][2], rel=1e-3)


def test_an_objective_of_pyros_own_is_refused_where_capturing_is_required(interpreted, monkeypatch):
    with pytest.raises(ValueError, match="compile='require': TraceGraph_ELBO runs through Pyro's own"):
        fit(vae(), X, objective=TraceGraph_ELBO(), compile="require")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # short: there is nothing to be said
        plain = fit(vae(), X, HELD_OUT, objective=TraceGraph_ELBO(), epochs=1)
    monkeypatch.setattr(capture, "WORTH", 1)
    with pytest.warns(UserWarning, match="TraceGraph_ELBO runs through Pyro's own") as caught:
        run = fit(vae(), X, HELD_OUT, objective=TraceGraph_ELBO(), epochs=1)
    assert len(caught) == 1
    assert timeless(run) == timeless(plain)
    assert interpreted == []


# ---- captured runs that end badly
class Record(pv.Hook):
    def __init__(self, stop=None):
        self.before, self.stop = [], stop

    def on_step(self, run):
        if run.step == self.stop:
            raise KeyboardInterrupt
        self.before.append(weights(run.pair))


@pytest.mark.parametrize("report_every", [1, 3])
def test_numbers_gone_wrong_are_named(interpreted, report_every):
    messages, ends = [], []
    for how in ("off", "require"):
        program = vae()
        schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda s: 1.0 if s < 5 else 1e30)
        with pytest.raises(pv.NonFiniteError) as caught:
            fit(
                program, X, epochs=3, batch_size=16, compile=how, optimizer=partial(torch.optim.SGD, lr=1e-4),
                scheduler=schedule, scheduler_every="step", report_every=report_every,
            )  # fmt: skip
        messages.append(str(caught.value))
        ends.append(weights(program))
    assert messages[0] == messages[1]
    assert "at step 7 (epoch 2); likely cause: too large a step" in messages[1]
    for key in ends[0]:
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=1e-3, atol=1e-5)


def test_an_interrupt_keeps_what_there_is(interpreted):
    record, program = Record(stop=6), vae()
    run = fit(program, X, HELD_OUT, epochs=3, batch_size=16, compile="require", hooks=[record])
    assert run.interrupted
    assert len(run.history) == 1
    assert same(weights(run.pair), record.before[4])  # the best epoch's
    assert math.isfinite(pv.elbo(program, X, compile="require").mean)


def test_a_program_stays_usable_after_it_was_captured(interpreted):
    """Nothing of the tracing stays behind in it: it trains again, alone, and under Pyro's own SVI."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.3))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample(
                    "x",
                    dist.Normal(z[..., None].repeat_interleave(WIDTH, -1), self.scale.exp()).to_event(1),
                    obs=x,
                )

        def guide(self, x):
            slope = pyro.param("slope", torch.full((WIDTH,), 0.1))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x @ slope, 0.5))

    values = []
    for how in ("off", "require"):
        program = Keeping()
        fit(program, X, epochs=1, compile=how, clip_norm=1.0)
        values.append(timeless(fit(program, X, epochs=1, clip_norm=1.0))[-1])
    assert values[1] == pytest.approx(values[0], rel=1e-4, nan_ok=True)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    with pyro.get_param_store().scope():
        assert math.isfinite(svi.step(X))


def test_capture_errors_are_no_value_errors():
    assert not issubclass(CaptureError, ValueError)  # which are the user's, and never fallen back from


class Lazy(nn.Module):
    """A layer that keeps a constant once it has made it, as position codes are often kept."""

    def __init__(self):
        super().__init__()
        self.made = None

    def forward(self, x):
        if self.made is None:
            self.made = torch.ones(x.shape[-1], device=x.device)
        return x + self.made


def test_what_modules_keep_while_traced_is_taken_back(interpreted):
    lazy = Lazy()
    captured = Captured(Engine("require"), [lazy], lambda x: [lazy(x)])
    for x in (torch.zeros(2, 3), torch.full((2, 3), 4.0), torch.ones(2, 3)):
        assert torch.equal(captured(x)[0], x + 1)
    assert len(interpreted) == 2  # at first to see that it keeps something, then for good
    assert torch.equal(lazy(torch.zeros(3)), torch.ones(3))  # no stand-in was left


def test_a_graph_that_cannot_run_is_told_and_left(monkeypatch):
    class Broken:
        constants = ()
        products = ""

        def __call__(self, *tensors):
            raise TypeError("expected Tensor()")

    monkeypatch.setattr("ppl_vae.capture.capture", lambda *_, **__: Broken())
    captured = Captured(Engine("auto"), [nn.Linear(2, 2)], lambda x: [x + 1])
    with pytest.warns(UserWarning, match=r"the graph cannot be run \(TypeError: expected Tensor"):
        first = captured(torch.zeros(2))[0]
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(captured(torch.ones(2))[0], torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="compile='require': the graph cannot be run"):
        Captured(Engine("require"), [nn.Linear(2, 2)], lambda x: [x + 1])(torch.zeros(2))


def test_parameters_whose_data_were_put_elsewhere_are_found(interpreted):
    net = nn.Linear(2, 1)
    captured = Captured(Engine("require"), [net], lambda x: [net(x).detach()])
    x = torch.ones(3, 2)
    captured(x)
    net.weight.data = torch.full((1, 2), 10.0)
    torch.testing.assert_close(captured(x)[0], net(x).detach())
    assert len(interpreted) == 1
