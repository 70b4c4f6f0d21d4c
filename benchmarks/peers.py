"""One meta-gradient in each library, written from its public interface: (θ, batch) -> (mean query loss, ∇θ).

Every way returns the mean query loss over the tasks too, Reptile's as well, because training loops print it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from works import Work

from metaoptim.core.types import MetaParams, Params, Task
from metaoptim.engine import Engine

Way = Callable[[Params, Task], tuple[Tensor, Params]]
SETTINGS = ("batching", "memory", "runtime")


def missing(package: str) -> str:
    """Why a peer can't be measured; empty where it can."""
    return "" if find_spec(package) else f"{package} is not installed"


def forward(work: Work) -> Callable[[Params, Tensor], Tensor]:
    """The network written out plainly, as a function of its weights; batch norms use the batch's statistics."""
    if work.model == "mlp":
        layers = len(work.weights()) // 2

        def mlp(w: Params, x: Tensor) -> Tensor:
            for i in range(0, 2 * layers, 2):
                x = F.linear(x, w[f"{i}.weight"], w[f"{i}.bias"])
                x = F.relu(x) if i < 2 * layers - 2 else x
            return x

        return mlp
    pool, flat = work.options.get("pool", False), work.options.get("features") == "flatten"

    def conv4(w: Params, x: Tensor) -> Tensor:
        for i in range(4):
            x = F.conv2d(x, w[f"block{i}.0.weight"], None, 1 if pool else 2, 1)
            x = F.relu(F.batch_norm(x, None, None, w[f"block{i}.1.weight"], w[f"block{i}.1.bias"], training=True))
            x = F.max_pool2d(x, 2) if pool else x
        return F.linear(x.flatten(1) if flat else x.mean((2, 3)), w["head.weight"], w["head.bias"])

    return conv4


def loss_of(work: Work) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss, as torch has it."""
    return F.cross_entropy if work.classes else F.mse_loss


def stock(work: Work, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same network of torch's own layers, with the same names, for libraries that take a module."""
    if work.model == "mlp":
        return work.net().to(dtype)
    pool, flat = work.options.get("pool", False), work.options.get("features") == "flatten"
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(4):
        out, width = work.weights()[f"block{i}.0.weight"].shape[:2]
        conv = nn.Conv2d(width, out, 3, stride=1 if pool else 2, padding=1, bias=False)
        norm = nn.BatchNorm2d(out, track_running_stats=False)
        blocks[f"block{i}"] = nn.Sequential(conv, norm, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))
    blocks["features"] = nn.Flatten() if flat else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ways, width = work.weights()["head.weight"].shape
    blocks["head"] = nn.Linear(width, ways)
    return nn.Sequential(blocks).to(dtype)


def loop(work: Work, module: bool = False) -> Way:
    """The base line: plain autograd, task by task, with every inner step in the graph (learn2learn's algorithm).

    module: the network is torch's module, called by `functional_call`, and not written out as a function.
    """
    net, loss, exact = forward(work), loss_of(work), work.algorithm == "maml"
    if module:
        layers = stock(work)

        def net(w: Params, x: Tensor) -> Tensor:
            found: Tensor = functional_call(layers, w, (x,))
            return found

    def adapted(start: Params, x: Tensor, y: Tensor) -> Params:
        fast = start
        for _ in range(work.steps):
            grads = torch.autograd.grad(loss(net(fast, x), y), list(fast.values()), create_graph=exact)
            fast = {n: w - work.lr * g for (n, w), g in zip(fast.items(), grads, strict=True)}
            if not exact:
                fast = {n: w.detach().requires_grad_() for n, w in fast.items()}
        return fast

    def step(weights: Params, batch: Task) -> tuple[Tensor, Params]:
        start = {n: w.detach().requires_grad_() for n, w in weights.items()}
        total, sums, count = torch.zeros(()), [torch.zeros_like(w) for w in weights.values()], batch.query[0].shape[0]
        for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
            fast = adapted(start, xs, ys)
            if work.algorithm == "reptile":
                with torch.no_grad():
                    judged = loss(net(fast, xq), yq)
                    parts = [w - f for w, f in zip(start.values(), fast.values(), strict=True)]
            else:
                judged = loss(net(fast, xq), yq)
                parts = list(torch.autograd.grad(judged, list((start if exact else fast).values())))
            total = total + judged.detach()
            sums = [s + p for s, p in zip(sums, parts, strict=True)]
        return total / count, {n: s.detach() / count for n, s in zip(start, sums, strict=True)}

    return step


def with_higher(work: Work, dtype: torch.dtype = torch.float32) -> Way:
    """`higher`: a patched copy of the module and a differentiable optimizer per task."""
    import higher

    net, loss = stock(work, dtype), loss_of(work)
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
    constant = None if work.algorithm == "maml" else lambda grads: [g.detach() for g in grads]
    tracked = work.algorithm != "reptile"

    def step(weights: Params, batch: Task) -> tuple[Tensor, Params]:
        _load(net, weights)
        total, count = torch.zeros(()), batch.query[0].shape[0]
        for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
            context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, track_higher_grads=tracked)
            with context as (fast, inner):
                for _ in range(work.steps):
                    inner.step(loss(fast(xs), ys), grad_callback=constant)
                with torch.set_grad_enabled(tracked):
                    judged = loss(fast(xq), yq)
                if tracked:
                    torch.autograd.backward(judged / count)
                else:
                    for p, f in zip(net.parameters(), fast.parameters(), strict=True):
                        p.grad = (p.detach() - f.detach()) / count + (0 if p.grad is None else p.grad)
            total = total + judged.detach()
        return total / count, _taken(net)

    return step


def with_torchopt(work: Work, dtype: torch.dtype = torch.float32) -> Way:
    """TorchOpt: a meta-optimizer that moves the module in place, and its state put back after every task."""
    import torchopt

    net, loss = stock(work, dtype), loss_of(work)
    inner = torchopt.MetaSGD(net, lr=work.lr)
    start = torchopt.extract_state_dict(net, by="reference")
    fresh = torchopt.extract_state_dict(inner)
    leaves = dict(net.named_parameters())

    def step(weights: Params, batch: Task) -> tuple[Tensor, Params]:
        _load(net, weights)
        total, count = torch.zeros(()), batch.query[0].shape[0]
        for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
            for _ in range(work.steps):
                inner.step(loss(net(xs), ys))
            judged = loss(net(xq), yq)
            torch.autograd.backward(judged / count)
            total = total + judged.detach()
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, fresh)
        return total / count, {n: p.grad for n, p in leaves.items() if p.grad is not None}

    return step


def ours(
    work: Work, setting: str = "auto", dtype: torch.dtype = torch.float32, horizon: int | None = None
) -> tuple[Way, Engine]:
    """metaoptim with a setting of `batching/memory/runtime`, with "auto", or as a MetaModule is by "default".

    horizon: outer steps to come, by which "auto" judges whether compiling pays.
    """
    optimizer = work.optimizer(dtype)
    words = {"auto": ("auto",) * 3, "default": ("auto", "auto", "eager")}
    fixed: dict[str, Any] = dict(zip(SETTINGS, words.get(setting) or setting.split("/"), strict=True))
    engine = Engine(optimizer, **fixed, horizon=horizon)
    carry = engine.init(optimizer.phi, work.batch(0, dtype))

    def step(weights: Params, batch: Task) -> tuple[Tensor, Params]:
        estimate = engine(MetaParams(weights, optimizer.phi.rule), batch, carry)
        return estimate.loss, estimate.grad.weights

    return step, engine


def rest(engine: Engine) -> Callable[[], None] | None:
    """What a contender does after it was timed: end its threads, if it has any."""
    return engine.release if engine.choice is not None and engine.choice.batching.startswith("workers") else None


def _load(net: nn.Module, weights: Params) -> None:
    """Puts θ into a module and forgets its gradients."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights[name])
            parameter.grad = None


def _taken(net: nn.Module) -> Params:
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
