"""The film of a run: how many frames, what each shows, and a GIF that can be read."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from small import WIDTH, conditions, cvae, fit, pixels, same, vae, weights

import ppl_vae as pv
from ppl_vae import film as film_module

X, HELD_OUT, SHAPE = pixels(64), pixels(40, seed=1), (3, 4)


class Shown(list):
    """Stands for `film_frame`: keeps what each frame shows, and draws a small one of a new grey."""

    def __call__(self, inputs, reconstructions, draws, shape, caption):
        self.append((inputs, reconstructions.clone(), draws.clone(), tuple(shape), caption))
        return np.full((8, 8, 3), 3 * len(self), np.uint8)


@pytest.fixture
def shown(monkeypatch):
    frames = Shown()
    monkeypatch.setattr(film_module, "film_frame", frames)
    return frames


def filmed(program, path, data=X, valid=None, inputs=None, **options):
    settings = {name: options.pop(name) for name in ("frames", "draws") if name in options}
    film = pv.Film(path, inputs or (HELD_OUT[:5],), SHAPE, **settings)
    return fit(program, data, valid, hooks=[film, *options.pop("hooks", [])], **options)


def test_the_gif_can_be_read_and_holds_every_frame(tmp_path):
    path = tmp_path / "film.gif"
    filmed(vae(), path, epochs=3, draws=4)
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.n_frames == 4  # before training, and three epochs
        first = np.asarray(gif.convert("L"))
        gif.seek(3)
        assert not np.array_equal(first, np.asarray(gif.convert("L")))


@pytest.mark.parametrize(
    ("frames", "epochs", "expected"),
    [(60, 1, [1]), (60, 4, [1, 2, 3, 4]), (1, 4, [1, 4]), (2, 9, [1, 9]), (4, 27, [1, 3, 9, 27])],
)
def test_early_epochs_are_shown_more_densely_and_the_last_always(frames, epochs, expected, shown, tmp_path):
    filmed(vae(), tmp_path / "film.gif", data=X[:4], epochs=epochs, frames=frames)
    captions = [frame[-1] for frame in shown]
    assert captions[0] == "before training"
    assert [int(c.removeprefix("epoch ").split(":")[0]) for c in captions[1:]] == expected


@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_captions_give_the_bound(valid, shown, tmp_path):
    run = filmed(vae(), tmp_path / "film.gif", valid=valid, epochs=2)
    bounds = [f"{row['train' if valid is None else 'valid']:.2f}".replace("-", "−") for row in run.history]
    assert [f[-1] for f in shown[1:]] == [f"epoch {e}: {b} nats per datum" for e, b in enumerate(bounds, 1)]


def test_frames_show_the_inputs_their_reconstructions_and_the_same_prior_draws(shown, tmp_path):
    # At a rate of zero nothing learns: draws and reconstructions must be the same, as their latents are.
    still = partial(torch.optim.SGD, lr=0.0)
    program = vae()
    filmed(program, tmp_path / "film.gif", epochs=3, draws=7, optimizer=still)
    for inputs, reconstructions, draws, shape, _ in shown:
        assert torch.equal(inputs, HELD_OUT[:5])
        assert torch.equal(reconstructions, pv.reconstruct(program, HELD_OUT[:5]))
        assert draws.shape == (7, WIDTH)
        assert torch.equal(draws, shown[0][2])
        assert shape == SHAPE
    # They are means at draws of the prior, seven different ones.
    assert len(torch.unique(shown[0][2], dim=0)) == 7


def test_a_trained_pair_changes_the_pictures(shown, tmp_path):
    filmed(vae(), tmp_path / "film.gif", epochs=2)
    assert not torch.equal(shown[0][1], shown[-1][1])
    assert not torch.equal(shown[0][2], shown[-1][2])


def test_a_conditional_program_draws_with_the_conditions_of_its_inputs(shown, tmp_path):
    program, labels = cvae(), conditions(X)
    filmed(program, tmp_path / "film.gif", (X, labels), inputs=(X[:6], labels[:6]), epochs=1)
    expected = pv.sample(program, 6, labels[:6], mean=True, seed=1)
    assert torch.equal(shown[-1][2], expected)


@pytest.mark.parametrize("draws", [2, 12])
def test_a_program_without_blank_is_filmed(draws, shown, tmp_path):
    program = vae()
    pair = pv.Pair(lambda x: program.model(x), lambda x: program.guide(x))
    filmed(pair, tmp_path / "film.gif", epochs=1, draws=draws)
    assert shown[-1][2].shape == (draws, WIDTH)
    assert torch.equal(shown[-1][2], pv.sample(program, draws, mean=True, seed=1))


def test_filming_does_not_change_the_run(tmp_path):
    plain, watched = vae(), vae()
    fit(plain, X, epochs=2)
    filmed(watched, tmp_path / "film.gif", epochs=2)
    assert same(weights(plain), weights(watched))


def test_a_run_that_ends_early_has_a_film_that_closes_with_what_is_kept(shown, tmp_path):
    worse = partial(torch.optim.SGD, lr=1e-4, maximize=True)
    path = tmp_path / "film.gif"
    options = {"optimizer": worse, "hooks": [pv.EarlyStop(2)], "batch_size": 16, "frames": 2}
    run = filmed(vae(), path, valid=HELD_OUT, epochs=50, objective=pv.ELBO(kl="analytic"), **options)
    assert (run.best_epoch, run.epoch) == (1, 3)
    assert shown[-1][-1] == f"kept, epoch 1: −{-run.best:.2f} nats per datum"
    assert torch.equal(shown[-1][1], pv.reconstruct(run.pair, HELD_OUT[:5]))
    with Image.open(path) as gif:
        assert gif.n_frames == len(shown)


def test_an_interrupted_run_has_its_film(shown, tmp_path):
    class Stop(pv.Hook):
        def on_epoch(self, run):
            if run.epoch == 2:
                raise KeyboardInterrupt

    path = tmp_path / "film.gif"
    assert filmed(vae(), path, epochs=9, hooks=[Stop()]).interrupted
    with Image.open(path) as gif:
        assert gif.n_frames == len(shown) == 3


@pytest.mark.parametrize("settings", [{"frames": 0}, {"draws": 0}, {"frames": -1, "draws": 3}])
def test_a_film_has_frames_and_draws(settings):
    with pytest.raises(ValueError, match="frames and draws must be at least 1"):
        pv.Film("film.gif", (X,), SHAPE, **settings)


def test_a_place_that_is_not_there_is_refused_before_training(tmp_path):
    program = vae()
    with pytest.raises(ValueError, match="there is no folder"):
        filmed(program, tmp_path / "missing" / "film.gif")
    assert same(weights(program), weights(vae()))


def test_pictures_of_another_shape_are_refused_before_training(tmp_path):
    program = vae()
    with pytest.raises(ValueError, match="shape"):
        fit(program, X, hooks=[pv.Film(tmp_path / "film.gif", (HELD_OUT[:5],), (5, 5))])
    assert same(weights(program), weights(vae()))
    assert not list(tmp_path.iterdir())
