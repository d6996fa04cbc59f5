"""Imports point one way, form no cycles, and change nothing for whoever imports the package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ppl_vae

PACKAGE = Path(ppl_vae.__file__).parent
LAYERS = [
    "rng files limits packing ranks products rewrites graphs transforms nets convolutions conditionals priors "
    "scalars flows triangular likelihoods pixels counts posteriors divergences discrete hamiltonian tails "
    "codebooks codes autoregressive",
    "models hierarchies belief sequences semisupervised",
    "pairs sites layout traces predictive bounds estimators scores objectives alternating penalties adversaries "
    "enumeration moving proposals semiamortised quantising draws",
    "streams batches holding capture updates steps running states hooks "
    "resuming diagnosis joining faults identity loop train estimates sharding streaming "
    "densities evaluate disentangling paths schedules annealing generators weighing refining amortisation "
    "overfitting calibration criticism coding sparing decomposition",
    "data plots arviz_export film checkpoint settings plan axes config records folders figures runs verdicts "
    "flags cli",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
ENTRANCES = {"__init__", "__main__"}  # they stand above all layers


def files(name):
    path = PACKAGE / f"{name}.py"
    return [path] if path.exists() else sorted((PACKAGE / name).glob("*.py"))


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def imports(source, package="ppl_vae"):
    """Names of the package's modules that some source imports, wherever in it, less those for types alone."""
    found, stack = set(), [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            if node.module == package:
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith(f"{package}."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith(f"{package}.")}
            found |= {"the whole package" for a in node.names if a.name == package}
        stack += node.orelse if is_for_types(node) else ast.iter_child_nodes(node)
    return found


IMPORTS = {name: set().union(*(imports(f.read_text("utf-8")) for f in files(name))) - {name} for name in LAYER}


def cycle(graph):
    """A cycle in a graph of name -> names, as a list; None without one."""
    done = set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (walk(n, [*path, name]) for n in sorted(graph.get(name, ())))), None)
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), None)


def test_the_reader_of_imports_reads_all_of_them():
    source = """
import torch
import ppl_vae.nets
from ppl_vae import rng
from ppl_vae.plots.common import number
if TYPE_CHECKING:
    from ppl_vae.running import Run
else:
    from ppl_vae.files import write_whole
def late():
    from ppl_vae.cli import main
"""
    assert imports(source) == {"nets", "rng", "plots", "files", "cli"}
    assert imports("import ppl_vae") == {"the whole package"}


def test_the_finder_of_cycles_finds_them():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_module_has_a_layer():
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules - ENTRANCES == set(LAYER)


@pytest.mark.parametrize("name", LAYER)
def test_a_module_imports_from_its_layer_and_below_alone(name):
    unknown = IMPORTS[name] - set(LAYER)
    assert not unknown, f"{name} imports {unknown}"
    above = {other for other in IMPORTS[name] if LAYER[other] > LAYER[name]}
    assert not above, f"{name} (layer {LAYER[name]}) imports {above}"


def test_there_is_no_cycle():
    assert cycle(IMPORTS) is None
    inner = {f.stem: f.read_text("utf-8") for f in files("plots")}
    graph = {name: {n for n in inner if f"ppl_vae.plots.{n} import" in text} for name, text in inner.items()}
    assert sum(map(len, graph.values())) > 4
    assert cycle(graph) is None


PROBE = """
import importlib, json, locale, logging, os, random, signal, sys, warnings
import matplotlib, numpy, pyro, torch
from torch.distributions import Distribution

def settings():
    return {
        "rcParams": {k: repr(v) for k, v in dict.items(matplotlib.rcParams)},
        "pyro": {k: repr(v) for k, v in pyro.settings.get().items()},
        "store": sorted(pyro.get_param_store().keys()),
        "stack": len(pyro.poutine.runtime._PYRO_STACK),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": [torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_inference_mode_enabled()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "validation": Distribution._validate_args,
        "torch stream": torch.get_rng_state().tolist()[:64],
        "numpy stream": numpy.random.get_state()[1].tolist()[:8],
        "python stream": hash(random.getstate()),
        "numpy errors": numpy.geterr(),
        "print": [repr(numpy.get_printoptions()), repr(vars(torch._tensor_str.PRINT_OPTS))],
        "filters": [repr(f) for f in warnings.filters],
        "environment": dict(os.environ),
        "hooks": [repr(sys.excepthook), repr(signal.getsignal(signal.SIGINT))],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "locale": locale.setlocale(locale.LC_ALL),
    }

# What the libraries that it stands on do when they are imported is not its doing.
for library in ("torchvision", "sklearn.datasets", "safetensors.torch", "tqdm.auto", "PIL.Image", "pyro.infer",
                "torch.utils.data", "matplotlib.figure", "matplotlib.backends.backend_agg"):
    importlib.import_module(library)
before = settings()
import ppl_vae, ppl_vae.cli
after = settings()
print(json.dumps({
    "changed": {name: [before[name], after[name]] for name in before if before[name] != after[name]},
    "loaded": [name for name in ("matplotlib.pyplot", "arviz", "tensorboard") if name in sys.modules],
}))
"""


def test_importing_changes_no_global_setting_and_loads_no_more_than_it_needs():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"changed": {}, "loaded": []}
