"""The models: their layers, shapes and sizes, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaoptim.nn import MODELS, conv4, mlp, refuse

pytestmark = pytest.mark.usefixtures("doubles")


def size_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_mlp_is_linear_layers_with_activations_between(activation: Literal["relu", "tanh"]) -> None:
    net, x = mlp((3, 5, 4, 2), activation), torch.randn(7, 3)
    w = list(net.parameters())
    between = torch.relu if activation == "relu" else torch.tanh
    hidden = between(between(x @ w[0].T + w[1]) @ w[2].T + w[3])
    torch.testing.assert_close(net(x), hidden @ w[4].T + w[5])
    assert [n for n, _ in net.named_parameters()] == [f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]


def test_mlp_is_by_default_the_sinusoid_network_of_the_maml_paper() -> None:
    assert size_of(mlp()) == (1 * 40 + 40) + (40 * 40 + 40) + (40 * 1 + 1)
    assert mlp()(torch.randn(9, 1)).shape == (9, 1)
    assert len(list(mlp((4, 2)).children())) == 1


def by_hand(net: nn.Module, x: Tensor, pool: bool, norm: str, features: str) -> Tensor:
    """conv4 from torch's functions and the weights by name."""
    w = dict(net.named_parameters())
    for i in range(4):
        bias = w.get(f"block{i}.0.bias")
        x = F.conv2d(x, w[f"block{i}.0.weight"], bias, stride=1 if pool else 2, padding=1)
        if norm == "batch":
            x = F.batch_norm(x, None, None, w[f"block{i}.1.weight"], w[f"block{i}.1.bias"], training=True)
        if norm == "layer":
            x = F.layer_norm(x, x.shape[1:], w[f"block{i}.1.weight"], w[f"block{i}.1.bias"])
        x = F.relu(x)
        x = F.max_pool2d(x, 2) if pool else x
    x = x.flatten(1) if features == "flatten" else x.mean((2, 3))
    return F.linear(x, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("features", ["mean", "flatten"])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize(("pool", "size"), [(False, 28), (False, 21), (False, 1), (True, 28), (True, 35), (True, 16)])
def test_conv4_is_what_it_says(
    pool: bool, size: int, norm: Literal["batch", "layer", "none"], features: Literal["mean", "flatten"]
) -> None:
    net = conv4(ways=5, channels=2, size=size, filters=3, pool=pool, norm=norm, features=features)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(4, 2, size, size)
    assert net(x).shape == (4, 5)
    torch.testing.assert_close(net(x), by_hand(net, x, pool, norm, features))
    assert any(n.endswith("0.bias") for n, _ in net.named_parameters()) == (norm != "batch")
    refuse(net, "inductive")


@pytest.mark.parametrize("pool", [False, True])
def test_warp_layers_begin_as_the_identity_and_stand_at_the_end_of_every_block(pool: bool) -> None:
    plain, warped = conv4(3, size=16, filters=4, pool=pool), conv4(3, size=16, filters=4, pool=pool, warp=True)
    missing, odd = warped.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"block{i}.warp.weight" for i in range(4)] and not odd
    x = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(warped(x), plain(x))
    assert [list(warped.get_submodule(f"block{i}")._modules)[-1] for i in range(4)] == ["warp"] * 4


def test_conv4_sizes() -> None:
    body = 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64  # convolutions without bias, and the norms' weights and biases
    assert size_of(conv4(ways=5)) == body + 64 * 5 + 5
    assert size_of(conv4(ways=5, features="flatten")) == body + 2 * 2 * 64 * 5 + 5
    assert size_of(conv4(ways=5, pool=True, features="flatten")) == body + 64 * 5 + 5
    mini = conv4(ways=5, channels=3, size=84, filters=32, pool=True, features="flatten")
    assert mini.get_parameter("head.weight").shape == (5, 5 * 5 * 32)


def test_same_seed_same_weights() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(nn.ModuleList([mlp(), conv4(5)]))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


REFUSED: list[tuple[Callable[..., nn.Module], dict[str, Any], str]] = [
    (mlp, {"sizes": [3]}, r"mlp: sizes=\[3\] must name at least an input and an output width"),
    (mlp, {"sizes": (3, 0, 1)}, r"mlp: sizes=\[3, 0, 1\] must name"),
    (mlp, {"activation": "gelu"}, r"mlp: activation='gelu' is not offered; choose one of relu, tanh\."),
    (conv4, {"ways": 1}, "conv4: ways=1, channels=1, filters=64: needs ways >= 2"),
    (conv4, {"ways": 5, "channels": 0}, "conv4: ways=5, channels=0"),
    (conv4, {"ways": 5, "filters": 0}, "filters=0: needs"),
    (conv4, {"ways": 5, "size": 0}, "conv4: size=0 leaves no pixel"),
    (conv4, {"ways": 5, "size": 15, "pool": True}, "conv4: size=15 leaves no pixel .* need >= 16 pixels"),
    (conv4, {"ways": 5, "norm": "group"}, r"conv4: norm='group' is not offered; choose one of batch, layer, none\."),
    (conv4, {"ways": 5, "features": "max"}, r"conv4: features='max' is not offered; choose one of mean, flatten\."),
]


@pytest.mark.parametrize(("build", "options", "sentence"), REFUSED)
def test_bad_options_are_refused_with_one_sentence(
    build: Callable[..., nn.Module], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(**options)


@pytest.mark.parametrize("name", MODELS)
def test_every_option_of_a_model_has_a_meaning(name: str) -> None:
    doc = inspect.getdoc(MODELS[name]) or ""
    for option in inspect.signature(MODELS[name]).parameters:
        assert f"\n    {option}: " in doc.partition("Args:")[2], option


def test_warp_layers_of_an_mlp_begin_as_the_identity_after_every_hidden_layer() -> None:
    warped = mlp((2, 5, 4, 1), warp=True)
    assert [name for name, _ in warped.named_children() if "warp" in name] == ["warp1", "warp2"]
    plain = torch.nn.Sequential(*(layer for name, layer in warped.named_children() if "warp" not in name))
    x = torch.randn(3, 2)
    torch.testing.assert_close(warped(x), plain(x))
    assert warped[2] is warped.get_submodule("warp1")
