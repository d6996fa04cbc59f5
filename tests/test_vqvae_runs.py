"""VQ-VAEs in two stages from the command line: codes, then a prior over them, in folders that stand alone."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppl_vae as pv
from ppl_vae.cli import main
from ppl_vae.coding import code_indices, code_length
from ppl_vae.config import Config, build
from ppl_vae.runs import load_run, second_stage, train_run
from ppl_vae.verdicts.methods import CODED

SMALL = "--quiet --limit 60 --compile off --epochs 2"
VQVAE = "--model vqvae --channels 16 --codebook 8 --code-width 4 --learning-rate 0.003"
PRIOR = "--prior gated-pixelcnn --depth 1 --prior-width 8 --quiet --compile off --epochs 2"
DRAWN = {"codes.png", "curves.png", "reconstructions.png", "samples.png"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both stages, of digits in grids of 4 x 4 codes, with films; a VAE."""
    base = tmp_path_factory.mktemp("runs")
    assert main(f"train {SMALL} {VQVAE} --out {base / 'codes'}".split()) == 0
    assert main(f"train {PRIOR} --codes {base / 'codes'} --out {base / 'prior'}".split()) == 0
    assert main(f"train {SMALL} --no-film --hidden 8 --out {base / 'vae'}".split()) == 0
    return base


@pytest.fixture
def here(folders, tmp_path, monkeypatch):
    """A working folder with copies of the runs."""
    shutil.copytree(folders, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def run(line, capsys):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = main(shlex.split(line))
    return code, *capsys.readouterr()


def metrics(folder):
    return np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)


def results(folder):
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


# ---- two stages
def test_the_first_stage_learns_codes_under_a_uniform_prior(folders):
    rows, made = metrics(folders / "codes"), load_run(folders / "codes")
    assert isinstance(made.program.prior.prior, pv.UniformCodes)
    assert made.program.posterior.codebook.codes == 8
    assert (rows["valid"][1] > rows["valid"][0]).all()
    assert ((rows["perplexity"] >= 1) & (rows["perplexity"] <= 8)).all()
    assert ((rows["usage"] > 0) & (rows["usage"] <= 1)).all()
    grids = code_indices(made.program, made.images().test.x)["z"]
    assert grids.shape == (60, 4, 4)


def test_the_second_stage_changes_the_prior_alone(folders):
    first, second = load_run(folders / "codes"), load_run(folders / "prior")
    held, own = first.program.state_dict(), second.program.state_dict()
    kept = [name for name in held if not name.startswith("prior.")]
    assert len(kept) > 8
    assert all(torch.equal(held[name], own[name]) for name in kept)
    begun = build(second.config, second.shape).prior.state_dict()
    learned = second.program.prior.state_dict()
    assert sum(not torch.equal(learned[name], begun[name]) for name in begun) > len(begun) / 2
    taken = {"model", "channels", "codebook", "code_width", "limit", "likelihood"}
    assert all(getattr(second.config, name) == getattr(first.config, name) for name in taken)
    assert second.config.learning_rate == 1e-3  # how to train is not taken over


def test_metrics_of_the_second_stage_are_those_of_codes(folders):
    made = load_run(folders / "prior")
    rows = metrics(folders / "prior")
    assert "usage" not in rows.dtype.names
    valid = code_indices(made.program, made.images().valid.x)["z"]
    exact = made.program.prior.prior().log_prob(valid).detach()
    assert rows["valid"].max() == pytest.approx(float(exact.mean()), abs=1e-4)
    assert float(exact.mean()) > -16 * math.log(8)  # fewer nats than under the uniform prior


def test_a_second_stage_stands_alone(here, capsys):
    shutil.rmtree("codes")
    code, out, err = run("evaluate prior --limit 40 --compile off", capsys)
    assert (code, err) == (0, "")
    assert run("sample prior -n 5", capsys)[0] == 0
    made = load_run(here / "prior")
    assert np.array_equal(np.load("prior/figures/drawn.npy"), pv.sample(made.program, 5, mean=True).numpy())
    shutil.rmtree("prior/figures")
    assert run("plot prior", capsys)[0] == 0
    assert {path.name for path in Path("prior/figures").iterdir()} == DRAWN
    code, out, _ = run("info prior", capsys)
    assert "prior: vqvae of digits, shape (8, 8)" in out
    assert re.search(r"^  prior +gated-pixelcnn$", out, re.M)


@pytest.mark.parametrize(("prior", "levels"), [("pixelcnn", 0), ("pixelcnn++", 3)])
def test_every_prior_over_codes_is_learned_and_drawn_from(here, capsys, prior, levels):
    line = f"train --codes codes --prior {prior} --depth 1 --prior-width 8 --epochs 1 --quiet --no-film --out new"
    code, out, err = run(f"{line} --compile off", capsys)
    assert (code, err) == (0, "")
    assert "nats per datum, of its codes" in out
    net = load_run(here / "new").program.prior.prior.net
    depth = 0
    level = getattr(net, "level", None)
    while level is not None:
        depth, level = depth + 1, level.inside
    assert depth == levels  # 4 x 4, 2 x 2, 1 x 1
    assert run("sample new -n 3", capsys)[0] == 0


def test_pixelcnn_plus_plus_takes_the_levels_that_its_grid_has():
    for shape, channels, levels in (((28, 28), (4, 4), 1), ((28, 28), (4,), 2), ((32, 32), (4, 4), 3)):
        made = Config(model="vqvae", prior="pixelcnn++", channels=channels, depth=1, prior_width=4)
        level, depth = build(made, shape).prior.prior.net.level, 0
        while level is not None:
            level, depth = level.inside, depth + 1
        assert depth == levels


def test_both_stages_at_once(tmp_path, capsys):
    line = f"train {SMALL} {VQVAE} --no-film {PRIOR} --out {tmp_path / 'joint'}"
    assert run(line, capsys)[::2] == (0, "")
    made = load_run(tmp_path / "joint")
    rows = metrics(tmp_path / "joint")
    assert rows["usage"].max() <= 1
    exact = code_length(made.program, made.images().test.x)
    assert exact.per_code.mean != pytest.approx(3.0, abs=1e-6)


def test_the_same_settings_give_the_same_prior(folders, tmp_path):
    values = {"codes": folders / "codes", "prior": "gated-pixelcnn", "depth": 1, "prior_width": 8}
    config = Config(**second_stage({**values, "epochs": 2, "compile": "off", "film": False}))
    _, made = train_run(config, tmp_path / "again", progress=False)
    kept = load_run(folders / "prior").program.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in made.program.state_dict().items())
    assert not made.program.posterior.codebook.training


# ---- what is found
@pytest.mark.parametrize("name", ["codes", "prior"])
def test_evaluate_tells_bits_of_codes_and_pixels(here, capsys, name):
    code, out, err = run(f"evaluate {name} --limit 40 --compile off", capsys)
    assert (code, err) == (0, "")
    found, made = results(here / name), load_run(here / name)
    x = made.images().test.x[:40]
    with torch.no_grad():
        z = made.program.posterior(x)
        log_prior = made.program.prior().log_prob(z.vectors)
        log_pixels = made.program.likelihood(z.vectors).log_prob(x)
    nats = {key: row["mean"] for key, row in found["nats_per_datum"].items()}
    assert nats["ELBO"] == pytest.approx(float((log_prior + log_pixels).mean()), rel=1e-4)
    assert nats["rate"] == pytest.approx(-float(log_prior.mean()), rel=1e-4)
    assert found["nats_per_datum"]["ELBO"]["direction"] == "lower"
    assert list(nats) == ["ELBO", "rate", "distortion"]
    bits = {key: value["mean"] for key, value in found["bits"].items()}
    assert bits["codes"] == pytest.approx(nats["rate"] / math.log(2))
    assert bits["pixels"] == pytest.approx(nats["distortion"] / math.log(2))
    assert bits["per_code"] == pytest.approx(bits["codes"] / 16)
    assert (bits["per_code"] == pytest.approx(3.0)) == (name == "codes")
    assert found["codes"]["perplexity"] == pytest.approx(pv.perplexity(z.indices, 8))
    assert found["codes"]["usage"] == pytest.approx(pv.usage(z.indices, 8))
    assert "active_units" not in found
    assert found["particles"] == 1
    assert "pixels have a density, so theirs are relative" in out
    assert "perplexity" in out


def test_evaluate_tells_bits_per_dimension_of_levels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("levels.npz", x=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
    settings = f"{SMALL} {VQVAE} --no-film --data levels.npz --likelihood logistic"
    assert run(f"train {settings} --out run", capsys)[0] == 0
    code, out, _ = run("evaluate run --compile off", capsys)
    assert code == 0
    found = results(tmp_path / "run")
    bits = (found["bits"]["codes"]["mean"] + found["bits"]["pixels"]["mean"]) / 192
    assert found["bits_per_dimension"]["mean"] == pytest.approx(bits)
    assert "relative" not in out
    with Image.open("run/figures/codes.png") as picture:
        assert np.asarray(picture.convert("HSV"))[..., 1].max() > 100  # maps in colour


def test_methods_that_need_draws_or_slopes_are_refused_and_told_in_lines(here, capsys):
    for name in ("annealed", "sandwich"):
        code, _, err = run(f"evaluate codes --method {name}", capsys)
        assert code == 2
        assert "method: annealing moves latents along slopes, and codes have none" in err
    code, out, err = run("evaluate codes --method all --limit 20 --compile off", capsys)
    assert (code, err) == (0, "")
    assert re.findall(r"^  (\w+): not to be had, method: ", out, re.M) == [*CODED][1:]
    assert "ELBO" in out


@pytest.mark.parametrize("name", ["codes", "prior"])
def test_figures_and_the_film(folders, name):
    figures = folders / name / "figures"
    assert {path.name for path in figures.iterdir()} == DRAWN | {"film.gif"}
    for file in DRAWN:
        with Image.open(figures / file) as picture:
            grey = np.asarray(picture.convert("L"))
        assert min(grey.shape) > 50
        assert grey.std() > 5
    with Image.open(figures / "film.gif") as film:
        frames = []
        for i in range(film.n_frames):
            film.seek(i)
            frames.append(np.asarray(film.convert("L")).astype(float))
    assert len(frames) == 3  # before training, and two epochs
    top = frames[0].shape[0] // 8, frames[0].shape[0] * 2 // 3  # inputs and reconstructions, under the caption
    same = np.array_equal(frames[0][slice(*top)], frames[-1][slice(*top)])
    assert same == (name == "prior")  # of the second stage, draws alone change
    assert not np.array_equal(frames[0][top[1] :], frames[-1][top[1] :])


def test_a_collapsed_codebook_is_told_at_the_end(tmp_path):
    made = Config(
        model="vqvae", channels=(4,), codebook=64, code_width=2, commitment=1e4, limit=40, epochs=1, film=False,
        learning_rate=0.5, compile="off",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="usage: .* codes are in use, .* collapsed"):
        train_run(made, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "figures" / "codes.png").exists()


# ---- what is refused
MODEL = {
    "posterior": ("point", "convolutions and a codebook instead; leave posterior out"),
    "latent": (3, "leave latent out"),
    "hidden": ((8,), "leave hidden out"),
    "estimator": ("vimco", "trained by the pathwise elbo, its codes being certain; leave estimator out"),
    "objective": ("iwae", "leave objective out"),
    "particles": (5, "leave particles out"),
    "beta": (2.0, "leave beta out"),
    "kl": ("sampled", "leave kl out"),
    "penalise": ("mmd", "leave penalise out"),
    "prior": ("standard", "must be one of uniform, pixelcnn, gated-pixelcnn, pixelcnn\\+\\+"),
    "likelihood": ("poisson", "is of pictures, and 'poisson' of counts"),
    "labelled": (10, "has no labels to hide"),
    "conditioning": ("film", "is given no condition"),
    "path": (True, "has no levels to go along"),
}


@pytest.mark.parametrize("name", MODEL)
def test_what_does_not_go_with_codes_says_why(name):
    value, message = MODEL[name]
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        Config(model="vqvae", **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook": 16}, "codebook is of codes and the prior over them, and model 'vae' has none"),
        ({"commitment": 1.0, "model": "ladder"}, "commitment is of codes"),
        ({"prior": "pixelcnn"}, "'pixelcnn' is over codes, of model 'vqvae' or of a run given as codes"),
        ({"model": "vqvae", "codebook": 0}, "codebook must be at least 1"),
    ],
)
def test_settings_of_codes_for_programs_without(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_pictures_that_cannot_be_halved_so_often():
    with pytest.raises(ValueError, match="8 x 8 pixels cannot be halved 4 times"):
        build(Config(model="vqvae", channels=(4, 4, 4, 4)), (8, 8))


MISTAKES = {
    "--codes nowhere --prior pixelcnn": "run: no run folder at nowhere",
    "--codes vae --prior pixelcnn": "codes: vae is a run of model 'vae', which has none",
    "--codes codes": "prior: say which to learn on codes, one of pixelcnn, gated-pixelcnn, pixelcnn++; got None",
    "--codes codes --prior uniform": "prior: say which to learn on codes",
    "--codes codes --prior vamp": "must be one of uniform, pixelcnn, gated-pixelcnn, pixelcnn++",
    "--codes codes --prior pixelcnn --model vae": "model is 'vqvae' in codes, whose codes are taken; got 'vae'",
    "--codes codes --prior pixelcnn --codebook 9": "codebook is 8 in codes, whose codes are taken; got 9",
    "--codes codes --prior pixelcnn --limit 30": "limit is 60 in codes",
    "--codes codes --prior pixelcnn --channels 16 8": "whose codes are taken; got [16, 8]",
    "--codes codes --prior pixelcnn --out vae": "vae holds a run already",
    "--codes codes --prior pixelcnn --depth 0": "depth must be at least 1, got 0",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(here, capsys, line):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    code, out, err = run(f"train --quiet {line}", capsys)
    assert (code, out) == (2, "")
    assert err.startswith("ppl-vae: error: ")
    assert MISTAKES[line] in err
    assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_a_config_at_odds_with_the_run_of_its_codes(folders, tmp_path):
    made = Config(
        model="vqvae", prior="pixelcnn", codes=folders / "codes", channels=(16,), codebook=8, code_width=5
    )
    with pytest.raises(ValueError, match=r"limit is 60 in .*codes, whose codes are taken; got None"):
        train_run(made, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_second_stage_in_a_file(here, capsys):
    (here / "prior.toml").write_text(
        'codes = "codes"\nprior = "pixelcnn"\ndepth = 1\nprior_width = 8\nepochs = 9\n'
    )
    line = "train --config prior.toml --epochs 1 --quiet --no-film --compile off --out new"
    assert run(line, capsys)[::2] == (0, "")
    held = load_run(here / "new").config
    assert (held.model, held.codebook, held.epochs) == ("vqvae", 8, 1)


def test_axes_list_the_new_rows(capsys):
    out = run("info --axes", capsys)[1]
    for name in ("vqvae", "uniform", "pixelcnn", "gated-pixelcnn", "pixelcnn++"):
        assert re.search(rf"^  {re.escape(name)} +\w", out, re.M)
    assert re.search(r"^code_updates: .*\n  averaged, learned$", out, re.M)
