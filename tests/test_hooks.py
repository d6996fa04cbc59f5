"""Hooks: what they write, when they stop a run, and that annealing is a change of beta and nothing else."""

import builtins
import copy
import csv
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kills import EPOCH, EPOCHS, cut, go
from small import fit, pixels, same, vae, weights

import ppl_vae as pv
from ppl_vae.batches import Data
from ppl_vae.hooks import Hook, WholeProgram, cyclical

X, HELD_OUT = pixels(64), pixels(40, seed=1)
sgd = partial(torch.optim.SGD, lr=1e-2)


def stops_after(values, **options):
    """The epoch at which `EarlyStop` stops on these validation bounds, or None; the run it stopped."""
    hook, reasons = pv.EarlyStop(**options), []
    run = SimpleNamespace(validated=True, history=[], stop=reasons.append)
    hook.on_start(run)
    for epoch, value in enumerate(values, 1):
        run.history.append({"valid": value})
        hook.on_epoch(run)
        if reasons:
            return epoch
    return None


@pytest.mark.parametrize(
    ("values", "options", "epoch"),
    [
        ([-5, -4, -3, -2], {"patience": 1}, None),
        ([-5, -6], {"patience": 1}, 2),
        ([-5, -5], {"patience": 1}, 2),  # no rise is no rise
        ([-5, -6, -4, -6, -6], {"patience": 2}, 5),
        ([-5, -6, -5.5, -4.9, -6, -6, -6], {"patience": 3}, 7),
        ([-5, -4.9, -4.8, -4.7], {"patience": 2, "min_rise": 0.5}, 3),
        ([-5, -4.7, -4.4, -4.1, -3.8], {"patience": 2, "min_rise": 0.5}, None),  # slowly, but it rises
        ([-5, math.nan, math.nan, -1], {"patience": 2}, 3),
        ([-math.inf, -5, -6], {"patience": 2}, None),
    ],
)
def test_early_stopping_counts_epochs_without_a_rise(values, options, epoch):
    assert stops_after(values, **options) == epoch


def test_early_stopping_may_be_used_again():
    hook = pv.EarlyStop(patience=1)
    options = {"epochs": 5, "optimizer": partial(torch.optim.SGD, lr=0.0), "hooks": [hook]}
    assert [fit(vae(), X, HELD_OUT, **options).epoch for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_positive(patience):
    with pytest.raises(ValueError, match=f"patience must be at least 1, got {patience}"):
        pv.EarlyStop(patience)


def test_a_hook_may_stop_a_run():
    class Stop(Hook):
        def on_step(self, run):
            if run.step == 5:
                run.stop("enough")

    run = fit(vae(), X, epochs=9, batch_size=16, hooks=[Stop()])
    assert (run.epoch, run.step, run.reason) == (2, 8, "enough")  # after the epoch


def test_a_hook_that_overrides_nothing_does_nothing():
    plain, hooked = vae(), vae()
    fit(plain, X, epochs=1)
    fit(hooked, X, epochs=1, hooks=[Hook()])
    assert same(weights(plain), weights(hooked))


# ---- annealing


class Seen(Hook):
    """The value of a tensor after each epoch."""

    def __init__(self, target):
        self.target, self.values = target, []

    def on_epoch(self, run):
        self.values.append(float(self.target))


def test_annealing_beta_is_a_fixed_beta_at_each_step():
    program, objective = vae(), pv.ELBO(kl="analytic", beta=0.3)
    twin = copy.deepcopy(program)
    schedule = pv.linear(0.0, 2.0, steps=5)
    hook = pv.Anneal(objective.beta, schedule)
    run = fit(program, X, objective=objective, epochs=2, batch_size=16, optimizer=sgd, hooks=[hook])
    assert float(objective.beta) == 2.0
    # By hand: eight steps, each of an objective made for its beta.
    pair, optimizer, values = pv.as_pair(twin), sgd(twin.parameters()), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step, batch in enumerate(b for epoch in range(2) for b in Data(X).epoch(16, 0, epoch)):
            fixed = pv.ELBO(kl="analytic", beta=schedule(step))
            values.append(float(pv.Update("objective", pair, fixed, optimizer)(batch)))
    assert same(weights(program), weights(twin))
    assert [row["train"] for row in run.history] == pytest.approx([sum(values[:4]) / 4, sum(values[4:]) / 4])


def test_validation_keeps_to_the_objective_as_it_was_given():
    # At a rate of zero nothing changes but beta: a bound that followed it would change too.
    still = {"epochs": 3, "batch_size": 16, "optimizer": partial(torch.optim.SGD, lr=0.0)}
    plain = fit(vae(), X, HELD_OUT, objective=pv.ELBO(beta=0.7), **still)
    objective = pv.ELBO(beta=0.7)
    hooks = [pv.Anneal(objective.beta, pv.linear(0.0, 0.7, steps=20)), seen := Seen(objective.beta)]
    annealed = fit(vae(), X, HELD_OUT, objective=objective, hooks=hooks, **still)
    assert [row["valid"] for row in annealed.history] == [row["valid"] for row in plain.history]
    assert seen.values == pytest.approx([0.7 * 3 / 20, 0.7 * 7 / 20, 0.7 * 11 / 20])


def test_fit_leaves_the_annealed_tensor_in_its_place():
    objective = pv.ELBO()
    beta = objective.beta
    fit(vae(), X, objective=objective, epochs=1)
    assert objective.beta is beta


@pytest.mark.gpu
def test_annealing_reaches_the_gpu():
    ends = []
    for hooks in ([], [pv.Anneal((objective := pv.ELBO()).beta, lambda step: 0.0)]):
        program = vae()
        pv.fit(
            program,
            X,
            objective=objective if hooks else pv.ELBO(beta=0.0),
            device="cuda",
            hooks=hooks,
            progress=False,
        )
        ends.append(weights(program))
    assert same(*ends)


@pytest.mark.parametrize(
    ("start", "end", "steps", "values"),
    [
        (0.0, 1.0, 4, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (1.0, 0.2, 2, [1.0, 0.6, 0.2, 0.2]),
        (3.0, 3.0, 1, [3.0, 3.0]),
    ],
)
def test_a_linear_schedule(start, end, steps, values):
    assert [pv.linear(start, end, steps)(s) for s in range(len(values))] == pytest.approx(values)


@pytest.mark.parametrize("steps", [0, -2])
def test_a_schedule_takes_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        pv.linear(0.0, 1.0, steps)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"low": 0.0, "high": 1.0, "period": 4}, [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0]),
        ({"low": 0.0, "high": 1.0, "period": 4, "ratio": 1.0}, [0.0, 0.25, 0.5, 0.75, 0.0]),
        ({"low": 0.2, "high": 3.2, "period": 10, "ratio": 0.3}, [0.2, 1.2, 2.2, *[3.2] * 7, 0.2]),
        ({"low": 0.2, "high": 1.0, "period": 1}, [0.2, 0.2]),
    ],
)
def test_a_cyclical_schedule(options, values):
    assert [cyclical(**options)(s) for s in range(len(values))] == pytest.approx(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"period": 4, "ratio": 0.0}, "ratio must be above 0 and at most 1, got 0.0"),
        ({"period": 4, "ratio": 1.5}, "ratio must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_cycle_has_steps_and_rises_within(options, message):
    with pytest.raises(ValueError, match=message):
        cyclical(0.0, 1.0, **options)


# ---- what is written


def read(path):
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def equal(first, second):
    """Rows with the same numbers, where NaN equals NaN."""
    return [[repr(float(v)) for v in row.values()] for row in first] == [
        [repr(float(v)) for v in row.values()] for row in second
    ]


@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_the_csv_file_holds_the_history_so_far_at_any_time(valid, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("an earlier run")
    seen = []

    class Reader(Hook):
        def on_step(self, run):
            seen.append(len(read(path)) == run.epoch)

        def on_epoch(self, run):
            seen.append(equal(read(path), run.history))

    run = fit(vae(), X, valid, epochs=3, batch_size=32, hooks=[pv.LogCSV(path), Reader()])
    assert seen == [True] * 9
    assert list(read(path)[0]) == list(run.history[0])


def test_a_csv_file_that_cannot_be_written_is_refused_before_training(tmp_path):
    program = vae()
    for path in (tmp_path / "missing" / "metrics.csv", tmp_path):
        with pytest.raises(ValueError, match=f"path: cannot write {path}"):
            fit(program, X, hooks=[pv.LogCSV(path)])
    assert same(weights(program), weights(vae()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_csv_file_on_a_full_disk_is_named():
    with pytest.raises(ValueError, match=r"path: cannot write /dev/full \(No space left on device\)"):
        fit(vae(), X, epochs=1, hooks=[pv.LogCSV("/dev/full")])


def test_tensorboard_missing_is_said_clearly(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"install the extra, pip install 'ppl-vae\[tensorboard\]'"):
        pv.LogTensorBoard(tmp_path)


@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_tensorboard_gets_the_numbers_of_each_epoch(valid, monkeypatch, tmp_path):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = fit(vae(), X, valid, epochs=2, hooks=[pv.LogTensorBoard(tmp_path)])
    names = ["train", *(["valid", "valid_stderr"] if valid is not None else []), "lr", "seconds", "per_second"]
    rows = [(name, row[name], row["step"]) for row in run.history for name in names]
    assert calls == [("open", str(tmp_path), run.history[0]["step"]), *rows, ("close",)]


def test_tensorboard_itself_takes_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(vae(), X, epochs=2, hooks=[pv.LogTensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train")]
    assert [step for step, _ in logged] == [row["step"] for row in run.history]
    assert [value for _, value in logged] == pytest.approx([row["train"] for row in run.history])


@pytest.mark.parametrize("lost", [2, 4])
def test_what_a_resumed_run_lost_is_purged_from_tensorboard(lost, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cut("validated", tmp_path / "kept", at=3 * EPOCH + 1, every=lost, hooks=[pv.LogTensorBoard(tmp_path)])
    run = go("validated", tmp_path / "kept", "last", hooks=[pv.LogTensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train")] == [row["step"] for row in run.history]


# ---- the bar


def test_the_bar_of_a_resumed_run_counts_the_epochs_that_were_done(tmp_path, capfd):
    class Kept(pv.Progress):
        def on_epoch(self, run):
            super().on_epoch(run)
            begun.append(self.bar.initial)

    begun = []
    cut("validated", tmp_path, at=3 * EPOCH + 1)
    go("validated", tmp_path, "last", hooks=[Kept(disable=False)])
    assert f"{EPOCHS}/{EPOCHS}" in capfd.readouterr().err
    assert begun == [3, 3]


@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_the_bar_shows_the_bounds_in_nats(valid, capfd):
    run = fit(vae(), X, valid, epochs=2, hooks=[pv.Progress(disable=False)])
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert f"train {run.history[1]['train']:.2f} nats" in shown
    assert ("valid" in shown) == (valid is not None)
    if valid is not None:
        first = run.history[0]
        assert f"valid {first['valid']:.2f} ± {first['valid_stderr']:.2f}" in shown


def test_the_bar_is_silent_where_there_is_no_terminal(capfd):
    pv.fit(vae(), X, epochs=1, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_the_bar_closes_though_the_run_never_started():
    pv.Progress().on_end(None)


class Witness(Hook):
    """Keeps each moment with the pair that it saw."""

    def __init__(self):
        self.moments = []

    def on_start(self, run):
        self.moments.append(("start", run.pair, run.epoch))

    def on_step(self, run):
        self.moments.append(("step", run.pair, run.epoch))

    def on_report(self, run, value, rate):
        self.moments.append(("report", run.pair, run.epoch))

    def on_epoch(self, run):
        self.moments.append(("epoch", run.pair, run.epoch))

    def on_end(self, run):
        self.moments.append(("end", run.pair, run.epoch))


def test_whole_program_shows_the_whole_program_at_every_moment(tmp_path):
    prior = pv.LearnedNormal(2)
    whole = pv.VAE(prior, pv.Normal(pv.MLP(2, 8, 12), scale=1.0), pv.mean_field(pv.MLP(12, 8, 2 * 2)))
    before, z = weights(whole), torch.randn(20, 2) + 3
    part, seen = Witness(), Witness()
    save = WholeProgram(whole, pv.Save(tmp_path / "whole.safetensors"))
    fit(pv.Density(prior), z, z, epochs=2, batch_size=10, hooks=[part, WholeProgram(whole, seen), save])
    assert [(name, epoch) for name, _, epoch in seen.moments] == [(name, epoch) for name, _, epoch in part.moments]
    assert {name for name, *_ in seen.moments} == {"start", "step", "report", "epoch", "end"}
    assert all(pair is pv.as_pair(whole) for _, pair, _ in seen.moments)
    kept = pv.VAE(pv.LearnedNormal(2), pv.Normal(pv.MLP(2, 8, 12), scale=1.0), pv.mean_field(pv.MLP(12, 8, 2 * 2)))
    pv.load_weights(kept, tmp_path / "whole.safetensors")
    assert same(weights(kept), weights(whole))
    changed = {name for name, value in weights(whole).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("prior.")}
