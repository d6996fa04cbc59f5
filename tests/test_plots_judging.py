"""Pictures of what judges a model: what is drawn is what was given."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from ppl_vae.estimates import Average, Estimate
from ppl_vae.plots import bounds, calibration, gap_bars, khat_histogram, rate_distortion, save, spectrum


def estimate(mean, stderr=0.1, direction="lower"):
    values = torch.tensor([mean - 1.0, mean, mean + 1.0]).double()
    return Estimate(values, torch.full((3,), stderr).double(), direction)


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_bounds_are_drawn_in_order_of_effort_with_their_errors(tmp_path):
    curves = {
        "importance": [(100, estimate(-5.0)), (1, estimate(-9.0))],
        "reverse": [(10, estimate(-3.0, math.nan, "upper"))],
    }
    figure = bounds(curves)
    (axes,) = figure.axes
    lower, upper = axes.containers
    assert lower.lines[0].get_xdata().tolist() == [1, 100]
    assert lower.lines[0].get_ydata().tolist() == [-9.0, -5.0]
    (segments,) = lower.lines[2]
    # Of three data with errors of 0.1 each; none where none is known.
    assert np.ptp(segments.get_segments()[0][:, 1]) == pytest.approx(4 * 0.1 / math.sqrt(3))
    (segments,) = upper.lines[2]
    assert np.ptp(segments.get_segments()[0][:, 1]) == 0.0
    assert (lower.lines[0].get_marker(), upper.lines[0].get_marker()) == ("^", "v")
    assert axes.get_xscale() == "log"
    assert legend(figure) == ["importance (lower)", "reverse (upper)"]
    assert save(figure, tmp_path / "bounds.png").stat().st_size > 1000


def test_the_histogram_splits_at_the_limit_and_keeps_infinite_values():
    khat = torch.tensor([-math.inf, 0.1, 0.2, 0.69, 0.71, 1.2, math.inf])
    figure = khat_histogram(khat)
    (axes,) = figure.axes
    assert legend(figure) == ["trusted, at most 0.7: 57.1% of 7 data", "in doubt: 42.9% of 7 data"]
    counts = [sum(p.get_height() for p in container) for container in axes.containers]
    assert counts == [4, 3]
    last = max(p.get_x() + p.get_width() for p in axes.containers[0] if p.get_height())
    assert last == pytest.approx(0.7)


def test_parts_of_a_gap_stand_end_to_end():
    rows = {
        "one": {"approximation": Average(2.0, 0.1), "amortisation": Average(1.0, 0.2)},
        "two": {"approximation": Average(0.5, 0.1), "amortisation": Average(3.0, math.nan)},
    }
    figure = gap_bars(rows)
    (axes,) = figure.axes
    first, second = (c for c in axes.containers if hasattr(c, "patches"))
    assert [p.get_width() for p in first] == [2.0, 0.5]
    assert [p.get_x() for p in second] == [2.0, 0.5]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]


def test_lines_outside_the_band_are_marked():
    at = torch.arange(1, 10) / 10
    lines = torch.stack([torch.zeros(9), 0.3 * torch.ones(9), -0.05 * torch.ones(9)], 1)
    band = (-0.1 * torch.ones(9), 0.1 * torch.ones(9))
    figure = calibration(lines, at, band)
    assert legend(figure)[1:] == ["calibrated: 2 of 3 dimensions", "not calibrated: 1 of 3 dimensions"]
    marked = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 9]
    levels = {round(float(line.get_ydata()[0]), 3): to_hex(line.get_color()) for line in marked}
    assert levels[0.3] != levels[0.0] == levels[-0.05]
    other = calibration(lines, at, band, outside=torch.tensor([True, True, True]))
    assert legend(other)[1:] == ["not calibrated: 3 of 3 dimensions"]


def test_the_best_point_lies_on_the_lowest_line():
    points = [(b, Average(30 / b, 0.1), Average(60 + 10 * b, 0.1)) for b in (0.5, 1.0, 2.0)]
    figure = rate_distortion(points)
    (axes,) = figure.axes
    line = axes.lines[0]
    assert np.allclose(line.get_xdata() + line.get_ydata(), 95.0)  # at beta 2
    assert legend(figure) == ["best ELBO −95.00"]
    assert {t.get_text() for t in axes.texts} == {"β = 0.5", "β = 1", "β = 2"}


def test_units_fall_and_those_above_the_threshold_are_counted():
    figure = spectrum({"z": torch.tensor([0.001, 0.9, 0.02, 0.0])})
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == pytest.approx([0.9, 0.02, 0.001, 1e-12])
    assert legend(figure) == ["z: 2 of 4 active", "threshold 0.01"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: bounds({}), "curves: expected at least one estimate"),
        (lambda: bounds({"a": [(0, estimate(1.0))]}), "particles must be at least 1"),
        (lambda: khat_histogram(torch.tensor([[0.1]])), "khat: expected one number per datum"),
        (lambda: khat_histogram(torch.tensor([math.nan])), "khat: expected one number per datum"),
        (lambda: gap_bars({}), "rows: expected the same parts"),
        (
            lambda: gap_bars({"a": {"x": Average(1, 1)}, "b": {"y": Average(1, 1)}}),
            "rows: expected the same parts",
        ),
        (lambda: calibration(torch.zeros(3), torch.zeros(2), (torch.zeros(2),) * 2), "difference: expected"),
        (lambda: rate_distortion([]), "points: there are none"),
        (lambda: spectrum({}), "variance: there are no units"),
        (lambda: spectrum({"z": torch.tensor([-1.0])}), "variance: those of z must be at least 0"),
    ],
)
def test_what_cannot_be_drawn(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
