"""The works that are measured: a model, an algorithm, and how many tasks of how many examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import metaoptim as mo
from metaoptim.core.types import MetaOptimizer, Params, Task

Algorithm = Literal["maml", "fomaml", "reptile", "meta_sgd"]


@dataclass(frozen=True)
class Work:
    """One meta-step: T `tasks` of `support` and `query` examples each, `steps` inner steps of size `lr`.

    model: "mlp" (on sinusoids) or "conv4" (on random images: their content changes nothing about the time); options: of the
    model, by the names of `metaoptim.nn`; settings: of our engine, as batching/memory/runtime, "default" or "auto".
    """

    name: str
    about: str
    model: Literal["mlp", "conv4"]
    algorithm: Algorithm = "maml"
    steps: int = 1
    lr: float = 0.01
    tasks: int = 16
    support: int = 5
    query: int = 75
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()

    @property
    def classes(self) -> bool:
        """Whether the tasks have classes, or numbers to predict."""
        return self.model == "conv4"

    def net(self) -> torch.nn.Module:
        """The network, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return mo.nn.conv4(**self.options) if self.model == "conv4" else mo.nn.mlp(**self.options)

    def optimizer(self, dtype: torch.dtype = torch.float32) -> MetaOptimizer:
        """Our meta-optimizer for this work."""
        kinds: dict[str, dict[str, Any]] = {
            "maml": {"lr": self.lr},
            "fomaml": {"lr": self.lr},
            "reptile": {"lr": self.lr, "inner": "sgd", "batch_size": None},
            "meta_sgd": {"low": self.lr, "high": self.lr},
        }
        loss = mo.losses.cross_entropy if self.classes else mo.losses.mse
        build = mo.ALGORITHMS[self.algorithm]
        return build(self.net().to(dtype), loss, steps=self.steps, **kinds[self.algorithm])

    def weights(self, dtype: torch.dtype = torch.float32) -> Params:
        """θ, at which every way takes its meta-gradient."""
        return {n: p.detach().to(dtype) for n, p in self.net().named_parameters()}

    def batch(self, index: int = 0, dtype: torch.dtype = torch.float32) -> Task:
        """The index-th batch of T tasks."""
        if not self.classes:
            family = mo.tasks.sinusoid(shots=self.support, queries=self.query)
            (xs, ys), (xq, yq) = family.sample("train", seed=0, start=index * self.tasks, count=self.tasks)
            return Task((xs.to(dtype), ys.to(dtype)), (xq.to(dtype), yq.to(dtype)))
        random = torch.Generator().manual_seed(index)
        image = (self.options.get("channels", 1), *[self.options.get("size", 28)] * 2)

        def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.rand(self.tasks, count, *image, generator=random)
            return x.to(dtype), (torch.arange(count) % self.options["ways"]).expand(self.tasks, count)

        return Task(part(self.support), part(self.query))

    def flops(self) -> int | None:
        """Multiplications and additions of the convolutions in one meta-step; None for other models.

        Counted as matrix products, of 2 · C_in · C_out · 9 · H_out · W_out operations per image each. Forward takes one,
        backward two (weights, input); differentiating these three once more takes two each: so 9 in an exact inner step, 3 in a
        first-order one or in the outer gradient on the query. The first layer's input needs no gradient: 4, and 2.
        """
        if self.model != "conv4":
            return None
        side, width, filters = (int(self.options.get(n, d)) for n, d in (("size", 28), ("channels", 1), ("filters", 64)))
        pool, layers = self.options.get("pool", False), []
        for _ in range(4):
            side = side if pool else (side + 1) // 2
            layers.append(2 * width * filters * 9 * side**2)
            side, width = side // 2 if pool else side, filters
        exact = self.algorithm in ("maml", "meta_sgd")
        inner = self.support * ((4 if exact else 2) * layers[0] + (9 if exact else 3) * sum(layers[1:]))
        judged = sum(layers) if self.algorithm == "reptile" else 2 * layers[0] + 3 * sum(layers[1:])
        return self.tasks * (self.steps * inner + self.query * judged)


MLP = ("default", "loop/graph/eager", "vmap/graph/eager", "vmap/graph/trace", "vmap/graph/compile", "auto")
CONV = (
    "default", "loop/graph/eager", "loop/graph/trace", "workers:2/graph/trace", "workers:2/graph/compile",
    "vmap/graph/eager", "vmap/graph/trace", "vmap/graph/compile", "auto",
)  # fmt: skip
SINUSOID: dict[str, Any] = {"model": "mlp", "tasks": 25, "support": 10, "query": 10, "settings": MLP}
OMNIGLOT: dict[str, Any] = {"model": "conv4", "lr": 0.4, "options": {"ways": 5, "filters": 64}, "settings": CONV}

SPEED = (
    Work("sinusoid-1", "sinusoid MLP 1-40-40-1, 25 tasks of 10 + 10 points, 1 step", **SINUSOID),
    Work("sinusoid-5", "sinusoid MLP 1-40-40-1, 25 tasks of 10 + 10 points, 5 steps", steps=5, **SINUSOID),
    Work("omniglot-1", "Omniglot conv4-64 stride 2, 16 tasks of 5 + 75 images, 1 step", **OMNIGLOT),
    Work("omniglot-5", "Omniglot conv4-64 stride 2, 16 tasks of 5 + 5 images, 5 steps", steps=5, query=5, **OMNIGLOT),
    Work("fomaml-1", "FOMAML, conv4-64, 16 tasks of 5 + 75 images, 1 step", algorithm="fomaml", **OMNIGLOT),
    Work("fomaml-5", "FOMAML, conv4-64, 16 tasks of 5 + 5 images, 5 steps", algorithm="fomaml", steps=5, query=5, **OMNIGLOT),
    Work(
        "reptile-5",
        "Reptile, conv4-64, 16 tasks of 5 + 5 images, 5 SGD steps",
        algorithm="reptile",
        steps=5,
        query=5,
        **OMNIGLOT,
    ),
)


def mini_imagenet(steps: int) -> Work:
    """The work of the memory measurement: one 5-way 5-shot task of 75 queries on 84×84 colour images."""
    options = {"ways": 5, "channels": 3, "size": 84, "filters": 32, "pool": True, "features": "flatten"}
    return Work(f"mini-imagenet-{steps}", "", "conv4", steps=steps, lr=0.01, tasks=1, support=25, options=options)


def _mlp(name: str, sizes: tuple[int, ...], **how: Any) -> Work:
    return Work(name, "", "mlp", options={"sizes": sizes}, **({"support": 10, "query": 10} | how))


def _conv(name: str, filters: int, norm: str = "batch", **how: Any) -> Work:
    return Work(name, "", "conv4", options={"ways": 5, "filters": filters, "norm": norm}, **({"lr": 0.1, "query": 25} | how))


SMALL, WIDE = (1, 40, 40, 1), (1, 256, 256, 1)
SWEEP = (
    _mlp("mlp-40, 25 tasks, 1 step", SMALL, tasks=25),
    _mlp("mlp-40, 25 tasks, 5 steps", SMALL, tasks=25, steps=5),
    _mlp("mlp-40, 4 tasks, 3 steps, Meta-SGD", SMALL, tasks=4, steps=3, algorithm="meta_sgd"),
    _mlp("mlp-256, 32 tasks, 1 step", WIDE, tasks=32),
    _mlp("mlp-256, 8 tasks, 5 steps, FOMAML", WIDE, tasks=8, steps=5, algorithm="fomaml"),
    _conv("conv4-16, 4 tasks, 1 step", 16, tasks=4),
    _conv("conv4-16, 32 tasks, 1 step", 16, tasks=32),
    _conv("conv4-16, 16 tasks, 5 steps, Reptile", 16, steps=5, algorithm="reptile"),
    _conv("conv4-32, 16 tasks, 1 step, Meta-SGD", 32, algorithm="meta_sgd"),
    _conv("conv4-32, 8 tasks, 3 steps, layer norm", 32, "layer", tasks=8, steps=3),
    _conv("conv4-32, 16 tasks, 5 steps, FOMAML", 32, steps=5, algorithm="fomaml"),
    _conv("conv4-64, 16 tasks, 1 step", 64),
    _conv("conv4-64, 4 tasks, 5 steps", 64, tasks=4, steps=5, query=5),
    _conv("conv4-64, 16 tasks, 1 step, FOMAML", 64, algorithm="fomaml"),
)
