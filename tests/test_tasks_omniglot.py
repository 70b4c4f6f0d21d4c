"""Omniglot: the splits are the published ones, and incomplete or damaged data get one clear sentence."""

from __future__ import annotations

import functools
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from metaoptim.tasks import ImageTasks, episodes_hash, omniglot
from metaoptim.tasks.omniglot import CHARACTERS, decode, load

SPLITS = get_args(get_type_hints(omniglot)["split"])


@pytest.fixture(scope="module")
def real(data_dir: Path) -> Callable[..., ImageTasks]:
    return functools.partial(omniglot, root=str(data_dir))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rotations", [False, True])
def test_omniglot_splits(real: Callable[..., ImageTasks], split: str, rotations: bool) -> None:
    tasks = real(split=split, rotations=rotations)
    found = {s: {n.split("/rot")[0] for n in tasks.class_names(s)} for s in tasks.splits}
    counts = {"vinyals": (1028, 172, 423), "random": (1100, 100, 423), "background": (792, 172, 659)}[split]
    assert tuple(len(found[s]) for s in ("train", "val", "test")) == counts
    assert tuple(tasks.classes(s) for s in ("train", "val", "test")) == tuple(c * (4 if rotations else 1) for c in counts)
    assert len(set.union(*found.values())) == sum(counts)  # no character, in any orientation, is in two splits
    alphabets = {s: {n.split("/")[0] for n in names} for s, names in found.items()}
    shared = [a for s, t in (("train", "val"), ("train", "test"), ("val", "test")) for a in alphabets[s] & alphabets[t]]
    if split != "random":
        assert shared == (["Gurmukhi"] if split == "vinyals" else [])
    assert tasks.describe("val")["options"]["split"] == split


def test_the_vinyals_split_is_that_of_the_lists(real: Callable[..., ImageTasks], data_dir: Path) -> None:
    tasks = real()
    for split in tasks.splits:
        listed = (data_dir / "omniglot" / "splits_vinyals" / f"{split}.txt").read_text().split()
        assert sorted(tasks.class_names(split)) == sorted(listed)


def test_omniglot_episodes(real: Callable[..., ImageTasks]) -> None:
    tasks = real()
    assert (
        episodes_hash(tasks, "test", seed=0, start=0, count=5)
        == "6700732ca5b5b4aecedb54c4f9f760686e4aaae2e98feb65da24dd4e8f4dfa86"
    )
    assert tasks.images.shape == (1623, 20, 28, 28)
    x, _ = tasks.sample("train", seed=0, start=0, count=4).support
    assert x.shape == (4, 5, 1, 28, 28) and 0.03 < x.mean() < 0.2  # ink is 1, and there is little of it


def test_omniglot_is_as_hard_as_it_was(
    real: Callable[..., ImageTasks], pixel_accuracy: Callable[[ImageTasks, int], float]
) -> None:
    assert pixel_accuracy(real(rotations=False, queries=15), 600) == pytest.approx(44, abs=5)
    assert pixel_accuracy(real(rotations=False, shots=5, queries=15), 600) == pytest.approx(66, abs=5)


def test_the_random_split_stays_as_it_is(real: Callable[..., ImageTasks]) -> None:
    assert (
        real(split="random").describe("test")["classes_sha256"]
        == "1f5f40cc8d526fab2d8897c9a63a5777efa0d051f2510619c7bf673f5d23fb42"
    )


def drawing(number: int) -> Image.Image:
    """A 1-bit 105×105 picture whose ink, 0, is a rectangle that depends on the number."""
    page = np.ones((105, 105), bool)
    page[number % 50 : number % 50 + 30, number % 70 : number % 70 + 20] = False
    return Image.fromarray(page)


def small_part(folder: Path, characters: int = 3) -> Path:
    """A part of Omniglot in miniature, unpacked: images_background/Alphabet/characterNN/NNNN_DD.png."""
    part = folder / "images_background"
    for c in range(characters):
        place = part / ("Alpha", "Beta")[c % 2] / f"character{c + 1:02d}"
        place.mkdir(parents=True)
        for d in range(20):
            drawing(20 * c + d).save(place / f"{c + 1:04d}_{d + 1:02d}.png")
    return part


def packed(part: Path) -> Path:
    return Path(shutil.make_archive(str(part), "zip", part.parent, part.name))


def test_archives_and_folders_give_the_same(tmp_path: Path) -> None:
    part = small_part(tmp_path)
    images, names = decode(part, 3)
    assert names == ["Alpha/character01", "Alpha/character03", "Beta/character02"]
    archive, archived = decode(packed(part), 3)
    assert np.array_equal(images, archive) and names == archived
    # Independently: every pixel, as the mean over 105×105 small squares of the enlarged original.
    for d in (0, 7):
        ink = 1.0 - np.asarray(drawing(40 + d))
        mean = np.kron(ink, np.ones((28, 28))).reshape(28, 105, 28, 105).mean((1, 3))
        assert np.abs(images[1, d] / 255 - mean).max() <= 0.501 / 255


def cut(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-2000])


def flip(archive: Path) -> None:
    """Damages the bytes of the archive's first drawing, which its directory doesn't tell."""
    with zipfile.ZipFile(archive) as file:
        first = min((i for i in file.infolist() if i.filename.endswith(".png")), key=lambda i: i.header_offset)
    blob = bytearray(archive.read_bytes())
    blob[first.header_offset + 30 + len(first.filename) + 40] ^= 0xFF
    archive.write_bytes(blob)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut archive": (lambda p: cut(packed(p)), "images_background.zip can't be read"),
    "altered archive": (lambda p: flip(packed(p)), "can't be read (Bad CRC-32"),
    "not an archive": (lambda p: p.with_suffix(".zip").write_text("<html>"), "can't be read"),
    "missing character": (lambda p: shutil.rmtree(p / "Beta"), "holds 2 characters instead of 3"),
    "missing drawing": (
        lambda p: (p / "Beta/character02/0002_07.png").unlink(),
        "holds 19 drawings of Beta/character02 instead of 20",
    ),
    "empty drawing": (
        lambda p: (p / "Beta/character02/0002_07.png").write_bytes(b""),
        "a drawing of Beta/char",
    ),
    "cut drawing": (
        lambda p: (p / "Beta/character02/0002_07.png").write_bytes((p / "Beta/character02/0002_08.png").read_bytes()[:60]),
        "a drawing of Beta/character02 can't be read",
    ),
    "other drawing": (
        lambda p: Image.new("1", (28, 28)).save(p / "Beta/character02/0002_07.png"),
        "it has 28x28 pixels instead of 105x105",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_omniglot(case: str, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, words = DAMAGED[case]
    part = small_part(tmp_path)
    shutil.copytree(part, tmp_path / "images_evaluation")
    monkeypatch.setitem(CHARACTERS, "images_background", 3)
    damage(part)
    with pytest.raises(ValueError) as caught:
        omniglot(root=str(tmp_path))
    message = str(caught.value)
    assert words in message and str(part) in message and "fetch it again from https://" in message
    assert "\n" not in message and message.endswith(".")
    assert not list(empty_cache.iterdir())  # nothing of it counts as read


def test_omniglot_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"root names .* no images_background and images_evaluation .*; put"):
        omniglot(root=str(tmp_path))
    (tmp_path / "omniglot" / "images_background").mkdir(parents=True)
    monkeypatch.setenv("METAOPTIM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"METAOPTIM_DATA names .* no images_evaluation"):
        omniglot()


def test_omniglot_from_the_environment(
    data_dir: Path, real: Callable[..., ImageTasks], monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in (data_dir, data_dir / "omniglot"):
        monkeypatch.setenv("METAOPTIM_DATA", str(named))
        assert np.array_equal(omniglot().images, real().images)


def test_omniglot_is_decoded_once(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in CHARACTERS:
        monkeypatch.setitem(CHARACTERS, part, 3)
    parts = [packed(small_part(tmp_path)), small_part(tmp_path / "other")]
    images, names = load(parts)
    assert images.shape == (6, 20, 28, 28) and len(names) == 6
    (path,) = empty_cache.iterdir()
    written = path.stat().st_mtime_ns
    assert np.array_equal(load(parts)[0], images) and path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-10_000])  # a damaged cache
    assert np.array_equal(load(parts)[0], images) and path.stat().st_mtime_ns != written
    drawing(1).save(parts[1] / "Alpha/character01/0001_01.png")  # other data
    assert not np.array_equal(load(parts)[0], images) and len(list(empty_cache.iterdir())) == 2


def test_an_unknown_omniglot_split(real: Callable[..., ImageTasks]) -> None:
    with pytest.raises(ValueError, match=r"split is 'lake'; it must be 'vinyals', 'random' or 'background'"):
        real(split="lake")


def test_omniglot_is_downloaded_where_no_folder_is_named(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = packed(small_part(tmp_path)).read_bytes()
    asked = []

    def fetched(url: str, path: Path, md5: str) -> Path:
        asked.append((url, md5))
        path.write_bytes(blob)
        return path

    monkeypatch.delenv("METAOPTIM_DATA", raising=False)
    monkeypatch.setattr(sys.modules["metaoptim.tasks.omniglot"], "fetch", fetched)
    with pytest.raises(ValueError, match=r"holds 3 characters instead of 964; fetch it again from https://"):
        omniglot()
    address = "https://github.com/brendenlake/omniglot/raw/master/python"
    assert asked == [
        (f"{address}/images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
        (f"{address}/images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
    ]
