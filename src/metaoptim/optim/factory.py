"""Where optimizers come from: rules of the library, files, and the hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.optimizer import ParamsT

from metaoptim.core.callers import warn
from metaoptim.core.types import Params, Rule
from metaoptim.evaluation.evaluate import phi_hash
from metaoptim.lopt import Optimizee
from metaoptim.lopt.checks import check_psi
from metaoptim.optim import files
from metaoptim.optim.optimizer import LearnedOptimizer
from metaoptim.optim.settings import separable
from metaoptim.runs import Run
from metaoptim.runs.store import RECIPE

SHIPPED = Path(__file__).parent / "shipped"
FILE = "rule.safetensors"
REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
SCORES = ("final", "final_ratio", "area", "area_ratio", "diverged")


@dataclass(frozen=True, eq=False)
class Factory:
    """A rule with its ψ, of which calls make optimizers.

    Args:
        rule: the rule.
        psi: its ψ; none: drawn for each optimizer, with seed 0.
        header: what its file says of it.
    """

    rule: Rule
    psi: Params | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files.check_given(self.rule, "from_rule")
        if self.psi is not None and separable(self.rule):  # ψ of others can have the names of weights in it
            check_psi(self.rule, self.psi, "psi")

    def __call__(
        self, params: ParamsT, *, lr: float | None = None, weight_decay: float | None = None, compile: bool = False
    ) -> LearnedOptimizer:
        """An optimizer of these parameters; see `LearnedOptimizer`."""
        return LearnedOptimizer(params, self.rule, self.psi, lr=lr, weight_decay=weight_decay, compile=compile)

    def __repr__(self) -> str:
        numbers = "ψ drawn at the start" if self.psi is None else f"ψ of {sum(x.numel() for x in self.psi.values()):,} numbers"
        return f"Factory({self.rule}, {numbers})"

    def save(self, path: str | Path) -> None:
        """Writes the rule into a file, which `load` reads."""
        own = {n: x for n, x in self.header.items() if n not in ("format", "inputs", "rule", "sha256", "version")}
        files.save(path, self.rule, self.psi, own)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the rule into a folder, from which `from_pretrained` has it."""
        if Path(folder).is_file():
            raise ValueError(f"{str(folder)!r} is a file, and save_pretrained takes a folder; save(path) writes one file.")
        self.save(Path(folder) / FILE)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Writes the rule into a repository of the hub, which is made if there is none; returns the address of the commit.

        options: of `huggingface_hub.HfApi`, such as `token` and `endpoint`.
        """
        api = _hub().HfApi(**options)
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{self!r}"))


def from_rule(rule: Rule, psi: Params | None = None) -> Factory:
    """Optimizers that move by any rule of the library, such as `mo.rules.Muon(0.02)`; ψ is drawn at the start if not given."""
    return Factory(rule, psi)


def from_run(run: Run, header: Mapping[str, Any] | None = None) -> Factory:
    """Optimizers that move by what a run of `mo.lopt.meta_train` has learnt.

    Their header says `steps` (outer steps trained) and, of a run with a folder, its `recipe` and the `scores` of its last
    evaluation, by family: final and mean loss, and their ratios to the best baseline's. Scores of another ψ than the run's are
    left out, with a warning.

    Args:
        run: the run.
        header: what else to say of it, in JSON types.

    Raises:
        ValueError: a run of anything but a learned optimizer, or a result.json that can't be read.
    """
    if not isinstance(run, Run) or not isinstance(run.method.learner, Optimizee):
        found = f"a run of {run.method.name}" if isinstance(run, Run) else type(run).__name__
        raise ValueError(f"from_run takes a run of a learned optimizer, as lopt.meta_train returns; found {found}.")
    told: dict[str, Any] = {"steps": run.step, "scores": _scores(run, run.path) if run.path else {}}
    if run.path:
        told["recipe"] = (run.path / RECIPE).read_text(encoding="utf-8")
    return Factory(run.method.learner.rule, run.phi.rule, told | dict(header or {}))


def _scores(run: Run, folder: Path) -> dict[str, Any]:
    """What the last evaluation in a run's folder says of its rule, by family; {} where there was none of this ψ alone."""
    file = folder / "result.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        judged = [one["phi_sha256"] for one in found["facts"].get("runs", ())]
        scores = {row["family"]: {m: row[m] for m in SCORES} for row in found["rows"] if row["name"] == found["name"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no result of a learned optimizer ({error!r}); evaluate the run again.") from error
    if judged == [phi_hash(run)]:
        return scores
    warn(f"{file} has no scores of the ψ of step {run.step} alone, so that none are kept with it: evaluate it for some.")
    return {}


def load(source: str | Path) -> Factory:
    """Optimizers that move by a rule from a file, or by one of those that `available()` names."""
    if source in available():
        return Factory(*files.read(SHIPPED / f"{source}.safetensors"))
    if Path(source).is_dir():
        raise ValueError(f"{str(source)!r} is a folder, and load takes a file; mo.optim.from_pretrained takes folders.")
    if not Path(source).is_file():
        shipped = f"; rules that come with metaoptim: {', '.join(available())}" if available() else ""
        raise ValueError(f"There is no file {str(source)!r}, nor does a rule of that name come with metaoptim{shipped}.")
    return Factory(*files.read(source))


def available() -> list[str]:
    """The names of the rules that come with metaoptim."""
    return sorted(file.stem for file in SHIPPED.glob("*.safetensors"))


def from_pretrained(source: str | Path, revision: str | None = None) -> Factory:
    """Optimizers that move by a rule from a folder that `save_pretrained` wrote, or from a repository of the hub."""
    if Path(source).is_dir():
        return load(Path(source) / FILE)
    if Path(source).is_file():
        raise ValueError(f"{str(source)!r} is a file, and from_pretrained takes a folder; mo.optim.load takes files.")
    if not REPOSITORY.fullmatch(str(source)):
        raise ValueError(f"There is no folder {str(source)!r}, nor can a repository of the hub be called so, as 'me/rule' can.")
    hub = _hub(f"{str(source)!r} is no folder, and the hub")
    try:
        path = hub.hf_hub_download(str(source), FILE, revision=revision)
    except (OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{str(source)!r} is no folder, and the hub has no {FILE} of it to give: {said}") from error
    return load(path)


def _hub(what: str = "The hub") -> Any:
    try:
        import huggingface_hub  # an extra, and slow to import
    except ImportError as error:
        raise ValueError(f"{what} needs huggingface_hub, which isn't installed: pip install 'metaoptim[hub]'.") from error
    return huggingface_hub
