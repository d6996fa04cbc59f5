"""The command line: what a new user types, and what comes back when it is wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppl_vae as pv
from ppl_vae.cli import main

SMALL = "--quiet --no-film --epochs 2 --hidden 8 --limit 40"
NAMES = ("train", "evaluate", "sample", "plot", "info")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Trained runs: a VAE, and a CVAE of pictures of cats and dogs."""
    base = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = base / "pets" / ("cat", "dog")[i % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path / f"{i}.png")
    assert main(f"train {SMALL} --out {base / 'vae'}".split()) == 0
    assert main(f"train {SMALL} --data {base / 'pets'} --model cvae --out {base / 'cvae'}".split()) == 0
    return base


@pytest.fixture
def here(folders, tmp_path, monkeypatch):
    """A working folder with copies of the runs."""
    for name in ("vae", "cvae"):
        shutil.copytree(folders / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, capsys):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = main(shlex.split(line))
    return code, *capsys.readouterr()


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def process(*words, module=False):
    """Start the command as a user's shell would."""
    program = [sys.executable, "-m", "ppl_vae"] if module else [str(Path(sys.executable).with_name("ppl-vae"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


# ---- what works


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"example: ppl-vae {name}" in text
    options = text[text.index("options:") :]
    for flag in set(re.findall(r"\[(--[a-z-]+)", text)):
        line = re.search(rf"^  (?:-\w, )?{flag}\b.*(?:\n {{10,}}.*)*", options, re.M)
        assert line, f"{flag} is not explained"
        words = re.sub(r"\{.*?\}|-\S+|[A-Z]+", "", line[0]).split()
        assert len(words) >= 2, f"{flag}: {line[0]!r}"


def test_versions(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ppl-vae {pv.__version__}\n"
    code, out, _ = run("info", capsys)
    assert code == 0
    assert re.search(rf"^torch +{re.escape(torch.__version__.split('+')[0])}", out, re.M)
    assert re.search(r"^device +(cpu|cuda)", out, re.M)


def test_train_reports_what_it_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("latent = 3\nepochs = 50\n")
    code, out, err = run(f"train --config c.toml {SMALL}", capsys)
    assert (code, err) == (0, "")
    assert "all epochs done: 2 epochs, 2 steps" in out  # the flag, not the file
    kept = re.search(r"kept epoch (\d): train (\S+), valid (\S+) ± (\S+) nats per datum", out)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-vae-\d{8}-\d{6}", folder.name)
    assert f"ppl-vae evaluate runs/{folder.name}" in out
    rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    assert float(kept[3]) == pytest.approx(rows["valid"].max(), abs=1e-3)
    assert json.loads((folder / "run.json").read_text())["config"]["latent"] == 3


def test_own_data_are_not_written_beside(here, folders, capsys):
    before = tree(folders)
    assert run(f"train {SMALL} --data {folders / 'pets'}", capsys)[0] == 0
    assert tree(folders) == before
    assert [p.name.split("-")[0] for p in (here / "runs").iterdir()] == ["pets"]


@pytest.mark.parametrize("name", ["vae", "cvae"])
def test_evaluate(here, capsys, name):
    code, out, err = run(f"evaluate {name} --particles 25 --chunk 10 --split train --limit 30 --seed 3", capsys)
    assert (code, err) == (0, "")
    rows = dict(re.findall(r"^  (\S+) +(-?[\d.]+ ± [\d.]+)", out, re.M))
    assert list(rows) == ["ELBO", "rate", "distortion", "L_25", "-L_25"]
    shown = {key: [float(part) for part in row.split(" ± ")] for key, row in rows.items()}
    assert shown["ELBO"][0] == pytest.approx(-(shown["rate"][0] + shown["distortion"][0]), abs=2e-3)
    assert shown["-L_25"] == [-shown["L_25"][0], shown["L_25"][1]]
    assert len(re.findall(r"\(draws ± \d", out)) == 3  # of both bounds
    found = json.loads((here / name / "results.json").read_text(), parse_constant=pytest.fail)
    nats = {key: value["mean"] for key, value in found["nats_per_datum"].items()}
    assert nats["ELBO"] == pytest.approx(-(nats["rate"] + nats["distortion"]), rel=1e-6)
    for key, (mean, stderr) in shown.items():
        assert nats[key] == pytest.approx(mean, abs=6e-4)
        assert found["nats_per_datum"][key]["stderr"] == pytest.approx(stderr, abs=6e-4)
    directions = {key: value["direction"] for key, value in found["nats_per_datum"].items()}
    assert directions == {
        "ELBO": "lower",
        "rate": "unbiased",
        "distortion": "unbiased",
        "L_25": "lower",
        "-L_25": "upper",
    }
    made = pv.load_run(here / name)
    columns = made.images().train[:30].columns
    exact = pv.log_likelihood(made.program, columns, 25, chunk=10, seed=3)
    assert nats["L_25"] == pytest.approx(exact.mean, rel=1e-9)
    stderr = found["nats_per_datum"]["L_25"]["monte_carlo_stderr"]
    assert stderr == pytest.approx(exact.monte_carlo_stderr, rel=1e-6)
    assert [found[k] for k in ("split", "size", "particles", "chunk", "seed")] == ["train", 30, 25, 10, 3]


@pytest.mark.parametrize(
    ("settings", "told", "figures"),
    [
        (
            "--model semi-supervised --labelled 20",
            ["log p(x), relaxed labels of 40", "accuracy: 0."],
            {"labels", "latent"},
        ),
        ("--model deep-markov --latent 3", ["z8 "], {"samples", "reconstructions"}),
        ("--model ladder --levels 3 --path --latent 4", ["z3 "], {"samples", "plane"}),
        (
            "--posterior point --latent 3",
            ["a guide of points, which has no bound", "squared error"],
            {"samples", "plane"},
        ),
        ("--likelihood logistic --data {levels}", ["bits/dim"], {"samples", "plane"}),
        ("--binarise dequantise --data {levels}", ["bits/dim"], {"samples", "plane"}),
        ("--posterior one-hot --estimator enumerated --latent 3", ["active units: z"], {"samples", "latent"}),
        ("--likelihood poisson --model sized --data {counts}", ["log p(x | sum) of"], {"curves", "latent"}),
    ],
    ids=lambda value: value.split(" --data")[0] if isinstance(value, str) else "",
)
def test_every_kind_of_program_from_training_to_pictures(tmp_path, monkeypatch, capsys, settings, told, figures):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("levels.npy", rng.integers(0, 256, (50, 4, 4), dtype=np.uint8))
    np.save("counts.npy", rng.poisson(5.0, (50, 6)))
    settings = settings.format(levels="levels.npy", counts="counts.npy")
    assert run(f"train {SMALL} --compile off {settings} --out r", capsys)[::2] == (0, "")
    code, out, err = run("evaluate r --particles 3 --compile off", capsys)
    assert (code, err) == (0, "")
    assert all(words in out for words in told), out
    found = json.loads(Path("r/results.json").read_text(), parse_constant=pytest.fail)
    assert ("nats_per_datum" in found) == ("point" not in settings)
    drawn = {path.stem for path in Path("r/figures").iterdir()}
    assert figures <= drawn
    assert ("plane" in drawn) == ("plane" in figures)  # only where any point of it is a code of a whole picture
    code, out, err = run("sample r -n 20 --noise", capsys)
    assert (code, err) == (0, "")
    drawn = np.load("r/figures/drawn.npy")
    assert len(drawn) == 20
    assert np.isfinite(drawn).all()
    if bits := found.get("bits_per_dimension"):
        dims, noise = 16, "dequantise" in settings
        nats = found["nats_per_datum"]["-L_3"]["mean"]
        assert bits["mean"] == pytest.approx(nats / dims / np.log(2) + 8 * noise, rel=1e-6)
        assert bits["direction"] == "upper"
        assert ("bits/dim" in found["nats_per_datum"]) is False


def test_evaluate_one_datum_with_one_particle(here, capsys):
    code, out, err = run("evaluate vae --particles 1 --limit 1", capsys)
    assert (code, err) == (0, "")
    assert "active units: needs two data" in out
    found = json.loads((here / "vae" / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["nats_per_datum"]["L_1"]["stderr"] is None
    assert found["nats_per_datum"]["L_1"]["monte_carlo_stderr"] is None


def test_evaluate_other_data(here, capsys):
    rng = np.random.default_rng(1)
    np.savez("moved.npz", x=rng.random((50, 8, 8)))
    np.savez("wide.npz", x=rng.random((50, 9, 8)))
    code, out, _ = run("evaluate vae --particles 2 --data moved.npz", capsys)
    assert code == 0
    assert "5 test data of moved" in out
    code, _, err = run("evaluate vae --particles 2 --data wide.npz", capsys)
    assert (code, err) == (
        2,
        "ppl-vae: error: data: pictures of wide.npz have shape (9, 8), those of the run (8, 8)\n",
    )


def test_sample(here, capsys):
    code, out, err = run("sample vae -n 7 --seed 5", capsys)
    assert (code, err, out) == (0, "", "vae/figures/drawn.png\nvae/figures/drawn.npy\n")
    means = np.load("vae/figures/drawn.npy")
    made = pv.load_run("vae")
    assert np.array_equal(means, pv.sample(made.program, 7, mean=True, seed=5).numpy())
    assert run("sample vae -n 7 --seed 5 --noise --out noisy.pdf", capsys)[0] == 0
    noisy = np.load("noisy.npy")
    assert np.array_equal(noisy, pv.sample(made.program, 7, seed=5).numpy())
    assert not np.array_equal(noisy, means)
    assert Path("noisy.pdf").stat().st_size > 1000


def test_sample_labels(here, capsys):
    assert run("sample cvae --out each.png", capsys)[0] == 0
    made = pv.load_run("cvae")
    labels = torch.tensor([0] * 8 + [1] * 8)
    assert np.array_equal(np.load("each.npy"), pv.sample(made.program, 16, labels, mean=True).numpy())
    assert run("sample cvae --label dog -n 4 --out dog.png", capsys)[0] == 0
    dogs = pv.sample(made.program, 4, torch.ones(4, dtype=torch.long), mean=True)
    assert np.array_equal(np.load("dog.npy"), dogs.numpy())
    for size in (1, 2, 3):
        assert run(f"sample cvae -n {size} --out few.png", capsys)[0] == 0
        assert np.load("few.npy").shape == (size, 90)


def test_plot_draws_again(here, capsys):
    shutil.rmtree("vae/figures")
    code, out, _ = run("plot vae", capsys)
    assert code == 0
    names = [f"vae/figures/{n}.png" for n in ("curves", "reconstructions", "latent", "plane", "samples")]
    assert out.split() == names
    assert all(Path(name).stat().st_size > 1000 for name in names)


def test_info_of_a_run(here, capsys):
    code, out, _ = run("info cvae", capsys)
    assert code == 0
    made = pv.load_run("cvae")
    assert f"{sum(p.numel() for p in made.program.parameters()):,} parameters" in out
    assert re.search(r"^  hidden +8$", out, re.M)
    assert re.search(r"^  latent +2  \(default\)$", out, re.M)
    assert "shape (3, 6, 5)" in out
    assert re.search(r"^  steps +eager$", out, re.M)


# ---- what does not

MISTAKES = {
    "": "the following arguments are required: COMMAND; see ppl-vae --help",
    "fly": "invalid choice: 'fly'",
    "evaluate": "the following arguments are required: RUN; see ppl-vae evaluate --help",
    "train --latnt 3": "unknown argument: --latnt 3; did you mean --latent?",
    "train --lat 3": "unknown argument: --lat 3",
    "train --latent three": "argument --latent: invalid int value: 'three'",
    "train --likelihood poison": "argument --likelihood: invalid choice: 'poison'",
    "train --epochs 0": "epochs must be at least 1, got 0",
    "train --particles 0": "particles must be at least 1, got 0",
    "train --hidden 0": "hidden must be at least 1",
    "train --objective iwae --beta 2": "beta and warm_up",
    "train --likelihood bernoulli": "binarise the data",
    "train --data none.npz": "no such file, and no known name: 'none.npz'",
    "train --data nan.npz": "row 3, pixel 1 (nan) is NaN",
    "train --data rank.npz": "got shape (9,)",
    "train --data empty.npz": "is empty, of shape (0, 4)",
    "train --data cut.npz": "cannot read cut.npz",
    "train --data bare.npz --model cvae": "cvae needs labelled data",
    "train --config none.toml": "cannot read none.toml",
    "train --config typo.toml": "typo.toml: unknown key 'latnet'; did you mean 'latent'?",
    "train --config type.toml": "type.toml: latent must be a whole number, got '3'",
    "train --device abacus": "device: 'abacus' is not to be had here; there is cpu",
    "train --out vae": "vae holds a run already; choose another folder, or --force to replace it",
    "train --out file/run": "cannot write to file/run",
    "train --out /proc/run": "cannot write to /proc/run",
    "evaluate nowhere": "no run folder at nowhere",
    "evaluate vae --particles 0": "argument --particles: must be a whole number, at least 1, got 0",
    "evaluate vae --chunk 0": "argument --chunk: must be a whole number, at least 1, got 0",
    "evaluate vae --limit -5": "argument --limit",
    "evaluate vae --seed -1": "argument --seed",
    "evaluate vae --split all": "argument --split: invalid choice: 'all'",
    "evaluate vae --device abacus": "device: 'abacus' is not to be had here",
    "evaluate vae more": "unknown argument: more",
    "sample nowhere": "no run folder at nowhere",
    "sample cvae --label cow": "unknown label 'cow'; the run knows cat, dog",
    "sample vae --label 3": "label: this run's model is not conditioned on one",
    "sample vae -n 0": "argument --size/-n: must be a whole number, at least 1, got 0",
    "sample vae --out numbers.npy": "out must end in .png, .pdf or .svg",
    "sample vae --out none/x.png": "cannot write none/x.png",
    "sample vae --out file/x.png": "cannot write file/x.png",
    "plot nowhere": "no run folder at nowhere",
    "plot vae --data bare.npz": "have shape (2, 2), those of the run (8, 8)",
    "info file": "no run folder at file",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(here, capsys, line):
    x = np.random.default_rng(0).random((40, 4))
    np.savez("bare.npz", x=x)
    np.savez("nan.npz", x=np.where(np.arange(160).reshape(40, 4) == 13, np.nan, x))
    np.savez("rank.npz", x=x[:9, 0])
    np.savez("empty.npz", x=x[:0])
    (here / "cut.npz").write_bytes((here / "bare.npz").read_bytes()[:200])
    (here / "typo.toml").write_text("latnet = 3")
    (here / "type.toml").write_text('latent = "3"')
    (here / "file").write_text("")
    before = tree(here)
    code, out, err = run(line, capsys)
    assert code == 2
    assert out == ""
    assert err.startswith("ppl-vae: error: ")
    assert MISTAKES[line] in err
    assert err.count("\n") == 1
    assert tree(here) == before
    assert not (here / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("line", ["train --device cuda --out new", "evaluate vae --device cuda:1"])
def test_cuda_that_is_not_there(here, capsys, line):
    before = tree(here)
    code, _, err = run(line, capsys)
    assert code == 2
    assert re.fullmatch(r"ppl-vae: error: device: 'cuda(:1)?' is not to be had here; there is cpu\n", err)
    assert tree(here) == before


@pytest.mark.parametrize("command", ["evaluate", "sample", "plot", "info"])
@pytest.mark.parametrize("name", ["run.json", "weights.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "cut", "garbage"])
def test_a_damaged_run_is_one_line(here, capsys, command, name, harm):
    path = here / "vae" / name
    content = {"cut": path.read_bytes()[:100], "garbage": b"\x80\x04garbage"}.get(harm)
    path.unlink() if content is None else path.write_bytes(content)
    before = tree(here)
    code, out, err = run(f"{command} vae", capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"ppl-vae: error: run: .*\n", err)
    assert tree(here) == before


def test_numbers_gone_wrong(tmp_path, capsys):
    code, out, err = run(f"train {SMALL} --learning-rate 1e18 --out {tmp_path / 'run'}", capsys)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"ppl-vae: failed: the .*objective became \S+ a.* step \d.* saved in .*run\.\n", err)
    assert all(torch.isfinite(p).all() for p in pv.load_run(tmp_path / "run").program.parameters())


def test_too_little_memory(here, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried much")

    monkeypatch.setattr("ppl_vae.cli.load_run", full)
    assert run("info vae", capsys) == (1, "", "ppl-vae: failed: CUDA out of memory. Tried much\n")


def test_interrupting_keeps_what_there_is(tmp_path):
    folder = tmp_path / "run"
    words = "train --quiet --epochs 100000 --limit 100 --hidden 8 --out"
    started = process(*words.split(), str(folder))
    until = time.monotonic() + 300
    metrics = folder / "metrics.csv"
    while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size > 200):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    try:
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()  # one that does not stop would train for hours
    assert started.returncode == 130, err
    assert err == ""
    assert re.search(r"^interrupted: \d+ epochs, ", out, re.M)
    assert re.search(r"^kept epoch \d+: .* nats per datum$", out, re.M)
    made = pv.load_run(folder)
    assert pv.elbo(made.program, made.images().test.x).value.isfinite().all()
    assert {"curves.png", "samples.png", "film.gif"} <= {p.name for p in (folder / "figures").iterdir()}


def test_module_and_command_are_one(tmp_path):
    started = [process("evaluate", str(tmp_path), module=module) for module in (True, False)]
    told = [(*p.communicate(timeout=60), p.returncode) for p in started]
    assert told[0] == told[1]
    error = f"ppl-vae: error: run: no run folder at {tmp_path} (No such file or directory: run.json)\n"
    assert told[0] == ("", error, 2)


def test_more_memory_than_there_is(tmp_path, capsys):
    line = f"train --quiet --no-film --hidden 10000000 10000000 --out {tmp_path / 'run'}"
    code, _, err = run(line, capsys)
    assert (code, err) == (1, "ppl-vae: failed: too little memory for settings as large\n")
    assert not (tmp_path / "run").exists()


def test_a_reader_that_leaves(here):
    shown = process("info", str(here / "vae"))
    shown.stdout.close()
    assert shown.wait(timeout=60) == 1
    assert shown.stderr.read() == ""
    shown.stderr.close()


@pytest.mark.data
@pytest.mark.parametrize(
    "settings", ["--likelihood bernoulli --binarise redraw --objective iwae --particles 5", ""]
)
def test_mnist(tmp_path, real_data, capsys, settings):
    folder = tmp_path / "run"
    line = f"train --quiet --epochs 1 --limit 2000 --data mnist --data-dir {real_data} {settings} --out {folder}"
    assert run(line, capsys)[0] == 0
    code, out, _ = run(f"evaluate {folder} --particles 10 --limit 500", capsys)
    assert code == 0
    assert "500 test data of mnist" in out
