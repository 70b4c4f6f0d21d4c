"""Task families: the same episodes everywhere, no leaks, and numbers that were worked out by other means."""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from metaoptim.core.types import Batch, Task
from metaoptim.tasks import TASKS, ImageTasks, TaskFamily, episodes_hash, from_function, from_table, sinusoid
from metaoptim.tasks.base import choose, raw, uniforms
from metaoptim.tasks.table import TableTasks


def pictures(classes: int = 12, drawings: int = 6, size: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images that tell their class, drawing and orientation: the first three pixels of the first row."""
    images = np.zeros((classes, drawings, size, size), np.uint8)
    images[:, :, 0, 0] = 255
    images[:, :, 0, 1] = np.arange(classes)[:, None]
    images[:, :, 0, 2] = np.arange(drawings)
    return images


def family(**options: Any) -> ImageTasks:
    members = {"train": np.arange(6), "val": np.arange(6, 9), "test": np.arange(9, 12)}
    given = {"ways": 3, "shots": 2, "queries": 3, **options}
    return ImageTasks("pictures", pictures(), [f"c{i}" for i in range(12)], members, **given)


def table() -> TableTasks:
    """Nine tasks of five to seven rows with two features."""
    rows = [(t, i) for t in range(9) for i in range(5 + t % 3)]

    class Frame:
        columns = ("who", "a", "b", "y")

        def __getitem__(self, name: str) -> Any:
            return {"who": [f"t{t}" for t, _ in rows], "a": [t * i for t, i in rows], "b": [i**2 for _, i in rows],
                    "y": [t - i for t, i in rows]}[name]  # fmt: skip

    return from_table(Frame(), "who", "y", shots=2, queries=2)


def read(image: Tensor) -> tuple[int, int, int]:
    """Class, drawing and quarter turns of an image of `pictures`, found by turning it back."""
    pixels = (image[0] * 255).round().long()
    for turns in range(4):
        back = torch.rot90(pixels, -turns)
        if back[0, 0] == 255:
            return int(back[0, 1]), int(back[0, 2]), turns
    raise AssertionError("no corner of the image is marked")


def tensors(task: Task) -> list[Tensor]:
    return [*task.support, *task.query]


FAMILIES: dict[str, TaskFamily] = {
    "sinusoid": sinusoid(),
    "grid": sinusoid(shots=10, queries=50, phase="2pi", train_shots=50, grid=50),
    "images": family(),
    "rotations": family(rotations=True, train_shots=3),
    "counts": ImageTasks(
        "uneven",
        pictures().reshape(-1, 4, 4),
        [f"c{i}" for i in range(12)],
        {"train": np.arange(6), "test": np.arange(6, 12)},
        3,
        1,
        2,
        counts=[4, 8] * 6,
    ),
    "table": table(),
    "function": from_function(lambda g, split: ((torch.rand(3, 2, generator=g), torch.zeros(3)),) * 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_episodes_do_not_depend_on_how_they_are_asked_for(name: str) -> None:
    tasks = FAMILIES[name]
    for split in tasks.splits:
        whole = tensors(tasks.sample(split, seed=3, start=0, count=10))
        parts = [tensors(tasks.sample(split, seed=3, start=a, count=n)) for a, n in ((0, 4), (4, 1), (5, 5))]
        for tensor, *cut in zip(whole, *parts, strict=True):
            assert torch.equal(tensor, torch.cat(cut))


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_splits_and_episodes_differ(name: str) -> None:
    tasks = FAMILIES[name]
    hashes = [
        episodes_hash(tasks, split, seed=seed, start=start, count=4)
        for split in tasks.splits
        for seed in (0, 1)
        for start in (0, 4)
    ]
    assert len(set(hashes)) == len(hashes)


def test_random_words_are_those_of_philox() -> None:
    """The first block of Philox4x64-10, computed here from its definition (Salmon et al. 2011)."""

    def block(counter: int, key: int) -> list[int]:
        mask = 2**64 - 1
        c, k = [counter >> 64 * i & mask for i in range(4)], [key & mask, key >> 64]
        for _ in range(10):
            one, two = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [two >> 64 ^ c[1] ^ k[0], two & mask, one >> 64 ^ c[3] ^ k[1], one & mask]
            k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
        return c

    key = 7 | zlib.crc32(b"episodes/train") << 64
    # Item i of five words owns two blocks; NumPy counts up before it draws.
    expected = [[*block(2 * i + 1, key), block(2 * i + 2, key)[0]] for i in (5, 6)]
    assert raw(7, "episodes/train", 5, 2, 5).tolist() == expected


def test_uniforms_and_choices_are_fair() -> None:
    u = uniforms(0, "fair", 0, 20_000, 6)
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=5 * math.sqrt(1 / 12 / 20_000))
    np.testing.assert_allclose(np.corrcoef(u.T), np.eye(6), atol=5 / math.sqrt(20_000))
    pairs = Counter(map(tuple, choose(u, 2).tolist()))
    assert len(pairs) == 30  # all ordered pairs of different places
    assert max(abs(n - 20_000 / 30) for n in pairs.values()) < 5 * math.sqrt(20_000 / 30)
    assert np.array_equal(choose(u, 2), np.argsort(u, axis=1)[:, :2])


GOLDEN = {
    "sinusoid": "b3402149e71eb847a42bbe3e3fc817d32a71ee42b8b7597d579ef156a86ca944",
    "grid": "3cf551e3103a96351757014e387e297d7ae30ccb3dcecee55ec9a5b1a5a006de",
    "images": "aa7721a5aa92841102d582013d66053e5653c7eff2ec10ac0ac04b015bc36cf3",
    "rotations": "c632ea780ec5eb9799b5fe23fbca3bad53b325dd619dbca869b6e6081d2c477b",
    "counts": "2a7d3063aacbd79fd73dd5de9fa568977206c9a98fad697ff8caf373a59a2e64",
    "table": "7ea6b4bec1e492560b2174400aaa238df34e7278f848191f15f4d358a7ff68bf",
    "function": "6d2df7c39a5386b9f2f62004aabf36eec17f831959411e9774501953c4b61968",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_episodes(name: str) -> None:
    """Fixed once for all: a change here breaks the comparability of every recorded score."""
    tasks = FAMILIES[name]
    assert episodes_hash(tasks, "train", seed=0, start=100, count=5) == GOLDEN[name]
    assert episodes_hash(tasks, "train", seed=0, start=100, count=5, chunk=2) == GOLDEN[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_descriptions_are_json(name: str) -> None:
    for split in FAMILIES[name].splits:
        found = FAMILIES[name].describe(split)
        assert json.loads(json.dumps(found)) == found
        assert found["split"] == split


def test_builders_are_a_schema() -> None:
    for build in TASKS.values():
        parameters = inspect.signature(build).parameters
        assert set(parameters) == set(get_type_hints(build)) - {"return"}
        assert all(f"        {name}: " in (build.__doc__ or "") for name in parameters)
        required = [name for name, p in parameters.items() if p.default is p.empty]
        assert required == {"from_folder": ["root"], "from_table": ["table", "task", "target"]}.get(build.__name__, [])


# --- sinusoid


def test_sinusoid_anchors() -> None:
    """Zero has E A²/2 = 4.25; the best function that knows no task, −E[A]·E[sin φ]·cos x, has 3.00."""
    cases: list[tuple[Literal["pi", "2pi"], float, float]] = [("pi", 2.55 * 2 / math.pi, 3.0), ("2pi", 0, 4.25)]
    for phase, best, anchor in cases:
        x, y = sinusoid(queries=20, phase=phase).sample("test", seed=0, start=0, count=20_000).query
        assert y.square().mean().item() == pytest.approx(4.25, abs=0.1)
        assert (y + best * x.cos()).square().mean().item() == pytest.approx(anchor, abs=0.1)
        # The best multiple of cos x among all of them is that one.
        slope = (y * x.cos()).mean() / x.cos().square().mean()
        assert slope.item() == pytest.approx(-best, abs=0.06)


def test_sinusoid_draws_one_wave_per_task() -> None:
    task = sinusoid(shots=5, queries=30).sample("train", seed=1, start=0, count=200)
    x, y = (torch.cat(parts, dim=1).double() for parts in zip(task.support, task.query, strict=True))
    assert x.shape == y.shape == (200, 35, 1) and task.support[0].dtype == torch.float32
    assert x.min() >= -5 and x.max() <= 5
    # y = a sin x + b cos x fits support and query at once; A = |(a, b)|, φ = atan2(−b, a).
    basis = torch.cat([x.sin(), x.cos()], dim=2)
    a, b = torch.linalg.lstsq(basis, y).solution.unbind(1)
    assert torch.allclose(basis @ torch.stack([a, b], dim=1), y, atol=1e-4)
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5
    assert phase.min() > -1e-3 and phase.max() < math.pi + 1e-3


def test_sinusoid_grid_holds_every_point_once() -> None:
    tasks = FAMILIES["grid"]
    expected = torch.linspace(-5, 5, 50)
    for split, shots in (("train", 50), ("test", 10)):
        support, query = tasks.sample(split, seed=0, start=0, count=3)
        assert support[0].shape == (3, shots, 1)
        assert torch.allclose(query[0][..., 0].sort(1).values, expected.expand(3, -1), atol=1e-6)
        assert all(len(set(row.tolist())) == shots for row in support[0][..., 0])


# --- images


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_image_episodes(rotations: bool, split: str) -> None:
    tasks = family(rotations=rotations, train_shots=3)
    shots = 3 if split == "train" else 2
    support, query = tasks.sample(split, seed=0, start=0, count=40)
    assert support[0].shape == (40, 3 * shots, 1, 4, 4) and query[0].shape == (40, 9, 1, 4, 4)
    assert support[1].dtype == torch.int64 and support[0].dtype == torch.float32
    for xs, ys, xq, yq in zip(*support, *query, strict=True):
        assert Counter(ys.tolist()) == dict.fromkeys(range(3), shots)
        assert yq.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        class_of: dict[int, set[tuple[int, int]]] = {}
        drawn = []
        for image, label in zip([*xs, *xq], [*ys.tolist(), *yq.tolist()], strict=True):
            c, drawing, turns = read(image)
            class_of.setdefault(label, set()).add((c, turns))
            drawn.append((c, turns, drawing))
        assert all(len(found) == 1 for found in class_of.values())
        assert len(set.union(*class_of.values())) == 3
        assert len(set(drawn)) == len(drawn)  # support and query share no drawing
        assert {c for c, _, _ in drawn} <= set(map(int, tasks.members[split]))
        assert rotations or all(turns == 0 for _, turns, _ in drawn)


def test_classes_labels_and_order_are_random() -> None:
    support, _ = family(rotations=True).sample("train", seed=0, start=0, count=600)
    seen = Counter(read(x)[::2] for x in support[0].flatten(0, 1))
    assert len(seen) == 24  # six characters in four orientations
    assert max(abs(n - 150) for n in seen.values()) < 5 * math.sqrt(150)
    first = Counter(support[1][:, 0].tolist())
    assert max(abs(n - 200) for n in first.values()) < 5 * math.sqrt(200)
    rows = zip(support[0].flatten(0, 1), support[1].flatten(), strict=True)
    labels_of_0 = Counter(int(y) for x, y in rows if read(x)[0] == 0)
    assert max(labels_of_0.values()) < 1.5 * min(labels_of_0.values())


def test_no_class_is_in_two_splits() -> None:
    tasks = family(rotations=True)
    names = {split: set(tasks.class_names(split)) for split in tasks.splits}
    assert [len(names[s]) for s in tasks.splits] == [tasks.classes(s) for s in tasks.splits] == [24, 12, 12]
    assert len(set.union(*names.values())) == 48
    assert {"c0/rot000", "c0/rot090", "c0/rot180", "c0/rot270"} <= names["train"]


def test_single_images_carry_the_index_of_their_class() -> None:
    tasks = family(rotations=True)
    x, y = tasks.batch("val", seed=0, start=0, count=600)
    assert x.shape == (600, 1, 4, 4) and set(y.tolist()) == set(range(12))
    for image, label in zip(x, y.tolist(), strict=True):
        c, _, turns = read(image)
        assert tasks.class_names("val")[label] == f"c{c}/rot{90 * turns:03d}"
    again = tasks.batch("val", seed=0, start=400, count=200)
    assert torch.equal(again[0], x[400:]) and torch.equal(again[1], y[400:])


def test_images_with_channels() -> None:
    colour = np.stack([pictures(), 255 - pictures()], axis=2)
    tasks = ImageTasks("colour", colour, [str(i) for i in range(12)], {"test": np.arange(12)}, 3, 1, 1, rotations=True)
    x, _ = tasks.sample("test", seed=0, start=0, count=8).query
    assert x.shape == (8, 3, 2, 4, 4)
    torch.testing.assert_close(x.sum(2), torch.ones(8, 3, 4, 4))


# --- from_function


def sampler(generator: torch.Generator, split: str) -> tuple[Batch, Batch]:
    x = torch.rand(4, 1, generator=generator) + (split == "test")
    return (x, 2 * x), (x + 10, 2 * x + 10)


def test_from_function_stacks_and_keeps_splits_apart() -> None:
    tasks = from_function(sampler, splits=("train", "test"), name="lines")
    support, query = tasks.sample("test", seed=0, start=5, count=3)
    assert support[0].shape == (3, 4, 1) and support[0].min() >= 1
    assert torch.equal(support[1], 2 * support[0]) and torch.equal(query[0], support[0] + 10)
    assert tasks.splits == ("train", "test") and tasks.describe("test")["family"] == "lines"
    # A function that draws from the global generator instead must not be able to disturb the others' episodes.
    torch.manual_seed(123)
    assert torch.equal(tasks.sample("test", seed=0, start=5, count=3).support[0], support[0])


def growing(generator: torch.Generator, split: str) -> tuple[Batch, Batch]:
    n = int(torch.randint(1, 50, (), generator=generator))
    return (torch.zeros(n, 1), torch.zeros(n)), (torch.zeros(2, 1), torch.zeros(2))


# --- what users get wrong

PAIR = (torch.zeros(2, 1), torch.zeros(2))
images_of, waves, function_of = cast(tuple[Any, Any, Any], (ImageTasks, sinusoid, from_function))  # unchecked
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one way": (lambda: family(ways=1), "ways is 1"),
    "too many ways": (lambda: family(ways=4), "4 ways were asked for, but split `val`"),
    "no shots": (lambda: family(shots=0), "shots=0: it must be a whole number, at least 1."),
    "no queries": (lambda: family(queries=-1), "queries=-1: it must be a whole number"),
    "no train shots": (lambda: family(train_shots=0), "train_shots=0: it must be a whole number"),
    "too few drawings": (lambda: family(shots=4), "4 shots and 3 queries need 7 images of each class"),
    "too few drawings to train": (lambda: family(train_shots=5), "5 shots and 3 queries need 8"),
    "unknown split": (
        lambda: family().sample("dev", seed=0, start=0, count=1),
        "no split 'dev'; choose one of 'train', 'val', 'test'",
    ),
    "no episodes": (lambda: family().sample("val", seed=0, start=0, count=0), "0 episodes from number 0"),
    "negative start": (lambda: waves().sample("val", seed=0, start=-1, count=2), "from number -1"),
    "negative seed": (lambda: waves().sample("val", seed=-5, start=0, count=2), "seed is -5"),
    "leak": (
        lambda: images_of("p", pictures(), ["x"] * 12, {"train": np.arange(6), "test": np.arange(5, 12)}),
        "Class 'x' is listed twice (`train`, `test`)",
    ),
    "no such class": (
        lambda: images_of("p", pictures(), ["x"] * 12, {"test": np.array([12])}),
        "Split `test` must name classes from 0 to 11",
    ),
    "floating images": (
        lambda: images_of("p", pictures().astype(float), ["x"] * 12, {}),
        "images are float64 of shape (12, 6, 4, 4); pass uint8",
    ),
    "names": (lambda: images_of("p", pictures(), ["x"], {}), "1 names for 12 classes"),
    "not square": (
        lambda: images_of("p", pictures()[..., :3], ["x"] * 12, {}, rotations=True),
        "can't be turned by 90 degrees",
    ),
    "sinusoid shots": (lambda: waves(shots=0), "shots=0: it must be a whole number, at least 1."),
    "sinusoid phase": (lambda: waves(phase="3pi"), "phase is '3pi'"),
    "sinusoid grid": (lambda: waves(train_shots=50, grid=20), "grid of 20 points can't give 50"),
    "sinusoid split": (lambda: waves().describe("dev"), "no split 'dev'"),
    "function split": (lambda: function_of(sampler).sample("x", seed=0, start=0, count=1), "no split 'x'"),
    "function structure": (
        lambda: function_of(lambda g, s: PAIR).sample("val", seed=0, start=0, count=1),
        "returned (Tensor, Tensor); it must return ((x, y), (x, y))",
    ),
    "function arrays": (
        lambda: function_of(lambda g, s: ((1, 2), PAIR)).sample("val", seed=0, start=0, count=1),
        "returned ((int, int), (Tensor, Tensor)); it must return",
    ),
    "function of one argument": (lambda: function_of(lambda g: PAIR), "sample is called with (generator, split): too many"),
    "function lists": (
        lambda: function_of(lambda g, s: ([0.0] * 2000, [0.0] * 2000)).sample("val", seed=0, start=0, count=1),
        "returned ((float, float, float, float, …), (float, float, float, float, …)); it must return",
    ),
    "function lengths": (
        lambda: function_of(lambda g, s: (PAIR, (torch.zeros(3, 1), torch.zeros(2)))).sample("val", seed=0, start=0, count=1),
        "query of (3, 1) inputs and (2,) targets",
    ),
    "function shapes": (
        lambda: function_of(growing).sample("val", seed=0, start=0, count=20),
        "all tasks of a family must have the same shapes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_get_one_sentence(case: str) -> None:
    attempt, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        attempt()
    message = str(caught.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message and len(message) < 300
