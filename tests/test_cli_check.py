"""The command `check`: its verdict is its exit code, and what is wrong with its words is one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from metaoptim.cli.main import main

SOURCE = """
from torch import nn

net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
three = 3

class Detaches(nn.Module):
    def forward(self, x):
        return x + x.detach().sin()

def faulty(ways=2):
    return nn.Sequential(nn.Linear(3, 4), Detaches(), nn.Linear(4, ways))

def needs(width, ways):
    return nn.Linear(3, width)

def breaks():
    return 1 / 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """The name of a file of the user's own, in the current folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    path = list(sys.path)
    with chdir(tmp_path):
        yield name
    assert sys.path == path, "the search path is left as it was"


def test_the_command_prints_a_verdict_and_returns_it(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["check", "--loss", "cross_entropy", "--input", "3", "--algorithm", "reptile"]
    assert main([*own, "--model", f"{folder}:net"]) == 0
    out = capsys.readouterr().out
    assert "right: reptile" in out and "loop · graph · eager" in out and "0.weight" in out
    assert main([*own, "--model", f"{folder}:faulty", "--ways", "3"]) == 1
    said = capsys.readouterr()
    assert "layer `1` (Detaches)" in said.out
    assert not said.err


@pytest.mark.slow
def test_the_command_knows_algorithms_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--recipe", "sinusoid-article-reptile"]) == 0
    assert "right: article_reptile" in capsys.readouterr().out
    assert main(["check", "article_reptile"]) == 0
    assert "conv.weight" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    ("", "say what to check"), ("maml --recipe sinusoid-maml", "say what to check"), ("mamal", "did you mean `maml`"),
    ("maml --loss mse", "--loss goes with --model alone"), ("--recipe sinusoid-mam", "did you mean `sinusoid-maml`"),
    ("--model OWN:net", "needs --loss"), ("--model OWN:net --loss ms --input 3", "did you mean `mse`"),
    ("--model OWN:net --loss mse --input 3,x", "--input 3,x: expected whole numbers"),
    ("--model OWN --loss mse --input 3", "expected MODULE:NAME"),
    ("--model no_such:net --loss mse --input 3", "no module no_such"),
    ("--model OWN:nett --loss mse --input 3", "there is no `nett` in OWN"),
    ("--model OWN:three --loss mse --input 3", "it is int"),
    ("--model OWN:needs --loss mse --input 3 --ways 2", "it needs width"),
    ("--model OWN:breaks --loss mse --input 3", "stopped with ZeroDivisionError"),
    ("--model OWN:net --loss mse --input 3 --ways 2", "takes no argument `ways`"),
    ("--model OWN:net --loss cross_entropy --input 4", "can't take these data"),
    ("--model OWN:net --loss cross_entropy --input 3 --algorithm mamal", "did you mean `maml`"),
])  # fmt: skip
def test_wrong_words_are_a_sentence(words: str, said: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words.replace("OWN", folder).split()]) == 2
    error = capsys.readouterr().err
    assert said.replace("OWN", folder) in error
    assert error.startswith("error: ") and error.count("\n") == 1
