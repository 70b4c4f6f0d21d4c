"""N-way S-shot episodes from a folder of images: one folder for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_choice, check_counts, check_memory
from metaoptim.core.folders import searched
from metaoptim.core.types import Batch
from metaoptim.tasks import cache
from metaoptim.tasks.alike import alike
from metaoptim.tasks.images import ImageTasks
from metaoptim.tasks.splits import Members, divide, told_left_out

Colour = Literal["auto", "grey", "rgb"]
MODES = {1: "L", 3: "RGB"}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises on files that are damaged, or no images."""
FEW = 32
"""Levels of 256: where all pixels of all images lie within so many, they are hardly meant so."""


def from_folder(
    root: str | Path,
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    size: int = 32,
    colour: Colour = "auto",
    splits: str | None = None,
    split_seed: int = 0,
    rotations: bool = False,
    train_shots: int | None = None,
    short: Literal["refuse", "leave_out"] = "refuse",
) -> ImageTasks:
    """Images of your own, a folder for each class: x [T, N·S, channels, size, size].

    The folder holds a folder for each class, and these hold its images, in any format that Pillow reads and of any size: the
    largest square in the middle is taken and scaled. They are read once, and cached, with 8 bits to a channel: of 16 bits, 0
    to 65535 becomes 0 to 255. Files that are no images by their suffix, and names that begin with a dot, are passed over. A
    warning says where images of different splits look the same, or all are nearly of one colour. ValueError or OSError where
    an image can't be read, or has pixels of 32 bits, or a class has too few.

    Args:
        root: The folder.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        size: Height and width that images are scaled to, in pixels.
        colour: `grey` (one channel), `rgb` (three), or `auto`: rgb if any image has colours.
        splits: A file with a line CLASS,SPLIT for each class (train, val or test); none: drawn by the seed, 60 / 20 / 20 %.
        split_seed: The seed by which classes are divided.
        rotations: Whether each class, rotated by 0, 90, 180 and 270 degrees, counts as four classes.
        train_shots: Support images per class in the split `train`, if different.
        short: What happens to a class with fewer images than an episode needs: `refuse` the folder, or `leave_out` the class.
    """
    check_counts(ways=ways, shots=shots, queries=queries, size=size, train_shots=train_shots)
    check_choice(("auto", "grey", "rgb"), colour=colour)
    check_choice(("refuse", "leave_out"), short=short)
    classes = _large(folders(Path(root).expanduser()), max(shots, train_shots or 1), queries, short, root)
    names = list(classes)
    members = divide(names, splits, split_seed, ways, "classes")
    files = [file for group in classes.values() for file in group]
    images, key = _load(files, size, colour)
    low, high = int(images.min()), int(images.max())
    if high - low < FEW:
        warn(
            f"the images in {root} are nearly of one colour: their pixels lie between {low} and {high} of 255. Spread them "
            "over the whole range; of 16 bits, that is 0 to 65535."
        )
    counts = [len(group) for group in classes.values()]
    pairs = _pairs(images, counts, members, key)
    if len(pairs):
        warn(_report(pairs, files))
    options = {
        "reads": "folder", "size": size, "channels": images.shape[1], "colour": colour, "split_seed": split_seed,
        "images": len(images), "near_duplicates": len(pairs), **({"short": short} if short == "leave_out" else {}),
    }  # fmt: skip
    location = {"root": str(root)} | ({"splits": str(splits)} if splits else {})
    return ImageTasks(
        "from_folder", images, names, members, ways, shots, queries, rotations, train_shots, options, counts, location
    )


def folders(root: Path) -> dict[str, list[Path]]:
    """The image files of each class, sorted; ValueError where the folder holds no classes."""
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}{searched(root)}; expected one with a folder of images for each class.")
    found = {entry.name: pictures(entry) for entry in _inside(root)}
    for entry in (root / name for name, files in found.items() if not files):
        if deeper := [folder for folder in _inside(entry) if pictures(folder)]:
            count = len(pictures(deeper[0]))
            raise ValueError(
                f"{entry} holds no images, and its folder `{deeper[0].name}` has {count}: expected a class's images in its own "
                f"folder, such as {entry / '1.png'}; move them there, or give the folder whose folders are "
                "the classes."
            )
    if not any(found.values()):
        raise ValueError(f"{root} holds no folders with images; expected one for each class, such as {root / 'cat' / '1.png'}.")
    return found


def pictures(folder: Path) -> list[Path]:
    """The image files in a folder, sorted by name."""
    known = Image.registered_extensions()
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in known and f.is_file() and not _hidden(f))


def read(files: Sequence[Path], size: int, channels: int) -> NDArray[np.uint8]:
    """Images as uint8 [images, channels, size, size]; ValueError that names the one that can't be read."""
    check_memory(len(files) * channels * size**2, f"{len(files)} images of {size}×{size} pixels")
    found = np.empty((len(files), channels, size, size), np.uint8)
    for place, file in enumerate(cache.tracked(list(files), "reading images")):
        try:
            found[place] = _square(file, size, channels)
        except UNREADABLE as error:
            raise ValueError(f"{file} can't be read as an image ({error}); mend it, or take it out.") from error
    return found


@dataclass(frozen=True)
class FolderReader:
    """Reads what a model adapts to and what it is to tell, in the form of the images that it was trained on."""

    size: int
    channels: int
    ways: int

    def support(self, root: Path) -> tuple[Batch, list[str]]:
        """(x [S, channels, size, size], y [S]), classes in turn, and the names of the classes, which are the labels' order."""
        classes = folders(root)
        if len(classes) != self.ways or not all(classes.values()):
            sizes = ", ".join(f"{name} ({len(files)})" for name, files in classes.items())
            raise ValueError(
                f"{root} holds the classes {sizes or 'none'}; the model tells {self.ways} apart: give so many, each with an "
                "image or more."
            )
        names = list(classes)
        # One of each class after the other, because minibatches of the support are taken in turn.
        order = sorted((i, label) for label, name in enumerate(names) for i in range(len(classes[name])))
        x = self._read([classes[names[label]][i] for i, label in order])
        return (x, torch.tensor([label for _, label in order])), names

    def queries(self, root: Path) -> tuple[Tensor, list[str], list[list[str]]]:
        """x [Q, channels, size, size]; the heads of the columns that say which is which, and their cells."""
        if not root.is_dir() or not (files := pictures(root)):
            raise ValueError(f"There are no images in {root}; expected a folder of those that are to be told.")
        return self._read(files), ["file"], [[file.name] for file in files]

    def values(self, outputs: Tensor) -> Tensor:
        """Outputs as they are: there is nothing to scale back."""
        return outputs

    def _read(self, files: Sequence[Path]) -> Tensor:
        return torch.from_numpy(np.divide(read(files, self.size, self.channels), np.float32(255)))


def _square(file: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """The largest square in the middle of an image, scaled: uint8 [channels, size, size]."""
    with Image.open(file) as opened:
        if opened.mode == "F" or (opened.mode == "I" and opened.format != "PNG"):
            kind = "floats" if opened.mode == "F" else "whole numbers"
            raise ValueError(f"its pixels are {kind} of 32 bits, whose range isn't known: save it with 8 or 16 bits to a pixel")
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert() would cut off
            image = Image.fromarray(np.round(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.LANCZOS)
        pixels: NDArray[np.uint8] = np.asarray(fitted).reshape(size, size, channels).transpose(2, 0, 1)
    return pixels


def _load(files: list[Path], size: int, colour: Colour) -> tuple[NDArray[np.uint8], str]:
    """All images, and what identifies them; decoded once, then cached."""
    digest = hashlib.sha256(f"{size} {colour}\n".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.parent.name}/{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    key = digest.hexdigest()[:16]
    path = cache.directory() / f"folder-{key}.npz"
    images = (cache.read(path) or {}).get("images")
    if images is None:
        images = read(files, size, 1 if colour == "grey" else 3)
        if colour == "auto" and (images == images[:, :1]).all():
            images = np.ascontiguousarray(images[:, :1])
        cache.write(path, {"images": images})
    return images, key


def _pairs(images: NDArray[np.uint8], counts: list[int], members: Members, key: str) -> NDArray[np.int64]:
    """Pairs of images in different splits that look the same; looked for once, then cached."""
    split = np.zeros(len(counts), np.int64)
    for i, classes in enumerate(members.values()):
        split[classes] = i
    path = cache.directory() / f"folder-{key}-alike-{hashlib.sha256(split.tobytes()).hexdigest()[:8]}.npz"
    known: dict[str, Any] = cache.read(path) or {}
    if "pairs" not in known:
        known = {"pairs": alike(images, np.repeat(split, counts))}
        cache.write(path, known)
    pairs: NDArray[np.int64] = known["pairs"]
    return pairs


def _large(classes: dict[str, list[Path]], shots: int, queries: int, short: str, root: str | Path) -> dict[str, list[Path]]:
    """The classes with images enough for an episode; a ValueError where one has not, unless such are to be left out."""
    large = {name: files for name, files in classes.items() if len(files) >= shots + queries}
    if not large or (len(large) < len(classes) and short == "refuse"):
        name, files = next(pair for pair in classes.items() if pair[0] not in large)
        leave = ", or leave such classes out (short='leave_out')" if large else ""
        raise ValueError(
            f"The class {name!r} in {root} has {plural(len(files), 'image')}, and {plural(shots, 'shot')} and "
            f"{plural(queries, 'query')} need {shots + queries}; add some or ask for fewer{leave}."
        )
    told_left_out(len(classes) - len(large), f"{len(classes)} classes in {root}", f"{shots + queries} images")
    return large


def _report(pairs: NDArray[np.int64], files: list[Path]) -> str:
    a, b = (f"{files[i].parent.name}/{files[i].name}" for i in pairs[0])
    return (
        f"{plural(len(pairs), 'pair')} of images in different splits look the same, such as {a} and {b}: scores may be too "
        "good; take one of each pair out, or put their classes into one split."
    )


def _inside(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
