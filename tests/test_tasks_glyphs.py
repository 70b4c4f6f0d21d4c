"""Glyphs: pinned to the bit, split by script, drawn like handwriting, and mended when their cache breaks."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from metaoptim.tasks import ImageTasks, cache, draw_letters, episodes_hash, glyphs
from metaoptim.tasks.glyph_drawing import FACES, draw, fill, outlines, thin
from metaoptim.tasks.glyph_letters import LETTERS
from metaoptim.tasks.glyphs import SHA256, generate


def test_glyphs_are_the_pinned_ones() -> None:
    tasks = glyphs()
    assert tasks.images.shape == (711, 20, 28, 28)
    assert hashlib.sha256(tasks.images.tobytes()).hexdigest() == SHA256
    letters = "".join(LETTERS.values())
    assert len(set(letters)) == 711
    codes = hashlib.sha256(" ".join(f"{ord(c):04X}" for c in letters).encode()).hexdigest()
    assert codes == "8b6c1083565d571b6a9db3355f435a39abed46cd7e77b6ee1febce37e8678af4"
    assert (
        episodes_hash(tasks, "test", seed=0, start=0, count=5)
        == "7a7a64baa3fb1e4f9d818b95bc398c5deed4312a9eb39a8d97db9ab1a5f0f029"
    )


def test_glyph_splits_share_no_script() -> None:
    tasks = glyphs()
    found = {s: set(tasks.class_names(s)) for s in tasks.splits}
    assert {s: len(n) for s, n in found.items()} == {"train": 502, "val": 61, "test": 148}
    assert len(set.union(*found.values())) == 711
    # The first word of a letter's Unicode name is its script; Ⅎ is the Latin letter TURNED CAPITAL F.
    scripts = {s: {unicodedata.name(chr(int(n.split("+")[1], 16))).split()[0] for n in names} for s, names in found.items()}
    assert scripts == {
        "train": {"LATIN", "TURNED", "GREEK", "CYRILLIC"},
        "val": {"ARMENIAN"},
        "test": {"GEORGIAN", "LAO"},
    }


def test_glyphs_are_made_the_same_whatever_else_is_made() -> None:
    letters = "".join(LETTERS.values())
    some = [0, 400, 710]
    assert np.array_equal(generate("".join(letters[i] for i in some)), glyphs().images[some])


def test_letters_are_drawn_as_an_ordinary_set_of_any_size() -> None:
    x, y = draw_letters("aß", each=45)
    assert x.shape == (90, 1, 28, 28) and x.dtype == torch.float32 and y.tolist() == [0] * 45 + [1] * 45
    letters = "".join(LETTERS.values())
    for i, letter in enumerate("aß"):
        known = torch.from_numpy(glyphs().images[letters.index(letter)])
        assert torch.equal((255 * x[45 * i : 45 * i + 20, 0]).round().to(torch.uint8), known)
    assert len({tuple(row.flatten().tolist()) for row in x}) == 90, "no drawing comes twice"
    assert torch.equal(draw_letters("ßa", each=5)[0][:5], x[45:50])
    for wrong, words in (({"letters": "a"}, "two or more"), ({"letters": "aba"}, "each of them once"),
                         ({"letters": "ab", "each": 0}, "each=0"), ({"letters": "a\U000f0000"}, "no letter")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            draw_letters(**wrong)  # type: ignore[arg-type]


def test_glyphs_are_as_hard_as_the_recipe_says(pixel_accuracy: Callable[[ImageTasks, int], float]) -> None:
    assert pixel_accuracy(glyphs(queries=15), 600) == pytest.approx(60, abs=5)
    assert pixel_accuracy(glyphs(shots=5, queries=15), 600) == pytest.approx(82, abs=4)
    assert pixel_accuracy(glyphs(ways=20, queries=15), 100) < 50


def test_outlines_fill_as_the_type_face_prints_them() -> None:
    """Against Pillow, which has the type face rendered by FreeType."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / FACES[0]), 400)
    for letter, (polygons, *_) in zip("AgÆЖშ", outlines("AgÆЖშ"), strict=True):
        page = Image.new("L", (900, 900))
        ImageDraw.Draw(page).text((200, 200), letter, 255, font)
        box = page.getbbox()
        assert box is not None
        left, top, right, bottom = box
        centres = (np.arange(64) + 0.5 - 32) / 56 * max(right - left, bottom - top)  # of our pixels, on the page
        columns = np.floor(centres + (left + right) / 2).astype(int)
        rows = np.floor(centres + (top + bottom) / 2).astype(int)
        expected = np.asarray(page)[rows[:, None], columns] > 127
        assert (fill(polygons) != expected).mean() < 0.03, letter


def test_thinning_keeps_the_shape_one_pixel_wide() -> None:
    shapes = np.stack([fill(p) for p in outlines("B")[0]])
    skeletons = thin(shapes)
    for shape, skeleton in zip(shapes, skeletons, strict=True):
        assert not (skeleton & ~shape).any()
        assert skeleton.sum() < 0.25 * shape.sum()
        # Pieces minus holes, pieces joined at corners too, counted from the 2×2 blocks (Gray 1971): a B has 1 − 2.
        block = np.lib.stride_tricks.sliding_window_view(skeleton, (2, 2)).reshape(-1, 4)
        ink, diagonal = block.sum(1), (block[:, 0] == block[:, 3]) & (block[:, 1] == block[:, 2])
        assert ((ink == 1).sum() - (ink == 3).sum() - 2 * ((ink == 2) & diagonal).sum()) / 4 == -1
        # No 3×3 block is full: nothing is left to peel.
        assert not np.lib.stride_tricks.sliding_window_view(skeleton, (3, 3)).all((2, 3)).any()
    assert np.array_equal(thin(skeletons), skeletons)


def test_a_drawing_is_painted_where_the_skeleton_is() -> None:
    dot = np.zeros((1, 64, 64), bool)
    dot[0, 32, 32] = True
    pictures = draw(dot, "dot") / 255
    area = pictures.sum((1, 2)) * 4  # in pixels of the canvas: π r² with r from 1.3 to 2.1
    assert 4 <= area.min() < area.max() <= 15
    rows, columns = np.mgrid[0:28, 0:28] - 13.5
    assert np.abs((pictures * rows).sum((1, 2)) / pictures.sum((1, 2))).max() < 5
    assert np.abs((pictures * columns).sum((1, 2)) / pictures.sum((1, 2))).max() < 5
    assert len({p.tobytes() for p in pictures}) > 15


@pytest.fixture
def few_glyphs(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes generating quick: stand-ins for the drawings, with their own hash pinned; lists the calls."""
    calls: list[str] = []
    images = np.zeros((711, 20, 28, 28), np.uint8)

    def quick(letters: str) -> np.ndarray[Any, Any]:
        calls.append(letters)
        return images

    module = sys.modules["metaoptim.tasks.glyphs"]
    monkeypatch.setattr(module, "generate", quick)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(images.tobytes()).hexdigest())
    return calls


def test_glyphs_are_cached_and_mended(few_glyphs: list[str], empty_cache: Path) -> None:
    calls = few_glyphs
    glyphs()
    glyphs()
    assert len(calls) == 1
    (path,) = empty_cache.glob("glyphs-*.npz")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1000], whole[:5_000_000] + b"\x01" + whole[5_000_001:]):
        path.write_bytes(damaged)
        calls.clear()
        glyphs()
        assert len(calls) == 1 and path.read_bytes()[:100] == whole[:100]
    assert [p.name for p in empty_cache.iterdir()] == [path.name]


def test_wrong_glyphs_in_the_cache_are_drawn_again(few_glyphs: list[str], empty_cache: Path) -> None:
    """Files that are whole, and hold other pictures than they say, or don't say."""
    right = glyphs().images
    (path,) = empty_cache.glob("glyphs-*.npz")
    with np.load(path) as archive:
        stated = archive["sha256"]
    for others in ({"images": right + 1}, {"images": right + 1, "sha256": stated}, {"images": right[:5], "sha256": stated}):
        np.savez(path, allow_pickle=False, **others)
        few_glyphs.clear()
        assert np.array_equal(glyphs().images, right) and len(few_glyphs) == 1
        assert np.array_equal(glyphs().images, right) and len(few_glyphs) == 1


def test_other_glyphs_are_announced(
    few_glyphs: list[str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["metaoptim.tasks.glyphs"], "SHA256", SHA256)
    with pytest.warns(UserWarning, match=r"scores aren't comparable"):
        glyphs(root=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").glob("glyphs-*.npz"))


def test_a_cache_that_cannot_be_written(few_glyphs: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be made .*; name a writable folder in METAOPTIM_CACHE"):
        glyphs(root=str(tmp_path / "file" / "folder"))
    with pytest.raises(OSError, match=r"can't be written .*METAOPTIM_CACHE"):
        cache.write(tmp_path / "nowhere" / "a.npz", {"a": np.zeros(3)})
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["file"]
