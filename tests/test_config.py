"""Settings: types, ranges and names are checked wherever they come from, and every choice builds."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch

import ppl_vae as pv
from ppl_vae import config
from ppl_vae.axes import AXES
from ppl_vae.cli import COMMANDS
from ppl_vae.config import Config, build, images_of, objective_of, presented
from ppl_vae.flags import parser
from ppl_vae.train import as_device

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
CHOICES = [  # of the rest: the axes are test_contract's
    (f.name, choice)
    for f in FIELDS.values()
    if f.name not in AXES
    for choice in f.metadata.get("choices", ())
    if choice != "dequantise"  # digits have no 256 levels
]
NEEDS = {
    "labels": {"model": "semi-supervised"},
    "conditioning": {"model": "cvae"},
    "code_updates": {"model": "vqvae", "channels": (4,), "codebook": 8, "hidden": Config().hidden},
}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def flag(name):
    """The command line's flag for a setting."""
    (commands,) = (a for a in parser("", COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    return next(a for a in commands.choices["train"]._actions if a.dest == name)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_flag_that_says_its_default(name):
    action, default = flag(name), FIELDS[name].default
    assert f"--{name.replace('_', '-')}" in action.option_strings
    assert action.help
    assert action.default is None  # not given: the file's value, or the default
    if default is None:
        assert "default" not in action.help or "by default" in action.help
    else:
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        assert f"(default: {shown})" in action.help
    assert list(action.choices or ()) == list(FIELDS[name].metadata.get("choices", ()))


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_file_with_overrides(tmp_path, kind):
    text = {
        "toml": 'latent = 3\nhidden = [16]\nlearning_rate = 1\nscale = 0.5\nfilm = false\nlikelihood = "normal"',
        "json": '{"latent": 3, "hidden": [16], "learning_rate": 1, "scale": 0.5, "film": false}',
    }
    read = Config.from_file(write(tmp_path / f"c.{kind}", text[kind]), latent=5)
    assert read == Config(latent=5, hidden=(16,), learning_rate=1.0, scale="0.5", film=False)
    assert isinstance(read.learning_rate, float)


def test_plain_values_make_the_same_config():
    made = Config(data="x.npz", hidden=(4, 3), clip_norm=2.0, patience=3, likelihood="normal", scale="per-pixel")
    assert Config.from_mapping(json.loads(json.dumps(made.to_dict()))) == made
    assert Config(latent=np.int64(3), beta=np.float32(1), hidden=[8]) == Config(latent=3, hidden=(8,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latnet = 3", "unknown key 'latnet'; did you mean 'latent'"),
        ("[zebra]\nlatent = 3", "unknown key 'zebra'; known are data, .*"),
        ('latent = "3"', "latent must be a whole number, got '3'"),
        ("latent = true", "latent must be a whole number"),
        ("latent = 2.0", "latent must be a whole number"),
        ("hidden = 3", "hidden must be a list of one or more whole numbers"),
        ("hidden = []", "hidden must be a list of one or more whole numbers"),
        ("hidden = [8, 0]", "hidden must be at least 1"),
        ("film = 1", "film must be true or false"),
        ("data = 1", "data must be text"),
        ('beta = "1"', "beta must be a number"),
        ("beta = -1", "beta must be at least 0"),
        ("beta = nan", "beta must be finite"),
        ("learning_rate = inf", "learning_rate must be finite"),
        ("learning_rate = 0", "learning_rate must be above 0"),
        ("clip_norm = 0.0", "clip_norm must be above 0"),
        ("seed = -1", "seed must be at least 0"),
        ("seed = 9223372036854775808", "seed must be below 2\\*\\*63"),
        ('likelihood = "bernouli"', "likelihood: unknown choice 'bernouli'; did you mean 'bernoulli'"),
        ('optimizer = "magic"', "optimizer: unknown choice 'magic'; known are adam, adamw, sgd"),
        ("latent == 3", "no valid TOML"),
    ]
    + [(f"{name} = 0", f"{name} must be at least 1") for name in ("epochs", "particles", "latent", "batch_size")]
    + [(f"{name} = 0", f"{name} must be at least 1") for name in ("limit", "patience")],
)
def test_mistakes_in_a_file_are_named_with_the_file(tmp_path, text, message):
    path = write(tmp_path / "run.toml", text)
    with pytest.raises(ValueError, match=f"run.toml.*{message}"):
        Config.from_file(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "iwae", "beta": 2.0}, "beta and warm_up"),
        ({"objective": "iwae", "warm_up": 10}, "beta and warm_up"),
        ({"cycle": 10}, "give warm_up from 1 to 10, got 0"),
        ({"cycle": 10, "warm_up": 11}, "give warm_up from 1 to 10, got 11"),
        ({"penalty_rise": 5, "penalise": "mmd"}, "raises the nats of penalise 'capacity'"),
        ({"points": (0.0, -0.1)}, "points must be at least 0"),
        ({"points": (0.0, "x")}, "points must be a list of one or more numbers"),
        ({"labelled": 10}, "labelled: model 'vae' has no labels to hide"),
        ({"model": "cvae", "labels": "enumerated"}, "labels: model 'cvae' has no labels to hide"),
        ({"conditioning": "film"}, "model 'vae' is given no condition"),
        ({"model": "belief", "likelihood": "bernoulli", "path": True}, "no path"),
        ({"path": True}, "model 'vae' has no levels to go along"),
        ({"objective": "iwae", "kl": "analytic"}, "kl is the elbo's"),
        ({"points": (0.0, 0.5)}, "points are those of objective 'thermodynamic'"),
        ({"alpha": 0.3}, "alpha is that of objectives"),
        ({"posterior": "point", "objective": "iwae"}, "posterior 'point' has no weights for a bound"),
        ({"posterior": "point", "prior": "vamp"}, "a posterior with a density"),
        ({"likelihood": "logistic", "binarise": "redraw"}, "is of 256 levels; binarise must be 'none'"),
        ({"model": "hierarchical", "penalise": "gradient"}, "is for decoders of one latent"),
        ({"model": "semi-supervised", "penalise": "gradient"}, "is for decoders of one latent"),
        ({"penalise": "decoder-l2", "penalty_site": "z"}, "penalty_site is for penalise mmd"),
        ({"model": "sized"}, "likelihood must be one of counts"),
        ({"model": "sized", "likelihood": "poisson", "binarise": "redraw"}, "and binarise 'none'"),
        ({"model": "belief", "likelihood": "bernoulli", "nets": "conv"}, "model 'belief' is linear"),
        ({"likelihood": "bernoulli", "scale": "0.1"}, "bernoulli has none"),
        ({"scale": "often"}, "scale must be learned, per-pixel, optimal or a positive number"),
        ({"scale": "-1"}, "scale must be"),
        ({"scale": "nan"}, "scale must be"),
        ({"data": ""}, "data must name"),
        ({"latent": "3"}, "latent must be a whole number"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"data = '\xff'")
    for path, message in [
        (tmp_path / "none.toml", "cannot read .*none.toml"),
        (tmp_path, "cannot read"),
        (tmp_path / "latin.toml", "no valid TOML"),
        (write(tmp_path / "cut.json", '{"latent": '), "no valid JSON"),
        (write(tmp_path / "list.json", "[1]"), "must hold keys and values, got a list"),
        (write(tmp_path / "nan.json", '{"beta": NaN}'), "beta must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            Config.from_file(path)


@pytest.mark.parametrize(("name", "choice"), CHOICES)
def test_every_choice_trains_and_is_judged(name, choice):
    settings = {"epochs": 1, "hidden": (8,), "limit": 20, **NEEDS.get(name, {}), name: choice}
    if choice == "enumerated":
        settings["estimator"] = "enumerated"
    made = Config(**settings)
    images = images_of(made)
    program = build(made, images.shape, len(images.classes))
    train, test = (presented(made, split, images.shape) for split in (images.train, images.test))
    before = {n: v.clone() for n, v in program.state_dict().items()}
    schedule = config.SCHEDULES[made.schedule]
    run = pv.fit(
        program,
        train,
        objective=objective_of(made, program, images.shape, 20),
        epochs=1,
        optimizer=lambda p: config.OPTIMIZERS[made.optimizer](p, lr=made.learning_rate),
        scheduler=schedule and (lambda o: schedule(o, T_max=1)),
        progress=False,
        compile=config.COMPILE[made.compile] if made.compile != "require" else "off",  # seconds for nothing new
        precision=config.PRECISIONS[made.precision],
    )
    assert torch.isfinite(torch.tensor(run.history[0]["train"]))
    assert any(not torch.equal(v, before[n]) for n, v in program.state_dict().items())
    assert torch.isfinite(pv.log_likelihood(program, test, particles=3).value).all()


@pytest.mark.parametrize(
    ("scale", "kind", "outputs"),
    [("learned", pv.LearnedScale, 6), ("per-pixel", pv.NetScale, 12), ("0.25", pv.FixedScale, 6)],
)
def test_scale_of_the_normal_likelihood(scale, kind, outputs):
    program = build(Config(scale=scale, latent=3, hidden=(5, 4)), (2, 3))
    assert isinstance(program.likelihood.scale, kind)
    widths = [m.out_features for m in program.likelihood.net.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [4, 5, outputs]  # the encoder's reversed
    if scale == "0.25":
        assert float(program.likelihood(torch.zeros(1, 3)).base_dist.scale.unique()) == 0.25


def test_objectives_take_their_settings():
    made = objective_of(Config(particles=3, beta=0.5, kl="sampled"))
    assert (made.particles, float(made.beta), made.kl, made.bound) == (3, 0.5, "sampled", pv.bounds.elbo)
    made = objective_of(Config(objective="iwae", particles=7))
    assert (made.particles, made.bound) == (7, pv.bounds.iwae)


def test_binarisation():
    split = images_of(Config(limit=50)).train
    grey, cut, drawn, again = (
        presented(Config(binarise=name), split, (8, 8)).present(slice(None))[0]
        for name in ("none", "threshold", "redraw", "redraw")
    )
    assert torch.equal(grey, split.x)
    assert torch.equal(cut, (split.x > 0.5).float())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(drawn, again)  # anew at each presentation
    assert torch.equal(drawn[split.x == 0], split.x[split.x == 0])


def test_labels_are_hidden_from_a_semisupervised_program():
    made = Config(model="semi-supervised", labelled=20, limit=100)
    images = images_of(made)
    (x, y) = presented(made, images.train, images.shape, training=True).columns
    assert torch.equal(x, images.train.x)
    assert y[y >= 0].bincount().tolist() == [2] * 10
    assert torch.equal(y[y >= 0], images.train.y[y >= 0])
    assert presented(made, images.test, images.shape).columns[1].unique().tolist() == [
        -1
    ]  # it is judged by x alone
    with pytest.raises(ValueError, match="labelled: 20 labels are asked for, and 10 training data have one"):
        presented(made, images.train[:10], images.shape, training=True)


def test_counts_come_from_files_as_they_are(tmp_path):
    x = np.random.default_rng(0).poisson(300, (40, 6))
    for dtype in (np.int32, np.float64, np.uint16):
        np.save(tmp_path / "cells.npy", x.astype(dtype))
        made = Config(data=tmp_path / "cells.npy", model="sized", likelihood="negative-binomial", hidden=(4,))
        images = images_of(made)
        assert images.shape == (6,)
        assert sorted(images.train.x.sum(1).tolist() + images.valid.x.sum(1).tolist()) != []
        counts, sums = presented(made, images.test, images.shape).columns
        assert torch.equal(counts.sum(1, keepdim=True), sums)
        assert {
            float(v) for v in torch.cat([s.x for s in (images.train, images.valid, images.test)]).unique()
        } == {float(v) for v in np.unique(x)}
    with pytest.raises(ValueError, match=r"nets: conv takes pictures, and these data have shape \(6,\)"):
        build(dataclasses.replace(made, nets="conv"), images.shape)
    for wrong, why in ((x + 0.5, "is no count"), (-x, "is no count"), (x[..., None], r"must be counts \(N, D\)")):
        np.save(tmp_path / "cells.npy", wrong)
        with pytest.raises(ValueError, match=why):
            images_of(made)


@pytest.mark.parametrize(("levels", "path"), [(1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("model", ["hierarchical", "ladder"])
def test_levels_and_a_path(model, levels, path):
    made = Config(model=model, levels=levels, path=path, latent=8, hidden=(6, 5))
    program = build(made, (4, 4))
    x = torch.rand(7, 16)
    bound = pv.ELBO()(pv.as_pair(program), x)
    assert bound.shape == (7,)
    assert {name: tuple(code.shape) for name, code in pv.encode(program, x).items()} == {
        f"z{level + 1}": (7, 8 >> level) for level in range(levels)
    }
    assert (program.path is not None) == path


def test_a_markov_chain_reads_rows():
    made = Config(model="deep-markov", latent=3, hidden=(6,), limit=30)
    images = images_of(made)
    program = build(made, images.shape)
    data = presented(made, images.test, images.shape)
    assert torch.equal(data.columns[0], images.test.x.reshape(30, 8, 8))
    assert [*pv.encode(program, *data.columns)] == [f"z{t}" for t in range(1, 9)]
    assert pv.sample(program, 4).shape == (4, 8, 8)
    for shape, nets in (((3, 8, 8), "mlp"), ((8, 8), "conv")):
        with pytest.raises(ValueError, match="deep-markov reads grey pictures"):
            build(dataclasses.replace(made, nets=nets), shape)


def test_coupled_channels_need_colour():
    made = Config(likelihood="coupled-logistics", components=2, hidden=(4,))
    assert build(made, (3, 2, 2)).likelihood(torch.zeros(1, 2)).event_shape == (12,)
    with pytest.raises(ValueError, match="coupled channels need pictures in colour"):
        build(made, (2, 2))


@pytest.mark.parametrize("nets", ["mlp", "conv"])
def test_a_condition_modulates_or_is_joined(nets):
    for how, kind in (("film", pv.Modulated), ("concat", pv.Concat if nets == "mlp" else pv.Modulated)):
        program = build(Config(model="cvae", conditioning=how, nets=nets, channels=(4,)), (4, 4), classes=3)
        assert isinstance(program.likelihood.net, kind)
        x = torch.rand(6, 16)
        assert pv.ELBO()(pv.as_pair(program), x, torch.arange(6) % 3).shape == (6,)


def test_temperatures():
    program = build(Config(posterior="relaxed-bernoulli", temperature=0.4), (2, 2))
    assert float(program.posterior.temperature) == pytest.approx(0.4)
    assert float(program.prior.temperature) == pytest.approx(0.3)


def test_points_and_sites_reach_their_objectives():
    made = objective_of(Config(objective="thermodynamic", points=(0.0, 0.5), particles=3))
    assert made.bound.points == (0.0, 0.5)
    for penalise in ("mmd", "total-correlation", "factor", "adversarial"):
        made = Config(model="hierarchical", penalise=penalise, penalty_site="z2", hidden=(4,), latent=4)
        program = build(made, (2, 2))
        goal = objective_of(made, program, (2, 2), 10)
        assert goal.penalties[0].site == "z2"
        pair = pv.as_pair(program)
        for part in goal.parts():  # a critic's too, which must be as wide as the level
            assert part.objective(pair, torch.rand(6, 4)).shape == (6,)
    with pytest.raises(ValueError, match="penalty_site: no critic for site 'y'; there is z, z1, z2"):
        objective_of(dataclasses.replace(made, penalty_site="y"), program, (2, 2), 10)


def test_conditional_model_needs_labels():
    with pytest.raises(ValueError, match="cvae needs labelled data"):
        build(Config(model="cvae"), (8, 8), classes=0)


def test_data_by_name_path_and_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).random((40, 3, 2)))
    for name in (tmp_path / "own.npz", "~/own.npz"):
        images = images_of(Config(data=name, limit=7))
        assert images.shape == (3, 2)
        assert [len(s) for s in (images.train, images.valid, images.test)] == [7, 4, 4]
    with pytest.raises(ValueError, match="no such file, and no known name: 'digit'; did you mean 'digits'"):
        images_of(Config(data="digit"))


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99"])
def test_unknown_devices(name):
    with pytest.raises(ValueError, match=f"device: '{name}' is not to be had here; there is cpu"):
        as_device(name)
    with pytest.raises(ValueError, match="device"):
        pv.fit(build(Config(hidden=(4,)), (2, 2)), torch.rand(8, 4), device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda_here():
    assert as_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' is not to be had"):
        as_device("cuda")
