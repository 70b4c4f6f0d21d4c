"""What README and docs say is true: Python runs, commands and recipes exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.main import get_command

import metaoptim as mo
from metaoptim.algorithms import ALGORITHMS
from metaoptim.cli.main import app
from metaoptim.cli.show import explain
from metaoptim.recipes import recipe as config

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]
PROSE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists())]
SHELL = {"bash", "sh", "shell", "console"}
FEW = 4  # blocks of all pages together that may be left out; those that need another library run where it is installed
NEEDS = "needs "  # how the reason of such a block begins


class Block(NamedTuple):
    """A fenced block: its language, its text, the line that it starts in, and why it isn't run (empty: it is)."""

    language: str
    text: str
    line: int
    reason: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, indented ones too."""
    fence = re.compile(
        r"^(?P<indent> *)(?P<marks>```+|~~~+)(?P<language>\w*).*\n(?P<body>(?:.*\n)*?)(?P=indent)(?P=marks)\s*$", re.M
    )
    for found in fence.finditer(text):
        before = text[: found.start()].rstrip().rpartition("\n")[2]
        reason = re.fullmatch(r"\s*<!-- not run: (.+) -->", before)
        body = re.sub(rf"^{found['indent']}", "", found["body"], flags=re.M)
        yield Block(found["language"], body, text.count("\n", 0, found.start()) + 2, reason[1] if reason else "")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.language in ("python", "py")]


def test_the_blocks_are_found() -> None:
    text = (
        "a\n```python\nx = 1\n```\n- b\n\n  ```bash\n  metaoptim list\n  ```\n\n<!-- not run: slow -->\n\n```python\ny\n```\n"
    )
    assert list(blocks(text)) == [
        Block("python", "x = 1\n", 3, ""), Block("bash", "metaoptim list\n", 8, ""), Block("python", "y\n", 14, "slow"),
    ]  # fmt: skip


def test_there_is_something_to_check_and_little_is_left_out() -> None:
    assert (ROOT / "README.md").exists()
    assert python_blocks(ROOT / "README.md")
    reasons = [(b.reason, f"{name_of(page)}:{b.line}") for page in PAGES for b in python_blocks(page)]
    left_out = [where for reason, where in reasons if reason and not reason.startswith(NEEDS)]
    assert len(left_out) <= FEW, left_out


def shrunk(code: str) -> str:
    """The same code with budgets of hundreds cut down: what is tested is that it runs, not what it learns."""
    return re.sub(r"\b(iterations|episodes)=\d{3,}\b", r"\1=2", code)


# Algorithms' pages are alike, so that one stands for them among the fast tests; the others take seconds each.
SLOW = {page for page in PAGES if page.parent.name == "algorithms" and page.stem != "maml"}
SLOW |= {page for page in PAGES if page.stem in ("gradients", "layers", "lopt", "tune", "own-optimizer")}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if python_blocks(page)],
    ids=name_of,
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One after the other, in one namespace, in an empty folder; warnings are errors, as in every test."""
    if any("omniglot(" in block.text for block in python_blocks(page)):
        monkeypatch.setenv("METAOPTIM_DATA", str(request.getfixturevalue("data_dir")))
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]), chdir(tmp_path):
        for block in python_blocks(page):
            if not block.reason:
                # Padded, so that a traceback shows the page's own line.
                code = compile("\n" * (block.line - 1) + shrunk(block.text), str(page), "exec")
                exec(code, namespace)


COMING_FROM = ROOT / "docs" / "coming-from.md"
PEERS = [block.reason.removeprefix(NEEDS) for block in python_blocks(COMING_FROM) if block.reason.startswith(NEEDS)]


def test_the_page_has_blocks_of_the_libraries_that_install() -> None:
    assert PEERS == ["higher", "torchopt"]


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_another_library_gives_the_same_gradient(peer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        try:
            import_module(peer)
        except ImportError:
            pytest.skip(f"{peer} is not installed: `pip install {peer}`, or `make bench`, which sets up .venv-bench with it")
        namespace: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            for block in python_blocks(COMING_FROM):
                if block.reason in ("", f"{NEEDS}{peer}"):
                    exec(compile("\n" * (block.line - 1) + block.text, str(COMING_FROM), "exec"), namespace)
    ours, theirs = namespace["ours"], namespace["theirs"]
    assert len(theirs) == len(ours) == 6
    for name, gradient in theirs.items():
        gap = (gradient - ours[f"weights.{name}"]).norm() / gradient.norm()
        assert gap < 1e-6, f"{peer}: {name} differs by {gap:.1e}"


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """The calls of `metaoptim` in a page's shell blocks: line and arguments."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in SHELL:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "console" and not line.startswith("$ "):
                continue  # what the command prints
            for part in re.split(r"&&|\|\||;|\|", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words and words[0].endswith("metaoptim"):
                    found.append((block.line, words[1:]))
    return found


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its options, checked as the command line checks them, but for folders of data to exist."""
    words = [os.curdir if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]
    group: Any = get_command(app)
    top = group.make_context("metaoptim", words, resilient_parsing=False)
    rest = [*top._protected_args, *top.args]
    if not rest:
        return "", {}
    name, command, rest = group.resolve_command(top, rest)
    if "--help" in rest:
        return name, {}
    return name, command.make_context(name, list(rest), parent=top).params


def check_command(words: list[str], page: Path) -> None:
    if words in ([], ["--help"], ["--version"]):
        return
    name, options = parsed(words)
    if name == "show" and options:
        explain(options["name"])
    if name == "train" and options:
        recipe = options["recipe"]
        if recipe in config.names():
            config.load(recipe, options["set_"] or ())
        else:  # a file of the reader's own, which the page must show or make
            assert recipe.endswith(".toml"), f"there is no recipe `{recipe}`"


@pytest.mark.parametrize(("words", "good"), [
    ("train sinusoid-maml --set algorithm.steps=5 --out x", True), ("train omniglot-maml --data nowhere", True),
    ("list", True), ("show maml", True), ("evaluate runs/x --steps 3", True), ("train no-such-recipe", False),
    ("train sinusoid-maml --ste x", False), ("trian sinusoid-maml", False), ("show mamal", False),
    ("train sinusoid-maml --set algorithm.stesp=5", False), ("evaluate", False),
])  # fmt: skip
def test_wrong_commands_would_be_noticed(words: str, good: bool) -> None:
    if good:
        check_command(words.split(), ROOT)
    else:
        with pytest.raises(Exception, match=r"(?i)no such|unknown|missing|there is no"):
            check_command(words.split(), ROOT)


@pytest.mark.parametrize("page", [page for page in PROSE if commands(page)], ids=name_of)
def test_commands_exist(page: Path) -> None:
    for line, words in commands(page):
        try:
            check_command(words, page)
        except Exception as error:
            pytest.fail(f"{name_of(page)}:{line}: `metaoptim {shlex.join(words)}`: {error}")


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_make_targets_and_toml_exist(page: Path, tmp_path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)) if (ROOT / "Makefile").exists() else set()
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in SHELL:
            wanted = set(re.findall(r"^(?:\$ )?make ([\w-]+)", block.text, re.M))
            assert wanted <= targets, f"{name_of(page)}:{block.line}"
        if block.language == "toml":
            tables = tomllib.loads(block.text)
            if {"algorithm", "tasks"} <= tables.keys():
                for file, name in re.findall(r'"(\w+\.py):(\w+)"', block.text):  # which the page shows
                    code = next(b.text for b in python_blocks(page) if re.search(rf"^(class|def) {name}\b", b.text, re.M))
                    (tmp_path / file).write_text(code)
                config.parse(block.text, "a page's recipe", folders=[tmp_path])


def anchors(page: Path) -> set[str]:
    """The names that headings get on the usual forges."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ +(.+?) *#*$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target} leads nowhere"
        assert there.is_relative_to(ROOT), f"{name_of(page)}: {target} leads out of the repository"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name_of(page)}: {target}: no such heading"


def test_public_names_can_be_looked_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(mo, name) is not None for name in dir(mo))
    with pytest.raises(AttributeError, match="no attribute 'mamal'"):
        getattr(mo, "ma" + "mal")


def row_of(page: str, name: str) -> str:
    """The row of a page's tables whose first cell names something; a failure that says which page lacks it."""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and re.search(rf"[`\[]{name}[`\]]", line.split("|")[1]):
            return line
    pytest.fail(f"{page} has no row for `{name}`; add one to its table")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_tables_list_every_algorithm(name: str) -> None:
    assert f"({name}.md)" in row_of("docs/algorithms/index.md", name)
    assert f"algorithms/{name}.md" in row_of("README.md", name) or name.startswith("article_")


@pytest.mark.parametrize("name", config.names())
def test_the_docs_state_what_a_recipe_has_measured(name: str) -> None:
    """In the README's table, or on the page of results; and nowhere for a recipe that was not measured."""
    expected, readme = config.load(name).tables["expected"], (ROOT / "README.md").read_text(encoding="utf-8")
    if not expected:
        assert f"| `{name}` |" not in readme
        return
    scale, digits = (100, 1) if expected["metric"] == "accuracy" else (1, 2)
    cell = f"{scale * expected['value']:.{digits}f} ± {scale * expected['interval']:.{digits}f}"
    if name == "glyphs-maml":  # the demo has a table of its own
        assert cell in readme
    elif f"| `{name}` |" in readme:
        assert f"**{cell}**" in row_of("README.md", name)
    else:
        digits = 2 if expected["metric"] == "accuracy" else 4
        assert f"| {scale * expected['value']:.{digits}f} ± " in row_of("docs/results.md", name)
