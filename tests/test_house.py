"""The house stays flat: import layers, names, sizes, docstrings, and no decision in a second place."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

from losses import LOSSES

# Imports point up this list: a module may import from the lines above its own, and from no other.
LAYERS = [
    {"utils", "losses"},
    {"data_files"},
    {"data_forms"},
    {"preference_datasets"},
    {"tokenization"},
    {"token_store"},
    {"examples"},
    {"parallel"},
    {"batching", "metrics", "processes", "archives", "storage", "head", "reference", "sizing"},
    {"attention", "preparation", "checkpoints", "loading", "tensor_parallelism"},
    {"models"},
    {"generation"},
    {"evaluation"},
    {"trainers"},
    {"validation", "report"},
    {"train"},
]
# What these may import from outside the standard library and the house; None: anything.
LIGHT = {
    "losses": {"torch"},
    "data_files": {"datasets", "numpy", "pyarrow", "tqdm"},
    "data_forms": {"selectolax"},
    "preference_datasets": {"datasets"},
}
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
TREES = {f.stem: ast.parse(f.read_text(encoding="utf-8")) for f in sorted(ROOT.glob("*.py"))}
MAX_FUNCTION, MAX_FILE = 60, 450  # lines
SHORT = 7  # lines of a function whose name and signature say all

each_module = pytest.mark.parametrize("module", TREES)


def imports(module):
    """Top-level names of all that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def n_lines(node):
    return node.end_lineno - node.lineno + 1


def test_every_module_has_its_place():
    assert set(TREES) == set(LEVEL), "a new module: give it a layer here, and a line in the README's table"
    assert sum(map(len, LAYERS)) == len(LEVEL), "a module stands in two layers"


@each_module
def test_imports_point_to_lower_layers(module):
    wrong = {name for name in imports(module) & set(TREES) if LEVEL[name] >= LEVEL[module]}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_little(module):
    outside = {name for name in imports(module) if name not in TREES and name not in sys.stdlib_module_names}
    assert outside <= LIGHT[module], f"{module} imports {outside - LIGHT[module]}"
    if module == "losses":
        assert not imports(module) & set(TREES), "losses are pure functions of tensors"


def test_the_data_path_runs_without_torch():
    """Also through what it imports: the data can be read and looked at in a second, and without a GPU's libraries."""
    heavy = "{'torch', 'transformers', 'hydra', 'omegaconf', 'wandb'}"
    code = f"import sys, preference_datasets; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_two_files_know_dtensor():
    for module, tree in TREES.items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        of_theirs = used & {"DTensor", "fully_shard", "DeviceMesh", "FullyShardedDataParallel"}
        assert module in ("parallel", "tensor_parallelism") or not of_theirs, module


@each_module
def test_no_name_shadows_a_library(module):
    installed = packages_distributions()
    assert module not in installed, f"{module}.py hides {installed[module]}"
    assert module not in sys.stdlib_module_names


@each_module
def test_sizes(module):
    assert len((ROOT / f"{module}.py").read_text().splitlines()) <= MAX_FILE
    long = {f.name: n_lines(f) for f in functions(TREES[module]) if n_lines(f) > MAX_FUNCTION}
    assert not long


@pytest.mark.parametrize("module", TREES)
def test_docstrings(module):
    """Of the module, and of its public functions; of its public classes with code. A few lines may speak for themselves."""
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module}.py has no docstring"
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    bare = [n.name for n in public if n_lines(n) > SHORT and not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize("module", sorted(set(TREES) - {"losses"}))
def test_no_list_of_loss_names(module):
    """The trainer asks the loss what it needs. A loss's name in the code would be a decision that has to be made twice."""
    literals = {node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not literals & (LOSSES.keys() | {"sft", "dpo", "ipo"})


def test_one_loader_of_checkpoints():
    """No other way in for a pickle: one torch.load, with weights_only=True, and nothing that evaluates text."""
    loads = []
    for module, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "joblib.load"), f"{module}: {name}"
            assert not any(k.arg in ("allow_pickle", "trust_remote_code") for k in call.keywords), f"{module}: {name}"
            if name == "torch.load":
                loads.append((module, {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only")))
    assert loads == [("archives", "True")]


def test_no_path_of_one_machine():
    """Nothing under version control knows where somebody's home or checkout is."""
    mine = {f for pattern in ("*.py", "*.sh", "*.toml", "config/**/*.yaml", "tests/*.py") for f in ROOT.glob(pattern)}
    known = [str(f) for f in mine if re.search(r"/(?:home|Users|root|work)/\w", f.read_text(encoding="utf-8"))]
    assert not [f for f in known if not f.endswith("test_house.py")]
