"""Numbers gone wrong: site and datum are found, batch and state saved, and runs stop, skip or go back."""

import csv
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from kills import ADAM, EPOCH, TIMES, Cut, CutAt, comparable
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from small import LATENT, WIDTH, fit, pixels, same, vae, weights
from test_packing import identical
from test_ranks import run as run_ranks
from torch import distributed, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae import steps
from ppl_vae.alternating import RWS
from ppl_vae.cli import main
from ppl_vae.diagnosis import diagnose
from ppl_vae.faults import SAVED, Faults, load_fault, smaller_step
from ppl_vae.folders import load_run
from ppl_vae.layout import inspect
from ppl_vae.objectives import Objective, Part, as_objective
from ppl_vae.packing import DamagedError, pack, unpack
from ppl_vae.pairs import as_pair
from ppl_vae.resuming import Checkpoints, load_random
from ppl_vae.rng import seeded
from ppl_vae.updates import Update, all_finite

BAD = 20  # the datum on which numbers go wrong
X, HELD_OUT = pixels(40), pixels(12, seed=1)
MARKED = X.clone()
MARKED[BAD, 0] = 1000.0
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


def state(run):
    """All that a run ends with, but for times and files."""
    return {
        "pair": dict(run.pair.state_dict()),
        "objective": dict(run.objective.state_dict()),
        "optimizers": [update.optimizer.state_dict() for update in run.updates],
        "schedules": [comparable(schedule.state_dict()) for schedule in run.schedules],
        "history": [{name: value for name, value in row.items() if name not in TIMES} for row in run.history],
        "about": [run.epoch, run.step, run.best_epoch, run.reason],
        "faults": [str(replace(fault, file=None)) for fault in run.faults],
    }


def fitted(policy, program, data, valid=None, *, folder=None, most=10, **settings):
    settings = {"epochs": 3, "batch_size": 16, "seed": 3, "compile": "off", "optimizer": ADAM} | settings
    return fit(program, data, valid, faults=Faults(policy, most=most, folder=folder), **settings)


def step_of(row, epoch=0, seed=3):
    """The step of an epoch that meets a row, from 1."""
    batches = pv.Data(X).rows(16, seed, epoch)
    return next(i for i, rows in enumerate(batches, 1) if row in rows)


class Plain(Objective):
    """How well the decoder at z = 0 meets x: no draws, so that a batch left out leaves no trace.

    On a marked datum the value, or the gradient, is not finite.
    """

    def __init__(self, wrong="value"):
        super().__init__()
        self.wrong = wrong

    def forward(self, pair, x):
        found = pair.program.likelihood.net(x.new_zeros(len(x), LATENT))
        fit = -((found - x.clamp(max=1)) ** 2).sum(1)
        marked = x[:, 0] > 100
        if self.wrong == "value":
            return fit + (-marked.float()).sqrt() * found[:, 0]
        root = (found[:, 0] * (~marked).float()).abs().sqrt()  # 0 on a marked datum, with a slope of 0 / 0
        return fit + 0.1 * root


class Marked(nn.Module):
    """A conditional whose scale is NaN where the first entry of its context is large."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.at = inner, at

    def forward(self, *context):
        found = self.inner(*context)
        wrong = context[self.at][..., :1] > 100
        scale = found.base_dist.scale.masked_fill(wrong, torch.nan)
        return dist.Normal(found.base_dist.loc, scale).to_event(1)


def marked_vae():
    """A VAE whose posterior is not defined at a marked datum."""
    program = vae()
    program.posterior = Marked(program.posterior, 0)
    return program


# ---- what is found
def updates_of(pair, objective):
    goal = as_objective(objective)
    parameters = [p for p in pair.parameters() if p.requires_grad]
    return [Update("objective", pair, goal, torch.optim.SGD([*parameters, *goal.parameters()], lr=0.1))]


def found_in(program, objective, *batch):
    pair = as_pair(program)
    inspect(pair, tuple(torch.ones_like(c) for c in batch))
    return diagnose(pair, updates_of(pair, objective), batch)


class Scaled(nn.Module):
    """Scaled by hand, with a latent outside the data plate, or an enumerated one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.loc, self.mean = kind, nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("scaled", self)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.kind == "outside" else 0.0
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.scale(scale=0.5):
            if self.kind == "enumerated":
                shift = pyro.sample("shift", dist.Categorical(torch.ones(3))).float()
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            scale = torch.where(x > 100, torch.nan, torch.ones_like(x))
            pyro.sample("x", dist.Normal(z + shift, scale), obs=x)

    def guide(self, x):
        pyro.module("scaled", self)
        if self.kind == "outside":
            pyro.sample("shift", dist.Normal(self.mean, 1.0))
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(self.mean, 1.0))


@pytest.mark.parametrize("kind", ["scaled", "outside", "enumerated"])
def test_site_and_datum_are_found_in_programs_without_a_table(kind):
    loss = TraceEnum_ELBO(max_plate_nesting=1) if kind == "enumerated" else Trace_ELBO()
    program = Scaled(kind)
    if kind == "enumerated":
        program = pv.Pair(config_enumerate(program.model), program.guide)
    x = torch.zeros(8)
    assert found_in(program, loss, x) is None
    x[5] = 1000.0
    found = found_in(program, loss, x)
    assert (found.site, found.row) == ("x", 5)
    assert found.what == "site 'x' (likelihood): the log-density of {datum} is nan"


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(3), Trace_ELBO(), RWS(3)], ids=str)
def test_the_site_comes_first_that_is_drawn_first(objective):
    found = found_in(marked_vae(), objective, MARKED)
    assert (found.site, found.row) == ("z", BAD)
    assert "(posterior)" in found.what


def test_of_several_wrong_data_the_first_is_named_and_the_others_are_counted():
    x = MARKED.clone()
    x[30:32] = 1000.0
    found = found_in(marked_vae(), pv.ELBO(), x)
    assert found.row == BAD
    assert "of {datum}, and of 2 more of its batch is nan" in found.what


def test_parameters_that_are_wrong_for_every_datum_are_no_datums_fault():
    program = vae()
    with torch.no_grad():
        program.likelihood.net[-1].bias.fill_(1e30)
    found = found_in(program, pv.ELBO(), X)
    assert (found.site, found.row) == ("x", None)
    assert "of every datum of the batch is -inf: too large a step" in found.what


def test_a_parameter_or_an_entry_that_is_not_finite_is_named():
    program = vae()
    x = X.clone()
    x[7, 3] = torch.inf
    found = found_in(program, pv.ELBO(), x)
    assert (found.what, found.site, found.row) == ("tensor 0 of {datum} holds NaN or infinity", "x", 7)
    with torch.no_grad():
        program.posterior.net[0].weight[0, 0] = torch.nan
    assert found_in(program, pv.ELBO(), X).what == "parameter 'posterior.net.0.weight' holds NaN or infinity"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("value", "the objective of {datum} is nan, though its densities are finite"),
        ("slope", r"the gradient of 'likelihood.net.0.weight' at {datum} is not finite, though the objective is"),
    ],
)
def test_an_objective_or_a_gradient_alone_is_traced_to_its_datum(wrong, text):
    program = vae()
    before, random = weights(program), torch.get_rng_state()
    found = found_in(program, Plain(wrong), MARKED)
    assert (found.what, found.site, found.row) == (text, None, BAD)
    assert found_in(program, Plain(wrong), X) is None
    assert same(weights(program), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_datum_is_found_though_batch_normalisation_spreads_it_and_statistics_stay():
    with seeded(0):
        program = vae()
        program.likelihood.net = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8), nn.Linear(8, WIDTH))
        program.likelihood.net[1].weight.data.fill_(1.0)
    program.likelihood = Marked(program.likelihood, 0)
    program.train()
    program.posterior = Far(program.posterior)
    before = weights(program)
    found = found_in(program, Trace_ELBO(), MARKED)
    assert (found.site, found.row) == ("x", BAD)
    assert same(weights(program), before)


class Far(nn.Module):
    """A posterior that puts a marked datum far away."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        found = self.inner(x.clamp(max=1)).base_dist
        return dist.Normal(found.loc + 1e4 * (x[:, :1] > 100), found.scale).to_event(1)


def test_a_program_that_fails_on_wrong_numbers_is_quoted():
    class Fails(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if bool((x > 100).any()):
                    raise RuntimeError("probabilities are not finite\nmore")
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    found = found_in(Fails(), Trace_ELBO(), torch.full((3,), 1000.0))
    assert found.what == "the program cannot be run on the batch (RuntimeError: probabilities are not finite)"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_numbers_are_finite_though_their_sum_is_not(value, dtype):
    large = torch.full((4, 3), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, torch.ones(2)])
    large[2, 1] = value
    assert not all_finite([torch.ones(2), large])


# ---- stopping
def test_a_gradient_that_went_wrong_is_traced_back_to_the_step_before_the_value_did():
    with pytest.raises(pv.NonFiniteError) as caught:
        fitted("stop", vae(), MARKED, objective=Plain("slope"))
    (fault,) = caught.value.run.faults
    step = step_of(BAD)
    assert (fault.epoch, fault.step, fault.datum, fault.site) == (1, step, BAD, None)
    assert f"at datum {BAD} is not finite, though the objective is" in fault.cause
    if step < EPOCH:
        assert f"the objective became nan at step {step + 1}" in fault.what
        assert fault.cause.endswith(f", at step {step}")


def loader():
    return DataLoader(TensorDataset(MARKED), batch_size=16, shuffle=True)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("data", "batch", "row"),
    [
        (lambda: [MARKED[:16], MARKED[16:32], MARKED[32:]], 1, BAD - 16),
        (lambda: TensorDataset(MARKED), None, None),
        (loader, None, None),
    ],
    ids=["batches", "dataset", "shuffled loader"],
)
def test_of_a_stream_batch_and_row_are_named(policy, data, batch, row, tmp_path):
    try:
        run = fitted(policy, marked_vae(), data(), folder=tmp_path / "faults", epochs=1, report_every=2)
    except pv.NonFiniteError as error:
        run = error.run
    (fault,) = run.faults
    assert f"of datum {fault.datum} of batch {fault.batch} is nan" in fault.cause
    assert batch in (None, fault.batch)
    assert row in (None, fault.datum)
    saved = load_fault(fault.file)
    assert saved.batch[0][fault.datum, 0] == 1000
    assert saved.rows is None
    assert fault.step == fault.batch + 1


@pytest.mark.parametrize("policy", ["stop", "skip", "back"])
def test_nan_in_a_stream_is_refused_under_every_policy(policy):
    with pytest.raises(ValueError, match=r"batch 1.*row 0 holds NaN or infinity"):
        fitted(policy, vae(), [X[:16], X[16:] * torch.nan])


def test_nothing_is_looked_at_between_readings_unless_batches_are_skipped(monkeypatch):
    looked = []
    monkeypatch.setattr(steps, "all_finite", lambda tensors: looked.append(len(tensors)) or all_finite(tensors))
    for policy, times in (("stop", 0), ("back", 0), ("skip", 3 * EPOCH)):
        fitted(policy, vae(), X)
        assert len(looked) == times


def test_a_step_that_fails_on_parameters_gone_wrong_is_told_as_that():
    class Counted(nn.Module):
        """Draws categories, which torch refuses to do from NaN."""

        def __init__(self):
            super().__init__()
            self.logits, self.loc = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def model(self, x):
            pyro.module("counted", self)
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
                pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

        def guide(self, x):
            pyro.module("counted", self)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", dist.Categorical(logits=self.logits.expand(len(x), 3)))

    rates = {"scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda s: 1.0 if s < 2 else torch.inf)}
    with pytest.raises(pv.NonFiniteError, match=r"a parameter became NaN or infinite before step 4, which failed"):
        fitted("stop", Counted(), X[:, 0], objective=Trace_ELBO(), **rates, scheduler_every="step", batch_size=8)


# ---- skipping
@pytest.mark.parametrize("wrong", ["value", "slope"])
@pytest.mark.parametrize("optimizer", [ADAM, SGD, torch.optim.RMSprop], ids=["Adam", "SGD", "RMSprop"])
def test_a_skipped_batch_leaves_no_trace(wrong, optimizer):
    bad, good = [MARKED[:16], MARKED[16:32], MARKED[32:]], [MARKED[:16], MARKED[32:]]
    skipped = fitted("skip", vae(), bad, objective=Plain(wrong), optimizer=optimizer)
    without = fitted("stop", vae(), good, objective=Plain(wrong), optimizer=optimizer)
    assert identical(state(skipped)["pair"], state(without)["pair"])
    assert identical(state(skipped)["optimizers"], state(without)["optimizers"])
    assert [row["train"] for row in skipped.history] == [row["train"] for row in without.history]
    assert [row["step"] for row in skipped.history] == [3, 6, 9]
    assert [(f.epoch, f.step, f.datum, f.batch) for f in skipped.faults] == [
        (1, 2, BAD - 16, 1),
        (2, 5, BAD - 16, 1),
        (3, 8, BAD - 16, 1),
    ]
    assert skipped.trouble == "3 batches skipped, first at step 2: datum 4, batch 1"


@pytest.mark.parametrize("wrong", ["value", "slope"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_captured_steps_are_skipped_alike(wrong, clip_norm, interpreted):
    settings = {"objective": Plain(wrong), "clip_norm": clip_norm}
    eager = fitted("skip", vae(), MARKED, **settings)
    captured = fitted("skip", vae(), MARKED, compile="require", **settings)
    assert [f.step for f in captured.faults] == [step_of(BAD, e) + EPOCH * e for e in range(3)]
    assert [str(f) for f in captured.faults] == [str(f) for f in eager.faults]
    for name, value in weights(eager.pair).items():
        torch.testing.assert_close(weights(captured.pair)[name], value)
    assert interpreted


class Watch(pv.Hook):
    """Everything that a step may change, before each of them."""

    def __init__(self):
        self.seen = []

    def on_step(self, run):
        optimizers = [update.optimizer.state_dict()["state"] for update in run.updates]
        self.seen.append((weights(run.pair), json.dumps(optimizers, default=lambda t: t.tolist())))


def test_running_statistics_and_codebooks_of_a_skipped_batch_stay():
    with seeded(0):
        program = vae()
        encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2 * LATENT))
        program.posterior = Marked(pv.mean_field(encoder), 0)
    watch = Watch()
    run = fitted("skip", program, MARKED, hooks=[watch])
    assert len(run.faults) == 3
    for fault in run.faults:
        assert fault.site == "z"
        assert identical(*watch.seen[fault.step - 1 : fault.step + 1]) or fault.step == len(watch.seen)
    others = {f.step for f in run.faults}
    moved = [s for s in range(1, 9) if not identical(*watch.seen[s - 1 : s + 1])]
    assert moved == [s for s in range(1, 9) if s not in others]


def test_of_several_steps_those_before_the_wrong_one_are_taken():
    class Second(Objective):
        """A step of another net, whose value is NaN on a marked datum."""

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(WIDTH, 1)

        def forward(self, pair, x):
            return -self.net(x)[:, 0].square() + (-(x[:, 0] > 100).float()).sqrt()

    class Both(Plain):
        def __init__(self):
            super().__init__(wrong="nothing")
            self.second = Second()

        def parts(self):
            second = Part("the second objective", self.second, (self.second,), partial(torch.optim.SGD, lr=1e-9))
            return Part("objective", self, ("model", "guide")), second

        def forward(self, pair, x):
            return super().forward(pair, x.clamp(max=1))

    watch, goal = Watch(), Both()
    run = fitted("skip", vae(), MARKED, objective=goal, hooks=[watch], epochs=2)
    first, second = (step_of(BAD, e) + EPOCH * e for e in range(2))
    assert [fault.step for fault in run.faults] == [first, second]
    assert "the second objective became nan at step" in run.faults[0].what
    assert f"the second objective of datum {BAD} is nan" in run.faults[0].cause
    assert not same(watch.seen[first - 1][0], watch.seen[first][0])
    assert goal.second.net.weight.isfinite().all()
    assert [row["train"] == row["train"] for row in run.history] == [True, True]


def test_a_first_step_that_is_skipped_warns_of_no_order_of_schedulers():
    rates = partial(lr_scheduler.ExponentialLR, gamma=0.9)
    batches = [MARKED[16:32], X[:16]]
    run = fitted("skip", vae(), batches, objective=Plain(), scheduler=rates, scheduler_every="step", epochs=1)
    assert [f.step for f in run.faults] == [1]
    assert run.history[0]["lr"] == pytest.approx(1e-2 * 0.9**2)


def test_an_epoch_of_skipped_batches_has_no_mean():
    run = fitted("skip", vae(), [MARKED[16:32]], HELD_OUT, objective=Plain(), epochs=2)
    assert [row["train"] == row["train"] for row in run.history] == [False, False]
    assert same(weights(run.pair.program), weights(vae()))


def test_after_so_many_the_run_stops_with_its_last_good_parameters():
    with pytest.raises(pv.NonFiniteError, match="the objective became nan at step 6 ") as caught:
        fitted("skip", vae(), [X[:16], MARKED[16:32]] * 3, objective=Plain(), most=2, epochs=1, report_every=1)
    run = caught.value.run
    assert [(f.step, f.action) for f in run.faults] == [(2, "skipped"), (4, "skipped"), (6, "stopped")]
    assert run.trouble.startswith("2 batches skipped, stopped, first at step 2")


def test_parameters_that_a_finite_gradient_made_infinite_end_the_run():
    with pytest.raises(pv.NonFiniteError, match="holds its last good parameters") as caught:
        fitted("skip", vae(), X, optimizer=partial(torch.optim.SGD, lr=1e38), epochs=1, batch_size=40)
    assert all(value.isfinite().all() for value in weights(caught.value.run.pair).values())


# ---- going back
class Line(nn.Module):
    """A point that is drawn to the data; beyond 10 it is no number any more."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((WIDTH,), 3.0))

    def model(self, x):
        pyro.module("line", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.w + 0 * z.unsqueeze(-1) + 0 * (10.0 - self.w.abs()).sqrt()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def line(rate, policy="back", schedule=None, **more):
    """Steepest descent on a curvature of 1: beyond a rate of 2 it runs away; plain within."""
    settings = {"optimizer": partial(torch.optim.SGD, lr=rate), "epochs": 6, "report_every": 2} | more
    schedule = None if schedule is None else partial(schedule, rate)
    return fitted(policy, Line(), X, settings.pop("valid", None), scheduler=schedule, **settings)


SCHEDULES = {
    "none": None,
    "cosine": lambda rate, o: lr_scheduler.CosineAnnealingLR(o, 6),
    "steps": lambda rate, o: lr_scheduler.StepLR(o, 2, 0.9),
    "function": lambda rate, o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e / 10)),
    "milestones": lambda rate, o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "cyclic": lambda rate, o: lr_scheduler.CyclicLR(o, rate, 1.1 * rate, 2, cycle_momentum=False),
    "one cycle": lambda rate, o: lr_scheduler.OneCycleLR(
        o, 1.1 * rate, total_steps=6, div_factor=1.1, cycle_momentum=False
    ),
    "chained": lambda rate, o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.9, 2), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "sequence": lambda rate, o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.9, 2), lr_scheduler.CosineAnnealingLR(o, 6)], [3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gone_back_with_half_the_rate_is_as_if_that_had_been_asked_for(schedule, tmp_path):
    """A rate that is too large from the start, so that half of it has been there all along."""
    make = SCHEDULES[schedule]
    gone, asked = tmp_path / "gone.csv", tmp_path / "asked.csv"
    back = line(3.0, schedule=make, hooks=[pv.LogCSV(gone), pv.EarlyStop(9)], valid=HELD_OUT)
    once = line(1.5, "stop", schedule=make, hooks=[pv.LogCSV(asked), pv.EarlyStop(9)], valid=HELD_OUT)
    (fault,) = back.faults
    assert (fault.epoch, fault.action) == (1, "went back")
    assert back.trouble.startswith("gone back once, first at step")
    for name in ("pair", "optimizers", "schedules", "history", "about"):
        assert identical(state(back)[name], state(once)[name]), name
    rows = [list(csv.DictReader(path.read_text().splitlines())) for path in (gone, asked)]
    assert [row["train"] for row in rows[0]] == [row["train"] for row in rows[1]]
    assert [row["epoch"] for row in rows[0]] == [str(n) for n in range(1, 7)]


def test_it_goes_back_as_often_as_it_takes_and_no_more_often_than_allowed():
    run = line(12.0)  # 12, 6, 3: all too large
    assert [fault.action for fault in run.faults] == ["went back"] * 3
    assert run.history[-1]["lr"] == 1.5
    assert run.trouble.startswith("gone back 3 times, first at step 2")
    with pytest.raises(pv.NonFiniteError) as caught:
        line(12.0, most=2)
    assert [fault.action for fault in caught.value.run.faults] == ["went back", "went back", "stopped"]
    assert all(value.isfinite().all() for value in weights(caught.value.run.pair).values())


def raised(policy="back", **more):
    """A VAE that draws, with momentum and running statistics; its rate is too large from the third epoch on."""
    with seeded(0):
        program = vae()
        encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2 * LATENT))
        program.posterior = pv.mean_field(encoder)
    hooks = [RaiseAt(2 * EPOCH, 1e20), *more.pop("hooks", ())]
    goal = pv.ELBO()
    hooks.append(pv.Anneal(goal.beta, pv.linear(0.0, 1.0, 12)))
    return fitted(policy, program, X, HELD_OUT, objective=goal, hooks=hooks, optimizer=SGD, epochs=5, **more)


class RaiseAt(pv.Hook):
    """Raise the learning rate at one step, unless it was halved before."""

    def __init__(self, step, factor):
        self.step, self.factor = step, factor

    def on_step(self, run):
        group = run.updates[0].optimizer.param_groups[0]
        if run.step == self.step and group["lr"] == 1e-3:
            group["lr"] *= self.factor


def test_it_goes_on_with_the_state_and_the_draws_of_the_start_of_the_epoch(tmp_path):
    back = raised()
    assert [(fault.epoch, fault.action) for fault in back.faults] == [(3, "went back")]
    folder = tmp_path / "kept"
    with pytest.raises(Cut):
        raised("stop", checkpoints=Checkpoints(folder), hooks=[CutAt(2 * EPOCH)])
    path = Checkpoints(folder).found()[-1]
    held = unpack(path, "checkpoint")
    held["optimizers"][0]["param_groups"][0]["lr"] = 0.5e-3
    pack(path, "checkpoint", held)
    by_hand = raised("stop", checkpoints=Checkpoints(folder, "last"), hooks=[CutAt(-1)])
    for name in ("pair", "objective", "optimizers", "history", "about"):
        assert identical(state(back)[name], state(by_hand)[name]), name


def test_captured_runs_go_back_as_well(interpreted):
    eager, captured = line(3.0), line(3.0, compile="require")
    assert len(captured.faults) == 1
    torch.testing.assert_close(captured.pair.state_dict(), eager.pair.state_dict())
    assert interpreted


@pytest.mark.parametrize("policy", ["stop", "skip", "back"])
def test_a_validation_objective_that_is_nan_ends_the_run_or_goes_back(policy, tmp_path):
    """The held-out datum is wrong whatever the parameters are: every epoch comes to the same."""
    held_out = HELD_OUT.clone()
    held_out[7, 0] = 1000.0
    with pytest.raises(pv.NonFiniteError, match="validation objective became nan after step 3") as caught:
        fitted(policy, marked_vae(), X, held_out, most=2, folder=tmp_path / "faults")
    run = caught.value.run
    actions = ["went back", "went back", "stopped"] if policy == "back" else ["stopped"]
    assert [(f.site, f.datum, f.action) for f in run.faults] == [("z", 7, action) for action in actions]
    assert load_fault(run.faults[0].file).batch[0].equal(held_out)
    assert run.history == []


def test_a_smaller_step_halves_the_rates_of_all_groups_and_updates():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": torch.tensor(0.4)}, {"params": [], "lr": 0.2}]
    first, second = torch.optim.SGD(groups, lr=1.0), torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=0.1)

    run = SimpleNamespace(updates=[SimpleNamespace(optimizer=o) for o in (first, second)], schedules=[])
    smaller_step(run)
    rates = [float(group["lr"]) for o in (first, second) for group in o.param_groups]
    assert rates == pytest.approx([0.2, 0.1, 0.05])


# ---- resuming
def run_of(policy, folder=None, resume="off", at=None, **more):
    hooks = [] if at is None else [CutAt(at)]
    kept = None if folder is None else Checkpoints(folder, resume)
    if policy == "skip":
        return fitted("skip", marked_vae(), MARKED, HELD_OUT, checkpoints=kept, hooks=hooks, epochs=4, **more)
    return raised(checkpoints=kept, hooks=[CutAt(-1 if at is None else at)], **more)


@pytest.mark.parametrize("policy", ["skip", "back"])
def test_a_run_that_was_cut_off_counts_and_ends_as_one_that_never_was(policy, tmp_path):
    whole = run_of(policy)
    assert len(whole.faults) == {"skip": 4, "back": 1}[policy]
    for at in (2 * EPOCH, 3 * EPOCH + 1):
        with pytest.raises(Cut):
            run_of(policy, tmp_path / "kept", "auto", at)
    resumed = run_of(policy, tmp_path / "kept", "last")
    assert identical(state(resumed), state(whole))


# ---- files
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_file_shows_the_fault_again(policy, tmp_path):
    watch = Watch()
    with pytest.raises(pv.NonFiniteError, match=r"Batch and state are in .*step-00000\d.safetensors") as caught:
        fitted(policy, marked_vae(), MARKED, most=1, folder=tmp_path / "faults", hooks=[watch], report_every=1)
    fault = caught.value.run.faults[0]
    saved = load_fault(fault.file)
    assert fault.file == str(tmp_path / "faults" / f"step-{fault.step:06d}.safetensors")
    assert saved.fault == fault
    assert saved.rows.tolist() == [*pv.Data(X).rows(16, 3, 0)][fault.step - 1].tolist()
    assert torch.equal(saved.batch[0], MARKED[saved.rows])
    assert same(saved.weights, watch.seen[saved.weights_step][0])
    assert saved.weights_step in ([fault.step - 1] if policy == "skip" else [fault.step - 2, fault.step - 1])
    pair = as_pair(marked_vae())
    pair.load_state_dict(saved.weights)
    terms = pv.log_terms(pair, *saved.batch)
    wrong = ~terms.posterior.isfinite()[0]
    assert saved.rows[wrong].tolist() == [BAD] == [fault.datum]


def test_what_only_some_draws_do_is_found_again_with_the_draws_that_were_saved(tmp_path):
    """A likelihood that is not defined for rare values of z, on pixels that are redrawn."""

    class Rare(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            found = self.inner(z).base_dist
            return dist.Bernoulli(logits=found.logits + 0 * (2.2 - z[..., :1]).sqrt()).to_event(1)

    program = vae("bernoulli")
    program.likelihood = Rare(program.likelihood)
    data = pv.Data(X.clamp(0, 1), transform=pv.redraw)
    run = fitted("skip", program, data, folder=tmp_path / "faults", most=50, epochs=4)
    assert run.faults
    fault = run.faults[0]
    saved = load_fault(fault.file)
    assert fault.site == "x"
    assert set(saved.batch[0].unique().tolist()) == {0.0, 1.0}
    pair = as_pair(program)
    pair.load_state_dict(saved.weights)
    with seeded(None):
        load_random(saved.random, torch.device("cpu"))
        values = pv.ELBO()(pair, *saved.batch)
    assert saved.rows[~values.isfinite()].tolist()[0] == fault.datum


def test_the_first_few_are_saved_and_all_are_listed(tmp_path):
    run = fitted("skip", vae(), [MARKED[16:32]] * 15, objective=Plain(), most=50, folder=tmp_path / "f", epochs=1)
    assert len(run.faults) == 15
    assert [fault.file is not None for fault in run.faults] == [True] * SAVED + [False] * 5
    assert len([*(tmp_path / "f").iterdir()]) == SAVED


def test_two_at_one_step_have_a_file_each(tmp_path):
    run = line(12.0, folder=tmp_path / "f")
    steps_ = [f.step for f in run.faults]
    assert len({f.file for f in run.faults}) == 3
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == sorted(
        f"step-{s:06d}{'' if steps_[:i].count(s) == 0 else f'-{steps_[:i].count(s) + 1}'}.safetensors"
        for i, s in enumerate(steps_)
    )


def test_a_file_that_cannot_be_written_is_told_and_training_goes_on(tmp_path):
    (tmp_path / "f").write_text("a file")
    with pytest.warns(UserWarning, match="faults: .* was not saved"):
        run = fitted("skip", vae(), [MARKED[16:32], X], objective=Plain(), folder=tmp_path / "f", epochs=1)
    assert [fault.file for fault in run.faults] == [None]
    assert (tmp_path / "f").read_text() == "a file"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "fault.safetensors"
    for value in ({}, [], {"fault": {"step": 1}, "batch": []}):
        pack(path, "fault", value)
        with pytest.raises(DamagedError, match="holds no fault"):
            load_fault(path)
    pack(path, "checkpoint", {})
    with pytest.raises(DamagedError, match="no fault"):
        load_fault(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_fault(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ignore"}, "policy must be 'stop', 'skip' or 'back', got 'ignore'"),
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"folder": "none/there"}, "folder: cannot make none/there"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Faults(**settings)


# ---- several processes
@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_do_alike_though_one_alone_has_the_datum(count, tmp_path):
    found = run_ranks(tmp_path, count, ["faulty"])["faulty"]
    for other in found[1:]:
        assert identical(other, found[0])
    told = {policy: found[0][policy]["told"] for policy in found[0]}
    assert [(datum, site, action) for _, datum, site, action in told["skip"]] == [(9, "z", "skipped")] * 2
    assert [action for *_, action in told["back"]] == ["went back", "went back", "stopped"]
    assert [(datum, site, action) for _, datum, site, action in told["stop"]] == [(9, "z", "stopped")]
    for policy in found[0]:
        saved = [load_fault(path) for path in found[0][policy]["files"]]
        assert len(saved) == len(told[policy])
        for one in saved:
            assert one.batch[0][one.rows == 9, 0].tolist() == [1000.0]
            assert len(one.rows) <= 10 // count + 1


# ---- CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["none", "one cycle"])
def test_on_cuda_replayed_steps_go_back_to_the_tensors_that_there_are(schedule):
    how = {"device": "cuda", "compile": "require", "schedule": SCHEDULES[schedule]}
    runs = [line(3.0, **how), line(1.5, "stop", **how)]
    assert len(runs[0].faults) == 1
    torch.testing.assert_close(runs[0].pair.state_dict(), runs[1].pair.state_dict())


@pytest.mark.gpu
def test_on_cuda_a_skipped_batch_leaves_no_trace():
    how = {"device": "cuda", "compile": "require", "objective": Plain()}
    skipped = fitted("skip", vae(), [MARKED[:16], MARKED[16:32], MARKED[32:]], **how)
    without = fitted("stop", vae(), [MARKED[:16], MARKED[32:]], **how)
    assert [fault.datum for fault in skipped.faults] == [BAD - 16] * 3
    torch.testing.assert_close(skipped.pair.state_dict(), without.pair.state_dict())


# ---- the command line
TRAIN = ["train", "--data", "digits", "--limit", "60", "--epochs", "2", "--hidden", "8", "--optimizer", "sgd"]
TRAIN += ["--no-film", "--batch-size", "10", "--compile", "off", "--quiet", "--device", "cpu"]


@pytest.mark.parametrize("policy", ["stop", "skip", "back"])
def test_a_run_folder_tells_and_holds_what_went_wrong(policy, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--learning-rate", "9e18", "--nonfinite", policy, "--out", str(out)]
    assert main([*TRAIN, *flags]) == 1
    told = capsys.readouterr().err
    assert "likely cause" in told
    assert "Batch and state are in" in told
    lines = json.loads((out / "run.json").read_text())["faults"]
    assert len(lines) == {"stop": 1, "back": 11}.get(policy, len(lines))
    assert sum("; skipped" in line for line in lines) == (len(lines) - 1 if policy == "skip" else 0)
    assert lines[-1].count("; stopped") == 1
    run = load_run(out)
    assert run.faults == tuple(lines)
    files = sorted((out / "faults").iterdir())
    assert len(files) == len(lines)
    assert load_fault(files[0]).weights.keys() == as_pair(run.program).state_dict().keys()
    assert main(["info", str(out)]) == 0
    assert f"{len(lines)} times, first epoch 1" in capsys.readouterr().out
    assert main([*TRAIN, "--force", "--epochs", "1", "--out", str(out)]) == 0
    assert not (out / "faults").exists()
    assert load_run(out).faults == ()


def test_a_run_that_went_back_and_ended_well_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TRAIN, "--learning-rate", "3", "--nonfinite", "back", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "numbers that were not finite: gone back 3 times, first at step" in told
    assert load_run(out).faults
