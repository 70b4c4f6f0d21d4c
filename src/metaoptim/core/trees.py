"""Arithmetic on flat dictionaries of tensors, and on the nested tuples and dicts that states and carries are made of."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaoptim.core.types import Params

Tree = TypeVar("Tree")


def add(a: Params, b: Params, scale: float = 1.0) -> Params:
    """a + scale · b, for the names of a."""
    return {n: torch.add(x, b[n], alpha=scale) for n, x in a.items()}


def subtract(a: Params, b: Params) -> Params:
    """a − b, for the names of a."""
    return {n: x - b[n] for n, x in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Σ a · b over every element of every tensor."""
    return torch.stack([(x * b[n]).sum() for n, x in a.items()]).sum()


def norm(a: Params) -> Tensor:
    """The Euclidean norm of all elements together."""
    return dot(a, a).sqrt()


def select(a: Params, keep: Callable[[str], bool]) -> Params:
    """The entries whose name is kept."""
    return {n: x for n, x in a.items() if keep(n)}


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with f applied to every tensor."""
    return _mapped(f, tree)


def zip_tensors(f: Callable[[Tensor, Tensor], Tensor], a: Tree, b: Tree) -> Tree:
    """f of the tensors in the same places of two equal structures."""
    result: Tree = _mapped(f, a, b)
    return result


def plus(a: Tree, b: Tree) -> Tree:
    """a + b for equal structures of any kind."""
    return zip_tensors(torch.add, a, b)


def to(tree: Tree, device: torch.device) -> Tree:
    """The same structure on a device."""
    moved: Tree = map_tensors(lambda x: x.to(device), tree)
    return moved


def device(tree: Any) -> torch.device:
    """Where the first tensor of a structure is."""
    return flatten(tree)[0].device


def index(tree: Any, i: int | slice) -> Any:
    """Row i, or a range of rows, of every tensor."""
    return map_tensors(lambda x: x[i], tree)


def stack(trees: Sequence[Any]) -> Any:
    """Equal structures put together along a new leading axis."""
    return _mapped(lambda *xs: torch.stack(xs), *trees)


def cat(trees: Sequence[Any]) -> Any:
    """Equal structures put together along their leading axis."""
    return _mapped(lambda *xs: torch.cat(xs), *trees)


def flatten(tree: Any) -> list[Tensor]:
    """The tensors of a structure, in a fixed order."""
    leaves: list[Tensor] = []
    _mapped(leaves.append, tree)
    return leaves


def unflatten(tensors: Sequence[Tensor], like: Any) -> Any:
    """The structure of `like` around other tensors."""
    left = iter(tensors)
    return _mapped(lambda x: next(left), like)


def _mapped(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """f of the leaves in the same places: of all that is no tuple, list or dict."""
    if isinstance(tree, dict):
        pairs = ((key, _mapped(f, x, *(other[key] for other in others))) for key, x in tree.items())
        if type(tree) is dict:
            return dict(pairs)
        other = copy.copy(tree)  # an OrderedDict, or a dictionary of another library
        other.update(pairs)
        return other
    if isinstance(tree, tuple | list):
        parts = [_mapped(f, x, *rest) for x, *rest in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return f(tree, *others)


def replaced(tree: Tree, old: Params, new: Params) -> Tree:
    """The same structure with new tensors in the places of these very old ones."""
    others = {id(x): new[n] for n, x in old.items()}
    result: Tree = map_tensors(lambda x: others.get(id(x), x), tree)
    return result


def take(tree: Any, leaves: list[Tensor]) -> Any:
    """Appends the tensors of nested tuples and dicts to a list; returns their structure, which can be hashed.

    A few times faster than the general `flatten`, for what runs at every step.
    """
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return None
    if isinstance(tree, dict):
        return tuple(tree), tuple([take(x, leaves) for x in tree.values()])
    return type(tree), tuple([take(x, leaves) for x in tree])


def put(structure: Any, leaves: Iterator[Tensor]) -> Any:
    """The nested tuples and dicts that `take` took apart, around other tensors."""
    if structure is None:
        return next(leaves)
    kind, parts = structure
    if isinstance(kind, tuple):
        return dict(zip(kind, [put(part, leaves) for part in parts], strict=True))
    values = [put(part, leaves) for part in parts]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of nested tuples, lists and dicts, by the JSON of their path."""
    return {json.dumps(path): x for path, x in _paths(tree, [])}


def filled(like: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The structure of `like` around the tensors that `named` gives names to. Raises a ValueError where they don't fit."""
    expected = named(like)
    if expected.keys() != tensors.keys():
        odd = min(expected.keys() ^ tensors.keys())
        raise ValueError(f"the entry {odd} is {'missing' if odd in expected else 'not expected here'}")
    return unflatten([tensors[path] for path in expected], like)


def _paths(tree: Any, path: list[str | int]) -> Iterator[tuple[list[str | int], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    else:
        for step, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _paths(part, [*path, step])
