"""What a run's folder holds, as far as it can be read: a page is made of it, while the run trains too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metaoptim.design.contenders import judged_beside
from metaoptim.recipes import recipe as config
from metaoptim.recipes.recipe import Recipe
from metaoptim.recipes.schema import ConfigError
from metaoptim.runs import metrics
from metaoptim.runs.store import METRICS, RECIPE, SPOILT, WARNINGS, told_state

RESULT, DIAGNOSIS = "result.json", Path("diagnosis", "diagnosis.json")
OVER = ("finished", "failed", "interrupted")
HASHED = (RECIPE, "start.safetensors", "best.safetensors", "checkpoint.safetensors", METRICS, RESULT)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, read once. settings: options of its recipe that are replaced, as in `--set`."""

    path: Path
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @cached_property
    def recipe(self) -> Recipe | str:
        """The recipe; a sentence where it can't be built again, as that of a run from Python which names no code."""
        try:
            return config.load(self.path / RECIPE, self.settings)
        except ConfigError as error:
            return str(error)

    @cached_property
    def text(self) -> str:
        """The recipe's text."""
        return (self.path / RECIPE).read_text(encoding="utf-8", errors="replace")

    @cached_property
    def told(self) -> dict[str, Any]:
        """What state.json says."""
        return told_state(self.path)

    @property
    def status(self) -> str:
        """Running, interrupted, finished or failed; unknown where state.json can't be read."""
        return str(self.told.get("status", "unknown"))

    @property
    def over(self) -> bool:
        """Whether training has ended."""
        return self.status in OVER

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the run is, as its last checkpoint says."""
        return self._state("identity")

    @property
    def best(self) -> Mapping[str, Any]:
        """The best validation so far: metric, score, step; {}: none."""
        return self._state("best")

    def _state(self, part: str) -> Mapping[str, Any]:
        found = (self.told.get("state") or {}).get(part)
        return found if isinstance(found, dict) else {}

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What was logged."""
        return metrics.read(self.path)

    @property
    def spoilt(self) -> bool:
        """Whether lines of metrics.jsonl were lost."""
        return (self.path / SPOILT).exists()

    @property
    def warnings(self) -> list[str]:
        """What training has warned of."""
        with suppress(OSError, UnicodeDecodeError):
            return (self.path / WARNINGS).read_text(encoding="utf-8").splitlines()
        return []

    @property
    def judged(self) -> Path:
        """The file of the last evaluation: the run's own, else that of the comparison that has trained it."""
        path = self.path.resolve()
        return path / RESULT if (path / RESULT).exists() else judged_beside(path) / RESULT

    @property
    def compared(self) -> bool:
        """Whether the last evaluation is that of a comparison."""
        return self.result is not None and self.judged.parent != self.path.resolve()

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The last evaluation; none: there is none, or it can't be read."""
        found = self._json(self.judged)
        return found if found and {"metric", "mean", "interval", "rows"} <= found.keys() else None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What gives the numbers of the last evaluation their meaning; {}: there is none."""
        found = self.result or {}
        inside = found.get("facts")
        return inside if isinstance(inside, dict) else found

    @cached_property
    def diagnosis(self) -> dict[str, Any] | None:
        """The last diagnosis; none, as above."""
        return self._json(DIAGNOSIS)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and machine."""
        return self._json("environment.json") or {}

    def _json(self, name: str | Path) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
        return None

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of its files that counts."""
        found = {}
        for name in HASHED:
            with suppress(OSError):
                found[name] = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        return found
