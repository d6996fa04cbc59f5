"""Run folders: whole or not there, loaded without executing anything, and drawn for every kind of data."""

import csv
import json
import math
import os
import pickle
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ppl_vae as pv
from ppl_vae import figures, folders, runs
from ppl_vae.config import Config
from ppl_vae.figures import draw_figures
from ppl_vae.folders import write_json
from ppl_vae.runs import load_run, train_run
from ppl_vae.train import NonFiniteError

SMALL = {"hidden": (8,), "epochs": 2, "limit": 40, "film": False}
PLAIN = {"curves.png", "latent.png", "plane.png", "reconstructions.png", "samples.png"}


def go(folder, force=False, **settings):
    return train_run(Config(**{**SMALL, **settings}), folder, force=force, progress=False)


def files(folder):
    """Every file of a folder with its bytes, less TensorBoard's."""
    paths = [p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def images(path, shape, labels=None, count=60, dtype="float32"):
    """An npz file of random pictures."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *shape)).astype("uint8") if dtype == "uint8" else rng.random((count, *shape))
    np.savez(path, x=x, **({} if labels is None else {"y": np.array([*labels] * (count // len(labels)))}))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a film, and what training returned."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "run"
    return *go(folder, film=True, epochs=3), folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained[2], tmp_path / "copy")


def kept_after(*epochs):
    """The checkpoints of these epochs."""
    return {f"checkpoints/epoch-{epoch:06d}.safetensors" for epoch in epochs}


def test_the_folder_is_complete(trained):
    run, _, folder = trained
    expected = {"run.json", "weights.safetensors", "metrics.csv"} | {f"figures/{n}" for n in PLAIN}
    assert set(files(folder)) == expected | {"figures/film.gif"} | kept_after(2, 3)
    assert (folder / "tensorboard").exists() == (find_spec("tensorboard") is not None)
    with (folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == run.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    record = json.loads((folder / "run.json").read_text())
    assert record["shape"] == [8, 8]
    assert record["classes"] == [str(i) for i in range(10)]
    assert record["made"]["versions"]["ppl-vae"] == pv.__version__
    others_may_read = (folder / "run.json").stat().st_mode
    assert (folder / "weights.safetensors").stat().st_mode == others_may_read


def test_loading_gives_back_the_run(trained):
    _, made, folder = trained
    loaded = load_run(folder)
    assert (loaded.config, loaded.shape, loaded.classes) == (made.config, made.shape, made.classes)
    state = made.program.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in loaded.program.state_dict().items())
    x = loaded.images().test.x[:3]
    assert torch.equal(pv.reconstruct(loaded.program, x), pv.reconstruct(made.program, x))


def test_same_settings_same_numbers(trained, tmp_path):
    run, made, _ = trained
    again, other = go(tmp_path / "again", film=True, epochs=3)
    timed = {"seconds", "per_second"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in again.history] == [
        {k: v for k, v in row.items() if k not in timed} for row in run.history
    ]
    state = made.program.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in other.program.state_dict().items())
    differently, _ = go(tmp_path / "seed", epochs=3, seed=1)
    assert differently.history[0]["train"] != run.history[0]["train"]


def test_weights_kept_are_those_of_the_best_epoch(tmp_path):
    # So large a step that epochs beyond some point are worse.
    run, made = go(tmp_path / "run", epochs=8, learning_rate=0.3, patience=3)
    best = max(run.history, key=lambda row: row["valid"])
    assert run.best_epoch == best["epoch"] < run.epoch
    assert "3 epochs" in run.reason or run.epoch == 8
    valid = made.images().valid.x
    kept = pv.elbo(load_run(tmp_path / "run").program, valid, particles=200).mean
    assert kept == pytest.approx(best["valid"], abs=6 * best["valid_stderr"])
    assert kept > run.history[-1]["valid"]


def test_a_batch_of_one_has_no_norm_over_the_batch(tmp_path):
    for size, limit in ((1, 20), (19, 20)):
        with pytest.raises(ValueError, match=f"20 data in batches of {size} leave one"):
            go(tmp_path / "run", norm="batch", batch_size=size, limit=limit)
    assert not (tmp_path / "run").exists()


def test_schedules_of_a_run(tmp_path):
    """Steps are counted from 0: each has the weight of the schedule at its number."""
    run, _ = go(tmp_path / "cycles", beta=0.5, warm_up=3, cycle=5, epochs=5)  # a step each
    assert run.step == 5
    assert float(run.objective.beta) == 0.5  # the fifth rests, the sixth would start anew
    run, _ = go(tmp_path / "again", beta=0.5, warm_up=3, cycle=5, epochs=6)
    assert float(run.objective.beta) == 0.0
    settings = {"penalise": "capacity", "penalty_target": 8.0, "penalty_rise": 10}
    run, _ = go(tmp_path / "capacity", **settings, epochs=6)
    assert float(run.objective.penalties[0].target) == 4.0


def test_warm_up_ends_at_beta(tmp_path):
    run, _ = go(tmp_path / "run", beta=0.5, warm_up=2, epochs=4)
    assert float(run.objective.beta) == 0.5
    run, _ = go(tmp_path / "long", beta=1.0, warm_up=100)
    assert float(run.objective.beta) == pytest.approx((run.step - 1) / 100)


REFUSED = {
    "grey pixels": ({"likelihood": "bernoulli"}, "binarise the data"),
    "no such data": ({"data": "nowhere.npz"}, "no such file"),
    "no such device": ({"device": "abacus"}, "device"),
    "no labels": ({"data": "plain.npz", "model": "cvae"}, "labelled"),
    "wrong rank": ({"data": "rank.npz"}, "got shape"),
    "NaN": ({"data": "nan.npz"}, "NaN"),
    "empty": ({"data": "empty.npz"}, "empty"),
    "pickle": ({"data": "pickle.npz"}, "never loaded"),
    "grey test": ({"data": "grey_test.npz", "likelihood": "bernoulli"}, "got 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_leaves_nothing_behind(copy, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    images("plain.npz", (4, 4))
    np.savez("rank.npz", x=np.zeros(5))
    np.savez("nan.npz", x=np.full((50, 4), np.nan))
    np.savez("empty.npz", x=np.zeros((0, 4)))
    bits = np.random.default_rng(0).random((50, 4)) > 0.5
    np.savez("grey_test.npz", x_train=bits, x_valid=bits, x_test=np.full((5, 4), 0.5))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1, 2]))
    settings, message = REFUSED[case]
    before = set(tmp_path.iterdir()), files(copy)
    for folder in (tmp_path / "new", copy):
        with pytest.raises(ValueError, match=message):
            go(folder, force=True, **{"limit": None, **settings})
    assert (set(tmp_path.iterdir()), files(copy)) == before


def test_a_folder_in_use_is_left_alone(copy, tmp_path):
    before = files(copy)
    with pytest.raises(ValueError, match=r"holds a run already; .*--force"):
        go(copy)
    assert files(copy) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all my work")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        go(tmp_path / "thesis", force=True)
    assert files(tmp_path / "thesis") == {"chapter.txt": b"all my work"}


def test_force_replaces_a_run_and_nothing_else(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "results.json").write_text("{}")
    (copy / "figures" / "mine.png").write_bytes(b"")
    go(copy, force=True, model="cvae")
    kept = {"run.json", "weights.safetensors", "metrics.csv", "notes.txt", "figures/mine.png"}
    drawn = {f"figures/{n}.png" for n in ("curves", "latent", "reconstructions", "labels")}
    assert set(files(copy)) == kept | drawn | kept_after(1, 2)
    assert load_run(copy).config.model == "cvae"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_unwritable_folder(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to"):
        go(tmp_path / place)
    assert files(tmp_path) == {"file": b""}


@pytest.mark.parametrize("existed", [False, True])
def test_stopped_before_there_are_weights(tmp_path, monkeypatch, existed):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_fit", interrupted)
    if existed:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "tensorboard").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", force=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_clearing_was_cut_off_is_still_taken_for_a_run(copy, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.Checkpoints, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            go(copy, force=True)
    assert not (copy / "weights.safetensors").exists()
    go(copy, force=True)
    assert load_run(copy).config == Config(**SMALL)


def test_what_a_kill_leaves_of_a_first_file_is_no_obstacle(tmp_path):
    (tmp_path / ".run.json.123.part").write_text('{"format": 1')
    go(tmp_path)
    assert ".run.json.123.part" not in files(tmp_path)


def test_numbers_gone_wrong_leave_the_last_good_weights(tmp_path):
    with pytest.raises(NonFiniteError, match="likely cause"):
        go(tmp_path / "run", learning_rate=1e18, film=True)
    loaded = load_run(tmp_path / "run")
    assert all(torch.isfinite(v).all() for v in loaded.program.state_dict().values())
    drawn = {path.name for path in draw_figures(loaded, loaded.images())}
    assert drawn == PLAIN - {"curves.png"}  # no epoch was done


def edit(**values):
    """A change of run.json; None deletes a key."""

    def change(folder):
        held = json.loads((folder / "run.json").read_text()) | values
        held = {k: v for k, v in held.items() if v is not None}
        (folder / "run.json").write_text(json.dumps(held))

    return change


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def other_weights(folder):
    state = load_file(folder / "weights.safetensors")
    save_file({f"other.{name}": value for name, value in state.items()}, folder / "weights.safetensors")


def wider_weights(folder):
    state = load_file(folder / "weights.safetensors")
    save_file(
        {name: torch.zeros(9, *value.shape) for name, value in state.items()}, folder / "weights.safetensors"
    )


DAMAGE = {
    "no record": (lambda f: (f / "run.json").unlink(), "no run folder at"),
    "no folder": (shutil.rmtree, "no run folder at"),
    "cut record": (cut("run.json"), "run.json is damaged"),
    "garbage record": (put("run.json", b"\xff\x00garbage"), "run.json is damaged"),
    "a list": (put("run.json", b"[1]"), "run.json is damaged"),
    "newer format": (edit(format=2), "has format 2, this version reads 1; upgrade"),
    "no format": (edit(format=None), "damaged"),
    "no config": (edit(config=None), "run.json is damaged .*config"),
    "config is a number": (edit(config=3), "run.json is damaged"),
    "unknown setting": (edit(config={"deepness": 3}), "run.json: unknown key 'deepness'"),
    "no shape": (edit(shape=None), "run.json is damaged .*shape"),
    "empty shape": (edit(shape=[]), "run.json is damaged .*shape"),
    "negative shape": (edit(shape=[-8, -8]), "run.json is damaged .*shape"),
    "text for shape": (edit(shape=["8", "8"]), "run.json is damaged .*shape"),
    "numbers for classes": (edit(classes=[1, 2]), "run.json is damaged .*classes"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "no weights at"),
    "cut weights": (cut("weights.safetensors"), "weights.safetensors is damaged"),
    "empty weights": (put("weights.safetensors", b""), "weights.safetensors is damaged"),
    "garbage weights": (put("weights.safetensors", b"garbage" * 100), "weights.safetensors is damaged"),
    "other weights": (other_weights, "another program's weights"),
    "wider weights": (wider_weights, "another program's weights"),
    "another latent": (edit(config={"latent": 5, "hidden": [8]}), "another program's weights"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_runs_are_refused(copy, case):
    harm, message = DAMAGE[case]
    harm(copy)
    with pytest.raises(ValueError, match=rf"^\S*run.*{message}"):
        load_run(copy)


@pytest.mark.parametrize(
    "harm", [lambda f: (f / "metrics.csv").unlink(), cut("metrics.csv"), put("metrics.csv", b"\xff")]
)
def test_damaged_metrics_are_refused_when_drawn(copy, harm):
    harm(copy)
    run = load_run(copy)  # nothing but the curves needs them
    with pytest.raises(ValueError, match=r"metrics.csv is missing or damaged"):
        draw_figures(run, run.images())


class Bomb:
    """Pickled, it runs code where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("saved", ["pickle", "torch"])
def test_nothing_is_ever_unpickled(copy, tmp_path, saved):
    bomb = {"prior.loc": Bomb(tmp_path / "exploded")}
    if saved == "torch":
        torch.save(bomb, copy / "weights.safetensors")
    else:
        (copy / "weights.safetensors").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        load_run(copy)
    np.savez(tmp_path / "bomb.npz", x=np.array([bomb], dtype=object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(bomb))
    for name in ("bomb.npz", "bare.npz"):
        with pytest.raises(ValueError, match="never loaded"):
            go(tmp_path / "run", data=str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()
    np.load(tmp_path / "bomb.npz", allow_pickle=True)["x"]  # the bomb is a real one
    assert (tmp_path / "exploded").exists()


def test_data_that_changed_since(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = images("own.npz", (4, 4), labels="ab")
    _, made = go("run", data=data, model="cvae")
    assert len(made.images().train) == 40
    images("own.npz", (4, 5), labels="ab")
    with pytest.raises(ValueError, match=r"own.npz have shape \(4, 5\), those of the run \(4, 4\)"):
        made.images()
    images("own.npz", (4, 4), labels="abc")
    with pytest.raises(ValueError, match=r"labels \('a', 'b', 'c'\)"):
        made.images()
    (tmp_path / "own.npz").unlink()
    with pytest.raises(ValueError, match="no such file"):
        made.images()
    images("moved.npz", (4, 4), labels="ab")
    assert made.images("moved.npz").name == "moved"


CASES = {
    "one latent": ({"latent": 1}, PLAIN - {"plane.png"}),
    "many latents": ({"latent": 5}, PLAIN),
    "labels": ({"model": "cvae", "latent": 3}, PLAIN - {"plane.png", "samples.png"} | {"labels.png"}),
    "bits": ({"likelihood": "bernoulli", "binarise": "redraw"}, PLAIN),
    "unlabelled": ({"data": "grey.npz"}, PLAIN),
    "colour": ({"data": "colour.npz", "scale": "per-pixel"}, PLAIN),
    "one picture": ({"limit": 1, "latent": 3}, PLAIN - {"latent.png", "plane.png"}),
    "row of pixels": ({"data": "flat.npy", "latent": 1}, PLAIN - {"plane.png"}),
}


@pytest.mark.parametrize("case", CASES)
def test_figures(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    images("grey.npz", (5, 4))
    images("colour.npz", (5, 4, 3), dtype="uint8")
    np.save("flat.npy", np.random.default_rng(0).random((50, 7)))
    settings, expected = CASES[case]
    _, made = go("run", **settings)
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == expected
    for path in (tmp_path / "run" / "figures").iterdir():
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"))
        assert min(grey.shape) > 50
        assert grey.std() > 5, f"{path.name} is blank"
    assert {p.name for p in draw_figures(made, made.images())} == expected


def test_the_plane_of_many_latents_names_its_axes(trained, tmp_path):
    _, many = go(tmp_path / "run", latent=3)
    for run, name in [(many, "principal component 1"), (trained[1], "$z_1$")]:
        plane = figures._inferred(run, run.images())["plane.png"]
        assert plane.axes[0].get_xlabel() == name


def test_the_film_shows_each_epoch_and_ends_with_what_is_kept(tmp_path, monkeypatch):
    captions = []
    frame = runs.Film.take

    def take(self, run, caption):
        captions.append(caption)
        frame(self, run, caption)

    monkeypatch.setattr(runs.Film, "take", take)
    run, _ = go(tmp_path / "run", film=True, epochs=4, learning_rate=0.5)
    assert captions[0] == "before training"
    assert [c.split(":")[0] for c in captions[1:5]] == [f"epoch {i}" for i in range(1, 5)]
    assert run.best_epoch < 4
    assert [c.split(":")[0] for c in captions[5:]] == [f"kept, epoch {run.best_epoch}"]
    with Image.open(tmp_path / "run" / "figures" / "film.gif") as film:
        assert film.n_frames == 6


def test_json_has_no_nan(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": math.nan, "b": {"c": -math.inf, "d": 1.5}, "e": [1, "x"]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
        "e": [1, "x"],
    }
    with pytest.raises(ValueError, match="cannot write"):
        write_json(tmp_path / "none" / "x.json", {})
