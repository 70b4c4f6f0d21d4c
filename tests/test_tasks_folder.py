"""Images of one's own: what is read, how it is scaled, divided and drawn, and what is refused in which words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import metaoptim as mo
from metaoptim.runs import identity
from metaoptim.tasks import ImageTasks, folder
from metaoptim.tasks.alike import alike
from metaoptim.tasks.folder import FolderReader


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: NDArray[np.uint8], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def root(tmp_path: Path, empty_cache: Path) -> Path:
    """Nine classes of 3 to 5 grey images; image i of class c has the one value 10 c + i."""
    for c in range(9):
        for i in range(3 + c % 3):
            save(tmp_path / "data" / f"class{c}" / f"{i}.png", np.full((6, 6), 10 * c + i, np.uint8))
    return tmp_path / "data"


def values(x: object) -> list[int]:
    """The value of each image of one episode."""
    pixels = np.asarray(x)
    return np.round(255 * pixels[:, 0, 0, 0]).astype(int).tolist()


def test_images_of_any_size_become_squares(tmp_path: Path, empty_cache: Path) -> None:
    for c in range(6):
        for i, shape in enumerate([(7, 12), (30, 9), (5, 5)]):
            save(tmp_path / "data" / str(c) / f"{i}.png", noise(10 * c + i, *shape))
    tasks = mo.tasks.from_folder(tmp_path / "data", ways=2, shots=1, queries=2, size=8)
    (xs, ys), (xq, yq) = tasks.sample("train", seed=0, start=0, count=3)
    assert xs.shape == (3, 2, 1, 8, 8) and xq.shape == (3, 4, 1, 8, 8)
    assert sorted(ys[0].tolist()) == [0, 1] and yq[0].tolist() == [0, 0, 1, 1]


def test_the_middle_is_taken(tmp_path: Path, empty_cache: Path) -> None:
    pixels = noise(1, 4, 8)
    save(tmp_path / "wide.png", pixels)
    assert (folder.read([tmp_path / "wide.png"], 4, 1)[0, 0] == pixels[:, 2:6]).all()


@pytest.mark.parametrize(("colour", "channels"), [("auto", 3), ("grey", 1), ("rgb", 3)])
def test_one_colour_makes_all_coloured(root: Path, colour: str, channels: int) -> None:
    save(root / "class0" / "red.png", noise(3, 6, 6, 3))
    tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6, colour=colour)  # type: ignore[arg-type]
    assert tasks.sample("train", seed=0, start=0, count=1).support[0].shape[2] == channels
    assert tasks.describe("train")["options"]["channels"] == channels


def test_what_a_file_says_of_its_pixels_is_heeded(tmp_path: Path) -> None:
    """The way up, transparency and 16 bits."""
    pixels = noise(2, 5, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    save(tmp_path / "turned.png", pixels, exif=exif)
    clear = np.dstack([pixels, pixels, pixels, np.where(pixels > 100, 255, 0).astype(np.uint8)])
    save(tmp_path / "clear.png", clear)
    save(tmp_path / "deep.png", pixels.astype(np.uint16) * 257)  # type: ignore[arg-type]
    turned, over_white, deep = folder.read([tmp_path / f"{n}.png" for n in ("turned", "clear", "deep")], 5, 1)[:, 0]
    assert (turned == np.rot90(pixels, -1)).all()
    assert (over_white == np.where(pixels > 100, pixels, 255)).all()
    assert (deep == pixels).all()


def test_short_classes_may_be_left_out(root: Path) -> None:
    with pytest.warns(UserWarning, match="3 of the 9 classes in .* are left out, for an episode needs 4 images"):
        tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=3, size=6, short="leave_out")
    assert sorted(tasks.names) == [f"class{c}" for c in range(9) if c % 3]
    assert tasks.describe("train")["options"]["short"] == "leave_out"


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_whose_range_is_not_known_are_refused(root: Path, kind: type) -> None:
    save(root / "class4" / "deep.tif", np.linspace(0, 1000, 36).reshape(6, 6).astype(kind))
    with pytest.raises(ValueError, match=r"class4/deep.tif can't be read as an image \(its pixels are .* of 32 bits, whose"):
        mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6)


def test_images_that_are_nearly_of_one_colour_are_told(tmp_path: Path, empty_cache: Path) -> None:
    """12 bits in a file of 16."""
    for c in range(6):
        for i in range(2):
            pixels = np.random.default_rng(10 * c + i).integers(0, 4096, (6, 6), dtype=np.uint16)
            save(tmp_path / "data" / str(c) / f"{i}.png", pixels)  # type: ignore[arg-type]
    with pytest.warns(UserWarning) as told:
        mo.tasks.from_folder(tmp_path / "data", ways=2, shots=1, queries=1, size=6)
    assert "their pixels lie between 0 and 16 of 255" in str(told[0].message)


def test_classes_of_different_size_are_drawn_without_repetition(root: Path) -> None:
    tasks = mo.tasks.from_folder(root, ways=3, shots=1, queries=2, size=6)
    batch = tasks.sample("train", seed=0, start=0, count=200)
    seen = set[int]()
    for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
        drawn = list(zip(values(xs) + values(xq), ys.tolist() + yq.tolist(), strict=True))
        assert len({value for value, _ in drawn}) == 9
        classes = {label: {value // 10 for value, other in drawn if other == label} for label in range(3)}
        assert all(len(found) == 1 for found in classes.values()) and len(set(map(tuple, classes.values()))) == 3
        seen |= {value for value, _ in drawn}
    there = {10 * c + i for c in tasks.members["train"].tolist() for i in range(3 + c % 3)}
    assert seen == there


def test_counts_change_nothing_where_all_are_equal() -> None:
    images = noise(0, 6, 5, 4, 4)
    members = {"train": np.arange(3), "test": np.arange(3, 6)}
    names = list("abcdef")
    stacked = ImageTasks("x", images, names, members, 3, 2, 2, rotations=True)
    flat = ImageTasks("x", images.reshape(-1, 4, 4), names, members, 3, 2, 2, rotations=True, counts=[5] * 6)
    for a, b in zip(*(t.sample("test", seed=1, start=4, count=3).query for t in (stacked, flat)), strict=True):
        assert a.equal(b)
    for a, b in zip(*(t.batch("test", seed=1, start=4, count=30) for t in (stacked, flat)), strict=True):
        assert a.equal(b)


def test_classifier_batches_know_the_size_of_each_class(root: Path) -> None:
    tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6)
    x, y = tasks.batch("train", seed=0, start=0, count=300)
    members = tasks.members["train"].tolist()
    assert all(value // 10 == members[label] for value, label in zip(values(x), y.tolist(), strict=True))
    assert set(values(x)) == {10 * c + i for c in members for i in range(3 + c % 3)}


def test_a_seed_divides_the_classes(root: Path) -> None:
    def split(seed: int) -> dict[str, list[int]]:
        tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6, split_seed=seed)
        return {name: classes.tolist() for name, classes in tasks.members.items()}

    found = split(0)
    assert {k: len(v) for k, v in found.items()} == {"train": 5, "val": 2, "test": 2}
    assert sorted(c for classes in found.values() for c in classes) == list(range(9))
    assert split(0) == found and any(split(seed) != found for seed in range(1, 4))


def test_a_file_divides_the_classes(root: Path, tmp_path: Path) -> None:
    lines = ["class,split", *(f"class{c},{'test' if c < 3 else 'train'}" for c in range(9))]
    (tmp_path / "splits.csv").write_text("\n".join(lines))
    tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6, splits=str(tmp_path / "splits.csv"))
    assert tasks.splits == ("train", "test") and tasks.class_names("test") == ["class0", "class1", "class2"]


def test_files_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6)
    first = tasks.sample("test", seed=0, start=0, count=2)
    real = folder.read
    monkeypatch.setattr(folder, "read", lambda *_: pytest.fail("the cache was passed over"))
    again = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6).sample("test", seed=0, start=0, count=2)
    assert again.support[0].equal(first.support[0])
    monkeypatch.setattr(folder, "read", real)
    for c in range(9):
        save(root / f"class{c}" / "0.png", np.full((6, 6), 250, np.uint8))
        os.utime(root / f"class{c}" / "0.png", (1, 1))
    changed = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6)
    assert (changed.images == 250).all((1, 2, 3)).sum() == 9


def test_a_folder_may_be_moved(root: Path, tmp_path: Path) -> None:
    """Where it lies is told, for a run's recipe, and makes no other tasks of it."""
    here = mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6).describe("test")
    shutil.copytree(root, tmp_path / "elsewhere")
    there = mo.tasks.from_folder(tmp_path / "elsewhere", ways=2, shots=1, queries=1, size=6).describe("test")
    assert here["location"] == {"root": str(root)} and here != there
    assert list(identity.differences(here, there)) == []
    other = mo.tasks.from_folder(root, ways=2, shots=1, queries=2, size=6).describe("test")
    assert [field for field, *_ in identity.differences(here, other)] == ["options.queries"]


def test_files_that_are_no_images_are_passed_over(root: Path) -> None:
    (root / "class0" / "notes.txt").write_text("x")
    (root / "class0" / ".hidden.png").write_text("x")
    (root / ".git").mkdir()
    assert len(mo.tasks.from_folder(root, ways=2, shots=1, queries=1, size=6).names) == 9


def textured(root: Path) -> tuple[Path, Path]:
    """Three classes of noise, one for each split; the first image of train and where a copy of it would lie in test."""
    for c in range(3):
        for i in range(4):
            save(root / f"class{c}" / f"{i}.png", np.kron(noise(10 * c + i, 8, 8), np.ones((4, 4), np.uint8)))
    (root.parent / "splits.csv").write_text("class0,train\nclass1,val\nclass2,test\n")
    return root / "class0" / "0.png", root / "class2" / "copy.jpg"


def test_images_that_look_the_same_in_two_splits_are_reported(tmp_path: Path, empty_cache: Path) -> None:
    original, copy = textured(tmp_path / "data")
    shutil.copy(original, original.with_name("same.png"))  # in the same split, which is no matter
    splits = str(tmp_path / "splits.csv")

    def made() -> ImageTasks:
        return mo.tasks.from_folder(tmp_path / "data", ways=2, shots=1, queries=1, size=32, splits=splits, rotations=True)

    assert made().describe("train")["options"]["near_duplicates"] == 0
    Image.open(original).convert("RGB").save(copy, quality=85)
    for _ in range(2):  # found, and remembered
        with pytest.warns(UserWarning, match=r"2 pairs of images in different splits look the same, such as class0/0.png and"):
            assert made().describe("train")["options"]["near_duplicates"] == 2


def test_alike_means_nearly_the_same_pixels() -> None:
    one = np.kron(noise(0, 8, 8), np.ones((4, 4), np.uint8))
    darker = np.round(one * 0.97).astype(np.uint8)
    inverse, other, blank = 255 - one, np.kron(noise(1, 8, 8), np.ones((4, 4), np.uint8)), np.zeros_like(one)
    pictures = np.stack([one, blank, darker, inverse, other, blank])
    assert alike(pictures, np.array([0, 0, 1, 1, 1, 1])).tolist() == [[0, 2]]
    assert alike(pictures, np.array([0, 0, 0, 0, 0, 0])).tolist() == []
    assert alike(np.stack([pictures] * 3, axis=1), np.array([0, 0, 1, 1, 1, 1])).tolist() == [[0, 2]]
    large = np.kron(one, np.ones((1, 3), np.uint8))[:, :90]  # 16 doesn't divide 90
    assert alike(np.stack([large, large]), np.array([0, 1])).tolist() == [[0, 1]]


def test_a_reader_gives_what_the_family_gives(root: Path) -> None:
    tasks = mo.tasks.from_folder(root, ways=9, shots=1, queries=1, size=6, splits=_all_train(root))
    reader = FolderReader(6, 1, 9)
    (x, y), names = reader.support(root)
    assert names == list(tasks.names) and x.shape == (36, 1, 6, 6)
    assert [names.index(f"class{value // 10}") for value in values(x)] == y.tolist()
    assert y[:9].tolist() == list(range(9))  # minibatches see every class
    queries, heads, cells = reader.queries(root / "class2")
    assert heads == ["file"] and cells == [[f"{i}.png"] for i in range(5)] and values(queries) == [20, 21, 22, 23, 24]


def _all_train(root: Path) -> str:
    file = root.parent / "all.csv"
    file.write_text("\n".join(f"class{c},train" for c in range(9)))
    return str(file)


def _broken(root: Path) -> None:
    (root / "class1" / "0.png").write_bytes((root / "class1" / "0.png").read_bytes()[:40])


def _no_image(root: Path) -> None:
    (root / "class4" / "odd.jpg").write_text("no image at all")


def _few(root: Path) -> None:
    (root / "class3" / "0.png").unlink()


def _deeper(root: Path) -> None:
    (root / "class1").rename(root.parent / "photos")
    (root / "class1").mkdir()
    (root.parent / "photos").rename(root / "class1" / "photos")


def _lines(*lines: str) -> Callable[[Path], None]:
    return lambda root: (root.parent / "splits.csv").write_text("\n".join(lines)) and None


ALL = [f"class{c},train" for c in range(9)]


@pytest.mark.parametrize(("change", "options", "words"), [
    (shutil.rmtree, {}, ["There is no folder", "a folder of images for each class"]),
    (_broken, {}, ["class1/0.png can't be read as an image", "mend it, or take it out"]),
    (_no_image, {}, ["class4/odd.jpg can't be read as an image"]),
    (_few, {}, ["'class3'", "has 2 images", "1 shot and 2 queries need 3", "or leave such classes out (short='leave_out')"]),
    (_deeper, {}, ["class1 holds no images, and its folder `photos` has 4", "such as", "class1/1.png; move them there"]),
    (None, {"train_shots": 9, "queries": 1}, ["'class0'", "9 shots and 1 query need 10; add some or ask for fewer."]),
    (None, {"short": "forget"}, ["short='forget'", "refuse or leave_out"]),
    (None, {"ways": 4}, ["too few classes (9)", "with 4 or more in each"]),
    (None, {"ways": 1}, ["ways is 1"]),
    (None, {"size": 0}, ["size=0", "at least 1"]),
    (None, {"colour": "blue"}, ["colour='blue' is unknown: choose auto, grey or rgb."]),
    (None, {"colour": False}, ["colour=False is no text: choose auto, grey or rgb."]),
    (None, {"splits": "nowhere.csv"}, ["There is no file nowhere.csv in /", "beside the recipe"]),
    (_lines(*ALL[:-1]), {"splits": "splits.csv"}, ["no line for 'class8'", "each of the 9 classes one line"]),
    (_lines(*ALL, ALL[0]), {"splits": "splits.csv"}, ["Line 10", "'class0', twice"]),
    (_lines(*ALL, "dog,train"), {"splits": "splits.csv"}, ["Line 10", "'dog'", "none of that name"]),
    (_lines(*ALL[:-1], "class8,valid"), {"splits": "splits.csv"}, ["Line 9", "'valid'", "train, val, test"]),
    (_lines(*ALL[:-1], "class8"), {"splits": "splits.csv"}, ["Line 9", "1 field;", "`class0,train`"]),
    (_lines(*(f"class{c},test" for c in range(9))), {"splits": "splits.csv"}, ["none of the classes into the split train"]),
])  # fmt: skip
def test_faults_are_told_in_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None] | None, options: dict[str, object],
    words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(root.parent)
    if change:
        change(root)
    given: dict[str, object] = {"ways": 2, "shots": 1, "queries": 2, "size": 6, **options}
    with pytest.raises((ValueError, OSError)) as raised:
        mo.tasks.from_folder(root, **given)  # type: ignore[arg-type]
    told = str(raised.value)
    assert all(word in told for word in words), told
    assert told.endswith(".") and "\n" not in told


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "loose.png", noise(0, 5, 5))
    with pytest.raises(ValueError, match=r"holds no folders with images; expected one for each class"):
        mo.tasks.from_folder(tmp_path)


def test_what_can_not_be_adapted_to_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class8 \(5\); the model tells 2 apart"):
        FolderReader(6, 1, 2).support(root)
    with pytest.raises(ValueError, match="There are no images in"):
        FolderReader(6, 1, 2).queries(tmp_path)
