"""The command that judges a run: one table by every method, with files and figures that agree with it."""

import csv
import json
import math
import shlex

import pytest
import torch
from PIL import Image

import ppl_vae as pv
from ppl_vae.cli import main
from ppl_vae.estimates import Estimate, whole
from ppl_vae.folders import JUDGED
from ppl_vae.verdicts import Row, Verdict
from ppl_vae.verdicts.methods import _ladder, _timed
from ppl_vae.verdicts.table import as_row

FEW = "--chains 3 --distributions 12 --leapfrog 2 --subset 5 --compile off"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "vae"
    line = f"train --quiet --no-film --epochs 2 --hidden 8 --limit 60 --latent 3 --out {path}"
    assert main(shlex.split(line)) == 0
    return path


def evaluate(folder, options, capsys):
    capsys.readouterr()
    code = main(shlex.split(f"evaluate {folder} {options}"))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out, json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def test_annealing_gives_what_the_function_gives(folder, capsys):
    out, found = evaluate(folder, f"--method annealed {FEW} --seed 2", capsys)
    run = pv.load_run(folder)
    settings = pv.Annealing(chains=3, distributions=12, leapfrog=2)
    exact = pv.annealed(run.program, run.images().test.x[:5], settings, seed=2, compile="off")
    row = found["nats_per_datum"]["AIS, 3 x 12"]
    assert row["mean"] == pytest.approx(exact.mean)
    assert row["direction"] == "lower"
    assert row["seconds"] > 0
    assert row["warnings"] == list(exact.warnings)
    assert f"{exact.mean:.3f} ± {exact.mean_stderr:.3f}" in out
    assert found["annealing"] == {**settings.__dict__, "chunk": 100, "size": 5}
    with Image.open(folder / "figures" / "annealing.png") as picture:
        assert min(picture.size) > 300


def test_all_methods_in_one_table(folder, capsys):
    out, found = evaluate(folder, f"--method all --particles 30 {FEW}", capsys)
    rows = found["nats_per_datum"]
    assert list(rows) == [
        "ELBO",
        "rate",
        "distortion",
        "L_30",
        "-L_30",
        "AIS, 3 x 12",
        "AIS - L_30",
        "simulated: AIS, 3 x 12",
        "simulated: reverse AIS, 3 x 12",
        "simulated: gap",
        "approximation gap",
        "amortisation gap",
        "refined L_1000",
    ]
    assert "not to be had" not in out
    upper, lower = rows["simulated: reverse AIS, 3 x 12"], rows["simulated: AIS, 3 x 12"]
    assert (upper["direction"], lower["direction"]) == ("upper", "lower")
    assert rows["simulated: gap"]["mean"] == pytest.approx(upper["mean"] - lower["mean"])
    total = rows["approximation gap"]["mean"] + rows["amortisation gap"]["mean"]
    with (folder / "per_datum.csv").open(newline="") as file:
        data = list(csv.DictReader(file))
    assert len(data) == 60  # of which five were annealed
    assert data[5]["AIS"] == ""
    gap = sum(float(row["AIS"]) - float(row["ELBO"]) for row in data[:5]) / 5
    error = math.sqrt(sum(float(row["ELBO stderr"]) ** 2 for row in data[:5])) / 5
    assert abs(total - gap) < 5 * error  # the ELBO by other draws
    assert sum(float(row["L_30"]) for row in data) / 60 == pytest.approx(rows["L_30"]["mean"])
    assert {"L_30 khat", "L_30 ess", "AIS acceptance"} <= set(data[0])
    with (folder / "results.csv").open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table) == list(rows)
    assert float(table["L_30"]["mean"]) == rows["L_30"]["mean"]
    assert table["rate"]["seconds"] == ""
    assert {p.name for p in (folder / "figures").iterdir()} >= {*JUDGED}
    assert found["khat"]["threshold"] == pytest.approx(1 - 1 / math.log10(30))
    assert f"k-hat above {1 - 1 / math.log10(30):.2f} for" in out
    assert "dimensions not calibrated" in out


def test_what_a_program_does_not_have_is_told_and_the_rest_is_done(tmp_path, capsys):
    path = tmp_path / "r"
    line = f"train --quiet --no-film --epochs 1 --hidden 8 --limit 40 --compile off --posterior point --out {path}"
    assert main(shlex.split(line)) == 0
    out, found = evaluate(path, f"--method all {FEW}", capsys)
    assert "a guide of points, which has no bound" in out
    assert "gaps: not to be had, the guide draws points" in out
    assert "AIS, 3 x 12" in found["nats_per_datum"]  # from the prior, which needs no guide


def test_warnings_are_printed_under_the_table_and_kept():
    doubts = ("k-hat is above 0.7 for 9.0% of the data; do this",)
    row = Row("L_9", -3.0, 0.1, math.nan, "lower", "tighter", 1.0, doubts)
    verdict = Verdict([row])
    assert str(verdict).splitlines()[1] == "  warning: L_9: k-hat is above 0.7 for 9.0% of the data; do this"
    assert verdict.results["nats_per_datum"]["L_9"]["warnings"] == doubts


def test_what_was_not_computed_for_a_datum_is_left_empty(tmp_path):
    long, short = (Estimate(torch.arange(n).double(), torch.zeros(n), "lower") for n in (3, 2))
    verdict = Verdict()
    verdict.add("a", long)
    verdict.add("b", short)
    (written,) = verdict.write(tmp_path)
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["b"] for row in rows] == ["0.0", "1.0", ""]
    assert [row["datum"] for row in rows] == ["0", "1", "2"]


def test_data_that_fail_are_told_and_the_rest_is_shown():
    def judge(values):
        found = Estimate(torch.tensor(values).double(), torch.zeros(len(values)), "lower", name="L_9")
        return lambda: whole(found, found)

    verdict = Verdict()
    found, seconds = _timed(verdict, judge([1.0, math.nan, 3.0]))
    assert seconds >= 0
    assert as_row(found, "some").mean == 2.0
    (line,) = verdict.lines
    assert line.startswith("warning: data: L_9 of row 1 is nan")
    _timed(verdict, judge([1.0, math.nan, 3.0]))
    assert len(verdict.lines) == 1  # once is enough
    with pytest.raises(pv.IncompleteError):
        _timed(verdict, judge([math.nan, math.nan]))


def test_files_of_an_earlier_verdict_do_not_stay_beside_those_of_the_next(tmp_path):
    (tmp_path / "figures").mkdir()
    old = [tmp_path / "per_datum.csv", tmp_path / "results.csv", *(tmp_path / "figures" / name for name in JUDGED)]
    mine = tmp_path / "figures" / "samples.png"
    for path in (*old, mine):
        path.write_text("old")
    verdict = Verdict([Row("L_9", -3.0, 0.1, math.nan, "lower", "tighter")])
    assert verdict.write(tmp_path) == [tmp_path / "results.csv"]
    assert [path.name for path in old if path.exists()] == ["results.csv"]
    assert mine.exists()


def test_efforts_of_a_curve():
    assert _ladder(5000) == [1, 10, 100, 1000, 5000]
    assert _ladder(1) == [1]
    assert _ladder(1000, least=10) == [10, 100, 1000]
