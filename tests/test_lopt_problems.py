"""Training problems: numbers that depend on seed, split, problem and step alone; networks that are torch's; honest units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metaoptim.core import trees
from metaoptim.core.gradients import exact, held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Info, MetaParams, Params, Rule, Task
from metaoptim.learners.gradient import Inner
from metaoptim.lopt import families, networks
from metaoptim.lopt.data import Data, load
from metaoptim.lopt.learner import Optimizee
from metaoptim.lopt.mixture import Family, Mixture, mixture
from metaoptim.lopt.problem import CEILING, Problems
from metaoptim.lopt.streams import Streams
from metaoptim.rules import SGD, LayerStepSizes
from metaoptim.tasks import episodes_hash

STEPS = 6


@cache
def toy() -> Data:
    """A few images of noise in four classes."""
    draw = torch.Generator().manual_seed(0)
    return Data("toy", torch.randn(40, 1, 6, 6, generator=draw), torch.arange(40) % 4, 4)


SMALL: dict[str, Callable[[], Family]] = {
    "quadratics": lambda: families.quadratics(4, steps=STEPS),
    "uniform": lambda: families.quadratics(4, uniform=True, steps=STEPS),
    "logistic": lambda: families.logistic(toy(), batch=5, steps=STEPS),
    "relu": lambda: families.mlp(toy(), (7, 5), batch=5, steps=STEPS),
    "tanh": lambda: families.mlp(toy(), (7,), "tanh", batch=5, steps=STEPS),
    "gelu": lambda: families.mlp(toy(), (7,), "gelu", batch=5, steps=STEPS),
    "sigmoid": lambda: families.mlp(toy(), (7,), "sigmoid", batch=5, steps=STEPS),
    "convnet": lambda: families.convnet(toy(), (3, 4), batch=5, steps=STEPS),
    "transformer": lambda: families.transformer(8, 2, 2, context=6, batch=3, steps=STEPS),
    "mixture": lambda: mixture(SMALL["quadratics"]().with_(rescaled=(0.1, 10.0)), SMALL["tanh"](), SMALL["transformer"]()),
}
EACH = pytest.mark.parametrize("name", SMALL)


def alone(task: Task) -> Task:
    """The only task of a batch, as a learner sees it."""
    found: Task = trees.index(task, 0)
    return found


def run(family: Family, rule: Rule, psi: Params, task: Task, gradient: Any = held) -> Iterator[Tensor]:
    """The judged losses of a run."""
    learner, phi = Optimizee(family, rule), MetaParams({}, psi)
    for k, state in inner_loop(learner, phi, task.support, gradient):
        yield learner.loss(phi, state, task.support, task.query, k)[0]


def begun(family: Family, weights: Params, task: Task) -> tuple[Optimizee, MetaParams, Inner]:
    """A learner, and its state at other weights than the problem's own."""
    learner, phi = Optimizee(family, SGD(0.1)), MetaParams({}, {})
    return learner, phi, learner.init(phi, task.support)._replace(fast=weights)


def slope(family: Family, weights: Params, task: Task) -> Params:
    """The gradient at the first minibatch."""
    learner, phi, state = begun(family, weights, task)
    f, _ = learner.inner(phi, state, task.support, task.support["first"][0])
    found: Params = grad(lambda w: f(w)[0])(weights)
    return found


def judged(family: Family, weights: Params, task: Task) -> tuple[Tensor, Info]:
    """How weights are judged at the start."""
    learner, phi, state = begun(family, weights, task)
    return learner.loss(phi, state, task.support, task.query, task.support["first"][0])


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(trees.flatten(a), trees.flatten(b), strict=True))


@EACH
def test_a_problem_is_a_function_of_seed_split_and_number(name: str) -> None:
    family, twin = SMALL[name](), SMALL[name]()
    before = torch.get_rng_state()
    task = family.sample("train", seed=3, start=4, count=3)
    torch.manual_seed(7)
    assert same(task, twin.sample("train", seed=3, start=4, count=3))
    assert same(trees.index(task, slice(2, 3)), twin.sample("train", seed=3, start=6, count=1))
    assert episodes_hash(family, "val", seed=0, start=0, count=5, chunk=2) == episodes_hash(
        twin, "val", seed=0, start=0, count=5
    )
    torch.set_rng_state(before)
    family.sample("train", seed=0, start=0, count=2)
    assert torch.equal(torch.get_rng_state(), before)


@EACH
def test_seeds_splits_and_problems_differ(name: str) -> None:
    family = SMALL[name]()
    drawn = [
        family.sample(split, seed=seed, start=number, count=1).support["start"]
        for split, seed, number in (("train", 0, 0), ("val", 0, 0), ("test", 0, 0), ("train", 1, 0), ("train", 0, 1))
    ]
    assert len({trees.flatten(start)[0].sum().item() for start in drawn}) == len(drawn)
    with pytest.raises(ValueError, match="There is no split 'all'"):
        family.sample("all", seed=0, start=0, count=1)


@EACH
def test_a_stretch_is_a_slice_of_the_whole_run(name: str) -> None:
    family = SMALL[name]()
    whole = family.sample("train", seed=0, start=3, count=1)
    part = family.stretch("train", 0, [3], [2], [STEPS], 3)
    constant = name in ("quadratics", "uniform")

    def rows(x: Tensor, begin: int, end: int) -> Tensor:
        return x if x.shape[2] == 1 else x[:, :, begin:end]

    for a, b, end in ((part.support, whole.support, 5), (part.query, whole.query, 6)):
        cut = trees.map_tensors(lambda x, end=end: rows(x, 2, end), b["batches"])
        assert same(a["batches"], cut)
    assert same(part.support["start"], whole.support["start"]) and same(part.support["scale"], whole.support["scale"])
    assert (part.support["first"].item(), part.support["horizon"].item()) == (2, STEPS)
    assert same(whole.support["batches"], trees.map_tensors(lambda x: x[:, :, :STEPS], whole.query["batches"])) == constant


@EACH
def test_problems_and_particles_are_mapped(name: str, doubles: None) -> None:
    family = SMALL[name]()
    tasks = family.sample("train", seed=0, start=0, count=3)
    draw = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(2, *w.shape[1:], generator=draw) for n, w in tasks.support["start"].items()}

    def one(task: Task, shift: Params) -> tuple[Params, Tensor]:
        weights = trees.add(trees.index(task.support["start"], 0), trees.index(shift, 0), 0.1)
        return slope(family, weights, task), judged(family, weights, task)[0]

    mapped = vmap(vmap(one, in_dims=(None, 0)), in_dims=(0, None))(tasks, noise)
    looped = [trees.stack([one(trees.index(tasks, t), trees.index(noise, p)) for p in range(2)]) for t in range(3)]
    for a, b in zip(trees.flatten(mapped), trees.flatten(trees.stack(looped)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@EACH
def test_a_learnt_step_size_has_the_gradient_of_central_differences(name: str, doubles: None) -> None:
    family, rule = SMALL[name]().with_(steps=3), LayerStepSizes(0.05, 3)
    task = alone(family.sample("train", seed=1, start=0, count=1))
    psi = rule.start(trees.index(task.support["start"], 0), torch.Generator())
    draw = torch.Generator().manual_seed(1)
    along = {n: torch.randn(p.shape, generator=draw) for n, p in psi.items()}

    def last(psi: Params) -> Tensor:
        return list(run(family, rule, psi, task, exact))[-1]

    gradient = grad(last)(psi)
    step = 1e-6
    difference = (last(trees.add(psi, along, step)) - last(trees.add(psi, along, -step))) / (2 * step)
    assert all(g.abs().min() > 0 for g in gradient.values())
    torch.testing.assert_close(trees.dot(gradient, along), difference, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", [n for n in SMALL if n != "mixture"])
def test_rescaled_problems_are_the_same_with_other_gradients(name: str, doubles: None) -> None:
    plain = SMALL[name]()
    assert isinstance(plain, Problems)
    family = plain.with_(rescaled=(1e-3, 1e3))
    scales = family.sample("train", seed=0, start=0, count=40).support["scale"].flatten()
    assert 1e-3 < scales.min() < 0.03 and 30 < scales.max() < 1e3
    a, b = (alone(f.sample("train", seed=0, start=2, count=1)) for f in (plain, family))
    starts = [trees.index(t.support["start"], 0) for t in (a, b)]
    loss, other = (judged(f, w, t)[0] for f, w, t in zip((plain, family), starts, (a, b), strict=True))
    torch.testing.assert_close(other, loss)
    gradients = slope(plain, starts[0], a), slope(family, starts[1], b)
    for n, g in gradients[1].items():
        torch.testing.assert_close(starts[1][n] * scales[2], starts[0][n])
        torch.testing.assert_close(g, scales[2] * gradients[0][n])


def test_the_meta_loss_can_be_a_logarithm_of_what_is_trained_on(doubles: None) -> None:
    plain = SMALL["quadratics"]()
    family = plain.with_(logarithm=True)
    task = alone(plain.sample("train", seed=0, start=0, count=1))
    start = trees.index(task.support["start"], 0)
    loss, info = judged(plain, start, task)
    other, same = judged(family, start, task)
    assert other.item() == pytest.approx(math.log(loss.item() + 0.001)) and same == info
    far = {n: w + 1e3 for n, w in start.items()}
    assert judged(family, far, task)[0].item() == pytest.approx(math.log(3.001)), "diverged runs count as 3"
    assert all(torch.equal(g, slope(plain, start, task)[n]) for n, g in slope(family, start, task).items())


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("mixture", "quadratics", "uniform")])
def test_the_unit_is_the_loss_of_knowing_nothing(name: str, doubles: None) -> None:
    family = SMALL[name]()
    task = alone(family.sample("test", seed=0, start=0, count=1))
    zero = {n: torch.zeros_like(w[0]) for n, w in task.support["start"].items()}
    assert judged(family, zero, task)[0].item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("uniform", [False, True])
def test_quadratics_are_those_of_the_paper(uniform: bool, doubles: None) -> None:
    family = families.quadratics(10, uniform)
    task = family.sample("train", seed=0, start=0, count=400)
    matrix, target = (x[:, 0, 0] for x in task.support["batches"])
    assert matrix.shape == (400, 10, 10) and target.shape == (400, 10) and same(task.support["batches"], task.query["batches"])
    mean, square = (0.5, 1 / 3) if uniform else (0.0, 1.0)
    assert matrix.mean().item() == pytest.approx(mean, abs=0.02) and matrix.square().mean().item() == pytest.approx(
        square, rel=0.03
    )
    assert target.square().sum(1).mean().item() == pytest.approx(family.unit, rel=0.06)
    assert task.support["start"]["theta"].square().mean().item() == pytest.approx(1e-4, rel=0.1)
    one = alone(task)
    loss, _ = family.training(trees.index(one.support["start"], 0), torch.tensor(1.0), (matrix[0], target[0]))
    theta = one.support["start"]["theta"][0]
    assert loss.item() == pytest.approx(torch.linalg.vector_norm(matrix[0] @ theta - target[0]).item() ** 2)


@pytest.mark.parametrize(
    ("build", "rate"),
    [
        (lambda: families.quadratics(), 0.005),
        (lambda: families.logistic(load("digits")), 0.1),
        (lambda: families.mlp(load("glyphs")), 0.3),
        (lambda: families.convnet(load("digits")), 0.3),
        (lambda: families.transformer(16, 1, batch=16), 0.5),
        (lambda: mixture(*(f.with_(rescaled=(0.9, 1.1)) for f in families.mlps(load("digits"), 2, batch=16))), 0.3),
    ],
    ids=["quadratics", "logistic", "mlp", "convnet", "transformer", "mixture"],
)
def test_gradient_descent_lowers_the_loss(build: Callable[[], Family], rate: float) -> None:
    family = build()
    losses = torch.stack(list(run(family, SGD(rate), {}, alone(family.sample("test", seed=0, start=0, count=1)))))
    assert len(losses) == 101 and losses[-20:].mean() < 0.75 * losses[0]


def torchs(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], networks.Network, dict[str, str]]:
    """torch's own network of a kind, how it is called, ours, and torch's names of our weights where they are others."""
    if name == "mlp":
        net = nn.Sequential(nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 4))
        return net, lambda x: x.flatten(1), networks.mlp([36, 7, 4], "tanh"), {"1.": "2."}
    if name == "convnet":
        layers = [
            nn.Conv2d(1, 3, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(3, 5, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        net = nn.Sequential(*layers, nn.Linear(5, 4))
        return net, lambda x: x, networks.convnet([3, 5], 4), {"1.": "2.", "head.": "6."}
    return Transformer(), lambda x: x, networks.transformer(8, 2, 2, 6, 5), {
        ".qkv.": ".self_attn.in_proj_", ".out.": ".self_attn.out_proj.", ".up.": ".linear1.", ".down.": ".linear2.",
    }  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.token, self.position = nn.Linear(5, 8, bias=False), nn.Linear(6, 8, bias=False)
        for i in range(2):
            layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
            self.add_module(str(i), layer)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token(nn.functional.one_hot(x, 5).to(self.head.weight.dtype)) + self.position(torch.eye(6))
        for i in range(2):
            x = self.get_submodule(str(i))(x, nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)
        found: Tensor = self.head(self.norm(x))
        return found


@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_networks_are_torchs(name: str, doubles: None) -> None:
    net, prepared, (shapes, output), others = torchs(name)
    weights = networks.start(shapes, 5)
    renamed = {}
    for ours, w in weights.items():
        theirs = ours
        for a, b in others.items():
            theirs = theirs.replace(a, b) if a.startswith(".") or ours.startswith(a) else theirs
        renamed[theirs] = w
    assert {n: p.shape for n, p in net.named_parameters()} == {n: w.shape for n, w in renamed.items()}
    x = torch.randint(5, (3, 6)) if name == "transformer" else torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(output(weights, x), functional_call(net, renamed, prepared(x)))


@pytest.mark.parametrize("layer", [nn.Linear(200, 50), nn.Conv2d(8, 40, 3), nn.LayerNorm(9)], ids=lambda m: type(m).__name__)
def test_starts_are_distributed_as_torchs(layer: nn.Module) -> None:
    shapes = {f"a.{n}": tuple(p.shape) for n, p in layer.named_parameters()}
    drawn = networks.start(shapes, 0)
    for n, p in layer.named_parameters():
        ours = drawn[f"a.{n}"]
        assert ours.dtype == p.dtype and ours.shape == p.shape
        if isinstance(layer, nn.LayerNorm):
            assert torch.equal(ours, p)
        else:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.9 * bound < ours.abs().max() <= bound and abs(ours.mean()) < 3.5 * bound / math.sqrt(3 * ours.numel())
            assert ours.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_members_of_a_mixture_are_what_they_are_alone(doubles: None) -> None:
    family = SMALL["mixture"]()
    assert isinstance(family, Mixture)
    task = alone(family.sample("train", seed=2, start=5, count=1))
    weights = trees.index(task.support["start"], 0)
    together, mean = slope(family, weights, task), judged(family, weights, task)[0]
    single = []
    for i, member in enumerate(family.members):
        own = alone(member.sample("train", seed=2, start=5, count=1))
        start = trees.index(own.support["start"], 0)
        assert same(start, {n: weights[f"{i}.{n}"] for n in start})
        for n, g in slope(member, start, own).items():
            torch.testing.assert_close(together[f"{i}.{n}"], g)
        single.append(judged(member, start, own)[0])
    torch.testing.assert_close(mean, torch.stack(single).mean())


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_a_diverged_member_is_clipped_by_itself(value: float) -> None:
    family = mixture(SMALL["quadratics"](), SMALL["tanh"]())
    task = alone(family.sample("train", seed=0, start=0, count=1))
    weights = trees.index(task.support["start"], 0)
    assert judged(family, weights, task)[1]["diverged"] == 0
    loss, info = judged(family, weights | {"0.theta": torch.full_like(weights["0.theta"], value)}, task)
    own = {n[2:]: w for n, w in weights.items() if n.startswith("1.")}
    other, _ = judged(family.members[1], own, alone(family.members[1].sample("train", seed=0, start=0, count=1)))
    assert info["diverged"] == 0.5 and loss.item() == pytest.approx((CEILING + other.item()) / 2)


def test_families_refuse_what_makes_no_sense() -> None:
    a = SMALL["tanh"]()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: mixture(), "the members are none"),
        (lambda: mixture(a, a), "all different"),
        (lambda: mixture(a, SMALL["relu"]().with_(steps=7)), r"steps=6\).*steps=7\).*same steps"),
        (lambda: a.with_(steps=0), "steps=0"),
        (lambda: a.with_(rescaled=(2.0, 1.0)), "smaller one first"),
        (lambda: families.mlp(toy(), activation="swish"), "must be one of relu, tanh"),
        (lambda: families.mlp(toy(), (0,)), "hidden=0"),
        (lambda: families.mlp(toy(), batch=0), "batch=0"),
        (lambda: families.convnet(toy(), (0,)), "channels=0"),
        (lambda: families.transformer(width=9), "multiple of the heads"),
        (lambda: families.quadratics(0), "dim=0"),
    ]
    for build, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            build()


def test_what_a_family_is_is_recorded() -> None:
    told = families.mlp(toy(), (7,), "tanh").describe("val")
    assert told["family"] == "mlp-7-tanh-toy" and told["split"] == "val"
    assert told["options"]["hidden"] == [7] and told["options"]["data"] == "toy"
    both = SMALL["mixture"]().describe("test")
    assert [m["family"] for m in both["members"]][1:] == ["mlp-7-tanh-toy", "transformer-8x2x2-text-6"]


def test_shapes_are_random_but_repeatable() -> None:
    drawn = families.mlps(toy(), 12, seed=3)
    assert [f.name for f in drawn] == [f.name for f in families.mlps(toy(), 12, seed=3)]
    assert [f.name for f in drawn[:4]] == [f.name for f in families.mlps(toy(), 4, seed=3)]
    shapes = [f.options["hidden"] for f in drawn]
    assert {len(s) for s in shapes} == {1, 2, 3} and all(8 <= w <= 64 for s in shapes for w in s)
    assert len({f.options["activation"] for f in drawn}) == 4


def streams(**changes: Any) -> Streams:
    options: dict[str, Any] = {"seed": 0, "count": 5, "window": 3, "horizons": (6, 30)}
    return Streams(SMALL["logistic"](), **options | changes)


def test_windows_follow_one_another_and_end_with_the_run() -> None:
    source, phi = streams(), MetaParams({}, {"lr": torch.zeros(1)})
    tasks = [source(t, phi) for t in range(40)]
    firsts = torch.stack([t.support["first"][:, 0] for t in tasks])
    lengths = torch.stack([t.support["horizon"][:, 0] for t in tasks])
    assert (firsts % 3 == 0).all() and (firsts + 3 <= lengths).all() and (lengths <= 30).all()
    ended = firsts[:-1] + 3 == lengths[:-1]
    assert (firsts[1:][ended] == 0).all() and (firsts[1:] == firsts[:-1] + 3)[~ended].all()
    assert (lengths[1:] == lengths[:-1])[~ended].all()
    starts = torch.stack([trees.flatten(t.support["start"])[0].flatten(1).sum(1) for t in tasks])
    assert ((starts[1:] == starts[:-1]) == ~ended).all()  # a problem stays until its run is over
    later = lengths[10:][firsts[10:] == 0]
    assert later.min() >= 6 and later.min() < later.max()


def test_slots_stand_at_different_places_even_where_runs_are_of_one_length() -> None:
    tasks = [streams(horizons=(30, 30))(t, MetaParams({}, {"lr": torch.zeros(1)})) for t in (15, 60)]
    assert all(len(set(t.support["first"][:, 0].tolist())) > 2 for t in tasks)
    assert (tasks[1].support["horizon"] == 30).all()


def test_a_slot_trains_the_problem_that_its_number_says() -> None:
    source, phi = streams(), MetaParams({}, {"lr": torch.zeros(1)})
    tasks = [source(t, phi) for t in range(30)]
    run_of = [sum(int(t.support["first"][2]) == 0 for t in tasks[: i + 1]) - 1 for i in range(30)]
    for i in (0, 13, 29):
        begun, horizon = int(tasks[i].support["first"][2]), int(tasks[i].support["horizon"][2])
        own = source.problems.stretch("train", 0, [run_of[i] * 5 + 2], [begun], [horizon], 3)
        assert same(trees.index(tasks[i], slice(2, 3)), own)


def test_an_outer_step_is_the_same_asked_early_or_late() -> None:
    phi = MetaParams({}, {"lr": torch.zeros(1)})
    late, early = streams(), streams()
    late(5000, phi)
    for t in (0, 15, 16, 70):
        assert same(late(t, phi), early(t, phi))
    assert not same(streams(seed=1)(3, phi).support, early(3, phi).support)
