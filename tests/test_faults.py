"""Numbers gone wrong: runs stop, skip or go back, are resumed alike, and tell of it."""

import csv
import json
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from faulty import (
    BAD,
    HELD_OUT,
    MARKED,
    SGD,
    Marked,
    Plain,
    Watch,
    X,
    fitted,
    line,
    marked_vae,
    state,
    step_of,
)
from kills import ADAM, EPOCH, Cut, CutAt
from pyro.infer import Trace_ELBO
from small import LATENT, WIDTH, same, vae, weights
from test_packing import identical
from test_ranks import run as run_ranks
from torch import distributed, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae import steps
from ppl_vae.cli import main
from ppl_vae.faults import load_fault, smaller_step
from ppl_vae.folders import load_run
from ppl_vae.objectives import Objective, Part
from ppl_vae.packing import pack, unpack
from ppl_vae.pairs import as_pair
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded
from ppl_vae.updates import all_finite


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


class Drawn:
    """Batches from an iterable of the user's, of which nothing is known."""

    def __iter__(self):
        return iter([MARKED[:16], MARKED[16:32]])


def drawn():
    return Drawn()


@pytest.mark.parametrize(
    ("policy", "data", "told"),
    [
        ("stop", drawn, True),
        ("skip", drawn, False),
        ("stop", loader, False),
        ("stop", lambda: [*Drawn()], False),
    ],
)
def test_a_batch_that_an_iterable_gave_again_need_not_be_the_same_and_that_is_told(policy, data, told):
    try:
        run = fitted(policy, marked_vae(), data(), epochs=1)
    except pv.NonFiniteError as error:
        run = error.run
    (fault,) = run.faults
    assert fault.cause.endswith(", if the data's iterable gave the same again") is told
    assert fault.datum is not None


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
        fitted(policy, marked_vae(), X, held_out, most=5, folder=tmp_path / "faults")
    run = caught.value.run
    actions = ["went back", "stopped"] if policy == "back" else ["stopped"]
    assert run.faults[-1].cause.endswith(" (going back did not help)") is (policy == "back")
    assert [(f.site, f.datum, f.action) for f in run.faults] == [("z", 7, action) for action in actions]
    assert load_fault(run.faults[0].file).batch[0].equal(held_out)
    assert run.history == []


class Edge(Plain):
    """Infinite on a marked datum; `value` may be changed while it trains."""

    def __init__(self, value):
        super().__init__("nothing")
        self.value = value

    def forward(self, pair, x):
        return super().forward(pair, x).masked_fill(x[:, 0] > 100, self.value)


def marked_held_out():
    held_out = HELD_OUT.clone()
    held_out[7, 0] = 1000.0
    return held_out


def test_a_validation_objective_that_is_inf_is_never_taken_for_the_best():
    with pytest.raises(pv.NonFiniteError, match="validation objective became inf after step 3") as caught:
        fitted("stop", vae(), X, marked_held_out(), objective=Edge(torch.inf))
    (fault,) = caught.value.run.faults
    assert fault.datum == 7
    assert "the objective of datum 7 is inf" in fault.cause
    assert caught.value.run.best_epoch is None


def test_an_epoch_whose_validation_objective_is_minus_inf_is_no_fault_and_never_the_best():
    class Change(pv.Hook):
        def __init__(self, values):
            self.values = values

        def on_epoch(self, run):
            goal.value = self.values[run.epoch - 1]

    for values, best in (([-torch.inf] * 3, None), ([-5.0, -torch.inf, 0.0], 2), ([-torch.inf, -5.0, 0.0], 3)):
        goal = Edge(-torch.inf)
        run = fitted("stop", vae(), X, marked_held_out(), objective=goal, hooks=[Change(values)])
        assert run.faults == []
        assert run.history[0]["valid"] == -torch.inf
        assert run.best_epoch == best
        assert run.reason == "all epochs done"


def test_going_back_ends_where_the_same_datum_is_to_blame_again():
    with pytest.raises(pv.NonFiniteError, match=r"\(going back did not help\)") as caught:
        fitted("back", marked_vae(), MARKED, report_every=1)
    run = caught.value.run
    assert [(f.step, f.datum, f.action) for f in run.faults] == [
        (step_of(BAD), BAD, "went back"),
        (step_of(BAD), BAD, "stopped"),
    ]


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
    assert [action for *_, action in told["back"]] == ["went back", "stopped"]
    assert [(datum, site, action) for _, datum, site, action in told["stop"]] == [(9, "z", "stopped")]
    for policy in found[0]:
        saved = [load_fault(path) for path in found[0][policy]["files"]]
        assert len(saved) == len(told[policy])
        for one in saved:
            assert one.batch[0][one.rows == 9, 0].tolist() == [1000.0]
            assert len(one.rows) <= 10 // count + 1


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
def test_a_process_that_fails_on_parameters_gone_wrong_ends_all_of_them_alike(tmp_path):
    first, second = run_ranks(tmp_path, 2, ["gone"])["gone"]
    assert identical(first, second)
    assert len(first) == 6
    for name, (message, parameters) in first.items():
        at = "step 5 made a parameter NaN or infinite" if "skip" in name else "the objective became nan at step 4"
        assert at in message, name
        assert "holds its last good parameters" in message
        assert all(value.isfinite().all() for value in parameters.values())


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
def test_of_a_stream_the_process_is_named_and_a_file_that_was_not_saved_is_so_in_all(tmp_path):
    first, second = run_ranks(tmp_path, 2, ["streamed"])["streamed"]
    assert first == second
    (where, cause, rank, file), *_ = first
    assert (where, rank, file) == ("site 'z', datum 3, batch 1, process 1", 1, None)
    assert "datum 3 of batch 1 of process 1" in cause


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
