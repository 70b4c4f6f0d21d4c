"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaoptim.tasks import cache
from metaoptim.tasks.base import raw
from metaoptim.tasks.download import fetch
from metaoptim.tasks.images import ImageTasks

URL = "https://github.com/brendenlake/omniglot/raw/master/python"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWINGS, SIZE = 20, 28
# How much of each of 105 pixels lies in each of 28, in whole quarters of a pixel, so that float32 sums are exact.
AREAS = np.repeat(np.eye(SIZE, dtype=np.float32), 15, axis=1).reshape(SIZE, 105, 4).sum(2)
PNG, ZIP = (OSError, SyntaxError, ValueError), (zipfile.BadZipFile, zlib.error, RuntimeError)
DAMAGE = (*PNG, *ZIP, EOFError, struct.error)
"""Everything that zipfile and Pillow raise on damaged files."""
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
"""The validation alphabets of the Vinyals split; all of them lie in the background part."""


def omniglot(
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    split: Literal["vinyals", "random", "background"] = "vinyals",
    rotations: bool = True,
    train_shots: int | None = None,
    root: str | None = None,
) -> ImageTasks:
    """Omniglot as 28×28 images (area averages of the 105×105 originals), ink = 1: x [T, N·S, 1, 28, 28].

    The data come from `root`, else from the folder that METAOPTIM_DATA names (or its subfolder `omniglot`),
    either as the two official archives or unpacked. If neither is given, the archives are downloaded. ValueError
    or OSError if the data are incomplete, damaged or out of reach.

    Splits of the 1,623 characters into train / val / test; rotations make four times as many classes:

    - `vinyals`, 1028 / 172 / 423, as in Matching Networks (Vinyals et al. 2016): val is five alphabets, test
      the last 423 characters of the evaluation part, which splits one alphabet, Gurmukhi.
    - `random`, 1100 / 100 / 423, shuffled once and for all.
    - `background`, 792 / 172 / 659: test is the official evaluation part, val the same five alphabets of the
      background part, so that no alphabet is in two splits.

    Args:
        ways: Characters per episode.
        shots: Support drawings per character.
        queries: Query drawings per character.
        split: How characters are divided into train, val and test: `vinyals`, `random` or `background`.
        rotations: Whether a character rotated by 90, 180 and 270 degrees counts as three further classes.
        train_shots: Support drawings per character in the split `train`, if different.
        root: The folder with the two archives, or with both unpacked.
    """
    images, names = load(_sources(root))
    members = _members(split, names)
    return ImageTasks("omniglot", images, names, members, ways, shots, queries, rotations, train_shots, {"split": split})


def _members(split: str, names: list[str]) -> dict[str, NDArray[np.int64]]:
    """The characters of each split, as indices into the names: background, then evaluation, each sorted."""
    everything, background = np.arange(len(names)), CHARACTERS["images_background"]
    val = np.array([i for i in everything if names[i].split("/")[0] in VALIDATION])
    match split:
        case "vinyals":
            test = everything[-423:]
        case "background":
            test = everything[background:]
        case "random":
            shuffled = np.argsort(raw(0, "omniglot/random", 0, len(names), 1)[:, 0])
            val, test = np.sort(shuffled[1100:1200]), np.sort(shuffled[1200:])
        case _:
            raise ValueError(f"split is {split!r}; it must be 'vinyals', 'random' or 'background'.")
    return {"train": np.setdiff1d(everything, np.concatenate([val, test])), "val": val, "test": test}


def _sources(root: str | None) -> list[Path]:
    """The two parts, each an archive or a folder; downloaded if no folder is named."""
    named = root or os.environ.get("METAOPTIM_DATA")
    if not named:
        folder = cache.directory()
        return [fetch(f"{URL}/{part}.zip", folder / f"{part}.zip", md5) for part, md5 in MD5.items()]
    places = [Path(named).expanduser(), Path(named).expanduser() / "omniglot"]
    found = [next((p for f in places for p in (f / f"{part}.zip", f / part) if p.exists()), None) for part in MD5]
    sources = [source for source in found if source is not None]
    if len(sources) < len(MD5):
        lost = " and ".join(part for part, source in zip(MD5, found, strict=True) if source is None)
        who = "root" if root else "METAOPTIM_DATA"
        raise ValueError(
            f"{who} names the folder {named}, which holds no {lost} (archive .zip or folder, there or in "
            f"its folder omniglot); put there what {URL} offers, or name no folder, and it is downloaded."
        )
    return sources


def load(sources: list[Path]) -> tuple[NDArray[np.uint8], list[str]]:
    """All characters, uint8 [1623, 20, 28, 28], and their names `Alphabet/characterNN`; decoded once, then cached."""
    key = hashlib.sha256("".join(map(_fingerprint, sources)).encode()).hexdigest()[:16]
    path = cache.directory() / f"omniglot-{SIZE}-{key}.npz"
    arrays = cache.read(path)
    if arrays is None:
        parts = [decode(source, count) for source, count in zip(sources, CHARACTERS.values(), strict=True)]
        arrays = {
            "images": np.concatenate([p[0] for p in parts]),
            "names": np.array([n for p in parts for n in p[1]]),
        }
        cache.write(path, arrays)
    return arrays["images"], arrays["names"].tolist()


def decode(source: Path, characters: int) -> tuple[NDArray[np.uint8], list[str]]:
    """One part, an archive or a folder: uint8 [characters, 20, 28, 28] and sorted names; ValueError if it is damaged."""
    again = f"fetch it again from {URL}/{source.stem}.zip"
    with contextlib.ExitStack() as stack:
        try:
            files = _files(source, stack)
        except DAMAGE as error:
            raise ValueError(f"{source} can't be read ({error}); {again}.") from error
        drawings: dict[str, list[Callable[[], bytes]]] = {}
        for alphabet, character, file in sorted(files):
            drawings.setdefault(f"{alphabet}/{character}", []).append(files[alphabet, character, file])
        if len(drawings) != characters:
            raise ValueError(f"{source} holds {len(drawings)} characters instead of {characters}; {again}.")
        images = np.empty((characters, DRAWINGS, SIZE, SIZE), np.uint8)
        work = cache.tracked(list(drawings.items()), f"reading {source.name}")
        for place, (name, readers) in enumerate(work):
            if len(readers) != DRAWINGS:
                found = f"{len(readers)} drawings of {name} instead of {DRAWINGS}"
                raise ValueError(f"{source} holds {found}; {again}.")
            try:
                images[place] = [_picture(read()) for read in readers]
            except DAMAGE as error:
                lost = f"a drawing of {name} can't be read ({error})"
                raise ValueError(f"{source} is damaged, {lost}; {again}.") from error
    return images, list(drawings)


def _files(source: Path, stack: contextlib.ExitStack) -> dict[tuple[str, ...], Callable[[], bytes]]:
    """A reader for each drawing, by (alphabet, character, file)."""
    if source.is_dir():
        return {file.parts[-3:]: file.read_bytes for file in source.glob("*/*/*.png")}
    archive = stack.enter_context(zipfile.ZipFile(source))
    names = [n for n in archive.namelist() if n.startswith(f"{source.stem}/") and n.endswith(".png")]
    return {tuple(n.split("/")[1:]): functools.partial(archive.read, n) for n in names if n.count("/") == 3}


def _picture(png: bytes) -> NDArray[np.uint8]:
    """uint8 [28, 28], the share of ink from 0 to 255; the files are 1-bit, with 0 = ink."""
    with Image.open(io.BytesIO(png)) as image:
        if image.size != (105, 105):
            raise ValueError(f"it has {image.width}x{image.height} pixels instead of 105x105")
        ink = (np.asarray(image.convert("L")) == 0).astype(np.float32)
    grey: NDArray[np.uint8] = np.round(AREAS @ ink @ AREAS.T * (255 / 15**2)).astype(np.uint8)
    return grey


def _fingerprint(source: Path) -> str:
    """Identifies a part's content: an archive by its bytes, a folder by names, sizes and times, which is fast."""
    digest = hashlib.sha256()
    try:
        if source.is_file():
            digest.update(source.read_bytes())
        else:
            for file in sorted(source.glob("*/*/*.png")):
                stat = file.stat()
                digest.update(f"{file.relative_to(source)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    except OSError as error:
        raise OSError(f"{source} can't be read ({error.strerror}); check its permissions.") from error
    return digest.hexdigest()
