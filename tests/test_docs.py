"""The documentation holds: quotes occur in the code, blocks run, links lead somewhere, names are listed."""

import ast
import importlib
import importlib.util
import math
import pkgutil
import re
import shlex
import textwrap
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian

import ppl_vae
import ppl_vae.plots
from ppl_vae.cli import COMMANDS
from ppl_vae.flags import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RUNNABLE = [ROOT / "README.md", ROOT / "docs/get-started.md", ROOT / "docs/engine.md", ROOT / "docs/extending.md"]
RUNNABLE += [ROOT / "docs/codes.md"]
QUOTING = ROOT / "docs/math.md"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
QUOTE = re.compile(r"^`(ppl_vae/[\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")


def label(path):
    return str(path.relative_to(ROOT))


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(page.read_text("utf-8")) if language in languages]


def run_blocks(page):
    """Run the Python blocks of a page in order; return the names that they define."""
    space = {"__name__": "docs"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            exec(compile(block, label(page), "exec"), space)
    return space


def missing_run(quote, source):
    """The first run of quoted lines, between lines of `...`, that is not in the source in that order."""
    lines = [line.strip() for line in source.splitlines()]
    start = 0
    for run in re.split(r"^\s*\.\.\.\s*$", quote, flags=re.M):
        wanted = [line.strip() for line in textwrap.dedent(run).strip("\n").splitlines()]
        found = (i for i in range(start, len(lines)) if lines[i : i + len(wanted)] == wanted)
        place = next(found, None)
        if place is None:
            return "\n".join(wanted)
        start = place + len(wanted)
    return None


@pytest.mark.parametrize(("file", "quote"), QUOTE.findall(QUOTING.read_text("utf-8")))
def test_quoted_code_stands_in_its_file(file, quote):
    missing = missing_run(quote, (ROOT / file).read_text("utf-8"))
    assert missing is None, f"docs/math.md quotes lines that are no longer in {file}:\n{missing}"


def test_every_python_block_of_the_maths_page_is_a_quote():
    assert len(QUOTE.findall(QUOTING.read_text("utf-8"))) == len(blocks(QUOTING, "python")) > 5


def test_a_changed_line_is_noticed():
    source = "def f(x):\n    y = x + 1\n    z = y\n    return z\n"
    assert missing_run("y = x + 1\n...\nreturn z\n", source) is None
    assert missing_run("y = x + 2\n", source) == "y = x + 2"
    assert missing_run("return z\n...\ny = x + 1\n", source) == "y = x + 1"
    assert missing_run("y = x + 1\nreturn z\n", source) is not None


@pytest.mark.parametrize("page", RUNNABLE, ids=label)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert len(run_blocks(page)) > 5, f"{label(page)} shows no Python"


def test_extensions_of_the_page_train_and_are_judged():
    space = run_blocks(ROOT / "docs/extending.md")
    counts, rates = space["counts"], space["Rates"]()
    for program, objective in ((space["vae"], space["objective"]), (rates, ppl_vae.ELBO())):
        run = ppl_vae.fit(
            program,
            counts,
            objective=objective,
            epochs=5,
            batch_size=16,
            optimizer=partial(torch.optim.Adam, lr=0.05),
            progress=False,
        )
        assert run.history[-1]["train"] > run.history[0]["train"]
    # A Gamma prior on a Poisson rate is conjugate: at shape 2 the guide is the posterior, the bound log p(x).
    rates.log_shape.data.fill_(math.log(2.0))
    bound = ppl_vae.log_likelihood(rates, counts, particles=3)
    exact = dist.GammaPoisson(torch.full((12,), 2.0), 1.0).log_prob(counts).sum(1)
    assert torch.allclose(bound.value.float(), exact, atol=1e-4)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if re.match(r"(https?:|mailto:|#)", target):
            continue
        path = page.parent / target.partition("#")[0]
        script = ROOT / "examples" / f"{path.stem}.py"
        made = path == ROOT / "docs/gallery.md" or (path.parent.name == "examples" and script.exists())
        assert path.exists() or made, f"{label(page)}: {target}"  # made: by docs/hooks.py


def modules():
    """Every module with a public part, by name."""
    found = pkgutil.walk_packages(ppl_vae.__path__, "ppl_vae.")
    return [m.name for m in found if not m.name.rpartition(".")[2].startswith("_")]


def documented():
    """The modules that the API pages list, and the names that these pages show."""
    text = "\n".join(page.read_text("utf-8") for page in ROOT.glob("docs/api/*.md"))
    paths = re.findall(r"^::: (ppl_vae[\w.]*)$", text, re.M)
    listed = [path for path in paths if path.count(".") == 1]
    names = {path.rpartition(".")[2] for path in paths if path not in listed}
    for path in listed:
        module = importlib.import_module(path)
        names |= {n for n in module.__all__ if f"{path}.{n}" not in modules()}  # a module of that name hides it
    return listed, names


def test_api_pages_list_every_module_once():
    listed, _ = documented()
    assert sorted(listed) == sorted(m for m in modules() if m.count(".") == 1)


def test_api_pages_show_every_public_name():
    _, names = documented()
    plots = set(ppl_vae.plots.__all__)
    assert {n for n in ppl_vae.__all__ if not n.startswith("__")} | plots <= names


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    text = page.read_text("utf-8")
    used = re.findall(r"`make ([a-z-]+)`", text)
    used += [name for code in blocks(page, "sh") for name in re.findall(r"^make ([a-z-]+)", code, re.M)]
    assert set(used) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_are_understood(page):
    lines = "\n".join(blocks(page, "sh")).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["ppl-vae"]:
            parser("", COMMANDS).parse_args(words[1:])


def test_readme_gives_the_two_commands():
    commands = "\n".join(blocks(ROOT / "README.md", "sh"))
    assert re.search(r"^make demo\b", commands, re.M)
    assert re.search(r"^make test\b", commands, re.M)


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_example_is_its_docstring_and_its_code(hooks):
    for path in hooks.examples():
        source = path.read_text("utf-8")
        page = hooks.example_page(source, path.name)
        title, *prose = ast.get_docstring(ast.parse(source)).splitlines()
        assert page.splitlines()[0] == title.rstrip(".")
        assert title.startswith("# ")
        assert all(line in page for line in prose)
        assert source.splitlines()[-1] in page
    assert hooks.examples()


def test_an_example_without_docstring_is_refused(hooks):
    with pytest.raises(ValueError, match=r"bare\.py has no docstring"):
        hooks.example_page("x = 1\n", "bare.py")
    page = hooks.gallery_page("# x\n## Gallery\n\n[a](examples/a.py)\n\n## More\nno\n")
    assert page == "# Gallery\n\n[a](examples/a.md)\n"
    with pytest.raises(ValueError, match="no section `## Gallery`"):
        hooks.gallery_page("# x\n")


def test_doctests_are_shown_as_code(hooks):
    markdown = pytest.importorskip("markdown")
    text = "Text.\n\n>>> 1 + 1\n2\n\nMore.\n\n```\n>>> fenced\n```\n"
    html = markdown.markdown(text, extensions=[hooks.FencedDoctests(), "pymdownx.superfences"])
    assert "<blockquote>" not in html
    assert html.count("<code>") == 2
    assert "<p>More.</p>" in html


# The figures of the maths page.


def test_figures_gap_of_the_importance_weighted_bound():
    exact, x = LinearGaussian.reference()

    def prior_as_guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    # E_q[(w / p(x))^2] for q = p(z): p(x | z)^2 is N(x; Wz + mu, s2 / 2), times (4 pi s2)^(-D / 2).
    log_p = exact.log_evidence(x).detach()
    halved = LinearGaussian(exact.weight, exact.mean, exact.variance / 2).log_evidence(x).detach()
    variance = float((halved - 1.5 * math.log(4 * math.pi * exact.variance) - 2 * log_p).exp()) - 1
    assert variance == pytest.approx(6.33, abs=0.005)
    pair = ppl_vae.Pair(exact.float().model, prior_as_guide)
    estimate = ppl_vae.log_likelihood(pair, x.float().expand(4000, 3), particles=100)
    assert float(log_p) - estimate.mean == pytest.approx(0.0348, abs=4 * math.hypot(estimate.mean_stderr, 0.0019))


def test_figures_variance_of_gradient_estimators():
    d, mean = 50, torch.zeros(50)
    z = dist.Normal(mean, 1.0).sample((400_000,))
    f = 0.5 * z.square().sum(1)
    for draws, exact, shown in (
        (f * z[:, 0], (d + 2) * (d + 4) / 4, 702),
        ((f - d / 2) * z[:, 0], (d + 4) / 2, 27),
    ):
        assert exact == shown
        assert float(draws.var()) == pytest.approx(exact, rel=0.03)


def test_figures_of_a_fixed_scale():
    images = ppl_vae.digits()
    x = torch.cat([images.train.x, images.valid.x, images.test.x])
    largest = float(torch.linalg.eigvalsh(torch.cov(x.T))[-1])
    assert round(largest, 2) == 0.70
    error = torch.full((64,), 0.2)
    loss = dist.Normal(0.0, 0.2).log_prob(error).sum() - dist.Normal(0.0, 1.0).log_prob(error).sum()
    assert round(float(loss), 1) == 72.3
