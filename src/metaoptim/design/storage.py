"""Optuna's study, in a database: opened, sampled and pruned so that what was interrupted goes on as if it had not been."""

from __future__ import annotations

import math
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from metaoptim.design.study import Row

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

HEARTBEAT, GRACE = 30, 120  # seconds, by which workers on other machines are known to be alive
AT_RANDOM = 6  # trials that are drawn before TPE has seen enough, and completed ones before any is pruned
PAUSES = (0.5, 2.0)  # seconds before a database is tried again
DATABASE = "study.db"
EXAMPLE = "postgresql+psycopg2://user@host/database (pip install psycopg2-binary)"


def opened(url: str, name: str, direction: str, seed: int, shared: bool, warmup: int) -> Study:
    """The study of that name, which is made where there is none. ValueError where the database can't be had.

    shared: whether other machines may work on it too, so that trials of theirs have to show that they are alive.
    warmup: the outer steps before which no trial is pruned.
    """
    optuna = imported()
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    told = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    alive: dict[str, Any] = {
        "heartbeat_interval": HEARTBEAT, "grace_period": GRACE,
        "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(),
    }  # fmt: skip

    def made() -> Study:
        storage = RDBStorage(url, engine_kwargs=told, **(alive if shared else {}))
        study: Study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=True, sampler=_sampler(seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=AT_RANDOM, n_warmup_steps=warmup),
        )  # fmt: skip
        return study

    with readable(url):
        for pause in PAUSES:
            with suppress(IntegrityError, ProgrammingError):  # another process makes the same tables at this moment
                return made()
            time.sleep(pause)
        return made()


@contextmanager
def readable(url: str) -> Iterator[None]:
    """Inside, a database that can't be had is a ValueError, in a sentence."""
    optuna = imported()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise ValueError(f"the storage {hidden(url)} can't be opened: {reason}; expected a URL such as {EXAMPLE}.") from error


def names(url: str) -> list[str]:
    """The studies in a database. ValueError where it can't be had."""
    with readable(url):
        return list(imported().get_all_study_names(url))


def hidden(url: str) -> str:
    """A URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def imported() -> Any:
    """Optuna; a ValueError says how to install it."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("tune needs Optuna, which isn't installed: pip install 'metaoptim[design]'.") from error
    return optuna


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna logs nothing and doesn't say that what is used here is experimental."""
    optuna = imported()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


def _sampler(seed: int) -> BaseSampler:
    """TPE, whose random numbers are a function of the seed and of how many trials there are: a study that goes on after an
    interruption draws what it would have drawn."""
    from optuna.samplers import BaseSampler, TPESampler

    class ByTrial(BaseSampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
            return self._of(study, trial, 0).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
            return self._of(study, trial, 0).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
            own = self._of(study, trial, 1 + len(trial.params))
            return own.sample_independent(study, trial, param_name, param_distribution)

        def _of(self, study: Study, trial: FrozenTrial, draw: int) -> TPESampler:
            words = np.random.SeedSequence((seed, ordinal(study, trial), draw)).generate_state(1)
            return TPESampler(seed=int(words[0]), n_startup_trials=AT_RANDOM)

    return ByTrial()


def ordinal(study: Study, trial: FrozenTrial) -> int:
    """A trial's place among all that were drawn. One that is tried again, after an interruption, keeps the one it had."""
    history: Sequence[int] = trial.system_attrs.get("retry_history") or [trial.number]
    known = study.get_trials(deepcopy=False)
    return sum(t.number < history[0] and not t.system_attrs.get("retry_history") for t in known)


def begun(study: Study, before: float = math.inf) -> int:
    """How many trials have come to an end, or are running, of those drawn before one of that number."""
    from optuna.trial import TrialState

    known = [t for t in study.get_trials(deepcopy=False) if t.number < before]
    return sum("result" in t.user_attrs or t.state == TrialState.RUNNING for t in known)


def rows(study: Study) -> list[Row]:
    """The trials that have come to an end, in the order in which they were drawn."""
    names = {f.name for f in fields(Row)}
    ended = [t for t in study.get_trials(deepcopy=False) if "result" in t.user_attrs]
    found = [Row(ordinal(study, t), **{n: _tuples(x) for n, x in t.user_attrs["result"].items() if n in names}) for t in ended]
    return sorted(found, key=lambda row: row.number)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def setup_in(url: str, name: str) -> dict[str, Any]:
    """What a study was set up with, {} where there is none of that name."""
    optuna = imported()
    with suppress(KeyError):
        found: dict[str, Any] = optuna.load_study(storage=url, study_name=name).user_attrs.get("setup", {})
        return found
    return {}


def again(study: Study, trial: FrozenTrial) -> None:
    """Puts a trial that was abandoned back into the queue, with the values that were drawn for it."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    RetryHeartbeatStaleTrialCallback()(study, trial)


def requeue_killed(study: Study, folder: Path, alone: bool) -> None:
    """Puts those trials back whose worker is gone, whatever ended it: on this machine it holds their locks no more, and on
    another one it hasn't shown for a while that it is alive.

    alone: whether all workers are on this machine, so that a trial which names none has none.
    """
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    fail_stale_trials(study)

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("place", place(folder) if alone else "") == place(folder):
            lock = lock_of(folder, ordinal(study, trial))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            lock.release()
            study.tell(trial.number, state=TrialState.FAIL)
            if "result" not in trial.user_attrs:
                again(study, study.get_trials(deepcopy=False)[trial.number])


def lock_of(folder: Path, number: int) -> FileLock:
    """What a worker holds while it tries the trial of that number, and the system takes back when it ends."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "trials" / f".{number:04d}.lock")


def place(folder: Path) -> str:
    """Which machine and which folder a worker works in."""
    return f"{socket.gethostname()}:{folder.resolve()}"


def enqueue(study: Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Queues points to be tried first; what they leave out is drawn."""
    for point in points:
        study.enqueue_trial(dict(point), skip_if_exists=True)


def importances(study: Study, least: int) -> dict[str, float]:
    """The share of each key in what makes a trial one of the best quarter, by PED-ANOVA (Watanabe et al. 2023,
    https://arxiv.org/abs/2304.10255); {} where fewer than `least` trials were completed or one key alone was searched."""
    from optuna.trial import TrialState

    done = [
        t
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if t.user_attrs["result"]["state"] == "complete"
    ]
    if len(done) < least or len(done[0].params) < 2:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # here, because it is slow to load

    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25)))
