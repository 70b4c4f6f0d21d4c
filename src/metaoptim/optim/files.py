"""A rule and its ψ as one file: safetensors, with a header that says what it is, as JSON.

The header stands in the file's metadata under the key `metaoptim`:

    format    a number, raised when what is stored changes
    inputs    a number, raised when what learned rules see of a gradient changes
    rule      name of the class and its arguments, among which there may be other rules
    sha256    of all else in the header, and of ψ: names, shapes, floats and bytes
    version   of the library that wrote it

and whatever the caller adds, such as a `recipe` and `scores`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

import metaoptim
from metaoptim import lopt, rules
from metaoptim.core.brief import brief
from metaoptim.core.types import Params, Rule
from metaoptim.lopt.checks import check_psi, check_rule
from metaoptim.optim.names import Named
from metaoptim.runs import Run

KEY, FORMAT, INPUTS = "metaoptim", 1, 1


_KINDS = (lopt.Celo2, lopt.LSTM, lopt.SmallFC, Named, *(kind for kind in vars(rules).values() if isinstance(kind, type)))
KNOWN: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def save(path: str | Path, rule: Rule, psi: Params | None = None, header: Mapping[str, Any] | None = None) -> None:
    """Writes a rule with its ψ into one file, which `load` reads.

    Args:
        path: of the file, which is replaced if there is one; its folder is made if there is none.
        rule: a rule of `metaoptim.lopt` or `metaoptim.rules`, or a chain of them. `by_adam` can be None or `Named(…)`.
        psi: its ψ; none: that of a rule that has none.
        header: what else to say of it, in JSON types, such as {"recipe": …, "scores": …}.
    """
    check_given(rule, "save")
    check_psi(rule, psi, "ψ")
    if not isinstance(header, Mapping | None):
        raise ValueError(f"header must be a dictionary, such as {{'recipe': …, 'scores': …}}; found {brief(header)}.")
    tensors = {n: x.detach().contiguous() for n, x in (psi or {}).items()}
    told = dict(header or {})
    if taken := sorted({"format", "inputs", "rule", "sha256", "version"} & told.keys()):
        raise ValueError(f"header has the entry `{taken[0]}`, which save writes itself; choose another name.")
    own = {"format": FORMAT, "inputs": INPUTS, "rule": _told(rule), "version": metaoptim.__version__}
    try:
        whole = json.loads(json.dumps(own | told, allow_nan=False))
        text = json.dumps({**whole, "sha256": digest(tensors, whole)}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"header can't be written as JSON ({error}); give it plain numbers, strings, lists and dicts."
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(safetensors.torch.save(tensors, {KEY: text}))


def read(path: str | Path) -> tuple[Rule, Params, dict[str, Any]]:
    """A rule, its ψ and its header. Raises a ValueError for a file that is not one of `save`, or not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            psi = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (an open file is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut, or no file of a rule: {error}; give one that metaoptim.optim.save wrote.") from error
    if text is None:
        raise ValueError(f"{path} holds tensors, and no rule; give a file that metaoptim.optim.save wrote.")
    try:
        header = json.loads(text)
        found = header["format"], header["inputs"]
        told, sha256 = dict(header["rule"]), header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a header that can't be read ({error!r}); get the file again.") from error
    if found != (FORMAT, INPUTS):
        raise ValueError(
            f"{path} has format {found[0]} and inputs {found[1]}, where this version reads {FORMAT} and {INPUTS}: use the "
            f"version that wrote it, {header.get('version')}."
        )
    if digest(psi, header) != sha256:
        raise ValueError(f"{path} is altered: its ψ and its header have another sha256 than it says; get the file again.")
    rule = _built(told, path)
    check_psi(rule, psi, str(path))
    return rule, psi, header


def check_given(rule: Any, taker: str) -> None:
    """A rule; a run has one, with its ψ."""
    if isinstance(rule, Run):
        raise ValueError(f"{taker} takes a rule; of a run, mo.optim.from_run(run) makes optimizers, and has `save(path)`.")
    check_rule(rule, taker)


def digest(psi: Params, header: Mapping[str, Any]) -> str:
    """The SHA-256 of a header, but for its own entry, and of tensors with their names."""
    found = hashlib.sha256(json.dumps({n: x for n, x in header.items() if n != "sha256"}).encode())
    for n in sorted(psi):
        found.update(f"{n} {tuple(psi[n].shape)} {psi[n].dtype} ".encode())
        found.update(safetensors.torch.save({"x": psi[n].contiguous()}))
    return found.hexdigest()


def _told(x: Any) -> Any:
    """A rule as JSON types."""
    if (is_dataclass(x) and not isinstance(x, type)) or (hasattr(x, "init") and hasattr(x, "update")):
        if KNOWN.get(type(x).__name__) is not type(x):
            raise ValueError(
                f"{type(x).__name__} can't be kept in a file, which holds no code; rules that can: {', '.join(sorted(KNOWN))}. "
                "Keep the run's folder: of what mo.load gives, mo.optim.from_rule(rule, psi=run.phi.rule) makes optimizers."
            )
        values = {
            f.name: getattr(x, f.name) for f in fields(x) if not (callable(f.default) and getattr(x, f.name) is f.default)
        }
        return {"name": type(x).__name__, "arguments": {name: _told(value) for name, value in values.items()}}
    if isinstance(x, tuple | list):
        return [_told(part) for part in x]
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise ValueError(
        f"{getattr(x, '__name__', x)!r} can't be kept in a file; give Named(…), patterns of names, for a function."
    )


def _built(told: Any, path: str | Path) -> Any:
    """What `_told` told."""
    if isinstance(told, list):
        return tuple(_built(part, path) for part in told)
    if not isinstance(told, dict):
        return told
    kind = KNOWN.get(told.get("name", ""))
    if kind is None:
        raise ValueError(
            f"{path} is of the rule {told.get('name')}, which this version doesn't know; rules are {', '.join(sorted(KNOWN))}."
        )
    arguments = {name: _built(value, path) for name, value in told["arguments"].items()}
    try:
        return kind(*arguments["patterns"]) if kind is Named else kind(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} has arguments that {told['name']} doesn't take: {error}") from error
