"""Which columns hold which parameter: properties over models of any make, and two models that
everybody knows.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CHOICES, EVERY, LENET5, MLP, SPARE_COLUMNS, linear, models, other

from hydra_pipe.errors import BudgetError, StoreError
from hydra_pipe.plan.layout import (
    Block,
    EncodingChoice,
    Layout,
    Parameter,
    choose_layout,
)


def layout_of(parameters: list[Parameter], choice: EncodingChoice, spare: int) -> Layout:
    return choose_layout(parameters, choice, len(parameters) + spare, seed=3)


def spans(block: Block) -> list[tuple[int, int]]:
    return [block.columns] if block.inputs is None else [block.columns, block.inputs]


@EVERY
@given(models(), CHOICES, SPARE_COLUMNS)
def test_every_parameter_has_its_block_in_the_order_of_the_model(
    model: list[Parameter], choice: EncodingChoice, spare: int
) -> None:
    layout = layout_of(model, choice, spare)
    assert [(b.name, b.shape, b.group) for b in layout.blocks] == [
        (p.name, p.shape, p.group) for p in model
    ]
    assert layout.seed == 3


@EVERY
@given(models(), CHOICES, SPARE_COLUMNS)
def test_every_column_belongs_to_one_block_and_else_only_to_a_factored_bias_with_its_weight(
    model: list[Parameter], choice: EncodingChoice, spare: int
) -> None:
    layout = layout_of(model, choice, spare)
    bias_of = {p.name: p.bias_of for p in model}
    by_name = {b.name: b for b in layout.blocks}
    owners = [0] * layout.n_features
    for block in layout.blocks:
        if block.encoding == "factored" and block.inputs is None:
            weight = by_name[bias_of[block.name]]
            assert weight.encoding == "factored"
            assert block.columns == weight.columns
            continue
        for first, last in spans(block):
            assert 0 <= first < last <= layout.n_features
            for column in range(first, last):
                owners[column] += 1
    assert owners == [1] * layout.n_features


@EVERY
@given(models(), CHOICES, SPARE_COLUMNS)
def test_blocks_are_as_wide_as_their_encoding_says(
    model: list[Parameter], choice: EncodingChoice, spare: int
) -> None:
    for block, parameter in zip(layout_of(model, choice, spare).blocks, model, strict=True):
        widths = [last - first for first, last in spans(block)]
        if block.encoding == "factored" and block.inputs is not None:
            assert tuple(widths) == parameter.factors
        elif block.encoding == "sketch":
            assert widths[0] < block.numel
        else:
            assert widths == [block.numel]


@EVERY
@given(models(), SPARE_COLUMNS)
def test_exact_loses_nothing_and_takes_the_narrowest_encoding(
    model: list[Parameter], spare: int
) -> None:
    layout = layout_of(model, "exact", spare)
    assert all(block.exact for block in layout.blocks)
    narrowest = 0
    factored = {p.name for p in model if p.factors and sum(p.factors) < p.numel}
    for p in model:
        if p.name in factored:
            assert p.factors is not None
            narrowest += sum(p.factors)
        elif p.bias_of not in factored:
            narrowest += p.numel
    assert layout.n_features == narrowest


@EVERY
@given(models(), st.integers(-3, 3))
def test_exact_has_no_use_for_a_budget(model: list[Parameter], dim: int) -> None:
    assert choose_layout(model, "exact", dim, 0) == choose_layout(model, "exact", 10**9, 0)


@EVERY
@given(models(), st.sampled_from(["auto", "projected"]), SPARE_COLUMNS)
def test_the_budget_is_kept(model: list[Parameter], choice: EncodingChoice, spare: int) -> None:
    assert layout_of(model, choice, spare).n_features <= len(model) + spare


@EVERY
@given(models(), SPARE_COLUMNS)
def test_projected_spends_the_budget_to_the_last_column(model: list[Parameter], spare: int) -> None:
    layout = layout_of(model, "projected", spare)
    # each may do with a column less
    sketched = sum(block.encoding == "sketch" for block in layout.blocks)
    assert 0 <= min(len(model) + spare, sum(p.numel for p in model)) - layout.n_features <= sketched


@EVERY
@given(models(), SPARE_COLUMNS)
def test_projected_has_no_factors(model: list[Parameter], spare: int) -> None:
    assert {block.encoding for block in layout_of(model, "projected", spare).blocks} <= {
        "dense",
        "sketch",
    }


def test_projected_shares_columns_by_the_square_root_of_the_size() -> None:
    layout = choose_layout(other("m", (100,), (10_000,), (2500,)), "projected", 320, 0)
    assert [last - first for first, last in (b.columns for b in layout.blocks)] == [
        20,
        199,
        99,
    ]  # two of them a column less, for the longer runs that their sketches then have


@EVERY
@given(models(), st.integers(0, 10))
def test_auto_is_exact_where_exact_fits(model: list[Parameter], spare: int) -> None:
    exact = choose_layout(model, "exact", 0, 0)
    assert choose_layout(model, "auto", max(exact.n_features, len(model)) + spare, 0) == exact


def shares_by_root_of_size(model: list[Parameter], spare: int) -> list[float]:
    return [(len(model) + spare) * p.numel**0.5 / sum(q.numel**0.5 for q in model) for p in model]


@EVERY
@given(models(), SPARE_COLUMNS)
def test_auto_keeps_a_block_exact_that_is_no_wider_than_its_share(
    model: list[Parameter], spare: int
) -> None:
    layout = layout_of(model, "auto", spare)
    for block, parameter, share in zip(
        layout.blocks, model, shares_by_root_of_size(model, spare), strict=True
    ):
        if parameter.exact_width <= int(share):
            assert block.exact


@EVERY
@given(models(), SPARE_COLUMNS)
def test_auto_sketches_no_block_to_less_than_its_share_of_what_exact_ones_must_leave(
    model: list[Parameter], spare: int
) -> None:
    blocks = layout_of(model, "auto", spare).blocks
    sketched = sum(b.numel**0.5 for b in blocks if not b.exact) / sum(b.numel**0.5 for b in blocks)
    for block, share in zip(blocks, shares_by_root_of_size(model, spare), strict=True):
        if not block.exact:
            # a column for rounding, one for longer runs, and one for each of the others that would
            # have had none
            assert block.columns[1] - block.columns[0] >= int(share * sketched) - 2 - len(model)


def test_auto_is_not_exact_at_the_cost_of_nearly_all_that_others_have() -> None:
    """23 of 26 columns would be less than twice its share, and leave 3 to a block of 30."""
    model = other("pair", (23,), (30,))
    assert [block.exact for block in choose_layout(model, "auto", 26, 0).blocks] == [False, False]
    assert [block.exact for block in choose_layout(model, "auto", 50, 0).blocks] == [True, False]


def test_auto_shares_a_budget_that_projects_everything_as_projected_does() -> None:
    gpt = other(
        "layer", (384, 128), (128, 128), (512, 128), (128, 512), (384,), (128,), (512,), (128,)
    )
    assert [b.columns for b in choose_layout(gpt, "auto", 300, 0).blocks] == [
        b.columns for b in choose_layout(gpt, "projected", 300, 0).blocks
    ]


def test_a_bias_whose_weight_is_sketched_has_columns_of_its_own() -> None:
    layout = choose_layout(linear("m", 500, 400), "auto", 450, 0)
    assert [b.encoding for b in layout.blocks] == ["sketch", "sketch"]
    assert 450 - 2 <= layout.n_features <= 450  # longer runs are worth a column each
    layout = choose_layout([*linear("m", 5000, 400), *linear("n", 3, 3)], "auto", 2600, 0)
    assert [b.encoding for b in layout.blocks] == ["sketch", "sketch", "factored", "factored"]


def test_a_weight_whose_factors_are_no_narrower_than_itself_is_dense_and_so_is_its_bias() -> None:
    layout = choose_layout(linear("m", 2, 2), "auto", 100, 0)
    assert [(b.encoding, b.columns) for b in layout.blocks] == [
        ("dense", (0, 4)),
        ("dense", (4, 6)),
    ]


@pytest.mark.parametrize("choice", ["auto", "exact"])
@pytest.mark.parametrize(
    ("model", "n_parameters", "n_columns"), [(LENET5, 61_706, 3390), (MLP, 669_706, 2842)]
)
def test_well_known_models_are_held_without_loss(
    model: list[Parameter], n_parameters: int, n_columns: int, choice: EncodingChoice
) -> None:
    layout = choose_layout(model, choice, 4096, 0)
    assert sum(block.numel for block in layout.blocks) == n_parameters
    assert layout.n_features == n_columns
    assert all(block.exact for block in layout.blocks)


@pytest.mark.parametrize("choice", ["auto", "projected"])
def test_fewer_columns_than_parameters_are_refused_with_both_numbers_and_the_advice_works(
    choice: EncodingChoice,
) -> None:
    with pytest.raises(BudgetError, match=r"--dim 9 .* 10 parameters: raise it to 10 or more"):
        choose_layout(LENET5, choice, 9, 0)
    assert choose_layout(LENET5, choice, 10, 0).n_features == 10


@EVERY
@given(models(), CHOICES, SPARE_COLUMNS)
def test_a_layout_survives_json(model: list[Parameter], choice: EncodingChoice, spare: int) -> None:
    layout = layout_of(model, choice, spare)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


STORED = json.loads(
    json.dumps(choose_layout([*linear("m", 9, 4), *other("n", (3,))], "exact", 0, 0).to_json())
)


@pytest.mark.parametrize("key", ["n_features", "seed", "blocks"])
def test_a_directory_without_one_of_its_entries_is_damaged(key: str) -> None:
    with pytest.raises(StoreError, match="block directory is damaged"):
        Layout.from_json({k: v for k, v in STORED.items() if k != key})


@pytest.mark.parametrize("key", ["name", "shape", "group", "encoding", "columns", "inputs"])
def test_a_block_without_one_of_its_entries_is_damaged(key: str) -> None:
    damaged = deepcopy(STORED)
    del damaged["blocks"][1][key]
    with pytest.raises(StoreError, match="block directory is damaged"):
        Layout.from_json(damaged)


@pytest.mark.parametrize("key", ["columns", "inputs"])
@pytest.mark.parametrize(
    "columns",
    [[-1, 3], [3, 3], [4, 2], [0, 17], [0], [0, 1, 2], "ab", 5, {}, ["a", "b"], [None, 1]],
)
def test_columns_that_cannot_be_are_damage(key: str, columns: Any) -> None:
    assert STORED["n_features"] == 16
    damaged = deepcopy(STORED)
    damaged["blocks"][0][key] = columns
    with pytest.raises(StoreError, match="block directory is damaged"):
        Layout.from_json(damaged)


def test_an_unknown_encoding_is_damage() -> None:
    damaged = deepcopy(STORED)
    damaged["blocks"][0]["encoding"] = "wavelet"
    with pytest.raises(StoreError, match=r"unknown encoding 'wavelet' of block m\.weight"):
        Layout.from_json(damaged)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value` with every key or index in it."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


N_PLACES = len(list(places(STORED)))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats(-3, 100) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "columns"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, N_PLACES - 1), ANYTHING)
def test_damage_anywhere_is_a_store_error_or_leaves_columns_within_the_array(
    place: int, value: Any
) -> None:
    damaged = deepcopy(STORED)
    container, key = list(places(damaged))[place]
    container[key] = value
    try:
        layout = Layout.from_json(damaged)
    except StoreError:
        return
    assert all(
        0 <= first < last <= layout.n_features
        for block in layout.blocks
        for first, last in spans(block)
    )


def test_a_number_too_large_to_be_one_is_a_store_error() -> None:
    # "1e999" is JSON, and Python reads it as infinity
    for place in range(N_PLACES):
        damaged = deepcopy(STORED)
        container, key = list(places(damaged))[place]
        if isinstance(container[key], int):
            container[key] = json.loads("1e999")
            with pytest.raises(StoreError, match="block directory is damaged"):
                Layout.from_json(damaged)


@pytest.mark.parametrize(
    "data", [[], None, "layout", 3, {"n_features": 3, "seed": 0, "blocks": None}]
)
def test_what_is_no_directory_at_all_is_a_store_error(data: Any) -> None:
    with pytest.raises(StoreError, match="block directory is damaged"):
        Layout.from_json(data)


def test_a_preconditioner_puts_grids_in_the_place_of_projections_that_hide_elements() -> None:
    model = [
        Parameter("wide", (64, 48), 0, sides=(64, 48)),
        Parameter("table", (500, 8), 0, is_table=True),
        Parameter("kernel", (40, 30, 3), 0),
        Parameter("bias", (3,), 0),
    ]
    layout = choose_layout(model, "projected", 300, 3, preconditioned=True)
    assert [b.encoding for b in layout.blocks] == ["grids", "sketch", "grids", "dense"]
    wide, _, kernel, _ = layout.blocks
    assert wide.grids == (64, 48, 4, 4)
    assert kernel.grids == (3600, 1, 4, 1)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    small = choose_layout(model[:1], "projected", 3, 3, preconditioned=True)
    assert small.blocks[0].grids == (64, 48, 3, 1)
    assert small.n_features == 3
