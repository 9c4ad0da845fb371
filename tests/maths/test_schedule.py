"""Step weights against the sweep written out on vectors, against autograd, and against
torch.optim.SGD itself.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_pipe.errors import ScheduleError
from hydra_pipe.maths.schedule import Schedule, step_weights

ALL = settings(max_examples=100, deadline=None)


def schedule_of(n_steps: int, n_series: int = 1, **values: object) -> Schedule:
    """Plain SGD with learning rate 0.1, but for `values`: numbers, or arrays of shape (step,) or
    (step, series).
    """
    plain: dict[str, object] = {
        "learning_rate": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "decoupled_decay": 0.0,
        "nesterov": False,
        "updated": True,
        "momentum_started": False,
    }

    def spread(name: str, value: object) -> np.ndarray:
        dtype = bool if name in ("nesterov", "updated", "momentum_started") else np.float64
        array = np.asarray(value, dtype)
        return np.broadcast_to(
            array[:, None] if array.ndim == 1 else array, (n_steps, n_series)
        ).copy()

    return Schedule(**{name: spread(name, value) for name, value in (plain | values).items()})


@st.composite
def schedules(draw: st.DrawFn, real: bool = False, n_series: int = 1) -> Schedule:
    """Any schedule; with `real` one that PyTorch can have: the buffer starts where there is none
    and momentum is not 0.
    """
    n_steps = draw(st.integers(1, 12))

    def numbers(*choices: float, low: float, high: float) -> np.ndarray:
        one = st.one_of(st.sampled_from(choices), st.floats(low, high))
        constant = draw(st.booleans())
        values = (
            [draw(one)] * n_steps
            if constant
            else draw(st.lists(one, min_size=n_steps, max_size=n_steps))
        )
        return np.array(values)

    def flags(likely: bool) -> np.ndarray:
        one = st.sampled_from([likely, likely, not likely])
        return np.array(draw(st.lists(one, min_size=n_steps, max_size=n_steps)))

    series = []
    for _ in range(n_series):
        momentum = numbers(0.0, 0.9, low=0.0, high=0.99)
        updated = flags(likely=True)
        started = flags(likely=False)
        if real:
            started = np.zeros(n_steps, bool)
            started[np.flatnonzero(updated & (momentum != 0))[:1]] = True
        series.append(
            schedule_of(
                n_steps,
                learning_rate=numbers(0.0, 0.1, low=1e-3, high=1.0),
                momentum=momentum,
                dampening=numbers(0.0, low=0.0, high=1.0),
                weight_decay=numbers(0.0, 1e-3, low=0.0, high=0.2),
                decoupled_decay=numbers(0.0, 1e-3, low=0.0, high=0.2),
                nesterov=np.array(
                    draw(st.lists(st.booleans(), min_size=n_steps, max_size=n_steps))
                ),
                updated=updated,
                momentum_started=started,
            )
        )
    return Schedule(
        *(np.concatenate([getattr(s, f.name) for s in series], axis=1) for f in fields(Schedule))
    )


def sweep_on_vectors(schedule: Schedule, series: int, h: np.ndarray) -> np.ndarray:
    """g of each step of the sweep of docs/architecture.md with C = 0, shape (step, parameter)."""
    n_steps = len(schedule.learning_rate)
    gs = np.zeros((n_steps, len(h)))
    a, v = h.copy(), np.zeros_like(h)
    for t in reversed(range(n_steps)):
        eta, mu = schedule.learning_rate[t, series], schedule.momentum[t, series]
        tau, decay = schedule.dampening[t, series], schedule.weight_decay[t, series]
        if not schedule.updated[t, series]:
            continue  # a and v go through a step that changed nothing
        d = -eta * a
        undamped = 1.0 if schedule.momentum_started[t, series] else 1.0 - tau
        if mu == 0.0:
            g = d  # PyTorch: "if momentum != 0", dampening and buffer included
        elif schedule.nesterov[t, series]:
            v = v + mu * d
            g = d + undamped * v
        else:
            v = v + d
            g = undamped * v
        if mu != 0.0:
            v = np.zeros_like(v) if schedule.momentum_started[t, series] else mu * v
        a = (1 - schedule.decoupled_decay[t, series]) * a + decay * g
        gs[t] = g
    return gs


@ALL
@given(schedules(n_series=2))
def test_step_weights_times_the_test_gradient_are_the_sweep_on_vectors(schedule: Schedule) -> None:
    h = np.array([1.5, -0.3, 40.0])
    alpha = step_weights(schedule)
    assert alpha.shape == schedule.learning_rate.shape
    for series in range(2):
        truth = sweep_on_vectors(schedule, series, h)
        np.testing.assert_allclose(
            np.outer(alpha[:, series], h), truth, rtol=1e-12, atol=1e-12 * np.abs(truth).max()
        )


def unrolled(schedule: Schedule, added: Tensor, gradients: Tensor) -> Tensor:
    """The last parameter of torch.optim.SGD's documented rule, with `added[t]` on top of
    `gradients[t]`.
    """
    parameter = torch.tensor(0.7, dtype=torch.float64)
    buffer: Tensor | None = None
    for t in range(len(gradients)):
        if not schedule.updated[t, 0]:
            continue
        g = gradients[t] + added[t] + schedule.weight_decay[t, 0] * parameter
        mu = schedule.momentum[t, 0]
        if mu != 0:
            buffer = g if buffer is None else mu * buffer + (1 - schedule.dampening[t, 0]) * g
            g = g + mu * buffer if schedule.nesterov[t, 0] else buffer
        parameter = (1 - schedule.decoupled_decay[t, 0]) * parameter - schedule.learning_rate[
            t, 0
        ] * g
    return parameter


@ALL
@given(schedules(real=True))
def test_step_weights_are_the_derivative_of_the_last_parameter_by_a_gradient_added_at_each_step(
    schedule: Schedule,
) -> None:
    n_steps = len(schedule.learning_rate)
    added = torch.zeros(n_steps, dtype=torch.float64, requires_grad=True)
    last = unrolled(schedule, added, torch.linspace(-1, 2, n_steps, dtype=torch.float64))
    truth = np.zeros(n_steps)
    if last.requires_grad:  # there is at least one step that the optimiser did not skip
        truth = torch.autograd.grad(last, added)[0].numpy()
    np.testing.assert_allclose(
        step_weights(schedule)[:, 0], truth, rtol=1e-12, atol=1e-12 * np.abs(truth).max()
    )


@settings(max_examples=60, deadline=None)
@given(schedules(real=True))
# momentum taken up, laid down and taken up again, with steps left out between
@example(
    schedule_of(
        7,
        momentum=[0.0, 0.9, 0.0, 0.5, 0.9, 0.9, 0.8],
        dampening=0.3,
        weight_decay=0.1,
        updated=[True, True, True, False, True, False, True],
        momentum_started=[False, True, False, False, False, False, False],
    )
)
def test_step_weights_are_what_torch_optim_sgd_does_with_an_added_gradient(
    schedule: Schedule,
) -> None:
    n_steps = len(schedule.learning_rate)
    # parameter s meets an added gradient of 1 at step s; the last one meets none. The update is
    # linear in the gradients.
    parameter = torch.nn.Parameter(torch.full((n_steps + 1,), 0.7, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for t in range(n_steps):
        optimizer.param_groups[0].update(
            lr=float(schedule.learning_rate[t, 0]),
            momentum=float(schedule.momentum[t, 0]),
            dampening=float(schedule.dampening[t, 0]),
            weight_decay=float(schedule.weight_decay[t, 0]),
            nesterov=bool(schedule.nesterov[t, 0]),
        )
        parameter.grad = None
        if schedule.updated[t, 0]:
            parameter.grad = torch.full_like(parameter, 0.1 * t)
            parameter.grad[t] += 1
        before = parameter.detach().clone()
        optimizer.step()
        if schedule.updated[t, 0]:
            parameter.data -= schedule.decoupled_decay[t, 0] * before
    truth = (parameter[:-1] - parameter[-1]).detach().numpy()
    np.testing.assert_allclose(step_weights(schedule)[:, 0], truth, rtol=1e-10, atol=1e-12)


@ALL
@given(schedules(n_series=3))
def test_series_do_not_touch_each_other(schedule: Schedule) -> None:
    together = step_weights(schedule)
    for series in range(3):
        alone = Schedule(
            *(getattr(schedule, f.name)[:, series : series + 1] for f in fields(Schedule))
        )
        np.testing.assert_array_equal(step_weights(alone)[:, 0], together[:, series])


def test_plain_descent_weighs_each_step_by_minus_its_learning_rate() -> None:
    rates = np.array([0.5, 0.1, 0.025])
    np.testing.assert_array_equal(step_weights(schedule_of(3, learning_rate=rates))[:, 0], -rates)


def test_constant_momentum_sums_a_geometric_series() -> None:
    alpha = step_weights(schedule_of(6, momentum=0.9, momentum_started=[True] + [False] * 5))[:, 0]
    np.testing.assert_allclose(
        alpha, [-0.1 * sum(0.9**i for i in range(6 - t)) for t in range(6)], rtol=1e-13
    )


def test_weight_decay_shrinks_what_earlier_steps_left() -> None:
    alpha = step_weights(schedule_of(5, weight_decay=0.2))[:, 0]
    np.testing.assert_allclose(
        alpha, [-0.1 * (1 - 0.1 * 0.2) ** (4 - t) for t in range(5)], rtol=1e-13
    )


def test_a_step_that_changed_nothing_has_weight_zero() -> None:
    schedule = schedule_of(4, momentum=0.9, weight_decay=0.1, updated=[True, False, True, False])
    assert step_weights(schedule)[[1, 3], 0].tolist() == [0.0, 0.0]


def test_no_steps_have_no_weights() -> None:
    assert step_weights(schedule_of(0)).shape == (0, 1)


def test_weights_do_not_change_the_schedule() -> None:
    schedule = schedule_of(3, momentum=0.9, weight_decay=0.1)
    before = [getattr(schedule, f.name).copy() for f in fields(Schedule)]
    step_weights(schedule)
    for field, values in zip(fields(Schedule), before, strict=True):
        np.testing.assert_array_equal(getattr(schedule, field.name), values)


@pytest.mark.parametrize("name", [f.name for f in fields(Schedule) if f.name != "learning_rate"])
def test_arrays_of_different_shapes_are_refused_by_name(name: str) -> None:
    schedule = schedule_of(3)
    with pytest.raises(
        ScheduleError, match=rf"^{name} has shape \(2, 1\), learning_rate has \(3, 1\)"
    ):
        replace(schedule, **{name: getattr(schedule, name)[:2]})


def test_arrays_of_one_dimension_are_refused() -> None:
    columns = {f.name: getattr(schedule_of(3), f.name)[:, 0] for f in fields(Schedule)}
    with pytest.raises(ScheduleError, match=r"shape \(step, series\), not \(3,\)"):
        Schedule(**columns)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["learning_rate", "momentum", "dampening", "weight_decay"])
def test_values_that_are_not_finite_are_refused_with_their_name_and_step(
    name: str, value: float
) -> None:
    schedule = schedule_of(4, n_series=2)
    values = getattr(schedule, name).copy()
    values[2, 1] = value
    with pytest.raises(ScheduleError, match=rf"^{name} is {value} at step 2"):
        replace(schedule, **{name: values})
