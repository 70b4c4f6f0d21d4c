"""torch's generators: used for a while, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OF_THEIR_OWN = ("cuda", "xpu")  # kinds of devices with generators that torch can save


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Inside, the generators of the CPU and of a device start from a seed, where one is given; the caller's are kept."""
    kind = device.type if device.type in _OF_THEIR_OWN else "cuda"
    with torch.random.fork_rng([device] if device.type in _OF_THEIR_OWN else [], device_type=kind):
        if seed is not None:
            torch.manual_seed(seed)  # of every device
        yield
