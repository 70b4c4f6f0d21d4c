"""Training without tasks: pooled images, joint training, and classifiers that tasks fine-tune; and each task by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Batch, MetaOptimizer, Params
from metaoptim.engine import Engine
from metaoptim.estimators import Joint
from metaoptim.evaluation import baselines
from metaoptim.gradcheck import overshoot
from metaoptim.recipes import recipe as config
from metaoptim.tasks import ImageTasks
from metaoptim.training.source import Episodes, PooledImages, source_of

pytestmark = pytest.mark.usefixtures("empty_cache")

LOSS = mo.losses.cross_entropy
CLASSES = 6


def images(rotations: bool = False) -> ImageTasks:
    """Twelve classes of 8×8 noise around a picture of their own, of which six are for training."""
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 180, (12, 1, 8, 8)) + rng.integers(0, 76, (12, 9, 8, 8))
    members = {"train": np.arange(6), "val": np.arange(6, 9), "test": np.arange(9, 12)}
    return ImageTasks("blobs", drawings.astype(np.uint8), list("abcdefghijkl"), members, 3, 2, 4, rotations)


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mo.nn.conv4(ways=3, size=8, filters=8)


def built(name: str, **options: Any) -> MetaOptimizer:
    options = {} if name == "joint" else {"classes": CLASSES, **options}
    return mo.ALGORITHMS[name](conv(), LOSS, **options)


def train(method: MetaOptimizer, iterations: int = 3, **options: Any) -> mo.Run:
    short: dict[str, Any] = {"tasks_per_step": 4, "validate_every": 0, "progress": False, "engine": {"runtime": "eager"}}
    return mo.train(method, images(), iterations=iterations, **{**short, **options})


POOLED = ("pretrain", "baseline_pp", "simpleshot")
EVERY = (*POOLED, "joint")


# --- The source ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", [False, True])
def test_pooled_images_have_the_shape_of_episodes_and_the_labels_of_all_classes(rotations: bool) -> None:
    tasks, phi = images(rotations), built("joint").phi
    source = PooledImages(tasks, seed=3, count=4)
    found, episodes = source(2, phi), Episodes(tasks, 3, 4)(2, phi)
    assert [x.shape for x in trees.flatten(found)] == [x.shape for x in trees.flatten(episodes)]
    pictures = {
        tuple(np.rot90(tasks.images[c, d], turn).ravel().tolist()): c * (4 if rotations else 1) + turn
        for c in range(6) for d in range(9) for turn in range(4 if rotations else 1)
    }  # fmt: skip
    for x, y in found:
        for image, label in zip((255 * x).round().int().flatten(0, 1), y.flatten(), strict=True):
            assert pictures[tuple(image.ravel().tolist())] == label
    labels = torch.cat([y.flatten() for _, y in found])
    assert labels.unique().numel() > tasks.ways, "not those of an episode"
    assert torch.equal(trees.flatten(source(2, phi))[0], trees.flatten(found)[0])
    assert not torch.equal(trees.flatten(source(3, phi))[0], trees.flatten(found)[0])
    parts = [PooledImages(tasks, 3, 1)(8 + i, phi) for i in range(4)]
    assert torch.equal(torch.cat([p.query[0] for p in parts]), found.query[0]), "step 2 of 4 is steps 8 … 11 of 1"


def test_a_classifier_of_all_classes_needs_as_many_as_the_tasks_have() -> None:
    tasks = images()
    assert isinstance(source_of(built("pretrain"), tasks, 0, 2), PooledImages)
    assert isinstance(source_of(built("simpleshot"), tasks, 0, 2), PooledImages)
    assert isinstance(source_of(built("joint"), tasks, 0, 2), Episodes)
    with pytest.raises(ValueError, match=r"pretrain was built with classes=5, and the tasks have 6: set classes=6"):
        train(built("pretrain", classes=5))
    with pytest.raises(ValueError, match="these tasks have none that they share: train with an image family, or take joint"):
        mo.train(built("baseline_pp"), mo.tasks.sinusoid(), iterations=1, progress=False)


@pytest.mark.parametrize("name", POOLED)
def test_tasks_that_number_their_classes_anew_are_no_classes_of_all(name: str) -> None:
    module = mo.MetaModule(built(name))
    episodes = Episodes(images(), 0, 4)(0, module.method.phi)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{name} trains .*\(classes=6\), .* 0 to 2: where .* set classes=3; where each"):
            module.backward(episodes)
    module.backward(PooledImages(images(), 0, 4)(0, module.method.phi))


@pytest.mark.parametrize("name", EVERY)
def test_training_adapts_to_no_task_whose_labels_a_head_of_its_own_may_not_have(name: str) -> None:
    method = built(name)
    batch = source_of(method, images(), 0, 2)(0, method.phi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method.learner), "init", lambda *_: pytest.fail("a task is adapted to"))
        assert overshoot(method, method.phi, batch) is None
        Engine(method, "loop", "graph", "eager")(method.phi, batch)


# --- The gradient -------------------------------------------------------------------------------------------------------


def pooled_loss(method: MetaOptimizer, leaves: Params, rule: Params, batch: Batch) -> Tensor:
    """The classifier's mean loss on one batch, by torch's own functions."""
    trunk = nn.Sequential(*list(conv().children())[:-1])
    z = torch.func.functional_call(trunk, {n.replace("block", ""): p for n, p in leaves.items()}, (batch[0],))
    if method.name == "baseline_pp":
        logits = 2.0 * F.cosine_similarity(z[:, None], rule["classifier.weight"][None], dim=-1)
    else:
        logits = z @ rule["classifier.weight"].T + rule["classifier.bias"]
    centre = 0.5e-3 * (rule["mean"] - z.mean(0)).square().sum() if "mean" in rule else torch.zeros(())
    return F.cross_entropy(logits, batch[1]) + centre


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", POOLED)
def test_the_gradient_is_that_of_an_ordinary_classifier(name: str) -> None:
    method = built(name)
    learnt, _ = method.split(method.phi)
    drawn = source_of(method, images(), 0, 3)(0, method.phi)
    batch = trees.map_tensors(lambda x: x.double() if x.is_floating_point() else x, drawn)
    weights, rule = ({n: p.clone().requires_grad_() for n, p in part.items()} for part in learnt)
    losses = []
    for t in range(3):
        (xs, ys), (xq, yq) = trees.index(batch, t)
        losses.append(pooled_loss(method, weights, rule, (torch.cat([xs, xq]), torch.cat([ys, yq]))))
    leaves = [*weights.values(), *rule.values()]
    expected = torch.autograd.grad(torch.stack(losses).mean(), leaves)
    for how in ("loop", "vmap"):
        found = Engine(method, how, "graph", "eager")(method.phi, batch)
        torch.testing.assert_close(found.loss, torch.stack(losses).mean().detach())
        for g, e in zip([*found.grad.weights.values(), *found.grad.rule.values()], expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
    assert found.info["accuracy"] <= 1
    assert set(weights) == {n for n, _ in conv().named_parameters() if not n.startswith("head")}


def test_joint_training_is_that_of_one_model_on_all_examples() -> None:
    torch.manual_seed(0)
    net = mo.nn.mlp((1, 8, 1))
    method, batch = mo.joint(net, mo.losses.mse), mo.tasks.sinusoid().sample("train", seed=0, start=0, count=5)
    x, y = (torch.cat([s, q], 1).flatten(0, 1) for s, q in zip(*batch, strict=True))
    expected = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    found = Engine(method, "vmap", "graph", "eager")(method.phi, batch).grad.weights
    for g, e in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_joint_training_has_no_use_for_a_rule_of_its_own_or_a_closed_form() -> None:
    net = mo.nn.mlp((1, 8, 1))
    learnt: Any = mo.meta_sgd(net, mo.losses.mse).learner
    with pytest.raises(ValueError, match=r"without an inner run the rule's own parameters \(lr\.0\.bias, …\) get no gradient"):
        mo.compose(net, mo.losses.mse, rule=learnt.rule, estimator=Joint())
    proto = mo.protonet(conv(), LOSS)
    method = MetaOptimizer(proto.learner, Joint(), proto.phi)
    with pytest.raises(ValueError, match="fitted to a task's support set, and can't be trained without: use Unroll"):
        Engine(method, "loop", "graph", "eager")(method.phi, images().sample("train", seed=0, start=0, count=2))


# --- Training and judging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_what_is_pretrained_is_judged_on_the_same_episodes_as_everything_else(name: str) -> None:
    result, other = (
        mo.evaluate(train(method, 1, check=False), images(), episodes=4, steps=2, progress=False, baselines=["prototypes"])
        for method in (built(name), mo.maml(conv(), LOSS, steps=2))
    )
    assert result.facts["episodes_sha256"] == other.facts["episodes_sha256"]
    assert result.rows[0].name == name and result.rows[0].scores["accuracy"].shape == (4, 3)


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_was_stopped_goes_on_to_the_same_floats(name: str, tmp_path: Path) -> None:
    whole = train(built(name), 4)

    def stop(record: dict[str, Any]) -> bool:
        return bool(record["step"] == 2)

    train(built(name), 4, out=tmp_path / "run", on_step=stop)
    again = train(built(name), 4, out=tmp_path / "run", resume=True)
    expected, found = trees.named(whole.phi), trees.named(again.phi)
    assert expected.keys() == found.keys() and all(torch.equal(x, found[n]) for n, x in expected.items())


@pytest.mark.parametrize("name", POOLED)
def test_pretraining_learns_the_classes_and_helps_with_new_ones(name: str) -> None:
    losses: list[float] = []
    run = train(built(name), 25, lr=0.02, check=False, on_step=lambda record: losses.append(record["loss"]))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    result = mo.evaluate(run, images(), episodes=12, steps=5, progress=False, baselines=[])
    assert result.mean - 2 * result.interval > 1 / 3, "of three classes that it has never seen"
    (xs, ys), (xq, yq) = trees.index(images().sample("test", seed=0, start=0, count=12), 3)
    with torch.no_grad():
        accuracy = (run.adapt((xs, ys), 5)(xq).argmax(-1) == yq).float().mean()
    assert accuracy.item() == pytest.approx(result.rows[0].scores["accuracy"][3, -1].item())


def test_a_head_is_fine_tuned_from_zero_or_from_the_networks_own() -> None:
    support, _ = trees.index(images().sample("val", seed=0, start=0, count=1), 0)
    for name, head in (("pretrain", torch.zeros(3, 8)), ("baseline_pp", conv().get_parameter("head.weight").detach())):
        method = built(name, lr=0.5, steps=2)
        assert method.adapting == ("head.weight", "head.bias")
        fast = method.learner.init(method.phi, support).fast
        assert torch.equal(fast["head.weight"], head)
        start, end = (mo.Run(method, method.phi).adapt(support, steps) for steps in (0, 2))
        assert torch.equal(start.get_parameter("head.weight"), head)
        assert F.cross_entropy(end(support[0]), support[1]) < F.cross_entropy(start(support[0]), support[1])
        assert torch.equal(start.get_parameter("block0.0.weight"), end.get_parameter("block0.0.weight"))
    assert set(built("pretrain", adapts="all").adapting) == set(method.phi.weights)


# --- Rows of an evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline's step size is chosen among few, on few episodes, to save time."""
    monkeypatch.setattr(baselines, "TUNING_EPISODES", 3)
    monkeypatch.setattr(baselines, "STEP_SIZES", (0.03, 0.3))


@pytest.mark.usefixtures("few_tries")
def test_scratch_is_each_task_by_itself_with_the_best_of_a_few_step_sizes() -> None:
    run = train(mo.maml(conv(), LOSS, lr=0.1, steps=1), 1, check=False)
    result = mo.evaluate(run, images(), episodes=3, steps=2, progress=False, baselines=["scratch"])
    tuned: dict[float, tuple[float, Tensor]] = {}
    for lr in (0.03, 0.3):
        alone = mo.Run(method := mo.maml(conv(), LOSS, lr=lr), method.phi)
        val, test = (
            mo.evaluate(alone, images(), split=split, episodes=3, steps=2, progress=False, baselines=[]).rows[0].scores["loss"]
            for split in ("val", "test")
        )
        tuned[lr] = val[:, -1].mean().item(), test
    (_, best), (_, other) = sorted(tuned.values(), key=lambda found: found[0])
    torch.testing.assert_close(result.rows[1].scores["loss"], best)
    assert not torch.allclose(best, other)
    assert result.rows[1].name == "scratch" and "support set alone" in result.rows[1].about


@pytest.mark.usefixtures("few_tries")
def test_a_closed_form_stands_beside_a_few_steps_from_scratch() -> None:
    run = train(built("simpleshot"), 1, check=False)
    result = mo.evaluate(run, images(), episodes=3, progress=False, baselines=["scratch"])
    assert [row.scores["accuracy"].shape for row in result.rows] == [(3, 1), (3, 1)]


def test_a_head_of_cosines_is_not_widened_into_a_linear_one() -> None:
    run = train(built("baseline_pp"), 1, check=False)
    with pytest.raises(ValueError, match=r"`head` \(Cosine\), can't be widened, .*: leave the baseline pretrained out"):
        mo.evaluate(run, images(), episodes=2, progress=False, baselines=["pretrained"])


# --- Recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["omniglot-pretrain", "omniglot-baseline-pp", "omniglot-simpleshot"])
def test_recipes_name_the_number_of_omniglots_training_classes(name: str) -> None:
    tables = config.load(name).tables
    assert tables["tasks"]["split"] == "vinyals" and tables["tasks"]["rotations"]
    assert tables["algorithm"]["classes"] == 4 * 1028
