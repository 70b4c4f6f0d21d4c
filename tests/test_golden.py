"""Golden values and closed forms: quadratics whose meta-gradients are known, linear solvers, a ridge head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaoptim import rules
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.core import linalg
from metaoptim.core.gradients import exact
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.losses import mse
from metaoptim.core.objectives import AnnealedMultiStep, Ramp, last, trajectory_mean
from metaoptim.core.types import Batch, Clock, Info, Loss, Memory, MetaParams, Params, State, Task
from metaoptim.estimators import Displacement, Implicit, Unroll
from metaoptim.learners import ClosedForm, GradientLearner, Network

pytestmark = pytest.mark.usefixtures("doubles")


def double(*rows: list[float] | float) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found: Tensor, expected: Tensor | list[float], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# --- Quadratics: a "batch" is (A, c), the loss is ½ (θ − c)ᵀ A (θ − c). ---------------------------------------------------

A, C = double([2, 0.5], [0.5, 1]), double(1, -1)
AQ, CQ = double([1.5, -0.3], [-0.3, 0.8]), double(0.5, -2)
THETA, STEP = double(0.2, 0.3), 0.1
GOLDEN = Task((A, C), (AQ, CQ))
CLOCK = Clock(torch.tensor(0), torch.tensor(0))


def quadratic(weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
    gap = weights["w"] - batch[1]
    return 0.5 * gap @ batch[0] @ gap, {}


GOLDEN_ROWS: list[tuple[Unroll | Displacement, int, list[float]]] = [
    (Unroll(), 1, [-0.867875, 1.695075]),
    (Unroll(), 3, [-0.54039028, 1.29011749]),
    (Unroll(first_order=True), 1, [-0.9705, 1.8295]),
    (Unroll(first_order=True), 3, [-0.69663375, 1.65118375]),
    (Displacement(), 1, [-0.095, 0.09]),
    (Displacement(), 3, [-0.2441875, 0.25695]),
    (Unroll(first_order=True, judged_on="support"), 1, [-0.805, 0.8575]),
    (Unroll(first_order=True, judged_on="support"), 3, [-0.5901, 0.76514375]),
    (Unroll(judged_on="support"), 1, [-0.686875, 0.812]),
    (Unroll(judged_on="support"), 3, [-0.38893306, 0.62686284]),
]


@pytest.mark.parametrize(("estimator", "steps", "expected"), GOLDEN_ROWS)
def test_golden_gradient(estimator: Unroll | Displacement, steps: int, expected: list[float]) -> None:
    learner = GradientLearner(quadratic, rules.SGD(STEP), steps)
    estimate = estimator(learner, MetaParams({"w": THETA}, {}), GOLDEN, (), CLOCK)
    close(estimate.grad.weights["w"], expected, 6e-9)  # printed to eight digits


@pytest.mark.parametrize(("steps", "expected"), [(1, [0.295, 0.21]), (3, [0.4441875, 0.04305])])
def test_golden_weights(steps: int, expected: list[float]) -> None:
    learner, meta = GradientLearner(quadratic, rules.SGD(STEP), steps), MetaParams({"w": THETA}, {})
    *_, (_, state) = inner_loop(learner, meta, GOLDEN.support, exact)
    close(learner.weights(meta, state)["w"], expected)


@pytest.mark.parametrize("memory", ["graph", "steps", "mixed"])
def test_golden_orders_between_the_first_and_the_second(memory: Memory) -> None:
    """(I − (1 − c) αA)^K ∇L_Q(θ_K): FOMAML's golden values with c = 1, MAML's with c = 0, and for K = 1 a line between them."""
    first, second = double(-0.9705, 1.8295), double(-0.867875, 1.695075)
    for share in (0.0, 0.3, 1.0):
        estimator = Unroll(first_order=lambda outer_step, share=share: share + 0 * outer_step).keeping(memory)
        for steps in (1, 3):
            learner = GradientLearner(quadratic, rules.SGD(STEP), steps)
            found = estimator(learner, MetaParams({"w": THETA}, {}), GOLDEN, (), CLOCK).grad.weights["w"]
            *_, (_, state) = inner_loop(learner, MetaParams({"w": THETA}, {}), GOLDEN.support, exact)
            after = AQ @ (state.fast["w"] - CQ)
            close(found, torch.linalg.matrix_power(torch.eye(2) - (1 - share) * STEP * A, steps) @ after)
            if steps == 1:
                close(found, share * first + (1 - share) * second)


GOLDEN_LOSS_WEIGHTS = [
    (0, [0.2, 0.2, 0.2, 0.2, 0.2]), (1, [0.18, 0.18, 0.18, 0.18, 0.28]), (5, [0.1, 0.1, 0.1, 0.1, 0.6]),
    (9, [0.02, 0.02, 0.02, 0.02, 0.92]), (10, [0.0, 0.0, 0.0, 0.0, 1.0]), (500, [0.0, 0.0, 0.0, 0.0, 1.0]),
]  # fmt: skip


@pytest.mark.parametrize(("outer_step", "expected"), GOLDEN_LOSS_WEIGHTS)
def test_golden_weights_of_an_annealed_multi_step_loss(outer_step: int, expected: list[float]) -> None:
    found = AnnealedMultiStep(10)(5, torch.tensor(outer_step))
    assert found[0] == 0.0
    close(torch.stack([torch.as_tensor(v) for v in found[1:]]), expected)


def test_golden_weights_of_a_ramp() -> None:
    assert Ramp(2.0)(3, torch.tensor(0)) == pytest.approx((0, 1 / 14, 4 / 14, 9 / 14))
    assert Ramp(0.0)(4, torch.tensor(0)) == trajectory_mean(4, torch.tensor(0)) and Ramp(2.0)(0, torch.tensor(0)) == (1.0,)
    assert Ramp(200.0)(4, torch.tensor(7)) == pytest.approx(last(4, torch.tensor(7)))
    with pytest.raises(ValueError, match="power=-1"):
        Ramp(-1)


def test_an_annealed_multi_step_loss_has_a_floor_and_serves_any_number_of_steps() -> None:
    late = AnnealedMultiStep(1000)(5, torch.tensor(999))
    close(torch.stack([torch.as_tensor(v) for v in late]), [0.0, *[0.03 / 5] * 4, 1 - 4 * 0.03 / 5])
    with pytest.raises(ValueError, match=r"multi_step_until=0: it must be a whole number, at least 1"):
        AnnealedMultiStep(0)
    assert AnnealedMultiStep(10)(0, torch.tensor(3)) == [1.0]
    assert [float(v) for v in AnnealedMultiStep(10)(1, torch.tensor(3))] == [0.0, 1.0]


def test_golden_meta_sgd() -> None:
    learner = GradientLearner(quadratic, StepSizes(0.1, 0.3), 1)
    meta = MetaParams({"w": THETA}, {"lr.w": torch.tensor([0.1, 0.3])})
    *_, (_, state) = inner_loop(learner, meta, GOLDEN.support, exact)
    close(state.fast["w"], [0.295, 0.03])
    grad = Unroll()(learner, meta, GOLDEN, (), CLOCK).grad
    close(grad.weights["w"], [-0.986025, 1.225675])
    close(grad.rule["lr.w"], [-0.870675, -1.51695])


@pytest.mark.parametrize(("steps", "gradient"), [(1, [-0.867875, 1.695075]), (3, [-0.54039028, 1.29011749])])
def test_golden_step_sizes_per_layer(steps: int, gradient: list[float]) -> None:
    """MAML's gradient of θ; for one step, that of α is −∇L_S(θ) · ∇L_Q(θ'), the sum of Meta-SGD's."""
    learner, psi = GradientLearner(quadratic, rules.LayerStepSizes(STEP, steps), steps), {"lr": torch.full((steps,), STEP)}
    found = Unroll()(learner, MetaParams({"w": THETA}, psi), GOLDEN, (), CLOCK).grad
    close(found.weights["w"], gradient, 6e-9)
    if steps == 1:
        slope, after = A @ (THETA - C), AQ @ (double(0.295, 0.21) - CQ)
        close(found.rule["lr"], -(slope @ after)[None])
        close(found.rule["lr"], [-2.568525])


def test_golden_prox() -> None:
    # A long run reaches the optimum of L + ½λ‖θ' − θ‖², and its meta-gradient the implicit one (iMAML, λ = 2).
    learner, meta = GradientLearner(quadratic, rules.SGD(0.25), 80, prox=2.0), MetaParams({"w": THETA}, {})
    *_, (_, state) = inner_loop(learner, meta, GOLDEN.support, exact)
    close(learner.weights(meta, state)["w"], [0.48085106, -0.04680851], 6e-9)
    unrolled = Unroll()(learner, meta, GOLDEN, (), CLOCK).grad.weights["w"]
    close(unrolled, [-0.44735174, 1.12009054], 6e-9)
    for implicit in (Implicit("cg", 2), Implicit("neumann", 100, scale=0.2)):
        close(implicit(learner, meta, GOLDEN, (), CLOCK).grad.weights["w"], unrolled, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_closed_forms_of_random_quadratics(steps: int) -> None:
    for _ in range(5):
        root, c, cq, theta = torch.randn(2, 4, 4), torch.randn(4), torch.randn(4), torch.randn(4)
        a, aq = root @ root.mT / 4
        task = Task((a, c), (aq, cq))
        jacobian = torch.linalg.matrix_power(torch.eye(4) - STEP * a, steps)
        adapted = c + jacobian @ (theta - c)
        after = aq @ (adapted - cq)
        expected: list[tuple[Unroll | Displacement, Tensor]] = [
            (Unroll(), jacobian @ after),
            (Unroll(first_order=True), after),
            (Unroll(judged_on="support"), jacobian @ a @ (adapted - c)),
            (Displacement(), theta - adapted),
        ]
        learner = GradientLearner(quadratic, rules.SGD(STEP), steps)
        for estimator, gradient in expected:
            estimate = estimator(learner, MetaParams({"w": theta}, {}), task, (), CLOCK)
            close(estimate.grad.weights["w"], gradient)
        close(estimate.loss, 0.5 * (adapted - cq) @ aq @ (adapted - cq))


# --- Linear solvers -----------------------------------------------------------------------------------------------------


def test_cg_solves_as_a_dense_solver_does() -> None:
    root = torch.randn(6, 6)
    a, b = root @ root.T + torch.eye(6), torch.randn(6)

    def matvec(x: Params) -> Params:
        y = a @ torch.cat([x["u"].flatten(), x["v"]])
        return {"u": y[:4].view(2, 2), "v": y[4:]}

    x = linalg.cg(matvec, {"u": b[:4].view(2, 2), "v": b[4:]}, 6)
    close(torch.cat([x["u"].flatten(), x["v"]]), torch.linalg.solve(a, b), 1e-9)
    early = linalg.cg(matvec, {"u": b[:4].view(2, 2), "v": b[4:]}, 2)
    assert (torch.cat([early["u"].flatten(), early["v"]]) - torch.linalg.solve(a, b)).norm() > 1e-4
    assert all((v == 0).all() for v in linalg.cg(matvec, {"u": torch.zeros(2, 2), "v": torch.zeros(2)}, 3).values())


def test_conjugate_gradients_stop_where_the_matrix_curves_downwards() -> None:
    b = {"x": torch.ones(2, dtype=torch.float64)}
    saddle, hill = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    for iterations in (1, 2, 5):  # by hand: curvature 1 along b, and a step of 2; then a direction (6, 12) of curvature -72
        assert linalg.cg(lambda v: {"x": saddle * v["x"]}, b, iterations)["x"].tolist() == [2.0, 2.0]
        assert linalg.cg(lambda v: {"x": hill * v["x"]}, b, iterations)["x"].tolist() == [1.0, 1.0]


def test_cg_stays_exact_after_it_has_converged() -> None:
    x = linalg.cg(lambda v: {"x": A @ v["x"]}, {"x": C}, 12)
    close(x["x"], torch.linalg.solve(A, C))


def test_cg_gives_the_golden_implicit_gradient() -> None:
    lam = 2.0
    best = linalg.cg(lambda v: {"x": A @ v["x"] + lam * v["x"]}, {"x": A @ C + lam * THETA}, 2)["x"]
    close(best, [0.48085106, -0.04680851], 6e-9)
    gradient = linalg.cg(lambda v: {"x": v["x"] + A @ v["x"] / lam}, {"x": AQ @ (best - CQ)}, 2)["x"]
    close(gradient, [-0.44735174, 1.12009054], 6e-9)


def test_neumann_is_the_truncated_series_and_tends_to_the_inverse() -> None:
    residual = torch.eye(2) - 0.4 * A
    series = 0.4 * sum((torch.linalg.matrix_power(residual, i) for i in range(4)), torch.zeros(2, 2)) @ C
    close(linalg.neumann(lambda v: {"x": A @ v["x"]}, {"x": C}, 3, scale=0.4)["x"], series)
    close(linalg.neumann(lambda v: {"x": A @ v["x"]}, {"x": C}, 200, scale=0.4)["x"], torch.linalg.solve(A, C))


def test_damping_is_added_to_the_hessian() -> None:
    learner, meta = GradientLearner(quadratic, rules.SGD(0.25), 80, prox=2.0), MetaParams({"w": THETA}, {})
    best = torch.linalg.solve(A + 2 * torch.eye(2), A @ C + 2 * THETA)
    expected = 2 * torch.linalg.solve(A + (2 + 0.7) * torch.eye(2), AQ @ (best - CQ))
    close(Implicit("cg", 2, damping=0.7)(learner, meta, GOLDEN, (), CLOCK).grad.weights["w"], expected)


def test_implicit_gradients_train_no_step_sizes() -> None:
    learner = GradientLearner(quadratic, StepSizes(0.1, 0.3), 3, prox=1.0)
    with pytest.raises(
        ValueError, match=r"minimum .* does not depend on the rule's own parameters \(lr\.w, …\), .* use Unroll"
    ):
        Implicit().check(learner, MetaParams({"w": THETA}, {"lr.w": THETA}))


def test_a_neumann_series_with_its_defaults_tends_to_conjugate_gradients() -> None:
    learner, meta = GradientLearner(quadratic, rules.SGD(0.25), 80, prox=2.0), MetaParams({"w": THETA}, {})
    series, expected = (
        solver(learner, meta, GOLDEN, (), CLOCK).grad.weights["w"] for solver in (Implicit("neumann", 100), Implicit("cg", 2))
    )
    close(series, expected)


def test_implicit_gradients_need_a_point_that_the_state_holds() -> None:
    class Elsewhere(GradientLearner):
        def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
            f, x = super().inner(phi, state, support, k)
            return f, {n: p.clone() for n, p in x.items()}

    learner = Elsewhere(quadratic, rules.SGD(0.25), 2, prox=2.0)
    with pytest.raises(
        ValueError, match=r"^this learner's inner objective is not taken at tensors of its state; .* use Unroll"
    ):
        Implicit()(learner, MetaParams({"w": THETA}, {}), GOLDEN, (), CLOCK)


def test_golden_ridge() -> None:
    def fit(network: Network, phi: MetaParams, support: Batch) -> Tensor:
        x, y = support
        w: Tensor = torch.linalg.solve(x.T @ x + phi.rule["lam"] * torch.eye(3), x.T @ y)
        return w

    def predict(network: Network, phi: MetaParams, state: Tensor, support: Batch, x: Tensor) -> Tensor:
        return x @ state

    support, meta = (double([1, 2, 0], [0, 1, 1]), torch.eye(2)), MetaParams({}, {"lam": double(0.5)[0]})
    learner = ClosedForm(Network(torch.nn.Identity(), mse), fit, predict)
    golden = double([0.25641026, -0.20512821], [0.30769231, 0.15384615], [-0.20512821, 0.56410256])
    close(learner.init(meta, support), golden, 6e-9)
    assert not learner.adapts("lam")
    assert learner.heritage(learner.init(meta, support)) == ()
    x = support[0]
    woodbury = x.T @ torch.linalg.inv(x @ x.T + 0.5 * torch.eye(2)) @ support[1]
    loss = Unroll()(learner, meta, Task(support, support), (), CLOCK).loss
    close(loss, (x @ woodbury - support[1]).square().mean())
