"""The guide's example, done to the letter: ANIL is taken out of a copy of the project and put back as the guide prints it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALGORITHMS = Path("src/metaoptim/algorithms")


def printed(language: str) -> list[str]:
    """The guide's blocks of a language, indented ones too."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    fence = re.compile(rf"^(?P<indent> *)```{language}\n(?P<body>(?:.*\n)*?)(?P=indent)```$", re.M)
    return [re.sub(rf"^{found['indent']}", "", found["body"], flags=re.M) for found in fence.finditer(text)]


def pytest_of(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "METAOPTIM_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rf", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


def test_the_guide_prints_the_file_that_is_there() -> None:
    file, imported, entry = printed("python")
    assert file == (ROOT / ALGORITHMS / "anil.py").read_text(encoding="utf-8")
    listed = (ROOT / ALGORITHMS / "__init__.py").read_text(encoding="utf-8")
    assert imported in listed and entry in listed
    (recipe,) = printed("toml")
    assert (ROOT / "src/metaoptim/recipes/glyphs-anil.toml").read_text(encoding="utf-8").startswith(recipe)


@pytest.mark.slow
def test_a_paper_is_one_file_two_lines_and_a_recipe(tmp_path: Path) -> None:
    copied = ("src", "tests", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    file, imported, entry = printed("python")
    (recipe,) = printed("toml")
    target, listing = tmp_path / ALGORITHMS / "anil.py", tmp_path / ALGORITHMS / "__init__.py"
    stored = tmp_path / "src/metaoptim/recipes/glyphs-anil.toml"
    target.unlink()
    stored.unlink()
    without = listing.read_text().replace(imported, "").replace(entry, "")
    assert "anil" not in without
    listing.write_text(without)
    files = [f"tests/test_{name}.py" for name in ("contract", "cli", "docs", "architecture", "facade")]
    assert "failed" in pytest_of(tmp_path, "tests/test_docs.py", "-k", "anil"), (
        "pages name it, and it is gone: this is the copy"
    )

    target.write_text(file)
    before = "from metaoptim.algorithms.article_maml"
    listing.write_text(without.replace(before, imported + before).replace('    "article_maml"', entry + '    "article_maml"'))
    stored.write_text(recipe)
    found = pytest_of(tmp_path, *files, "-k", "anil and not has_measured")  # which nobody has, yet
    passed = re.search(r"^(\d+) passed, \d+ deselected", found.splitlines()[-1])
    assert passed and int(passed[1]) >= 25, found
