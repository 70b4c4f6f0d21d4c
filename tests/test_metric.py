"""What only the metric and closed-form methods promise: their formulas, written out, and the equivalences between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.algorithms.example import example_net
from metaoptim.core import linalg, trees
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Task
from metaoptim.engine import Engine
from metaoptim.evaluation.evaluate import with_normalisation
from metaoptim.gradcheck import check
from metaoptim.learners import Network, class_means, members

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")

LOSS = mo.losses.cross_entropy


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def net(inputs: int = 4, features: int = 6, ways: int = 3) -> nn.Module:
    """(B, inputs) -> (B, ways), without a norm, so that a feature is a function of its own input."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, features), nn.Tanh(), nn.Linear(features, ways))


def task(shots: int = 2, ways: int = 3, inputs: int = 4, queries: int = 5) -> tuple[Batch, Batch]:
    g = torch.Generator().manual_seed(2)
    ys, yq = torch.arange(ways).repeat(shots), torch.arange(queries) % ways
    return (torch.randn(len(ys), inputs, generator=g), ys), (torch.randn(queries, inputs, generator=g), yq)


def body(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Sequential)
    z: Tensor = module[:-1](x)
    return z.detach()


def outputs(method: MetaOptimizer, support: Batch, x: Tensor) -> Tensor:
    """What the adapted module makes of inputs."""
    found: Tensor = mo.Run(method, method.phi).adapt(support)(x)
    return found.detach()


def gradient(method: MetaOptimizer, support: Batch, query: Batch) -> MetaParams:
    batch = trees.map_tensors(lambda x: x[None], Task(support, query))
    return Engine(method, "loop", "graph", "eager")(method.phi, batch).grad


# --- Linear algebra -----------------------------------------------------------------------------------------------------


def test_golden_ridge_and_both_of_its_systems() -> None:
    x = torch.tensor([[1.0, 2, 0], [0, 1, 1]])
    golden = [[0.25641026, -0.20512821], [0.30769231, 0.15384615], [-0.20512821, 0.56410256]]
    close(linalg.ridge(x, torch.eye(2), 0.5), torch.tensor(golden), 6e-9)
    for rows, columns in ((3, 5), (5, 5), (7, 4)):  # the smaller system is of the rows, of either, and of the columns
        x, y, lam = torch.randn(rows, columns), torch.randn(rows, 2), torch.tensor(0.7)
        close(linalg.ridge(x, y, lam), torch.linalg.solve(x.T @ x + lam * torch.eye(columns), x.T @ y))
    half = linalg.ridge(x.bfloat16(), y.bfloat16(), 0.7)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_what_is_not_positive_is_not_solved_in_silence() -> None:
    assert linalg.regularised(-torch.eye(3), torch.ones(3, 1), 0.5).isnan().all()
    assert linalg.regularised(-torch.eye(3), torch.ones(3, 1), 1.5).isfinite().all()


def test_the_projection_onto_a_simplex_is_the_nearest_point() -> None:
    v = torch.randn(50, 4)
    found = linalg.onto_simplex(v, 0.3)
    assert (found >= 0).all()
    close(found.sum(-1), torch.full((50,), 0.3))
    # Nearest: no corner of the simplex lies on v's side of the plane through the point that is found.
    assert ((v - found)[:, None] * (0.3 * torch.eye(4) - found[:, None])).sum(-1).max() <= 1e-12
    close(linalg.onto_simplex(found, 0.3), found)


def gap(kernel: Tensor, y: Tensor, alpha: Tensor, bound: float) -> float:
    """By how much α is worse than the best at most: the slope towards the best corner of each row's simplex."""
    slope = kernel @ alpha + alpha - y
    best = bound * ((slope * y).sum(-1) - slope.max(-1).values)
    return ((slope * alpha).sum(-1) - best).sum().item()


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_the_dual_of_the_svm_is_solved(size: float) -> None:
    x, y = size * torch.randn(9, 5), F.one_hot(torch.arange(9) % 3).double()
    kernel, bound = x @ x.T, 0.1
    start, usual, solved = (linalg.crammer_singer(kernel, y, bound, k) for k in (1, 30, 1000))
    for alpha in (start, usual, solved):
        assert (alpha <= bound * y + 1e-15).all() and alpha.sum(-1).abs().max() < 1e-12, "it is feasible"
    assert gap(kernel, y, solved, bound) < 1e-10, "and the best there is"
    assert gap(kernel, y, usual, bound) < 0.1 * gap(kernel, y, start, bound)


# --- Closed forms -------------------------------------------------------------------------------------------------------


def test_matching_is_the_log_of_a_mixture_of_labels() -> None:
    module, ((xs, ys), (xq, yq)) = net(), task()
    found = outputs(mo.matching_net(module, LOSS, scale=7.0), (xs, ys), xq)
    cosine = F.cosine_similarity(body(module, xq)[:, None], body(module, xs)[None], dim=-1)
    mixture = (7.0 * cosine).softmax(-1) @ F.one_hot(ys, 3).double()
    close(found, mixture.log())
    close(LOSS(found, yq), -mixture[torch.arange(5), yq].log().mean())  # no softmax is taken of it again


def test_a_class_without_examples_is_never_matched_and_does_no_harm() -> None:
    module, ((xs, ys), (xq, _)) = net(ways=4), task()
    method = mo.matching_net(module, LOSS)
    assert outputs(method, (xs, ys), xq)[:, 3].isneginf().all()
    found = gradient(method, (xs, ys), (xq, torch.zeros(5, dtype=torch.int64)))
    assert all(g.isfinite().all() and g.norm() > 0 for g in found.weights.values())


def bordered(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([body(module, x), torch.ones(len(x), 1)], 1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_r2d2_is_ridge_regression_with_a_constant(repeats: int) -> None:
    """With fewer examples than features, and with more."""
    module, ((xs, ys), (xq, _)) = net(), task()
    xs, ys = xs.repeat(repeats, 1), ys.repeat(repeats)
    x = bordered(module, xs)
    w = torch.linalg.solve(x.T @ x + 0.4 * torch.eye(7), x.T @ F.one_hot(ys, 3).double())
    close(outputs(mo.r2d2(module, LOSS, ridge=0.4, scale=3.0), (xs, ys), xq), 3.0 * bordered(module, xq) @ w)


def test_the_published_ridge_is_one_per_example() -> None:
    """The published code divides X and Y by √M, and regularises by 50."""
    module, ((xs, ys), (xq, _)) = net(), task()
    x, q = bordered(module, xs), bordered(module, xq)
    count = len(ys)
    x, y = x / count**0.5, F.one_hot(ys, 3).double() / count**0.5
    w = x.T @ torch.linalg.inv(x @ x.T + 50 * torch.eye(count)) @ y
    fixed: dict[str, Any] = {"learn_ridge": False, "learn_scale": False}
    method = mo.r2d2(module, LOSS, ridge=50.0 * count, scale=2.0, **fixed)
    assert method.phi.rule == {}
    close(outputs(method, (xs, ys), xq), 2.0 * q @ w)
    assert set(mo.r2d2(module, LOSS).phi.rule) == {"log_ridge", "log_scale"}


def test_r2d2_fits_numbers_too() -> None:
    module, ((xs, _), (xq, _)) = net(ways=1), task()
    x, q = bordered(module, xs), bordered(module, xq)
    y = xs.sum(1, keepdim=True)
    method = mo.r2d2(module, mo.losses.mse, ridge=0.1, scale=1.0, learn_scale=False)
    close(outputs(method, (xs, y), xq), q @ torch.linalg.solve(x.T @ x + 0.1 * torch.eye(7), x.T @ y))


@pytest.mark.parametrize("learn", [True, False])
def test_r2d2_scales_classes_by_10_and_numbers_not_at_all_unless_told(learn: bool) -> None:
    module, ((xs, ys), (xq, _)) = net(), task()
    numbers = F.one_hot(ys, 3).double()
    for targets, default in ((ys, 10.0), (numbers, 1.0)):
        given = (mo.r2d2(module, LOSS, scale=scale, learn_scale=learn) for scale in (default, None, 3.0))
        expected, found, other = (outputs(method, (xs, targets), xq) for method in given)
        close(found, expected)
        close(other, expected * 3.0 / default)


def test_the_bases_of_metaoptnet() -> None:
    module, ((xs, ys), (xq, _)) = net(), task()
    x, q, y = body(module, xs), body(module, xq), F.one_hot(ys, 3).double()
    alpha = 2 * torch.linalg.inv(x @ x.T + 50 * torch.eye(len(x))) @ y
    close(outputs(mo.metaoptnet(module, LOSS, base="ridge", scale=3.0), (xs, ys), xq), 3.0 * q @ x.T @ alpha)
    alpha = linalg.crammer_singer(x @ x.T, y, 0.1, 30)
    close(outputs(mo.metaoptnet(module, LOSS, scale=3.0), (xs, ys), xq), 3.0 * q @ x.T @ alpha)


def test_simpleshot_is_the_nearest_centroid_of_centred_features() -> None:
    module, ((xs, ys), (xq, _)) = net(), task()
    method = mo.simpleshot(module, LOSS, classes=5)
    method.phi.rule["mean"].copy_(0.3 * torch.randn(6))
    z, q = (F.normalize(body(module, x) - method.phi.rule["mean"], dim=-1) for x in (xs, xq))
    centroids = torch.stack([z[ys == n].mean(0) for n in range(3)])
    close(outputs(method, (xs, ys), xq), -torch.cdist(q, centroids).square())
    moved = gradient(method, (xs, ys), (xq, ys[:5])).rule["mean"]
    everything = body(module, torch.cat([xs, xq]))
    close(moved, 1e-3 * (method.phi.rule["mean"] - everything.mean(0)))


def test_an_embedding_network_keeps_its_last_layer_in_every_closed_form() -> None:
    module, (support, (xq, _)) = net(ways=6), task()
    for build in (mo.protonet, mo.matching_net, mo.r2d2, mo.metaoptnet):
        method = build(module, LOSS, ways=3)
        assert method.learns("2.weight")
        assert outputs(method, support, xq).shape == (5, 3)


def test_targets_that_are_no_classes_are_a_sentence() -> None:
    module, ((xs, ys), (xq, _)) = net(), task()
    for build in (mo.protonet, mo.matching_net, mo.metaoptnet, mo.simpleshot, mo.proto_maml):
        with pytest.raises(ValueError, match=r"targets must be class numbers, such as int64; found torch\.float64"):
            outputs(build(module, LOSS), (xs, ys.double()), xq)
    for build in (mo.protonet, mo.r2d2):
        with pytest.raises(ValueError, match=r"targets must be class numbers, such as int64; found dict"):
            outputs(build(module, LOSS), (xs, {"y": ys}), xq)


# --- Proto-MAML ---------------------------------------------------------------------------------------------------------


def test_proto_maml_without_steps_is_a_prototypical_network() -> None:
    module, (support, query) = net(), task()
    found, expected = mo.proto_maml(module, LOSS, steps=0), mo.protonet(module, LOSS)
    logits, distances = outputs(found, support, query[0]), outputs(expected, support, query[0])
    close(logits.log_softmax(-1), distances.log_softmax(-1))
    gap = logits - distances
    close(gap, gap[:, :1].expand(-1, 3))  # the squared length of the query's features
    a, b = gradient(found, support, query).weights, gradient(expected, support, query).weights
    assert a.keys() == b.keys() == {"0.weight", "0.bias"}
    for name, g in a.items():
        close(g, b[name])


def test_proto_maml_starts_at_the_prototypes_of_each_task_and_adapts_everything() -> None:
    module, (support, query) = net(), task()
    method = mo.proto_maml(module, LOSS, lr=0.1, steps=2)
    assert set(method.adapting) == set(method.phi.weights) and not method.learns("2.weight")
    means = class_means(body(module, support[0]), members(support[1], 3))
    fast = method.learner.init(method.phi, support).fast
    close(fast["2.weight"], 2 * means)
    close(fast["2.bias"], -means.square().sum(-1))
    full, first = (gradient(mo.proto_maml(module, LOSS, lr=0.1, first_order=f), support, query) for f in (False, True))
    assert (full.weights["0.weight"] - first.weights["0.weight"]).norm() > 1e-3 * full.weights["0.weight"].norm()
    bare = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    with pytest.raises(ValueError, match=r"`2` \(Linear\), can't start at prototypes, .* bias=True"):
        mo.proto_maml(bare, LOSS)


def test_the_start_reads_the_network_that_the_learner_is_moved_to() -> None:
    run = mo.Run(method := mo.proto_maml(example_net("proto_maml"), LOSS), method.phi)
    learner: Any = with_normalisation(run, "frozen").method.learner
    assert learner.start.network == learner.model and learner.model.normalisation == "frozen"


# --- Options that the contract's defaults leave out ---------------------------------------------------------------------

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ridge of metaoptnet": (mo.metaoptnet, {"base": "ridge", "ridge": 2.0}),
    "nothing learnt in r2d2": (mo.r2d2, {"learn_ridge": False, "learn_scale": False}),
    "first order": (mo.proto_maml, {"first_order": True, "steps": 2}),
    "all of it fine-tuned": (mo.pretrain, {"adapts": "all", "classes": 3}),
    "a scale of one's own": (mo.baseline_pp, {"scale": 4.0, "classes": 3}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_option_is_right(kind: str) -> None:
    build, options = OTHERS[kind]
    g = torch.Generator().manual_seed(4)
    y = torch.arange(6).expand(3, -1) % 3
    batch = Task(*((torch.randn(3, 6, 1, 4, 4, generator=g), y) for _ in range(2)))
    method = build(example_net("maml").double(), LOSS, **options)
    report = check(method, batch, modes=[("loop", "graph", "eager"), ("vmap", "graph", "trace")])
    assert report.ok and [row.verdict for row in report.modes] == ["right", "right"], str(report)


def test_bad_options_are_a_sentence() -> None:
    module: Any = net()
    for call, said in (
        (lambda: mo.matching_net(module, LOSS, scale=0.0), "scale=0.0: it must be a positive number"),
        (lambda: mo.r2d2(module, LOSS, ridge=-1.0), "ridge=-1.0: it must be a positive number"),
        (lambda: mo.metaoptnet(module, LOSS, base="svc"), "base='svc' is unknown: choose svm or ridge"),
        (lambda: mo.metaoptnet(module, LOSS, iterations=0), "iterations=0: it must be a whole number, at least 1"),
        (lambda: mo.pretrain(module, LOSS, classes=1), "classes=1: it must be a whole number, at least 2"),
        (lambda: mo.pretrain(module, LOSS, adapts="body"), "adapts='body' is unknown: choose head or all"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_head_is_as_wide_as_its_first_linear_layer() -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    made.add_module("head", nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert Network(made, LOSS).width == 6 and Network(made, LOSS).outputs == 3
    for read in ("width", "outputs"):
        with pytest.raises(ValueError, match=r"the head, layer `1` \(Tanh\), has no linear layer, .* head=\"NAME\""):
            getattr(Network(made, LOSS, head="1"), read)


class Misread(nn.Module):
    """A network (B, 4) -> (B, 3) whose last linear layer, in the order of their names, is not its head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.out = kind, nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 1, batch_first=True) if kind == "attention" else nn.Identity()
        self.read = nn.Conv1d(1, 6, 4) if kind == "attention" else nn.Linear(4, 6)
        if kind == "attention":
            self.out = nn.Conv1d(6, 3, 1)
        self.beside = nn.Linear(2, 3) if kind == "unused" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            z = self.read(x[:, None]).mT
            return self.out(self.attention(z, z, z)[0].mT)[:, :, 0]
        return self.out(self.read(x).tanh())


WRONG_HEADS = {
    "order": (r"`read` \(Linear\), can't be left out of the network", "out"),
    "unused": (r"`beside` \(Linear\), reads 2 features, and without it the network gives 3", "out"),
    "attention": (r"`attention.out_proj` \(\w+\), can't be left out of the network", ""),
}


@pytest.mark.parametrize("kind", WRONG_HEADS)
def test_a_head_that_is_not_the_last_layer_is_named_and_so_is_what_chooses_another(kind: str) -> None:
    said, right = WRONG_HEADS[kind]
    for name in ("protonet", "r2d2", "proto_maml"):
        with pytest.raises(ValueError, match=rf"{said}.*: let it be the layer that runs last: .* head=\"NAME\""):
            outputs(getattr(mo, name)(Misread(kind), LOSS), task()[0], task()[1][0])
        if right:
            outputs(getattr(mo, name)(Misread(kind), LOSS, head=right), task()[0], task()[1][0])
    (x, y), _ = task(inputs=3)
    with pytest.raises(ValueError, match=r"layer `read` \(\w+\) can't take these data"):  # the data's fault is not the head's
        outputs(mo.protonet(Misread(kind), LOSS), (x, y), x)


def test_a_head_of_several_layers_has_as_many_outputs_as_its_last_linear_one() -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    made.add_module("head", nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert outputs(mo.protonet(made, LOSS), task()[0], task()[1][0]).shape[-1] == 3
    with pytest.raises(ValueError, match=r"`head` \(Sequential\), can't start at prototypes, .*: choose such a layer by head="):
        mo.proto_maml(made, LOSS)
    with pytest.raises(ValueError, match=r"`1` \(Linear\), can't start at prototypes, .*: build it with bias=True"):
        mo.proto_maml(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False)), LOSS)


class Tied(nn.Module):
    """Its head shares a weight with the layer ahead of it, unless told otherwise."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.head.weight = self.mid.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.mid(self.first(x).tanh()).tanh())
        return found


@pytest.mark.parametrize(
    "name",
    ["anil", "boil", "proto_maml", "zero_head_maml", "protonet", "r2d2", "pretrain", "simpleshot", "baseline_pp"],
)
def test_a_head_that_shares_a_weight_with_the_body_is_refused_by_methods_that_tell_them_apart(name: str) -> None:
    with pytest.raises(ValueError, match=r"`head\.weight` is the same tensor as `mid\.weight`, .* no head, such as maml"):
        getattr(mo, name)(Tied(), LOSS)
    getattr(mo, name)(Tied(tied=False), LOSS)


def test_a_head_that_shares_a_weight_is_adapted_by_methods_that_know_no_head() -> None:
    support, (xq, _) = task()
    net, named_twice = Tied(), Tied(tied=False)
    named_twice.alias = named_twice.head
    assert mo.anil(named_twice, LOSS).adapting == ("head.weight", "head.bias")  # which is no other layer
    method = mo.maml(net, LOSS)
    assert {"mid.weight", "head.bias"} <= set(method.adapting) and outputs(method, support, xq).shape == (5, 3)
    assert mo.protonet(net, LOSS, ways=3).learns("mid.weight")


def test_a_head_that_is_the_whole_network_leaves_no_body() -> None:
    single = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for build in (mo.protonet, mo.boil, mo.r2d2):
        with pytest.raises(ValueError, match=r"the head `1` has all the weights of the network, .* no body: .*head=.* ways="):
            build(single, LOSS)
    assert mo.protonet(single, LOSS, ways=3).learns("1.weight") and mo.anil(single, LOSS).adapting == ("1.weight", "1.bias")


class Several(nn.Module):
    """(B, 4) -> logits (B, 3) and features (B, 6), as a tuple or a dictionary."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        z = self.body(x).tanh()
        return (self.head(z), z) if self.kind is tuple else {"logits": self.head(z), "z": z}


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_network_that_returns_several_things_has_no_features_to_read(kind: type) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        return LOSS(output[0] if kind is tuple else output["logits"], target)

    support, query = task()
    told = rf"the head, layer `head` \(\w+\), the network returns a {kind.__name__}, and features are one tensor \(B, D\)"
    for name in ("protonet", "r2d2", "metaoptnet", "matching_net", "simpleshot", "proto_maml"):
        with pytest.raises(ValueError, match=told):
            outputs(getattr(mo, name)(Several(kind), loss), support, query[0])
    for name in ("pretrain", "baseline_pp"):
        with pytest.raises(ValueError, match=told):
            gradient(getattr(mo, name)(Several(kind), loss, classes=3), support, query)
    with pytest.raises(ValueError, match=rf"^the network returns a {kind.__name__}, and features are one tensor"):
        outputs(mo.protonet(Several(kind), loss, ways=3), support, query[0])
    assert gradient(mo.anil(Several(kind), loss), support, query).weights["head.weight"].any()


def test_outputs_for_more_classes_than_there_are_are_told_where_they_can_win() -> None:
    support, query = task()
    for name in ("maml", "anil", "proto_maml", "r2d2", "reptile"):
        with pytest.warns(
            UserWarning, match="the model chooses among 5 classes, and the targets of the first batch are below 3"
        ):
            gradient(getattr(mo, name)(net(ways=5), LOSS), support, query)
    for name in ("protonet", "matching_net", "simpleshot"):  # to which a class without examples is impossible
        gradient(getattr(mo, name)(net(ways=5), LOSS, **({"classes": 5} if name == "simpleshot" else {})), support, query)
    told = mo.MetaModule(mo.maml(net(ways=5), LOSS))
    batch = trees.map_tensors(lambda x: x[None], Task(support, query))
    with pytest.warns(UserWarning, match="the model chooses among") as seen:
        for _ in range(2):
            told.backward(batch)
    assert len(seen) == 1


# --- Cosines ------------------------------------------------------------------------------------------------------------


def test_a_head_of_cosines_takes_the_weights_of_a_linear_one() -> None:
    module, ((xs, _), _) = net(), task()
    cosines = mo.nn.with_cosines(module, "2")
    z, weight, bias = body(module, xs), module.get_parameter("2.weight"), module.get_parameter("2.bias")
    expected = 2.0 * F.cosine_similarity(z[:, None], weight[None], dim=-1) + bias
    close(cosines(xs), expected)
    close(functional_call(cosines, dict(module.named_parameters()), (xs,)), expected)
    assert [n for n, _ in cosines.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert isinstance(module.get_submodule("2"), nn.Linear) and "scale=2.0" in repr(cosines)
    assert (mo.nn.scale_of(200), mo.nn.scale_of(201)) == (2.0, 10.0)
    assert mo.nn.Cosine(4, 3)(xs).abs().max() <= 2.0
    assert mo.nn.Cosine(4, 3)(torch.zeros(2, 4)).abs().max() == 0
