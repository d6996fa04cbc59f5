"""The film of a training run: frames of one size, written as an animated GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ppl_vae.files import PathLike, write_whole
from ppl_vae.plots.common import Array, styled
from ppl_vae.plots.images import labelled_page, paired_rows, pictures, text_width, tile

__all__ = ["film_frame", "write_gif"]

Frame = npt.NDArray[np.uint8]

_COLUMNS = 12
_SIDE = 48
_LEAST_WIDTH = 600
_CAPTION = 10.0


@styled
def film_frame(inputs: Array, reconstructions: Array, draws: Array, shape: Sequence[int], caption: str) -> Frame:
    """One frame: fixed inputs over their reconstructions, and below them the means of fixed prior draws.

    The size depends on the number and shape of the images alone, never on the caption, so the frames of a
    run fit together.

    Args:
        inputs: (N, D) in [0, 1].
        reconstructions: (N, D), means of p(x | z).
        draws: (M, D), means for codes drawn once from the prior.
        shape: (H, W) or (C, H, W).
        caption: for example the epoch and the bound; a long one is set smaller.

    Returns:
        Pixels (H, W, 3), uint8.

    Raises:
        ValueError: wrong sizes, NaN, or not as many reconstructions as inputs.
    """
    x, means = pictures(inputs, shape, "inputs"), pictures(reconstructions, shape, "reconstructions")
    prior = pictures(draws, shape, "draws")
    columns = min(_COLUMNS, max(len(x), len(prior)))
    rows, labels = paired_rows(x, means, columns)
    draw_rows = [prior[start : start + columns] for start in range(0, len(prior), columns)]
    mosaic = tile([*rows, *draw_rows], range(2, len(rows) + 1, 2), _SIDE)
    fig = labelled_page(mosaic, " ", [*labels, "prior draw", *[""] * (len(draw_rows) - 1)], _LEAST_WIDTH)
    canvas = FigureCanvasAgg(fig)
    _set_caption(fig, caption)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _set_caption(fig: Figure, caption: str) -> None:
    """Write the caption where `page` left room for a title, no wider than the figure."""
    (title,) = fig.texts
    room = fig.bbox.width * (1 - 2 * title.get_position()[0])
    title.set_text(caption)
    title.set_fontsize(_CAPTION * min(1.0, room / max(1, text_width(caption, _CAPTION, "bold"))))


def write_gif(
    frames: Sequence[Frame],
    path: PathLike,
    seconds_per_frame: float = 0.15,
    hold_last: float = 1.5,
) -> Path:
    """Write frames as an animated GIF that repeats for ever, in one step.

    Grey frames keep every shade; coloured ones share one palette of 256 colours, so that nothing flickers.
    A GIF counts time in hundredths of a second, and frames that equal the one before are stored as that one
    shown for longer: the film lasts as long, with fewer stored frames.

    Args:
        frames: (H, W, 3) uint8, all of one size.
        path: the file to write.
        seconds_per_frame: how long each frame is shown, at least 0.02 (below that viewers slow down).
        hold_last: how long the last frame is shown.

    Returns:
        The path written.

    Raises:
        ValueError: no frames, frames of different sizes or type, a time below 0.02 s, or an unwritable path.
    """
    if not len(frames):
        raise ValueError("frames is empty: a film needs at least one frame")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1 or any(frame.ndim != 3 or frame.shape[2] != 3 for frame in frames):
        raise ValueError(f"frames must all have one shape (H, W, 3); got {sorted(sizes)}")
    if any(frame.dtype != np.uint8 for frame in frames):
        raise ValueError(f"frames must be uint8; got {sorted({str(frame.dtype) for frame in frames})}")
    for name, seconds in (("seconds_per_frame", seconds_per_frame), ("hold_last", hold_last)):
        if not 0.02 <= seconds < 600:
            raise ValueError(f"{name} must be from 0.02 to 600 seconds; got {seconds}")
    times = [round(seconds_per_frame * 100) * 10] * (len(frames) - 1) + [round(hold_last * 100) * 10]
    first, *rest = _paletted(frames)
    return write_whole(
        path,
        lambda file: first.save(
            file, format="GIF", save_all=True, append_images=rest, duration=times, loop=0, optimize=False
        ),
    )


def _paletted(frames: Sequence[Frame]) -> list[Image.Image]:
    """Frames as images of at most 256 colours: grey ones exactly, coloured ones with a common palette."""
    if all((frame == frame[..., :1]).all() for frame in frames):
        return [Image.fromarray(np.ascontiguousarray(frame[..., 0])) for frame in frames]
    # The last frame is the sharpest, the first the most grey: together they hold the colours of the film.
    common = Image.fromarray(np.concatenate([frames[0], frames[-1]])).quantize(255)
    colours = (common.getpalette() or [])[: 3 * 255]
    common.putpalette([*colours, *[0] * (3 * 255 - len(colours)), 255, 255, 255])
    return [_indexed(frame, common) for frame in frames]


def _indexed(frame: Frame, palette: Image.Image) -> Image.Image:
    """A frame in the colours of a palette whose last one is white."""
    # Dithering would let the changing caption stir the pictures below it.
    image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    # The search for the nearest colour is a rough one: white paper must not become almost white.
    image.paste(255, mask=Image.fromarray((frame == 255).all(-1)))
    return image
