"""CIFAR-FS and FC100: the hundred classes of CIFAR-100 (Krizhevsky 2009) as few-shot tasks."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaoptim.tasks import cache
from metaoptim.tasks.cifar_classes import HELD_OUT
from metaoptim.tasks.download import fetch
from metaoptim.tasks.images import ImageTasks

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"
UNPACKED, COMPACT = "cifar-100-binary", "cifar100*.npz"
FILES = ("train.bin", "test.bin", "fine_label_names.txt")
CLASSES, SIZE = 100, 32
RECORD = 2 + 3 * SIZE**2  # coarse label, fine label, and the pixels
FOLDERS = ("", "cifar100_fewshot", "cifar100")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, tarfile.TarError, zlib.error)


def cifar_fs(
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    split: Literal["cifar_fs", "fc100"] = "cifar_fs",
    train_shots: int | None = None,
    root: str | None = None,
) -> ImageTasks:
    """The classes of CIFAR-100 as 32×32 colour images: x [T, N·S, 3, 32, 32].

    The data come from `root`, else from the folder that METAOPTIM_DATA names (or its subfolder `cifar100` or
    `cifar100_fewshot`): the official archive `cifar-100-binary.tar.gz`, its folder `cifar-100-binary`, or a file
    `cifar100*.npz` with images as compressed bytes (arrays `blob`, `offset`, `label`, `class_names`). If neither is given, the
    archive is downloaded (161 MB). A result states how many images there are of each class, 600 in the archive. ValueError or
    OSError if the data are incomplete, damaged or out of reach.

    Splits of the classes into train / val / test:

    - `cifar_fs`, 64 / 16 / 20, drawn at random (Bertinetto et al. 2019, https://arxiv.org/abs/1805.08136).
    - `fc100`, 60 / 20 / 20: no superclass is in two splits (Oreshkin et al. 2018, https://arxiv.org/abs/1805.10123).

    Args:
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        split: How classes are divided into train, val and test: `cifar_fs` or `fc100`.
        train_shots: Support images per class in the split `train`, if different.
        root: The folder with the data.
    """
    if split not in HELD_OUT:
        raise ValueError(f"split is {split!r}; it must be 'cifar_fs' or 'fc100'.")
    images, names = load(_source(root))
    held = {part: np.array([names.index(c) for c in sorted(classes.split())]) for part, classes in HELD_OUT[split].items()}
    rest = np.setdiff1d(np.arange(CLASSES), np.concatenate(list(held.values())))
    options = {"split": split, "images_per_class": images.shape[1]}
    members = {"train": rest, **held}
    return ImageTasks("cifar_fs", images, names, members, ways, shots, queries, train_shots=train_shots, options=options)


def _source(root: str | None) -> Path:
    """The archive, the folder or the compact file; downloaded if no folder is named."""
    named = root or os.environ.get("METAOPTIM_DATA")
    if not named:
        return fetch(URL, cache.directory() / f"{UNPACKED}.tar.gz", MD5)
    for folder in (Path(named).expanduser() / name for name in FOLDERS):
        for pattern in (f"{UNPACKED}.tar.gz", UNPACKED, COMPACT):
            if found := sorted(folder.glob(pattern)):
                return found[0]
    who = "root" if root else "METAOPTIM_DATA"
    raise ValueError(
        f"{who} names the folder {named}, which holds no CIFAR-100 ({UNPACKED}.tar.gz, {UNPACKED} or {COMPACT}, there or in "
        f"its folder cifar100 or cifar100_fewshot); put {URL} there, or name no folder, and it is downloaded."
    )


def load(source: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """All images, uint8 [100, images, 3, 32, 32], and the classes' names, sorted; decoded once, then cached."""
    stats = [f.stat() for f in ([source / name for name in FILES if (source / name).exists()] if source.is_dir() else [source])]
    known = f"{source.resolve()} {[(s.st_size, s.st_mtime_ns) for s in stats]}"
    path = cache.directory() / f"cifar100-{hashlib.sha256(known.encode()).hexdigest()[:16]}.npz"
    arrays = cache.read(path)
    if arrays is None:
        try:
            arrays = decode_compact(source) if source.suffix == ".npz" else decode(source)
        except DAMAGE as error:
            told = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(f"{source} can't be read ({told}); fetch it again from {URL}.") from error
        cache.write(path, arrays)
    return arrays["images"], arrays["names"].tolist()


def decode(source: Path) -> cache.Arrays:
    """The official binary files, in their archive or unpacked."""
    if source.is_dir():
        parts = [(source / name).read_bytes() for name in FILES]
    else:
        with tarfile.open(source) as archive:
            members = [archive.extractfile(f"{UNPACKED}/{name}") for name in FILES]
            parts = [b"" if member is None else member.read() for member in members]
    records = np.frombuffer(parts[0] + parts[1], np.uint8)
    if not records.size or records.size % RECORD:
        raise ValueError(f"its records add up to {records.size} bytes, which is no multiple of {RECORD}")
    records = records.reshape(-1, RECORD)
    return _by_class(records[:, 2:].reshape(-1, 3, SIZE, SIZE), records[:, 1], parts[2].decode().split())


def decode_compact(source: Path) -> cache.Arrays:
    """A file of compressed images: `blob`, all bytes; `offset`, where each begins; `label`; `class_names`."""
    with np.load(source, allow_pickle=False) as archive:
        blob, offset = archive["blob"].tobytes(), archive["offset"].tolist()
        label, names = archive["label"], archive["class_names"].tolist()
    images = np.empty((len(label), 3, SIZE, SIZE), np.uint8)
    for i in cache.tracked(range(len(label)), f"reading {source.name}"):
        with Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]])) as image:
            images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return _by_class(images, label, names)


def _by_class(images: NDArray[np.uint8], label: NDArray[Any], names: list[str]) -> cache.Arrays:
    """Images [100, images, 3, 32, 32] in the order of their classes' names, which are sorted."""
    counts = np.bincount(label, minlength=CLASSES)
    if len(names) != CLASSES or len(counts) != CLASSES or len(set(counts.tolist())) != 1 or not counts[0]:
        raise ValueError(f"it has {len(names)} classes with {counts.min()} to {counts.max()} images; expected 100, all equal")
    order = np.argsort(names)
    grouped = images[np.argsort(label, kind="stable")].reshape(CLASSES, -1, 3, SIZE, SIZE)
    return {"images": grouped[order], "names": np.array(names)[order]}
