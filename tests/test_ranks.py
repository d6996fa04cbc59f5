"""Several processes: the run is that of one, whatever each of them does; and what is said when one is lost."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from kills import end
from ranks import CASES, EPOCHS, HELD_OUT, SIZE, X, drawing, find
from test_packing import identical
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae.batches import as_data
from ppl_vae.ranks import (
    RankError,
    any_rank,
    connected,
    count_ranks,
    first_rank,
    from_first,
    gathered,
    own_rank,
    own_rows,
    process_group,
)
from ppl_vae.steps import Feed

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["train", "--data", "digits", "--limit", "150", "--latent", "3", "--hidden", "8"]
TRAIN += ["--compile", "off", "--quiet", "--device", "cpu", "--no-film"]
FAST = ["primitives", "exact", "exact, captured", "unequal", "validated", "hooked", "idle"]
SLOW = ["exact, Adam", "exact, not clipped", "dataset", "away", "resumed", "other number", "critic", "codebook"]
SLOW += ["quantised", "wrong"]

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
slow = pytest.mark.slow


def start(folder, count, cases, **environment):
    """Some processes, each on one core."""
    command = [sys.executable, HERE / "ranks.py", folder, str(count), *cases]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def run(folder, count, cases, **environment):
    """What each process found in each case."""
    done = start(folder, count, cases, **environment)
    assert done.returncode == 0, done.stderr
    return {case: [load(folder / f"{case}-{rank}.pt") for rank in range(count)] for case in cases}


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, FAST)


@pytest.fixture(scope="module")
def slow_two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, SLOW)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), 4, [*FAST, *SLOW])


def is_of_the_joined_batch(found, alone):
    """Every process has the same parameters after every epoch, and one process has them but for rounding."""
    for other in found[1:]:
        assert identical(other["seen"], found[0]["seen"])
        assert identical(other["history"], found[0]["history"])
    assert len(found[0]["seen"]) == len(alone["seen"]) == EPOCHS
    assert found[0]["step"] == alone["step"]
    for ours, theirs in zip(found[0]["seen"], alone["seen"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(found[0]["history"], alone["history"], strict=True):
        assert ours["train"] == pytest.approx(theirs["train"], rel=1e-6)  # batches' values, in float32 sums


# ---- what processes tell each other
@pytest.mark.parametrize("size", [0, 1, 3, 4, 41])
def test_alone_all_rows_are_ones_own(size):
    assert own_rows(size) == slice(0, size)
    assert (count_ranks(), own_rank()) == (1, 0)
    x = torch.arange(3.0)
    assert gathered(x) is x
    assert first_rank(x) is x
    assert from_first(lambda: Path("as it is")) == Path("as it is")
    assert [any_rank(flag) for flag in (True, False)] == [True, False]


def test_means_are_over_the_rows_of_all_and_sharing_is_of_any_type(two):
    for found in two["primitives"]:
        # One process has 1 row, the other 3.
        means = found["means"]
        assert torch.equal(means[0], torch.full((2,), (1 * 1 + 3 * 2) / 4))
        assert torch.equal(means[1], torch.full((3, 2), 3 / 4, dtype=torch.float64))
        assert found["there"] == [True, True, False]
        assert torch.equal(found["idle"][0], torch.full((2,), 5.0))  # NaN of one without rows does not count
        assert identical(found["held"], two["primitives"][0]["held"])
        assert found["held"][0].tolist() == [True, True]
        assert found["same"] == ["nothing", ""]
        assert found["minus"][0] == "RankError"
        for rows in found["gathered"]:  # one of the first, two of the second
            assert torch.equal(rows, torch.tensor([[0, 1], [1, 1], [1, 1]]).to(rows.dtype))


# ---- the same run
@pytest.mark.parametrize("case", ["exact", "exact, captured", "unequal"])
def test_two_processes_take_the_steps_of_one_along_the_gradients_of_the_joined_batches(two, case):
    is_of_the_joined_batch(two[case], find("unequal" if case == "unequal" else "exact", None))
    assert two[case][0]["engine"].startswith("compiled" if "captured" in case else "eager")


@slow
@pytest.mark.parametrize("case", ["exact, Adam", "exact, not clipped", "dataset", "away"])
def test_so_they_do_with_other_optimizers_and_data(slow_two, case):
    is_of_the_joined_batch(slow_two[case], find(case, None))


@slow
@pytest.mark.parametrize(
    "case", ["exact", "exact, captured", "exact, Adam", "exact, not clipped", "dataset", "away"]
)
def test_so_do_four_of_which_some_have_nothing_of_the_last_batch(four, case):
    assert len(X) % SIZE < 4
    is_of_the_joined_batch(four[case], find("exact" if "captured" in case else case, None))


@slow
def test_compiled_steps_are_those_of_one_process(tmp_path):
    found = run(tmp_path, 2, ["exact, captured", "quantised"], COMPILED="1")
    is_of_the_joined_batch(found["exact, captured"], find("exact", None))
    assert found["exact, captured"][0]["engine"].startswith("compiled in")
    assert found["quantised"][0]["engine"].startswith("compiled in")
    assert identical(found["quantised"][0]["pair"], found["quantised"][1]["pair"])


def test_clipping_changes_these_runs():
    clipped, free = find("exact", None), find("exact, not clipped", None)
    assert not torch.allclose(clipped["seen"][-1][0], free["seen"][-1][0], rtol=1e-3)


# ---- runs that draw
def test_all_have_the_same_history_and_validation_is_that_of_one_within_its_error(two):
    first, second = two["validated"]
    assert identical(first["end"], second["end"])
    assert identical(first["history"], second["history"])  # times included
    alone = drawing(epochs=4)
    for ours, theirs in zip(first["history"], alone.history, strict=True):
        assert abs(ours["valid"] - theirs["valid"]) < theirs["valid_stderr"]
        assert ours["valid_stderr"] == pytest.approx(theirs["valid_stderr"], rel=0.3)
        assert ours["step"] == theirs["step"]
    assert not torch.equal(torch.stack(first["drawn"]), torch.stack(second["drawn"]))  # streams of their own
    names = [name for name in first["end"]["pair"] if "running" in name]
    assert len(names) == 2  # statistics, which each process takes of its rows


@slow
@pytest.mark.parametrize("how", ["slow_two", "four"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_was_cut_off(request, how):
    found = request.getfixturevalue(how)["resumed"]
    for each in found:
        assert each["cut"]
        assert identical(each["again"], each["whole"])
        assert identical(each["whole"], found[0]["whole"])


@slow
def test_another_number_of_processes_goes_on_with_new_streams_and_says_so(tmp_path):
    run(tmp_path, 2, ["other number"])
    with pytest.warns(UserWarning, match="the run had 2 processes and goes on with 1: what is drawn"):
        alone = drawing(tmp_path / "other number", "last", epochs=4)
    assert (alone.epoch, len(alone.history)) == (4, 4)


@slow
@pytest.mark.parametrize("case", ["critic", "quantised"])
@pytest.mark.parametrize("how", ["slow_two", "four"])
def test_a_critic_and_a_captured_codebook_are_the_same_on_all(request, how, case):
    found = request.getfixturevalue(how)[case]
    for other in found[1:]:
        assert identical(other["pair"], found[0]["pair"])
        assert identical(other["objective"], found[0]["objective"])
    if case == "quantised":
        assert all(each["engine"].startswith("compiled") for each in found)
        counts = next(value for name, value in found[0]["pair"].items() if name.endswith(".counts"))
        assert int((counts > 0).sum()) > 1


def test_a_process_without_rows_adds_nothing_to_a_codebook(two):
    alone = CASES["idle"](how="off")["pair"]
    for name, value in two["idle"][0]["pair"].items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
    assert identical(two["idle"][0]["pair"], two["idle"][1]["pair"])


@slow
def test_all_ranks_have_the_codes_of_the_joined_batch(slow_two):
    first, second = slow_two["codebook"]
    assert identical(first, second)
    alone = ranks.trained(0, 1, None)
    for name, value in alone.items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-5, atol=1e-6)
    assert (first[1]["vectors"] - first[0]["vectors"]).abs().max() > 0.01  # codes were put elsewhere


# ---- hooks
def test_a_hook_of_the_first_alone_judges_alone_and_may_stop_all(two):
    first, second = two["hooked"]
    assert first["stop"] == [2, "enough"]
    assert second["stop"] == [2, "another process asked for it"]
    (rank, count, value) = first["judged"][0]
    assert (rank, count, second["judged"]) == (0, 1, [])
    assert value == first["alone"]


def test_of_the_shipped_hooks_those_act_everywhere_that_act_on_training():
    assert all(hook.everywhere for hook in (pv.EarlyStop, pv.Anneal, pv.WatchCodes))
    assert not any(
        hook.everywhere for hook in (pv.Hook, pv.LogCSV, pv.LogTensorBoard, pv.Save, pv.Progress, pv.Film)
    )
    assert pv.hooks.WholeProgram(ranks.normalised(), pv.EarlyStop()).everywhere


# ---- what goes wrong
@slow
@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("moved", "RankError", "process 1 holds other parameters than process 0 after epoch 1"),
        ("data", "ValueError", "data: process 1 was given another than process 0"),
        ("seed", "ValueError", "seed: process 1 was given another than process 0"),
        ("epochs", "ValueError", "epochs: process 1 was given another than process 0"),
        ("kept", "ValueError", "checkpoints (on every process, though the first alone writes): process 1"),
        ("batch", "ValueError", "batch_size: 1 data cannot be shared by {} processes"),
        ("rows", "ValueError", "train: 1 data cannot be shared by {} processes"),
    ],
)
@pytest.mark.parametrize("how", ["slow_two", "four"])
def test_what_processes_cannot_share_is_refused_by_all(request, how, what, kind, said):
    found = request.getfixturevalue(how)["wrong"]
    for each in found:
        assert each[what][0] == kind
        assert each[what][1].startswith(said.format(len(found)))


@slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", ["dead", "dead, captured"])
def test_a_dead_process_ends_the_others_with_a_message(tmp_path, case, count):
    begun = time.monotonic()
    start(tmp_path, count, [case])
    assert time.monotonic() - begun < 60
    for rank in range(count - 1):
        kind, said = load(tmp_path / f"{case}-{rank}.pt")
        assert kind == "RankError"
        assert said.startswith(f"process {rank} of {count} has lost another")
        assert "resume 'auto'" in said
    assert not (tmp_path / f"{case}-{count - 1}.pt").exists()
    assert sorted(p.name for p in (tmp_path / case / "kept").iterdir())[-1] == "epoch-000001.safetensors"


@slow
def test_a_loader_that_gives_all_data_to_each_is_warned_of_once(slow_two):
    first, second = slow_two["wrong"]
    assert first["whole"][1].startswith("train: this DataLoader gives all data to each of the 2 processes")
    assert second["whole"][1] == ""


def test_other_errors_are_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError, match=r"^shapes") as raised, connected():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, RankError)


# ---- started by torchrun
def test_without_torchrun_there_is_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group():
        assert not distributed.is_initialized()


def test_one_process_under_torchrun_is_one_alone(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    alone = end(drawing(epochs=1))
    with process_group("cpu"):
        assert distributed.is_initialized()
        assert count_ranks() == 1
        with process_group("cpu"):  # there is one already
            pass
        assert identical(end(drawing(epochs=1)), alone)
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "told", "message"),
    [
        ("cuda:1", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "device: 'cuda:1' would be that of all processes"),
        (None, {"LOCAL_RANK": "2", "WORLD_SIZE": "3"}, "device: process 2 of this machine finds 2 GPUs"),
    ],
)
def test_each_process_needs_a_gpu_of_its_own(monkeypatch, device, told, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | told).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), process_group(device):
        pass


def torchrun(*command, restarts=0, **environment):
    """Two processes."""
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [*TORCHRUN, *options, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(folder):
    """metrics.csv without times."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@slow
def test_torchrun_trains_into_one_run_folder(tmp_path):
    process = torchrun("-m", "ppl_vae", *TRAIN, "--epochs", "3", "--out", tmp_path / "run")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert out.count("all epochs done: 3 epochs") == 1
    assert len(rows(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["epochs"] == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_file()) == [
        "metrics.csv",
        "run.json",
        "weights.safetensors",
    ]
    again = torchrun("-m", "ppl_vae", *TRAIN, "--epochs", "3", "--out", tmp_path / "run")
    _, error = again.communicate(timeout=200)
    assert again.returncode != 0
    assert "holds a run already" in error


@slow
def test_a_process_that_dies_is_started_again_and_the_run_ends_as_if_it_had_not(tmp_path):
    for name, restarts, dies in (("whole", 0, "none"), ("first", 1, "0"), ("second", 1, "1")):
        command = [HERE / "elastic.py", *TRAIN, "--epochs", "4", "--resume", "auto", "--out", tmp_path / name]
        process = torchrun(*command, restarts=restarts, DIES=dies)
        _, error = process.communicate(timeout=250)
        assert process.returncode == 0, error
        assert "cannot reach" not in error
        if restarts:
            assert f"process {1 - int(dies)} of 2 has lost another" in error
            assert rows(tmp_path / name) == rows(tmp_path / "whole")
            weights = [(tmp_path / each / "weights.safetensors").read_bytes() for each in ("whole", name)]
            assert weights[0] == weights[1]


@slow
def test_when_torchrun_is_asked_to_terminate_the_run_is_saved_and_can_go_on(tmp_path):
    command = ["-m", "ppl_vae", *TRAIN, "--epochs", "100000", "--out", tmp_path / "run"]
    process = torchrun(*command)
    metrics = tmp_path / "run" / "metrics.csv"
    begun = time.monotonic()
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() - begun < 100
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (tmp_path / "run" / "weights.safetensors").exists()
    kept = pv.Checkpoints(tmp_path / "run" / "checkpoints", "last").read()
    assert kept["run"]["epoch"] >= 3


# ---- data
def test_a_sampler_is_told_the_number_of_the_epoch():
    sampler = torch.utils.data.DistributedSampler(TensorDataset(HELD_OUT), num_replicas=2, rank=1, seed=4)
    loader = DataLoader(TensorDataset(HELD_OUT), batch_size=4, sampler=sampler)
    feed = Feed(as_data(loader), 4, epochs=2)
    seen = [torch.cat([share.item[0] for share in feed.shares(0, epoch)]) for epoch in (0, 1, 1)]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
