"""Every example runs, is short, and says what it is: examples that are not run rot."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ON_MNIST = [path for path in EXAMPLES if "--data-dir" in path.read_text("utf-8")]


def run(path: Path, folder: Path, *arguments: str) -> str:
    """Run an example as a user would, in a fresh interpreter in another folder; what it prints. Warnings fail."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), "--smoke", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = [*(folder / "figures").glob("*")]
    assert pictures, "no figure"
    assert min(picture.stat().st_size for picture in pictures) > 1000
    assert re.search(r"\d ± \d", done.stdout), f"no number with its error:\n{done.stdout}"
    assert "nan" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """It prints a number with its error, and draws a figure."""
    run(path, tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if "--data-dir" in p.read_text("utf-8")], ids=lambda p: p.stem
)
def test_example_runs_on_mnist(path: Path, tmp_path: Path, real_data: Path) -> None:
    """The same of the branch that its measured numbers come from."""
    run(path, tmp_path, "--data-dir", str(real_data))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_is_short_and_has_a_page(path: Path) -> None:
    """At most 120 lines; the docstring opens with a title and is the page of the documentation."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    page = ast.get_docstring(ast.parse(text)) or ""
    assert page.startswith("# ")
    assert "$$" in page, "no equation"
    assert "Measured" in page, "no number"


def test_the_readme_lists_every_example() -> None:
    """Each in the gallery, and each row of the gallery with all its columns."""
    gallery = (ROOT / "README.md").read_text("utf-8").split("## Gallery")[1].split("\n## ")[0]
    assert {path.stem for path in EXAMPLES} == set(re.findall(r"\(examples/(\w+)\.py\)", gallery))
    rows = [line for line in gallery.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {7}
    assert not [line for line in rows if re.search(r"\|\s*\|", line)], "an empty cell"
