"""What a meta-learner must beat, on the same network and the same episodes.

untrained   φ as it was before training, adapted in the same way: what the inner loop achieves by itself.
prototypes  the trained features without an inner loop: each query goes to the nearest class mean of the support's features
            (Snell, Swersky and Zemel 2017, https://arxiv.org/abs/1703.05175, squared Euclidean distance).
pretrained  the same network trained as an ordinary classifier of all training classes (or, if tasks have no classes, on
            all tasks pooled), then fine-tuned by SGD from a zero head, with a step size chosen on the validation split.
scratch     the same network as it was before training, all of it trained by SGD on the support set alone, with a step size
            chosen on the validation split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import count_tasks, rollout
from metaoptim.engine.faults import explained
from metaoptim.estimators import Unroll
from metaoptim.learners import CHOOSE, GradientLearner, Network, in_the_head, nothing
from metaoptim.nn import Cosine, statistics
from metaoptim.rules import SGD
from metaoptim.runs.adapted import quiet
from metaoptim.runs.progress import tracked
from metaoptim.runs.run import Run
from metaoptim.tasks import ImageTasks, TaskFamily

STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
TUNING_EPISODES = 100
EXAMPLES = 128  # per pretraining step


def untrained(run: Run) -> Run:
    """The run with φ as it was before training."""
    return replace(run, phi=run.method.phi, inherited={}, step=0)


def prototypes(run: Run, batch: Task) -> dict[str, Tensor]:
    """Accuracy (T, 1) of the nearest class mean of the support, in the features that the network's head reads."""
    with torch.no_grad():
        tasks = [trees.index(batch, t) for t in range(count_tasks(batch))]
        return {"accuracy": torch.stack([_nearest_mean(run, task) for task in tasks])[:, None]}


def _nearest_mean(run: Run, task: Task) -> Tensor:
    (xs, ys), (xq, yq) = task
    network, weights = run.network, run.network.initial(run.phi.weights)
    fs, fq = network.features(weights, xs, None), network.features(weights, xq, (xs, ys))
    member = nn.functional.one_hot(ys).to(fs.dtype)
    means = member.T @ fs / member.sum(0)[:, None]
    right: Tensor = torch.cdist(fq, means).argmin(-1) == yq
    return right.to(fs.dtype).mean()


def fault(run: Run, batch: Task) -> str:
    """Why the run's network has no features to compare classes by, as far as tasks like these tell; empty where it has."""
    try:
        with quiet(run.network.net), explained(batch, run.method):
            prototypes(run, batch)
    except ValueError as error:
        return str(error)
    return ""


def pretrained(run: Run, tasks: TaskFamily, iterations: int, steps: int, progress: bool) -> Run:
    """The pretrain-and-fine-tune baseline as a run; its inner step size is the best on split "val" after `steps`."""
    return _tuned(run, MetaParams(_pretrain(run, tasks, iterations, progress), {}), tasks, iterations, steps)


def scratch(run: Run, tasks: TaskFamily, steps: int) -> Run:
    """Each task by itself, from φ before training, as a run; its inner step size is the best on split "val" after `steps`."""
    network, weights = run.network, run.method.phi.weights
    before = {n: p[0] if network.per_step(n) else p for n, p in weights.items()}
    return _tuned(run, MetaParams(before, {}), tasks, 0, steps)


def _tuned(run: Run, phi: MetaParams, tasks: TaskFamily, done: int, steps: int) -> Run:
    """Fine-tuning of all weights by SGD, with the step size that is best on validation episodes."""
    network = replace(run.network, per_step=nothing)  # ordinary training knows of no inner steps
    split = "val" if "val" in tasks.splits else tasks.splits[0]
    batch = trees.to(tasks.sample(split, seed=run.seed, start=0, count=TUNING_EPISODES), phi.device)
    candidates = [
        replace(run, method=_fine_tuner(network, phi, lr, steps), phi=phi, inherited={}, step=done) for lr in STEP_SIZES
    ]
    losses = [rollout(c.method, phi, batch, {}, steps, run.batching)["loss"][:, -1].mean().item() for c in candidates]
    return candidates[min(range(len(losses)), key=losses.__getitem__)]


def _fine_tuner(network: Network, phi: MetaParams, lr: float, steps: int) -> MetaOptimizer:
    return MetaOptimizer(GradientLearner(network, SGD(lr), steps), Unroll(first_order=True), phi)


def _pretrain(run: Run, tasks: TaskFamily, iterations: int, progress: bool) -> Params:
    """The weights of the run's network after ordinary training from the initial φ; a classifier's head is zero."""
    net = copy.deepcopy(run.network.net).train()
    initial = run.network.initial(run.method.phi.weights)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(initial[name])
    if not isinstance(tasks, ImageTasks):
        _fit(net, run.network.loss, lambda i: _pooled(tasks, run.seed, i), iterations, progress)
        return {n: p.detach() for n, p in net.named_parameters()}
    name, inside = run.network.head_name, in_the_head(run.network)
    layer = net.get_submodule(name)
    if not isinstance(layer, nn.Linear) or isinstance(layer, Cosine):
        raise ValueError(
            f"{run.network.head_told} can't be widened, as a linear layer can: leave the baseline pretrained out, or {CHOOSE}."
        )
    parent = net.get_submodule(name.rpartition(".")[0])
    like = layer.weight
    wide = nn.Linear(layer.in_features, tasks.classes("train"), device=like.device, dtype=like.dtype)
    setattr(parent, name.rpartition(".")[2], wide)
    _fit(net, run.network.loss,
         lambda i: tasks.batch("train", seed=run.seed, start=i * EXAMPLES, count=EXAMPLES), iterations, progress)  # fmt: skip
    return {n: torch.zeros_like(p) if n in inside else net.get_parameter(n).detach() for n, p in initial.items()}


def _pooled(tasks: TaskFamily, seed: int, i: int) -> Batch:
    task = tasks.sample("train", seed=seed, start=16 * i, count=16)
    (xs, ys), (xq, yq) = task
    return torch.cat([xs, xq], 1).flatten(0, 1), torch.cat([ys, yq], 1).flatten(0, 1)


def _fit(
    net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batches: Callable[[int], Batch], iterations: int,
    progress: bool,
) -> None:  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    device = next(net.parameters()).device
    for i in tracked(range(iterations), "pretraining the baseline", progress):
        x, y = batches(i)
        optimizer.zero_grad()
        with statistics():  # the batch's, whatever has been stored
            output = net(x.to(device))
        torch.autograd.backward(loss(output, y.to(device)))
        optimizer.step()
        schedule.step()


def has_classes(batch: Task) -> bool:
    """Whether the tasks are pairs of inputs and class labels."""
    match batch.query:
        case (Tensor(), Tensor() as y):
            return y.dtype == torch.int64
    return False
