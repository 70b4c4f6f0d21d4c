"""How often training looks up from its steps, who is told of them, and who may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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

    def check(self, validates: bool) -> None:
        """Raises a ValueError for what can't be."""
        check_counts(checkpoint_every=self.checkpoint_every, log_every=self.log_every, validate_episodes=self.validate_episodes)
        if self.validate_steps is not None and self.validate_steps < 0:
            raise ValueError(f"validate_steps={self.validate_steps}: it must not be negative.")
        if self.early_stopping is not None:
            check_counts(early_stopping=self.early_stopping)
            if not validates:
                raise ValueError(
                    f"early_stopping={self.early_stopping} needs validations: give tasks with a split val, and "
                    "validate_every >= 1."
                )

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


def check_counts(**counts: int) -> None:
    """Raises a ValueError for the first count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1.")
