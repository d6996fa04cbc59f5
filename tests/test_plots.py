import gc
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ppl_vae import plots

DIGITS = (load_digits().data / 16).astype(np.float32)


def shown(fig):
    """The one array on the figure."""
    (image,) = fig.axes[0].get_images()
    return np.asarray(image.get_array())


def at(fig, row, column, count, shape):
    """The picture in a grid of `count` columns, magnified as drawn, found through equal spacing."""
    pixels = shown(fig)
    zoom = max(1, round(72 / max(shape)))
    height, width = shape[0] * zoom, shape[1] * zoom
    gap = max(2, round(0.05 * min(height, width)))
    assert pixels.shape[1] == gap + count * (width + gap)
    top, left = gap + row * (height + gap), gap + column * (width + gap)
    return pixels[top : top + height : zoom, left : left + width : zoom]


def history(train, valid=None, **more):
    columns = {"epoch": range(1, len(train) + 1), "train": train, "valid": valid or [np.nan] * len(train), **more}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def line(axes, label):
    return next(drawn for drawn in axes.get_lines() if drawn.get_label().startswith(label))


# ---- grids


@pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy, lambda a: torch.from_numpy(a).view(-1, 8, 8)])
def test_image_k_stands_at_its_place_upright(as_input):
    fig = plots.image_grid(as_input(DIGITS[:11]), (8, 8), columns=4)
    for k in range(11):
        picture = at(fig, k // 4, k % 4, 4, (8, 8))
        for channel in range(3):
            np.testing.assert_array_equal(picture[..., channel], DIGITS[k].reshape(8, 8))
    assert (at(fig, 2, 3, 4, (8, 8)) == 1.0).all()  # the place of a twelfth stays white
    # What is at the top of the array is at the top of the page.
    low, high = fig.axes[0].get_ylim()
    assert low > high


def test_colour_oblong_and_clipping():
    images = np.random.default_rng(0).uniform(-0.5, 1.5, (4, 3, 5, 9)).astype(np.float32)
    fig = plots.image_grid(images.reshape(4, -1), (3, 5, 9), columns=2)
    picture = at(fig, 1, 0, 2, (5, 9))
    np.testing.assert_array_equal(picture, images[2].transpose(1, 2, 0).clip(0, 1))


def test_small_images_are_magnified_evenly_and_pixel_for_pixel():
    fig = plots.image_grid(DIGITS[:1], (8, 8), columns=1)
    pixels = shown(fig)
    tile = pixels[4:-4, 4:-4, 0]
    np.testing.assert_array_equal(tile, np.kron(DIGITS[0].reshape(8, 8), np.ones((9, 9))))
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., 0]
    wanted = np.round(pixels[..., 0] * 255)
    rows, columns = np.array(page.shape) - wanted.shape
    drawn = [
        np.abs(page[r : r + len(wanted), c : c + wanted.shape[1]] - wanted).max()
        for r in range(rows + 1)
        for c in range(columns + 1)
    ]
    assert min(drawn) <= 1  # the array stands somewhere on the page as it is, not resampled


def test_a_thousand_images_are_one_artist_and_large_ones_are_not_magnified():
    fig = plots.image_grid(DIGITS[:1000], (8, 8), columns=40)
    assert len(fig.axes) == 1
    assert len(fig.axes[0].get_images()) == 1
    assert shown(plots.image_grid(np.zeros((1, 200 * 300)), (200, 300))).shape[:2] == (220, 320)


def test_row_labels_and_title():
    fig = plots.image_grid(DIGITS[:6], (8, 8), columns=3, title="Two rows", row_labels=["first", "second"])
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["first", "second"]
    assert [text.get_text() for text in fig.texts] == ["Two rows"]
    fig.canvas.draw()
    for text in (*fig.axes[0].get_yticklabels(), *fig.texts):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= fig.bbox.width
        assert box.y1 <= fig.bbox.height


@pytest.mark.parametrize(
    ("images", "shape", "options", "message"),
    [
        (DIGITS[:3, :60], (8, 8), {}, r"images must have shape \(N, 64\)"),
        (DIGITS[0], (8, 8), {}, "images must have shape"),
        (DIGITS[:0], (8, 8), {}, "N >= 1"),
        (np.float32(1.0), (8, 8), {}, "images must have shape"),
        (DIGITS[:3], (64,), {}, "shape must be"),
        (DIGITS[:3], (2, 4, 8), {}, "shape must be"),
        (np.where(DIGITS[:3] > 0.9, np.nan, DIGITS[:3]), (8, 8), {}, "NaN"),
        (np.full((3, 64), np.inf), (8, 8), {}, "infinite"),
        (np.full((3, 64), 255, np.uint8), (8, 8), {}, "255"),
        (np.array([["a"] * 64]), (8, 8), {}, "numbers"),
        (DIGITS[:3], (8, 8), {"columns": 0}, "columns must be"),
        (DIGITS[:3], (8, 8), {"columns": 1, "row_labels": ["one"]}, "row_labels"),
    ],
)
def test_bad_images(images, shape, options, message):
    with pytest.raises(ValueError, match=message):
        plots.image_grid(images, shape, **options)


def test_reconstructions_stand_under_their_inputs():
    x, means = DIGITS[:5], 1 - DIGITS[:5]
    fig = plots.reconstructions(x, means, (8, 8), columns=3)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["input", "mean"] * 2
    tops = [round(tick - 35.5) for tick in fig.axes[0].get_yticks()]  # half of 72 pixels above the middle
    pixels = shown(fig)
    for k in range(5):
        left = 4 + (k % 3) * 76
        for row, images in ((0, x), (1, means)):
            top = tops[2 * (k // 3) + row]
            tile = pixels[top : top + 72 : 9, left : left + 72 : 9, 0]
            np.testing.assert_array_equal(tile, images[k].reshape(8, 8))
    assert tops[2] - tops[1] > tops[1] - tops[0]  # pairs stand apart
    with pytest.raises(ValueError, match="4 means for 5 inputs"):
        plots.reconstructions(x, means[:4], (8, 8))


def test_samples_are_a_square_grid():
    assert shown(plots.samples(DIGITS[:9], (8, 8))).shape[:2] == (4 + 3 * 76,) * 2


def test_label_rows_sort_by_label_and_keep_order_within():
    labels = torch.tensor([2, 0, 2, 0, 2])
    fig = plots.label_rows(DIGITS[:5], labels, (8, 8), ["zero", "one", "two"])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["zero", "two"]
    for row, numbers in enumerate(([1, 3], [0, 2, 4])):
        for column, k in enumerate(numbers):
            np.testing.assert_array_equal(at(fig, row, column, 3, (8, 8))[..., 0], DIGITS[k].reshape(8, 8))
    numbered = plots.label_rows(DIGITS[:5], [2.0, 0, 2, 0, 2], (8, 8))
    assert [t.get_text() for t in numbered.axes[0].get_yticklabels()] == ["0", "2"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "one per datum"),
        ([0, 1, 2], "classes names only 0 to 1"),
        ([0, 0.5, 1], "whole"),
        ([0, np.nan, 1], "whole"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        plots.label_rows(DIGITS[:3], np.array(labels), (8, 8), ["a", "b"])


# ---- curves


def test_best_epoch_is_the_highest_validation_bound_seen():
    rows = history([-9.0, -7.0, -5.0, -4.0, -3.0], [-9.5, np.nan, -6.0, -6.5, np.nan], valid_stderr=[0.2] * 5)
    (axes,) = plots.curves(rows).axes
    best = line(axes, "best")
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([3], [-6.0])
    assert best.get_label() == "best: −6.00 ± 0.2, epoch 3"
    np.testing.assert_array_equal(line(axes, "training").get_ydata(), [-9, -7, -5, -4, -3])
    np.testing.assert_array_equal(line(axes, "validation").get_xdata(), [1, 3, 4])
    assert axes.get_ylabel() == "bound (nats per datum)"
    assert axes.get_xlabel() == "epoch"


def test_band_is_one_standard_error_to_each_side():
    rows = history([-3.0, -2.0], [-3.5, -2.5], valid_stderr=[0.25, 0.5])
    (axes,) = plots.curves(rows).axes
    (band,) = axes.collections
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1.0, -3.75), (1.0, -3.25), (2.0, -3.0), (2.0, -2.0)}


def test_without_validation_the_training_curve_is_judged():
    (axes,) = plots.curves(history([-3.0, -1.0, -2.0])).axes
    assert list(line(axes, "best").get_xdata()) == [2]
    assert not axes.collections
    assert not [drawn for drawn in axes.get_lines() if drawn.get_label() == "validation"]


def test_learning_rate_has_a_panel_only_if_it_changes():
    assert len(plots.curves(history([-3.0, -2.0], lr=[1e-3, 1e-3])).axes) == 1
    bounds, rates = plots.curves(history([-3.0, -2.0], lr=[1e-3, 1e-4])).axes
    np.testing.assert_array_equal(rates.get_lines()[0].get_ydata(), [1e-3, 1e-4])
    assert rates.get_ylabel() == "learning rate"
    assert rates.get_xlabel() == "epoch"
    assert bounds.get_title(loc="left")


def test_a_first_epoch_far_below_is_left_out_of_view_and_said_so():
    slow = list(np.linspace(-50, -20, 20))
    (axes,) = plots.curves(history([-5000.0, *slow])).axes
    assert axes.get_ylim()[0] > -60
    assert [text.get_text() for text in axes.texts] == ["not shown: epoch 1, from −5000"]
    (axes,) = plots.curves(history([-55.0, *slow])).axes
    assert axes.get_ylim()[0] < -55
    assert not axes.texts


def test_a_diverged_tail_is_left_out():
    (axes,) = plots.curves(history([-3.0, -2.0, np.nan, -np.inf])).axes
    assert list(line(axes, "best").get_xdata()) == [2]
    assert np.isfinite(axes.get_ylim()).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "empty"), ([{"epoch": 1}], "'train'"), (history([np.nan, np.inf]), "no finite bound")],
)
def test_bad_history(rows, message):
    with pytest.raises(ValueError, match=message):
        plots.curves(rows)


# ---- latent space


@pytest.fixture(scope="module")
def cloud():
    rng = np.random.default_rng(3)
    return rng.normal(size=(300, 6)) * [0.3, 2.0, 1.0, 0.1, 1.5, 0.2] + 4.0


def test_two_dimensions_are_drawn_as_they_are(cloud):
    fig = plots.latent_scatter(torch.from_numpy(cloud[:, :2]))
    (points,) = fig.axes[0].collections
    np.testing.assert_allclose(points.get_offsets(), cloud[:, :2])
    assert (fig.axes[0].get_xlabel(), fig.axes[0].get_ylabel()) == ("$z_1$", "$z_2$")
    assert fig.axes[0].get_legend() is None


def test_more_dimensions_are_projected_as_by_sklearn(cloud):
    reference = PCA(2).fit(cloud)
    fig = plots.latent_scatter(cloud)
    offsets = np.asarray(fig.axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(np.abs(offsets), np.abs(reference.transform(cloud)), atol=1e-8)
    for label, k in ((fig.axes[0].get_xlabel(), 0), (fig.axes[0].get_ylabel(), 1)):
        assert f"component {k + 1} ({100 * reference.explained_variance_ratio_[k]:.1f}% " in label


def test_points_take_the_colour_of_their_label(cloud):
    y = np.arange(300) % 3
    fig = plots.latent_scatter(cloud[:, :2], y, ["a", "b", "c"])
    colours = fig.axes[0].collections[0].get_facecolors()
    assert len(np.unique(colours, axis=0)) == 3
    legend = fig.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    for handle, k in zip(legend.legend_handles, range(3), strict=True):
        wanted = mpl.colors.to_rgb(handle.get_color())
        np.testing.assert_allclose(colours[y == k][:, :3], np.tile(wanted, (100, 1)))


def test_many_classes_get_distinct_colours(cloud):
    y = np.arange(300) % 25
    colours = plots.latent_scatter(cloud[:, :2], y).axes[0].collections[0].get_facecolors()
    assert len(np.unique(colours, axis=0)) == 25


def test_one_dimension_is_a_histogram_for_each_label(cloud):
    fig = plots.latent_scatter(cloud[:, :1], np.arange(300) % 2)
    outlines = [p for p in fig.axes[0].patches if not p.get_fill()]
    assert len(outlines) == 2
    (alone,) = [plots.latent_scatter(cloud[:, :1]).axes[0]]
    assert sum(bar.get_height() for bar in alone.patches) == 300


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros(3), r"\(N, d\)"),
        (np.zeros((0, 2)), r"\(N, d\)"),
        (np.full((3, 2), np.nan), "NaN"),
        (np.zeros((1, 3)), "at least 2"),
    ],
)
def test_bad_codes(z, message):
    with pytest.raises(ValueError, match=message):
        plots.latent_scatter(z)


def test_collapsed_codes_are_drawn_all_the_same():
    assert "0.0%" in plots.latent_scatter(np.ones((5, 3))).axes[0].get_xlabel()


def test_pca_plane_lifts_and_projects(cloud):
    project, lift = plots.pca_plane(cloud)
    reference = PCA(2).fit(cloud)
    coordinates = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 0.5]])
    torch.testing.assert_close(project(lift(coordinates)), coordinates)
    torch.testing.assert_close(
        lift(torch.zeros(1, 2))[0].double(), torch.from_numpy(cloud.mean(0)), atol=1e-5, rtol=0
    )
    # project after lift is the identity, lift after project the nearest point of the plane.
    nearest = reference.inverse_transform(reference.transform(cloud))
    np.testing.assert_allclose(lift(project(torch.from_numpy(cloud))), nearest, atol=1e-5)
    for sign in (1, -1):  # of each axis and its negative the same one is taken
        _, lift = plots.pca_plane(sign * cloud)
        steps = lift(torch.eye(2)) - lift(torch.zeros(2, 2))
        assert (steps.gather(1, steps.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match="2 or more dimensions"):
        plots.pca_plane(cloud[:, :1])


def test_latent_plane_has_z1_to_the_right_and_z2_upward():
    seen = []

    def decode(codes):
        seen.append(codes)
        return torch.stack([torch.special.ndtr(codes[:, 0]), torch.special.ndtr(codes[:, 1])], -1)

    fig = plots.latent_plane(decode, (1, 2), size=5, spread=2.0)
    (codes,) = seen
    assert codes.dtype == torch.float32
    grid = codes.reshape(5, 5, 2)
    torch.testing.assert_close(grid[0, 0], torch.tensor([-2.0, 2.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(grid[-1, -1], torch.tensor([2.0, -2.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(grid[2, 2], torch.zeros(2), atol=1e-4, rtol=0)
    # Equal steps of probability: what decode returned is linear in the column and in the row.
    left, right = torch.special.ndtr(torch.tensor([-2.0, 2.0])).tolist()
    for row in range(5):
        for column in range(5):
            first, second = at(fig, row, column, 5, (1, 2))[0, :, 0]
            assert first == pytest.approx(left + column / 4 * (right - left), abs=1e-5)
            assert second == pytest.approx(right + row / 4 * (left - right), abs=1e-5)
    axes = fig.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["−2.0", "−0.6", "0.0", "0.6", "2.0"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["−2.0", "−0.6", "0.0", "0.6", "2.0"]
    assert axes.get_yticks()[0] > axes.get_yticks()[-1]  # pixel rows run downward: -2 is at the bottom
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")


def test_latent_plane_of_one_and_of_gradients():
    weight = torch.ones(2, 64, requires_grad=True)
    assert len(shown(plots.latent_plane(lambda c: (c @ weight).sigmoid(), (8, 8), size=1))) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size"), ({"spread": -1.0}, "spread"), ({"spread": float("inf")}, "spread")],
)
def test_bad_plane(options, message):
    with pytest.raises(ValueError, match=message):
        plots.latent_plane(lambda c: torch.zeros(len(c), 64), (8, 8), **options)


def test_bad_decoder():
    with pytest.raises(ValueError, match="one picture for each of 225"):
        plots.latent_plane(lambda c: torch.zeros(4, 64), (8, 8))
    with pytest.raises(ValueError, match=r"decode\(codes\) must have shape"):
        plots.latent_plane(lambda c: torch.zeros(len(c), 63), (8, 8))


# ---- film


def test_frames_share_a_size_whatever_the_caption():
    frames = [
        plots.film_frame(DIGITS[:5], DIGITS[5:10], DIGITS[10:22], (8, 8), caption)
        for caption in ("", "epoch 1", "epoch 1000, " * 30)
    ]
    assert {frame.shape for frame in frames} == {frames[0].shape}
    assert frames[0].dtype == np.uint8
    rows = [(frames[0] != frame).any((1, 2)).nonzero()[0] for frame in frames[1:]]
    assert all(len(changed) > 0 and changed.max() < 50 for changed in rows)  # only the line of the caption
    # Even the longest caption ends before the right edge.
    assert (frames[2][:40, -10:] == 255).all()


def test_frame_shows_inputs_reconstructions_and_draws_in_this_order():
    levels = [np.full((3, 64), level, np.float32) for level in (0.2, 0.4, 0.6)]
    frame = plots.film_frame(*levels, (8, 8), "caption")
    rows = [(frame == round(255 * level)).all(-1).sum(1) for level in (0.2, 0.4, 0.6)]
    spans = [(np.flatnonzero(row >= 3 * 48).min(), np.flatnonzero(row >= 3 * 48).max()) for row in rows]
    assert spans[0][1] < spans[1][0] < spans[1][1] < spans[2][0]


def moving(count, colour=False):
    frames = np.zeros((count, 20, 30, 3), np.uint8)
    for k in range(count):
        frames[k, :, k : k + 3] = (40 + 10 * k, 200, 90) if colour else 40 + 10 * k
    return list(frames)


def read(path):
    with Image.open(path) as film:
        out = []
        for k in range(film.n_frames):
            film.seek(k)
            out.append((np.asarray(film.convert("RGB")), film.info["duration"]))
        return out, film.info.get("loop")


def test_film_comes_back_frame_by_frame(tmp_path):
    frames = moving(6)
    written = plots.write_gif(frames, tmp_path / "film.gif", 0.15, 1.5)
    film, loop = read(written)
    assert [duration for _, duration in film] == [150] * 5 + [1500]
    for (back, _), frame in zip(film, frames, strict=True):
        np.testing.assert_array_equal(back, frame)  # grey is kept exactly
    assert loop == 0  # for ever
    assert list(tmp_path.iterdir()) == [written]


def test_equal_frames_are_stored_once_and_shown_as_long(tmp_path):
    a, b = moving(2)
    film, _ = read(plots.write_gif([a, a, a, b, b], tmp_path / "film.gif", 0.1, 1.0))
    assert [duration for _, duration in film] == [300, 1100]


def test_colour_film_keeps_its_colours(tmp_path):
    frames = moving(5, colour=True)
    film, _ = read(plots.write_gif(frames, tmp_path / "film.gif"))
    assert len(film) == 5
    assert np.abs(film[-1][0].astype(int) - frames[-1]).max() <= 8


def test_what_stays_in_a_colour_film_stays_to_the_pixel_and_paper_is_white(tmp_path):
    # Many colours next to white make it hard to keep.
    noise = np.random.default_rng(0).uniform(0.9, 0.99, (2, 4, 3 * 64)).astype(np.float32)
    frames = [plots.film_frame(noise[0], noise[0], noise[1] * k, (3, 8, 8), f"epoch {k}") for k in (0.5, 1.0)]
    (first, _), (last, _) = read(plots.write_gif(frames, tmp_path / "film.gif"))[0]
    assert (first[(frames[0] == 255).all(-1)] == 255).all()
    same = (frames[0] == frames[1]).all(-1)
    np.testing.assert_array_equal(first[same], last[same])
    assert np.abs(last.astype(int) - frames[1]).mean() < 16  # 256 colours for noise, the worst case


def test_real_frames_make_a_readable_film(tmp_path):
    frames = [
        plots.film_frame(DIGITS[:4], DIGITS[:4] * k / 3, DIGITS[4:8] * k / 3, (8, 8), f"epoch {k}")
        for k in range(4)
    ]
    film, _ = read(plots.write_gif(frames, tmp_path / "film.gif"))
    assert len(film) == 4
    np.testing.assert_array_equal(film[-1][0], frames[-1])


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([], {}, "empty"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], {}, "one shape"),
        ([np.zeros((4, 4), np.uint8)], {}, "one shape"),
        ([np.zeros((4, 4, 3))], {}, "uint8"),
        (moving(2), {"seconds_per_frame": 0.0}, "seconds_per_frame"),
        (moving(2), {"hold_last": float("nan")}, "hold_last"),
    ],
)
def test_bad_films_leave_nothing_behind(frames, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.write_gif(frames, tmp_path / "film.gif", **options)
    assert not list(tmp_path.iterdir())


# ---- files and settings


def test_save_writes_png_at_150_dots_per_inch(tmp_path):
    fig = plots.curves(history([-3.0, -2.0]))
    path = plots.save(fig, tmp_path / "curves.png")
    with Image.open(path) as picture:
        assert picture.size == tuple(np.round(fig.get_size_inches() * 150).astype(int))
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert list(tmp_path.iterdir()) == [path]
    assert plots.save(fig, tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_unwritable_paths_and_a_failed_write_leave_the_old_file(tmp_path, monkeypatch):
    fig = plots.image_grid(DIGITS[:1], (8, 8))
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "missing" / "a.png", tmp_path / "file" / "a.png"):
        with pytest.raises(ValueError, match="cannot write"):
            plots.save(fig, path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        plots.save(fig, tmp_path / "folder.png")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plots.save(fig, tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="cannot write"):
        plots.write_gif(moving(2), tmp_path / "missing" / "film.gif")
    old = plots.save(fig, tmp_path / "old.png").read_bytes()

    def full(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(fig), "savefig", full)
    with pytest.raises(ValueError, match="No space left"):
        plots.save(fig, tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png", "old.png"}


def test_no_setting_is_changed_and_none_of_the_callers_is_seen(tmp_path):
    fig = plots.latent_scatter(DIGITS[:50, 20:24])
    here = plots.save(fig, tmp_path / "here.png")
    with mpl.rc_context(
        {
            "axes.facecolor": "black",
            "text.color": "red",
            "xtick.labelsize": 30,
            "ytick.major.size": 20,
            "image.origin": "lower",
        }
    ):
        before = dict(mpl.rcParams)
        dark = plots.latent_scatter(DIGITS[:50, 20:24])
        grid = plots.image_grid(DIGITS[:2], (8, 8), title="x")
        there = plots.save(dark, tmp_path / "there.png")
        assert dict(mpl.rcParams) == before
    assert there.read_bytes() == here.read_bytes()
    assert dark.axes[0].get_facecolor() == fig.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert dark.axes[0].xaxis.label.get_size() == fig.axes[0].xaxis.label.get_size()
    assert grid.axes[0].get_ylim()[0] > grid.axes[0].get_ylim()[1]


def test_pyplot_is_never_imported(tmp_path):
    program = (
        "import sys, numpy as np, ppl_vae.plots as p;"
        "p.save(p.latent_scatter(np.eye(5)), sys.argv[1]);"
        "p.film_frame(np.eye(4), np.eye(4), np.eye(4), (2, 2), 'x');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "x.png"]).returncode == 0


def test_figures_are_not_kept_alive():
    def alive():
        gc.collect()
        return sum(type(thing) is Figure for thing in gc.get_objects())

    before = alive()
    for _ in range(3):
        plots.film_frame(DIGITS[:4], DIGITS[:4], DIGITS[:4], (8, 8), "epoch")
    assert alive() == before


def test_code_maps_show_codes_by_colour_and_how_often_each_is_used():
    x, vectors = DIGITS[:12], torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    indices = torch.randint(5, (12, 4, 4), generator=torch.Generator().manual_seed(1))  # the sixth does not occur
    fig = plots.code_maps(x, indices, vectors, (8, 8), columns=5)
    colours = {}
    for column in range(5):
        assert np.allclose(at(fig, 0, column, 5, (8, 8))[..., 0], x[column].reshape(8, 8))
        drawn = at(fig, 1, column, 5, (8, 8))
        for code, colour in zip(
            indices[column].repeat_interleave(2, 0).repeat_interleave(2, 1), drawn, strict=True
        ):
            for one, rgb in zip(code.tolist(), colour, strict=True):
                colours.setdefault(one, set()).add(tuple(rgb.tolist()))
    assert [len(seen) for seen in colours.values()] == [1] * 5  # one colour for a code, everywhere
    assert len(set.union(*colours.values())) == 5
    counts = indices.flatten().bincount(minlength=6).sort(descending=True).values / indices.numel()
    heights = [bar.get_height() for bar in fig.axes[1].patches]
    assert heights == pytest.approx((100 * counts).tolist())
    shares = counts[counts > 0].double()
    effective = float((-shares * shares.log()).sum().exp())
    assert fig.texts[0].get_text() == f"Codes: 5 of 6 in use, perplexity {effective:.1f}"
    FigureCanvasAgg(fig).draw()


@pytest.mark.parametrize("width", [1, 2, 16])
def test_code_maps_of_any_width_and_of_a_collapsed_codebook(width):
    indices = torch.zeros(3, 2, 2, dtype=torch.int64)
    fig = plots.code_maps(np.zeros((3, 3 * 16)), indices, torch.randn(4, width), (3, 4, 4))
    assert fig.texts[0].get_text() == "Codes: 1 of 4 in use, perplexity 1.0"
    FigureCanvasAgg(fig).draw()


def test_code_maps_of_wrong_sizes_are_refused():
    x, indices, vectors = DIGITS[:3], torch.zeros(3, 2, 2, dtype=torch.int64), torch.randn(4, 2)
    for arguments, why in (
        ((x, indices[:2], vectors, (8, 8)), r"indices: expected 3 grids \(N, h, w\)"),
        ((x, indices[:, 0], vectors, (8, 8)), "indices: expected 3 grids"),
        ((x, indices + 4, vectors, (8, 8)), r"indices must lie in 0 \.\. 3, got 4"),
        ((x, indices, vectors, (8, 8), 0), "columns must be at least 1"),
        ((x, indices, vectors, (8, 9)), "x must have shape"),
    ):
        with pytest.raises(ValueError, match=why):
            plots.code_maps(*arguments)
