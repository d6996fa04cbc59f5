"""What a run folder tells of how the run came about, and runs that repeat it."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

import ppl_vae as pv
from ppl_vae.cli import main
from ppl_vae.data import Split
from ppl_vae.records import circumstances, data_checksum

TRAIN = ["train", "--data", "digits", "--epochs", "2", "--hidden", "8", "--compile", "off", "--no-film"]
TRAIN += ["--quiet", "--device", "cpu"]


def test_the_checksum_is_of_every_pixel_label_and_split():
    images = pv.digits()
    wanted = data_checksum(images)
    assert data_checksum(pv.digits()) == wanted
    x, y = images.valid.x.clone(), images.test.y.clone()
    x[3, 5] += 0.5
    y[7] = (y[7] + 1) % 10
    others = [
        replace(images, valid=Split(x, images.valid.y)),
        replace(images, test=Split(images.test.x, y)),
        replace(images, train=Split(images.train.x)),
        replace(images, train=images.valid, valid=images.train),
    ]
    assert len({wanted, *map(data_checksum, others)}) == 5


def test_the_commit_is_that_of_the_working_folder(tmp_path, monkeypatch):
    images, device = pv.digits(), torch.device("cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert circumstances(images, device)["commit"] is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert circumstances(images, device)["commit"] == head
    (tmp_path / "file").write_text("two")
    assert circumstances(images, device)["commit"] == f"{head}, with changes"
    monkeypatch.setenv("PATH", "")
    assert circumstances(images, device)["commit"] is None


def test_a_run_tells_how_it_came_about_and_is_repeated(tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main([*TRAIN, "--limit", "150", "--latent", "3", "--out", first]) == 0
    made = json.loads((tmp_path / "first/run.json").read_text())["made"]
    assert made["data"] == data_checksum(pv.data.subset(pv.digits(), 150))
    assert made["threads"] == torch.get_num_threads()
    assert made["device"] == "cpu"
    capsys.readouterr()
    assert main(["info", first]) == 0
    told = capsys.readouterr().out
    for value in (made["started"], made["command"], made["data"], f"torch {made['versions']['torch']}"):
        assert value in told
    assert main(["train", "--like", first, "--out", second, "--quiet"]) == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_a_run_like_another_may_differ_where_it_is_told_to(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    main([*TRAIN, "--limit", "150", "--latent", "3", "--out", first])
    assert main(["train", "--like", first, "--latent", "4", "--limit", "100", "--out", second, "--quiet"]) == 0
    held = pv.load_run(second).config
    assert (held.latent, held.limit, held.hidden) == (4, 100, (8,))


@pytest.mark.parametrize("flags", [["--like", "{}/run"], ["--resume", "last"]])
def test_data_that_have_changed_are_refused(tmp_path, capsys, flags):
    record = tmp_path / "run/run.json"
    assert main([*TRAIN, "--limit", "150", "--out", str(record.parent)]) == 0
    held = json.loads(record.read_text())
    held["made"]["data"] = "0" * 64
    record.write_text(json.dumps(held))
    out = record.parent if "--resume" in flags else tmp_path / "other"
    assert main(["train", *(flag.format(tmp_path) for flag in flags), "--out", str(out), "--quiet"]) == 2
    assert f"data: digits is not what {record.parent} was trained on" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_run_that_went_on_tells_when(tmp_path):
    out = str(tmp_path / "run")
    main([*TRAIN, "--limit", "150", "--out", out])
    before = json.loads((tmp_path / "run/run.json").read_text())["made"]
    main(["train", "--resume", "last", "--out", out, "--quiet"])
    made = json.loads((tmp_path / "run/run.json").read_text())["made"]
    assert len(made.pop("resumed")) == 1
    assert made == before
