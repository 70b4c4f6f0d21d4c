"""What a checkpoint is, and the one self-contained safetensors file that holds it.

Its metadata, all strings, are `format` (a number, raised when what is stored changes), `step`, `state` (JSON) and `sha256`: the
digest of the whole file except the digest's own 64 digits. So it covers names, shapes, padding and metadata as well as the
tensors. The same checkpoint is always the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from metaoptim.core.callers import warn

# No name or value can look like this, because JSON escapes the quotes in them.
_MARK = b'"sha256":"'
_DIGITS = 64

LAST, PREVIOUS, BEST = "checkpoint.safetensors", "checkpoint.previous.safetensors", "best.safetensors"
START = "start.safetensors"  # φ before the first step


FORMAT = 1


class FormatError(ValueError):
    """A checkpoint is intact, and this version of metaoptim can't read it."""


class Checkpoint(NamedTuple):
    """One moment of a run: outer steps completed, tensors by name (any dtype and shape), JSON-serialisable state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def field(self, name: str) -> Any:
        """An entry of the state that must be there; a FormatError where it is not."""
        if name not in self.state:
            raise FormatError(
                f"the checkpoint of step {self.step} has no entry `{name}`, which training writes: use the version of "
                "metaoptim that wrote it, or train again"
            )
        return self.state[name]


def strict_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON that every parser accepts: a float that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, Integral):
        return int(value)  # NumPy's too
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def pack(checkpoint: Checkpoint) -> bytes:
    """The checkpoint as the bytes of a safetensors file; raises ValueError for complex128, which it can't hold."""
    # Copies, because safetensors takes no strided tensors, no shared memory and no lazy conjugates.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in checkpoint.tensors.items()
    }
    for name, tensor in tensors.items():
        if tensor.dtype is torch.complex128:
            raise ValueError(f"tensor {name!r} is complex128, which can't be saved: use complex64")
    metadata = {
        "format": str(FORMAT),
        "sha256": "0" * _DIGITS,
        "state": strict_json(checkpoint.state, sort_keys=True),
        "step": str(checkpoint.step),
    }
    data = bytearray(_with_metadata(safetensors.torch.save(tensors), metadata))
    start = data.index(_MARK) + len(_MARK)
    data[start : start + _DIGITS] = _digest(data, start)
    return bytes(data)


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """The file with metadata in its header, in their order here; safetensors' own order changes from process to process."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of eight
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[8 + length :]))


def unpack(data: bytes) -> Checkpoint:
    """The checkpoint in these bytes, on the CPU; raises ValueError if even one bit differs from what was written.

    A FormatError, if another version of metaoptim wrote it.
    """
    mark = data.find(_MARK)
    start = mark + len(_MARK)
    if mark < 0 or data[start : start + _DIGITS] != _digest(data, start):
        raise ValueError("the checkpoint is cut or altered: its checksum doesn't match; use an earlier one")
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    check_format(metadata)
    tensors = safetensors.torch.load(data)
    return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["state"]))


def check_format(metadata: dict[str, str]) -> None:
    """Raises a FormatError for a format that is missing, or that is not this version's."""
    found = metadata.get("format", "")
    if found != str(FORMAT) or not {"step", "state"} <= metadata.keys():
        told = f"has the format {found}" if found else "states no format"
        raise FormatError(
            f"the checkpoint {told}, where this version of metaoptim reads format {FORMAT}: use the version that wrote it, or "
            "train again"
        )


def _digest(data: bytes | bytearray, start: int) -> bytes:
    view = memoryview(data)
    digest = hashlib.sha256(view[:start])
    digest.update(view[start + _DIGITS :])
    return digest.hexdigest().encode()


def newest(folder: Path, names: tuple[str, ...]) -> tuple[Checkpoint | None, str, list[str]]:
    """The first intact checkpoint among these files, its file's name, and the names of the damaged ones before it."""
    damaged: list[str] = []
    for name in names:
        try:
            return unpack((folder / name).read_bytes()), name, damaged
        except FileNotFoundError:
            continue
        except FormatError as error:
            raise FormatError(f"{folder / name}: {error}") from error
        except ValueError:
            damaged.append(name)
    return None, "", damaged


def read(folder: Path, names: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
    """As `newest`, but warns if it skipped damaged files, and raises ValueError if none is intact."""
    found, name, damaged = newest(folder, names)
    if damaged and found is None:
        raise ValueError(
            f"no checkpoint in {folder} is intact (cut or altered: {', '.join(damaged)}): "
            "restore one from a copy, or start again in another folder"
        )
    if damaged and found is not None:
        warn(f"{folder / damaged[0]} is cut or altered: falling back to {name}, step {found.step}")
    return found, damaged
