"""What `metaoptim diagnose` has found, as a section of a page, from diagnosis.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metaoptim.diagnosis.features import REUSED
from metaoptim.report.html.document import GREY, Axis, Chart, Guide, HeatMap, Note, Number, Part, Section, Series
from metaoptim.report.html.few_shot import scaled
from metaoptim.report.html.training import spans

Numbers = Mapping[str, Any]
QUESTIONS = {
    "steps": "How does the score go on after each step?",
    "gain": "Does it adapt, or does it know its tasks by heart?",
    "permutations": "Does it matter which class is given to which output?",
    "features": "Are features reused, or learnt anew?",
    "step_sizes": "Which step sizes has it learnt?",
    "alignment": "Do tasks pull in the same direction?",
    "curvature": "Are steps too long for the curvature?",
}


def section(found: Mapping[str, Any]) -> Section:
    """A figure for every reading, with its sentence; what was left out, with the reason."""
    parts: list[Part] = []
    for name, reading in found["readings"].items():
        draw = DRAWN.get(name)
        title = QUESTIONS.get(name, name)
        parts.append(draw(title, reading["sentence"], reading["numbers"]) if draw else Note(f"{title} {reading['sentence']}"))
    out = "; ".join(f"{name.replace('_', ' ')}: {why.rstrip('.')}" for name, why in found["left_out"].items())
    facts = found["facts"]
    about = (
        f"On {facts['episodes']} episodes of split {facts['split']}; states, gradients and features are those of the first "
        f"{facts['closely']}."
    )
    return Section("Diagnosis", (*parts, *([Note(f"Left out: {out}.")] if out else [])), about)


def _ends(mean: Sequence[Number], half: Sequence[Number]) -> tuple[list[Number], list[Number]]:
    pairs = [(None, None) if m is None or h is None else (m - h, m + h) for m, h in zip(mean, half, strict=True)]
    return [low for low, _ in pairs], [high for _, high in pairs]


def _steps(title: str, sentence: str, numbers: Numbers) -> Chart:
    metric = "accuracy" if "accuracy" in numbers["mean"] else "loss"
    scale = 100 if metric == "accuracy" else 1
    mean, half = ([scaled(x, scale) for x in numbers[part][metric]] for part in ("mean", "interval"))
    series = Series("", list(range(len(mean))), mean, *_ends(mean, half), marked=True)
    guide = Guide(numbers["training_steps"], "steps in training")
    label = "query accuracy, %" if metric == "accuracy" else "query loss"
    return Chart(title, Axis("inner steps", whole=True), Axis(label, log=spans([series])), (series,), (guide,), sentence)


def _gain(title: str, sentence: str, numbers: Numbers) -> Chart:
    percent = numbers["metric"] == "accuracy"
    names = {"before": "before", "after": "after the steps", "shuffled": "after, shuffled"}
    rows = [(told, numbers[key]) for key, told in names.items() if numbers.get(key)]
    mean, half = ([scaled(row[part], 100 if percent else 1) for _, row in rows] for part in ("mean", "interval"))
    series = Series("", list(range(len(rows))), mean, *_ends(mean, half), "bars")
    axis = Axis("query accuracy, %" if percent else "query loss")
    return Chart(title, Axis("", names=tuple(told for told, _ in rows)), axis, (series,), (), sentence)


def _permutations(title: str, sentence: str, numbers: Numbers) -> Chart:
    rows = [(name, numbers[name]) for name in ("before", "after") if numbers[name] is not None]
    worst, best = ([100 * row[part] for _, row in rows] for part in ("worst", "best"))
    middle = [100 * sum(row["means"]) / len(row["means"]) for _, row in rows]
    about = f"{sentence} Dots are means over the assignments, lines go from an episode's worst one to its best."
    series = Series("", list(range(len(rows))), middle, worst, best, "dots")
    names = tuple(f"{name} adaptation" for name, _ in rows)
    return Chart(title, Axis("", names=names), Axis("query accuracy, %"), (series,), (), about)


def _features(title: str, sentence: str, numbers: Numbers) -> Chart:
    layers = numbers["layers"]
    places = list(range(len(layers)))
    notes = ["the head" if layer["head"] else "ahead of the head" for layer in layers]
    bars = Series("before and after adaptation", places, [layer["cka"] for layer in layers], shape="bars", notes=notes)
    chance = Series("rows shuffled", places, [layer["by_chance"] for layer in layers], shape="dots", colour=1)
    axis = Axis("linear CKA")
    line = f"The dotted line is at {REUSED}, from which on features count as reused."
    return Chart(title, Axis("", names=tuple(layer["layer"] or "all" for layer in layers)), axis, (bars, chance),
                 (Guide(REUSED, "", "y"),), f"{sentence} {line}", bounds=(0.0, 1.05))  # fmt: skip


def _step_sizes(title: str, sentence: str, numbers: Numbers) -> Chart:
    layers = numbers["layers"]
    places = list(range(len(layers)))
    mean, least, most, start = ([layer[part] for layer in layers] for part in ("mean", "least", "most", "mean_at_start"))
    series = (Series("mean, least and most", places, mean, least, most, "dots"),
              Series("mean before training", places, start, shape="dots", colour=GREY))  # fmt: skip
    names = tuple(layer["layer"] for layer in layers)
    return Chart(title, Axis("", names=names), Axis("step size"), series, (Guide(0, "", "y"),), sentence)


def _alignment(title: str, sentence: str, numbers: Numbers) -> HeatMap:
    rows = tuple(tuple(row) for row in numbers["support_and_query"])
    query, support = (tuple(f"{what} {i}" for i in range(len(rows))) for what in ("query", "support"))
    return HeatMap(title, Axis("", names=query), Axis("", names=support), rows, -1, 1, "cosine of the gradients", sentence)


def _curvature(title: str, sentence: str, numbers: Numbers) -> Chart:
    values, label = numbers["largest_eigenvalue"], "largest eigenvalue λ"
    guides: tuple[Guide, ...] = ()
    if numbers["product"]:
        values, label, guides = numbers["product"], "α·λ", (Guide(numbers["limit"], "limit", "y"),)
    mean = Series("mean over episodes", numbers["steps"], values["mean"], marked=True)
    most = Series("largest", numbers["steps"], values["most"], shape="dots", colour=1)
    return Chart(title, Axis("inner step", whole=True), Axis(label), (mean, most), guides, sentence)


DRAWN: dict[str, Callable[[str, str, Numbers], Part]] = {
    "steps": _steps,
    "gain": _gain,
    "permutations": _permutations,
    "features": _features,
    "step_sizes": _step_sizes,
    "alignment": _alignment,
    "curvature": _curvature,
}
"""How each reading is drawn."""
