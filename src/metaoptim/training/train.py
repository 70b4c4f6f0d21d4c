"""The outer loop: sample tasks, take the meta-gradient, step, validate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from metaoptim.core.checks import check_counts, check_flags, check_positive
from metaoptim.core.types import MetaOptimizer, Outer
from metaoptim.learners import placed
from metaoptim.runs import metrics
from metaoptim.runs.checkpoint import Checkpoint
from metaoptim.runs.environment import environment, folder
from metaoptim.runs.progress import Reporter
from metaoptim.runs.run import Run, loaded, pack
from metaoptim.runs.store import RunDirectory, load_checkpoint
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.base import check_seed
from metaoptim.training.callbacks import Listeners, OnStep, OnValidation, Rhythm
from metaoptim.training.module import MetaModule, check_engine
from metaoptim.training.outer_step import Make, OptimizerStep, OuterStep, Scheduler
from metaoptim.training.recorded import keep_choice, kept_choice, recorded
from metaoptim.training.size import check_batch, check_inner_run
from metaoptim.training.source import Source, source_of
from metaoptim.training.state import Training

WAIT = 10  # outer steps that are taken at once, by rule, before the fastest way is looked for


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after its state was saved: `where` it stood, and in the message how to resume."""

    def __init__(self, where: str, advice: str = "") -> None:
        KeyboardInterrupt.__init__(self, f"{where}{advice}")
        self.where = where


def train(
    method: MetaOptimizer,
    tasks: TaskFamily | None,
    *,
    iterations: int,
    tasks_per_step: int = 16,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    optimizer: Make | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    lr: float | None = None,
    rule_lr: float | None = None,
    schedule: Literal["constant", "linear", "cosine"] | None = None,
    scheduler: Scheduler | None = None,
    clip: float | None = None,
    validate_every: int = 500,
    validate_episodes: int = 200,
    validate_steps: int | None = None,
    early_stopping: int | None = None,
    checkpoint_every: int = 500,
    log_every: int = 10,
    resume: bool = False,
    engine: Mapping[str, Any] | None = None,
    recipe: str | Mapping[str, Any] | None = None,
    progress: bool = True,
    check: bool = True,
    source: Source | None = None,
    outer_step: OuterStep | None = None,
    on_step: OnStep | None = None,
    on_validation: OnValidation | None = None,
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
        device: where it is computed, such as "cuda"; where φ is if not given. The network itself stays where it is.
        optimizer: outer optimizer: the name of a class of torch.optim, any class, or a function of the parameters that makes
            one, such as lambda params: torch.optim.AdamW(params, lr=1e-3); the algorithm's own choice where not given.
        optimizer_options: further arguments of the optimizer's class, such as {"weight_decay": 0.1}; ψ never decays.
        lr: outer step size; the algorithm's own choice where not given.
        rule_lr: outer step size for ψ (learnt step sizes, for one), where it is to be another one.
        schedule: of the outer step sizes over `iterations`: "constant", "linear" (to 0) or "cosine" (to 0).
        scheduler: in place of a schedule, a function from the optimizer to a scheduler of torch's, stepped once in each
            outer step.
        clip: largest norm of the meta-gradient; longer ones are scaled down.
        validate_every: outer steps between validations; 0: never.
        validate_episodes: episodes of split "val" in each validation.
        validate_steps: inner steps in validation; as in training where not given.
        early_stopping: validations in a row without a better score after which training ends; none: it goes through.
        checkpoint_every: outer steps between checkpoints.
        log_every: outer steps between lines of metrics.jsonl.
        resume: go on from the last checkpoint in `out`; a run that is finished stays as it is.
        engine: settings of the engine: batching, memory, runtime, precision, budget, choice. What is left out is "auto": the
            first steps go by rule, then what is fastest is measured, written into the run's recipe as `choice`, and used.
        recipe: TOML text to keep in the run directory; or tables for the one that is written, with the names of code that
            can't be seen from objects, such as {"model": {"name": "my.py:Net"}, "tasks": {"name": "my.py:family"}}.
        progress: whether to show a progress bar.
        check: whether the meta-gradient of the first batch is held to central differences, along one direction and in
            float64; a warning says so where it is off.
        source: the tasks of each outer step, from (outer steps done, φ), in place of episodes of `tasks` (or, for a method that
            learns a classifier of all training classes, of images of these). A run goes on with the same `facts` alone, if it
            has any.
        outer_step: what is done with the meta-gradient, in place of an optimizer with `lr`, `schedule` and `clip`.
        on_step: called with the record of each outer step (step, loss, …). Returning True ends the training. An exception
            ends it too, and reaches the caller once the state is saved.
        on_validation: called with (step, scores) of each validation, in the same way.

    Raises:
        ValueError: settings that can't be used. TrainingError: a loss or meta-gradient that is not finite, after the
        state before that step was saved. Interrupted: stopped by Ctrl-C, after the state was saved.
    """
    check_counts(iterations=iterations, tasks_per_step=tasks_per_step)
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
    rhythm = Rhythm(validate_every, validate_episodes, validate_steps, checkpoint_every, log_every, early_stopping)
    rhythm.check(method.learner.steps)
    judged = rhythm.judged(tasks)
    asked = {"optimizer": optimizer, "optimizer_options": optimizer_options, "lr": lr, "rule_lr": rule_lr, "schedule": schedule,
             "scheduler": scheduler, "clip": clip}  # fmt: skip
    if outer_step is not None and (vain := [name for name, value in asked.items() if value is not None]):
        raise ValueError(f"{vain[0]} was given beside an outer_step, which takes the optimizer's place; leave one of them out.")
    check_engine(engine)
    method = placed(method, device)
    # Here the loop is ours, so what is fastest is measured, once a few steps were taken.
    module = MetaModule(method, **{"runtime": "auto", **(engine or {})}, horizon=iterations, wait=WAIT)
    if source is None and tasks is not None:
        check_batch(tasks, seed, tasks_per_step)
        source = source_of(method, tasks, seed, tasks_per_step)
    if outer_step is None:
        outer = _outer(method.outer, optimizer, lr, schedule, scheduler)
        outer_step = OptimizerStep(
            module,
            outer,
            iterations,
            clip,
            None if isinstance(optimizer, str) else optimizer,
            optimizer_options,
            rule_lr,
            scheduler,
        )
    training = Training(
        method, cast(Source, source), tasks, module, outer_step, iterations, seed,
        {"tasks_per_step": tasks_per_step, **rhythm.facts, **getattr(source, "facts", {})}, check,
    )  # fmt: skip
    listeners = Listeners(on_step, on_validation)
    if out is None:
        _loop(training, judged, rhythm, listeners, None, progress, resume)
        return training.run()
    named = optimizer.__name__ if isinstance(optimizer, type) else optimizer
    settings = {
        "iterations": iterations, "tasks_per_step": tasks_per_step, "seed": seed, "optimizer": named, "lr": lr, "clip": clip,
        "optimizer_options": optimizer_options, "rule_lr": rule_lr, "schedule": schedule, "check": check, **rhythm._asdict(),
    }  # fmt: skip
    with _opened(out, resume, method, lambda: recorded(training.identity, method, settings, engine, recipe)) as directory:
        if not (resume and training.done(directory.path)):
            with _marked(training, directory, listeners):
                if resume:
                    module.engine.preset = module.engine.preset or kept_choice(directory)
                    training.restore(directory)
                _loop(training, judged, rhythm, listeners, directory, progress, resume)
    return loaded(out, method, load_checkpoint(out, "best"), "best")


def _outer(wanted: Outer, optimizer: Any, lr: float | None, schedule: Any, scheduler: Any) -> Outer:
    """What the user asks of the outer optimizer, and where nothing was asked, what the algorithm does."""
    if scheduler is not None and schedule is not None:
        raise ValueError(f"schedule={schedule!r} and a scheduler were given; give one of them.")
    named = optimizer if isinstance(optimizer, str) else wanted.optimizer
    free = scheduler is not None  # the algorithm's schedule gives way too
    by_function = optimizer is not None and not isinstance(optimizer, str | type)
    if by_function and lr is not None:
        raise ValueError(
            f"lr={lr} was given beside a function that makes the optimizer; set the step size in one place, there."
        )
    return Outer(named, wanted.lr if lr is None else lr, schedule or ("constant" if free or by_function else wanted.schedule))


def _loop(
    training: Training, tasks: TaskFamily | None, rhythm: Rhythm, listeners: Listeners, directory: RunDirectory | None,
    progress: bool, resume: bool,
) -> None:  # fmt: skip
    """Outer steps until the last one; validations where there are tasks for them."""
    engine, total = training.module.engine, training.iterations
    began = time.perf_counter() - (metrics.elapsed(directory.path) if directory is not None else 0.0)
    every, share = (
        rhythm.validate_every if tasks is not None else 0,
        rhythm.validate_episodes / training.identity["train"]["tasks_per_step"],
    )
    with Reporter(total, training.step, progress, every, share) as report, _interruptible(report.say) as stopped:
        if resume:
            report.say(f"going on after step {training.step}")
        if engine.runtime == "compile":
            report.say("compiling, which takes a minute or more where nothing is found in Inductor's cache")
        engine.say = report.busy
        if directory is not None:
            engine.decided = partial(keep_choice, directory)
        while training.step < total and not training.stale(rhythm.early_stopping) and not listeners.ended:
            record = training.advance(directory)
            done, improved, scores = training.step == total, False, None
            if tasks is not None and (done or training.step % rhythm.validate_every == 0):
                engine.release()  # idle threads of "workers" would slow validation down
                with report.validating(rhythm.validate_episodes):
                    scores = training.validate(tasks, rhythm.validate_episodes, rhythm.validate_steps)
                improved = training.improved(scores)
                record |= {f"val_{name}": value for name, value in scores.items()}
                report.validated(training.step, scores, improved)
                done = done or training.stale(rhythm.early_stopping)
            halt = bool(stopped)  # asked once, for what comes in between would not have been saved
            record["elapsed"] = time.perf_counter() - began
            if directory is not None:
                if done or scores is not None or training.step == 1 or training.step % rhythm.log_every == 0:
                    directory.log(record)
                if done or improved or halt or training.step % rhythm.checkpoint_every == 0:
                    directory.save(training.checkpoint(), best=improved)
            report.advanced(record)
            if halt and not done:
                raise _interrupted(training.step, directory)
            listeners.tell(record, scores)


@contextmanager
def _opened(out: str | Path, resume: bool, method: MetaOptimizer, recipe: Callable[[], str]) -> Iterator[RunDirectory]:
    if resume:
        directory = RunDirectory.reopen(out)
    else:
        found, start = environment() | {"folder": folder()}, Checkpoint(0, pack(method.phi, {}), {})
        directory = RunDirectory.create(out, recipe=recipe(), environment=found, start=start)
    try:
        yield directory
    finally:
        directory.close()


@contextmanager
def _marked(training: Training, directory: RunDirectory, listeners: Listeners) -> Iterator[None]:
    """Writes how it ended; where a listener ended it, the state of that moment too."""
    try:
        yield
        if listeners.ended:
            directory.save(training.checkpoint())
        directory.mark("finished")
    except BaseException as reason:
        told = reason is listeners.raised
        with suppress(OSError):  # such as a full disk, which is what then is to be told
            if told:
                directory.save(training.checkpoint())
            directory.mark("interrupted" if told or isinstance(reason, KeyboardInterrupt) else "failed")
        raise


@contextmanager
def _interruptible(say: Callable[[str], None]) -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C or SIGTERM came: the running step is finished first. A second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("stopping when this step is done; once more stops at once")

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


def _interrupted(step: int, directory: RunDirectory | None) -> Interrupted:
    if directory is None:
        return Interrupted(f"stopped after step {step}; nothing was saved, because the run has no directory (out=).")
    return Interrupted(f"stopped after step {step}, saved in {directory.path}", "; go on with resume=True.")
