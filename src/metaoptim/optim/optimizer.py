"""A rule of this library as an optimizer of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from metaoptim.core import trees
from metaoptim.core.checks import check_flags
from metaoptim.core.types import Params, Rule, State, Step, read_out
from metaoptim.lopt.checks import begun, check_psi, check_rule, started
from metaoptim.optim.call import Unjudged, Work, memory, raised
from metaoptim.optim.names import check_names, names_of, warn_of_names
from metaoptim.optim.settings import check_added, check_together, kind, own_decay, own_lr, separable, with_decay
from metaoptim.optim.ways import APART, Ways

SMALL = 2**16  # elements of a weight up to which calling torch costs more than putting such weights together


class Member(NamedTuple):
    """A parameter that has a gradient, its name, and the group that it belongs to."""

    param: Tensor
    name: str
    group: dict[str, Any]


class Bundle(NamedTuple):
    """Parameters that are moved by one call of a rule; stacked: along a new axis, else as the entries of a dictionary."""

    rule: Rule
    members: list[Member]
    stacked: bool


class LearnedOptimizer(Optimizer):
    """Moves parameters by a rule, learned or made by hand, as any optimizer of `torch.optim` does.

    Nothing is differentiated. Weights and gradients of 16 bits are given to the rule in float32, and its state is in float32.
    Parameters without a gradient stay as they are, with their state and their count of steps. Small weights of one shape are
    moved at once. ψ is no part of `state_dict()`: it belongs to the rule, as it does in the file of one.

    A rule whose weights are not separable, such as one that clips a norm over all of them, wants gradients of the same
    parameters, and the same weight decay, in each step. What `Step.loss` tells a rule is what the closure of `step` returns;
    without one, a rule that reads it is refused.

    Args:
        params: as for any optimizer; names, as of `model.named_parameters()`, are given to the rule, and must differ.
        rule: the rule.
        psi: its meta-parameters ψ; none: drawn at the start, with seed 0.
        lr: step size of a group, by which schedulers go too: updates are multiplied by lr ÷ the rule's own `lr`, all of them.
            A rule without a step size has 1, and a chain that of the one rule in it that has another. None: the rule's own.
        weight_decay: of a group, for rules that decay weights, or for the one in a chain; none: the rule's own `decay`.
        compile: whether a step is compiled by Inductor, when it is first taken, to the same numbers but for rounding. Where
            that fails, a graph of torch's operators runs instead, and of a rule that is no graph, as one that branches on
            values is none, the rule itself; with a warning.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        psi: Params | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        compile: bool = False,
    ) -> None:
        check_rule(rule, "an optimizer")
        check_flags(compile=compile)
        self.rule, self.compile = rule, compile
        decay = own_decay(rule) if weight_decay is None else weight_decay
        defaults = {"lr": self.own_lr if lr is None else lr} | ({} if decay is None else {"weight_decay": decay})
        Optimizer.__init__(self, params, defaults)
        start = {n: p.detach() for p, n in self._names().items()}
        if psi is not None:
            check_psi(rule, psi, "psi", start)
        self.psi = started(rule, start, torch.Generator().manual_seed(0)) if psi is None else dict(psi)
        members = [Member(p, n, {}) for p, n in self._names().items() if p.numel()]
        self._begun(sorted(members, key=lambda m: m.param.numel())[:1] if separable(rule) else members)
        warn_of_names(rule, self.param_groups)
        self._begin()

    def _begin(self) -> None:
        """What belongs to this process alone: the structures of states, and ways of calling the rule."""
        self._structures: dict[tuple[Tensor, ...], Any] = {}
        self._ways: Ways = getattr(self, "_ways", None) or Ways(self.rule, self.compile)

    def __getstate__(self) -> dict[str, Any]:
        return {**Optimizer.__getstate__(self), "rule": self.rule, "psi": self.psi, "compile": self.compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)
        self._begin()

    @property
    def own_lr(self) -> float:
        """The rule's step size; 1 where it has none."""
        return own_lr(self.rule)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        Optimizer.add_param_group(self, param_group)
        try:
            check_added(self.rule, self.param_groups[-1], any(map(self._steps, self._names())))
            check_together(self.rule, self.param_groups)
            check_names(self._names())
            if hasattr(self, "psi"):
                check_psi(self.rule, self.psi, "psi", {n: p.detach() for p, n in self._names().items()})
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        return {**Optimizer.state_dict(self), "rule": kind(self.rule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found, own = state_dict.get("rule", kind(self.rule)), kind(self.rule)
        if found != own:
            raise ValueError(f"The state is one of {found}, where this optimizer moves by {own}; load that of the same rule.")
        before = self.state, self.param_groups
        Optimizer.load_state_dict(self, state_dict)
        # As they were saved: torch has rounded them to the floats of their parameters.
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(numbers, self._names(), strict=True):
            for key, x in state_dict["state"].get(i, {}).items():
                self.state[param][key] = x.to(param.device, copy=True) if isinstance(x, Tensor) else x
        try:
            for unit in self._units():
                self._structure(unit)
        except ValueError:
            self.state, self.param_groups = before
            self._begin()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters that have a gradient; returns what the closure does, which computes gradients and the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_together(self.rule, self.param_groups)
        for bundle, (updates, state) in self._ways.taken(lambda way: self._moved(way, loss)):
            self._take(bundle, updates, state)
        return loss

    @torch.no_grad()
    def read_out(self) -> Params:
        """By name, the weights at which a run is to be judged: other ones than the parameters if the rule has a `read_out`."""
        found = {n: p.detach().clone() for p, n in self._names().items()}
        for unit in self._units():
            weights = {m.name: raised(m.param) for m in unit}
            judged = read_out(
                self.rule, self._psi_at(unit), trees.put(self._structure(unit), iter(self._leaves(unit))), weights
            )
            found |= {m.name: judged[m.name].to(m.param.dtype, copy=True) for m in unit}
        return found

    def _names(self) -> dict[Tensor, str]:
        return names_of(self.param_groups)

    def _units(self) -> list[list[Member]]:
        """Parameters that have a state, put together as they share one."""
        begun = [Member(p, n, {}) for p, n in self._names().items() if self.state.get(p)]
        return [[m] for m in begun] if separable(self.rule) else [begun] if begun else []

    def _bundles(self, stacking: bool) -> list[Bundle]:
        """What is moved in this step, in as few calls of the rule as may be; without stacking, in one for each weight."""
        names = self._names()
        groups = [(p, group) for group in self.param_groups for p in group["params"]]
        members = [Member(p, names[p], group) for p, group in groups if p.grad is not None and p.numel()]
        if sparse := [m.name for m in members if m.param.grad is not None and m.param.grad.layout != torch.strided]:
            raise ValueError(f"The gradient of {sparse[0]} is sparse: rules take dense ones; use Embedding(…, sparse=False).")
        if not separable(self.rule):
            self._check_same(members)
            return [Bundle(self._rule_of(members[0].group), members, False)] if members else []
        found: dict[Any, list[Member]] = {}
        for m in members:
            p = m.param
            form = _without(m.name, self._structure([m])) if stacking and p.numel() <= SMALL else p
            key = (p.shape, p.dtype, p.device, m.group.get("weight_decay"), self._steps(p), form)
            found.setdefault(key, []).append(m)
        return [Bundle(self._rule_of(same[0].group), same, len(same) > 1) for same in found.values()]

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        decay, own = group.get("weight_decay"), own_decay(self.rule)
        return self.rule if decay in (None, own) or own is None else with_decay(self.rule, decay)

    def _check_same(self, members: list[Member]) -> None:
        """A rule that reads all weights together can't go on with others than it began with."""
        now, before = {m.param for m in members}, {p for p in self._names() if self._steps(p)}
        if before and now != before:
            odd = next(n for p, n in self._names().items() if p in now ^ before)
            what = "had no gradient before" if odd in {m.name for m in members} else "has no gradient"
            raise ValueError(
                f"{odd} {what}: {self.rule} reads all weights together, which must be the same in each step; freeze parameters "
                "before the first one."
            )

    def _steps(self, param: Tensor) -> int:
        """How many steps this parameter has made."""
        return int(self.state.get(param, {}).get("step", 0))

    def _psi_at(self, members: list[Member]) -> Params:
        return {n: x.to(members[0].param.device) for n, x in self.psi.items()}

    def _begun(self, members: list[Member]) -> State:
        """The rule's state of these parameters at the start."""
        return begun(self.rule, self._psi_at(members), {m.name: raised(m.param) for m in members}) if members else {}

    def _structure(self, members: list[Member]) -> Any:
        """How the rule's state of these parameters is put together; where there is none yet, it is begun."""
        unit = tuple(m.param for m in members)
        if unit not in self._structures:
            leaves: list[Tensor] = []
            structure, kept = trees.take(self._begun(members), leaves), self.state[unit[0]]
            if not kept:
                kept |= {"step": 0, **_numbered(leaves)}
            elif {n: x for n, x in _shapes(kept).items() if n != "step"} != _shapes(_numbered(leaves)):
                raise ValueError(f"The state of {members[0].name} is not one of {self.rule}; load that of the same optimizer.")
            self._structures[unit] = structure, len(leaves)
        return self._structures[unit][0]

    def _leaves(self, members: list[Member]) -> list[Tensor]:
        """The tensors of the rule's state of these parameters."""
        kept = self.state[members[0].param]
        return [kept[str(i)] for i in range(self._structures[tuple(m.param for m in members)][1])]

    def _moved(self, way: str, loss: Any) -> Sequence[tuple[Bundle, tuple[Params, State]]]:
        """What is moved in this step, with its updates and the state after them."""
        bundles = self._bundles(way != APART)
        work = [self._work(bundle, loss) for bundle in bundles]
        moved = self._ways.moved(way, [(bundle.rule, bundle.stacked) for bundle in bundles], work)
        return list(zip(bundles, moved, strict=True))

    def _work(self, bundle: Bundle, loss: Any) -> Work:
        members, first = bundle.members, bundle.members[0]
        weights = {m.name: raised(m.param) for m in members}
        grads = {m.name: raised(m.param.grad, weights[m.name].dtype) for m in members}
        like = weights[first.name]
        lost = torch.as_tensor(float("nan") if loss is None else loss, dtype=like.dtype, device=like.device).detach()
        step = (Unjudged if loss is None else Step)(torch.tensor(self._steps(first.param), device=like.device), lost)
        units = [[m] for m in members] if bundle.stacked else [members]
        structure, *_ = [self._structure(unit) for unit in units]
        leaves = [self._leaves(unit) for unit in units]
        if bundle.stacked:
            grads, weights = ({first.name: torch.stack(list(x.values()))} for x in (grads, weights))
            leaves = [[torch.stack(same) for same in zip(*leaves, strict=True)]]
        return Work(self._psi_at(members), grads, trees.put(structure, iter(leaves[0])), weights, step)

    def _take(self, bundle: Bundle, updates: Params, state: State) -> None:
        """Moves the parameters and keeps their states."""
        units = [[m] for m in bundle.members] if bundle.stacked else [bundle.members]
        own, theirs = self.own_lr, {memory(x) for m in bundle.members for x in (m.param, m.param.grad)}
        for i, unit in enumerate(units):
            leaves: list[Tensor] = []
            trees.take(trees.index(state, i) if bundle.stacked else state, leaves)
            steps = self._steps(unit[0].param) + 1
            if self._ways.graphs is not None:  # which are compiled for one order of axes
                leaves = [
                    x if x.stride() == old.stride() else old.copy_(x) for x, old in zip(leaves, self._leaves(unit), strict=True)
                ]
            # A rule may return what it was given, which others write into; and those of a stack are parts of one tensor.
            leaves = [x.clone() if bundle.stacked or memory(x) in theirs else x for x in leaves]
            self.state[unit[0].param] |= _numbered(leaves)
            for m in unit:
                self.state[m.param]["step"] = steps
                u = updates[bundle.members[0].name][i] if bundle.stacked else updates[m.name]
                m.param.add_(u, alpha=float(m.group["lr"]) / own)


def _numbered(leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): x for i, x in enumerate(leaves)}


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {n: getattr(x, "shape", None) for n, x in state.items()}


def _without(name: str, structure: Any) -> Any:
    """The structure of a state as it is for a weight of any name."""
    if isinstance(structure, tuple):
        return tuple(_without(name, x) for x in structure)
    return None if structure == name else structure
