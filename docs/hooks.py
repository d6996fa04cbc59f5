"""MkDocs hooks: pages for the gallery and each example, doctests as code, the style sheet of highlighted code.

An example's docstring is its page, and the code follows it, so that the two cannot drift apart.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

__all__ = ["FencedDoctests", "example_page", "examples", "gallery_page", "on_config", "on_files"]

EXAMPLES = Path(__file__).parents[1] / "examples"


def examples(folder: Path = EXAMPLES) -> list[Path]:
    """The example scripts, in the order of their names."""
    return sorted(folder.glob("*.py"))


def example_page(source: str, name: str) -> str:
    """The Markdown page of one example: its docstring, the first line being the title, then the code.

    Args:
        source: Text of the script.
        name: File name of the script, shown above the code.

    Raises:
        ValueError: The script has no docstring.
    """
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        raise ValueError(f"examples/{name} has no docstring, which is its page: open the file with one")
    title, _, prose = docstring.partition("\n")
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip("\n")
    return f"# {title.removeprefix('# ').rstrip('.')}\n{prose}\n\n`examples/{name}`\n\n````python\n{code}\n````\n"


def gallery_page(readme: str) -> str:
    """The Markdown page of the gallery: that section of the README, with links to the pages of the examples.

    Args:
        readme: Text of the README.

    Raises:
        ValueError: The README has no section called Gallery.
    """
    found = re.search(r"^## Gallery\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    if found is None:
        raise ValueError("README.md has no section `## Gallery`, which is a page of the documentation")
    return "# Gallery\n" + re.sub(r"\(examples/(\w+)\.py\)", r"(examples/\1.md)", found[1]).rstrip() + "\n"


class _FenceDoctests(Preprocessor):
    """Put fences around interactive sessions, which Markdown would take for nested quotations."""

    def run(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        fenced = session = False
        for line in [*lines, ""]:
            fenced ^= line.lstrip().startswith("```")
            if line.startswith(">>> ") and not fenced and not session:
                out.append("```pycon")
                session = True
            elif session and not line.strip():
                out.append("```")
                session = False
            out.append(line)
        return out[:-1] if not lines or lines[-1] else out


class FencedDoctests(Extension):
    """Markdown extension that shows the doctests in docstrings as highlighted code."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name that Markdown calls
        """Register before the extension that reads fences (at 25)."""
        md.preprocessors.register(_FenceDoctests(md), "fence_doctests", 40)


@event_priority(100)  # before mkdocstrings takes over the list of extensions
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's empty list of examples."""
    config.markdown_extensions.append(FencedDoctests())  # type: ignore[arg-type]  # Markdown takes both
    for entry in config.nav or []:
        if "Examples" in entry:
            entry["Examples"] = [{path.stem: f"examples/{path.stem}.md"} for path in examples()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the style sheet."""
    for path in examples():
        page = example_page(path.read_text(encoding="utf-8"), path.name)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    gallery = gallery_page((EXAMPLES.parent / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "gallery.md", content=gallery))
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, "pygments.css", content=style))
    return files
