"""Real episodes: what the support was, and what an adapted module answers to each query."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.core.types import Task
from metaoptim.report.html.document import GREY, Axis, Chart, Episode, Note, Part, Picture, Section, Series
from metaoptim.runs import Run

TITLE = "Episodes"
IMAGES = "Below an image stands the probability of the class that it is taken for; where that is wrong, the class too."
FITS = "Curves are what the network predicts before, between and after the steps."
CLASSES, SUPPORT, QUERY = 10, 4, 6  # at the most: classes of an episode, images of a class
PIXELS = 44  # of an image's longer side
GRID = 81  # points of a curve
CURVES = 4  # of an episode, the first and the last among them

Pair = tuple[Tensor, Tensor]


def gallery(run: Run, batch: Task, steps: int) -> Section:
    """The episodes of a batch, answered after so many inner steps: images, curves, or predictions against truth.

    Errors: ValueError, where the run's learner is not built on one module.
    """
    after = f"after {plural(steps, 'inner step')} on its support set" if steps else "with its support set"
    about = f"Each is answered by the network {after}."
    pairs = all(isinstance(part, tuple) and len(part) == 2 for part in batch)
    if not pairs or not all(isinstance(x, Tensor) for part in batch for x in part):
        note = Note("These tasks are not pairs of inputs and targets, so that there is nothing to show them by.", "missing")
        return Section(TITLE, (note,))
    xs, ys = batch.query
    show: Callable[[Run, int, Pair, Pair, int], Part] = _images
    told = IMAGES
    if ys.dtype != torch.int64:
        show, told = (_fits, FITS) if xs.shape[2:] == (1,) and ys.shape == xs.shape else (_against, "")
    elif xs.ndim != 5:
        show, told = _answers, ""
    tasks = (((x[e], y[e]) for x, y in batch) for e in range(len(xs)))
    parts = tuple(show(run, e, support, query, steps) for e, (support, query) in enumerate(tasks))
    return Section(TITLE, parts, f"{about} {told}".strip())


def _answer(run: Run, support: Pair, x: Tensor, steps: int) -> Tensor:
    """What the module that was adapted to the support returns for these inputs."""
    module = run.adapt(support, steps=steps)
    with torch.no_grad():
        found: Tensor = module(x.to(run.phi.device))
    return found


def _images(run: Run, e: int, support: Pair, query: Pair, steps: int) -> Episode:
    (xs, ys), (xq, yq) = support, query
    chances = _answer(run, support, xq, steps).softmax(-1)
    taken = chances.argmax(-1).tolist()
    classes = []
    for c in range(min(int(yq.max()) + 1, CLASSES)):
        shown = [
            Picture(_png(xq[i]), f"query image of class {c}, taken for class {taken[i]}",
                    f"{'' if taken[i] == c else f'{taken[i]}: '}{100 * chances[i, taken[i]]:.0f} %", taken[i] == c)
            for i in (yq == c).nonzero().flatten().tolist()[:QUERY]
        ]  # fmt: skip
        given = tuple(Picture(_png(x), f"support image of class {c}") for x in xs[ys == c][:SUPPORT])
        classes.append((str(c), given, tuple(shown)))
    right = sum(a == b for a, b in zip(taken, yq.tolist(), strict=True))
    left = " Some of the images and classes are left out." if sum(len(q) for *_, q in classes) < len(yq) else ""
    return Episode(f"Episode {e}", tuple(classes), f"{right} of {len(yq)} right.{left}")


def _png(image: Tensor) -> bytes:
    """An image (C, H, W) of numbers in [0, 1], small; one that is dark on light where it has one channel."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy(force=True)
    flat = np.moveaxis(pixels, 0, -1) if len(pixels) == 3 else 255 - pixels.mean(0).astype(np.uint8)
    picture = Image.fromarray(flat)
    picture.thumbnail((PIXELS, PIXELS))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def _fits(run: Run, e: int, support: Pair, query: Pair, steps: int) -> Chart:
    """A regression on one input: the truth, and the curve before, between and after the steps."""
    (xs, ys), (xq, yq) = support, query
    seen = torch.cat([xs, xq])
    grid = torch.linspace(float(seen.min()), float(seen.max()), GRID, dtype=xq.dtype)[:, None]
    shown = sorted({round(i * steps / (CURVES - 1)) for i in range(CURVES)} | {min(1, steps)})
    series = [
        Series(_told(k), _list(grid), _list(_answer(run, support, grid, k)),
               colour=GREY if k == 0 else 0 if k == steps else i + 2, dashed=k < steps)
        for i, k in enumerate(shown)
    ]  # fmt: skip
    series += [
        Series("query", *_sorted(xq, yq), shape="dots", colour=GREY),
        Series("support", *_sorted(xs, ys), shape="dots", colour=1),
    ]
    return Chart(f"Episode {e}", Axis("x"), Axis("y"), tuple(series))


def _told(k: int) -> str:
    return f"after {plural(k, 'step')}" if k else "before"


def _sorted(x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    order = x.flatten().argsort()
    return _list(x.flatten()[order]), _list(y.flatten()[order])


def _list(x: Tensor) -> list[float]:
    numbers: list[float] = x.flatten().tolist()
    return [float(f"{n:.5g}") for n in numbers]


def _against(run: Run, e: int, support: Pair, query: Pair, steps: int) -> Chart:
    """A regression on several inputs: predictions against the truth, before and after the steps."""
    (_, _), (xq, yq) = support, query
    order = yq.flatten().argsort()
    series = [
        Series(_told(k), _list(yq.flatten()[order]),
               _list(_answer(run, support, xq, k).flatten()[order]), shape="dots", colour=colour)
        for k, colour in {0: GREY, steps: 0}.items()
    ]  # fmt: skip
    ends = [float(yq.min()), float(yq.max())]
    return Chart(
        f"Episode {e}",
        Axis("truth"),
        Axis("prediction"),
        (Series("right", ends, ends, colour=2, dashed=True, faint=True), *series),
    )


def _answers(run: Run, e: int, support: Pair, query: Pair, steps: int) -> Chart:
    """Classes that are no images: the probability that each query is given for its true class."""
    _, (xq, yq) = support, query
    names = tuple(f"{i}: class {c}" for i, c in enumerate(yq.tolist()))
    series: list[Series] = []
    for k, colour in {0: GREY, steps: 0}.items():
        chances = _answer(run, support, xq, k).softmax(-1)
        own = chances.gather(-1, yq.to(chances.device)[:, None]).flatten()
        right = (chances.argmax(-1) == yq.to(chances.device)).tolist()
        told = ["right" if good else "wrong" for good in right]
        values = [100 * p for p in _list(own)]
        series.append(Series(_told(k), list(range(len(yq))), values, shape="dots", colour=colour, notes=told))
    about = f"{list(series[-1].notes).count('right')} of {len(yq)} right; dots are probabilities of the true class."
    return Chart(f"Episode {e}", Axis("query", names=names), Axis("probability, %"), tuple(series), about=about)
