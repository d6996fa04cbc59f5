"""Weights on disk: safetensors, written whole, read without ever executing what a file holds."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from ppl_vae.files import PathLike, look, require_folder, write_whole
from ppl_vae.hooks import Hook
from ppl_vae.packing import Entry, read_tensors
from ppl_vae.pairs import Pair, Program, as_pair
from ppl_vae.running import Run

__all__ = ["Save", "check_weights", "load_weights", "save_weights"]


def save_weights(program: Program | Pair, path: PathLike) -> Path:
    """Write all parameters and buffers of a pair as safetensors.

    Raises:
        ValueError: the file cannot be written.
    """
    state = {
        name: value.detach().cpu().contiguous().clone() for name, value in as_pair(program).state_dict().items()
    }
    packed = save(state)  # not save_file, whose files only their owner can read
    return write_whole(path, lambda file: file.write_bytes(packed))


def load_weights(program: Program | Pair, path: PathLike) -> None:
    """Read what `save_weights` wrote into a pair of the same structure; on an error nothing is changed.

    Raises:
        ValueError: no such file, no safetensors file or a damaged one, or weights of another program; the
            message says which.
    """
    pair, path = as_pair(program), Path(path)
    if (found := look(path, "path")) is None or not stat.S_ISREG(found.st_mode):
        raise ValueError(f"path: no weights at {path}")
    state = read_tensors(path, lambda _, entries: check_weights(pair, path, entries))[1]
    pair.expected.clear()
    pair.expect(state)
    pair.load_state_dict(state)


def check_weights(program: Program | Pair, path: PathLike, entries: Mapping[str, Entry]) -> None:
    """Raise ValueError, naming the first, unless the tensors of a file are those of a pair, by name and shape.

    Args:
        program: the pair; it may be one without numbers, on the device "meta".
        path: the file.
        entries: what it says of its tensors.
    """
    pair = as_pair(program)
    own = pair.state_dict()
    # Bare pyro.param statements that have not run yet take their values when they do.
    later = {name for name in entries if name.startswith("params.")} if pair.layout is None else set()
    for name in sorted(own.keys() | entries.keys() - later):
        found = f"shape {entries[name].shape}" if name in entries else "nothing"
        wanted = f"shape {tuple(own[name].shape)}" if name in own else "nothing"
        if found == wanted and entries[name].dtype.is_floating_point != own[name].dtype.is_floating_point:
            found, wanted = str(entries[name].dtype), str(own[name].dtype)
        if found != wanted:
            raise ValueError(
                f"path: {path} holds another program's weights: {name} has {found}, expected {wanted}"
            )


class Save(Hook):
    """Keep the weights on disk: the best so far by the validation bound, or the latest without one."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def on_start(self, run: Run) -> None:
        """Make sure, before any work is done, that there is a folder to write to."""
        require_folder(self.path)

    def on_epoch(self, run: Run) -> None:
        """Write, if these are the weights to keep."""
        if not run.validated or run.best_epoch == run.epoch:
            save_weights(run.pair, self.path)

    def on_end(self, run: Run) -> None:
        """Write what the pair ends with: best, latest, or last good; nothing if no step was taken."""
        if run.step:
            save_weights(run.pair, self.path)
