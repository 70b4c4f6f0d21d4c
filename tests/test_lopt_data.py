"""Data for training problems: area averages, standardised; from folders, and in one sentence what is wrong with those."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from metaoptim.core import trees
from metaoptim.lopt import data, families
from metaoptim.lopt.data import Data, load
from metaoptim.lopt.text import text


def mnist(folder: Path, keep: int | None = None) -> Path:
    """Files of the shape of MNIST's test files, with noise."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, (_, header, shape) in data.MNIST.items():
        content = bytes(header) + draw.integers(0, 10, shape, dtype=np.uint8).tobytes()
        (folder / name).write_bytes(gzip.compress(content[:keep], 1))
    return folder


@pytest.mark.parametrize(("old", "new"), [(28, 8), (28, 16), (8, 16), (8, 8)])
def test_images_are_averaged_over_areas(old: int, new: int) -> None:
    image = np.random.default_rng(0).random((old, old))
    fine = np.kron(image, np.ones((new, new)))  # every new pixel is a whole block of these
    blocks = fine.reshape(new, old, new, old).mean((1, 3))
    shares = data._areas(old, new)
    np.testing.assert_allclose(shares @ image @ shares.T, blocks, rtol=1e-12)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize(("name", "count", "classes"), [("digits", 1797, 10), ("glyphs", 2600, 26)])
def test_sets_without_a_download(name: str, count: int, classes: int, size: int) -> None:
    check(load(name, size), count, classes, size)


def check(found: Data, count: int, classes: int, size: int) -> None:
    assert found.x.shape == (count, 1, size, size) and found.x.dtype == torch.float32
    assert found.y.shape == (count,) and found.y.dtype == torch.int64 and found.classes == classes
    assert torch.equal(found.y.unique(), torch.arange(classes))
    assert abs(found.x.mean()) < 1e-5 and found.x.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_digits_are_scikit_learns() -> None:
    found, theirs = load("digits"), load_digits()
    np.testing.assert_allclose(found.x[:, 0], (theirs.images - theirs.images.mean()) / theirs.images.std(), rtol=1e-5)
    assert found.y.tolist() == theirs.target.tolist()


def test_sets_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path / "mnist_t10k")
    monkeypatch.setenv("METAOPTIM_DATA", str(tmp_path))
    check(load("mnist"), 10_000, 10, 8)
    assert torch.equal(load("mnist", root=str(tmp_path / "mnist_t10k")).x, load("mnist").x)


def test_real_sets(data_dir: Path) -> None:
    for name, count in (("mnist", 10_000), ("cifar", 1000)):
        check(load(name, 16, root=str(data_dir)), count, 10, 16)
    assert load("mnist", root=str(data_dir)).y[:5].tolist() == [7, 2, 1, 0, 4]


def test_what_is_wrong_with_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no data set 'faces'; choose one of digits, glyphs, mnist, cifar"):
        load("faces")
    with pytest.raises(ValueError, match="size=0"):
        load("digits", 0)
    with pytest.raises(ValueError, match=r"root names the folder .* holds no t10k-images.* and it is downloaded"):
        load("mnist", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"can't be read .*reshape.*; fetch it again from https"):
        load("mnist", root=str(mnist(tmp_path / "short", 1000)))
    broken = mnist(tmp_path / "broken") / "t10k-labels-idx1-ubyte.gz"
    for content in (b"no archive", broken.read_bytes()[:-100]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-labels.* can't be read"):
            load("mnist", root=str(tmp_path / "broken"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"scikit-learn, which isn't installed: pip install 'metaoptim\[lopt\]'"):
        load("digits")


def test_minibatches_are_drawn_evenly_with_replacement(doubles: None) -> None:
    found = Data("numbers", torch.arange(10.0, dtype=torch.float32), torch.arange(10), 10)
    x, y = found.batches(64, 0, "support", 0, 200)
    assert x.shape == y.shape == (200, 64) and x.dtype == torch.float64 and torch.equal(x.long(), y)
    counts = torch.bincount(y.flatten()).double()
    assert (counts - 1280).square().sum() / 1280 < 27.9  # χ² with 9 degrees of freedom, 999 of 1000
    assert not torch.equal(y, found.batches(64, 0, "query", 0, 200)[1])


def test_the_text_is_the_same_everywhere() -> None:
    found = text(16)
    letters = " .abcdefghiklmnopqrstuvw"
    written = "".join(letters[i] for i in [*found.x[0].tolist(), *found.y[0, -1:].tolist(), *found.y[1:, -1].tolist()])
    assert written.startswith("the farmers follow the rivers near the quiet painter. the bright stone that the")
    digest = hashlib.sha256(written.encode()).hexdigest()
    assert digest == "818447e169a79536b1f3adb57398f6cf9a4cc651c2540f22fca67f23344e13a3"
    assert found.classes == len(letters) == len(set(written)) and found.x.shape == (len(written) - 16, 16)
    assert torch.equal(found.x[:, 1:], found.y[:, :-1])


def test_tables_of_families(data_dir: Path) -> None:
    trained, unseen = families.training_families(str(data_dir)), families.held_out(str(data_dir))
    assert len({f.name for f in trained}) == len(trained) and {f.steps for f in trained} == {100}
    base = trained[0]
    assert unseen["5 times the steps"].steps == 5 * base.steps and unseen["5 times the steps"].name == base.name
    assert unseen["10 times the width"].options["hidden"] == [10 * base.options["hidden"][0]]
    assert not {f.options["data"] for f in trained} & {unseen[n].options["data"] for n in ("MNIST", "CIFAR", "transformer")}
    for family in unseen.values():
        support = trees.index(family.stretch("test", 0, [0], [0], [family.steps], 1).support, (0, 0))
        loss, _ = family.judged(support["start"], support["scale"], trees.index(support["batches"], 0))
        assert 0.8 < loss < 1.6  # a start knows next to nothing
