"""Every example runs, is short, and says what it is: examples that are not run rot."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """As a user would: a fresh interpreter in another folder, warnings as errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), "--smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nan" not in done.stdout, done.stdout
    for picture in (tmp_path / "figures").glob("*"):
        assert picture.stat().st_size > 1000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_is_short_and_has_a_page(path: Path) -> None:
    """At most 120 lines; the docstring opens with a title and is the page of the documentation."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert (ast.get_docstring(ast.parse(text)) or "").startswith("# ")
