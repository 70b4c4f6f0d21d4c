"""CIFAR-FS, FC100 and fertility: the same from every form of the data, the splits of the papers, and damage in one sentence."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import metaoptim as mo
from metaoptim.tasks import ImageTasks
from metaoptim.tasks.cifar_classes import HELD_OUT

cifar = import_module("metaoptim.tasks.cifar_fs")
COPIES = 3


def class_names() -> list[str]:
    held = {name for parts in HELD_OUT.values() for classes in parts.values() for name in classes.split()}
    return [*sorted(held), *(f"plain{i}" for i in range(100 - len(held)))]


def pictures() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Three images of each class in an order of no meaning, and their labels."""
    draw = np.random.default_rng(0)
    label = draw.permutation(np.repeat(np.arange(100), COPIES)).astype(np.uint8)
    return draw.integers(0, 256, (len(label), 3, 32, 32), dtype=np.uint8), label


def unpacked(root: Path, keep: slice = slice(None)) -> Path:
    images, label = pictures()
    records = np.concatenate([label[:, None] // 5, label[:, None], images.reshape(len(label), -1)], axis=1)[keep]
    folder = root / cifar.UNPACKED
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(records[50:].tobytes())
    (folder / "test.bin").write_bytes(records[:50].tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(class_names()) + "\n")
    return root


def packed(root: Path) -> Path:
    source = unpacked(root / "source") / cifar.UNPACKED
    with tarfile.open(root / f"{cifar.UNPACKED}.tar.gz", "w:gz") as archive:
        archive.add(source, cifar.UNPACKED)
    return root


def compact(root: Path) -> Path:
    (root / "cifar100_fewshot").mkdir(parents=True)
    images, label = pictures()
    order = np.concatenate([np.arange(50, len(label)), np.arange(50)])  # as train.bin and test.bin come
    blobs = []
    for image in images[order]:
        data = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(data, "PNG", compress_level=0)
        blobs.append(data.getvalue())
    offset = np.cumsum([0, *map(len, blobs)])
    blob = np.frombuffer(b"".join(blobs), np.uint8)
    file = root / "cifar100_fewshot" / "cifar100_few.npz"
    np.savez(file, blob=blob, offset=offset, label=label[order].astype(np.int16), class_names=np.array(class_names()))
    return root


@pytest.mark.parametrize("form", [unpacked, packed, compact])
def test_every_form_gives_the_same_images(tmp_path: Path, empty_cache: Path, form: Callable[[Path], Path]) -> None:
    tasks = mo.tasks.cifar_fs(ways=5, shots=1, queries=2, root=str(form(tmp_path / "data")))
    images, label = pictures()
    for name in ("apple", "wolf", "baby"):
        if name in class_names():
            mine = images[label == class_names().index(name)]
            found = tasks.images[list(tasks.names).index(name)]
            assert {x.tobytes() for x in found} == {x.tobytes() for x in mine}
    assert list(tasks.names) == sorted(class_names()) and tasks.images.shape == (100, COPIES, 3, 32, 32)
    assert tasks.sample("test", seed=0, start=0, count=2).support[0].shape == (2, 5, 3, 32, 32)
    assert tasks.describe("test")["options"]["images_per_class"] == COPIES


@pytest.mark.parametrize(("split", "sizes"), [("cifar_fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_splits(tmp_path: Path, empty_cache: Path, split: str, sizes: tuple[int, ...]) -> None:
    tasks = mo.tasks.cifar_fs(queries=1, split=split, root=str(unpacked(tmp_path)))  # type: ignore[arg-type]
    assert tuple(tasks.classes(part) for part in ("train", "val", "test")) == sizes
    assert tasks.class_names("test") == HELD_OUT[split]["test"].split()


def test_without_a_folder_it_is_downloaded(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAOPTIM_DATA", raising=False)
    archive = packed(tmp_path) / f"{cifar.UNPACKED}.tar.gz"
    asked = []
    monkeypatch.setattr(cifar, "fetch", lambda *given: asked.append(given) or archive)
    assert mo.tasks.cifar_fs(queries=1).classes("train") == 64
    assert asked == [(cifar.URL, empty_cache / f"{cifar.UNPACKED}.tar.gz", cifar.MD5)]


def _cut(root: Path) -> None:
    file = root / f"{cifar.UNPACKED}.tar.gz"
    file.write_bytes(file.read_bytes()[:2000])


def _without_names(root: Path) -> None:
    with tarfile.open(root / f"{cifar.UNPACKED}.tar.gz", "w:gz") as archive:
        archive.add(root / "source" / cifar.UNPACKED / "train.bin", f"{cifar.UNPACKED}/train.bin")


@pytest.mark.parametrize(("make", "harm", "words"), [
    (packed, _cut, ["can't be read", "fetch it again from https://"]),
    (packed, _without_names, ["can't be read", "test.bin"]),
    (unpacked, lambda root: (root / cifar.UNPACKED / "test.bin").unlink(), ["can't be read", "No such file"]),
    (unpacked, lambda root: (root / cifar.UNPACKED / "test.bin").write_bytes(b"x"), ["no multiple of 3074"]),
    (lambda root: unpacked(root, slice(1, None)), None, ["100 classes with 2 to 3 images"]),
    (lambda root: root.mkdir() or root, None, ["holds no CIFAR-100", "or name no folder, and it is downloaded"]),
])  # fmt: skip
def test_damage_is_told_in_one_sentence(
    tmp_path: Path, empty_cache: Path, make: Callable[[Path], Path], harm: Callable[[Path], None] | None, words: list[str]
) -> None:
    root = make(tmp_path / "data")
    if harm:
        harm(root)
    with pytest.raises((ValueError, OSError)) as raised:
        mo.tasks.cifar_fs(root=str(root))
    assert all(word in str(raised.value) for word in words), raised.value


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'cifar'; it must be 'cifar_fs' or 'fc100'"):
        mo.tasks.cifar_fs(split="cifar")  # type: ignore[arg-type]


@pytest.fixture
def real(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not list(data_dir.glob("cifar100_fewshot/cifar100*.npz")):
        pytest.skip(f"{data_dir} holds no cifar100_fewshot")
    monkeypatch.setenv("METAOPTIM_DATA", str(data_dir))
    return data_dir


@pytest.mark.slow
def test_the_real_images_are_as_hard_as_they_were(real: Path, pixel_accuracy: Callable[[ImageTasks, int], float]) -> None:
    """29.8 and 39.5 % by a loop of NumPy's over other episodes, read straight from the file."""
    assert pixel_accuracy(mo.tasks.cifar_fs(queries=15), 600) == pytest.approx(29.8, abs=1.0)
    assert pixel_accuracy(mo.tasks.cifar_fs(shots=5, queries=15), 600) == pytest.approx(39.5, abs=1.0)


def test_the_held_out_classes_are_those_of_the_papers(real: Path) -> None:
    with np.load(next(real.glob("cifar100_fewshot/cifar100*.npz")), allow_pickle=False) as data:
        names, superclass = data["class_names"].tolist(), data["superclass"].tolist()
        for split, parts in HELD_OUT.items():
            listed = data[f"{split}_split"].tolist()
            for part, classes in parts.items():
                assert classes.split() == [n for n, where in zip(names, listed, strict=True) if where == part]
    above = dict(zip(names, superclass, strict=True))
    fc100 = HELD_OUT["fc100"]
    held = {part: {above[name] for name in classes.split()} for part, classes in fc100.items()}
    rest = {above[name] for name in names if name not in fc100["val"].split() + fc100["test"].split()}
    assert not (held["val"] & held["test"] or rest & (held["val"] | held["test"]))  # no superclass is in two splits


def table(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"land{c},{1960 + i},{5 - 0.05 * i + c}" for c in range(10) for i in range(20)]
    (folder / "fertility_worldbank.csv").write_text("\n".join(["country,year,fertility", *rows]))
    return folder


def test_fertility_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_DATA", str(table(tmp_path / "regression").parent))
    tasks = mo.tasks.fertility(shots=3, queries=4)
    plain = mo.tasks.from_table(str(tmp_path / "regression" / "fertility_worldbank.csv"), "country", "fertility", 3, 4)
    ours, theirs = (t.sample("test", seed=0, start=0, count=3).query for t in (tasks, plain))
    assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    assert tasks.describe("test")["family"] == "fertility" and ours[0].shape == (3, 4, 1)
    assert mo.tasks.fertility(root=str(tmp_path / "regression")).splits == ("train", "val", "test")


def test_fertility_needs_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAOPTIM_DATA", raising=False)
    with pytest.raises(ValueError, match=r"There is no fertility_worldbank\.csv \(or \.gz\): no folder is named; put"):
        mo.tasks.fertility()
    with pytest.raises(ValueError, match="root names the folder"):
        mo.tasks.fertility(root=str(tmp_path))


def test_the_real_countries(real: Path) -> None:
    tasks = mo.tasks.fertility()
    assert {split: len(members) for split, members in tasks.members.items()} == {"train": 116, "val": 39, "test": 39}
