"""Which version of the code a number was measured with: a hash of what can change it, and the commit."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from metaoptim.recipes.places import codes
from metaoptim.recipes.recipe import Recipe

PACKAGE = Path(__file__).parents[1]
ROOTS = ("metaoptim.training.train", "metaoptim.evaluation.evaluate")
LISTS = frozenset({"metaoptim", "metaoptim.algorithms", "metaoptim.lopt", "metaoptim.tasks"})
"""Packages that import everything of their kind, of which a recipe uses one."""
ASIDE = ("metaoptim.gradcheck", "metaoptim.runs.progress", "metaoptim.runs.events", "metaoptim.runs.environment")
"""What watches, and changes no number."""


def version(recipe: Recipe) -> str:
    """A hash of the code that a recipe runs: what training, evaluation, its algorithm and its tasks import, and its own files.

    Comments, docstrings and layout don't count, nor do other algorithms and other tasks.
    """
    own = dict.fromkeys(Path(spec.rpartition(":")[0]) for spec in codes(recipe.tables))
    digest = hashlib.sha256()
    for name, text in sorted(_reached([*ROOTS, *recipe.experiment().modules]).items()):
        digest.update(f"{name}\n{text}\n".encode())
    for file in own:
        digest.update(_bare(file)[0].encode() if file.is_file() else str(file).encode())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit of the checkout that this package is run from, with + where files differ from it; "none" outside of one."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")) / "src" / "metaoptim" != PACKAGE.resolve():
            return "none"  # a checkout of something else, in which the package is installed
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def _reached(starts: Iterable[str]) -> dict[str, str]:
    """The modules of this package that these import, directly or not, and their bare text."""
    waiting, found = list(starts), dict[str, str]()
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if module in found or module in LISTS or module.startswith(ASIDE) or file is None:
            continue
        found[module], imported = _bare(file)
        waiting += imported
    return found


def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if module != "metaoptim" and f.is_file()), None)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metaoptim"):
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("metaoptim."))


@cache
def _bare(file: Path) -> tuple[str, tuple[str, ...]]:
    """A file's code without comments, docstrings and layout; and what of this package it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [n for n in node.body if not _is_text(n)] or [ast.Pass()]
    return ast.unparse(tree), tuple(_imported(tree))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
