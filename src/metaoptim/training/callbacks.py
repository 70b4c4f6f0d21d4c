"""How often training looks up from its steps, who is told of them, and who may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from metaoptim.core.checks import check_counts, check_time
from metaoptim.tasks import TaskFamily

AT_ONCE = 50  # validation episodes sampled and adapted at a time

OnStep = Callable[[dict[str, Any]], object]
"""on_step(record): told of every outer step. What returns True ends the training; what raises does too."""

OnValidation = Callable[[int, dict[str, float]], object]
"""on_validation(step, scores): told of every validation, as `OnStep`."""


class Rhythm(NamedTuple):
    """When training validates, saves and logs, in outer steps, and after how many vain validations it ends."""

    validate_every: int
    validate_episodes: int
    validate_steps: int | None
    checkpoint_every: int
    log_every: int
    early_stopping: int | None

    def check(self, steps: int) -> None:
        """Raises a ValueError for what can't be; steps: the inner steps of training."""
        check_counts(checkpoint_every=self.checkpoint_every, log_every=self.log_every,
                     validate_episodes=self.validate_episodes, early_stopping=self.early_stopping)  # fmt: skip
        check_counts(0, validate_every=self.validate_every, validate_steps=self.validate_steps)
        steps = steps if self.validate_steps is None else self.validate_steps
        batches = -(-self.validate_episodes // AT_ONCE)
        check_time(batches * (steps + 1), f"validate_episodes={self.validate_episodes}: a validation")

    def judged(self, tasks: TaskFamily | None) -> TaskFamily | None:
        """The tasks, if there are validations on them; a ValueError where stopping early needs some."""
        if tasks is not None and self.validate_every > 0 and "val" in tasks.splits:
            return tasks
        if self.early_stopping is not None:
            raise ValueError(
                f"early_stopping={self.early_stopping} needs validations: give tasks with a split val, and validate_every >= 1."
            )
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which φ is the best one, and where training ends."""
        names = ("validate_every", "validate_episodes", "validate_steps", "early_stopping")
        return {name: getattr(self, name) for name in names}


@dataclass
class Listeners:
    """The user's own functions; whether one of them wants training to end, and what one of them has raised."""

    on_step: OnStep | None = None
    on_validation: OnValidation | None = None
    ended: bool = False
    raised: BaseException | None = None

    def tell(self, record: Mapping[str, Any], scores: Mapping[str, float] | None) -> None:
        """Tells them of a step, and of a validation where there was one."""
        try:
            answers = [self.on_step(dict(record))] if self.on_step else []
            if self.on_validation and scores is not None:
                answers.append(self.on_validation(record["step"], dict(scores)))
        except BaseException as reason:
            self.raised = reason
            raise
        self.ended = any(answer is True for answer in answers)
