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
    {"utils", "losses", "intervals"},
    {"data_files"},
    {"data_forms"},
    {"preference_datasets"},
    {"pipeline_datasets", "rendering", "token_text"},
    {"tokenization"},
    {"token_store"},
    {"examples"},
    {"parallel"},
    {"batching", "metrics", "archives", "storage", "command_line", "head", "reference", "sizing", "commands", "scalar_head",
     "score_plots", "sample_files", "judges"},
    {"history", "weight_files"},
    {"attention", "activations", "draws", "routers", "splits", "state_files", "processes", "loading", "trust",
     "tensor_parallelism"},
    {"checkpoints", "preparation"},
    {"models", "optimization", "rundir", "curves", "diagnosis"},
    {"pretrained", "prompts", "layout_probe"},
    {"opening"},
    {"generation"},
    {"sample", "lineage"},
    {"exporting"},
    {"export"},
    {"evaluation", "scorers", "winrates"},
    {"selfcheck"},
    {"trainers"},
    {"validation", "report", "plan"},
    {"train"},
    {"eval", "score"},
]
# What these may import from outside the standard library and the house; None: anything.
LIGHT = {
    "losses": {"torch"},
    "intervals": {"numpy"},
    "data_files": {"datasets", "numpy", "pyarrow", "tqdm"},
    "data_forms": {"selectolax"},
    "preference_datasets": {"datasets"},
    "pipeline_datasets": set(),
}
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
TREES = {f.stem: ast.parse(f.read_text(encoding="utf-8")) for f in sorted(ROOT.glob("*.py"))}
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


@pytest.mark.parametrize("module", TREES)
def test_docstrings(module):
    """Of the module, and of its public functions; of its public classes with code. A few lines may speak for themselves."""
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module}.py has no docstring"
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    bare = [n.name for n in public if n_lines(n) > SHORT and not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize("module", sorted(set(TREES) - {"losses", "splits"}))  # stages bear names of losses
def test_no_list_of_loss_names(module):
    """The trainer asks the loss what it needs. A loss's name in the code would be a decision that has to be made twice."""
    literals = {node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not literals & (LOSSES.keys() | {"sft", "dpo", "ipo"})


# What could run code that a file, a config or the command line brings. (module, what) -> why it may stand there.
ALLOWED = {
    ("archives", "torch.load"): "the one loader; weights_only=True is tested below",
    ("pretrained", "import pickle"): "the exception that torch raises, to say it in one line",
    ("validation", "exec_module"): "plugins=[my.py] are the user's own code, run by design",
    ("processes", "import ctypes"): "prctl: a rank ends with its launcher; Python has no other way to ask for that",
    ("processes", "ctypes.CDLL"): "the C library itself, by no name that could be given",
    ("trust", "trust_remote_code"): "handed on from model.trust_remote_code, which needs a commit",
    ("utils", "subprocess"): "git, without a shell, for the record of a run",
}
CALLS = re.compile(
    r"""(?:builtins\.)?(?:eval|exec|compile|__import__|input|breakpoint) | (?P<subprocess>subprocess\.\w+)
    | os\.(?:system|popen|exec\w+|spawn\w+|posix_spawn\w*) | yaml\.(?:load|load_all|unsafe_load|full_load)\w* | ctypes\.\w+
    | (?:\w+\.)*(?:instantiate|import_module|run_module|run_path|(?P<exec_module>exec_module)|get_class_from_dynamic_module)
    | (?:joblib|dill|cloudpickle|marshal|shelve)\.\w+ | (?:pd|pandas)\.(?:read_pickle|eval) | hydra\.utils\.(?:get_\w+|call)
    | torch\.(?:load|jit\.load|package\.\w+|hub\.\w+) | (?:\w+\.)*(?:dcp|distributed\.checkpoint)\.(?:async_)?(?:load|save)\w*""",
    re.X,
)
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "ctypes", "runpy", "imp"}
KEYWORDS = {"weights_only": "True", "allow_pickle": "False", "shell": "False", "trust_remote_code": "False"}  # harmless so


def suspicious(tree):
    """What in a module could run code that it was handed, named as in ALLOWED.

    >>> [*suspicious(ast.parse("import torch, pickle; torch.load(f, weights_only=x); getattr(torch.optim, name)"))]
    ['import pickle', 'torch.load', 'getattr of a module', 'weights_only']
    """
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = [a.name for n in imports if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module for n in imports if isinstance(n, ast.ImportFrom) and n.module]
    yield from (f"import {name}" for name in modules if name.split(".")[0] in MODULES)
    for node in (n for n in imports if isinstance(n, ast.ImportFrom)):  # not of its state_dict, which touches no file
        names = {a.name for a in node.names}
        unsafe = node.module == "torch.distributed.checkpoint" or bool(names & {"instantiate", "import_module"})
        yield from [f"from {node.module}"] * unsafe
    bound = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if found := CALLS.fullmatch(name):
            yield found.lastgroup or name
        computed = len(call.args) > 1 and not isinstance(call.args[1], ast.Constant)
        if name in ("getattr", "setattr") and computed and ast.unparse(call.args[0]).split(".")[0] in bound:
            yield "getattr of a module"
    given = [(k.arg, k.value) for call in calls for k in call.keywords]
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Dict)):
        given += [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
    yield from (key for key, value in given if key in KEYWORDS and ast.unparse(value) != KEYWORDS[key])


BAD_CODE = [
    "eval(x)", "exec(x)", "compile(x, 'f', 'exec')", "__import__(x)", "os.system(x)", "os.popen(x)", "os.execvp(x, y)",
    "subprocess.run(x, shell=True)", "yaml.load(f)", "yaml.unsafe_load(f)", "hydra.utils.instantiate(c)", "instantiate(c)",
    "importlib.import_module(x)", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.jit.load(f)", "import pickle",
    "from pickle import loads", "import joblib", "np.load(f, allow_pickle=True)", "import torch\ngetattr(torch, name)",
    "import trainers\ngetattr(trainers, config.trainer)", "import torch.optim\ngetattr(torch.optim, name)",
    "AutoModel.from_pretrained(n, trust_remote_code=True)", "AutoModel.from_pretrained(n, trust_remote_code=flag)",
    "import torch.distributed.checkpoint as dcp\ndcp.load(x)", "from torch.distributed.checkpoint import load",
    "from hydra.utils import instantiate", "pd.read_pickle(f)", "runpy.run_path(f)", "import ctypes",
    "kwargs = {'trust_remote_code': flag}",
]  # fmt: skip


@pytest.mark.parametrize("code", BAD_CODE)
def test_the_gate_sees(code):
    """Each of these is found, or the test below would prove nothing."""
    assert [*suspicious(ast.parse(code))]


def test_nothing_runs_from_a_file():
    """What is allowed stands in ALLOWED, with its reason, and is still there."""
    assert {(module, what) for module, tree in TREES.items() for what in suspicious(tree)} == ALLOWED.keys()


def test_the_one_loader_trusts_nothing():
    calls = [n for n in ast.walk(TREES["archives"]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert [{k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] for call in calls] == ["True"]
    imports = [n for n in ast.walk(TREES["pretrained"]) if isinstance(n, ast.ImportFrom) and n.module == "pickle"]
    assert [a.name for n in imports for a in n.names] == ["UnpicklingError"]


def test_no_path_of_one_machine():
    """Nothing under version control knows where somebody's home or checkout is."""
    mine = {f for pattern in ("*.py", "*.sh", "*.toml", "config/**/*.yaml", "tests/*.py") for f in ROOT.glob(pattern)}
    known = [str(f) for f in mine if re.search(r"/(?:home|Users|root|work)/\w", f.read_text(encoding="utf-8"))]
    assert not [f for f in known if not f.endswith("test_house.py")]
