"""Training problems of one's own: from a module, a loss and examples; what is wrong with functions is told at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim import lopt
from metaoptim.core import trees
from metaoptim.gradcheck.case import recast

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
CROSS = F.cross_entropy


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *(layers or (nn.Tanh(),)), nn.Linear(6, 2))


def built() -> nn.Module:
    return net()


def own(module: Any = None, loss: Any = CROSS, data: Any = (X, Y), **options: Any) -> lopt.Problems:
    return lopt.from_module(module or net(), loss, data, **{"batch": 5, "steps": 4, **options})


def learn(problems: Any, rule: Any = None, **options: Any) -> mo.Run:
    options = {"estimator": "pes", "window": 2, "engine": {"runtime": "eager"}, **options}
    return lopt.meta_train(
        rule or lopt.SmallFC(), problems, iterations=1, problems_per_step=2, validate_every=0, progress=False, **options
    )


@pytest.mark.parametrize("module", [net(), built], ids=["module", "function"])
def test_a_start_is_a_function_of_the_seed(module: Any) -> None:
    before, state = copy.deepcopy(module), torch.get_rng_state()
    family = own(module)
    one, again, other = (family.start(seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, again[n]) and not torch.equal(x, other[n]) for n, x in one.items())
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(module, nn.Module):
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    else:
        torch.manual_seed(3)
        assert all(torch.equal(p, one[n]) for n, p in built().named_parameters())
        torch.set_rng_state(state)


def test_its_loss_is_the_modules_on_rows_of_the_data() -> None:
    module = net()
    family, weights = own(module), own(module).start(1)
    x, y = family.batches(1, "support", 0, 3)
    assert x.shape == (3, 5, 4) and torch.equal((x.sum(-1) > 0).long(), y)
    assert {tuple(row) for row in x.flatten(0, 1).tolist()} <= {tuple(row) for row in X.tolist()}
    loss, reports = family.loss(weights, (x[0], y[0]))
    assert loss == CROSS(functional_call(module, weights, (x[0],)), y[0]) and reports == {}
    assert (
        own(unit=2.0).unit == 2.0
        and 0.6 < own(batch=400).unit < 0.9
        and own(data=lopt.Data("sums", X, Y, 2)).name == ("Sequential-sums")
    )


def test_frozen_weights_are_no_part_of_a_problem() -> None:
    module = net()
    module[0].requires_grad_(False)
    assert own(module).start(0).keys() == {"2.weight", "2.bias"}


def test_batch_norm_and_dropout_are_trained_with() -> None:
    family = own(lambda: mo.nn.convert(net(nn.BatchNorm1d(6), nn.Dropout(0.5))))
    assert torch.equal(own(mo.nn.convert(net(nn.BatchNorm1d(6)))).start(0)["1.weight"], torch.ones(6))
    assert learn(family).step == 1
    judged = [
        lopt.evaluate(mo.rules.SGD(0.1), families=family, baselines=["Adam"], problems=2, seeds=1, step_sizes=1, progress=False)
        for _ in range(2)
    ]
    assert torch.equal(judged[0].rows[0].losses, judged[1].rows[0].losses)


class Mixed(nn.Module):
    mix: Tensor

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer, self.shift = nn.Linear(4, 2), nn.Parameter(torch.zeros(4))
        self.register_buffer("mix", torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x + self.shift) @ self.mix
        return found


def test_a_check_finds_the_buffers_of_a_module() -> None:
    learner = recast(lopt.Optimizee(own(Mixed), lopt.SmallFC()), torch.float64)
    start = {n: w.double() for n, w in own(Mixed).start(0).items()}
    assert learner.problems.loss(start, (X.double(), Y))[0].dtype == torch.float64


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: own(net(nn.BatchNorm1d(6))), r"layer `1` \(BatchNorm1d\) keeps running statistics.*give mo.nn.convert\(net\)"),
    (lambda: own(Mixed()), r"\(Mixed\) has weights \(`shift`\) and no reset_parameters.*a function that builds"),
    (lambda: own(nn.Linear), "net=Linear can't be called without arguments"),
    (lambda: own("net"), "net='net': it must be a module, or a function without arguments"),
    (lambda: own(loss=nn.CrossEntropyLoss), "loss=CrossEntropyLoss.*not a class"),
    (lambda: own(loss=lambda output, y: CROSS(output, y, reduction="none")), r"shape \(5,\).*a scalar tensor, the mean"),
    (lambda: own(loss=lambda output, y: -CROSS(output, y)), "no unit to divide by: give unit="),
    (lambda: own(data=(X.numpy(), Y.numpy())), "must be tensors, as torch.from_numpy gives them; found ndarray"),
    (lambda: own(data=(X, Y[:5])), r"shapes \(40, 4\) and \(5,\).*the same examples"),
    (lambda: own(data=X), r"data must be a pair of tensors \(x, y\), or mo.lopt.Data; found Tensor"),
    (lambda: own(data=((X, X), Y)), "called with the inputs of a batch as one argument, but .* must be Tensor, not tuple"),
    (lambda: own(net().requires_grad_(False)), "net=Sequential has no weights with requires_grad=True"),
    (lambda: own(data=(X.double(), Y)), r"layer `0` \(Linear\) can't take these data.*\.float\(\) of the data"),
    (lambda: own(loss=mo.losses.cross_entropy, data=(X, Y.short())), r"expected class numbers as targets: y\.long\(\)"),
    (lambda: own(data=(X, Y + 1)), "Target 2 is out of bounds"),
    (lambda: lopt.Data("numbers", X, Y[:5], 2), "the first axis of both"),
    (lambda: lopt.Data("numbers", X.numpy(), Y, 2), "must be tensors"),  # type: ignore[arg-type]
    (lambda: lopt.Data("numbers", X, Y + 1, 2), "y goes from 1 to 2; with classes=2"),
    (lambda: lopt.Data("numbers", X, Y.short(), 2), r"y is torch.int16.*y\.long\(\)"),
    (lambda: lopt.Data("numbers", X, Y, 1), "classes=1"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_what_can_not_be_trained_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def noisy(seed: int, stream: str, first: int, count: int) -> Any:
    return torch.randn(count, 5, 4), torch.zeros(count, 5).long()


def forgetful(seed: int, stream: str, first: int, count: int) -> Any:
    rows = torch.randint(40, (count, 5), generator=torch.Generator().manual_seed(seed))
    return X[rows], Y[rows]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": 3}, "name=3"),
    ({"unit": 0}, "unit=0"),
    ({"start": "abc"}, "start='abc': it must be a function, seed -> weights"),
    ({"start": lambda seed: {}}, "returned an empty dictionary; it must return a dictionary of weights by name"),
    ({"start": lambda seed: net()}, "returned Sequential; it must return a dictionary"),
    ({"start": lambda seed: {n: torch.randn_like(p) for n, p in net().named_parameters()}}, "other weights for the same seed"),
    ({"batches": noisy}, "other minibatches for the same arguments: draw every random number"),
    ({"batches": forgetful}, "another minibatch for step 1 alone"),
    ({"batches": lambda *a: (X[:5], Y[:5])}, r"shapes \(5, 4\) and \(5,\) for count=2.*\[2, B, …\]"),
    ({"batches": lambda *a: (X[None].numpy(), Y[None])}, r"returned \(ndarray, a tensor of shape \(1, 40\)\)"),
    ({"loss": lambda w, b: (1.0, {})}, r"returned \(float, dict\); it must return \(loss, \{\}\)"),
    ({"loss": lambda w, b: w["0.bias"].sum()}, r"a tensor of shape \(\); it must return \(loss, \{\}\)"),
    ({"loss": lambda w, b: (w["0.bias"], {})}, r"\(a tensor of shape \(6,\), dict\).*a scalar tensor"),
    ({"loss": lambda w, b: (w["0.bias"].sum(), {"a": "b"})}, "reports `a` as str"),
    ({"loss": lambda w, b: (w["0.bias"].sum() / 0 * 0, {})}, "is nan at the start of a problem"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_functions_are_looked_at_when_the_first_problem_is_drawn(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(own(), **changes).sample("train", seed=0, start=0, count=1)


def test_problems_of_different_shapes_are_refused() -> None:
    family = replace(own(), start=lambda seed: {"0.bias": torch.ones(1 + seed % 7)}, loss=lambda w, b: (w["0.bias"].sum(), {}))
    with pytest.raises(ValueError, match=r"different shapes.*make several families"):
        family.sample("train", seed=0, start=0, count=8)


def test_a_look_leaves_torchs_generator_alone_and_is_taken_once() -> None:
    calls: list[int] = []
    family = own()
    counted = replace(family, loss=lambda w, b: (calls.append(0), family.loss(w, b))[1])  # type: ignore[func-returns-value]
    before = torch.get_rng_state()
    for start in range(3):
        counted.sample("train", seed=0, start=start, count=2)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), before)


def test_a_family_prints_as_one_line() -> None:
    assert repr(own(unit=0.7)) == "Problems(name='Sequential', unit=0.7, steps=4)"
    assert repr(mo.MetaParams({"w": X}, {"a": Y, "b": Y})) == "MetaParams(160 numbers in weights, 80 numbers in rule)"


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.Linear.forward(self, x)
        return y if y.sum().item() < 1e9 else 2 * y


NORM = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def counting(weights: Any, batch: Any) -> Any:
    return CROSS(functional_call(NORM, weights, (batch[0],)), batch[1]), {}


STRATEGIES = r'in place of evolution strategies.*estimator="truncated" with engine='
LOOP = r', or batching="loop" with runtime="eager" \(in training: engine='


def test_advice_says_what_helps_where_it_is_given() -> None:
    branching, writing = own(lambda: Branches(4, 2)), replace(own(), loss=counting)
    engine = {"batching": "vmap", "memory": "graph", "runtime": "eager"}
    with pytest.raises(ValueError, match=rf"\(Branches\) branches on a value.*{STRATEGIES}"):
        learn(branching)
    with pytest.raises(ValueError, match=rf"writes into a tensor in place.*mo.nn.convert.*{STRATEGIES}"):
        learn(writing)
    with pytest.raises(ValueError, match=rf"branches on a value.*{LOOP}"):
        learn(branching, estimator="truncated", engine=engine)
    assert learn(branching, estimator="truncated", engine=engine | {"batching": "loop"}).step == 1
    few: dict[str, Any] = {"baselines": ["Adam"], "problems": 2, "seeds": 1, "step_sizes": 1, "progress": False}
    with pytest.raises(ValueError, match=r"\(Branches\) branches.*as in x\[i\[None\]\]\[0\]\.$"):
        lopt.evaluate(mo.rules.SGD(0.1), families=branching, **few)
    with pytest.raises(ValueError, match=r"in place.*count nothing\)\.$"):
        lopt.evaluate(mo.rules.SGD(0.1), families=writing, **few)


def test_members_of_a_mixture_are_trained_alike() -> None:
    both = lopt.mixture(own(), own(Mixed))
    assert trees.flatten(both.sample("train", seed=0, start=0, count=2).support["start"])[0].shape[0] == 2


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.detach().sin()


def half_hidden(output: Tensor, target: Tensor) -> Tensor:
    return CROSS(0.5 * output + 0.5 * output.detach(), target)


class Halved:
    """Gradient descent with a step size that is learnt, and half of whose derivative is lost."""

    separable = takes_step = True

    def start(self, weights: Any, generator: Any) -> Any:
        return {"lr": torch.tensor(0.01)}

    def init(self, psi: Any, weights: Any) -> Any:
        return {n: () for n in weights}

    def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
        lr = (psi["lr"] + psi["lr"].detach()) / 2
        return {n: -lr * g for n, g in grads.items()}, state


DESCENT = mo.rules.chain(mo.rules.SGD(1.0), mo.rules.Schedule(0.1))
FAULTS = {
    "layer": (DESCENT, lambda: own(net(Hidden())), "layer `1` (Hidden)"),
    "loss": (DESCENT, lambda: own(loss=half_hidden), "the loss `half_hidden`"),
    "rule": (Halved(), own, "the update rule: its first derivative in `rule: lr`"),
    "unseen": (DESCENT, lambda: replace(own(), loss=unseen(own(loss=half_hidden).loss)), "these problems can't be looked at"),
}


def unseen(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weights, minibatch: loss(weights, minibatch)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("estimator", ["unroll", "truncated"])
def test_a_check_names_what_is_off(fault: str, estimator: str) -> None:
    """In the network of the problems, which is no part of φ; and modes with one gradient are off together."""
    rule, family, words = FAULTS[fault]
    method = lopt.learned_optimizer(rule, family(), estimator, **({"window": 2} if estimator == "truncated" else {}))
    report = mo.check(method, family(), modes=[("loop", "graph", "eager"), ("vmap", "graph", "eager")])
    assert [row.verdict for row in report.modes] == ["off", "off"] and report.modes[0].error == report.modes[1].error
    assert len(report.faults) == 1 and words in report.faults[0]


@pytest.mark.parametrize(("estimator", "window"), [("truncated", 2), ("unroll", None)])
def test_a_training_checks_the_first_gradient(estimator: str, window: int | None) -> None:
    """Of a window too, though the data of the next one are not there."""
    with pytest.warns(UserWarning, match="learned Halved is off from central differences of its own loss by 50"):
        learn(own(), Halved(), estimator=estimator, window=window)


def test_a_comparison_says_that_what_it_calls_exact_is_wrong() -> None:
    with pytest.warns(UserWarning, match=r"by 50\.0%.*What is called exact here is wrong by as much"):
        mo.compare_estimators(lopt.learned_optimizer(Halved(), own(), "pes", window=2), own(), repeats=2)


def test_examples_that_are_not_numbers_are_told_of() -> None:
    x = X.clone()
    x[[7, 9], 2] = float("nan")
    with pytest.warns(UserWarning, match=r"2 of 40 examples hold numbers that are not finite \(the first is number 7\)"):
        own(data=(x, Y), unit=1.0)


class Wide(Halved):
    def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
        return {n: -psi["lr"] * g.double() for n, g in grads.items()}, state


def test_updates_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Wide returns torch\.float64 for the weight `0\.weight`, which is torch\.float32"):
        learn(own(), Wide())


@dataclass(frozen=True)
class Drawn(Halved):
    psi: Any

    def start(self, weights: Any, generator: Any) -> Any:
        return self.psi


@pytest.mark.parametrize(
    ("psi", "words"),
    [
        ([1.0], "returned [1.0]; it must return a dictionary"),
        ({"lr": 0.1}, "returned float for 'lr'"),
        ({"lr": torch.tensor(1)}, "returned torch.int64 for 'lr'"),
        ({"lr": torch.tensor(float("nan"))}, "returned numbers that are not finite for 'lr'"),
    ],
)
@pytest.mark.parametrize("taker", [lambda rule: learn(own(), rule), lambda rule: mo.optim.from_rule(rule)(net().parameters())])
def test_a_rule_that_starts_from_something_else_is_refused(taker: Any, psi: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"`start` of .*") as error:
        taker(Drawn(psi))
    assert words in str(error.value)


def test_a_loss_with_another_number_in_it_is_told_of_where_a_run_goes_on(tmp_path: Path) -> None:
    def family(scale: float) -> lopt.Problems:
        def scaled(output: Tensor, target: Tensor) -> Tensor:
            return scale * CROSS(output, target)

        return own(loss=scaled, unit=1.0)

    learn(family(1.0), out=tmp_path)
    with pytest.warns(UserWarning, match=r"other attributes: loss\.scale was 1\.0 and is 100\.0 here"):
        learn(family(100.0), out=tmp_path, resume=True)
