"""Letters of six scripts, drawn from the typefaces that come with matplotlib: images without a download."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts
from metaoptim.tasks import cache
from metaoptim.tasks.glyph_drawing import DRAWINGS, SIZE, draw, fill, outlines, thin
from metaoptim.tasks.glyph_letters import LETTERS
from metaoptim.tasks.images import ImageTasks

SPLITS = {"train": ("Latin", "Greek", "Cyrillic"), "val": ("Armenian",), "test": ("Georgian", "Lao")}
"""No script is in two splits: 502 letters for training, 61 for validation and 148 for testing."""
SHA256 = "2b1f21fc77ce508b39ee80c816a92f65969c9d9c173c8cfc37aea2c13e0d5a09"
"""The images that published scores were measured on."""


def glyphs(
    ways: int = 5, shots: int = 1, queries: int = 5, train_shots: int | None = None, root: str | None = None
) -> ImageTasks:
    """711 letters, each drawn 20 times, as 28×28 images, ink = 1: x [T, N·S, 1, 28, 28].

    Every drawing is a typeface's letter, thinned to its skeleton, randomly rotated, sheared and bent, and
    painted with a round brush. The splits share no script: train is Latin, Greek and Cyrillic, val Armenian,
    test Georgian and Lao. The drawings are made once (in a few seconds) and cached. A warning says if they
    differ from those of the published scores, as they may when matplotlib's fonts have changed.

    Args:
        ways: Letters per episode.
        shots: Support drawings per letter.
        queries: Query drawings per letter.
        train_shots: Support drawings per letter in the split `train`, if different.
        root: The folder to keep the drawings in; the cache if not given.
    """
    images = _load(cache.folder(Path(root).expanduser()) if root else cache.directory())
    names = [f"{script}/U+{ord(letter):04X}" for script, letters in LETTERS.items() for letter in letters]
    members = {
        split: np.array([i for i, name in enumerate(names) if name.split("/")[0] in scripts])
        for split, scripts in SPLITS.items()
    }
    return ImageTasks("glyphs", images, names, members, ways, shots, queries, train_shots=train_shots)


def _load(folder: Path) -> NDArray[np.uint8]:
    version = importlib.metadata.version("matplotlib")  # other fonts make other drawings
    path = folder / f"glyphs-{SHA256[:8]}-matplotlib-{version}.npz"
    kept = (cache.read(path) or {}).get("images")
    if kept is None:
        kept = generate("".join(LETTERS.values()))
        cache.write(path, {"images": kept})
    if (found := hashlib.sha256(kept.tobytes()).hexdigest()) != SHA256:
        warn(
            f"The glyphs drawn from matplotlib {version} (sha256 {found[:12]}) differ from those of the "
            f"published scores ({SHA256[:12]}): scores aren't comparable with them."
        )
    return kept


def draw_letters(letters: str, each: int = DRAWINGS) -> tuple[Tensor, Tensor]:
    """Drawings of N letters as an ordinary set for a classifier: x float32 in [0, 1], [N·each, 1, 28, 28], y int64 [N·each].

    In the order of the letters, and the same ones every time; the first 20 of a letter are those of `glyphs`.

    Args:
        letters: Two or more, all different, such as "abc"; any that matplotlib's typefaces have.
        each: Drawings per letter.

    Raises:
        ValueError: fewer than two letters, one that is named twice, or one that no typeface has.
    """
    check_counts(each=each)
    if len(letters) < 2 or len(set(letters)) < len(letters):
        raise ValueError(f"letters={letters!r}: it must name two or more letters, each of them once.")
    images = generate(letters, rounds=-(-each // DRAWINGS))[:, :each].reshape(-1, 1, SIZE, SIZE)
    return torch.from_numpy(np.divide(images, np.float32(255))), torch.arange(len(letters)).repeat_interleave(each)


def generate(letters: str, rounds: int = 1) -> NDArray[np.uint8]:
    """All drawings of some letters, the same ones every time: uint8 [letters, rounds · DRAWINGS, SIZE, SIZE]."""
    images = np.empty((len(letters), rounds, DRAWINGS, SIZE, SIZE), np.uint8)
    faces = outlines(letters)
    for place, letter in enumerate(cache.tracked(letters, "drawing the glyphs, once")):
        skeletons = thin(np.stack([fill(face) for face in faces[place]]))
        for turn in range(rounds):
            images[place, turn] = draw(skeletons, f"glyphs/{letter}" + (f"/{turn}" if turn else ""))
    return images.reshape(len(letters), -1, SIZE, SIZE)
