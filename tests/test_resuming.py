"""Runs that were cut off and resumed: they end with the bits of those that never were, or say why they cannot."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kills import (
    ADAM,
    CASES,
    EPOCH,
    EPOCHS,
    HELD_OUT,
    TIMES,
    X,
    batches,
    cut,
    end,
    go,
    grouped,
)
from small import LATENT, WIDTH, conditions, cvae, vae
from test_packing import identical
from torch.optim import lr_scheduler

import ppl_vae as pv
from ppl_vae.alternating import RWS
from ppl_vae.packing import DamagedError, pack, unpack
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded
from ppl_vae.scores import NVIL


def named(folder):
    return sorted(path.name for path in folder.iterdir())


KNOWN = {
    "own generator": "the generator of a caller's DataLoader is not kept",
    "Pyro's baseline": "averages that Pyro keeps in its param store are not kept",
}
EVERY = [
    pytest.param(c, marks=pytest.mark.xfail(reason=KNOWN[c], strict=True) if c in KNOWN else ()) for c in CASES
]


# ---- the same bits
@pytest.mark.parametrize("case", EVERY)
def test_a_run_cut_off_within_an_epoch_and_resumed_ends_as_one_that_never_was(case, tmp_path):
    whole = go(case)
    cut(case, tmp_path / "kept", at=2 * EPOCH + 1)
    resumed = go(case, tmp_path / "kept", "last")
    assert identical(end(resumed), end(whole))
    assert whole.epoch == EPOCHS


@pytest.mark.parametrize("case", ["fused Adam", "redrawn pixels", "critic", "codes"])
def test_wherever_it_is_cut_off_and_however_often(case, tmp_path):
    whole = end(go(case))
    cut(case, tmp_path / "kept", at=0)
    for step in range(EPOCH - 1, EPOCHS * EPOCH, EPOCH - 1):
        cut(case, tmp_path / "kept", at=step, resume="auto")
    assert identical(end(go(case, tmp_path / "kept", "auto")), whole)


def small():
    return (
        vae(),
        X[:32],
        None,
        {"batch_size": 32, "epochs": 3, "scheduler": partial(lr_scheduler.StepLR, step_size=1)},
    )


@pytest.mark.parametrize(
    ("case", "at"),
    [
        (small, 1),
        *(
            pytest.param(case, epoch * EPOCH + 1, marks=pytest.mark.slow)
            for case in ("one cycle", "redrawn pixels", "dropout and batch norm", "NVIL", "RWS", "critic", "codes")
            for epoch in (1, 3)
        ),
    ],
)
def test_captured_runs_are_resumed_to_the_bit(case, at, interpreted, tmp_path):
    whole = go(case, compile="require")
    cut(case, tmp_path / "kept", at=at, compile="require")
    resumed = go(case, tmp_path / "kept", "last", compile="require")
    assert identical(end(resumed), end(whole))
    assert interpreted
    assert not resumed.engine.describe().startswith("eager")


@pytest.mark.slow
def test_compiled_runs_are_resumed_to_the_bit(tmp_path):
    whole = go("validated", compile="require")
    cut("validated", tmp_path / "kept", at=4 * EPOCH + 1, compile="require")
    resumed = go("validated", tmp_path / "kept", "last", compile="require")
    assert identical(end(resumed), end(whole))
    assert resumed.engine.describe().startswith("compiled")


def test_what_is_not_put_back_would_be_seen(tmp_path):
    """The comparison tells apart runs that differ by one draw, or by one optimizer's state."""
    whole = end(go("fused Adam"))
    cut("fused Adam", tmp_path / "kept", at=2 * EPOCH + 1)
    newest = Checkpoints(tmp_path / "kept").found()[-1]
    for part in ("random", "optimizers", "pair"):
        state = unpack(newest, "checkpoint")
        changed = unpack(newest, "checkpoint")
        if part == "random":
            changed[part]["cpu"] = torch.Generator().manual_seed(1).get_state()
        elif part == "optimizers":
            changed[part][0]["state"][0]["exp_avg"].flatten()[0] += 1e-3
        else:
            next(iter(changed[part].values())).flatten()[0] += 1e-3
        pack(newest, "checkpoint", changed)
        assert not identical(end(go("fused Adam", tmp_path / "kept", "last")), whole), part
        for path in Checkpoints(tmp_path / "kept").found():
            path.unlink()
        pack(newest, "checkpoint", state)
    assert identical(end(go("fused Adam", tmp_path / "kept", "last")), whole)


def test_codes_are_revived_and_averaged_within_the_run_that_is_compared():
    program = go("codes", epochs=2).pair.program
    counts = program.posterior.codebook.counts
    assert int((counts > 0).sum()) > 1
    assert not identical(go("codes").pair.state_dict(), program.state_dict())


def early():
    return vae(), X, HELD_OUT, {"hooks": [pv.EarlyStop(patience=3, min_rise=1e9)], "epochs": 9}


def test_epochs_without_a_rise_are_counted_across_the_cut(tmp_path):
    whole = go(early)
    assert (whole.epoch, whole.reason) == (4, "no rise of the validation bound in 3 epochs")
    cut(early, tmp_path / "kept", at=2 * EPOCH + 1)
    assert identical(end(go(early, tmp_path / "kept", "last")), end(whole))
    again = go(early, tmp_path / "kept", "last")  # it stays stopped
    assert identical(end(again), end(whole))


def worsening():
    """Good for two epochs; then each step goes the wrong way."""
    rates = partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1.0 if epoch < 2 else -1.0)
    return vae(), X, HELD_OUT, {"optimizer": ADAM, "scheduler": rates}


def test_the_best_epoch_may_lie_before_the_cut(tmp_path):
    whole = go(worsening)
    assert whole.best_epoch == 2
    cut(worsening, tmp_path / "kept", at=4 * EPOCH)
    resumed = go(worsening, tmp_path / "kept", "last")
    assert identical(end(resumed), end(whole))
    assert resumed.best == whole.best


# ---- files of hooks
def filmed(folder):
    def case():
        film = pv.Film(folder / "film.gif", (HELD_OUT[:4],), (3, 4), draws=4, frames=3)
        hooks = [film, pv.LogCSV(folder / "metrics.csv"), pv.EarlyStop(50), pv.Save(folder / "kept.safetensors")]
        return vae(), X, HELD_OUT, {"hooks": hooks}

    return case


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [[value for name, value in row.items() if name not in TIMES] for row in csv.DictReader(file)]


def test_films_metrics_and_weights_are_those_of_a_run_that_was_not_cut_off(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir(), twice.mkdir()
    whole = go(filmed(once))
    cut(filmed(twice), twice / "kept", at=3 * EPOCH + 1)
    assert len(rows(twice)) == 3
    assert identical(end(go(filmed(twice), twice / "kept", "last")), end(whole))
    assert rows(once) == rows(twice)
    assert len(rows(once)) == EPOCHS
    for name in ("film.gif", "kept.safetensors"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    go(filmed(twice), twice / "kept", "last")  # once more, after the end
    assert rows(once) == rows(twice)
    assert (once / "film.gif").read_bytes() == (twice / "film.gif").read_bytes()


def test_a_hook_for_another_program_goes_on_as_well(tmp_path):
    def case(folder):
        program, x, valid, _ = CASES["validated"]()
        return program, x, valid, {"hooks": [pv.WholeProgram(program, pv.LogCSV(folder / "metrics.csv"))]}

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir(), parted.mkdir()
    go(partial(case, whole))
    cut(partial(case, parted), parted / "kept", at=2 * EPOCH + 1)
    go(partial(case, parted), parted / "kept", "last")
    assert rows(whole) == rows(parted)


# ---- what is kept, and going on after the end
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4, 5]),
        ({"keep": 1}, [5]),
        ({"keep": 9}, [0, 1, 2, 3, 4, 5]),
        ({"every": 2, "keep": 9}, [0, 2, 4, 5]),
        ({"every": 9}, [0, 5]),
    ],
)
def test_every_so_many_epochs_and_so_many_files(options, expected, tmp_path):
    go("fused Adam", tmp_path / "kept", **options)
    assert named(tmp_path / "kept") == [f"epoch-{epoch:06d}.safetensors" for epoch in expected]


@pytest.mark.parametrize("options", [{"every": 3}, {"keep": 1}, {"every": 2, "keep": 5}])
def test_options_may_change_from_one_part_to_the_next(options, tmp_path):
    whole = go("validated")
    cut("validated", tmp_path / "kept", at=2 * EPOCH + 1, **options)
    assert identical(end(go("validated", tmp_path / "kept", "last")), end(whole))


def test_writing_checkpoints_changes_no_number(tmp_path):
    assert identical(end(go("dropout and batch norm", tmp_path / "kept")), end(go("dropout and batch norm")))


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    cut("fused Adam", tmp_path / "kept", at=EPOCH + 1)
    half = tmp_path / "kept" / ".epoch-000002.safetensors.123.part"
    half.write_bytes(b"half")
    other = tmp_path / "kept" / "notes.txt"
    other.write_text("mine")
    go("fused Adam", tmp_path / "kept", "last")
    assert not half.exists()
    assert other.read_text() == "mine"


def test_resuming_after_the_last_epoch_changes_nothing(tmp_path):
    whole = go("validated", tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    again = go("validated", tmp_path / "kept", "last")
    assert identical(end(again), end(whole))
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize("case", ["fused Adam", "validated", "redrawn pixels"])
def test_more_epochs_than_before_go_on(case, tmp_path):
    go(case, tmp_path / "kept")
    assert identical(end(go(case, tmp_path / "kept", "last", epochs=7)), end(go(case, epochs=7)))


def test_fewer_epochs_than_are_done_leave_the_run_as_it_is(tmp_path):
    whole = go("fused Adam", tmp_path / "kept")
    found = go("fused Adam", tmp_path / "kept", "last", epochs=2)
    assert found.epoch == EPOCHS
    assert identical(end(found)["pair"], end(whole)["pair"])


def test_the_callers_streams_are_left_alone(tmp_path):
    cut("fused Adam", tmp_path / "kept", at=EPOCH + 1)
    state = torch.get_rng_state()
    go("fused Adam", tmp_path / "kept", "last")
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is refused
def wider():
    with seeded(0):
        program = vae()
        program.posterior = pv.mean_field(pv.MLP(WIDTH, 17, 2 * LATENT))
    return program, X, HELD_OUT, {}


REFUSED = {
    "seed": ({"seed": 4}, "settings: seed: 3 there, 4 here"),
    "batch size": ({"batch_size": 8}, "settings: batch_size: 16 there, 8 here"),
    "rows": (lambda: (vae(), X[:39], HELD_OUT, {}), "settings: rows: 40 there, 39 here"),
    "stream": (lambda: (vae(), batches(), HELD_OUT, {}), "settings: rows: 40 there, None here"),
    "program": (wider, r"parameters: .*\[16, 12\] there, \[17, 12\] here"),
    "latents": (lambda: (cvae(), (X, conditions(X)), None, {}), "parameters: "),
    "two steps": ({"objective": RWS(3)}, "settings: updates: "),
    "baseline": ({"objective": pv.ELBO(2, estimator=NVIL(pv.MLP(WIDTH, 8, 1)))}, "objective: "),
    "hooks": ({"hooks": [pv.EarlyStop(3)]}, r"hooks: \[\] there, \['0 EarlyStop'\] here"),
    "optimizer": ({"optimizer": torch.optim.SGD}, "settings: updates: .*Adam.* there, .*SGD.* here"),
    "precision": ({"precision": "bf16"}, "settings: updates: "),
    "clipping": ({"clip_norm": 1.0}, "settings: updates: "),
    "schedule": ({"scheduler": partial(lr_scheduler.StepLR, step_size=1)}, "settings: schedules: "),
}


UNSEEN = {
    "bound": {"objective": pv.IWAE(5)},
    "particles": {"objective": pv.ELBO(2)},
    "steps of the schedule": {"scheduler": partial(lr_scheduler.StepLR, step_size=1), "scheduler_every": "step"},
    "validation": {"valid": None},
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Checkpoints of a run that was cut off."""
    folder = tmp_path_factory.mktemp("started") / "kept"
    cut("validated", folder, at=2 * EPOCH + 1)
    return folder


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("resume", ["last", "auto"])
def test_another_run_is_refused_and_nothing_is_changed(what, resume, started, tmp_path):
    other, message = REFUSED[what]
    case, more = (other, {}) if callable(other) else ("validated", other)
    before = {path.name: path.read_bytes() for path in started.iterdir()}
    log = tmp_path / "metrics.csv"
    log.write_text("epoch\n1\n")
    hooks = more.get("hooks", [])
    with pytest.raises(ValueError, match=f"resume: the checkpoint is of another run, by its {message}"):
        go(case, started, resume, **more | {"hooks": [*hooks, *([] if hooks else [Untouched(log)])]})
    assert {path.name: path.read_bytes() for path in started.iterdir()} == before
    assert log.read_text() == "epoch\n1\n"


@pytest.mark.parametrize("what", UNSEEN)
def test_other_bounds_schedules_and_data_are_refused(what, tmp_path):
    other = dict(UNSEEN[what])
    valid = other.pop("valid", HELD_OUT)
    schedule = {"scheduler": other["scheduler"]} if "scheduler" in other else {}
    cut("validated", tmp_path / "kept", at=2 * EPOCH + 1, **schedule)
    with pytest.raises(ValueError, match="the checkpoint is of another run"):
        go(lambda: (vae(), X, valid, {}), tmp_path / "kept", "last", **other)


def test_other_groups_of_an_optimizer_are_refused_before_anything_is_changed(started):
    program = vae()
    before = program.state_dict()["posterior.net.0.weight"].clone()
    with pytest.raises(ValueError, match="group"):
        go(lambda: (program, X, HELD_OUT, {}), started, "last", optimizer=grouped)
    assert torch.equal(program.state_dict()["posterior.net.0.weight"], before)


@pytest.mark.parametrize("state", [{}, []], ids=str)
def test_a_whole_file_of_another_state_is_no_checkpoint(state, tmp_path):
    (tmp_path / "kept").mkdir()
    pack(tmp_path / "kept" / "epoch-000001.safetensors", "checkpoint", state)
    with pytest.raises(ValueError, match="checkpoint"):
        go("validated", tmp_path / "kept", "last")


def newest(folder):
    path = Checkpoints(folder).found()[-1]
    return path, unpack(path, "checkpoint")


def test_a_checkpoint_from_before_faults_were_kept_is_gone_on_from(tmp_path):
    cut("validated", tmp_path / "kept", at=2 * EPOCH + 1)
    path, state = newest(tmp_path / "kept")
    del state["faults"]
    pack(path, "checkpoint", state)
    assert identical(end(go("validated", tmp_path / "kept", "last")), end(go("validated")))


def test_a_checkpoint_of_another_version_is_told_by_what_it_lacks_and_has(tmp_path):
    cut("validated", tmp_path / "kept", at=2 * EPOCH + 1)
    path, state = newest(tmp_path / "kept")
    pack(path, "checkpoint", {"later": 1} | {name: value for name, value in state.items() if name != "random"})
    told = r"kept \(epoch-000002.safetensors\) is of another version of ppl_vae \(it has 'later', lacks 'random'\)"
    with pytest.raises(DamagedError, match=told + ": finish that run with the version that began it"):
        go("validated", tmp_path / "kept", "last")


OPTIMIZERS = ["Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop", "SGD"]
SCHEDULES = {
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=1e-4, max_lr=1e-2, cycle_momentum=True),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=1, T_mult=2),
    "polynomial": lr_scheduler.PolynomialLR,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_any_optimizer_of_torch_keeps_is_taken(name, tmp_path):
    optimizer = getattr(torch.optim, name)
    cut("validated", tmp_path / "kept", at=EPOCH + 1, optimizer=optimizer, epochs=2)
    resumed = go("validated", tmp_path / "kept", "last", optimizer=optimizer, epochs=2)
    assert identical(end(resumed), end(go("validated", optimizer=optimizer, epochs=2)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_other_schedules_keep_is_taken(name, tmp_path):
    how = {"optimizer": ADAM, "scheduler": SCHEDULES[name], "epochs": 4}
    cut("validated", tmp_path / "kept", at=3 * EPOCH + 1, **how)
    assert identical(end(go("validated", tmp_path / "kept", "last", **how)), end(go("validated", **how)))


class Untouched(pv.LogCSV):
    """Would start a file anew; without a state, so that hooks do not differ."""

    def state(self):
        return None


@pytest.mark.parametrize("resume", ["last", "auto", "off"])
def test_hooks_files_are_left_alone_where_resuming_is_refused(resume, started, tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch\n1\n")
    with pytest.raises(ValueError, match="resum"):
        go("validated", started, resume, seed=9, hooks=[Untouched(log)])
    assert log.read_text() == "epoch\n1\n"


def test_a_folder_with_checkpoints_is_not_started_over(started):
    before = named(started)
    with pytest.raises(ValueError, match=r"checkpoints: .*kept holds those of a run; resume it, or take another"):
        go("validated", started)
    assert named(started) == before


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(ValueError, match=r"resume: there is no checkpoint in .*kept; start afresh, or .* 'auto'"):
        go("validated", tmp_path / "kept", "last")
    assert not (tmp_path / "kept").exists()
    assert identical(end(go("validated", tmp_path / "kept", "auto")), end(go("validated")))


@pytest.mark.parametrize("changed", [{"every": 0}, {"keep": 0}, {"every": -1}])
def test_numbers_below_one(changed, tmp_path):
    (name,) = changed
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Checkpoints(tmp_path, **changed)


def test_an_unknown_way_to_resume(tmp_path):
    with pytest.raises(ValueError, match="resume must be 'off', 'last' or 'auto', got 'newest'"):
        Checkpoints(tmp_path, "newest")


# ---- damage
def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "flip": whole[:-1] + bytes([whole[-1] ^ 1])}[how]
    )


@pytest.mark.parametrize("how", ["cut", "empty", "flip"])
def test_a_damaged_newest_is_told_and_an_earlier_one_gone_on_from(how, tmp_path):
    folder = tmp_path / "kept"
    cut("validated", folder, at=2 * EPOCH + 1)
    damage(folder / "epoch-000002.safetensors", how)
    with pytest.raises(DamagedError, match=r"epoch-000002.* damaged.*resume 'auto' goes back to epoch-000001"):
        go("validated", folder, "last")
    with pytest.warns(UserWarning, match=r"going on from epoch-000001.safetensors: .*epoch-000002.safetensors"):
        resumed = go("validated", folder, "auto")
    assert identical(end(resumed), end(go("validated")))


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path):
    folder = tmp_path / "kept"
    cut("validated", folder, at=2 * EPOCH + 1, keep=1)
    damage(folder / "epoch-000002.safetensors", "cut")
    with pytest.raises(DamagedError, match="there is no other"):
        go("validated", folder, "last")
    with pytest.raises(DamagedError, match=r"no checkpoint is whole: .*epoch-000002"):
        go("validated", folder, "auto")


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    folder = tmp_path / "kept"
    cut("validated", folder, at=2 * EPOCH + 1)
    pv.save_weights(vae(), folder / "epoch-000009.safetensors")
    with pytest.raises(DamagedError, match="is a safetensors file, but no checkpoint of ppl_vae"):
        go("validated", folder, "last")
    with pytest.warns(UserWarning, match="going on from epoch-000002"):
        go("validated", folder, "auto")


# ---- what cannot be kept is told before training
class Opaque:
    """A function of the epoch that is no plain value, and whose attributes are none either."""

    def __init__(self):
        self.inner = object()

    def __call__(self, epoch):
        return 1.0


class Forgetful(pv.Hook):
    def state(self):
        return {"held": object()}


class Steps(pv.Hook):
    def __init__(self):
        self.steps = 0

    def on_step(self, run):
        self.steps += 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"scheduler": lambda o: lr_scheduler.LambdaLR(o, Opaque())},
            "checkpoint/schedules/0/.*: a object cannot",
        ),
        ({"hooks": [Forgetful()]}, "checkpoint/hooks/0 Forgetful/held: a object cannot be kept"),
    ],
    ids=["scheduler", "hook"],
)
def test_state_that_cannot_be_kept_is_told_before_training(more, message, tmp_path):
    steps = Steps()
    with pytest.raises(ValueError, match=message):
        go("validated", tmp_path / "kept", **more | {"hooks": [*more.get("hooks", []), steps]})
    assert steps.steps == 0
    assert named(tmp_path / "kept") == []


@pytest.mark.parametrize("place", ["none/kept", "file"])
def test_a_folder_that_cannot_be_made_is_told_before_training(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    steps = Steps()
    with pytest.raises(ValueError, match="checkpoints: cannot make"):
        go("validated", tmp_path / place, hooks=[steps])
    assert steps.steps == 0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "more", [{}, {"scheduler": lambda o: lr_scheduler.LambdaLR(o, Opaque())}], ids=["file", "state"]
)
def test_hooks_files_are_left_alone_where_checkpoints_cannot_be_written(more, tmp_path):
    log, place = tmp_path / "metrics.csv", tmp_path / ("kept" if more else "metrics.csv")
    log.write_text("epoch\n1\n")
    with pytest.raises(ValueError, match="checkpoint"):
        go("validated", place, hooks=[pv.LogCSV(log)], **more)
    assert log.read_text() == "epoch\n1\n"


# ---- killed processes
@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_no_bit(tmp_path):
    script = Path(__file__).parent / "kills.py"
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["kills"] == 50
    assert told["resumed"] > 10  # others came before a first epoch, or between two runs
    whole = unpack(tmp_path / "whole" / "end.safetensors", "end")
    ends = list(tmp_path.glob("run-*/end.safetensors"))
    assert len(ends) == told["runs"]
    for path in ends:
        assert identical(unpack(path, "end"), whole), path.parent.name
        assert rows(path.parent) == rows(tmp_path / "whole")
        assert not [
            p for p in (path.parent / "kept").iterdir() if not re.fullmatch(r"epoch-\d+.safetensors", p.name)
        ]
