"""Training: determinism, history, schedules, clipping, the weights that are kept, and steps that never wait."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from small import LIKELIHOODS, WIDTH, conditions, cvae, fit, pixels, same, vae, weights
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

import ppl_vae as pv
from ppl_vae.batches import prepare
from ppl_vae.objectives import as_objective
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.train import adam, as_device, default_device

X, HELD_OUT = pixels(64), pixels(40, seed=1)
sgd = partial(torch.optim.SGD, lr=1e-2)


class Watch(pv.Hook):
    """Record every moment of a run, and the weights after each epoch."""

    def __init__(self):
        self.moments, self.weights, self.modes, self.reports = [], [], set(), []

    def on_start(self, run):
        self.moments.append("start")

    def on_step(self, run):
        self.moments.append(run.step)
        self.modes.add(run.pair.training)

    def on_report(self, run, value, rate):
        self.moments.append("report")
        self.reports.append((value, rate))

    def on_epoch(self, run):
        self.moments.append("epoch")
        self.weights.append(weights(run.pair))

    def on_end(self, run):
        self.moments.append("end")


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "per_second")} for row in history]


# ---- the same numbers again


def train(seed=0, **options):
    program, watch = vae(), Watch()
    run = fit(program, X, epochs=3, batch_size=16, seed=seed, hooks=[watch], **options)
    return weights(program), timeless(run.history), watch.weights


@pytest.mark.parametrize("objective", [None, pv.IWAE(3), TraceMeanField_ELBO()])
def test_a_seed_fixes_every_number_and_the_callers_streams_matter_not(objective):
    results = []
    for caller in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(caller)
            results.append(train(valid=HELD_OUT, objective=objective))
            drawn = torch.rand(2)
            torch.manual_seed(caller)
            assert torch.equal(drawn, torch.rand(2))  # and they are left alone
    (first, rows, _), (second, more, _) = results
    assert same(first, second)
    assert rows == more
    assert not same(first, train(seed=1, objective=objective)[0])


@pytest.mark.parametrize(
    "options",
    [{"valid": HELD_OUT}, {"report_every": 1}, {"report_every": 3}, {"valid": HELD_OUT, "report_every": 1}],
)
def test_looking_at_a_run_does_not_change_it(options):
    alone, watched = train()[2], train(**options)[2]
    assert all(same(a, b) for a, b in zip(alone, watched, strict=True))


def test_a_second_fit_goes_on_from_the_first():
    program = vae()
    first = fit(program, X, epochs=2).history
    kept = weights(program)
    again = vae()
    again.load_state_dict(kept)
    assert timeless(fit(program, X, epochs=1).history) == timeless(fit(again, X, epochs=1).history)
    assert not same(weights(program), kept)
    assert fit(program, X, epochs=5).history[-1]["train"] > first[0]["train"]


# ---- what a run tells


def test_the_history_has_one_row_for_each_epoch():
    watch = Watch()
    run = fit(
        vae(), X, HELD_OUT, epochs=3, batch_size=25, hooks=[watch], optimizer=partial(torch.optim.Adam, lr=0.02)
    )
    fields = ["epoch", "step", "train", "valid", "valid_stderr", "lr", "seconds", "per_second"]
    assert [list(row) for row in run.history] == [fields] * 3
    assert [(row["epoch"], row["step"], row["lr"]) for row in run.history] == [
        (1, 3, 0.02),
        (2, 6, 0.02),
        (3, 9, 0.02),
    ]
    assert all(row["per_second"] == pytest.approx(len(X) / row["seconds"]) for row in run.history)
    assert (run.epoch, run.step, run.epochs, run.reason) == (3, 9, 3, "all epochs done")
    assert not run.interrupted
    assert run.history[-1]["train"] > run.history[0]["train"]


def test_train_is_the_mean_over_data_and_not_over_batches():
    seen = []

    class Steps(pv.Hook):
        def on_report(self, run, value, rate):
            seen.append(value)

    rows = [fit(vae(), X, epochs=1, batch_size=25, hooks=[Steps()], report_every=n).history[0] for n in (1, 2, 50)]
    *single, double, third, whole = seen
    mean = (25 * single[0] + 25 * single[1] + 14 * single[2]) / 64
    assert [row["train"] for row in rows] == pytest.approx([mean] * 3, rel=1e-6)
    assert [double, third, whole] == pytest.approx([(single[0] + single[1]) / 2, single[2], mean], rel=1e-6)


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.ELBO(kl="analytic"), pv.IWAE(4), Trace_ELBO(num_particles=2)])
def test_valid_is_the_mean_objective_of_the_held_out_data_with_its_standard_error(objective):
    program = vae()
    program.posterior.net.append(torch.nn.Dropout(0.5))  # at work in training alone
    run = fit(program, X, HELD_OUT, objective=objective, epochs=1, batch_size=64, seed=5)
    with seeded(5), torch.no_grad():
        values = as_objective(objective)(run.pair, HELD_OUT)
    row = run.history[0]
    assert row["valid"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert row["valid_stderr"] == pytest.approx(float(values.std()) / math.sqrt(len(HELD_OUT)), rel=1e-5)
    assert run.best == row["valid"]


def test_without_validation_there_is_none_and_one_datum_has_no_spread():
    run = fit(vae(), X, epochs=1)
    assert math.isnan(run.history[0]["valid"])
    assert math.isnan(run.history[0]["valid_stderr"])
    assert (run.best, run.best_epoch) == (-math.inf, None)
    row = fit(vae(), X, HELD_OUT[:1], epochs=1).history[0]
    assert math.isfinite(row["valid"])
    assert math.isnan(row["valid_stderr"])


def test_hooks_are_called_in_order_and_the_pair_is_in_the_right_mode():
    watch = Watch()
    run = fit(vae(), X, HELD_OUT, epochs=2, batch_size=16, hooks=[watch], report_every=3)
    one, two = [0, 1, 2, "report", 3, "report", "epoch"], [4, 5, 6, "report", 7, "report", "epoch"]
    assert watch.moments == ["start", *one, *two, "end"]
    assert watch.modes == {True}
    assert not run.pair.training
    assert all(rate > 0 for _, rate in watch.reports)


@pytest.mark.parametrize("kind", ["learned", "per pixel"])
def test_pixels_that_never_vary_do_not_end_a_long_run_in_nan(kind):
    x = torch.full((32, WIDTH), 0.5)
    run = fit(vae(kind), x, epochs=200, optimizer=partial(torch.optim.Adam, lr=0.05))
    assert all(math.isfinite(row["train"]) for row in run.history)
    assert run.history[-1]["train"] > run.history[0]["train"]


# ---- which weights are kept


def explode_at(epoch):
    """A rate that is a thousand times too large from some epoch on."""
    return partial(LambdaLR, lr_lambda=lambda e: 1.0 if e < epoch else 3e3)


def test_the_pair_ends_with_the_weights_of_its_best_epoch():
    watch, program = Watch(), vae()
    options = {"scheduler": explode_at(3), "optimizer": partial(torch.optim.Adam, lr=1e-3), "batch_size": 16}
    run = fit(program, X, HELD_OUT, epochs=5, hooks=[watch], **options)
    valid = [row["valid"] for row in run.history]
    assert valid[2] == max(valid) > 10 + valid[4]
    assert (run.best_epoch, run.best) == (3, valid[2])
    assert same(weights(run.pair), watch.weights[2])
    with seeded(0), torch.no_grad():
        assert float(run.objective(run.pair, HELD_OUT).mean()) > valid[4] + 10
    # Without validation there is nothing to go by: the last weights stay.
    watch = Watch()
    fit(program := vae(), X, epochs=5, hooks=[watch], **options)
    assert same(weights(as_pair(program)), watch.weights[4])


def test_of_equally_good_epochs_the_last_is_kept():
    run = fit(vae(), X, HELD_OUT, epochs=3, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert len({row["valid"] for row in run.history}) == 1
    assert run.best_epoch == 3


def test_early_stopping_ends_the_run_and_keeps_the_best():
    run = fit(vae(), X, HELD_OUT, epochs=50, scheduler=explode_at(3), hooks=[pv.EarlyStop(patience=2)])
    assert run.best_epoch == 3
    assert run.epoch == 5
    assert run.reason == "no rise of the validation bound in 2 epochs"


# ---- rates and clipping


def test_a_schedule_by_epochs():
    run = fit(vae(), X, epochs=4, batch_size=16, optimizer=sgd, scheduler=partial(ExponentialLR, gamma=0.5))
    assert [row["lr"] for row in run.history] == pytest.approx([1e-2 * 0.5**e for e in range(4)])


def test_a_schedule_by_steps():
    reference = OneCycleLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2), max_lr=0.1, total_steps=8
    )
    rates = []
    for _ in range(8):
        reference.optimizer.step()
        reference.step()
        rates.append(reference.get_last_lr()[0])
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=8)
    run = fit(vae(), X, epochs=2, batch_size=16, optimizer=sgd, scheduler=schedule, scheduler_every="step")
    assert [row["lr"] for row in run.history] == pytest.approx([rates[3], rates[7]])


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_a_plateau_lowers_the_rate_only_when_the_objective_does_not_rise(mode, valid):
    plateau = partial(ReduceLROnPlateau, mode=mode, factor=0.1, patience=0)
    rising = fit(vae(), X, valid, epochs=4, batch_size=16, optimizer=sgd, scheduler=plateau)
    values = [row["train" if valid is None else "valid"] for row in rising.history]
    assert values == sorted(values)
    assert [row["lr"] for row in rising.history] == [1e-2] * 4
    # With steps the other way it falls, each epoch; the first sets the level.
    downhill = partial(torch.optim.SGD, lr=1e-4, maximize=True)
    calm = pv.ELBO(20, kl="analytic")
    falling = fit(vae(), X, valid, epochs=4, batch_size=16, optimizer=downhill, scheduler=plateau, objective=calm)
    assert [row["lr"] for row in falling.history] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6])


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_limits_the_norm_of_the_gradient_and_keeps_its_direction(limit):
    moves = {}
    for clip in (None, limit):
        program = vae()
        before = torch.nn.utils.parameters_to_vector(program.parameters()).detach()
        fit(program, X, epochs=1, batch_size=len(X), optimizer=partial(torch.optim.SGD, lr=1.0), clip_norm=clip)
        moves[clip] = torch.nn.utils.parameters_to_vector(program.parameters()).detach() - before
    free = moves[None].norm()
    assert 1e-3 < free < 1e3
    torch.testing.assert_close(moves[limit].norm(), torch.tensor(min(limit, float(free))), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(moves[None], moves[limit], dim=0), torch.tensor(1.0))


# ---- parameters


class Bare(torch.nn.Module):
    """A program with a bare `pyro.param`, and a parameter that is frozen."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Linear(1, WIDTH).requires_grad_(False)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.frozen(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc * x[..., :1], 1.0).to_event(1))


def test_bare_parameters_are_trained_and_frozen_ones_are_not():
    program = Bare()
    kept = program.frozen.weight.clone()
    run = fit(program, X, epochs=1, optimizer=sgd)
    assert run.pair.params["loc"].detach() != 0
    assert torch.equal(program.frozen.weight, kept)


# ---- steps that never wait for the device


class NoReading(TorchDispatchMode):
    """Refuse what brings a number from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_watch_for_readings_sees_them():
    x = torch.ones(2)
    for read in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="waits for the device"), NoReading():
            read()


@pytest.mark.parametrize("program", [*(partial(vae, k) for k in LIKELIHOODS), cvae, partial(cvae, "vector")])
@pytest.mark.parametrize(
    "objective", [pv.ELBO(), pv.ELBO(3, kl="analytic", beta=0.5), pv.IWAE(3), Trace_ELBO(), TraceMeanField_ELBO()]
)
@pytest.mark.parametrize("way", ["sgd, clipped", "adam", "without numbers"])
def test_nothing_in_a_step_waits_for_the_device(program, objective, way):
    kind = program.args[0] if isinstance(program, partial) else "label"
    x = pixels(kind=kind)
    pair = as_pair(program := program())
    data = (x, conditions(x, kind)) if isinstance(program, pv.CVAE) else (x,)
    (batch,) = prepare(pair, data, len(x)).batches(len(x))
    goal = copy.deepcopy(as_objective(objective))
    if way == "without numbers":  # tensors of the meta device have shapes alone: there is nothing to read
        pair.to("meta"), goal.to("meta")
        batch = tuple(t.to("meta") for t in batch)
    before = weights(pair)
    optimizer = (adam if way == "adam" else sgd)(pair.parameters())
    update = pv.Update("objective", pair, goal, optimizer, 1.0 if "clipped" in way else None)
    with seeded(0), NoReading():
        value = update(batch)
    assert value.shape == ()
    assert not value.requires_grad
    if way != "without numbers":
        assert value.isfinite()
        assert not same(weights(pair), before)


# ---- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"report_every": 0}, "report_every must be at least 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0"),
        ({"clip_norm": math.nan}, "clip_norm must be positive, got nan"),
        ({"scheduler_every": "batch"}, "scheduler_every must be 'epoch' or 'step', got 'batch'"),
        ({"scheduler_every": "step", "scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau watches a whole epoch"),
        ({"objective": "elbo"}, "objective: expected .* got str"),
        ({"optimizer": "adam"}, "optimizer: expected a function from parameters to a torch optimizer, .* got str"),
        ({"optimizer": torch.optim.SGD(vae().parameters(), lr=1.0)}, "optimizer: expected a function .* got SGD"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "optimizer: expected a function .* got PyroOptim"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: LBFGS evaluates the loss several times"),
        ({"epochs": 2.5}, "epochs must be at least 1, got 2.5"),
        ({"hooks": [pv.EarlyStop]}, "hooks: expected instances of Hook, got <class"),
        ({"device": "warp"}, "device: 'warp' is not to be had here"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not to be had here"),
        ({"hooks": [pv.EarlyStop()]}, "needs valid data to watch"),
    ],
)
def test_bad_settings_are_refused(options, message):
    program = vae()
    before = weights(program)
    with pytest.raises(ValueError, match=message):
        pv.fit(program, X, progress=False, **({"device": "cpu"} | options))
    assert same(weights(program), before)


@pytest.mark.parametrize("program", [object(), pv.MLP(2, 2), None])
def test_what_is_no_program(program):
    with pytest.raises(ValueError, match="program: expected an object with a model and a guide"):
        fit(program, X)


def test_a_program_without_parameters():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))

    with pytest.raises(ValueError, match="program: it has no parameters to train"):
        fit(pv.Pair(model, guide), X)


def test_the_device_is_cuda_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert default_device().type == expected
    assert as_device().type == expected
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")


def test_the_error_of_validation_without_values_per_datum_is_over_batches():
    """One value repeated over a batch is one observation, not as many as there are rows."""
    program, batches = vae(), [pixels(16, seed=s) for s in range(8)]
    run = fit(program, batches, batches, objective=pyro.infer.TraceGraph_ELBO(), epochs=1)
    alone = fit(vae(), batches, batches, objective=pyro.infer.Trace_ELBO(), epochs=1)
    row, exact = run.history[-1], alone.history[-1]
    assert row["valid"] == pytest.approx(exact["valid"], rel=1e-5)  # the same draws
    # 8 batches: the sample deviation has a relative error of about 1 / sqrt(2 * 7).
    assert row["valid_stderr"] == pytest.approx(exact["valid_stderr"], rel=4 / math.sqrt(14))
    assert row["valid_stderr"] > exact["valid_stderr"] / 2
