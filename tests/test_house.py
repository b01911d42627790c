"""The house: import layers, names, docstrings, what may run code, and no decision in a second
place.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

from plumb.losses.registry import LOSSES

# The rooms of plumb/: a room imports from those before its own, and from no other of its line.
ROOMS = [
    {"errors"},
    {"console", "paths"},
    {"losses", "distributed"},
    {"data"},
    {"batching", "runs"},
    {"models"},
    {"scoring"},
    {"rollouts"},
    {"training", "reports"},
    {"planning"},
    {"settings"},
    {"api"},
]
# The files at the root, which import plumb; plumb imports none of them.
FILES = [
    {"utils", "preference_datasets"},
    {"trainers"},
    {"train", "export", "report", "sample", "score"},
    {"eval"},
]
# What these may import from outside the standard library and the house.
LIGHT = {
    "plumb.losses.contract": {"torch"},
    "plumb.losses.divergences": {"torch"},
    "plumb.losses.pairwise": {"torch"},
    "plumb.losses.pairwise_anchored": {"torch"},
    "plumb.losses.pairwise_batch": {"torch"},
    "plumb.losses.pairwise_offset": {"torch"},
    "plumb.losses.pairwise_reference_free": {"torch"},
    "plumb.losses.pairwise_token": {"torch"},
    "plumb.losses.policy_gradient": {"torch"},
    "plumb.losses.ratios": {"torch"},
    "plumb.losses.registry": {"torch"},
    "plumb.losses.reward_model": {"torch"},
    "plumb.losses.supervised": {"torch"},
    "plumb.scoring.intervals": {"numpy"},
    "plumb.data.files": {"datasets", "numpy", "pyarrow", "tqdm"},
    "plumb.data.rows": set(),
    "plumb.data.scores": set(),
    "plumb.data.weights": set(),
    "plumb.data.loaded": set(),
    "plumb.data.html": {"selectolax"},
    "plumb.data.registry": {"datasets"},
    "plumb.data.deepspeed_chat": set(),
    "preference_datasets": set(),
}


def name_of(file):
    """
    >>> name_of(ROOT / "plumb/losses/__init__.py"), name_of(ROOT / "train.py")
    ('plumb.losses', 'train')
    """
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """
    >>> room_of("plumb.data.files"), room_of("plumb.errors"), room_of("train")
    ('data', 'errors', 'train')
    """
    return module.removeprefix("plumb.").split(".")[0]


SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumb/**/*.py")])
TREES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}
LEVEL = {name: level for level, names in enumerate([*ROOMS, *FILES]) for name in names} | {
    "plumb": 0
}
# Lines of a function whose name and signature say all (one argument a line).
SHORT = 12

each_module = pytest.mark.parametrize("module", TREES)


def imports(module):
    """All modules that a module imports, also inside its functions: `from a import b` is a.b where
    that is a module of ours.
    """
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in TREES else node.module for name in inner}
    return names


def functions(tree):
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def n_lines(node):
    return node.end_lineno - node.lineno + 1


def test_every_module_has_its_place():
    assert {room_of(module) for module in TREES} == set(LEVEL), (
        "a new room or command: give it a place here and in the README"
    )
    assert sum(map(len, [*ROOMS, *FILES])) == len(LEVEL) - 1, "a room stands in two lines"


@each_module
def test_imports_point_to_lower_layers(module):
    here = room_of(module)
    inside = module.startswith("plumb")
    others = {name for name in imports(module) & set(TREES) if room_of(name) != here}
    assert not {name for name in others if LEVEL[room_of(name)] >= LEVEL[here]} or module == "plumb"
    assert not inside or all(name.startswith("plumb") for name in others), (
        "plumb never imports the root"
    )


def test_no_two_modules_need_each_other():
    graph = {module: imports(module) & set(TREES) for module in TREES}
    TopologicalSorter(
        {
            module: needed - {room for room in needed if module.startswith(f"{room}.")}
            for module, needed in graph.items()
        }
    ).prepare()


@each_module
def test_light_modules_import_little(module):
    outside = {
        name.split(".")[0] for name in imports(module) - set(TREES)
    } - sys.stdlib_module_names
    assert module not in LIGHT or outside <= LIGHT[module], (
        f"{module} imports {outside - LIGHT[module]}"
    )
    if room_of(module) == "losses":
        assert all(name.startswith("plumb.losses") for name in imports(module) & set(TREES)), (
            "pure functions of tensors"
        )


def test_the_data_path_runs_without_torch():
    """Also through what it imports: the data can be read and looked at in a second, and without a
    GPU's libraries.
    """
    heavy = "{'torch', 'transformers', 'hydra', 'omegaconf', 'wandb'}"
    code = f"import sys, preference_datasets; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_two_files_know_dtensor():
    for module, tree in TREES.items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        of_theirs = used & {"DTensor", "fully_shard", "DeviceMesh", "FullyShardedDataParallel"}
        assert (
            module in ("plumb.distributed.sharding", "plumb.distributed.tensor_parallel")
            or not of_theirs
        ), module


@pytest.mark.parametrize("module", sorted({module.split(".")[0] for module in TREES}))
def test_no_name_shadows_a_library(module):
    installed = {name: of for name, of in packages_distributions().items() if of != ["plumb"]}
    assert module not in installed, f"{module}.py hides {installed[module]}"
    assert module not in sys.stdlib_module_names


@pytest.mark.parametrize("module", TREES)
def test_docstrings(module):
    """Of the module, and of its public functions; of its public classes with code. A few lines may
    speak for themselves.
    """
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module}.py has no docstring"
    public = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    bare = [n.name for n in public if n_lines(n) > SHORT and not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize(
    "module",
    sorted(
        set(TREES)
        - {"plumb.data.splits", "plumb.data.forms.fitting"}
        - {m for m in TREES if room_of(m) == "losses"}
    ),
)  # stages bear names of losses
def test_no_list_of_loss_names(module):
    """The trainer asks the loss what it needs. A loss's name in the code would be a decision that
    has to be made twice.
    """
    literals = {
        node.value
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not literals & (LOSSES.keys() | {"sft", "dpo", "ipo"})


# What could run code that a file, a config or the command line brings. (module, what) -> why it may
# stand there.
ALLOWED = {
    ("plumb.runs.policy_file", "torch.load"): "the one loader; weights_only=True is tested below",
    (
        "plumb.models.load",
        "import pickle",
    ): "the exception that torch raises, to say it in one line",
    (
        "plumb.settings.plugins",
        "exec_module",
    ): "plugins=[my.py] are the user's own code, run by design",
    (
        "plumb.distributed.launch",
        "import ctypes",
    ): "prctl: a rank ends with its launcher; Python has no other way to ask for that",
    (
        "plumb.distributed.launch",
        "ctypes.CDLL",
    ): "the C library itself, by no name that could be given",
    (
        "plumb.models.source_trust",
        "trust_remote_code",
    ): "handed on from model.trust_remote_code, which needs a commit",
    ("utils", "subprocess"): "git, without a shell, for the record of a run",
}
CALLS = re.compile(
    r"""(?:builtins\.)?(?:eval|exec|compile|__import__|input|breakpoint)
    | (?P<subprocess>subprocess\.\w+)
    | os\.(?:system|popen|exec\w+|spawn\w+|posix_spawn\w*)
    | yaml\.(?:load|load_all|unsafe_load|full_load)\w*
    | ctypes\.\w+
    | (?:\w+\.)*(?:instantiate|import_module|run_module|run_path|get_class_from_dynamic_module)
    | (?:\w+\.)*(?P<exec_module>exec_module)
    | (?:joblib|dill|cloudpickle|marshal|shelve)\.\w+
    | (?:pd|pandas)\.(?:read_pickle|eval)
    | hydra\.utils\.(?:get_\w+|call)
    | torch\.(?:load|jit\.load|package\.\w+|hub\.\w+)
    | (?:\w+\.)*(?:dcp|distributed\.checkpoint)\.(?:async_)?(?:load|save)\w*""",
    re.X,
)
MODULES = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "ctypes",
    "runpy",
    "imp",
}
# harmless so
KEYWORDS = {
    "weights_only": "True",
    "allow_pickle": "False",
    "shell": "False",
    "trust_remote_code": "False",
}


def suspicious(tree):
    """What in a module could run code that it was handed, named as in ALLOWED.

    >>> code = "import torch, pickle; torch.load(f, weights_only=x); getattr(torch.optim, name)"
    >>> [*suspicious(ast.parse(code))]
    ['import pickle', 'torch.load', 'getattr of a module', 'weights_only']
    """
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = [a.name for n in imports if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module for n in imports if isinstance(n, ast.ImportFrom) and n.module]
    yield from (f"import {name}" for name in modules if name.split(".")[0] in MODULES)
    # not of its state_dict, which touches no file
    for node in (n for n in imports if isinstance(n, ast.ImportFrom)):
        names = {a.name for a in node.names}
        unsafe = node.module == "torch.distributed.checkpoint" or bool(
            names & {"instantiate", "import_module"}
        )
        yield from [f"from {node.module}"] * unsafe
    bound = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if found := CALLS.fullmatch(name):
            yield found.lastgroup or name
        computed = len(call.args) > 1 and not isinstance(call.args[1], ast.Constant)
        if (
            name in ("getattr", "setattr")
            and computed
            and ast.unparse(call.args[0]).split(".")[0] in bound
        ):
            yield "getattr of a module"
    given = [(k.arg, k.value) for call in calls for k in call.keywords]
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Dict)):
        given += [
            (k.value, v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        ]
    yield from (
        key for key, value in given if key in KEYWORDS and ast.unparse(value) != KEYWORDS[key]
    )


BAD_CODE = [
    "eval(x)",
    "exec(x)",
    "compile(x, 'f', 'exec')",
    "__import__(x)",
    "os.system(x)",
    "os.popen(x)",
    "os.execvp(x, y)",
    "subprocess.run(x, shell=True)",
    "yaml.load(f)",
    "yaml.unsafe_load(f)",
    "hydra.utils.instantiate(c)",
    "instantiate(c)",
    "importlib.import_module(x)",
    "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "torch.jit.load(f)",
    "import pickle",
    "from pickle import loads",
    "import joblib",
    "np.load(f, allow_pickle=True)",
    "import torch\ngetattr(torch, name)",
    "import trainers\ngetattr(trainers, config.trainer)",
    "import torch.optim\ngetattr(torch.optim, name)",
    "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "AutoModel.from_pretrained(n, trust_remote_code=flag)",
    "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
    "from torch.distributed.checkpoint import load",
    "from hydra.utils import instantiate",
    "pd.read_pickle(f)",
    "runpy.run_path(f)",
    "import ctypes",
    "kwargs = {'trust_remote_code': flag}",
]


@pytest.mark.parametrize("code", BAD_CODE)
def test_the_gate_sees(code):
    """Each of these is found, or the test below would prove nothing."""
    assert [*suspicious(ast.parse(code))]


def test_nothing_runs_from_a_file():
    """What is allowed stands in ALLOWED, with its reason, and is still there."""
    assert {
        (module, what) for module, tree in TREES.items() for what in suspicious(tree)
    } == ALLOWED.keys()


def test_the_one_loader_trusts_nothing():
    calls = [
        n
        for n in ast.walk(TREES["plumb.runs.policy_file"])
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"
    ]
    assert [
        {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] for call in calls
    ] == ["True"]
    imports = [
        n
        for n in ast.walk(TREES["plumb.models.load"])
        if isinstance(n, ast.ImportFrom) and n.module == "pickle"
    ]
    assert [a.name for n in imports for a in n.names] == ["UnpicklingError"]


MOST_FIELDS = 4  # of a record that is built by position, or taken apart by it
# NamedTuples with more fields, and why
WIDE_TUPLES = {
    "Row": "one for each row of a data set, changed with _replace while it is read",
    "RawRow": "one for each row of a file",
    "ScoredPairs": "what a loss is given, as Pairs is",
    "Chunk": "columns, which are filled and written in the order of its fields",
}


def records(trees):
    """Yield (class, is it a NamedTuple, number of fields) of each NamedTuple and dataclass."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                is_tuple = "NamedTuple" in map(ast.unparse, node.bases)
                if is_tuple or any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                    yield node.name, is_tuple, len(fields)


def calls_by_position(tree, names):
    """Yield the calls of these classes with more than MOST_FIELDS values by position.

    >>> tree = ast.parse("Pair(1, 2); Wide(1, 2, 3, 4, 5); m.Wide(1, 2, 3, 4, e=5); f(*range(9))")
    >>> [*calls_by_position(tree, {"Pair", "Wide"})]
    ['Wide, line 1']
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > MOST_FIELDS:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in names:
                yield f"{name}, line {node.lineno}"


def test_records_are_built_by_keyword():
    """A value's meaning stands beside it, and a field that is added shifts no other."""
    files = [f for room in ("tests", "benchmarks", "demo") for f in ROOT.glob(f"{room}/**/*.py")]
    trees = TREES | {str(f): ast.parse(f.read_text(encoding="utf-8")) for f in files}
    names = {name for name, _, _ in records(trees.values())}
    assert not {
        file: calls for file, tree in trees.items() if (calls := [*calls_by_position(tree, names)])
    }


def test_wide_records_are_no_tuples():
    """A record with many fields is a frozen dataclass, which nothing can take apart by position."""
    wide = {name for name, is_tuple, n in records(TREES.values()) if is_tuple and n > MOST_FIELDS}
    assert wide == WIDE_TUPLES.keys()


def test_no_path_of_one_machine():
    """Nothing under version control knows where somebody's home or checkout is."""
    mine = {
        f
        for pattern in (
            "*.py",
            "plumb/**/*.py",
            "*.sh",
            "*.toml",
            "config/**/*.yaml",
            "tests/**/*.py",
        )
        for f in ROOT.glob(pattern)
    }
    known = [
        str(f)
        for f in mine
        if re.search(r"/(?:home|Users|root|work)/\w", f.read_text(encoding="utf-8"))
    ]
    assert not [f for f in known if not f.endswith("test_house.py")]


def test_the_readme_lists_every_module():
    """The annotated tree under "Finding your way" has each file in its room, and no other."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## Finding your way")[2].partition("```\n")[2].partition("```")[0]
    listed, folders = set(), {-2: ""}
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        depth = len(line) - len(line.lstrip())
        if name.endswith("/"):
            folders[depth] = f"{folders[depth - 2]}{name.removesuffix('/')}."
        elif name.endswith(".py"):
            listed.add(folders[depth - 2] + name.removesuffix(".py"))
    assert listed == {
        module for module in TREES if not any(other.startswith(f"{module}.") for other in TREES)
    }
