"""An adapted model leaves the process that made it: as a state dict, as safetensors, and exported; for every policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import metaoptim as mo

POLICIES: list[Any] = ["transductive", "inductive", "frozen"]

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
        self.hidden, self.flat = nn.Linear(4 * 36, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.head(self.drop(self.flat(self.hidden(x))))
"""

CHILD = """
import json, sys, torch, safetensors.torch, metaoptim as mo
from own_net import Net

def loaded(name):
    return safetensors.torch.load_file(f"{name}.safetensors")

found = {}
for policy in ("transductive", "inductive", "frozen"):
    x, expected = (loaded(f"maml-{policy}-data")[k] for k in ("x", "y"))
    nets = {"converted": mo.nn.convert(Net()), "own": Net()}
    for name, net in nets.items():
        net.load_state_dict(loaded(f"maml-{policy}"))
        found[f"{policy} {name}"] = (net.eval()(x) - expected).abs().max().item()
    net = mo.nn.convert(Net())
    net.load_state_dict(torch.load(f"maml-{policy}.pt", weights_only=True))
    found[f"{policy} torch"] = (net.eval()(x) - expected).abs().max().item()
    method = mo.protonet(mo.nn.convert(Net()), mo.losses.cross_entropy, normalisation=policy)
    like = torch.zeros(6, 1, 8, 8), torch.arange(3).repeat(2)
    fitted = mo.Run(method, method.phi).adapt(like)
    fitted.load_state_dict(loaded(f"protonet-{policy}"))
    wanted = loaded(f"protonet-{policy}-data")["y"]
    found[f"{policy} protonet"] = (fitted(x) - wanted).abs().max().item()
    for kind, wanted in (("maml", expected), ("protonet", wanted)):
        program = torch.export.load(f"{kind}-{policy}.pt2").module()
        found[f"{policy} {kind} exported"] = (program(x) - wanted).abs().max().item()
        found[f"{policy} {kind} exported, fewer rows"] = abs(program(x[:4]).shape[0] - 4)
print(json.dumps(found))
"""


def net() -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    torch.manual_seed(0)
    made: nn.Module = namespace["Net"]()
    with torch.no_grad():  # statistics that are no default, as a pretrained network's
        for m in made.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for statistic in (m.running_mean, m.running_var):
                    assert statistic is not None
                    statistic.uniform_(0.5, 1.5)
    return made


def support() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return 2 * torch.randn(6, 1, 8, 8, generator=draw) + 1, torch.arange(3).repeat(2)


def queries() -> Tensor:
    return torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def run_of(kind: str, policy: Any) -> mo.Run:
    options: dict[str, Any] = {"lr": 0.1, "steps": 2} if kind == "maml" else {}
    method = mo.ALGORITHMS[kind](mo.nn.convert(net()), mo.losses.cross_entropy, normalisation=policy, **options)
    return mo.Run(method, method.phi)


def judged(run: mo.Run) -> Tensor:
    """What the learner itself makes of the queries, whatever `adapt` does."""
    learner: Any = run.method.learner
    (xs, ys), phi, k = support(), run.phi, torch.tensor(learner.steps)
    state = learner.init(phi, (xs, ys))
    for i in range(learner.steps):
        f, x = learner.inner(phi, state, (xs, ys), torch.tensor(i))
        leaves = {n: p.clone().requires_grad_() for n, p in x.items()}
        grads = torch.autograd.grad(f(leaves)[0], list(leaves.values()))
        state = learner.apply(phi, state, dict(zip(leaves, grads, strict=True)), torch.tensor(0.0), torch.tensor(i))
    with torch.no_grad():
        if not learner.steps:
            found: Tensor = learner.predict(learner.model, phi, state, (xs, ys), queries())
            return found
        output: Tensor = learner.model.output(learner.weights(phi, state), queries(), (xs, ys))
        assert int(k) == 2
        return output


@pytest.fixture(autouse=True)
def without_dropout_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: nn.functional.dropout(x, 0.0))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["maml", "protonet"])
def test_an_adapted_model_is_what_the_learner_is(kind: str, policy: Any) -> None:
    run = run_of(kind, policy)
    fast, wanted = run.adapt(support()), judged(run)
    assert not any(m.training for m in fast.modules())
    torch.testing.assert_close(fast(queries()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_dict_goes_into_the_users_own_net_and_into_a_converted_one(policy: Any) -> None:
    fast = run_of("maml", policy).adapt(support())
    own, converted = net().eval(), mo.nn.convert(net())
    for other in (own, converted):
        other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        wanted, x = fast(queries()), queries()
        assert torch.equal(converted(x), wanted) or torch.allclose(converted(x), wanted, atol=1e-5)
        if policy == "transductive":  # which has no stored statistics: torch's norms in eval mode can't be right, and say so
            assert own(x).isnan().all()
            torch.testing.assert_close(own.train()(x), wanted)
        else:
            assert torch.equal(own(x), wanted)
            assert not [m for m in fast.modules() if type(m).__module__.startswith("metaoptim")]


def test_statistics_that_were_counted_are_used_and_others_are_not() -> None:
    trained, x = net(), queries()
    trained(x)  # in training mode, which counts
    converted = mo.nn.convert(net())
    converted.load_state_dict(trained.state_dict())
    torch.testing.assert_close(converted.eval()(x), trained.eval()(x))
    fresh = mo.nn.convert(net())
    fresh.load_state_dict(net().state_dict())
    torch.testing.assert_close(fresh(x), net().train()(x))


def test_a_closed_form_of_another_policy_is_refused() -> None:
    saved = run_of("protonet", "frozen").adapt(support()).state_dict()
    with pytest.raises(RuntimeError, match="fitted with normalisation='frozen', and this module with 'inductive'"):
        run_of("protonet", "inductive").adapt(support()).load_state_dict(saved)


@pytest.mark.slow
def test_in_a_fresh_process_it_predicts_the_same(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(NET)
    rows = torch.export.Dim("rows", min=2)
    for policy in POLICIES:
        for kind in ("maml", "protonet"):
            fast, x = run_of(kind, policy).adapt(support()), queries()
            name = str(tmp_path / f"{kind}-{policy}")
            safetensors.torch.save_file(fast.state_dict(), f"{name}.safetensors")
            torch.save(fast.state_dict(), f"{name}.pt")
            with torch.no_grad():
                safetensors.torch.save_file({"x": x, "y": fast(x)}, f"{name}-data.safetensors")
            torch.export.save(torch.export.export(fast, (x,), dynamic_shapes=({0: rows},)), f"{name}.pt2")
    environment = {**os.environ, "PYTHONPATH": str(Path(mo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout)
    assert len(gaps) == 24
    silent = gaps.pop("transductive own")
    assert silent != silent, "NaN, and not some other prediction"
    assert max(gaps.values()) < 1e-5, gaps
