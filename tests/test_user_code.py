"""Modules, losses and batches as people write them: exact in every setting, and the network comes back as it was."""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Params
from metaoptim.learners import Network

T, S, Q, LR, STEPS = 3, 6, 5, 0.1, 2

FEW = [("auto", "auto", "eager"), ("loop", "graph", "eager"), ("vmap", "graph", "eager"), ("loop", "steps", "eager"),
       ("vmap", "mixed", "eager"), ("vmap", "graph", "trace")]  # fmt: skip
CRASHED = ("vmap", "mixed", "trace")  # the process, with F.mse_loss as torch has it
MORE = [("vmap:2", "graph", "eager"), ("vmap", "steps", "eager"), ("loop", "mixed", "eager"), ("loop", "graph", "trace"),
        ("workers:2", "graph", "trace"), ("loop", "steps", "trace"), ("vmap", "steps", "trace"),
        ("loop", "mixed", "trace"), CRASHED]  # fmt: skip
SETTINGS = [*FEW[:-1], *(pytest.param(*how, marks=pytest.mark.slow) for how in (FEW[-1], *MORE))]


class MLP(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b, self.temp = nn.Linear(4, 8), nn.Linear(8, 2), 1.0

    def forward(self, x: Any) -> Any:
        return self.b(torch.tanh(self.a(x))) / self.temp


class Shared(nn.Module):
    """One PReLU and one Linear, each under two names."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.p, self.b = nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)
        self.q, self.c = self.p, self.a

    def forward(self, x: Tensor) -> Any:
        return self.b(self.q(self.c(self.p(self.a(x)))))


class ReturnsTuple(MLP):
    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.b(h), h


class ReturnsDict(MLP):
    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return {"out": self.b(h), "h": h}


class TakesDict(MLP):
    def forward(self, x: dict[str, Tensor]) -> Any:
        return MLP.forward(self, x["u"] + x["v"])


class TakesTuple(MLP):
    def forward(self, x: tuple[Tensor, Tensor]) -> Any:
        u, v = x
        return MLP.forward(self, u + v)


class Segments(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


class Complex(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.w, self.b = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b((x.to(self.w.dtype) @ self.w).abs())


class Remembers(MLP):
    """Keeps what it computed, as people do to look at it later."""

    def __init__(self) -> None:
        MLP.__init__(self)
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.last = torch.tanh(self.a(x))
        self.history.append(self.last)
        return self.b(self.last)


class Listed(MLP):
    """Finds its layers in a list."""

    def __init__(self) -> None:
        MLP.__init__(self)
        self.layers = [self.a, self.b]

    def forward(self, x: Tensor) -> Any:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class WeightedLoss(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 0.7], dtype=torch.float64), label_smoothing=0.1)

    def forward(self, output: Tensor, target: Tensor) -> Any:
        return self.inner(output, target)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers() -> Any:
    return ((drawn(T, S, 4), drawn(T, S, 2, seed=1)), (drawn(T, Q, 4, seed=2), drawn(T, Q, 2, seed=3)))


def classes() -> Any:
    (xs, ys), (xq, yq) = numbers()
    return ((xs, (ys[..., 0] > 0).long()), (xq, (yq[..., 0] > 0).long()))


def pixels() -> Any:
    x, y = drawn(T, S + Q, 1, 4, 4), (drawn(T, S + Q, 4, 4, seed=1) > 0).long()
    return ((x[:, :S], y[:, :S]), (x[:, S:], y[:, S:]))


def inputs(make: Callable[[Tensor], Any]) -> Callable[[], Any]:
    return lambda: tuple((make(x), y) for x, y in numbers())


def rmse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target).sqrt()


def mse_and_penalty(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + 0.01 * output.square().mean()


def one_hot(loss: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda output, target: loss(output, F.one_hot(target, 2).to(output.dtype))


def gaussian(output: Tensor, target: Tensor) -> Tensor:
    return F.gaussian_nll_loss(output[:, :1], target[:, :1], F.softplus(output[:, 1:]))


class Case(NamedTuple):
    net: Callable[[], nn.Module]
    loss: Callable[..., Any]
    data: Callable[[], Any]


CASES = {
    "F.mse_loss": Case(MLP, F.mse_loss, numbers),
    "nn.MSELoss": Case(MLP, nn.MSELoss(), numbers),
    "RMSE": Case(MLP, rmse, numbers),
    "MSE and a penalty": Case(MLP, mse_and_penalty, numbers),
    "F.huber_loss": Case(MLP, F.huber_loss, numbers),
    "nn.SmoothL1Loss": Case(MLP, nn.SmoothL1Loss(), numbers),
    "F.l1_loss": Case(MLP, F.l1_loss, numbers),
    "F.gaussian_nll_loss": Case(MLP, gaussian, numbers),
    "F.poisson_nll_loss": Case(MLP, lambda x, y: F.poisson_nll_loss(x, y.abs()), numbers),
    "F.cross_entropy": Case(MLP, F.cross_entropy, classes),
    "a loss that is a module": Case(MLP, WeightedLoss(), classes),
    "F.nll_loss": Case(MLP, lambda x, y: F.nll_loss(F.log_softmax(x, 1), y), classes),
    "BCE with logits": Case(MLP, one_hot(F.binary_cross_entropy_with_logits), classes),
    "BCE": Case(MLP, one_hot(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y)), classes),
    "F.kl_div": Case(MLP, one_hot(lambda x, y: F.kl_div(F.log_softmax(x, 1), 0.8 * y + 0.1, reduction="batchmean")), classes),
    "F.soft_margin_loss": Case(MLP, one_hot(lambda x, y: F.soft_margin_loss(x, 2 * y - 1)), classes),
    "F.cosine_embedding_loss": Case(MLP, lambda x, y: F.cosine_embedding_loss(x, y, torch.ones_like(x[:, 0])), numbers),
    "F.triplet_margin_loss": Case(MLP, lambda x, y: F.triplet_margin_loss(x, y, -y), numbers),
    "a module under two names": Case(Shared, F.mse_loss, numbers),
    "a model that returns a tuple": Case(ReturnsTuple, lambda x, y: F.mse_loss(x[0], y), numbers),
    "a model that returns a dict": Case(ReturnsDict, lambda x, y: F.mse_loss(x["out"], y), numbers),
    "a dict of inputs": Case(TakesDict, F.mse_loss, inputs(lambda x: {"u": x, "v": 0.5 * x})),
    "a tuple of inputs": Case(TakesTuple, F.mse_loss, inputs(lambda x: (x, 0.5 * x))),
    "a dict of targets": Case(MLP, lambda x, y: F.mse_loss(x, y["y"]), lambda: tuple((x, {"y": y}) for x, y in numbers())),
    "segmentation": Case(Segments, F.cross_entropy, pixels),
    "complex weights": Case(Complex, F.mse_loss, numbers),
    "a model that keeps what it computed": Case(Remembers, F.mse_loss, numbers),
    "layers in a list": Case(Listed, F.mse_loss, numbers),
}


def task(data: Any, t: int) -> Any:
    return trees.map_tensors(lambda x: x[t], data)


def by_hand(net: nn.Module, loss: Callable[..., Any], data: Any, steps: int = STEPS) -> Params:
    """MAML as a plain loop over tasks; a fresh copy for every call, because `functional_call` forgets shared weights."""
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}

    def judged(weights: Params, batch: Any) -> Tensor:
        found: Tensor = loss(functional_call(copy.deepcopy(net), weights, (batch[0],)), batch[1])
        return found

    for t in range(T):
        support, query = task(data, t)
        start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        fast = start
        for _ in range(steps):
            grads = torch.autograd.grad(judged(fast, support), list(fast.values()), create_graph=True)
            fast = {n: p - LR * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        grads = torch.autograd.grad(judged(fast, query), list(start.values()))
        total = {n: total[n] + g / T for n, g in zip(total, grads, strict=True)}
    return total


def gradient(module: mo.MetaModule) -> Params:
    return {n: p.grad for n, p in module.weights.named_parameters() if p.grad is not None}


def check_same(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("batching", "memory", "runtime"), SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_the_meta_gradient_is_exact_and_the_network_comes_back(name: str, batching: str, memory: str, runtime: str) -> None:
    case = CASES[name]
    net, data = case.net(), case.data()
    expected, before = by_hand(net, case.loss, data), [(id(m), dict(vars(m)), dict(m._parameters)) for m in net.modules()]
    module = mo.MetaModule(mo.maml(net, case.loss, lr=LR, steps=STEPS), batching, memory, runtime)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            module.zero_grad()
            module.backward(data)
    check_same(gradient(module), expected)
    for (_, attributes, parameters), part in zip(before, net.modules(), strict=True):
        assert vars(part).keys() == attributes.keys() and all(vars(part)[n] is x for n, x in attributes.items())
        assert all(part._parameters[n] is p for n, p in parameters.items())
    if isinstance(net, Remembers):
        assert net.history == []
    copy.deepcopy(net)  # which torch refuses where anything of a graph was left behind
    check_same(by_hand(net, case.loss, data), expected)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", ["F.mse_loss", *(pytest.param(n, marks=pytest.mark.slow)
                                                  for n in ("RMSE", "F.huber_loss", "F.soft_margin_loss"))])  # fmt: skip
def test_losses_without_a_forward_mode_end_no_process(name: str) -> None:
    test_the_meta_gradient_is_exact_and_the_network_comes_back(name, *CRASHED)


@pytest.mark.usefixtures("doubles")
def test_a_failed_call_leaves_the_network_alone() -> None:
    class Fails(Shared):
        def forward(self, x: Tensor) -> Any:
            self.seen = Shared.forward(self, x)
            raise RuntimeError("nothing works")

    net = Fails()
    kept = {n: (p, p.detach().clone()) for n, p in net.named_parameters(remove_duplicate=False)}
    for how in FEW:
        with pytest.raises(ValueError, match="nothing works"):
            mo.MetaModule(mo.maml(net, F.mse_loss), *how).backward(numbers())
    assert "seen" not in vars(net)
    now = dict(net.named_parameters(remove_duplicate=False))
    assert all(now[n] is p and torch.equal(p, values) for n, (p, values) in kept.items())


class Counts(MLP):
    steps: Tensor

    def __init__(self) -> None:
        MLP.__init__(self)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.steps += 1
        return MLP.forward(self, x) * (1 + self.steps)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("how", [("loop", "graph", "eager"), ("vmap", "steps", "eager"), ("vmap", "graph", "trace")])
def test_a_buffer_that_counts_is_set_back_with_a_word(how: tuple[str, str, str]) -> None:
    net = Counts()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), *how)
    with pytest.warns(UserWarning, match=r"Counts changes `steps` while it runs, which is set back after each call"):
        module.backward(numbers())
    assert net.steps == 0
    check_same(gradient(module), by_hand(net, F.mse_loss, numbers()))


class Reassigns(MLP):
    n: Tensor

    def __init__(self) -> None:
        MLP.__init__(self)
        self.register_buffer("n", torch.zeros(()))
        self.seen: list[int] = []


class NextBuffer(Reassigns):
    def forward(self, x: Tensor) -> Any:
        self.n = self.n + 1
        return MLP.forward(self, x)


class Appends(Reassigns):
    def forward(self, x: Tensor) -> Any:
        self.seen.append(len(x))
        return MLP.forward(self, x)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("kind", "name"), [(NextBuffer, "n"), (Appends, "seen")])
def test_what_a_forward_pass_puts_elsewhere_is_set_back_with_a_word(kind: type[Reassigns], name: str) -> None:
    net = kind()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS))
    with pytest.warns(UserWarning, match=rf"{kind.__name__} changes `{name}` while it runs, which is set back"):
        module.backward(numbers())
    assert net.n == 0 and net.seen == []


class Normalised(nn.Module):
    """A network with stored statistics, as pretrained ones have them."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.n, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.n.running_mean, self.n.running_var = torch.randn(6), torch.rand(6) + 0.5

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.n(self.a(x))))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("batching", "memory", "runtime"), SETTINGS)
def test_stored_statistics_work_as_they_are(batching: str, memory: str, runtime: str, training: bool) -> None:
    net = Normalised()
    expected = by_hand(net.eval(), F.mse_loss, numbers())
    method = mo.maml(net.train(training), F.mse_loss, lr=LR, steps=STEPS, normalisation="frozen")
    kept = {n: x.clone() for n, x in net.named_buffers()}
    module = mo.MetaModule(method, batching, memory, runtime)
    module.backward(numbers())
    check_same(gradient(module), expected)
    assert all(torch.equal(x, kept[n]) for n, x in net.named_buffers())


def test_accuracy_is_along_the_axis_of_classes() -> None:
    output, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    output[0, 1] = 1.0  # the first image is all class 1, and the second all class 0
    network = Network(nn.Identity(), F.cross_entropy)
    assert network.judge(output, target)[1]["accuracy"] == 0.5
    assert Network(nn.Identity(), mo.losses.cross_entropy).judge(output.movedim(1, -1), target)[1]["accuracy"] == 0.5


# --- What changes between calls -----------------------------------------------------------------------------------------

WEIGHT = 1.0


class Stages(MLP):
    scale = 1.0
    buffer: Tensor

    def __init__(self) -> None:
        MLP.__init__(self)
        self.drop, self.stage, self.factors = nn.Dropout(0.0), 0, [1.0]
        self.register_buffer("buffer", torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x)) * self.buffer * self.scale * self.factors[0]
        return self.b(self.drop(2 * h if self.stage else h)) / self.temp


def annealed() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], None]]:
    weight = 1.0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return WEIGHT * weight * F.mse_loss(output, target)

    def anneal(value: float) -> None:
        nonlocal weight
        weight = value

    return loss, anneal


def replace_layer(net: Stages) -> None:
    net.b = nn.Linear(8, 2)
    net.add_module("drop", nn.Sequential(nn.Dropout(0.0), nn.Tanh()))


CHANGES: dict[str, Callable[[Stages], object]] = {
    "an attribute": lambda net: setattr(net, "temp", 2.0),
    "a rate of dropout": lambda net: setattr(net.drop, "p", 0.5),
    "a buffer reassigned": lambda net: setattr(net, "buffer", 2 * net.buffer),
    "a buffer in place": lambda net: net.buffer.mul_(1.5),
    "a layer": replace_layer,
    "a flag": lambda net: setattr(net, "stage", 1),
    "a list in an attribute": lambda net: net.factors.__setitem__(0, 2.0),
    "a hook": lambda net: net.a.register_forward_hook(lambda m, i, o: 2 * o),
    "the mode": lambda net: (setattr(net.drop, "p", 0.5), net.eval()),
    "a new attribute": lambda net: setattr(net, "temp", torch.tensor(3.0)),
}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("how", [("vmap", "graph", "trace"), ("loop", "steps", "trace")])
@pytest.mark.parametrize("change", [*CHANGES, "a closure", "a global", "a class"])
def test_what_changes_between_calls_is_seen(change: str, how: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, (loss, anneal) = Stages(), annealed()
    method = mo.maml(net, loss, lr=LR, steps=STEPS)
    traced, plain = mo.MetaModule(method, *how), mo.MetaModule(method, "loop", "graph", "eager")

    def both() -> tuple[Params, Params]:
        for module in (traced, plain):
            torch.manual_seed(0)
            module.zero_grad()
            module.backward(numbers())
        return gradient(traced), gradient(plain)

    before = {n: g.clone() for n, g in both()[1].items()}
    if change == "a closure":
        anneal(3.0)
    elif change == "a global":
        monkeypatch.setattr(f"{__name__}.WEIGHT", 2.0)
    elif change == "a class":
        monkeypatch.setattr(Stages, "scale", 3.0)
    else:
        CHANGES[change](net)
    found, expected = both()
    check_same(found, expected)
    if change != "the mode":
        assert any(not torch.allclose(g, before[n]) for n, g in expected.items()), "the change matters"


@pytest.mark.usefixtures("doubles")
@pytest.mark.slow
def test_what_changes_from_step_to_step_ends_the_graphs_with_a_word() -> None:
    net = Stages()
    traced = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), "vmap", "graph", "trace")
    with pytest.warns(UserWarning, match=r"`the learner\.model\.net\.temp` changes from step to step\. From here on: loop"):
        for step in range(12):
            net.temp = 1.0 + step
            traced.zero_grad()
            traced.backward(numbers())
    check_same(gradient(traced), by_hand(net, F.mse_loss, numbers()))


class Noisy(MLP):
    def forward(self, x: Tensor) -> Any:
        return MLP.forward(self, x) * self.draw()

    def draw(self) -> float:
        raise NotImplementedError


class ByNumPy(Noisy):
    def draw(self) -> float:
        return float(np.random.rand())


class ByPython(Noisy):
    def draw(self) -> float:
        return random.random()


class ByClock(Noisy):
    def draw(self) -> float:
        return time.perf_counter()


SETTINGS = ModuleType("settings")
vars(SETTINGS)["scale"] = 2.0


class ByText(Noisy):
    def draw(self) -> float:
        return float(eval("random.random()"))


class ByFile(Noisy):
    def draw(self) -> float:
        with open(os.devnull) as file:
            return len(file.read()) + random.random()


class ByModules(Noisy):
    def draw(self) -> float:
        chance: Any = sys.modules["random"]
        return float(chance.random())


class ByNameOfAModule(Noisy):
    def draw(self) -> float:
        return float(getattr(SETTINGS, "sc" + "ale"))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("kind", [ByText, ByFile, ByModules, ByNameOfAModule])
def test_values_from_where_no_guard_can_look_are_never_frozen(kind: type[Noisy]) -> None:
    module = mo.MetaModule(mo.maml(kind(), F.mse_loss, lr=LR, steps=STEPS), "vmap", "graph", "trace")
    words = {ByText: "`eval`", ByFile: "`open`", ByModules: "`sys.modules`", ByNameOfAModule: "`SETTINGS`.*getattr"}
    with pytest.warns(UserWarning, match=rf"{words[kind]}.* can't be seen\. From here on: loop"):
        module.backward(numbers())


NOISE = random.Random(0)  # nobody can see what changes in it


class OfTheSameName(MLP):
    NOISE = 2.0

    def forward(self, x: Tensor) -> Any:
        return MLP.forward(self, x) * self.NOISE


@pytest.mark.usefixtures("doubles")
def test_an_attribute_is_not_taken_for_a_global_of_its_name() -> None:
    net = OfTheSameName()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), "vmap", "graph", "trace")
    for scale in (2.0, 3.0):
        net.NOISE = scale
        module.zero_grad()
        module.backward(numbers())
        check_same(gradient(module), by_hand(net, F.mse_loss, numbers()))
    assert module.engine.choice[:3] == ("vmap", "graph", "trace")


class ByEnvironment(Noisy):
    def draw(self) -> float:
        return float(os.environ.get("METAOPTIM_TEST_SCALE", "1"))


@pytest.mark.usefixtures("doubles")
def test_a_changed_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ByEnvironment()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), "vmap", "graph", "trace")
    for scale in ("1", "2", "1"):
        monkeypatch.setenv("METAOPTIM_TEST_SCALE", scale)
        module.zero_grad()
        module.backward(numbers())
        check_same(gradient(module), by_hand(net, F.mse_loss, numbers()))
    assert module.engine.choice[:3] == ("vmap", "graph", "trace")


class WritesItsInput(MLP):
    def forward(self, x: Tensor) -> Any:
        x += 1
        return MLP.forward(self, x)


@pytest.mark.parametrize("memory", ["auto", "graph", "steps"])
def test_a_forward_pass_that_writes_into_its_data_is_refused(memory: str) -> None:
    batch = numbers()
    before = batch[0][0].clone()
    for net in (WritesItsInput(), nn.Sequential(nn.ReLU(inplace=True), MLP())):
        with pytest.raises(ValueError, match=r"writes into the support set .* compute with a changed copy"):
            mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), memory=memory).backward(batch)
    assert batch[0][0].equal(before)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("batching", "memory"), [("loop", "graph"), ("vmap", "graph"), ("loop", "steps")])
@pytest.mark.parametrize(("kind", "words"), [(ByNumPy, "`numpy.random`"), (ByPython, "`random`"), (ByClock, "the time")])
def test_numbers_that_no_graph_sees_are_never_frozen(kind: type[Noisy], words: str, batching: str, memory: str) -> None:
    module = mo.MetaModule(mo.maml(kind(), F.mse_loss, lr=LR, steps=STEPS), batching, memory, "trace")
    with pytest.warns(UserWarning, match=rf"{words}.*From here on: loop"):
        first = module.backward(numbers())
    assert module.backward(numbers()) != first


# --- Threads, copies, autocast ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("doubles")
def test_two_threads_on_one_network_get_their_own_gradients() -> None:
    net = MLP()
    modules = [mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR), "loop", "graph", "eager") for _ in range(2)]
    with torch.no_grad():
        for p in modules[1].parameters():
            p.add_(1.0)
    found: list[list[Params]] = [[], []]

    def work(i: int) -> None:
        for _ in range(20):
            modules[i].zero_grad()
            modules[i].backward(numbers())
            found[i].append({n: g.clone() for n, g in gradient(modules[i]).items()})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, module in enumerate(modules):
        module.zero_grad()
        module.backward(numbers())
        assert len(found[i]) == 20
        for one in found[i]:
            check_same(one, gradient(module))


@pytest.mark.parametrize("how", [("vmap", "graph", "trace"), ("workers:2", "graph", "trace"), ("auto", "auto", "eager")])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.slow
def test_a_module_can_be_copied_at_any_time(copied: Callable[[Any], Any], how: tuple[str, str, str]) -> None:
    module = mo.MetaModule(mo.reptile(MLP(), F.mse_loss, batch_size=None), *how)
    first = copied(module)
    module.backward(numbers())
    second = copied(module)
    for other in (first, second):
        other.zero_grad()
        other.backward(numbers())
    assert all(p.grad is not None for p in second.parameters())


def test_a_carry_goes_round_in_the_state_dict() -> None:
    def make() -> mo.MetaModule:
        torch.manual_seed(0)
        return mo.MetaModule(mo.reptile(MLP(), F.mse_loss, batch_size=None))

    module, other = make(), make()
    module.backward(numbers())
    other.load_state_dict(module.state_dict())
    assert other.outer_step == 1 and other.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(module.backward(numbers()), other.backward(numbers()))
    assert not torch.equal(make().backward(numbers()), other.backward(numbers()))


def test_the_weights_state_dict_is_one_of_the_network() -> None:
    class Both(Shared):
        def __init__(self) -> None:
            Shared.__init__(self)
            self.n = nn.BatchNorm1d(4)

    net, other = Both(), Both()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, normalisation="frozen"))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    other.load_state_dict(module.weights.state_dict())
    assert torch.equal(other.a.weight, net.a.weight + 1) and other.c is other.a


def test_train_eval_and_requires_grad_mean_what_they_say() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    module = mo.MetaModule(mo.maml(net, F.mse_loss))
    assert not module.eval().training and not net[1].training
    assert torch.equal(module.estimate(numbers()).loss, module.estimate(numbers()).loss)
    assert net[1].training is False and module.train() and net[1].training is True
    module.weights.get_parameter("0.weight").requires_grad_(False)
    module.backward(numbers())
    assert module.weights.get_parameter("0.weight").grad is None
    assert module.weights.get_parameter("2.weight").grad is not None


@pytest.mark.parametrize("how", [*FEW[:4], ("vmap", "graph", "trace"), ("loop", "steps", "trace")])
def test_a_surrounding_autocast_is_honoured(how: tuple[str, str, str]) -> None:
    net = MLP()
    module = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), *how)
    losses = []
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(module.estimate(numbers()).loss.item())
    half = mo.MetaModule(mo.maml(net, F.mse_loss, lr=LR, steps=STEPS), "loop", "graph", "eager", "bf16")
    assert losses[0] == losses[2] != losses[1]
    assert losses[0] == pytest.approx(half.estimate(numbers()).loss.item(), rel=1e-2)


class Jitters:
    """A rule as people write it, with noise of its own."""

    takes_step = True

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> Any:
        return {n: torch.rand_like(w) for n, w in weights.items()}

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
        return {n: -0.1 * (g + 0.5 * torch.randn_like(g) + 0.1 * state[n]) for n, g in grads.items()}, state


class Unkeyed(Jitters):
    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
        return {n: -0.1 * (g + torch.randn(g.shape)) for n, g in grads.items()}, state


RULED: dict[str, Callable[[Any], Any]] = {
    "alone": lambda rule: rule,
    "in a chain": lambda rule: mo.rules.chain(mo.rules.Clip(norm=1.0), rule),
}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("within", RULED)
def test_a_rule_that_draws_gives_the_same_numbers_in_every_way(within: str) -> None:
    torch.manual_seed(0)
    method = mo.compose(MLP(), F.mse_loss, rule=RULED[within](Jitters()), steps=STEPS)

    def by(how: Any, seed: int) -> Params:
        torch.manual_seed(seed)
        module = mo.MetaModule(method, *how)
        module.backward(numbers())
        return gradient(module)

    first = by(FEW[1], 1)
    for how in [*FEW[2:], ("workers:2", "graph", "trace")]:
        check_same(by(how, 1), first)
    other = by(FEW[1], 2)
    assert any(not torch.equal(other[n], first[n]) for n in first)


def test_a_rule_that_draws_what_no_key_determines_is_refused_with_a_way_out() -> None:
    method = mo.compose(MLP(), F.mse_loss, rule=Unkeyed(), steps=STEPS)
    with pytest.raises(ValueError, match=r"the model or the rule draws random numbers by torch's randn, .* torch\.randn_like"):
        mo.MetaModule(method).backward(numbers())
