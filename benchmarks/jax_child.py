"""The same meta-gradient as a jitted JAX step with optax, in a process and an environment of its own.

Started as `python jax_child.py INPUTS.npz`, where INPUTS holds θ, the batches and, as JSON, the work. Then, a line each:
"time CALLS INDEX" answers the seconds of so many calls on that batch; "grad INDEX PATH" saves loss and ∇θ there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = dict[str, Any]


def forward(work: Tree) -> Callable[[Tree, Any], Any]:
    """The network as a function of its weights, which have torch's names and shapes; images are (B, H, W, C)."""

    def mlp(w: Tree, x: Any) -> Any:
        layers = len(w) // 2
        for i in range(0, 2 * layers, 2):
            x = x @ w[f"{i}.weight"].T + w[f"{i}.bias"]
            x = jax.nn.relu(x) if i < 2 * layers - 2 else x
        return x

    def conv4(w: Tree, x: Any) -> Any:
        for i in range(4):
            kernel = w[f"block{i}.0.weight"].transpose(2, 3, 1, 0)
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * w[f"block{i}.1.weight"] + w[f"block{i}.1.bias"]
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ w["head.weight"].T + w["head.bias"]

    return mlp if work["model"] == "mlp" else conv4


def build(work: Tree) -> Callable[[Tree, Any], tuple[Any, Tree]]:
    """(θ, batch) -> (mean query loss, ∇θ), jitted; `work["map"]` says how tasks are mapped: "vmap" or "map"."""
    net, optimizer, exact = forward(work), optax.sgd(work["lr"]), work["algorithm"] == "maml"

    def loss(w: Tree, x: Any, y: Any) -> Any:
        output = net(w, x)
        if work["model"] == "mlp":
            return jnp.square(output - y).mean()
        return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()

    def adapt(w: Tree, x: Any, y: Any) -> Tree:
        state = optimizer.init(w)
        for _ in range(work["steps"]):
            grads = jax.grad(loss)(w, x, y)
            updates, state = optimizer.update(grads if exact else jax.lax.stop_gradient(grads), state)
            w = optax.apply_updates(w, updates)
        return w

    def task(w: Tree, batch: Any) -> tuple[Any, Tree]:
        xs, ys, xq, yq = batch
        if work["algorithm"] == "reptile":
            fast = adapt(w, xs, ys)
            return loss(fast, xq, yq), jax.tree.map(jnp.subtract, w, fast)
        found: tuple[Any, Tree] = jax.value_and_grad(lambda w: loss(adapt(w, xs, ys), xq, yq))(w)
        return found

    def step(w: Tree, batch: Any) -> tuple[Any, Tree]:
        if work["map"] == "vmap":
            losses, grads = jax.vmap(task, (None, 0))(w, batch)
        else:
            losses, grads = jax.lax.map(lambda one: task(w, one), batch)
        return losses.mean(), jax.tree.map(lambda g: g.mean(0), grads)

    jitted: Callable[[Tree, Any], tuple[Any, Tree]] = jax.jit(step)
    return jitted


def main() -> None:
    """Answers on what was standard output at the start, so that nothing else can be mistaken for an answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inputs = np.load(sys.argv[1])
    work = json.loads(str(inputs["work"]))
    weights = {n.removeprefix("w/"): jnp.asarray(inputs[n]) for n in inputs.files if n.startswith("w/")}
    batches = [tuple(jnp.asarray(inputs[f"batch{i}/{part}"]) for part in range(4)) for i in range(work["batches"])]
    step = build(work)

    def answer(text: str) -> None:
        answers.write(f"{text}\n")
        answers.flush()

    answer(json.dumps({"jax": jax.__version__, "optax": optax.__version__}))
    for line in sys.stdin:
        command, *words = line.split()
        if command == "time":
            calls, index = map(int, words)
            start = time.perf_counter()
            for _ in range(calls):
                result = step(weights, batches[index])
                jax.block_until_ready(result)
            answer(repr(time.perf_counter() - start))
        else:
            loss, grad = step(weights, batches[int(words[0])])
            np.savez(words[1], loss=loss, **{f"w/{n}": g for n, g in grad.items()})
            answer("saved")


if __name__ == "__main__":
    main()
