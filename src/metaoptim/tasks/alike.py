"""Images of different splits that are nearly the same: what one has learnt of the first tells the second."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 16  # of the small grey pictures that are compared
BLOCK = 2048  # pictures at a time
CLOSE, CORRELATED = 8.0, 0.99
"""Two pictures are alike if they differ by at most 8 of 255 (root mean square), and their correlation is at least 0.99: as an
image does that was saved again with loss, or made a little brighter. Pictures of one colour are like none."""


def alike(images: NDArray[np.uint8], group: NDArray[Any]) -> NDArray[np.int64]:
    """Pairs (i, j) of images of different groups that look the same, [pairs, 2].

    images: uint8 [images, H, W] or [images, channels, H, W]; group: [images].
    """
    pictures = _small(images)
    centred = pictures - pictures.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    direction = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    found = [np.empty((0, 2), np.int64)]
    for a, b in combinations(np.unique(group), 2):
        left, right = np.flatnonzero(group == a), np.flatnonzero(group == b)
        for start in range(0, len(left), BLOCK):
            some = left[start : start + BLOCK]
            rows, columns = np.nonzero(direction[some] @ direction[right].T >= CORRELATED)
            i, j = some[rows], right[columns]
            near = np.sqrt(((pictures[i] - pictures[j]) ** 2).mean(1)) <= CLOSE
            found.append(np.stack([i[near], j[near]], axis=1))
    return np.concatenate(found)


def _small(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey pictures of SIDE² pixels at most, as rows, from 0 to 255."""
    rows, columns = (_areas(size) for size in images.shape[-2:])
    grey = (images if images.ndim == 3 else images.mean(1, dtype=np.float32)).astype(np.float32)
    small: NDArray[np.float32] = (rows @ grey @ columns.T).reshape(len(images), -1)
    return small


def _areas(size: int) -> NDArray[np.float32]:
    """The share of each pixel in each of the SIDE means, [SIDE, size]."""
    side = min(SIDE, size)
    edges = np.linspace(0, size, side + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares: NDArray[np.float32] = (np.clip(overlap, 0, None) * side / size).astype(np.float32)
    return shares
