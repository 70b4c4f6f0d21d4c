"""Small sets for classifiers, as tensors, on which networks are trained in a second."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts
from metaoptim.core.types import Batch
from metaoptim.tasks import cache, cifar_fs, draw_letters
from metaoptim.tasks.base import raw
from metaoptim.tasks.download import fetch

URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "t10k-images-idx3-ubyte.gz": ("9fb629c4189551a2d022fa330f9573f3", 16, (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte.gz": ("ec29112dd5afa0611ce80d1b7f02629c", 8, (10_000,)),
}
"""MNIST's test files: MD5, bytes of the header, shape."""
Labelled = tuple[NDArray[Any], NDArray[Any]]
Name = Literal["digits", "glyphs", "mnist", "cifar"]


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled examples.

    Args:
        name: of the set, for records.
        x, y: inputs [N, …], floating-point numbers or codes, and class numbers [N] or [N, …], int64.
        classes: how many there are.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int

    def __post_init__(self) -> None:
        check_examples(self.x, self.y)
        check_counts(2, classes=self.classes)
        if self.y.dtype != torch.int64:
            raise ValueError(f"y is {self.y.dtype}: it must be class numbers in int64, as y.long() gives them.")
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= self.classes:
            raise ValueError(
                f"y goes from {low} to {high}; with classes={self.classes} it must be from 0 to {self.classes - 1}."
            )

    def batches(self, size: int, seed: int, stream: str, first: int, count: int) -> Batch:
        """Minibatches number first … first+count−1 of a stream, drawn with replacement: x [count, size, …], y alike."""
        x, y = minibatches((self.x, self.y), size, seed, stream, first, count)
        return x.to(torch.get_default_dtype()) if x.is_floating_point() else x, y


def minibatches(examples: Batch, size: int, seed: int, stream: str, first: int, count: int) -> Batch:
    """Minibatches number first … first+count−1 of a stream, drawn with replacement: [count, size, …] of each tensor [N, …]."""
    total = len(trees.flatten(examples)[0])
    rows = torch.from_numpy((raw(seed, stream, first, count, size) % np.uint64(total)).astype(np.int64))
    return trees.map_tensors(lambda x: x[rows], examples)


def check_examples(x: Any, y: Any) -> None:
    """Inputs and targets of the same examples, as tensors (or trees of them)."""
    leaves: list[Any] = trees.flatten((x, y))  # by somebody whose type checker is off
    if odd := [part for part in leaves if not isinstance(part, Tensor)]:
        kind = type(odd[0]).__name__
        advice = ", as torch.from_numpy gives them" if isinstance(odd[0], np.ndarray) else ""
        raise ValueError(f"x and y must be tensors{advice}; found {kind}.")
    if len({part.shape[:1] for part in leaves}) != 1 or not leaves[0].ndim or not len(leaves[0]):
        shapes = " and ".join(str(tuple(part.shape)) for part in leaves)
        raise ValueError(f"x and y have shapes {shapes}; the first axis of both must count the same examples, one or more.")
    odd = sum((~part.isfinite()).flatten(1).any(1) if part.ndim > 1 else ~part.isfinite() for part in leaves) > 0
    if odd.any():
        warn(
            f"{int(odd.sum())} of {len(odd)} examples hold numbers that are not finite (the first is number "
            f"{int(odd.nonzero()[0])}): runs that meet them diverge, unless the model or the loss leaves such numbers out."
        )


def load(name: Name, size: int = 8, root: str | None = None) -> Data:
    """One of the sets in grey, area-averaged, with mean 0 and deviation 1 over all pixels.

    x float32 [N, 1, size, size], y int64 [N].

    - `digits`: 1,797 handwritten digits that come with scikit-learn, 8×8 pixels in the original.
    - `glyphs`: the letters A to Z, each drawn 100 times (see `tasks.draw_letters`).
    - `mnist`: the 10,000 digits of MNIST's test files.
    - `cifar`: the first 10 classes of CIFAR-100 by name, apple to bottle, the first 100 images of each.

    The last two come from `root`, else from the folder that METAOPTIM_DATA names (MNIST: or its subfolder `mnist_t10k`; CIFAR:
    see `tasks.cifar_fs`). If neither is given, they are downloaded (1.6 and 161 MB). ValueError or OSError for a set that is
    not offered, damaged or out of reach.

    Args:
        name: which set.
        size: pixels of a side.
        root: the folder that holds the files of `mnist` and `cifar`.
    """
    check_counts(size=size)
    if name not in READERS:
        raise ValueError(f"There is no data set {name!r}; choose one of {', '.join(READERS)}.")
    images, labels = READERS[name](root)
    down, across = (_areas(n, size) for n in images.shape[1:])
    grey = down @ images.astype(np.float64) @ across.T
    x = torch.from_numpy(((grey - grey.mean()) / grey.std()).astype(np.float32)).unsqueeze(1)
    return Data(f"{name}-{size}", x, torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1)


def _areas(old: int, new: int) -> NDArray[np.float64]:
    """The share of each old pixel in each of the new ones, along one axis, [new, old]."""
    begins, pixels = np.arange(new)[:, None] * old / new, np.arange(old)
    covered = np.minimum(begins + old / new, pixels + 1) - np.maximum(begins, pixels)
    shares: NDArray[np.float64] = np.clip(covered, 0, None) * new / old
    return shares


def _digits(root: str | None) -> Labelled:
    try:
        from sklearn.datasets import load_digits  # an extra, and slow to import
    except ImportError as error:
        raise ValueError(
            "The digits come with scikit-learn, which isn't installed: pip install 'metaoptim[lopt]', or choose other data."
        ) from error
    found = load_digits()
    return found.images, found.target


@lru_cache(maxsize=1)
def _glyphs(root: str | None) -> Labelled:
    x, y = draw_letters(ascii_uppercase, 100)
    return x[:, 0].numpy(), y.numpy()


def _mnist(root: str | None) -> Labelled:
    images, labels = (_idx(_source(name, md5, root), header, shape) for name, (md5, header, shape) in MNIST.items())
    return images, labels


def _source(name: str, md5: str, root: str | None) -> Path:
    named = root or os.environ.get("METAOPTIM_DATA")
    if not named:
        return fetch(f"{URL}/{name}", cache.directory() / name, md5)
    folder = Path(named).expanduser()
    found = next((path for path in (folder / name, folder / "mnist_t10k" / name) if path.is_file()), None)
    if found is None:
        who = "root" if root else "METAOPTIM_DATA"
        raise ValueError(
            f"{who} names the folder {named}, which holds no {name} (there or in its folder mnist_t10k); put "
            f"{URL}/{name} there, or name no folder, and it is downloaded."
        )
    return found


def _idx(path: Path, header: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bytes after the header of a compressed file."""
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}); fetch it again from {URL}/{path.name}.") from error


def _cifar(root: str | None) -> Labelled:
    images = cifar_fs(root=root).images[:10, :100]
    return images.mean(2).reshape(-1, *images.shape[-2:]), np.repeat(np.arange(10), images.shape[1])


READERS: dict[Name, Callable[[str | None], Labelled]] = {"digits": _digits, "glyphs": _glyphs, "mnist": _mnist, "cifar": _cifar}
