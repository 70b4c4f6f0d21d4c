"""The outer loop: sample tasks, take the meta-gradient, step, validate, save."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

from metaoptim.core.checks import check_counts, check_flags, check_positive, check_time
from metaoptim.core.types import MetaOptimizer, Outer
from metaoptim.engine import SETTINGS
from metaoptim.engine.autotune.cache import description
from metaoptim.runs.environment import environment
from metaoptim.runs.progress import Reporter
from metaoptim.runs.run import Run, load
from metaoptim.runs.store import RunDirectory
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.base import check_seed
from metaoptim.training.module import MetaModule
from metaoptim.training.outer_step import OptimizerStep, OuterStep
from metaoptim.training.size import check_batch, check_inner_run
from metaoptim.training.source import Episodes, Source
from metaoptim.training.state import AT_ONCE, Training

CHOOSING = "choosing the fastest way to compute the meta-gradient (once for each work)"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after its state was saved; the message says how to resume."""


def train(
    method: MetaOptimizer,
    tasks: TaskFamily | None,
    *,
    iterations: int,
    tasks_per_step: int = 16,
    out: str | Path | None = None,
    seed: int = 0,
    optimizer: str | None = None,
    lr: float | None = None,
    schedule: Literal["constant", "linear", "cosine"] | None = None,
    clip: float | None = None,
    validate_every: int = 500,
    validate_episodes: int = 200,
    validate_steps: int | None = None,
    checkpoint_every: int = 500,
    log_every: int = 10,
    resume: bool = False,
    engine: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    progress: bool = True,
    check: bool = True,
    source: Source | None = None,
    outer_step: OuterStep | None = None,
) -> Run:
    """Meta-trains; returns the φ with the best validation score (the last one where nothing was validated).

    Every outer step's tasks and randomness are functions of (seed, step) alone, so a resumed run repeats, to the bit,
    what an uninterrupted one does.

    Args:
        method: the meta-optimizer, with φ at the start.
        tasks: where tasks come from; splits "train" and "val" are used. None with a source of your own, without validation.
        iterations: outer steps, altogether.
        tasks_per_step: tasks T in each outer step.
        out: run directory; none: nothing is written.
        seed: of the tasks and of all randomness in training.
        optimizer: outer optimizer, a class of torch.optim; the algorithm's own choice where not given.
        lr: outer step size; the algorithm's own choice where not given.
        schedule: of the outer step size over `iterations`: "constant", "linear" (to 0) or "cosine" (to 0).
        clip: largest norm of the meta-gradient; longer ones are scaled down.
        validate_every: outer steps between validations; 0: never.
        validate_episodes: episodes of split "val" in each validation.
        validate_steps: inner steps in validation; as in training where not given.
        checkpoint_every: outer steps between checkpoints.
        log_every: outer steps between lines of metrics.jsonl.
        resume: go on from the last checkpoint in `out`.
        engine: settings of the engine: batching, memory, runtime, precision, budget.
        recipe: TOML text to keep in the run directory.
        progress: whether to show a progress bar.
        check: whether the meta-gradient of the first batch is held to central differences, along one direction and in
            float64; a warning says so where it is off.
        source: the tasks of each outer step, from (outer steps done, φ), in place of episodes of `tasks`.
        outer_step: what is done with the meta-gradient, in place of an optimizer with `lr`, `schedule` and `clip`.

    Raises:
        ValueError: settings that can't be used. TrainingError: a loss or meta-gradient that is not finite, after the
        state before that step was saved. Interrupted: stopped by Ctrl-C, after the state was saved.
    """
    check_counts(iterations=iterations, tasks_per_step=tasks_per_step, checkpoint_every=checkpoint_every,
                 log_every=log_every, validate_episodes=validate_episodes)  # fmt: skip
    check_counts(0, validate_every=validate_every, validate_steps=validate_steps)
    check_positive(clip=clip)
    check_flags(resume=resume, progress=progress, check=check)
    check_seed(seed)
    if resume and out is None:
        raise ValueError("resume needs the run directory: give out=, the folder of the run to go on with.")
    if not isinstance(method, MetaOptimizer) or not (tasks is None or hasattr(tasks, "sample")):
        raise ValueError(
            "train takes a meta-optimizer, such as mo.maml(net, loss), and a task family, such as mo.tasks.sinusoid() or "
            f"mo.tasks.from_function(sample); found {type(method).__name__} and {type(tasks).__name__}."
        )
    if tasks is None and source is None:
        raise ValueError("train needs tasks, or a source of them.")
    check_inner_run(method)
    judged = method.learner.steps if validate_steps is None else validate_steps
    check_time(-(-validate_episodes // AT_ONCE) * (judged + 1), f"validate_episodes={validate_episodes}: a validation")
    wanted = method.outer
    outer = Outer(optimizer or wanted.optimizer, wanted.lr if lr is None else lr, schedule or wanted.schedule)
    if unknown := set(engine or {}) - set(SETTINGS):
        raise ValueError(f"engine has no setting {min(unknown)!r}; choose among {', '.join(SETTINGS)}.")
    # Here the loop is ours, and nothing in it changes the network; so what is fastest is measured.
    module = MetaModule(method, **{"memory": "auto", "runtime": "auto", **(engine or {})}, horizon=iterations)
    if source is None and tasks is not None:
        check_batch(tasks, seed, tasks_per_step)
        source = Episodes(tasks, seed, tasks_per_step, method.estimator.lasts(method.learner))
    training = Training(
        method,
        cast(Source, source),
        tasks,
        module,
        outer_step or OptimizerStep(module, outer, iterations, clip),
        iterations,
        seed,
        {"tasks_per_step": tasks_per_step, "method": hashlib.sha256(description(method).encode()).hexdigest()[:16]},
        check,
    )
    validates = tasks is not None and validate_every > 0 and "val" in tasks.splits
    directory = _open(out, resume, recipe)
    try:
        if directory is not None and resume:
            training.restore(directory)
        with Reporter(iterations, training.step, progress) as report, _interruptible() as stopped:
            if resume:
                report.say(f"going on after step {training.step}")
            if module.engine.choice is None and training.step < iterations:
                report.say(CHOOSING)
                module.engine.say = report.busy
            while training.step < iterations:
                record = training.advance(directory)
                done, improved = training.step == iterations, False
                if tasks is not None and validates and (done or training.step % validate_every == 0):
                    module.engine.release()  # idle threads of "workers" would slow validation down
                    scores = training.validate(tasks, validate_episodes, validate_steps)
                    improved = training.improved(scores)
                    record |= {f"val_{name}": value for name, value in scores.items()}
                    report.validated(training.step, scores, improved)
                halt = bool(stopped)  # asked once, for what comes in between would not have been saved
                if directory is not None:
                    if done or "val_loss" in record or training.step == 1 or training.step % log_every == 0:
                        directory.log(record)
                    if done or improved or halt or training.step % checkpoint_every == 0:
                        directory.save(training.checkpoint(), best=improved)
                report.advanced(record)
                if halt and not done:
                    raise Interrupted(_resume_hint(training.step, directory))
        if directory is not None:
            directory.mark("finished")
    except BaseException as reason:
        if directory is not None:
            with suppress(OSError):  # such as a full disk, which is what then is to be told
                directory.mark("interrupted" if isinstance(reason, KeyboardInterrupt) else "failed")
        raise
    finally:
        if directory is not None:
            directory.close()
    return training.run() if directory is None else load(directory.path, method, "best")


def _open(out: str | Path | None, resume: bool, recipe: str | None) -> RunDirectory | None:
    if out is None:
        return None
    if resume:
        return RunDirectory.reopen(out)
    return RunDirectory.create(out, recipe=recipe or "# started from Python, without a recipe\n", environment=environment())


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C or SIGTERM came: the running step is finished first. A second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resume_hint(step: int, directory: RunDirectory | None) -> str:
    if directory is None:
        return f"stopped after step {step}; nothing was saved, because the run has no directory (out=)."
    return (
        f"stopped after step {step}, saved in {directory.path}; go on with resume=True (on the command line: the same "
        "command and --resume)."
    )
