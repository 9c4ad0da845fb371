"""hydra_pipe.cleaned: datasets of several kinds without dropped samples, with new labels."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.mislabelled import N, small
from torch.utils.data import DataLoader, TensorDataset

import hydra_pipe
from hydra_pipe.errors import DataError, RunError, UsageError

GIVEN = small().train.tensors[1].numpy()
Item = namedtuple("Item", "x y")


@pytest.fixture(scope="module")
def decided(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two samples to drop, two to relabel, and one that stays."""
    import shutil

    directory = tmp_path_factory.mktemp("decided")
    run = Path(shutil.copytree(made, directory / "run"))
    (directory / "own.csv").write_text(
        "sample,decision,label\n3,drop,\n8,drop,\n"
        f"5,relabel,{(GIVEN[5] + 1) % 4}\n59,relabel,{(GIVEN[59] + 2) % 4}\n"
    )
    hydra_pipe.clean(run, decisions=directory / "own.csv", undecided="keep")
    return run


def hugging_face() -> Any:
    """Import what takes two seconds only in the process that runs these tests."""
    import datasets

    return datasets.Dataset.from_dict({"x": list(range(N)), "label": GIVEN.tolist()})


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: small().train,
    "tuples of numbers": lambda: [(np.zeros(2), int(y)) for y in GIVEN],
    "numpy": lambda: [(np.zeros(2), y) for y in GIVEN],
    "lists": lambda: [[0.0, int(y), "more"] for y in GIVEN],
    "named": lambda: [Item(0.0, int(y)) for y in GIVEN],
    "mappings": lambda: [{"input_ids": [1, 2], "labels": int(y)} for y in GIVEN],
    "Hugging Face": hugging_face,
    "Hugging Face, tensors": lambda: hugging_face().with_format("torch"),
}


def target_of(item: Any) -> Any:
    if isinstance(item, dict):
        return item["labels"] if "labels" in item else item["label"]
    return item[1]


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_those_that_stay_with_targets_of_the_same_type(decided: Path, kind: str) -> None:
    dataset = KINDS[kind]()
    found = hydra_pipe.cleaned(dataset, decided)
    assert found.ids.tolist() == [i for i in range(N) if i not in (3, 8)]
    assert len(found) == N - 2
    expected = GIVEN.copy()
    expected[5], expected[59] = (GIVEN[5] + 1) % 4, (GIVEN[59] + 2) % 4
    assert [int(target_of(item)) for item in found] == expected[found.ids].tolist()
    own, given = found[4], dataset[5]
    assert type(own) is type(given)
    assert type(target_of(own)) is type(target_of(given))
    assert found[-1] is not None
    with pytest.raises(IndexError):
        found[len(found)]
    assert len(list(DataLoader(found, batch_size=29))) == 2


def test_nothing_is_read_before_it_is_asked_for(decided: Path) -> None:
    class Lazy:
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return 0.0, int(GIVEN[index])

    asked: list[int] = []
    found = hydra_pipe.cleaned(Lazy(), decided)
    assert asked == []
    assert found[4][1] == (GIVEN[5] + 1) % 4
    assert asked == [5]


@pytest.mark.parametrize(
    ("how", "length", "n_new"),
    [("proposed", 58, 2), ("drop", 56, 0), ("relabel", 60, 4), ("mixed", None, None)],
)
def test_treatments_are_those_that_retraining_compares(
    decided: Path, how: str, length: int | None, n_new: int | None
) -> None:
    found = hydra_pipe.cleaned(small().train, decided, how=how)
    if length is not None:
        assert (len(found), int((found.classes >= 0).sum())) == (length, n_new)


def test_weights_come_with_each_item(decided: Path) -> None:
    found = hydra_pipe.cleaned(small().train, decided, how="weighted")
    assert len(found) == N
    assert [item[2] for item in found] == found.weights.tolist()
    assert (found.weights[3], found.weights[8], found.weights[5]) == (0, 0, 1), "as decided"
    assert ((found.weights > 0) & (found.weights < 1)).sum() > 5
    _, _, weights = next(iter(DataLoader(found, batch_size=N)))
    np.testing.assert_allclose(weights, found.weights)
    assert hydra_pipe.cleaned(KINDS["mappings"](), decided, how="weighted")[3]["weight"] == 0


def test_another_dataset_is_refused(decided: Path, made: Path) -> None:
    with pytest.raises(DataError, match="has 61 samples"):
        hydra_pipe.cleaned(range(61), decided)
    other = TensorDataset(torch.zeros(N), torch.from_numpy((GIVEN + 1) % 4))
    with pytest.raises(DataError, match="sample 5 has the target"):
        hydra_pipe.cleaned(other, decided)[4]
    vectors = TensorDataset(torch.zeros(N), torch.zeros(N, 4))
    with pytest.raises(DataError, match="the number of one class"):
        hydra_pipe.cleaned(vectors, decided)[4]
    assert len(hydra_pipe.cleaned(vectors, decided, how="drop")[0]) == 2
    with pytest.raises(UsageError, match="how='best'"):
        hydra_pipe.cleaned(small().train, decided, how="best")
    with pytest.raises(RunError, match="hydra-pipe clean"):
        hydra_pipe.cleaned(small().train, made, method="hydra")


def test_relevance_has_no_weights(run: Path) -> None:
    hydra_pipe.clean(run, method="hydra", lowest=5)
    with pytest.raises(UsageError, match="no chances"):
        hydra_pipe.cleaned(small().train, run, method="hydra", how="weighted")
    assert len(hydra_pipe.cleaned(small().train, run, method="hydra", how="drop")) == N - 5


def test_targets_may_be_names(tmp_path: Path) -> None:
    from clusters import NAMES, made

    wrong = made(tmp_path / "run", labels="names")
    drop = hydra_pipe.clean(tmp_path / "run", lowest=3).drop.to_pylist()
    rows = pq_rows(tmp_path / "run")
    dataset = [(0.0, rows[i]["label"]) for i in range(len(rows))]
    found = hydra_pipe.cleaned(dataset, tmp_path / "run")
    for row in drop:
        assert found[row["train_id"]][1] == row["suggested_label"] in NAMES.tolist()
    assert len(wrong)


def pq_rows(run: Path) -> dict[int, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(run / "cleaning" / "method=dynamics" / "judged.parquet")
    return {row["train_id"]: row for row in table.to_pylist()}
