"""A checkpoint comes back to the bit, or its damage is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, pack, unpack
from metaoptim.runs.store import RunDirectory, load_checkpoint


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path / "run", recipe='name = "x"\n', environment={})


def at_step(step: int) -> Checkpoint:
    """A checkpoint whose content tells its step."""
    tensors = {
        "weights.a": torch.arange(40, dtype=torch.float32) * step,
        "rng": torch.full((7,), step).byte(),
    }
    return Checkpoint(step, tensors, {"best": step / 10})


def check_intact(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"best": step / 10}
    expected = at_step(step).tensors
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- what is saved comes back


def assorted_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    pair = torch.randn(3, dtype=torch.complex64)
    return {
        "zero-d": torch.tensor(1.5),
        "zero-d integer": torch.tensor(-(2**62) - 1),
        "double": torch.randn(3, 5, dtype=torch.float64),
        "bf16": torch.randn(9).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "flags": torch.tensor([True, False, True]),
        "generator": torch.get_rng_state(),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "transposed": base.t(),
        "slice": base[::2, 1:3],
        "alias": base,
        "alias again": base,
        "expanded": torch.randn(1).expand(5),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": pair.conj(),
        "negative view": pair.conj().imag,
        "odd values": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
        "needs grad": torch.randn(3, requires_grad=True),
        'quotes "sha256":"': torch.arange(3),
        "unicode φ": torch.arange(4, dtype=torch.int16),
    }


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    run, tensors = new_run(tmp_path), assorted_tensors()
    state = {"best": 0.1 + 0.2, "plan": {"batching": "vmap", "chunk": [4, None]}, "text": '"sha256":"φ'}
    run.save(Checkpoint(12, tensors, state))
    run.close()

    loaded = RunDirectory.reopen(tmp_path / "run").load()
    assert loaded is not None
    assert (loaded.step, loaded.state) == (12, state)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype, name
        assert loaded.tensors[name].shape == tensor.shape, name
        assert bits(loaded.tensors[name]) == bits(tensor.detach().resolve_conj().resolve_neg()), name
        loaded.tensors[name].zero_()  # what is loaded can be written to


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(at_step(3))
    file = run.path / LAST
    assert torch.equal(safetensors.torch.load_file(file)["weights.a"], at_step(3).tensors["weights.a"])
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"format", "step", "state", "sha256"}
    assert (metadata["step"], json.loads(metadata["state"])) == ("3", {"best": 0.3})


def test_non_finite_floats_become_null(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(Checkpoint(1, {}, {"best": float("-inf"), "seen": [float("nan"), 1.0]}))
    run.log({"step": 1, "loss": float("nan"), "steps": (float("inf"), 2)})
    loaded = run.load()
    assert loaded is not None
    assert loaded.state == {"best": None, "seen": [None, 1.0]}
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "steps": [None, 2],
    }
    for file in ("metrics.jsonl", "state.json"):
        assert not {"NaN", "Infinity", "-Infinity"} & set((run.path / file).read_text().replace(",", " ").split())


def test_complex128_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'z' is complex128, which can't be saved"):
        new_run(tmp_path).save(Checkpoint(1, {"z": torch.zeros(2, dtype=torch.complex128)}, {}))


def test_last_previous_and_best(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.load() is None
    for step in (1, 2, 3, 4):
        run.save(at_step(step), best=step == 2)
    for name, step in ((LAST, 4), (PREVIOUS, 3), (BEST, 2)):
        check_intact(unpack((run.path / name).read_bytes()), step)
    check_intact(run.load(), 4)
    check_intact(load_checkpoint(run.path), 2)  # while the run holds its lock
    check_intact(load_checkpoint(str(run.path), "last"), 4)


def test_best_falls_back_to_last(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))
    check_intact(load_checkpoint(run.path, "best"), 1)  # none was chosen yet: nothing to warn about
    run.save(at_step(2), best=True)
    run.save(at_step(3))
    flip(run.path / BEST, 400)
    before = sorted(run.path.iterdir())
    with pytest.warns(UserWarning, match=r"best\.safetensors is cut or altered: .* step 3$"):
        check_intact(load_checkpoint(run.path, "best"), 3)
    assert sorted(run.path.iterdir()) == before


# ---- damage


def test_every_flipped_bit_and_every_cut_is_detected() -> None:
    data = pack(at_step(5))
    check_intact(unpack(data), 5)
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            with pytest.raises(ValueError, match="cut or altered"):
                unpack(bytes(altered))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="cut or altered"):
            unpack(data[:length])
    with pytest.raises(ValueError, match="cut or altered"):
        unpack(data + b"\0")


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "tensors", "foreign"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))
    run.save(at_step(2))
    run.close()
    file = run.path / LAST
    size = file.stat().st_size
    match damage:
        case "empty":
            file.write_bytes(b"")
        case "cut":
            os.truncate(file, size - 1)
        case "header":
            flip(file, 20)
        case "tensors":
            flip(file, size - 1)
        case "foreign":
            safetensors.torch.save_file(at_step(2).tensors, file)

    run = RunDirectory.reopen(run.path)
    with pytest.warns(UserWarning) as caught:
        check_intact(run.load(), 1)
    [warning] = caught
    assert str(warning.message) == (f"{file} is cut or altered: falling back to checkpoint.previous.safetensors, step 1")
    assert warning.filename == __file__
    # The damaged one never takes the place of the good one, and is said once.
    run.save(at_step(2))
    check_intact(unpack((run.path / PREVIOUS).read_bytes()), 1)
    check_intact(run.load(), 2)


def test_best_saves_a_run_whose_last_two_are_damaged(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in (1, 2, 3):
        run.save(at_step(step), best=step == 1)
    flip(run.path / LAST, 9)
    flip(run.path / PREVIOUS, 9)
    with pytest.warns(UserWarning, match=r"falling back to best\.safetensors, step 1$"):
        check_intact(run.load(), 1)


def test_all_damaged_is_one_sentence(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))
    run.save(at_step(2))
    for name in (LAST, PREVIOUS):
        flip(run.path / name, 300)
    before = {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    sentence = (
        f"no checkpoint in {run.path} is intact (cut or altered: {LAST}, {PREVIOUS}): "
        "restore one from a copy, or start again in another folder"
    )
    for attempt in (run.load, lambda: load_checkpoint(run.path)):
        with pytest.raises(ValueError) as raised:
            attempt()
        assert str(raised.value) == sentence
    assert {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()} == before


def test_state_json_is_for_people_only(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    file = run.path / "state.json"
    assert json.loads(file.read_text()) == {"status": "running", "step": 0, "state": {}}
    run.save(at_step(8))
    run.mark("interrupted")
    expected = {"status": "interrupted", "step": 8, "state": {"best": 0.8}}
    assert json.loads(file.read_text()) == expected
    run.close()

    file.unlink()
    run = RunDirectory.reopen(run.path)
    check_intact(run.load(), 8)
    assert json.loads(file.read_text()) == {**expected, "status": "running"}
