"""The protocol of task families, and the randomness that makes episode i of seed s the same everywhere."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from metaoptim.core import trees
from metaoptim.core.types import Task

LOCATION = "location"


class TaskFamily(Protocol):
    """A distribution of tasks, divided into splits that share no class."""

    @property
    def splits(self) -> tuple[str, ...]: ...

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        ...

    def describe(self, split: str) -> dict[str, Any]:
        """What an evaluation records in order to be repeatable, in JSON types: family, options, split, classes."""
        ...


def raw(seed: int, stream: str, start: int, count: int, words: int) -> NDArray[np.uint64]:
    """Random 64-bit words of items start … start+count−1 of a stream, [count, words].

    Counter-based (Philox, whose raw stream NumPy guarantees): each item owns a fixed block of the counter. So
    any range costs one call and gives the same bits in every process, on every machine, however the range is
    divided.
    """
    check_seed(seed)
    if start < 0 or count < 1:
        raise ValueError(f"{count} episodes from number {start} were asked for; ask for 1 or more, from number 0 or later.")
    blocks = -(-words // 4)  # one counter value of Philox gives four words
    key = int(seed) | zlib.crc32(stream.encode()) << 64
    bits = np.random.Philox(counter=start * blocks, key=key).random_raw(count * blocks * 4)
    return bits.reshape(count, blocks * 4)[:, :words]


def uniforms(seed: int, stream: str, start: int, count: int, words: int) -> NDArray[np.float64]:
    """As `raw`, but numbers in [0, 1) with 53 random bits, [count, words]."""
    return (raw(seed, stream, start, count, words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(keys: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """Random choices without replacement: the indices of the n smallest keys along the last axis, smallest first."""
    if n == keys.shape[-1]:
        return np.argsort(keys, axis=-1)
    # Sorted again, because the order that argpartition leaves differs between versions and processors.
    few = np.argpartition(keys, n, axis=-1)[..., :n]
    return np.take_along_axis(few, np.argsort(np.take_along_axis(keys, few, axis=-1), axis=-1), axis=-1)


def located(location: Mapping[str, str]) -> dict[str, Any]:
    """Where data lie, as an entry of `describe`; it is no part of what the tasks are, for data may be moved."""
    return {LOCATION: dict(location)} if location else {}


def in_fold(split: str, numbers: Sequence[int], number: int, count: int) -> list[int]:
    """Which episodes of a stream the episodes of a fold are: those of "val" are every `count`-th from `number` on, and those of
    "train" all others."""
    if split == "val":
        return [n * count + number for n in numbers]
    blocks = (divmod(n, count - 1) for n in numbers)
    return [block * count + place + (place >= number) for block, place in blocks]


def check_seed(seed: Any) -> None:
    """Raises a ValueError for a seed that is out of range."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"The seed is {seed!r}; it must be a whole number from 0 to 2**64 - 1.")


def check_split(split: str, splits: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the splits if `split` is none of them."""
    if split not in splits:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(map(repr, splits))}.")


def episodes_hash(family: TaskFamily, split: str, *, seed: int, start: int, count: int, chunk: int = 64) -> str:
    """The sha256 of the tensors of episodes start … start+count−1, whatever the size of the chunks they are sampled in."""
    digest = hashlib.sha256()
    for first in range(start, start + count, chunk):
        digest_episodes(digest, family.sample(split, seed=seed, start=first, count=min(chunk, start + count - first)))
    return digest.hexdigest()


def digest_episodes(digest: Any, batch: Task) -> None:
    """Feeds the tensors of a batch of episodes into a digest of hashlib's, one episode after the other."""
    for episode in zip(*trees.flatten(batch), strict=True):
        for tensor in episode:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            # Copied: a row of one number may keep a stride that no view as bytes takes.
            flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(flat.view(torch.uint8).numpy(force=True).tobytes())
