"""A disk that is full, or too small: told before training where that shows, and what is kept stays whole."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kills import EPOCH, EPOCHS, cut, end, go
from small import fit, pixels, vae
from test_packing import identical

import ppl_vae as pv
from ppl_vae import resuming
from ppl_vae.cli import main
from ppl_vae.resuming import Checkpoints

# A limit on the size of a file stands for a full disk: both fail in the middle of a write.
LIMITED = """
import resource, sys
from kills import go
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    go("validated", sys.argv[1])
except ValueError as error:
    print(error)
"""
COMMAND = """
import resource, sys
from ppl_vae.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["train", *sys.argv[2:]]))
"""


def free_bytes(monkeypatch, count):
    monkeypatch.setattr(resuming.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=count))


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_training(tmp_path, monkeypatch):
    free_bytes(monkeypatch, 10_000)
    steps = []
    hook = pv.Hook()
    hook.on_step = lambda run: steps.append(run.step)
    with pytest.raises(ValueError, match=r"checkpoints: .* has 0\.0 MB left, .* needs about 0\.\d MB"):
        fit(vae(), pixels(20), epochs=1, hooks=[hook], checkpoints=Checkpoints(tmp_path / "kept"))
    assert steps == []


def test_a_disk_with_room_enough_is_not_refused(tmp_path, monkeypatch):
    run = go("validated", tmp_path / "kept", keep=2)
    size = max(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    free_bytes(monkeypatch, 6 * size)  # two that are kept, one more while it is written, and twice that
    assert identical(end(go("validated", tmp_path / "again", keep=2)), end(run))


def test_a_run_that_is_resumed_on_a_full_disk_is_told_before_it_trains(tmp_path, monkeypatch):
    whole = go("validated")
    cut("validated", tmp_path / "kept", at=2 * EPOCH)
    free_bytes(monkeypatch, 100)
    with pytest.raises(ValueError, match=r"has 0\.0 MB left"):
        go("validated", tmp_path / "kept", "last")
    monkeypatch.undo()
    assert identical(end(go("validated", tmp_path / "kept", "last")), end(whole))


def test_a_file_system_that_tells_nothing_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert go("validated", tmp_path).reason == "all epochs done"


def test_a_disk_that_fills_up_leaves_a_checkpoint_to_go_on_from(tmp_path):
    whole = go("validated", tmp_path / "whole", keep=EPOCHS + 1)
    sizes = [path.stat().st_size for path in Checkpoints(tmp_path / "whole").found()]
    assert sizes[0] < sizes[1]  # the optimizer's state comes with the first step
    command = [sys.executable, "-c", LIMITED, tmp_path / "kept", str(sizes[1] - 1)]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert "cannot write" in found.stdout
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch-000000.safetensors"]
    assert identical(end(go("validated", tmp_path / "kept", "last")), end(whole))


def test_a_command_that_finds_the_disk_full_says_so_in_one_line_and_can_be_resumed(tmp_path):
    flags = ["--data", "digits", "--limit", "60", "--hidden", "8", "--latent", "2", "--epochs", "3", "--out"]
    flags += [str(tmp_path / "run"), "--quiet", "--compile", "off"]
    limit = 20_000  # above run.json and below any weights
    command = [sys.executable, "-c", COMMAND, str(limit), *flags]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "cannot write" in found.stderr
    assert main(["train", *flags, "--resume", "auto"]) == 0
