"""Plans of a matrix of hypergradients, and of answers from one: within the budget, every column
once, the cheaper way.
"""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from sweep_inputs import EVERY, MIB, input_of, inputs

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import MOST_CHUNK, MOST_FEATURES, MOST_SAMPLES, chunk_columns
from hydra_pipe.plan.costs import BASE_BYTES
from hydra_pipe.plan.from_matrix import AnswerInput, answer_peak_bytes, plan_answers
from hydra_pipe.plan.hypergradient_matrix import of_features, of_samples, plan_matrix
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.records import Answered
from hydra_pipe.plan.sweep import SweepInput, plan_sweep
from hydra_pipe.reduction.materialize import Expansion


@EVERY
@given(inputs())
def test_answers_fit_and_have_every_column_once_in_whole_chunks(what: SweepInput) -> None:
    asked = AnswerInput(what.recording, what.width)
    try:
        plan = plan_answers(asked)
    except BudgetError:
        assert answer_peak_bytes(asked, 1, 1) > what.recording.memory_bytes
        return
    width = plan.columns[0][1]
    assert (
        plan.peak_bytes
        == answer_peak_bytes(asked, width, plan.workers)
        <= what.recording.memory_bytes
    )
    assert [first for first, _ in plan.columns] == list(range(0, what.recording.n_columns, width))
    assert plan.columns[-1][1] == what.recording.n_columns
    assert len(plan.columns) == 1 or width % chunk_columns(width) == 0
    assert chunk_columns(width) <= MOST_CHUNK
    assert plan_answers(asked, width).columns == plan.columns[1:]


def test_answers_that_do_not_fit_say_what_to_do() -> None:
    given = replace(input_of().recording, memory_bytes=BASE_BYTES)
    with pytest.raises(
        BudgetError,
        match=(
            r"answering one column from hypergradients of 44,426 features needs .* raise "
            r"--memory to"
        ),
    ):
        plan_answers(AnswerInput(given, 44_426))


@EVERY
@given(inputs())
def test_a_matrix_is_filled_in_the_cheaper_way_and_gone_on_with_in_the_same(
    what: SweepInput,
) -> None:
    try:
        plan = plan_matrix(what)
    except BudgetError:
        assume(False)
        raise
    assert plan.peak_bytes <= what.recording.memory_bytes
    assert plan.columns[-1][1] == (
        what.width if plan.order == "backward" else what.recording.n_samples
    )
    assert plan.written_bytes == 4 * what.width * what.recording.n_samples
    if len(plan.columns) > 1:
        most_chunk = {"backward": MOST_FEATURES, "forward": MOST_SAMPLES}[plan.order]
        assert plan.columns[0][1] % chunk_columns(plan.columns[0][1], most_chunk) == 0
        assert plan.fills(plan.chunks)
    done = plan.columns[0][1] if len(plan.columns) > 1 else 0
    left = plan_matrix(what, Answered(plan.order, done, 0))
    assert (left.order, left.columns) == (plan.order, plan.columns[1 if done else 0 :])


@pytest.mark.parametrize(
    ("samples", "width", "order"),
    [(5000, 1000, "backward"), (5000, 44_426, "forward"), (60_000, 44_426, "backward")],
)
def test_the_fewer_of_samples_and_features_are_the_columns(
    samples: int, width: int, order: str
) -> None:
    what = input_of(width, n_samples=samples, memory_bytes=16_384 * MIB)
    plan = plan_matrix(what)
    assert (plan.order, plan.noun) == (order, {"backward": "features", "forward": "samples"}[order])
    costs = {
        one.order: plan_sweep(one).lasting_picoseconds
        for one in (of_features(what), of_samples(what))
    }
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
