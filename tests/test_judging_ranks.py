"""Judging in several processes: all have the same, of all data in their order, and what one process would have."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from judging_ranks import COUNT, exact, outcomes, wide
from torch import distributed

import ppl_vae as pv
from ppl_vae.cli import main
from ppl_vae.evaluate import judging
from ppl_vae.sharding import in_batches, presented

SCRIPT = Path(__file__).with_name("judging_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FEW = ["exact bound", "annealed", "redrawn", "nan in weights", "broken"]
CERTAIN = ["exact elbo", "exact bound", "exact importance", "exact annealed", "stream", "set"]
DRAWN = ["elbo", "bound", "importance", "annealed", "gaps", "sandwich", "ranked", "replicated", "float"]
SAME = ["redrawn", "units", "codes", "length", "decomposed"]  # nothing is drawn, or all draw the same
WRONG = ["nan in data", "nan in weights", "refused", "broken", "shares", "weights"]
LITTLE = ["three", "one", "three codes", "stream", "redrawn", "decomposed", "nan in weights", "broken"]
gloo = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")


def together(folder, ranks, names, how="off"):
    """What each of several processes finds by each name."""
    outs, meeting = [folder / f"{rank}.pt" for rank in range(ranks)], (folder / "meeting").as_uri()
    started = [
        subprocess.Popen([sys.executable, "-W", "ignore", SCRIPT, str(r), str(ranks), meeting, out, how, *names])
        for r, out in enumerate(outs)
    ]
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * len(codes) or "dead" in names
    return [torch.load(out, weights_only=True) if code == 0 else {} for out, code in zip(outs, codes, strict=True)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What two processes find by all names."""
    names = [*CERTAIN, *DRAWN, *SAME, *WRONG, "alone", "stream left"]
    return together(tmp_path_factory.mktemp("two"), 2, names)


def agree(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, str):
            assert value == second[name], name
        else:
            torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True, msg=name)


def evidence():
    program, x = exact()
    return program.log_evidence(x).detach()


def within(found, truth, stderr):
    """Whether the mean lies within five standard errors of the truth."""
    assert found.shape == truth.shape
    error = float(stderr.square().sum().sqrt()) / len(found)
    assert abs(float((found - truth).mean())) < 5 * error


# ---- one process
def test_alone_all_rows_come_in_their_order():
    program, x = wide()
    with judging(program, 0) as pair:
        batches = presented(pair, x, 4, 0)
        assert batches.rows == COUNT
        found = batches.collect(lambda row, batch: {"row": row + torch.arange(len(batch[0])), "x": batch[0]})
        assert found["row"].tolist() == [*range(COUNT)]
        assert torch.equal(found["x"], x)
        sizes = [(row, len(part)) for row, (part, _) in in_batches(pair, (x, x[:, 0]), 5)]
        assert sizes == [(0, 5), (5, 5), (10, 1)]
        assert presented(pair, [x[:3], x[3:]], 4, 0).rows is None


# ---- two processes
@gloo
def test_two_processes_in_a_hurry(tmp_path):
    first, second = together(tmp_path, 2, FEW)
    here = outcomes(FEW)
    torch.testing.assert_close(first["exact bound"]["value"], evidence(), rtol=0, atol=1e-9)
    for name in ("exact bound", "annealed", "redrawn", "nan in weights"):
        agree(first[name], second[name])
    agree(first["redrawn"], here["redrawn"])
    # The first process draws as one does alone; its rows are 0 to 4, and its first batch is whole.
    lower = [found["annealed"]["value"] for found in (first, here)]
    assert torch.equal(lower[0][:4], lower[1][:4])
    assert not torch.equal(lower[0][5:], lower[1][5:])
    assert "ELBO of row 10 is nan" in first["nan in weights"]["error"]
    assert first["nan in weights"]["value"].isnan().tolist() == [False] * 10 + [True]
    assert first["broken"] == {"error": "RankError: process 1 failed: ArithmeticError: no such number"}
    assert second["broken"] == {"error": "ArithmeticError: no such number"}


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CERTAIN, *DRAWN, *SAME, *(n for n in WRONG if n != "broken"), "stream left"])
def test_all_have_the_same(pairs, name):
    agree(pairs[0][name], pairs[1][name])


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", CERTAIN)
def test_where_the_guide_is_the_posterior_every_datum_has_its_evidence(pairs, name):
    torch.testing.assert_close(pairs[0][name]["value"], evidence(), rtol=0, atol=1e-9)


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_what_does_not_depend_on_draws_is_what_one_process_finds(pairs, name):
    agree(pairs[0][name], outcomes([name])[name])


@gloo
@pytest.mark.slow
def test_bounds_agree_with_closed_forms_within_their_errors(pairs):
    program, x = wide()
    found, truth = pairs[0], program.log_evidence(x).detach()
    within(found["elbo"]["value"], program.elbo(x).detach(), found["elbo"]["stderr"])
    for name in ("bound", "importance"):
        within(found[name]["value"], truth, found[name]["stderr"])
        assert found[name]["diagnostics ess"].isfinite().all()
    program.widen = 1.0  # the best of its family, which refinement comes near
    gap = found["gaps"]["refined elbo value"] - program.elbo(x).detach()
    assert (gap > -0.1 - 5 * found["gaps"]["refined elbo stderr"]).all()
    assert (gap < 5 * found["gaps"]["refined elbo stderr"]).all()


@gloo
@pytest.mark.slow
def test_each_process_draws_from_a_stream_of_its_own(pairs):
    here = outcomes(["elbo"])["elbo"]["value"]
    assert torch.equal(pairs[0]["elbo"]["value"][:4], here[:4])
    assert not torch.isclose(pairs[0]["elbo"]["value"][5:], here[5:]).any()


@gloo
@pytest.mark.slow
def test_a_sandwich_has_the_same_settings_and_encloses_the_truth(pairs):
    found = pairs[0]["sandwich"]
    assert found["settings distributions"] in (8, 16, 32)
    gap = found["upper value"] - found["lower value"]
    assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(COUNT)


@gloo
@pytest.mark.slow
def test_ranks_among_draws_of_an_exact_guide_are_uniform(pairs):
    ranks = pairs[0]["ranked"]["ranks z"]
    assert ranks.shape == (40, 2)
    assert ranks.dtype == torch.int64
    assert pv.Calibration({"z": ranks}, 9).calibrated


@gloo
@pytest.mark.slow
def test_errors_reach_all_with_the_number_of_the_datum(pairs):
    said = {name: [found[name]["error"] for found in pairs] for name in WRONG}
    assert "data column 0: row 7 holds NaN" in said["nan in data"][0]
    assert pairs[0]["nan in data"]["value"].isnan().nonzero().flatten().tolist() == [7]
    assert "x: this datum is not to be had" in said["refused"][0]
    assert said["shares"][0].startswith("ValueError: data (all of them, in every process): process 1 was given")
    assert said["weights"][0].startswith("ValueError: parameters: process 1 was given")


@gloo
@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path):
    first, second = together(tmp_path, 2, ["dead"])
    assert "RankError: process 0 of 2 has lost another" in first["dead"]["error"]
    assert second == {}


@gloo
@pytest.mark.slow
def test_one_may_judge_alone(pairs):
    first, second = (found["alone"] for found in pairs)
    assert first == {}
    agree(second, outcomes(["elbo"])["elbo"])


@gloo
@pytest.mark.slow
def test_the_callers_stream_is_left_alone(pairs):
    torch.manual_seed(5)
    assert torch.equal(pairs[1]["stream left"]["around"], torch.rand(6))


@gloo
@pytest.mark.slow
def test_captured_graphs_find_the_same(tmp_path):
    names = ["exact bound", "bound", "exact annealed"]
    first, second = together(tmp_path, 2, names, "require")
    for name in names:
        agree(first[name], second[name])
        assert first[name]["engine"].startswith("compiled")
    for name in ("exact bound", "exact annealed"):
        torch.testing.assert_close(first[name]["value"], evidence(), rtol=0, atol=1e-9)
    program, x = wide()
    within(first["bound"]["value"], program.log_evidence(x).detach(), first["bound"]["stderr"])


# ---- four processes, some of which have nothing to do
@gloo
@pytest.mark.slow
def test_fewer_data_than_processes(tmp_path):
    found, here = together(tmp_path, 4, LITTLE), outcomes(LITTLE)
    for name in LITTLE:
        for other in found[1:] if name != "broken" else ():
            agree(found[0][name], other[name])
    program, x = exact(3)
    torch.testing.assert_close(found[0]["three"]["value"], program.log_evidence(x).detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0]["stream"]["value"], evidence(), rtol=0, atol=1e-9)
    assert found[0]["one"]["diagnostics log_weights"].shape == (1, 6)
    for name in ("three codes", "redrawn", "decomposed"):
        agree(found[0][name], here[name])
    assert "row 10" in found[0]["nan in weights"]["error"]
    assert [f["broken"]["error"].partition(":")[0] for f in found] == ["RankError"] * 3 + ["ArithmeticError"]


# ---- the command line
@gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_first_process_tells_and_writes_what_all_have_found(tmp_path, ranks):
    folder = tmp_path / "run"
    assert (
        main(f"train --quiet --no-film --epochs 2 --hidden 8 --limit 60 --device cpu --out {folder}".split()) == 0
    )
    how = [
        "evaluate",
        str(folder),
        "--limit",
        "30",
        "--particles",
        "200",
        "--method",
        "importance",
        "--device",
        "cpu",
    ]
    assert main(how) == 0
    alone = judgement(folder)
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "-m", "ppl_vae", *how],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nats per datum, ±") == 1
    assert done.stdout.count("written to ") == 1
    (results, each), (before, each_before) = judgement(folder), alone
    for name in ("squared_error_of_reconstructions", "active_units", "size", "engine"):
        assert results[name] == before[name], name
    assert len(each) == len(each_before) == 30
    difference = torch.tensor(
        [float(a["L_200"]) - float(b["L_200"]) for a, b in zip(each, each_before, strict=True)]
    )
    stderr = torch.tensor([[float(row["L_200 stderr"]) for row in rows] for rows in (each, each_before)])
    within(difference, torch.zeros(30), stderr.square().sum(0).sqrt())
    assert (difference != 0).any()  # other draws, but in the first process


def judgement(folder):
    """What evaluation has written: results, and the rows of single data."""
    with (folder / "per_datum.csv").open(encoding="utf-8") as file:
        return json.loads((folder / "results.json").read_text("utf-8")), [*csv.DictReader(file)]
