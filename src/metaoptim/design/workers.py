"""Workers take one trial after the other from a study: in this process or in several, on one machine or several."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from metaoptim.core.callers import warn
from metaoptim.design import storage, trials
from metaoptim.design.cross_validation import CrossValidation, DivergedError, Setup, TimeUpError, summary
from metaoptim.design.space import TEST_STEPS
from metaoptim.design.study import State
from metaoptim.recipes.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as Drawn

POLL = 0.3  # seconds between looks at what other processes have done


class RefusedError(Exception):
    """A recipe can't be built or trained with what was drawn."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, beside the setup, which is in the study.

    Args:
        url, name: the database, and the study in it.
        folder: where trainings lie while they run, and trials.jsonl.
        trials: how many are tried altogether.
        shared: whether other machines may work on the study.
        deadline: when to stop, as `time.time` gives it (None: when all are tried).
        parent: the process without which this one is to stop; 0: none.
    """

    url: str
    name: str
    folder: str
    trials: int
    shared: bool = False
    deadline: float | None = None
    parent: int = 0


class Worker:
    """Tries what a study draws, until enough is tried or time is up."""

    def __init__(self, job: Job, setup: Setup) -> None:
        self.job, self.setup, self.folder = job, setup, Path(job.folder)
        self.judge = CrossValidation(setup)
        direction = "maximize" if setup.metric == "accuracy" else "minimize"
        self.study = storage.opened(job.url, job.name, direction, setup.seed, job.shared, setup.iterations // 2)
        self.claim = FileLock(self.folder / ".claim.lock")
        self.running: int | None = None

    def work(self, told: Callable[[], None] = lambda: None) -> None:
        """All that is left to try; `told` is called after each trial.

        KeyboardInterrupt where it is interrupted: the trial that was running is queued again, and goes on where it stands.
        """
        while self.once():
            told()

    def once(self) -> bool:
        """One trial; False where there is none left, or no time."""
        self.claim.acquire()  # until the trial that is drawn is known to be this worker's
        try:
            storage.requeue_killed(self.study, self.folder, alone=not self.job.shared)
            if self.over() or storage.begun(self.study) >= self.job.trials:
                return False
            self.study.optimize(self._objective, n_trials=1, catch=(RefusedError,))
        except TimeUpError:
            self._put_back()
            return False
        except KeyboardInterrupt:
            self._put_back()
            raise
        finally:
            self.claim.release(force=True)
        return True

    def over(self) -> bool:
        """Whether this worker has to stop."""
        late = self.job.deadline is not None and time.time() > self.job.deadline
        return late or (self.job.parent != 0 and os.getppid() != self.job.parent)

    def _put_back(self) -> None:
        if self.running is not None:
            storage.again(self.study, self._frozen())

    def _frozen(self) -> FrozenTrial:
        """The trial that runs, as the study knows it."""
        return self.study.get_trials(deepcopy=False)[self.running or 0]

    def _objective(self, drawn: Drawn) -> float:
        """What Optuna calls for a trial. All that came of it is kept in the study, as the attribute `result`."""
        self.running, began = drawn.number, time.time()
        drawn.set_user_attr("place", storage.place(self.folder))
        spent, number = (
            drawn.user_attrs.get("spent", 0.0),
            storage.ordinal(self.study, self._frozen()),
        )
        space = {key: dimension for key, dimension in self.setup.space.items() if key != TEST_STEPS}
        params = {key: dimension.value(dimension.suggested(drawn, key)) for key, dimension in space.items()}
        path = self.folder / "trials" / f"{number:04d}"
        if storage.begun(self.study, drawn.number) >= self.job.trials:  # another machine drew the last one at this moment
            raise TimeUpError
        with storage.lock_of(self.folder, number):
            self.claim.release(force=True)

            def came(state: State, **more: Any) -> None:
                seconds = spent + time.time() - began
                drawn.set_user_attr("result", {"state": state, "params": params, "seconds": seconds, **more})
                shutil.rmtree(path, ignore_errors=True)

            try:
                return self._tried(drawn, params, path, came)
            except (KeyboardInterrupt, TimeUpError):
                drawn.set_user_attr("spent", spent + time.time() - began)
                raise

    def _tried(self, drawn: Drawn, params: Mapping[str, Any], path: Path, came: Callable[..., None]) -> float:
        """The best mean score over the numbers of test steps that may be picked; the worst there is where it diverged."""
        from optuna import TrialPruned

        sign = 1 if self.setup.metric == "accuracy" else -1

        def report(step: int, score: float) -> None:
            drawn.report(score, step)
            if drawn.should_prune():
                raise TrialPruned
            if self.over():
                raise TimeUpError

        try:
            recipe = self.judge.recipe(params)
            steps = recipe.experiment().method.learner.steps
            found = summary(self.judge.scores(recipe, path, report, self.job.deadline))
        except TrialPruned:
            came("pruned", reason="others had done better at that step")
            raise
        except DivergedError as error:
            came("diverged", reason=str(error))
            return -sign * math.inf
        except ValueError as error:
            came("refused", reason=str(error))
            raise RefusedError from error
        came("complete", train_steps=steps, **found)
        place = max(
            (i for i, k in enumerate(found["steps"]) if k in self.setup.test_steps), key=lambda i: sign * found["mean"][i]
        )
        trials.append(self.folder, self._record(recipe, found, place, drawn.user_attrs["result"]["seconds"]))
        return float(found["mean"][place])

    def _record(self, recipe: Recipe, found: Mapping[str, Any], place: int, seconds: float) -> trials.Trial:
        """The line of trials.jsonl."""
        train, experiment = recipe.tables["train"], recipe.experiment()
        return trials.Trial(
            recipe.name, recipe.content, self.setup.metric, found["mean"][place], 1.96 * found["error"][place], train["seed"],
            "val", found["steps"][place], found["episodes"], train["iterations"], experiment.count, seconds, found["protocol"],
            "tune",
        )  # fmt: skip


def several(job: Job, count: int, told: Callable[[], None]) -> None:
    """Lets so many processes work, each with its share of torch's threads; `told` is called again and again meanwhile.

    A process that is killed loses its trial alone, which is tried again. KeyboardInterrupt is passed on to all of them.
    """
    threads = str(max(1, torch.get_num_threads() // count))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    text = json.dumps(asdict(replace(job, parent=os.getpid())))
    # Until all is imported, a signal ends the process at once: an exception in the middle of an import is told as a traceback.
    quietly = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    command = [sys.executable, "-c", f"{quietly}import sys; from metaoptim.design.workers import main; sys.exit(main())"]
    # In groups of their own, so that Ctrl-C reaches them once, through this process.
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        for _ in range(count)
    ]
    try:
        for one in started:
            if one.stdin is not None:
                one.stdin.write(text)  # and not as an argument, which others could read, for a URL may hold a password
                one.stdin.close()
        while any(one.poll() is None for one in started):
            told()
            time.sleep(POLL)
        told()
    except KeyboardInterrupt:
        for one in started:
            if one.poll() is None:
                one.send_signal(signal.SIGINT)
        for one in started:
            one.wait()
        raise
    finally:
        for one in started:
            if one.poll() is None:
                one.terminate()
    for number, one in enumerate(started, 1):
        if one.returncode:
            warn(f"worker {number} of {count} ended with exit code {one.returncode}; what it was trying is tried again.")


def main() -> int:
    """A process of `several`, which is told its job on stdin."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = Job(**json.load(sys.stdin))
    warnings.simplefilter("ignore")  # the first process has said the same
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        with storage.quiet():
            Worker(job, Setup.of(storage.setup_in(job.url, job.name))).work()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    return 0
