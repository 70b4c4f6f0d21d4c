"""Meta-training of an update rule on families of training problems.

    θ_{k+1} = θ_k + u,   (u, state) = rule(ψ, ∇ℓ(θ_k), state)          minimise over ψ the mean loss over a run

A task is a network with its start and its minibatches, and what adapts are its weights; what is learnt is ψ alone. Runs are
longer than what can be differentiated, so that an estimator takes them window by window: PES is unbiased, backpropagation
through a window is not. In the order of their size, rules that are made for it: `small_fc` (Metz et al. 2022,
https://arxiv.org/abs/2203.11860), `celo2` (Moudgil et al. 2026, https://arxiv.org/abs/2602.19142), `lstm` (Andrychowicz et al.
2016, https://arxiv.org/abs/1606.04474).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch

from metaoptim.core import trees
from metaoptim.core.brief import brief, meant
from metaoptim.core.checks import check_counts
from metaoptim.core.objectives import Objective, objective_called
from metaoptim.core.types import Estimator, MetaOptimizer, MetaParams, Outer, Params, Rule
from metaoptim.estimators import Guarded, Truncated, Unroll, judging, nres, pes, truncated_es, unguarded
from metaoptim.lopt.checks import check_psi, check_rule, started
from metaoptim.lopt.learner import Optimizee, called
from metaoptim.lopt.mixture import Family, mixture
from metaoptim.lopt.streams import Streams
from metaoptim.runs import Run
from metaoptim.training import train

ESTIMATORS = {"pes": pes, "nres": nres, "truncated_es": truncated_es}


def learned_optimizer(
    rule: Rule,
    problems: Family | Sequence[Family],
    estimator: str | Estimator = "pes",
    seed: int = 0,
    *,
    window: int | None = None,
    sigma: float = 0.01,
    pairs: int = 1,
    objective: Objective | str | None = None,
    psi: Params | None = None,
) -> MetaOptimizer:
    """A rule whose ψ is learnt by training problems with it: an optimizer that learns how to optimize.

    The arguments are those of `meta_train`. An estimator that isn't `Guarded` is guarded.
    """
    check_rule(rule, "learning an optimizer")
    family, chosen = joined(problems), named(estimator, window, sigma, pairs, objective)
    weights = trees.map_tensors(lambda x: x[0, 0], family.sample("train", seed=seed, start=0, count=1).support["start"])
    drawn = started(rule, weights, torch.Generator().manual_seed(seed))
    if not drawn:
        raise ValueError(
            f"{brief(rule)} has no ψ, so nothing of it can be learnt; give a rule that has, such as mo.lopt.Celo2()."
        )
    if psi is not None:
        check_psi(rule, psi, "psi", weights)
        drawn = {n: psi[n].detach().clone() for n in drawn}
    name, outer = called(rule), Outer("AdamW", 3e-4)
    guarded = chosen if isinstance(chosen, Guarded) else Guarded(chosen)
    return MetaOptimizer(Optimizee(family, rule), guarded, MetaParams({}, drawn), outer=outer, name=name)


def meta_train(
    rule: Rule,
    problems: Family | Sequence[Family],
    *,
    iterations: int,
    estimator: str | Estimator = "pes",
    window: int | None = None,
    sigma: float = 0.01,
    pairs: int = 1,
    objective: Objective | str | None = None,
    psi: Params | None = None,
    horizons: Sequence[int] | None = None,
    problems_per_step: int = 8,
    clip: float | None = 1.0,
    validate_every: int = 100,
    validate_episodes: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Run:
    """Learns ψ of a rule, so that what it trains has a low loss at every step of its run; returns the ψ that validates best.

    T slots train problems of split "train", W steps in each outer step, from which the estimator takes ∇ψ; a slot whose run is
    over begins the next problem. The meta-loss is the mean judged loss of a window, in units of knowing nothing. A problem
    whose gradient is not finite counts with a gradient of 0: progress and metrics tell the shares `diverged`, of runs that are
    not below the ceiling of the judged loss, and `discarded`, of gradients left out. Validation trains fresh problems of split
    "val" for as many steps as the family has.

    Args:
        rule: what is learnt, such as `Celo2()`.
        problems: a family, or several, of which a step trains T problems each (see `mixture`).
        iterations: outer steps, altogether.
        estimator: of ∇ψ: "pes", "nres", "truncated_es", "truncated" (backpropagation through a window), "unroll" (through a
            whole run: exact, and far less noisy where runs are short), or an estimator.
        window: W, the inner steps of an outer step, which must divide the family's steps; 10 where it is not given. An
            estimator that is given has its own, and one that has none goes through whole runs.
        sigma: σ of the evolution strategies named above.
        pairs: their antithetic pairs for each problem.
        objective: which states of a run "unroll" judges, from `mo.objectives` ("last" and "trajectory_mean" by name too): the
            last one if not given. The other estimators that have a name judge the mean of a window.
        psi: ψ at the start, such as that of an earlier run; drawn by the seed if not given.
        horizons: the shortest and the longest run, multiples of the window, log-uniform between; the family's steps if not
            given.
        problems_per_step: slots T.
        clip: largest norm of the meta-gradient; none: none is clipped.
        validate_every: outer steps between validations; 0: never.
        validate_episodes: problems of split "val" in each validation.
        seed: of ψ at the start, of the problems, and of all randomness in training.
        out: run directory; none: nothing is written.
        options: further arguments of `train`, such as resume, progress, lr, device, on_step. The outer optimizer is AdamW with
            a step size of 3e-4 where nothing else is said.

    Raises:
        ValueError: settings that can't be used; and what `train` raises.
    """
    if "tasks_per_step" in options:
        raise ValueError(
            f"tasks_per_step={options['tasks_per_step']!r}: a task is a training problem here; give problems_per_step."
        )
    taken = [*signature(meta_train).parameters, *signature(train).parameters]
    if odd := [name for name in options if name not in taken]:
        raise ValueError(
            f"meta_train has no argument `{odd[0]}`{meant(odd[0], taken) or ': see those of `mo.train`, which it takes too.'}"
        )
    check_counts(problems_per_step=problems_per_step)
    method = learned_optimizer(
        rule, problems, estimator, seed, window=window, sigma=sigma, pairs=pairs, objective=objective, psi=psi
    )
    source = streams(method, seed, problems_per_step, horizons)
    return train(
        method, source.problems, source=source, iterations=iterations, tasks_per_step=problems_per_step, clip=clip, seed=seed,
        out=out, validate_every=validate_every, validate_episodes=validate_episodes, **options,
    )  # fmt: skip


def streams(method: MetaOptimizer, seed: int, problems_per_step: int, horizons: Sequence[int] | None) -> Streams:
    """What `meta_train` trains such a method on."""
    inner, learner = unguarded(method.estimator), cast(Optimizee, method.learner)
    whole = (learner.steps, learner.steps)
    ends = whole if horizons is None else tuple(horizons) if isinstance(horizons, Iterable) else (horizons,)
    if not hasattr(inner, "window") and ends != whole:
        raise ValueError(
            f"horizons={ends}: {type(inner).__name__} goes through whole runs, of {learner.steps} steps; leave horizons "
            "out, or choose an estimator with a window."
        )
    return Streams(learner.problems, seed, problems_per_step, getattr(inner, "window", learner.steps), ends)


def joined(problems: Family | Sequence[Family]) -> Family:
    """One family, or a mixture of several."""
    if isinstance(problems, Family):
        return problems
    return mixture(*(problems if isinstance(problems, list | tuple) else [problems]))


def named(
    estimator: str | Estimator, window: int | None, sigma: float, pairs: int, objective: Objective | str | None = None
) -> Estimator:
    """The estimator of a name; one that is given stays as it is, but for its objective where one is given."""
    judged = objective_called(objective) if isinstance(objective, str) else objective
    width = 10 if window is None else window
    if not isinstance(estimator, str):
        chosen = estimator
    elif estimator == "unroll":
        chosen = Unroll()
    elif estimator == "truncated":
        chosen = Truncated(width)
    else:
        chosen = ESTIMATORS[estimator](width, sigma, pairs) if estimator in ESTIMATORS else cast(Any, None)
    if isinstance(chosen, type) or not hasattr(chosen, "claim"):
        raise ValueError(
            f"estimator={brief(estimator)}: it must be one of {', '.join(ESTIMATORS)}, truncated, unroll, or an estimator, "
            "such as mo.estimators.pes(window=10, sigma=0.01)."
        )
    own = getattr(unguarded(chosen), "window", None)
    if window not in (None, own):
        has = "goes through whole runs" if own is None else "has its own; set it there"
        raise ValueError(f"window={window} was given beside {estimator!r}, which {has}: leave it out here.")
    return judging(chosen, judged)
