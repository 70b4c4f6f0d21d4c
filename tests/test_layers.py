"""Layers in an inner loop: every way to compute the meta-gradient, against central differences and torch's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from metaoptim.algorithms.maml import maml
from metaoptim.core import trees
from metaoptim.core.losses import mse
from metaoptim.core.types import MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Engine
from metaoptim.nn import blame, conv4, convert, held, mlp, needs_written_out, noise, refuse, written_out

pytestmark = pytest.mark.usefixtures("doubles")

EAGER = [(tasks, memory, "eager") for tasks in ("loop", "vmap") for memory in ("graph", "steps", "mixed")]
IMAGE, SERIES, ROW, WORDS = (1, 6, 6), (3, 3), (4,), (3,)


# --- Networks -----------------------------------------------------------------------------------------------------------


class Flattened(nn.LSTM):
    """torch's, with what `flatten_parameters` does on a GPU before anything else."""

    def flatten_parameters(self) -> None:
        self.pointers = len({p.data_ptr() for p in self._flat_weights})


class Sequence(nn.Module):
    """A recurrent layer over (B, L, 3), and a head on its last output."""

    def __init__(self, rnn: nn.Module, width: int = 3) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, *_ = self.rnn(x)
        return self.head(outputs[:, -1])


class Steps(nn.Module):
    """A recurrent cell over (B, L, 3), and a head on its last state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Block(nn.Module):
    """A pre-norm transformer block over (B, L, 3), its attention masked to the past, and a head on the mean."""

    def __init__(self, dropout: float = 0.0, **options: bool) -> None:
        super().__init__()
        self.enter, self.norm, self.norm2, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Dropout(dropout), nn.Linear(5, 4))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y, past = self.norm(x), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(y, y, y, attn_mask=past, **self.options)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Functions(nn.Module):
    """Calls torch's functions, not its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(F.dropout(y.mean(1), 0.3))


class Noise(nn.Module):
    """Draws for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.3 * torch.randn_like(x)) + torch.rand_like(x).square()


class Pick(nn.Module):
    """(B, L, C) -> (B, C, L), or the mean over L."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.mean else x.transpose(1, 2)


class Buffered(nn.Module):
    """A layer with numbers of its own, which are no weights."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.scale.clone()


class View(nn.Module):
    """Flattened by `view`, which asks for torch's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


def images(*layers: nn.Module, width: int = 27) -> nn.Module:
    """Layers after a convolution that gives (B, 3, 6, 6), then a head on `width` features."""
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, 2))


def rows(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 2))


def series(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(Pick(), nn.Conv1d(3, 4, 2, padding=1), *layers, nn.Flatten(), nn.Linear(width, 2))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, **options)
    return nn.Sequential(nn.Linear(3, 4), layer, Pick(mean=True), nn.Linear(4, 2))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    random: bool = False
    steps: tuple[int, ...] = (2,)


CASES: dict[str, Case] = {
    "mlp": Case(lambda: mlp((4, 5, 2), "tanh"), ROW, steps=(1, 2, 3, 4, 5)),
    "conv4": Case(lambda: conv4(2, size=6, filters=2, norm="none"), IMAGE),
    "conv4, batch norm": Case(lambda: conv4(2, size=6, filters=2), IMAGE),
    "conv4, layer norm": Case(lambda: conv4(2, size=6, filters=2, norm="layer"), IMAGE),
    "BatchNorm2d": Case(lambda: images(nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.MaxPool2d(2)), IMAGE),
    "BatchNorm2d, converted": Case(lambda: convert(images(nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2))), IMAGE),
    "BatchNorm1d": Case(lambda: rows(nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()), ROW, steps=(1, 3)),
    "LayerNorm": Case(lambda: rows(nn.LayerNorm(6), nn.SiLU()), ROW, steps=(1, 3)),
    "LayerNorm of images": Case(lambda: images(nn.LayerNorm((3, 6, 6)), nn.AdaptiveAvgPool2d(3), nn.Tanh()), IMAGE),
    "GroupNorm": Case(lambda: images(nn.GroupNorm(3, 3), nn.GELU(), nn.AdaptiveAvgPool2d(3)), IMAGE, steps=(1, 3)),
    "InstanceNorm2d": Case(lambda: images(nn.InstanceNorm2d(3, affine=True), nn.Tanh(), nn.AdaptiveMaxPool2d(3)), IMAGE),
    "RMSNorm": Case(lambda: rows(nn.RMSNorm(6), nn.GELU("tanh")), ROW),
    "Conv1d": Case(lambda: series(nn.GELU(), nn.MaxPool1d(2), width=8), SERIES, steps=(1, 3)),
    "Conv1d, pooled to one": Case(lambda: series(nn.PReLU(), nn.AdaptiveAvgPool1d(1), width=4), SERIES),
    "Conv1d, its maxima": Case(lambda: series(nn.Tanh(), nn.AdaptiveMaxPool1d(2), width=8), SERIES),
    "Conv3d": Case(
        lambda: nn.Sequential(
            nn.Unflatten(2, (2, 3)), nn.Conv3d(1, 2, 2, padding=1), nn.MaxPool3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
        ),
        IMAGE,
    ),
    "overlapping windows": Case(lambda: images(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Tanh(), width=48), IMAGE),
    "layouts": Case(lambda: images(nn.Hardswish(), nn.ELU(inplace=True), View(), width=108), IMAGE),
    "PixelShuffle": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(), View(), nn.Linear(144, 2)), IMAGE
    ),
    "ConvTranspose2d": Case(lambda: images(nn.AvgPool2d(2), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.ELU(), width=72), IMAGE),
    "Embedding": Case(
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)), WORDS
    ),
    "Embedding and GRU": Case(lambda: nn.Sequential(nn.Embedding(7, 3), Sequence(nn.GRU(3, 3, batch_first=True))), WORDS),
    "LSTM": Case(lambda: Sequence(nn.LSTM(3, 3, batch_first=True)), SERIES),
    "LSTM, which looks at pointers": Case(lambda: Sequence(Flattened(3, 3, batch_first=True)), SERIES),
    "LSTM, deep": Case(
        lambda: Sequence(nn.LSTM(3, 3, 2, batch_first=True, bidirectional=True, dropout=0.3, proj_size=2), 4),
        SERIES,
        True,
        (1,),
    ),
    "RNN": Case(lambda: Sequence(nn.RNN(3, 3, batch_first=True)), SERIES),
    "LSTMCell": Case(lambda: Steps(nn.LSTMCell(3, 3)), SERIES),
    "GRUCell": Case(lambda: Steps(nn.GRUCell(3, 3)), SERIES),
    "MultiheadAttention": Case(Block, SERIES),
    "MultiheadAttention, no weights": Case(lambda: Block(need_weights=False, is_causal=True), SERIES),
    "MultiheadAttention with dropout": Case(lambda: Block(0.2, need_weights=False), SERIES, True),
    "TransformerEncoderLayer": Case(lambda: encoder(norm_first=True, activation="gelu", dropout=0.1), SERIES, True),
    "functions": Case(Functions, SERIES, True),
    "EmbeddingBag": Case(lambda: nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=1), nn.Tanh(), nn.Linear(4, 2)), WORDS),
    "weight norm": Case(lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), ROW),
    "spectral norm": Case(lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)).eval(), nn.Tanh(), nn.Linear(5, 2)), ROW),
    "buffers": Case(lambda: rows(Buffered(), nn.Tanh()), ROW),
    "RReLU": Case(lambda: rows(nn.RReLU()), ROW, True),
    "noise": Case(lambda: rows(Noise()), ROW, True),
    "Dropout": Case(lambda: rows(nn.Dropout(0.4), nn.Tanh()), ROW, True, steps=(1, 3)),
    "Dropout2d": Case(lambda: images(nn.Dropout2d(0.4), nn.Tanh(), nn.AvgPool2d(2)), IMAGE, True),
    "AlphaDropout": Case(lambda: rows(nn.SELU(), nn.AlphaDropout(0.3)), ROW, True),
}
TRACED = [
    *((name, "vmap", "graph") for name in CASES),
    *(
        (name, "vmap", "mixed")
        for name in ("mlp", "GroupNorm", "Conv1d, its maxima", "overlapping windows", "layouts", "buffers")
    ),
    ("weight norm", "loop", "steps"),
    ("Dropout", "workers:2", "steps"),
    ("layouts", "loop", "graph"),
]


def built(name: str) -> tuple[nn.Module, Task]:
    """The network, its weights nowhere 0 or 1, and two tasks for it."""
    torch.manual_seed(1)
    net, shape = CASES[name].build(), CASES[name].shape
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 7, (2, count, *shape)) if shape == WORDS else torch.randn(2, count, *shape)
        return x, torch.randn(2, count, 2)

    return net, Task(draw(5), draw(4))


def by_torch(net: nn.Module, weights: Params, tasks: Task, steps: int, lr: float) -> Tensor:
    """The mean outer loss with torch's own layers, and nothing but their first derivatives."""

    def loss(w: Params, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, w, (x,)) - y).square().mean()

    total = torch.zeros(())
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
        fast = {n: w.clone().requires_grad_() for n, w in weights.items()}
        for _ in range(steps):
            g = torch.autograd.grad(loss(fast, xs, ys), list(fast.values()))
            fast = {n: (w - lr * d).detach().requires_grad_() for (n, w), d in zip(fast.items(), g, strict=True)}
        total = total + loss(fast, xq, yq).detach() / 2
    return total


def run(meta: MetaOptimizer, tasks: Task, how: tuple[str, str, str], weights: Params | None = None) -> tuple[Tensor, Params]:
    """The loss and the meta-gradient; what is random is drawn from the same seed each time."""
    torch.manual_seed(7)
    estimate = Engine(meta, *how)(MetaParams(weights or meta.phi.weights, {}), tasks)
    return estimate.loss, estimate.grad.weights


def dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[n] * x).sum() for n, x in b.items()]).sum()


def far(found: Params, expected: Params) -> float:
    """The distance of two gradients relative to the second."""
    gap = {n: found[n] - x for n, x in expected.items()}
    return (dot(gap, gap) / dot(expected, expected)).sqrt().item()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's jvp warns of itself
@pytest.mark.parametrize(("name", "steps"), [(name, k) for name, case in CASES.items() for k in case.steps])
def test_every_way_gives_the_meta_gradient(name: str, steps: int) -> None:
    net, tasks = built(name)
    meta = maml(net, mse, lr=0.2, steps=steps)
    weights, constant = meta.phi.weights, held(net)
    loss, grad = run(meta, tasks, EAGER[0])

    def outer(w: Params) -> Tensor:
        return run(meta, tasks, EAGER[0], w)[0] if CASES[name].random else by_torch(net, w, tasks, steps, 0.2)

    torch.testing.assert_close(loss, outer(weights), rtol=1e-11, atol=0)
    for _ in range(2):
        v = {n: torch.randn_like(w).masked_fill(constant.get(n, torch.tensor(False)), 0.0) for n, w in weights.items()}
        ahead, behind = (outer({n: w + h * v[n] for n, w in weights.items()}) for h in (1e-6, -1e-6))
        assert abs((ahead - behind) / 2e-6 - dot(grad, v)) < 1e-6 * (dot(grad, grad) * dot(v, v)).sqrt()

    for how in EAGER[1:]:
        other, found = run(meta, tasks, how)
        assert far(found, grad) < 1e-9, how
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("memory", ["graph", "steps"])
def test_a_graph_sees_buffers_as_they_are_now(memory: str) -> None:
    net, tasks = built("buffers")
    meta = maml(net, mse, lr=0.2, steps=2)
    traced = Engine(meta, "vmap", memory, "trace")
    for _ in range(2):
        expected = run(meta, tasks, EAGER[0])[0]
        torch.testing.assert_close(traced(meta.phi, tasks).loss, expected, rtol=1e-12, atol=0)
        next(net.buffers()).mul_(1.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "mapping", "memory"), TRACED)
def test_a_trace_gives_it_too(name: str, mapping: str, memory: str) -> None:
    net, tasks = built(name)
    meta = maml(net, mse, lr=0.2, steps=1)
    loss, grad = run(meta, tasks, EAGER[0])
    other, found = run(meta, tasks, (mapping, memory, "trace"))
    assert far(found, grad) < 1e-9
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)


# --- Written out --------------------------------------------------------------------------------------------------------


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def written(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with written_out():
        return f(*args, **options)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "LSTM, deep, both ways": lambda: nn.LSTM(3, 4, 3, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, batch_first=True),
    "LSTM, projected, no bias": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "GRU": lambda: nn.GRU(3, 4, batch_first=True),
    "GRU, deep, no bias": lambda: nn.GRU(3, 4, 2, bias=False, bidirectional=True),
    "RNN": lambda: nn.RNN(3, 4, 2),
    "RNN, relu": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True, bidirectional=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_torchs(name: str) -> None:
    layer = RECURRENT[name]()
    x = torch.randn(5, 5, 3)
    _, state = layer(x)
    start = trees.map_tensors(torch.randn_like, state)
    for args in ((x,), (x, start), (x[0],)):  # zeros to begin with, a given state, one sequence without a batch
        close(written(layer, *args), layer(*args))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, partial(nn.RNNCell, nonlinearity="relu")])
def test_recurrent_cells_are_torchs(cell: Callable[..., nn.Module], bias: bool) -> None:
    layer, x = cell(3, 4, bias=bias), torch.randn(5, 3)
    state = layer(x)
    for args in ((x,), (x, state), (x[0],)):
        close(written(layer, *args), layer(*args))


def test_packed_sequences_are_left_to_torch() -> None:
    layer = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 3])
    close(written(layer, packed)[0].data, layer(packed)[0].data)


def test_dropout_between_recurrent_layers() -> None:
    layer, x = nn.GRU(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    with noise(torch.tensor(3)):
        first, again = (written(layer, x)[0] for _ in range(2))
    close(first, again)
    assert (first - layer.eval()(x)[0]).abs().max() > 1e-3
    close(written(layer, x), layer(x))


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("options", [
    {}, {"need_weights": False}, {"need_weights": False, "attn_mask": MASK, "is_causal": True},
    {"attn_mask": MASK, "average_attn_weights": False}, {"need_weights": False, "key_padding_mask": torch.arange(5) > 3},
    {"need_weights": False, "attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
])  # fmt: skip
@pytest.mark.parametrize("build", [{}, {"kdim": 3, "vdim": 2}, {"add_bias_kv": True, "bias": False}])
def test_multihead_attention_is_torchs(build: dict[str, Any], options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **build)
    q, k, v = torch.randn(6, 5, 4), torch.randn(6, 5, build.get("kdim", 4)), torch.randn(6, 5, build.get("vdim", 4))
    if "key_padding_mask" in options:
        options = options | {"key_padding_mask": options["key_padding_mask"].expand(6, 5)}
    expected = layer(q, k, v, **options)
    close(written(layer, q, k, v, **options), expected)
    with torch.no_grad():  # torch's fast path, which knows no transform
        close(written(layer.eval(), q, k, v, **options)[0], expected[0])


def test_scaled_dot_product_attention_is_torchs() -> None:
    q, k, v, mask = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 4), torch.rand(2, 4, 5, 6) > 0.5
    mask[0, 0, 0] = False  # a query that sees nothing
    for options in ({"attn_mask": mask}, {"attn_mask": torch.randn(5, 6)}, {"is_causal": True}, {"scale": 0.3}):
        f = F.scaled_dot_product_attention
        close(written(f, q, k, v, enable_gqa=True, **options), f(q, k, v, enable_gqa=True, **options))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_are_torchs(mode: str) -> None:
    x = torch.tensor([[1, 2, 2], [0, 3, 6], [6, 6, 6]])
    for padding in (None, 6, -1):
        layer = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding)
        close(written(layer, x), layer(x))
    if mode == "sum":
        layer, weights = nn.EmbeddingBag(7, 4, mode="sum"), torch.randn(3, 3)
        close(written(layer, x, per_sample_weights=weights), layer(x, per_sample_weights=weights))
    with pytest.raises(ValueError, match=r"begin at offsets can't be mapped over; give bags \(B, L\)"):
        written(nn.EmbeddingBag(7, 4), x[0], torch.tensor([0, 2]))


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_is_torchs(dim: int | None) -> None:
    layer, x = weight_norm(nn.Linear(3, 4), dim=dim), torch.randn(5, 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    close(written(layer, x), layer(x))


def test_weight_norm_of_torch_is_wrong() -> None:
    # Why it is written out. Fails when torch gets it right: then that may go.
    v, g, a = torch.randn(4, 3), torch.rand(4, 1) + 1, torch.randn(4, 3)

    def slope(v: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (torch._weight_norm(v, g) * a).square().sum())(v)

    d = torch.randn(4, 3)
    found = torch.func.vjp(slope, v)[1](d)[0]
    true = torch.func.vjp(lambda v: written(slope, v), v)[1](d)[0]
    by_difference = (slope(v + 1e-6 * d) - slope(v - 1e-6 * d)) / 2e-6
    assert (by_difference - true).norm() < 1e-6 * true.norm()
    assert (by_difference - found).norm() > 1e-2 * true.norm()


def test_plain_networks_pay_nothing() -> None:
    assert not needs_written_out(conv4(2))
    assert not needs_written_out(convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2))))
    for net in (nn.Sequential(nn.Dropout()), nn.GRU(1, 1), Pick(), weight_norm(nn.Linear(1, 1)), encoder()):
        assert needs_written_out(net)


# --- Random draws -------------------------------------------------------------------------------------------------------


def dropped(key: Tensor, stage: int = 0) -> Tensor:
    with noise(key, stage):
        return written(F.dropout, torch.ones(64, 100), 0.3)


def test_draws_are_a_function_of_the_key_and_the_stage() -> None:
    key = torch.tensor(5)
    before = torch.get_rng_state()
    assert torch.equal(dropped(key), dropped(key))
    assert torch.equal(torch.get_rng_state(), before)
    kept = torch.stack([dropped(k, s) for k in (key, key + 1) for s in (0, 1)]) > 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    together = (kept[:, None] & kept).double().mean((2, 3)).fill_diagonal_(0.49)
    assert (together - 0.49).abs().max() < 0.03, "other keys and stages draw independently"
    mapped = vmap(dropped)(torch.stack([key, key + 1]))
    assert torch.equal(mapped[1], dropped(key + 1))


def test_draws_within_a_pass_differ() -> None:
    with noise(torch.tensor(5)), written_out():
        first, second = (F.dropout(torch.ones(1000), 0.5) for _ in range(2))
    assert abs((first * second).mean() - 1) < 0.2


@pytest.mark.parametrize(("f", "mean", "std"), [
    (lambda x: F.dropout(x, 0.3), 0, (1 / 0.7) ** 0.5), (lambda x: F.alpha_dropout(x, 0.3, True), 0, 1),
    (torch.randn_like, 0, 1), (torch.rand_like, 0.5, 12**-0.5),
    (lambda x: F.rrelu(x.abs().neg(), 0.2, 0.4, True) / x.abs(), -0.3, 0.2 * 12**-0.5),
    (lambda x: torch.rand_like(x, dtype=torch.float32).double(), 0.5, 12**-0.5),
])  # fmt: skip
def test_moments_of_draws(f: Callable[[Tensor], Tensor], mean: float, std: float) -> None:
    with noise(torch.tensor(1)):
        y = written(f, torch.randn(200, 500))
    assert abs(y.mean() - mean) < 0.01
    assert abs(y.std() - std) < 0.01


@pytest.mark.parametrize(("f", "shape"), [
    (F.dropout1d, (7, 9, 4)), (F.dropout1d, (63, 4)), (F.dropout2d, (7, 9, 2, 2)), (F.dropout3d, (7, 9, 2, 1, 2)),
    (F.dropout3d, (63, 2, 1, 2)), (lambda x, p: F.feature_alpha_dropout(x, p, True), (7, 9, 2, 2)),
])  # fmt: skip
def test_whole_channels_are_dropped(f: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    with noise(torch.tensor(1)):
        y = written(f, torch.ones(shape), 0.5).reshape(63, 4)
    assert (y == y[:, :1]).all()
    assert 15 < (y[:, 0] == y.max()).sum() < 48


def test_dropout_is_torchs_where_there_is_no_key() -> None:
    x = torch.randn(20, 30)
    for f in (F.dropout, F.dropout1d, lambda x, p: F.alpha_dropout(x, p, True), lambda x, p: torch.dropout(x, p, True)):
        torch.manual_seed(3)
        expected = f(x, 0.5)
        torch.manual_seed(3)
        close(written(f, x, 0.5), expected)
    with noise(torch.tensor(1)):
        close(written(F.dropout, x, 0.5, training=False), x)
        close(written(F.dropout, x, 1.0), 0 * x)


def test_other_draws_are_refused_where_a_key_is_given() -> None:
    written(torch.randn, 3)
    for f in (lambda: torch.randn(3), lambda: torch.ones(3).normal_(), lambda: F.gumbel_softmax(torch.ones(3)),
              lambda: nn.FractionalMaxPool2d(2, output_size=2)(torch.ones(1, 4, 4))):  # fmt: skip
        with (
            noise(torch.tensor(1)),
            pytest.raises(ValueError, match=r"draws random numbers by torch's \w+, .* torch.randn_like"),
        ):
            written(f)


# --- Refused, and named -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "sentence"), [
    (lambda: nn.LazyLinear(3), r"layer `1\.0` \(LazyLinear\) has no weights before it has seen data; call the module once"),
    (lambda: nn.Embedding(3, 2, max_norm=1.0), r"`1\.0` \(Embedding\) has max_norm=1.0, .*; build it without max_norm"),
    (lambda: nn.Embedding(3, 2, sparse=True), r"has sparse=True, and sparse gradients .*; build it without sparse"),
    (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), r"\(EmbeddingBag\) has scale_grad_by_freq=True, so its gradient"),
    (lambda: spectral_norm(nn.Linear(3, 3)), r"`1\.0\.parametrizations\.weight\.0` \(_SpectralNorm\) .*; call its eval\(\)"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_no_inner_loop_can_keep_right_is_refused(layer: Callable[[], nn.Module], sentence: str) -> None:
    net = nn.Sequential(nn.Identity(), nn.Sequential(layer()))
    with pytest.raises(ValueError, match=sentence):
        maml(net, mse)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer `0` \(OptimizedModule\) is compiled, which .* twice; use its `_orig_mod`"):
        refuse(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")), "transductive")
    with pytest.raises(ValueError, match=r"is scripted, .*; use the module that it was made from"):
        refuse(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "transductive")


def failure(f: Callable[[], Any]) -> Exception:
    try:
        f()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_are_blamed_on_the_layer_that_raised_them() -> None:
    class Mine(nn.Module):
        def forward(this, x: Tensor) -> Tensor:
            raise KeyError(x)

    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 2)))
    meta = maml(net, mse)
    tasks = Task((torch.randn(2, 4, 3), torch.randn(2, 4, 2)), (torch.randn(2, 4, 3), torch.randn(2, 4, 2)))
    for how in (("loop", "graph", "eager"), ("vmap", "mixed", "eager"), ("vmap", "graph", "trace")):
        error = failure(lambda how=how: Engine(meta, *how)(meta.phi, tasks))
        assert blame(error.__cause__ or error, net) == "layer `1.1` (Linear)"
    assert blame(failure(lambda: net(torch.ones(2, 7))), net) == "layer `0` (Linear)"
    inner = nn.Sequential(nn.Identity(), Mine())
    assert blame(failure(lambda: inner(torch.ones(2))), inner) == "layer `1` (Mine)"
    assert blame(failure(lambda: inner[1](torch.ones(2))), inner[1]) == "the module itself (Mine)"
    assert blame(failure(lambda: inner(torch.ones(2))), net) is None
    assert blame(ValueError("never raised"), net) is None
