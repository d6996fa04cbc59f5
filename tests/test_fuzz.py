"""Every loader bears any file: only its documented error comes out; nothing hangs, crashes or fills the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import LOADERS, MOST_MEMORY, NEVER_WHOLE, attempt, fuzz

TRAINED = {"resume"}  # an epoch each


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_is_whole_is_taken(name):
    whole = [finish(raw) for raw, finish in LOADERS[name][0]()]
    taken = [attempt(name, raw) for raw in whole]
    assert any(taken) == (name not in NEVER_WHOLE)


@pytest.mark.parametrize("name", LOADERS)
def test_some_changed_files(name, capfd):  # libtiff writes to stderr by itself
    count = 20 if name in TRAINED else 50
    found = fuzz(name, count)
    assert sum(found.values()) == count
    assert found["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_ten_thousand_changed_files(name):
    count = 1000 if name in TRAINED else 10_000
    script = Path(__file__).with_name("fuzz.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, name, str(count)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] + found["taken"] == count
    assert found["MiB"] * 2**20 < MOST_MEMORY
