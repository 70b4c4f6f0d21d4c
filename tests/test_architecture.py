"""The house rules that can be read off the source: who imports whom, how long files are, what no file may do."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import metaoptim
from metaoptim.algorithms import ALGORITHMS
from metaoptim.recipes import recipe as config

SOURCE = Path(metaoptim.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(SOURCE.rglob("*.py"))

# From the bottom up; a layer may import itself and what stands before it, and of its own group everything.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"core"}),
    frozenset({"nn"}),
    frozenset({"learners", "rules", "estimators"}),
    frozenset({"algorithms"}),
    frozenset({"engine"}),
    frozenset({"tasks", "reductions"}),
    frozenset({"training", "evaluation", "runs", "gradcheck", "diagnosis"}),
    frozenset({"lopt", "optim", "report"}),
    frozenset({"recipes"}),
    frozenset({"design"}),
    frozenset({"ledger"}),
    frozenset({"cli", "__main__"}),
)
RANK = {layer: i for i, group in enumerate(LAYERS) for layer in group}
TORCH_ALONE = frozenset().union(*LAYERS[:5])


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def layer(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def imports(file: Path, at_run_time: bool = False) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; at run time: not those for type checkers, nor inside functions."""
    waiting: list[ast.AST] = [tree_of(file)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative imports hide the layer"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and at_run_time:
            waiting += node.orelse
        elif not (at_run_time and isinstance(node, ast.FunctionDef)):
            waiting += ast.iter_child_nodes(node)


def own(file: Path, at_run_time: bool = False) -> set[str]:
    """The modules of this package that a file imports, but for the bare package, which holds names alone."""
    return {name for name in imports(file, at_run_time) if name.startswith("metaoptim.")}


def test_there_is_something_to_read() -> None:
    layers = {layer(module) for module in MODULES}
    assert layers - {""} == RANK.keys()
    assert own(SOURCE / "training" / "train.py") >= {"metaoptim.runs.store", "metaoptim.tasks", "metaoptim.core.types"}


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m)])
def test_layers(module: str) -> None:
    here = layer(module)
    for found in own(MODULES[module]):
        there = layer(found)
        if here == there == "algorithms" and {module.rpartition(".")[2], found.rpartition(".")[2]} <= ALGORITHMS.keys():
            pytest.fail(f"{module} imports {found}: an algorithm must not know another one")
        assert RANK[there] <= RANK[here], f"{module} imports {found}: layer {here} must not import {there}"


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) in TORCH_ALONE])
def test_the_core_needs_torch_alone(module: str) -> None:
    standard = set(sys.stdlib_module_names)
    others = {name.split(".")[0] for name in imports(MODULES[module])} - standard - {"metaoptim"}
    assert others <= {"torch"}


def test_only_the_edge_knows_the_bare_package() -> None:
    """It loads every layer, so to import it is to import anything."""
    users = {layer(m) for m, file in MODULES.items() if layer(m) and "metaoptim" in imports(file)}
    assert users <= {"optim", "runs", "training", "evaluation", "report", "recipes", "design", "ledger", "cli"}


@pytest.mark.parametrize("module", [m for m in MODULES if "__all__" in MODULES[m].read_text(encoding="utf-8")])
def test_a_package_offers_what_it_imports(module: str) -> None:
    imported = [node for node in tree_of(MODULES[module]).body if isinstance(node, ast.ImportFrom) and node.module]
    own_names = {
        alias.asname or alias.name for node in imported if node.module.startswith("metaoptim.") for alias in node.names
    }
    offered = set(import_module(module).__all__)
    assert own_names <= offered and all(hasattr(import_module(module), name) for name in offered)


def test_no_cycles() -> None:
    graph = {module: own(file, at_run_time=True) - {module} for module, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines < 100 if file.parent.name == "algorithms" and file.stem in ALGORITHMS else lines <= 300


def offences(node: ast.AST) -> str:
    """What a node does that nothing in the package may do; empty for nothing."""
    match node:
        case ast.Assert():
            return "assert: users' mistakes need a sentence, and -O takes asserts away"
        case ast.Import(names=names) if {"pickle", "cPickle", "dill", "joblib"} & {n.name.split(".")[0] for n in names}:
            return "pickle: opening somebody's file could run their code"
        case ast.ImportFrom(module="pickle" | "dill" | "joblib"):
            return "pickle: opening somebody's file could run their code"
        case ast.Call(func=ast.Name(id="print")):
            return "print: results go through the command line's console, progress to stderr"
        case ast.Call(func=ast.Name(id="super")):
            return "super(): nothing inherits behaviour"
        case ast.Attribute(value=ast.Name(id="torch"), attr="save" | "load"):
            return "torch.save and torch.load are pickle"
        case ast.Call(func=ast.Attribute(attr="cpu" | "cuda")):
            return "a device of its own: tensors stay where the user put them"
        case ast.Call(keywords=keywords) if any(k.arg == "device" and isinstance(k.value, ast.Constant) for k in keywords):
            return "a device of its own: tensors stay where the user put them"
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            return "pickle: opening somebody's file could run their code"
    return ""


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_what_no_file_may_do(file: Path) -> None:
    found = [f"line {getattr(n, 'lineno', '?')}: {why}" for n in ast.walk(tree_of(file)) if (why := offences(n))]
    assert not found


@pytest.mark.parametrize(
    "line",
    ["assert x", "print(1)", "import pickle", "from pickle import loads", "torch.load(f)", "x.cpu()", "x.cuda(0)",
     "torch.zeros(3, device='cpu')", "super().f()", "np.load(f, allow_pickle=True)"],
)  # fmt: skip
def test_the_rules_see_offences(line: str) -> None:
    assert any(offences(node) for node in ast.walk(ast.parse(line)))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_public_things_have_docstrings(file: Path) -> None:
    tree = tree_of(file)
    assert ast.get_docstring(tree) or not tree.body, "the file says nothing of itself"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"`{node.name}` has no docstring"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_file_a_page_and_a_recipe(name: str) -> None:
    assert (SOURCE / "algorithms" / f"{name}.py").is_file()
    assert (ROOT / "docs" / "algorithms" / f"{name}.md").is_file()
    assert any(config.load(recipe).tables["algorithm"]["name"] == name for recipe in config.names())


def test_the_package_ships_its_type_hints_and_recipes() -> None:
    assert (SOURCE / "py.typed").is_file()
    assert config.names()
