"""The default: a rule, a gate, a loop to fall back to, a journal of attempts; and sentences that blame what is at fault."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Params, Step, Task
from metaoptim.engine import Choice, Engine
from metaoptim.engine.autotune import cache
from metaoptim.engine.autotune.search import Row, Search
from metaoptim.engine.executor import Executor
from metaoptim.engine.rule import by_rule, one_step
from metaoptim.nn import conv4, mlp

T = 5


def batch(count: int = T, rows: int = 6) -> Task:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 2 * rows, 3, generator=draw), torch.randn(count, 2 * rows, 2, generator=draw)
    return Task((x[:, :rows], y[:, :rows]), (x[:, rows:], y[:, rows:]))


def method(net: nn.Module | None = None, loss: Callable[..., Any] = F.mse_loss, **how: Any) -> mo.MetaOptimizer:
    torch.manual_seed(0)
    return mo.maml(net or mlp((3, 8, 2)), loss, **({"steps": 2} | how))


def ruled(m: mo.MetaOptimizer, tasks: Task, budget: int = 2**40) -> Choice:
    return by_rule(m, m.phi, tasks, ("auto", "auto", "auto"), budget)


# --- The rule -----------------------------------------------------------------------------------------------------------


def test_small_models_and_many_tasks_are_mapped() -> None:
    assert ruled(method(), batch())[:3] == ("vmap", "graph", "eager")
    assert ruled(method(), batch(count=2)).batching == "loop", "too few tasks"
    assert ruled(method(mlp((3, 2000, 2000, 2))), batch()).batching == "loop", "too much to compute"
    images = Task(*[(torch.rand(T, 5, 1, 28, 28), torch.arange(5).expand(T, 5))] * 2)
    assert ruled(mo.maml(conv4(ways=5, filters=4), mo.losses.cross_entropy), images).batching == "loop", "convolutions"


def test_states_are_kept_where_the_graph_does_not_fit() -> None:
    m = method(steps=10)
    bytes_of_a_step = one_step(m, m.phi, batch())
    assert bytes_of_a_step > 6 * 8 * 4
    assert ruled(m, batch(), budget=10 * T * bytes_of_a_step).memory == "graph"
    assert ruled(m, batch(), budget=10 * T * bytes_of_a_step - 1).memory == "steps"
    assert ruled(method(steps=1), batch(), budget=1).memory == "graph", "there is nothing to save"


def test_nothing_is_timed_and_two_runs_are_equal(empty_cache: Path) -> None:
    losses = []
    for _ in range(2):
        module = mo.MetaModule(method())
        losses.append([module.backward(batch()).item() for _ in range(3)])
        assert module.engine.choice is not None and module.engine.choice.by == "rule"
    assert losses[0] == losses[1] and not list(empty_cache.rglob("*.json"))


# --- Falling back -------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y if y.sum() > 0 else 2 * y


def test_the_loop_takes_over_where_a_map_fails_with_one_warning() -> None:
    m = method(Branches())
    module = mo.MetaModule(m)
    with pytest.warns(UserWarning, match=r"vmap, graph, eager: .*\(Branches\) branches on a value.* From here on: loop, graph"):
        module.backward(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.backward(batch())
    named = mo.MetaModule(m, "loop", "graph", "eager")
    named.backward(batch())
    named.backward(batch())
    for p, q in zip(module.parameters(), named.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_a_way_with_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, m = import_module("metaoptim.engine.engine"), method()

    class Wrong(Executor):
        def __call__(self, *args: Any) -> Any:
            found = super().__call__(*args)
            if self.batching == "loop":
                return found
            return found._replace(grad=mo.MetaParams({n: 1.01 * g for n, g in found.grad.weights.items()}, {}))

    monkeypatch.setattr(engine, "Executor", Wrong)
    module = mo.MetaModule(m)
    with pytest.warns(UserWarning, match=r"vmap.*its meta-gradient is 1 % off that of the plain loop"):
        module.backward(batch())
    assert module.engine.choice is not None and module.engine.choice.batching == "loop"
    right = mo.MetaModule(m, "loop", "graph", "eager")
    right.backward(batch())
    for p, q in zip(module.parameters(), right.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_what_a_graph_can_not_see_is_told_with_how_long_ago_it_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = import_module("metaoptim.engine.engine")
    module = mo.MetaModule(method(), runtime="auto", wait=0)
    for _ in range(4):
        module.backward(batch())
    monkeypatch.setattr(engine, "gap", lambda *args: 1.234)
    with pytest.warns(UserWarning, match=r"is 123 % off that of the plain loop, and was not 4 calls ago: .* reads something"):
        for _ in range(4):
            module.backward(batch())


class Kinked(nn.Module):
    """Its ReLU is at 0 but for rounding, on one side of it or the other."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.w = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Tensor) -> Any:
        zero = self.w[0] * x + self.w[1] * x - self.w[2] * x
        return self.a(x) + 10 * torch.relu(zero).sum(1, keepdim=True)


def test_a_way_that_rounds_otherwise_is_no_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, m = import_module("metaoptim.engine.engine"), method(Kinked())

    class Rounded(Executor):
        def __call__(self, phi: Any, *args: Any) -> Any:
            if self.batching == "loop":
                return super().__call__(phi, *args)
            up = trees.map_tensors(lambda x: x * (1 + 2 * torch.finfo(x.dtype).eps), phi)
            return super().__call__(up, *args)

    expected = Executor(m, "loop", "graph", "eager")(m.phi, batch(), (), 0).grad.weights["w"]
    monkeypatch.setattr(engine, "Executor", Rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Engine(m, batching="vmap")(m.phi, batch()).grad.weights["w"]
    assert torch.dist(found, expected) > 0.01 * expected.norm(), "rounding matters here"


def test_a_way_that_is_off_at_one_phi_alone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one ReLU's input in a million is 0 but for rounding: three other roundings of φ have none."""
    engine, m = import_module("metaoptim.engine.engine"), method()

    class Rare(Executor):
        def __call__(self, phi: Any, *args: Any) -> Any:
            found = super().__call__(phi, *args)
            if self.batching == "loop" or any(not torch.equal(phi.weights[n], w) for n, w in m.phi.weights.items()):
                return found
            return found._replace(grad=mo.MetaParams({n: 1.01 * g for n, g in found.grad.weights.items()}, {}))

    monkeypatch.setattr(engine, "Executor", Rare)
    default = Engine(m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default(m.phi, batch())
    assert default.choice is not None and default.choice.batching == "vmap"


def test_a_measured_way_is_held_to_the_loop_ever_more_rarely(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, m, seen = import_module("metaoptim.engine.engine"), method(), list[tuple[int, str]]()

    class Counts(Executor):
        def __call__(self, phi: Any, tasks: Any, carry: Any, step: int) -> Any:
            seen.append((step, self.batching))
            return super().__call__(phi, tasks, carry, step)

    monkeypatch.setattr(engine, "Executor", Counts)
    whole = Engine(m, choice="vmap graph trace")
    for step in range(9):
        whole(m.phi, batch(), None, step)
    assert [step for step, way in seen if way == "loop"] == [0, 1, 3, 7]
    seen.clear()
    again = Engine(m, choice="vmap graph trace")
    for _ in range(9):
        again(m.phi, batch())
    assert [way for _, way in seen].count("loop") == 4, "whether or not anybody counts the outer steps"
    assert not list(empty_cache.rglob("*.json")), "a choice that is given is not measured"


def test_an_error_of_the_users_own_is_raised_as_it_is() -> None:
    class Fails(Branches):
        def forward(self, x: Tensor) -> Any:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mo.MetaModule(method(Fails())).backward(batch())


# --- The journal --------------------------------------------------------------------------------------------------------


def test_a_way_during_which_a_process_ended_is_not_tried_again(empty_cache: Path) -> None:
    with pytest.raises(SystemExit), cache.Journal("k")(("vmap", "graph", "eager")):
        raise SystemExit
    assert not cache.Journal("k").died(("vmap", "graph", "eager")), "it came to an end of its own"
    open_ = cache.Journal("k")(("vmap", "graph", "trace"))
    open_.__enter__()  # and the process ends here
    journal = cache.Journal("k")
    assert journal.died(("vmap", "graph", "trace")) and not journal.died(("loop", "graph", "trace"))
    device = torch.device("cpu")
    search = Search(lambda how: lambda: 1.0, ("auto", "graph", "auto"), ("graph",), 4, 1, 0, 2**40, device, 10**5,
                    attempt=journal)  # fmt: skip
    rows = search.run().rows
    notes = [r.note for r in rows if r[:3] == ("vmap", "graph", "trace")]
    assert notes == ["not tried: an earlier process ended while it tried this"]
    assert cache.Journal("k").died(("vmap", "graph", "trace")), "what was tried since has not struck it out"


def test_failures_are_not_remembered(empty_cache: Path) -> None:
    cache.write("k", [Row("loop", "graph", "eager", 0.1), Row("vmap", "graph", "eager", note="it failed")])
    assert cache.read("k") == [Row("loop", "graph", "eager", 0.1)]


@dataclass(frozen=True)
class Halves:
    """Two rules that print alike."""

    scale: float = 0.5

    def __repr__(self) -> str:
        return "Rule()"

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> Any:
        return {}

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Step) -> tuple[Params, Any]:
        return {n: -self.scale * g for n, g in grads.items()}, state


@dataclass(frozen=True)
class Quarters(Halves):
    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Step) -> tuple[Params, Any]:
        return {n: -0.25 * g for n, g in grads.items()}, state


def test_works_are_told_apart_by_their_code() -> None:
    def key(net: nn.Module, rule: Any) -> str:
        m = mo.compose(net, F.mse_loss, rule=rule, steps=2)
        return cache.key(m, m.phi, batch(), ("auto",))

    class Net(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return self.a(x)

    class Edited(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return self.a(x).tanh()

    Edited.__name__, Edited.__qualname__ = Net.__name__, Net.__qualname__  # the same class, with another forward
    keys = [key(Net(), Halves()), key(Edited(), Halves()), key(Net(), Quarters())]
    assert len(set(keys)) == 3 and key(Net(), Halves()) == keys[0]


def test_the_choice_is_in_the_recipe_and_gives_the_same_floats(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("metaoptim.training.train"), "WAIT", 3)
    how: dict[str, Any] = {"iterations": 6, "tasks_per_step": 4, "validate_every": 0, "progress": False}
    m = method(mlp((1, 8, 1)))
    first = mo.train(m, mo.tasks.sinusoid(), out=tmp_path / "a", **how)
    choice = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())["engine"]["choice"]
    monkeypatch.setattr(Engine, "plan", None)  # nothing is to be measured
    again = mo.train(m, mo.tasks.sinusoid(), engine={"choice": choice}, **how)
    assert all(torch.equal(p, again.phi.weights[n]) for n, p in first.phi.weights.items())


@pytest.mark.parametrize("text", ["vmap graph", "auto graph eager", "vmap graph never", "workers:2 graph eager"])
def test_a_choice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"engine\."):
        Engine(method(), choice=text)
    with pytest.raises(ValueError, match="is none of loop, auto, auto"):
        Engine(method(), "loop", choice="vmap graph trace")


# --- What is told before the first step ---------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Scaled(Branches):
    def forward(self, x: Tensor) -> Any:
        once: Any = Once
        return once.apply(self.a(x))


def test_a_function_that_is_differentiated_once_is_refused_where_that_matters() -> None:
    with pytest.raises(ValueError, match=r"marked @once_differentiable.*or use a first-order method, such as fomaml"):
        mo.MetaModule(method(Scaled()), "loop", "graph", "eager").backward(batch())
    mo.MetaModule(mo.fomaml(Scaled(), F.mse_loss), "loop", "graph", "eager").backward(batch())


def test_a_penalty_on_the_networks_own_weights_is_told() -> None:
    net = mlp((3, 8, 2))

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + 0.1 * sum(p.square().sum() for p in net.parameters())

    with pytest.warns(UserWarning, match=r"the loss `penalised` reads `0\.weight` of the network itself.*stays constant"):
        mo.MetaModule(mo.maml(net, penalised)).backward(batch())
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_that_no_weight_influences_is_told() -> None:
    def nothing(output: Tensor, target: Tensor) -> Tensor:
        return target.square().mean()

    with pytest.warns(UserWarning, match="no weight influences the loss `nothing`: its meta-gradient is zero"):
        mo.MetaModule(method(loss=nothing)).backward(batch())


# --- Who is at fault ----------------------------------------------------------------------------------------------------


class Checkpointed(Branches):
    def forward(self, x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)


class Dynamic(Branches):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y * torch.nonzero(y > -100).shape[0]


class TwoInputs(Branches):
    def forward(self, u: Tensor, v: Tensor) -> Any:
        return self.a(u + v)


class Counting(Branches):
    n: Tensor

    def __init__(self) -> None:
        Branches.__init__(self)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.n += x.mean()
        return self.a(x)


class Twice(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * slope


class Custom(Branches):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) + Twice.apply(self.a(x))


LOOP, VMAP, MIXED = ("loop", "graph", "eager"), ("vmap", "graph", "eager"), ("loop", "mixed", "eager")
FAULTS: dict[str, tuple[nn.Module, Callable[..., Any], tuple[str, str, str], str]] = {
    "a branch": (Branches(), F.mse_loss, VMAP, r'\(Branches\) branches on a value.*batching="loop" with runtime="eager"'),
    "no batching rule": (Dynamic(), F.mse_loss, VMAP, r'\(Dynamic\) does what vmap can\'t map.*or batching="loop" with'),
    "a buffer written in place": (Counting(), F.mse_loss, VMAP, r"\(Counting\) writes into a tensor in place"),
    "no forward mode": (Custom(), F.mse_loss, MIXED, r'\(Custom\) uses a function that has no forward mode.*memory="steps"'),
    "no second derivative": (mlp((3, 8, 2)), lambda x, y: F.multi_margin_loss(x, y.argmax(1)), LOOP,
                             r"uses `multi_margin_loss_backward`, which torch can't differentiate twice"),
    "checkpointing": (Checkpointed(), F.mse_loss, LOOP,
                      r"computes values again in the backward pass .*, with weights that are no longer .*memory=\"steps\""),
    "two inputs": (TwoInputs(), F.mse_loss, LOOP, r"called with the inputs of a batch as one argument, but .*'v'"),
    "data": (nn.Linear(4, 2), F.mse_loss, LOOP, r"the module itself \(Linear\) can't take these data"),
    "a loss of Python's numbers": (mlp((3, 8, 2)), lambda x, y: 1.0, LOOP, r"the loss returned float 1\.0; it must"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_at_fault_is_blamed(name: str) -> None:
    net, loss, how, words = FAULTS[name]
    with pytest.raises(ValueError, match=words):
        mo.MetaModule(mo.maml(net, loss), *how).backward(batch())


@pytest.mark.parametrize("given", [None, 3, [1, 2], (batch().support,), (batch().support, None),
                                   ((torch.ones(2, 3, 1), None), batch().query)])  # fmt: skip
def test_what_is_no_batch_of_tasks_is_one_sentence(given: Any) -> None:
    with pytest.raises(ValueError, match=r"a batch of tasks is Task\(support=\(x, y\), query=\(x, y\)\).*; found "):
        mo.MetaModule(method()).backward(given)


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_running_statistics_name_both_ways_out(policy: Literal["transductive", "inductive"]) -> None:
    with pytest.raises(ValueError, match=r"nn\.convert\(module\).*or use the stored statistics by normalisation=\"frozen\""):
        mo.maml(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), F.mse_loss, normalisation=policy)


def test_the_checkpoints_choice_says_who_made_it(tmp_path: Path) -> None:
    mo.train(method(mlp((1, 8, 1))), mo.tasks.sinusoid(), iterations=1, tasks_per_step=4, out=tmp_path / "run", progress=False,
             validate_every=0)  # fmt: skip
    state = json.loads((tmp_path / "run" / "state.json").read_text())["state"]
    assert state["choice"] == {"batching": "vmap", "memory": "graph", "runtime": "eager", "by": "rule"}


class Renormalised(Branches):
    """Writes into its weight, as max-norm constraints do."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.a.weight.mul_(0.9)
        return self.a(x)


@pytest.mark.parametrize("how", [("auto", "auto", "eager"), LOOP, VMAP, ("vmap", "graph", "trace")])
def test_a_forward_pass_that_writes_into_a_weight_is_refused(how: tuple[str, str, str]) -> None:
    module = mo.MetaModule(method(Renormalised()), *how)
    before = module.weights.get_parameter("a.weight").detach().clone()
    with pytest.raises(ValueError, match=r"a forward pass writes into the weight `a\.weight`, which is for the optimizer"):
        module.backward(batch())
    assert torch.equal(module.weights.get_parameter("a.weight"), before)


def test_inference_mode_has_no_gradients() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode\(\) there are no gradients"):
        mo.MetaModule(method()).backward(batch())


@pytest.mark.parametrize(("support", "words"), [(batch(), "a Task"), (([1.0], [2.0]), "other things than tensors")])
def test_only_a_support_set_is_adapted_to(support: Any, words: str) -> None:
    m = method()
    with pytest.raises(ValueError, match=words):
        mo.Run(m, m.phi).adapt(support)


def test_adapting_and_judging_leave_phi_alone() -> None:
    m = method(Renormalised())
    run = mo.Run(m, m.phi)
    before = {n: p.clone() for n, p in m.phi.weights.items()}
    with pytest.raises(ValueError, match=r"a forward pass writes into the weight `a\.weight`"):
        run.adapt((torch.ones(2, 3), torch.ones(2, 2)))
    assert all(torch.equal(p, before[n]) for n, p in m.phi.weights.items())


def test_a_loss_that_cant_take_the_output_says_so() -> None:
    class Two(Branches):
        def forward(self, x: Tensor) -> Any:
            return self.a(x), x

    with pytest.raises(ValueError, match=r"the loss can't take what the model returned and the targets \(tuple and Tensor: "):
        mo.MetaModule(method(Two())).backward(batch())
    for loss in (mo.losses.mse, mo.losses.cross_entropy):  # whatever the targets are
        words = rf"{loss.__name__}: the model returned tuple; it must return one tensor, or the loss pick it, as in lambda"
        with pytest.raises(ValueError, match=words):
            mo.MetaModule(method(Two(), loss)).backward(batch())
    kind: Any = nn.MSELoss
    with pytest.raises(ValueError, match=r"^loss=MSELoss: it must be a function of \(output, target\), .*not a class\.$"):
        mo.maml(mlp((3, 2)), kind)


def test_the_two_faults_of_a_loss_are_told_apart_from_the_networks() -> None:
    words: Any = "cross_entropy"
    with pytest.raises(
        ValueError, match=r"^loss='cross_entropy': it must be a function of \(output, target\), such as mo\.losses"
    ):
        mo.maml(mlp((3, 2)), words)
    with pytest.raises(
        ValueError, match=r"whole numbers where torch takes floats .* a loss that takes \(output, target\), in this"
    ):
        mo.MetaModule(method(loss=lambda target, output: F.cross_entropy(output, target))).backward(classes())


@pytest.mark.parametrize(("weights", "data", "fix"), [
    (torch.float16, torch.float32, "half"), (torch.bfloat16, torch.float32, "bfloat16"),
    (torch.float32, torch.float64, "float"), (torch.float64, torch.float32, "double"),
])  # fmt: skip
def test_weights_and_data_of_two_types_are_told_what_makes_them_one(weights: Any, data: Any, fix: str) -> None:
    given = trees.map_tensors(lambda x: x.to(data), batch())
    there = {torch.float32: "float", torch.float64: "double"}[data]
    with pytest.raises(ValueError, match=rf"of one type: \.{fix}\(\) of the data, or net\.{there}\(\)"):
        mo.MetaModule(method(mlp((3, 2)).to(weights))).backward(given)


def test_an_axis_too_many_is_told_by_the_axes_that_there_should_be() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.read(x)[0][:, -1])

    m = method(Reads(), F.cross_entropy)
    (xs, ys), query = trees.map_tensors(lambda x: x, classes())
    longer = xs[:, :, None].repeat(1, 1, 5, 1)
    told = r"layer `read` \(GRU\) can't take these data \(GRU: Expected input to be 2D or 3D, got 4D instead\): found"
    with pytest.raises(ValueError, match=told + r".* of inputs and targets of one task's support set, with axes \(S, …\)"):
        mo.Run(m, m.phi).adapt((longer, ys))
    with pytest.raises(ValueError, match=told + r".*, inputs and targets, with axes \(T, S, …\)"):
        mo.MetaModule(m).backward(Task((longer[:, :, None], ys), query))
    assert mo.Run(m, m.phi).adapt((longer[0], ys[0]))(longer[1]).shape == (6, 2)


def classes() -> Task:
    (xs, ys), (xq, yq) = batch()
    return Task((xs, (ys[..., 0] > 0).long()), (xq, (yq[..., 0] > 0).long()))


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_targets_that_broadcast_are_told_of_once_for_sets_of_all_sizes(how: str) -> None:
    x, y = torch.randn(2, 9, 3), torch.randn(2, 9)
    uneven = Task((x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:]))
    with pytest.warns(UserWarning) as seen:
        mo.MetaModule(method(mlp((3, 4, 1))), batching=how).backward(uneven)
    words = r"mse_loss: the targets have shape (B) and the model's outputs (B, 1); they are broadcast"
    assert {str(w.message).partition(", which")[0] for w in seen} == {words}


def test_the_loop_of_articles_stops_before_nan_reaches_the_weights() -> None:
    net, bad = mlp((3, 8, 2)), batch()
    bad.query[0][1, 0, 0] = float("nan")
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"step 1 is not finite, and was not taken: the data of task . hold NaN, in .*query"):
        mo.meta_train(net, optimizer, [bad], 1, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_run_counts_once_as_a_seed() -> None:
    m = method(mlp((1, 8, 1)))
    run = mo.Run(m, m.phi)
    with pytest.raises(ValueError, match="given twice; seeds are counted once"):
        mo.evaluate([run, run], mo.tasks.sinusoid(), episodes=2, progress=False)
