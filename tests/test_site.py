"""The site: its navigation has every page once, notebooks run and are kept without outputs, docstrings and pages agree."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metaoptim.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def part(name: str) -> ModuleType:
    """A module of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tree, checked = part("tree"), part("check")


def text_of(page: str) -> str:
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


def test_the_navigation_has_every_page_once() -> None:
    captions, placed = zip(*tree.sections(text_of(tree.ROOT)), strict=True)
    assert captions == ("Start", "Guide", "Reference", "Background", "Project")
    nav = [page for pages in placed for page in pages]
    for index in tree.NESTED:
        assert index in nav
        nav += [page for page in tree.linked(text_of(index), index) if Path(page).parent == Path(index).parent]
    files = [*ROOT.glob("docs/**/*.md"), *NOTEBOOKS, *(ROOT / f"{n}.md" for n in ("README", "CHANGELOG", "CONTRIBUTING"))]
    pages = {str(file.relative_to(ROOT).with_suffix("")) for file in files if file.parent != ROOT / "docs" / "api"}
    assert sorted(nav) == sorted(pages - {tree.ROOT})


def test_links_are_pages_in_their_order() -> None:
    text = "## A\n- [x](x.md), [y](sub/y.ipynb#z), [x](x.md)\n## B\n[no](a.txt) [web](https://a.b/c.md)\n"
    text += "## C\n[z](../z.md) [x](x.md)"
    assert tree.sections(text) == [("A", ["docs/x", "docs/sub/y"]), ("C", ["z"])]


def test_links_of_a_built_site_are_looked_at(tmp_path: Path) -> None:
    right = '<p id="here"><a href="b.html#there">b</a><a href="#here">up</a><a href="https://example.org/c">c</a>'
    (tmp_path / "a.html").write_text(right)
    (tmp_path / "b.html").write_text('<p id="there"><img src="data:image/png;base64,x">')
    assert checked.faults(tmp_path) == []
    wrong = '<a href="c.html"></a><a href="b.html#gone"></a><script src="https://example.org/c.js"></script>'
    wrong += '<a href="https:/a"></a>'
    (tmp_path / "a.html").write_text(wrong)
    assert [fault.removeprefix("a.html: ") for fault in checked.faults(tmp_path)] == [
        "c.html leads nowhere.", "b.html#gone: there is no such place on that page.",
        "<script> loads https://example.org/c.js from elsewhere.", "https:/a is not a complete address.",
    ]  # fmt: skip


def test_docstrings_become_restructured_text() -> None:
    reference = part("reference")
    told = "MAML: *a* start_.\n\n    θ ← β * ∇\n    and on\n\nText `a*b` | c.\n\nArgs:\n    x: one\n\n    more"
    lines = told.split("\n")
    reference.as_restructured_text(None, "function", "f", None, None, lines)
    expected = (
        "MAML: \\*a\\* start\\_.\n\n::\n\n    θ ← β * ∇\n    and on\n\nText `a*b` \\| c.\n\nArgs:\n    x: one\n\n    more"
    )
    assert "\n".join(lines) == expected
    rooms = reference.rooms()
    assert {"mo", "mo.rules", "mo.tasks", "mo.lopt"} <= rooms.keys()
    assert {"maml", "train", "Run"} <= set(rooms["mo"][1]) and "SGD" in rooms["mo.rules"][1]
    assert all(names for _, names in rooms.values())


def formulas(text: str) -> list[str]:
    """The indented lines of a text, without what stands behind them as a remark."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.split(r" {2,}", line)[0] for line in lines]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_of_an_algorithm_agrees_with_its_docstring(name: str) -> None:
    build, page = ALGORITHMS[name], text_of(f"docs/algorithms/{name}")
    known = " ".join(re.sub(r" +", " ", page).split("\n"))
    told = formulas(inspect.getdoc(import_module(build.__module__)) or "")
    assert told and [line for line in told if line not in known] == []
    address = re.search(r"https://\S+?(?=[,.;)]*(\s|$))", inspect.getdoc(import_module(build.__module__)) or "")
    assert address and address[0] in page
    options = {k: p.default for k, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for option, default in options.items():
        row = re.search(rf"^\| `{option}` \| `?([^|`]*)`? \|", page, re.M)
        assert row, f"docs/algorithms/{name}.md lacks the option {option}"
        assert same(row[1].strip(), default), f"docs/algorithms/{name}.md: {option} is {row[1]}, and by the code {default!r}"


def same(written: str, default: object) -> bool:
    """Whether a default is as the page writes it, in TOML."""
    if default is None or isinstance(default, bool | str):
        return written.strip('"') == ("none" if default is None else str(default).lower())
    return float(written) == default


@pytest.mark.parametrize("page", ["docs/choose"])
def test_numbers_are_those_of_the_results(page: str) -> None:
    rows = [line for line in text_of("docs/results").splitlines() if line.startswith("| `")]
    found = 0
    for line in text_of(page).splitlines():
        recipes = re.findall(r"`((?:omniglot|cifar-fs|fertility|sinusoid|lopt)-[\w-]+)`", line)
        numbers = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?(?= ×| \||;|$|, )", line)
        if line.startswith("|") and recipes:
            of_these = [cell.strip() for row in rows if row.split("`")[1] in recipes for cell in row.split("|")]
            assert numbers and not (gone := [n for n in numbers if n not in of_these]), f"{line}: {gone}"
            found += len(numbers)
    assert found > 40


def cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(notebook: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    nbformat.validate(nbformat.read(notebook, as_version=4))
    assert "".join(cells(notebook)[0]["source"]).startswith("# ")
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        for target in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
            assert (notebook.parent / target).exists(), f"{notebook.name}: {target} leads nowhere"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, in a kernel of its own, with budgets that are too small to learn anything."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    monkeypatch.setenv("METAOPTIM_NOTEBOOK_ITERATIONS", "3")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    read = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(read, timeout=300, kernel_name="python3", resources=resources).execute()
    assert any("image/png" in output.get("data", {}) for cell in done.cells for output in cell.get("outputs", []))
