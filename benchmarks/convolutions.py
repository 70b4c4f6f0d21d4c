"""Milliseconds of conv4-64's convolutions for 16 tasks, one after the other: torch's kernels in two layouts, and products.

    python benchmarks/convolutions.py [--images 75] [--threads 1]

The thresholds of `metaoptim.engine.graphs.convolutions` rest on this table. A product is the column matrix and its product,
as there; the gradient of the input is left to torch's kernels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.table import Table
from shared import CONSOLE, summary

from metaoptim.engine.graphs.convolutions import columns, matrix

TASKS, WIDTH, ROUNDS = 16, 64, 7
LAYERS = ((1, 28), (64, 14), (64, 7), (64, 4))  # channels and side of what goes in
STRIDE, PADDING, DILATION = (2, 2), (1, 1), (1, 1)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=75)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CONSOLE.print(summary())
    found = Table(
        "channels", "side", title=f"{TASKS} tasks of {options.images} images, ms: default layout, channels last, product"
    )
    for name in ("forward", "gradient of weights", "gradient of input"):
        found.add_column(name, justify="right")
    for channels, side in LAYERS:
        found.add_row(str(channels), str(side), *layer(options.images, channels, side))
    CONSOLE.print(found)


def layer(images: int, channels: int, side: int) -> list[str]:
    """The three operators of one layer, each as the milliseconds of its ways."""
    out = (side + 1) // 2
    x, w, g = torch.rand(images, channels, side, side), torch.rand(WIDTH, channels, 3, 3), torch.rand(images, WIDTH, out, out)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w, g)]
    rest = (STRIDE, PADDING, DILATION, False, (0, 0), 1)
    gradients = torch.ops.aten.convolution_backward
    flat = last[2].permute(0, 2, 3, 1).reshape(1, -1, WIDTH)

    def cols() -> torch.Tensor:
        return columns(last[0], w, STRIDE, PADDING, DILATION, 1)

    def back(mask: list[bool]) -> list[Callable[[], object]]:
        return [lambda t=t: gradients(t[2], t[0], t[1], None, *rest, mask) for t in ([x, w, g], last)]

    forward = [lambda t=t: torch.ops.aten.convolution(t[0], t[1], None, *rest) for t in ([x, w], last)]
    ways = (
        [*forward, lambda: cols() @ matrix(w, 1)],
        [*back([False, True, False]), lambda: cols().mT @ flat],
        back([True, False, False]),
    )
    return [", ".join(f"{milliseconds(way):.1f}" for way in row) for row in ways]


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call for every task, by the best of a few rounds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(2):
            call()
        best = min(best, (time.perf_counter() - start) / 2)
    return 1e3 * TASKS * best


if __name__ == "__main__":
    main()
