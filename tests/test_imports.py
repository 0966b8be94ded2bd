"""The library's shape, read from its text: imports point one way, functions are small."""

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for path in (ROOT / "smslib").glob("*.py") if path.stem != "__init__")
TREES = {path.stem: ast.parse(path.read_text()) for path in MODULES}

CHAIN = (
    "data",
    "distributions",
    "priors",
    "newton",
    "model",
    "parallel",
    "checkpoints",
    "train",
    "evaluate",
    "transfer",
    "recipes",
    "sweep",
    "benchmark",
)
LEAVES = {
    "files",
    "names",
    "tensors",
    "untrusted",
}  # all may import these, which import each other at most
ALONE = {
    "enumeration",
    "gauge",
    "identifiability",
    "metrics",
    "plotting",
    "store",
}  # take plain arrays and values, know no other module
MAY_IMPORT = {
    **{name: set() for name in LEAVES},
    **{name: set(CHAIN[:place]) for place, name in enumerate(CHAIN)},
    **{name: set() for name in ALONE},
    "tensors": {"files", "untrusted"},
    "newton": set(),
    "store": {"metrics"},
    "sweep": set(CHAIN[: CHAIN.index("sweep")]) | {"store"},
    "simulate": {"data", "distributions", "lookalike"},
    "lookalike": {"data", "perturbseq"},
    "batches": {"data"},
    "lookalike_file": {"data", "lookalike"},
    "sources": set(),
    "streaming": {"data"},
    "prepare": {"data", "perturbseq", "sources", "streaming"},
    "perturbseq": {"data", "prepare", "sources"},  # prepare: for its command line alone
    "estimator": set(CHAIN) - {"benchmark"} | ALONE,
    "replicates": {"data", "distributions", "model", "train"},
    "studies": {"recipes", "sweep"},
    "ceilings": {"data", "metrics", "model", "simulate"},
    "benchmark": set(CHAIN) | ALONE | {"ceilings", "controls", "simulate", "studies"},
    "alpha_path": set(CHAIN) - {"benchmark"} | ALONE | {"alpha_path", "simulate"},
    "controls": {"metrics"},
    "screens": set(CHAIN) - {"benchmark"} | ALONE | {"perturbseq"},
    # programs_study: for its command line alone
    "programs": {"data", "evaluate", "metrics", "model", "newton", "programs_study"},
    "programs_study": set(CHAIN) - {"benchmark"} | ALONE | {"programs", "screens"},
    "holdouts": set(CHAIN) | ALONE | {"holdouts", "lookalike", "perturbseq", "screens"},
    "prediction": set(CHAIN) - {"benchmark"} | ALONE | {"perturbseq", "prediction", "screens"},
}
CHATTY = {"print", "breakpoint", "input", "exec", "eval"}
GLOBAL_STATE = {
    "np.random.seed",
    "numpy.random.seed",
    "os.system",
    "plt.show",
    "random.seed",
    "torch.manual_seed",
    "torch.seed",
    "torch.set_default_device",
    "torch.set_default_dtype",
    "torch.set_num_threads",
    "warnings.simplefilter",
}
HEAVY = {"anndata", "matplotlib", "pooch", "rdata", "scanpy", "sklearn"}
MAX_BODY, MEDIAN_BODY = 50, 8
# Changed while whole cells are shared out among threads, and put back in a `finally`.
LENT = {"evaluate": {"torch.set_num_threads"}}
MAY_PRINT = {"__main__", "_main", "main"}  # command lines speak to their user


def siblings(tree):
    """Names of the package's modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "smslib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smslib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "smslib" and len(name) > 1}
    return found & (TREES.keys() | MAY_IMPORT.keys())


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def body_lines(function):
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported_at_top(tree):
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_every_module_has_a_place():
    assert TREES.keys() - MAY_IMPORT.keys() == set()


@pytest.mark.parametrize("name", sorted(TREES.keys() & MAY_IMPORT.keys()))
def test_imports_point_one_way(name):
    leaves = set() if name in LEAVES else LEAVES
    assert siblings(TREES[name]) - MAY_IMPORT[name] - leaves == set()


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_depends_on_no_test_notebook_or_book(name):
    assert imported_at_top(TREES[name]) & {"pipeline", "tests", "notebooks", "IPython"} == set()


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_says_nothing_by_itself_and_leaves_global_state_alone(name):
    used = [ast.unparse(call.func) for call in calls(TREES[name])]
    assert [call for call in used if call in GLOBAL_STATE - LENT.get(name, set())] == []
    quiet = ast.parse(ast.unparse(TREES[name]))
    quiet.body = [node for node in quiet.body if getattr(node, "name", "") not in MAY_PRINT]
    assert [name for call in calls(quiet) if (name := ast.unparse(call.func)) in CHATTY] == []


@pytest.mark.parametrize("name", sorted(TREES))
def test_heavy_packages_are_imported_where_they_are_used(name):
    assert imported_at_top(TREES[name]) & HEAVY == set()


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_function_is_long(name):
    long = {f.name: body_lines(f) for f in functions(TREES[name]) if body_lines(f) > MAX_BODY}
    assert long == {}


def test_the_typical_function_is_short():
    lengths = [body_lines(f) for tree in TREES.values() for f in functions(tree)]
    assert median(lengths) <= MEDIAN_BODY


@pytest.mark.parametrize("name", sorted(TREES))
def test_importing_a_module_does_nothing(name):
    """At the top level stand definitions and constants, no loose calls."""
    loose = [
        node.lineno
        for node in TREES[name].body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert loose == []


def test_importing_the_package_loads_nothing_heavy():
    code = "import torch, sys; before = set(sys.modules); import smslib; "
    code += f"print(sorted({HEAVY | {'pandas', 'scipy'}!r} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ the checks themselves


@pytest.mark.parametrize(
    "source",
    [
        "from smslib import train",
        "from smslib.train import fit",
        "import smslib.train",
        "from .train import fit",
        "from . import train",
        "def f():\n    from smslib import train",
    ],
)
def test_every_way_of_importing_is_seen(source):
    assert siblings(ast.parse(source)) == {"train"}


def test_docstrings_do_not_count_as_body():
    tree = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x')
    assert body_lines(functions(tree)[0]) == 2
