"""Runs of the command line that were cut off, and went on."""

import csv
import signal
import warnings

import pytest

from ppl_vae.cli import main
from ppl_vae.loop import Loop

TRAIN = ["train", "--data", "digits", "--limit", "150", "--epochs", "5", "--latent", "3", "--hidden", "8"]
TRAIN += ["--binarise", "redraw", "--likelihood", "bernoulli", "--warm-up", "20", "--schedule", "cosine"]
TRAIN += ["--compile", "off", "--quiet", "--device", "cpu"]


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture
def cut(monkeypatch):
    """Cut the next run off when so many epochs are done, some steps into the one after."""

    def at(epochs, how):
        step, steps = Loop.call, []

        def call(self, moment, *args):
            if moment == "on_step" and self.run.epoch == epochs:
                steps.append(self.run.step)
                if len(steps) == 2:
                    monkeypatch.setattr(Loop, "call", step)
                    how()
            step(self, moment, *args)

        monkeypatch.setattr(Loop, "call", call)

    return at


def kill():
    raise Killed


def rows(folder):
    """metrics.csv without times."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def same(first, second):
    """Whether two runs ended in the same weights, history and film."""
    for name in ("weights.safetensors", "figures/film.gif"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert rows(first) == rows(second)


@pytest.mark.parametrize("resume", ["last", "auto"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path, cut, resume):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*TRAIN, "--out", str(whole)]) == 0
    cut(3, kill)
    with pytest.raises(Killed):
        main([*TRAIN, "--out", str(broken)])
    assert rows(broken) == rows(whole)[:3]
    assert main(["train", "--resume", resume, "--out", str(broken), "--quiet"]) == 0
    same(whole, broken)
    assert main([*TRAIN, "--resume", "auto", "--out", str(broken)]) == 0  # there is nothing left to do
    same(whole, broken)


def test_a_prior_over_codes_goes_on(tmp_path, cut):
    first, whole, broken = (str(tmp_path / name) for name in ("first", "whole", "broken"))
    shared = ["--epochs", "4", "--compile", "off", "--quiet", "--device", "cpu", "--no-film"]
    codes = ["--data", "digits", "--limit", "120", "--model", "vqvae", "--channels", "8", "--codebook", "6"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of so few steps, and a collapsed codebook
        assert main(["train", *codes, *shared, "--out", first]) == 0
    prior = ["train", "--codes", first, "--prior", "pixelcnn", "--depth", "1", "--prior-width", "4", *shared]
    assert main([*prior, "--out", whole]) == 0
    cut(2, kill)
    with pytest.raises(Killed):
        main([*prior, "--out", broken])
    assert main(["train", "--resume", "last", "--out", broken, "--quiet"]) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_a_run_that_is_asked_to_terminate_saves_and_says_how_to_go_on(tmp_path, cut, capsys):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    before = signal.getsignal(signal.SIGTERM)
    cut(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert main([*TRAIN, "--out", str(ended)]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"go on with: ppl-vae train --out {ended} --resume last" in capsys.readouterr().out
    assert (ended / "weights.safetensors").exists()
    assert main([*TRAIN, "--out", str(whole)]) == 0
    assert main(["train", "--out", str(ended), "--resume", "last", "--quiet"]) == 0
    same(whole, ended)


def test_auto_starts_where_there_is_no_run(tmp_path):
    assert main([*TRAIN, "--epochs", "1", "--resume", "auto", "--out", str(tmp_path / "run")]) == 0
    assert len(rows(tmp_path / "run")) == 1


def test_a_damaged_checkpoint_is_named_and_gone_back_from_on_request(tmp_path, cut, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main([*TRAIN, "--out", str(whole)])
    cut(3, kill)
    with pytest.raises(Killed):
        main([*TRAIN, "--out", str(broken)])
    newest = max((broken / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["train", "--resume", "last", "--out", str(broken), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "epoch-000003.safetensors is damaged" in told
    assert "resume 'auto' goes back to epoch-000002.safetensors" in told
    with pytest.warns(UserWarning, match=r"going on from epoch-000002.safetensors: .*epoch-000003.safetensors is"):
        assert main(["train", "--resume", "auto", "--out", str(broken), "--quiet"]) == 0
    same(whole, broken)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "last"], "resume: say which run to go on with, --out RUN"),
        (["--resume", "last", "--out", "{}/none"], "run: no run folder at"),
        (["--resume", "last", "--out", "{}/run", "--latent", "9"], "resume: latent is 3 in"),
        (["--resume", "sometimes", "--out", "{}/run"], "invalid choice: 'sometimes'"),
        (["--out", "{}/run"], "holds a run already"),
    ],
)
def test_what_cannot_go_on_is_refused_and_left_alone(tmp_path, capsys, flags, message):
    main([*TRAIN, "--epochs", "1", "--out", str(tmp_path / "run")])
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["train", "--quiet", *(flag.format(tmp_path) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_force_forgets_the_checkpoints_of_the_run_it_replaces(tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert main([*TRAIN, *out]) == 0
    assert main([*TRAIN, "--epochs", "1", "--force", *out]) == 0
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        f"epoch-00000{n}.safetensors" for n in (0, 1)
    ]
