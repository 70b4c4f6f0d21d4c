"""Learned update rules against the equations, written out in NumPy in the layout for which they were published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Params, Rule, State, Step
from metaoptim.lopt import LSTM, Celo2, SmallFC
from metaoptim.lopt.celo2 import directions
from metaoptim.lopt.features import start_of_moments
from metaoptim.lopt.layout import from_hwio, to_hwio
from metaoptim.lopt.small_fc import moves, network_at
from metaoptim.rules.newton_schulz import orthogonalise

pytestmark = pytest.mark.usefixtures("doubles")

Array = NDArray[np.float64]
SHAPES = {"conv": (5, 4, 3, 2), "tied": (3, 3, 3, 3), "matrix": (4, 6), "square": (4, 4), "vector": (5,), "scalar": ()}
STEPS = 10


def nobody(name: str) -> bool:
    return False


RULES: dict[str, Rule] = {
    "lstm": LSTM(),
    "lstm of the released code": LSTM(p=5.0, scale=0.01),
    "lstm without logarithms": LSTM(p=None, scale=1.0),
    "small_fc": SmallFC(),
    "celo2": Celo2(0.01, decay=0.1),
    "celo2 base": Celo2(0.01, orthogonal=False, by_adam=nobody),
}


def at(k: int) -> Step:
    return Step(torch.tensor(k), torch.tensor(0.0))


def weights_of(shapes: dict[str, tuple[int, ...]] = SHAPES) -> Params:
    return {n: torch.randn(shape) for n, shape in shapes.items()}


def drawn(rule: Rule, weights: Params) -> Params:
    """ψ away from its start, where biases and decays are zero."""
    psi = rule.start(weights, torch.Generator().manual_seed(1))
    return {n: x + 0.03 * torch.randn(x.shape, dtype=x.dtype) for n, x in psi.items()}


def run(rule: Rule, psi: Params, weights: Params, noise: list[Params]) -> tuple[list[Params], State]:
    """The weights after each step on ½ w² with noise in the gradient, and the last state."""
    state, path = rule.init(psi, weights), []
    for k, extra in enumerate(noise):
        updates, state = rule.update(psi, trees.add(weights, extra), state, weights, at(k))
        weights = trees.add(weights, updates)
        path.append(weights)
    return path, state


# --- The equations ------------------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def by_lstm(rule: LSTM, psi: dict[str, Array], w: Array, noise: list[Array]) -> Iterator[Array]:
    """One weight after the other, by the paper's appendix A and the usual equations of an LSTM."""
    memory = {place: [(np.zeros(20), np.zeros(20))] * 2 for place in np.ndindex(w.shape)}
    for extra in noise:
        g, new = w + extra, w.copy()
        for place in np.ndindex(w.shape):
            size = abs(g[place])
            if rule.p is None:
                x = np.array([g[place]])
            elif size >= np.exp(-rule.p):
                x = np.array([np.log(size) / rule.p, np.sign(g[place])])
            else:
                x = np.array([-1, np.exp(rule.p) * g[place]])
            after = []
            for layer, (h, c) in enumerate(memory[place]):
                z = psi[f"weight_ih_l{layer}"] @ x + psi[f"weight_hh_l{layer}"] @ h + psi[f"bias_l{layer}"]
                i, f, cell, o = z[:20], z[20:40], z[40:60], z[60:]
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(cell)
                x = sigmoid(o) * np.tanh(c)
                after.append((x, c))
            memory[place] = after
            new[place] = w[place] + rule.scale * (psi["out.weight"][0] @ x + psi["out.bias"][0])
        w = new
        yield w


def layers(psi: dict[str, Array], x: Array) -> Array:
    hidden = np.maximum(x @ psi["w0"][: x.shape[-1]] + psi["b0"], 0)
    hidden = np.maximum(hidden @ psi["w1"] + psi["b1"], 0)
    return hidden @ psi["w2"] + psi["b2"]


class Seen:
    """Moments of one weight in JAX's layout, one decay at a time; without axes to factor over, `diagonal`."""

    def __init__(self, shape: tuple[int, ...], m: Array, v: float, factored: Array) -> None:
        self.decays, self.m, self.v = (m, v, factored), [np.zeros(shape)] * 3, np.zeros(shape)
        self.axes = tuple(np.argsort(shape, kind="stable")[-2:]) if len(shape) > 1 else None  # second largest, largest
        self.row = self.col = [np.zeros(())] * 3
        self.diagonal = [np.zeros(shape)] * 3

    def see(self, g: Array) -> None:
        (m, v, factored), square = self.decays, g**2 + 1e-30
        self.m = [d * old + (1 - d) * g for d, old in zip(m, self.m, strict=True)]
        self.v = v * self.v + (1 - v) * g**2
        self.diagonal = [d * old + (1 - d) * square for d, old in zip(factored, self.diagonal, strict=True)]
        if self.axes:
            second, first = self.axes
            self.row = [d * x + (1 - d) * square.mean(first) for d, x in zip(factored, self.row, strict=True)]
            self.col = [d * x + (1 - d) * square.mean(second) for d, x in zip(factored, self.col, strict=True)]

    def wide(self) -> tuple[list[Array], list[Array], list[Array]]:
        """row, col and Adafactor's factor, of the weight's shape, for each decay."""
        if not self.axes:
            return self.diagonal, self.diagonal, [(x + 1e-9) ** -0.5 for x in self.diagonal]
        second, first = self.axes
        kept = second - (second > first)
        whole = self.m[0].shape
        rows = [np.broadcast_to(np.expand_dims(x, first), whole) for x in self.row]
        cols = [np.broadcast_to(np.expand_dims(x, second), whole) for x in self.col]
        shares = [x / (x.mean(kept, keepdims=True) + 1e-9) for x in self.row]
        of_rows = [np.expand_dims(np.maximum(x, 1e-9) ** -0.5, first) for x in shares]
        of_cols = [np.expand_dims(np.maximum(x, 1e-9) ** -0.5, second) for x in self.col]
        return rows, cols, [a * b for a, b in zip(of_rows, of_cols, strict=True)]


def by_small_fc(psi: dict[str, Array], w: Array, noise: list[Array]) -> Iterator[Array]:
    w = w.reshape(w.shape or (1,))
    starts = np.array([0.9, 0.99, 0.999])
    m, factored = (1 - np.exp(10 * (np.log(1 - starts) / 10 + psi[f"decay.{n}"])) for n in ("m", "factored"))
    v = 1 - np.exp(10 * (np.log(1 - 0.999) / 10 + psi["decay.v"][0]))
    seen = Seen(w.shape, m, v, factored)
    for k, extra in enumerate(noise):
        g = w + extra.reshape(w.shape)
        seen.see(g)
        row, col, f = seen.wide()
        inverse = (seen.v + 1e-6) ** -0.5
        of_m = f if seen.axes else [(x + 1e-6) ** -0.5 for x in seen.diagonal]
        channels = [g, w, *seen.m, seen.v, *(x * inverse for x in seen.m), inverse, *(g * x for x in f), *row, *col]
        channels += [(x + 1e-8) ** -0.5 for x in [*row, *col]] + [a * b for a, b in zip(seen.m, of_m, strict=True)]
        assert len(channels) == 28
        channels = [x / np.sqrt((x**2).mean() + 1e-5) for x in channels]
        channels += [np.full(w.shape, np.tanh(k / t - 1)) for t in (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)]
        out = layers(psi, np.stack(channels, -1))
        w = w - out[..., 0] * np.exp(0.001 * out[..., 1]) * 0.001
        yield w


def newton_schulz(x: Array) -> Array:
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def by_celo2(rule: Celo2, psi: dict[str, Array], w: Array, noise: list[Array]) -> Iterator[Array]:
    if w.ndim < 2 and rule.by_adam is None:
        m = v = np.zeros(w.shape)
        for k, extra in enumerate(noise):
            g = w + extra
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            s = m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.95 ** (k + 1))) + 1e-8)
            w = w - 20 * rule.lr * (s + rule.decay * w)
            yield w
        return
    w = w.reshape(w.shape or (1,))
    starts, axes = np.array([0.9, 0.99, 0.999]), tuple(range(w.ndim))[-2:]
    seen = Seen(w.shape, starts, 0.95, starts)

    def even(x: Array) -> Array:
        return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-9)

    for extra in noise:
        g = w + extra.reshape(w.shape)
        seen.see(g)
        row, col, f = seen.wide()
        inverse = (seen.v + 1e-8) ** -0.5
        channels = [g, np.clip(g, -0.1, 0.1), w, *seen.m, seen.v, *(x * inverse for x in seen.m), inverse]
        channels += [*(g * x for x in f), g * inverse]
        if seen.axes:
            channels += [*row, *col, *((x + 1e-8) ** -0.5 for x in [*row, *col])]
            channels += [a * b for a, b in zip(seen.m, f, strict=True)]
        assert len(channels) == (30 if seen.axes else 15)
        s = layers(psi, np.stack([even(x) for x in channels], -1))[..., 0]
        if rule.orthogonal and s.ndim > 1:
            s = np.stack([newton_schulz(x) for x in s.reshape(-1, *s.shape[-2:])]).reshape(s.shape)
        w = w - rule.lr * (even(s) + rule.decay * w)
        yield w


def in_jax_layout(x: Array) -> Array:
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def expected(rule: Rule, psi: Params, w: Tensor, noise: list[Tensor]) -> list[Array]:
    numbers = {n: x.numpy() for n, x in psi.items()}
    start, extras = in_jax_layout(w.numpy()), [in_jax_layout(x.numpy()) for x in noise]
    if isinstance(rule, LSTM):
        return list(by_lstm(rule, numbers, start, extras))
    if isinstance(rule, SmallFC):
        return list(by_small_fc(numbers, start, extras))
    assert isinstance(rule, Celo2)
    return list(by_celo2(rule, numbers, start, extras))


@pytest.mark.parametrize("name", RULES)
def test_ten_steps_are_those_of_the_equations(name: str) -> None:
    rule, weights = RULES[name], weights_of()
    psi, noise = drawn(rule, weights), [{n: 0.3 * torch.randn(x.shape) for n, x in weights.items()} for _ in range(STEPS)]
    path, _ = run(rule, psi, weights, noise)
    for n, w in weights.items():
        for here, there in zip(path, expected(rule, psi, w, [extra[n] for extra in noise]), strict=True):
            found = in_jax_layout(here[n].numpy()).reshape(there.shape)
            np.testing.assert_allclose(found, there, rtol=1e-6, atol=1e-9, err_msg=n)
        assert not torch.equal(path[-1][n], w)


# --- Sizes and values that are known ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sizes"), [(SmallFC(), (190, 7)), (Celo2(), (347, 0)), (LSTM(), (5141, 0)), (LSTM(p=None), (5061, 0))]
)
def test_rules_have_as_many_numbers_as_published(rule: Rule, sizes: tuple[int, int]) -> None:
    psi = rule.start(weights_of(), torch.Generator())
    decays = sum(x.numel() for n, x in psi.items() if n.startswith("decay."))
    assert (sum(x.numel() for x in psi.values()) - decays, decays) == sizes


def test_the_start_is_cut_off_at_two_spreads_and_belongs_to_the_generator() -> None:
    weights = weights_of()
    for rule, name, fan_in in ((SmallFC(), "w0", 39), (Celo2(), "w0", 30), (LSTM(), "weight_hh_l1", 40)):
        first, second = (rule.start(weights, torch.Generator().manual_seed(7)) for _ in range(2))
        assert all(torch.equal(x, second[n]) for n, x in first.items())
        other = rule.start(weights, torch.Generator().manual_seed(8))
        assert not torch.equal(first[name], other[name])
        assert first[name].abs().max() <= 2 / fan_in**0.5
        assert 0.7 / fan_in**0.5 < first[name].std() < 1.1 / fan_in**0.5
    forget = LSTM().start(weights, torch.Generator())["bias_l0"]
    assert forget.sum() == 20 and (forget[20:40] == 1).all()


@pytest.mark.parametrize(
    ("g", "p", "size", "sign"),
    [
        (1e-6, 5.0, -1, 1.484e-4), (1e-6, 10.0, -1, 2.203e-2), (1e-3, 5.0, -1, 0.1484), (1e-3, 10.0, -0.6908, 1),
        (0.1, 5.0, -0.4605, 1), (0.1, 10.0, -0.2303, 1), (-2.0, 5.0, 0.1386, -1), (-2.0, 10.0, 0.0693, -1), (0.0, 10.0, -1, 0),
    ],
)  # fmt: skip
def test_inputs_of_the_lstm_are_logarithm_and_sign(g: float, p: float, size: float, sign: float) -> None:
    assert LSTM(p).inputs(torch.tensor([g])).tolist() == [pytest.approx([size, sign], rel=5e-4)]


def test_newton_schulz_has_the_published_coefficients() -> None:
    matrix = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    found = orthogonalise(matrix)
    torch.testing.assert_close(found, torch.tensor([[0.82418402, 0.17390376], [-0.15123637, 0.80151663]]), rtol=0, atol=1e-7)
    even = found / found.square().mean().sqrt()
    torch.testing.assert_close(even, torch.tensor([[1.40582339, 0.29663032], [-0.25796621, 1.36715927]]), rtol=0, atol=1e-7)
    tall = torch.randn(2, 7, 3)
    torch.testing.assert_close(orthogonalise(tall), torch.stack([orthogonalise(x.mT).mT for x in tall]))
    assert (torch.linalg.svdvals(orthogonalise(tall)) - 1).abs().max() < 0.35
    assert orthogonalise(torch.zeros(2, 3)).equal(torch.zeros(2, 3))


def test_newton_schulz_with_other_coefficients_reaches_the_polar_factor() -> None:
    polar = torch.tensor([[0.98058068, 0.19611614], [-0.19611614, 0.98058068]])
    found = orthogonalise(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), 30, (1.5, -0.5, 0.0))
    torch.testing.assert_close(found, polar, rtol=0, atol=1e-7)


# --- Layout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 4, 5), (6, 5, 3, 2), (6, 5, 4, 3, 2)])
def test_layout_there_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    there = to_hwio(x, len(shape))
    assert there.shape[1:] == ((1,) if not shape else shape if len(shape) == 1 else (*shape[2:], shape[1], shape[0]))
    assert torch.equal(from_hwio(there, len(shape)), x)
    assert torch.equal(there[0], to_hwio(x[0], len(shape)))


def test_each_tap_of_a_convolution_is_orthogonalised_from_input_to_output() -> None:
    rule, weights = Celo2(1.0), {"w": torch.randn(6, 8, 3, 3)}
    psi = drawn(rule, weights)
    updates, _ = rule.update(psi, weights, rule.init(psi, weights), weights, at(0))
    values = torch.linalg.svdvals(to_hwio(updates["w"], 4))
    assert values.shape == (3, 3, 6) and (values.amax(-1) / values.amin(-1)).max() < 2
    torch.testing.assert_close(updates["w"].square().mean((0, 1)), torch.ones(3, 3), rtol=1e-6, atol=0)
    kernels = torch.linalg.svdvals(updates["w"])  # what torch's last two axes hold
    assert (kernels.amax(-1) / kernels.amin(-1)).max() > 10


# --- What the library asks of a rule ------------------------------------------------------------------------------------


def mean_after(rule: Rule, psi: Params, weights: Params, noise: list[Params]) -> Tensor:
    path, _ = run(rule, psi, weights, noise)
    return torch.stack([(x.sin() + x.square()).mean() for x in path[-1].values()]).sum()


EXACT = RULES | {"lstm with second derivatives": LSTM(first_order=False)}


@pytest.mark.parametrize("name", ["small_fc", "celo2 base", "celo2", "lstm with second derivatives"])
def test_gradients_of_psi_are_central_differences(name: str) -> None:
    rule, weights = EXACT[name], weights_of({"conv": (3, 2, 2, 2), "matrix": (3, 4), "vector": (3,), "scalar": ()})
    psi, noise = drawn(rule, weights), [{n: torch.randn(x.shape) for n, x in weights.items()} for _ in range(3)]
    gradient = torch.func.grad(lambda p: mean_after(rule, p, weights, noise))(psi)
    for n, x in psi.items():
        along = torch.randn(x.shape)
        ahead, back = (mean_after(rule, psi | {n: x + h * along}, weights, noise) for h in (1e-6, -1e-6))
        torch.testing.assert_close((gradient[n] * along).sum(), (ahead - back) / 2e-6, rtol=1e-5, atol=1e-9)
        assert gradient[n].abs().max() > 0


def test_the_gradient_of_the_optimizee_is_a_constant_as_in_the_paper() -> None:
    """Its derivative is that of a run along which the gradients are given numbers; with first_order=False it is not."""
    weights = weights_of({"a": (3,)})
    noise = [{n: torch.randn(x.shape) for n, x in weights.items()} for _ in range(3)]
    psi = drawn(LSTM(), weights)
    path, _ = run(LSTM(), psi, weights, noise)
    given = [trees.add(w, extra) for w, extra in zip([weights, *path], noise, strict=False)]

    def along_given(psi: Params) -> Tensor:
        rule = LSTM(first_order=False)
        state, w = rule.init(psi, weights), weights
        for k, g in enumerate(given):
            updates, state = rule.update(psi, g, state, w, at(k))
            w = trees.add(w, updates)
        return (w["a"].sin() + w["a"].square()).mean()

    constant = torch.func.grad(along_given)(psi)
    held, exact = (torch.func.grad(mean_after, 1)(rule, psi, weights, noise) for rule in (LSTM(), LSTM(first_order=False)))
    for n, g in held.items():
        torch.testing.assert_close(g, constant[n])
    assert any((exact[n] - g).abs().max() > 1e-4 * g.abs().max() for n, g in held.items())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("over", ["tasks", "particles"])
def test_a_map_is_a_loop(name: str, over: str) -> None:
    """Over tasks, with one ψ, and over particles, each with its own."""
    rule = RULES[name]
    several = [weights_of() for _ in range(3)]
    noise = [[{n: torch.randn(x.shape) for n, x in w.items()} for _ in range(3)] for w in several]
    psis = [drawn(rule, several[0])] * 3 if over == "tasks" else [drawn(rule, several[0]) for _ in range(3)]
    loop = trees.stack([torch.func.grad(mean_after, 1)(rule, p, w, e) for p, w, e in zip(psis, several, noise, strict=True)])
    slope = torch.func.grad(partial(mean_after, rule))
    own = None if over == "tasks" else 0
    psi = psis[0] if over == "tasks" else trees.stack(psis)
    mapped = torch.func.vmap(slope, in_dims=(own, 0, 0))(psi, trees.stack(several), trees.stack(noise))
    for n, x in loop.items():
        torch.testing.assert_close(mapped[n], x, rtol=1e-9, atol=1e-12)


def test_weights_of_one_shape_can_be_moved_at_once() -> None:
    """What is computed for a weight takes batches of weights, on leading axes."""
    for shape in ((5, 4, 3, 2), (4, 4), (5,)):
        x, g = (to_hwio(torch.randn(2, 3, *shape), len(shape)).unsqueeze(0) for _ in range(2))
        dim, k = len(shape), torch.tensor(5)
        seen = trees.map_tensors(lambda zero: torch.rand(zero.shape), start_of_moments(x.squeeze(0), dim))
        small, celo = (drawn(rule, {"x": x}) for rule in (SmallFC(), Celo2()))
        network = network_at(small, k, x)
        flat = trees.map_tensors(lambda t: t.flatten(1, 2), (x, g, seen))
        alone = [trees.map_tensors(lambda t, i=i: t[:, i], flat) for i in range(6)]
        together = moves(network, x, g, seen, dim), directions(celo, x, g, seen, dim, orthogonal=True)
        one = torch.stack([moves(network, *part, dim) for part in alone])
        another = torch.stack([directions(celo, *part, dim, orthogonal=True) for part in alone])
        torch.testing.assert_close(together[0].flatten(0, 1), one)
        torch.testing.assert_close(together[1].flatten(0, 1), another)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_no_gradient_and_huge_ones_stay_finite_in_float32(name: str, size: float) -> None:
    rule = RULES[name]
    weights = {n: x.float() for n, x in weights_of().items()}
    psi = {n: x.float() for n, x in drawn(rule, weights).items()}

    def after_two_steps(psi: Params) -> tuple[Tensor, tuple[State, Params]]:
        state, w = rule.init(psi, weights), weights
        for k in range(2):
            updates, state = rule.update(psi, {n: size * x.detach().sign() for n, x in w.items()}, state, w, at(k))
            w = trees.add(w, updates)
        return torch.stack([x.square().mean() for x in w.values()]).sum(), (state, w)

    gradient, (state, w) = torch.func.grad(after_two_steps, has_aux=True)(psi)
    for x in trees.flatten((gradient, state, w)):
        assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("name", RULES)
def test_floats_of_sixteen_bits_are_computed_in_thirty_two(name: str) -> None:
    """From the same numbers, the update is that of float32, rounded; ψ and states are in float32."""
    rule, weights = RULES[name], {n: x.bfloat16() for n, x in weights_of().items()}
    psi = rule.start(weights, torch.Generator().manual_seed(1))
    wide = trees.map_tensors(Tensor.float, weights)
    state, other = rule.init(psi, weights), rule.init(psi, wide)
    for k in range(3):
        g = {n: torch.randn(x.shape).bfloat16() for n, x in weights.items()}
        updates, state = rule.update(psi, g, state, weights, at(k))
        exact, other = rule.update(psi, trees.map_tensors(Tensor.float, g), other, wide, at(k))
        assert all(u.dtype == torch.bfloat16 and u.equal(exact[n].bfloat16()) for n, u in updates.items())
    assert all(x.dtype == torch.float32 for x in trees.flatten((psi, state)))


def test_by_adam_says_which_weights_go_by_adamw() -> None:
    weights = weights_of({"embedding.weight": (7, 4), "layer.weight": (4, 4), "layer.bias": (4,)})
    rule = Celo2(by_adam=lambda name: name.startswith("embedding"))
    state = rule.init({}, weights)
    assert state["adam"]["m"].keys() == {"embedding.weight"} and state["celo"].keys() == {"layer.weight", "layer.bias"}
    assert Celo2().init({}, weights)["celo"].keys() == {"embedding.weight", "layer.weight"}
    psi = drawn(rule, weights)
    updates, _ = rule.update(psi, weights, state, weights, at(0))
    assert list(updates) == list(weights)
    torch.testing.assert_close(updates["embedding.weight"], -0.02 * weights["embedding.weight"].sign())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LSTM(p=0.0), "p=0.0: it must be a positive number"),
        (lambda: LSTM(p=100.0), "p=100.0: it must be at most 80, or float32 can't hold e\\^p"),
        (lambda: LSTM(layers=0), "layers=0: it must be a whole number, at least 1"),
        (lambda: Celo2(lr=-1.0), "lr=-1.0: it must be a positive number"),
        (lambda: Celo2(orthogonal="no"), "orthogonal='no': it must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_what_rules_take(build: Callable[[], Rule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_a_meta_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With moments and AdamW's state in what is carried."""

    def trained(iterations: int, folder: str, resume: bool = False) -> Params:
        torch.manual_seed(0)
        net, estimator = mo.nn.mlp((1, 4, 1)).float(), mo.estimators.pes(5, 0.01)
        method = mo.compose(net, mo.losses.mse, rule=Celo2(), steps=20, learns=nobody, estimator=estimator)
        run = mo.train(
            method, mo.tasks.sinusoid(), iterations=iterations, tasks_per_step=2, out=tmp_path / folder, resume=resume,
            validate_every=0, checkpoint_every=1, engine={"runtime": "eager"}, check=False, progress=False,
        )  # fmt: skip
        return run.phi.rule

    through, half = trained(4, "through"), trained(2, "halves")
    rest = trained(4, "halves", resume=True)
    assert all(x.equal(rest[n]) for n, x in through.items()) and not all(x.equal(half[n]) for n, x in through.items())


@pytest.mark.parametrize("name", ["lstm", "small_fc", "celo2"])
@pytest.mark.parametrize(
    "mode", [("vmap", "graph", "eager"), pytest.param(("loop", "steps", "trace"), marks=pytest.mark.slow)], ids=lambda m: m[-1]
)
def test_the_gradient_doctor_passes_them(name: str, mode: tuple[str, str, str]) -> None:
    method = mo.compose(mo.nn.mlp((1, 4, 1)).float(), mo.losses.mse, rule=RULES[name], steps=2)
    assert mo.check(method, mo.tasks.sinusoid(), modes=[mode]).ok


@pytest.mark.parametrize("rule", [LSTM(), SmallFC(), Celo2()], ids=["lstm", "small_fc", "celo2"])
def test_a_start_wants_weights(rule: Rule) -> None:
    with pytest.raises(ValueError, match="start is given no weights"):
        rule.start({}, torch.Generator())
