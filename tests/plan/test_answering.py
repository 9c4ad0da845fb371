"""Plans of a matrix of hypergradients, and of answers from one: within the budget, every column once, the cheaper way."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from test_sweeping import EVERY, MIB, input_of, inputs

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.answering import AnswerInput, answer_peak_bytes, plan_answers
from hydra_pipe.plan.costs import BASE_BYTES
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.reduction import BACKWARD, FORWARD, Answered
from hydra_pipe.plan.sweeping import MOST_CHUNK, SweepInput, chunk_columns, of_features, of_samples, plan_matrix, plan_sweep
from hydra_pipe.reduction.expansion import Expansion


@EVERY
@given(inputs())
def test_answers_fit_and_have_every_column_once_in_whole_chunks(what: SweepInput) -> None:
    asked = AnswerInput(what.recording, what.width)
    try:
        plan = plan_answers(asked)
    except BudgetError:
        assert answer_peak_bytes(asked, 1, 1) > what.recording.memory_bytes
        return
    width = plan.test_blocks[0][1]
    assert plan.peak_bytes == answer_peak_bytes(asked, width, len(plan.row_runs)) <= what.recording.memory_bytes
    assert [first for first, _ in plan.test_blocks] == list(range(0, what.recording.n_columns, width))
    assert plan.test_blocks[-1][1] == what.recording.n_columns
    assert len(plan.test_blocks) == 1 or width % chunk_columns(width) == 0
    assert chunk_columns(width) <= MOST_CHUNK
    assert plan_answers(asked, width).test_blocks == plan.test_blocks[1:]


def test_answers_that_do_not_fit_say_what_to_do() -> None:
    given = replace(input_of().recording, memory_bytes=BASE_BYTES)
    with pytest.raises(
        BudgetError, match=r"answering one column from hypergradients of 44,426 features needs .* raise --memory to"
    ):
        plan_answers(AnswerInput(given, 44_426))


@EVERY
@given(inputs())
def test_a_matrix_is_filled_in_the_cheaper_way_and_gone_on_with_in_the_same(what: SweepInput) -> None:
    try:
        way, plan = plan_matrix(what)
    except BudgetError:
        assume(False)
        raise
    assert plan.peak_bytes <= what.recording.memory_bytes
    assert plan.test_blocks[-1][1] == (what.width if plan.order == BACKWARD else what.recording.n_samples)
    assert plan.written_bytes == 4 * what.width * what.recording.n_samples
    if len(plan.test_blocks) > 1:
        assert plan.test_blocks[0][1] % chunk_columns(plan.test_blocks[0][1], way.most_chunk) == 0
    done = plan.test_blocks[0][1] if len(plan.test_blocks) > 1 else 0
    again, left = plan_matrix(what, Answered(plan.order, done, 0))
    assert (again.order, left.test_blocks) == (plan.order, plan.test_blocks[1 if done else 0 :])


@pytest.mark.parametrize(
    ("samples", "width", "order"), [(5000, 1000, BACKWARD), (5000, 44_426, FORWARD), (60_000, 44_426, BACKWARD)]
)
def test_the_fewer_of_samples_and_features_are_the_columns(samples: int, width: int, order: str) -> None:
    what = input_of(width, n_samples=samples, memory_bytes=16_384 * MIB)
    way, plan = plan_matrix(what)
    assert (way.order, plan.order) == (order, order)
    costs = {one.order: plan_sweep(one).lasting_picoseconds for one in (of_features(what), of_samples(what))}
    assert plan.lasting_picoseconds == min(costs.values())


def test_the_width_of_a_layout_is_that_of_its_gradients_multiplied_out() -> None:
    layout = Layout(
        (
            Block("c", (7,), 0, "dense", (0, 7)),
            Block("w", (3, 5), 0, "factored", (7, 10), (10, 15)),
            Block("b", (3,), 0, "factored", (7, 10)),
            Block("k", (40, 50), 0, "kron", (15, 21), kron=(40, 50, 2, 3)),
            Block("s", (90,), 0, "sketch", (21, 25)),
        ),
        25,
        0,
    )
    assert layout.whole_width == Expansion(layout).width == 7 + 15 + 3 + 6 + 4
