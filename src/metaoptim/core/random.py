"""Generators that code shares: used for a while, and afterwards as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
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


def rewinder() -> Callable[[], None]:
    """What puts the generators of torch for the CPU, of Python and of NumPy back to where they are now."""
    numpy = sys.modules.get("numpy")
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()

    def back() -> None:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)

    return back
