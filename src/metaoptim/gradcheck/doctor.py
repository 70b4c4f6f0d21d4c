"""The gradient doctor: is the meta-gradient right, in every execution mode, and if not, which layer is it?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch

from metaoptim.core import trees
from metaoptim.core.checks import check_method
from metaoptim.core.finite import in_the_data
from metaoptim.core.types import Claim, Estimate, MetaOptimizer, Task
from metaoptim.engine import offered
from metaoptim.engine.inspect import check_updates
from metaoptim.engine.options import check_settings
from metaoptim.gradcheck.case import Case, How, Mapped, Mixed, in_doubles, prepare, unguarded
from metaoptim.gradcheck.claims import Verdict, by_design, each_tensor, judge
from metaoptim.gradcheck.compare import measured
from metaoptim.gradcheck.differences import EXACT, distance, probe
from metaoptim.gradcheck.layers import culprits
from metaoptim.gradcheck.minimum import NoMinimum
from metaoptim.gradcheck.parts import fault, percent, said
from metaoptim.gradcheck.report import Report, Row
from metaoptim.gradcheck.rules import inert, rule_part
from metaoptim.gradcheck.samples import TASKS, refuse_unreadable, sample
from metaoptim.learners import GradientLearner, network_of
from metaoptim.tasks import TaskFamily

Say = Callable[[str], None]

CLAIMS: dict[Claim, str] = {
    "exact": "the exact meta-gradient",
    "first_order": "the first-order meta-gradient",
    "displacement": "the displacement of the weights, whose inner gradients are checked",
    "implicit": "the implicit meta-gradient, checked at the minimum of the inner objective",
    "truncated": "the exact meta-gradient of a window of the run",
    "stochastic": "an estimate whose mean is checked, in standard errors",
}

CUTS = (("vmap:2", "graph", "eager"), ("workers:2", "graph", "trace"))  # of a batch: what is cut is a batch like others

PARTLY = "no layer is off by itself, and some modes are right: train with the engine's settings of a row that is."
ZERO = (
    "no weight influences the loss: its meta-gradient is zero everywhere, as where a result is rounded, compared, or taken by "
    "argmax; use a function with a slope there."
)
UNKNOWN = (
    "no layer, loss or rule is off by itself: look at what puts them together, such as an estimator or a learner of your own."
)

UNSEEN = (
    "the rule is not off by itself, and the layers and the loss of these problems can't be looked at: check the network alone, "
    "as in mo.check(mo.maml(net, loss), tasks)."
)

UNFINISHED = (
    ": more inner steps or a larger prox come nearer to that, and more iterations of the solver (for a Neumann series, those "
    "with a scale below 2 / the largest curvature)."
)

WEIGHED = "the mean of the tasks' gradients was checked: weighed by their conflicts, they are the gradient of no loss."

NOISY = 16  # repetitions of a random estimate, whose spread is told

FAR = 0.1

SAME = 1e-2  # beyond it, float32 drew other random numbers


def check(
    method: MetaOptimizer,
    tasks: Task | TaskFamily | None = None,
    *,
    gradient: Mapped | None = None,
    input: Sequence[int] | None = None,
    modes: Literal["quick", "all"] | Sequence[How] = "quick",
    say: Say = lambda text: None,
) -> Report:
    """Compares meta-gradients with central differences in float64, and names the layer where something is off.

    The meta-optimizer, its module and the tasks stay as they are, and so do torch's random generators.

    Args:
        method: what is checked, at its φ.
        tasks: a batch of tasks or a task family, of which a few tasks are used; none: random numbers.
        gradient: a mapping of your own to check in place of the engine's modes: from φ and a batch of tasks to an `Estimate`,
            the loss of the batch and its gradient in the learnt part of φ.
        input: the shape of one input, such as (1, 28, 28), for random tasks; by default what the first layer tells.
        modes: execution modes (tasks, memory, runtime); "quick": all but repetitions, in seconds; "all": every
            combination, also what Inductor compiles, in minutes.
        say: is called with a few words on what is being done.

    Raises:
        ValueError: modes of another kind, tasks that the model can't take, or a module that can't be copied.
    """
    check_method(method, "check")
    _check_modes(modes)
    weighed = not isinstance(method.reduction, str)
    method = unguarded(method)
    batch = sample(method, tasks, input)
    refuse_unreadable(method, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap's, which is not about what is right
        warnings.filterwarnings("ignore", r"(?s).*From here on: ")  # the engine's, of what the verdict tells
        report = _examine(method, batch, gradient, modes, say)
    return replace(report, notes=(*report.notes, WEIGHED)) if weighed else report


def _check_modes(modes: Any) -> None:
    if modes in ("quick", "all"):
        return
    for how in modes if isinstance(modes, list | tuple) and modes else [modes]:
        if not isinstance(how, tuple | list) or len(how) != 3 or not all(isinstance(word, str) for word in how):
            raise ValueError(f"modes={modes!r}: it must be 'quick', 'all', or a list such as [('vmap', 'graph', 'eager')].")
        batching, memory, runtime = how
        check_settings(batching, memory, runtime, "full")


def _examine(
    method: MetaOptimizer,
    batch: Task,
    gradient: Mapped | None,
    modes: Literal["quick", "all"] | Sequence[How],
    say: Say,
) -> Report:
    if isinstance(method.learner, GradientLearner) and method.adapting:
        check_updates(method.learner.rule, method.phi.rule, trees.select(method.phi.weights, method.learner.adapts))
    case = prepare(method, method.phi, batch, TASKS)
    try:
        rows, first = _modes(case, modes, say) if gradient is None else _own(case, gradient)
    except NoMinimum as reason:
        return Report(method.name, CLAIMS[case.claim], (), (), (str(reason),), ())
    except Mixed as reason:
        report = Report(method.name, CLAIMS[case.claim], (Row("every mode", None, refused=str(reason)),), (), (), ())
        with in_doubles():
            faults, notes = _causes(prepare(method, method.phi, batch, TASKS), report, own=False)
        if not faults:  # no layer of the network does it
            raise
        return replace(report, faults=tuple(faults), notes=tuple(notes))
    say("each tensor")
    tensors = _tensors(case, first, gradient) if first else []
    report = Report(method.name, CLAIMS["exact" if gradient else case.claim], tuple(rows), tuple(tensors), (), ())
    say("the layers")
    faults, notes = _causes(prepare(method, method.phi, batch, TASKS), report, gradient is not None)
    if first and report.ok and not faults and not any(g.any() for g in case.leaves(first.estimate.grad).values()):
        faults.append(ZERO)
    if first and not faults and gradient is None:
        notes += _costs(case, first, prepare(method, method.phi, batch, TASKS, torch.float32))
    if gradient is None and case.holds():
        notes.append("what an inner step holds constant on purpose is held in the differences too.")
    if case.method.learner.steps < method.learner.steps:
        notes.append(f"checked with {case.method.learner.steps} of its {method.learner.steps} inner steps.")
    return replace(report, faults=tuple(faults), notes=tuple(notes))


def _modes(case: Case, modes: Literal["quick", "all"] | Sequence[How], say: Say) -> tuple[list[Row], Verdict | None]:
    """A row for every execution mode, and the first one that runs."""
    rows: list[Row] = []
    first: Verdict | None = None
    if modes == "all":
        chosen = offered(case.method, compiled=True)
    elif modes == "quick":
        chosen = [how for how in offered(case.method) if ":" not in how[0] or how in CUTS]
    else:
        chosen = list(modes)
    no_forward_mode = ""
    for how in chosen:
        name = " · ".join(how)
        say(name)
        if no_forward_mode and how[1] == "mixed":  # traced all the same, it can end the process
            rows.append(Row(name, None, refused=no_forward_mode))
            continue
        try:
            if first is None:
                with in_doubles():
                    first = judge(case, how)
                rows.append(Row(name, first.error, limit=first.limit))
            else:
                rows.append(_compare(name, case, how, first))
        except (NoMinimum, Mixed):  # which no other mode has either
            raise
        except Exception as error:  # whatever torch and a user's code can say
            rows.append(Row(name, None, refused=said(error)))
            no_forward_mode = rows[-1].refused if how[1:] == ("mixed", "eager") else no_forward_mode
    return rows, first


def _compare(name: str, case: Case, how: How, first: Verdict) -> Row:
    estimate = case.run(case.mode(how))
    apart = abs(estimate.loss - first.estimate.loss) > EXACT * abs(first.estimate.loss)
    if apart and first.error <= first.limit:  # it draws other random numbers: held to its own loss
        return Row(name, judge(case, how).error)
    found = case.leaves(estimate.grad)
    away = distance(found, case.leaves(first.estimate.grad))
    if first.probe is None:  # no differences can be taken of this mode alone
        return Row(name, first.error if first.error > first.limit else None, away, limit=first.limit)
    return Row(name, first.error if away <= EXACT else first.probe.error(found), away)


def _own(case: Case, gradient: Mapped) -> tuple[list[Row], Verdict]:
    estimate = case.run(gradient)
    at = case.leaves(case.phi)
    if not isinstance(estimate, Estimate) or (found := case.leaves(estimate.grad)).keys() != at.keys():
        raise ValueError(
            "gradient must return an Estimate(loss, MetaParams(weights, rule)) with a tensor for each learnt one of φ and "
            f"for no other: {', '.join(at)}."
        )
    seen, error = probe(case.loss(gradient), at, found)
    return [Row("your gradient", error)], Verdict(estimate, error, seen)


def _tensors(case: Case, first: Verdict, gradient: Mapped | None) -> list[Row]:
    """A row for every tensor of θ and ψ, along a direction in it alone."""
    if gradient is None:
        return [Row(name, error) for name, error in each_tensor(case, first).items()]
    f, at, found = case.loss(gradient), case.leaves(case.phi), case.leaves(first.estimate.grad)
    return [Row(name, probe(f, at, found, [name])[1]) for name in at]


def _causes(case: Case, report: Report, own: bool) -> tuple[list[str], list[str]]:
    """Faults, and notes on what is refused."""
    learner: Any = case.method.learner
    phi = case.phi
    refused = [row for row in report.modes if row.verdict == "refused"]
    reasons = {row.refused: sum(row.refused == other.refused for other in refused) for row in refused}
    notes = [f"refused in {count} of {len(report.modes)} modes: {reason}." for reason, count in reasons.items()]
    faults: list[str] = []
    rule = learner.rule if isinstance(learner, GradientLearner) else None
    support = trees.index(case.batch, 0).support
    fast = trees.select(phi.weights, learner.adapts)
    looked_at = (network, network.initial(phi.weights), support) if (network := network_of(learner)) else None
    if hasattr(learner, "network_at"):  # its weights are no part of φ
        rule, fast, looked_at = learner.rule, learner.init(phi, support).fast, learner.network_at(support)
    if rule and (sentence := inert(rule, phi.rule, fast)):
        faults.append(sentence)
    if report.ok and not refused:
        return faults, notes
    infinite = any(row.error is not None and not math.isfinite(row.error) for row in report.modes)
    if infinite and (odd := in_the_data(case.batch)):
        return [*faults, f"the data of task {odd[0]} hold {odd[1]}: no layer can be judged by them."], notes
    named: list[str] = []
    if looked_at:
        twice = own or case.claim in ("exact", "implicit", "truncated")
        mapped = any("vmap" in row.name and row.verdict != "right" for row in report.modes)
        named = culprits(*looked_at, twice=twice, mapped=mapped, outside=own)
    if report.ok:
        return faults, notes + named
    if not named and rule and (reason := fault(rule_part(rule, phi.rule, fast))):
        named = [f"the update rule: {reason}."]
    if not named and not faults and any(row.verdict == "off" for row in report.modes):
        partly = any(row.verdict == "right" for row in report.modes)
        named = [PARTLY if partly else UNKNOWN if looked_at else UNSEEN]
    return faults + named, notes


def _costs(case: Case, first: Verdict, single: Case) -> list[str]:
    """What approximations cost here."""
    exact = case.leaves(first.estimate.grad)

    def away(estimate: Estimate) -> float:
        return distance({n: g.double() for n, g in case.leaves(estimate.grad).items()}, exact)

    notes: list[str] = []
    with suppress(RuntimeError, ValueError):  # for a layer without a second derivative, or without bfloat16
        if case.claim == "stochastic":
            row = measured(case, {"it": case.method.estimator}, NOISY).rows[1]
            notes.append(
                f"an estimate over a run has a spread of {percent(row.spread)} of the exact meta-gradient, and a bias of "
                f"{percent(row.bias)} ± {percent(row.error)}: metaoptim.compare_estimators(method, tasks) compares others."
            )
        if (gap := by_design(case, first)) and gap[0] > EXACT:
            why = UNFINISHED if case.claim == "implicit" and gap[0] > FAR else ", by design."
            notes.append(f"it is {percent(gap[0])} away from {gap[1]}{why}")
        full, half = (away(single.run(single.mode(first.how, precision=p))) for p in ("full", "bf16"))
        if full < SAME:
            notes.append(f'float32 is {percent(full)} away from float64, and precision="bf16" {percent(half)}.')
    return notes
