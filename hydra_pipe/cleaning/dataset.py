"""A dataset as a proposal wants it: without the dropped samples, with the new labels."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hydra_pipe.cleaning.treatments import AS_GIVEN, DECIDED, HOW, WEIGHTED, Proposed, Treatment
from hydra_pipe.errors import DataError, RunError, UsageError, shown
from hydra_pipe.recording.datasets import pair_of
from hydra_pipe.recording.settings import checked_keys
from hydra_pipe.store.data.clean_result import read_proposal
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.reduced_run import keys_of
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS
from hydra_pipe.store.run.stages import CLEAN
from hydra_pipe.types import F32, I64

# Name under which a mapping has its weight.
WEIGHT = "weight"


class CleanedDataset(Dataset[Any]):
    """A map-style dataset without the dropped samples, and with new labels.

    Items are taken from the dataset behind when they are asked for, and are of the same form. Only
    the target of a relabelled sample is another one, of the same type. Weighted items have one
    more part: (input, target, weight), or a mapping with "weight".

    Args:
        dataset: map-style dataset of (input, target), or of mappings with targets.
        treatment: weights and classes of its samples.
        given: class that each sample was trained with, shape (sample,). -1: unknown.
        names: label of each class, for targets that are text.
        places: place of each sample in `dataset`, shape (sample,). -1: it is not there. None: the
            samples are in the order of the run.
        weighted: True to give each item its weight, float.

    Attributes:
        ids: sample of each item in the run, int64, shape (item,).
        weights: weight of each item, float32, shape (item,).
        classes: class that replaces the target of each item, int64, shape (item,). -1: none does.
    """

    ids: I64
    weights: F32
    classes: I64

    def __init__(
        self,
        dataset: Any,
        treatment: Treatment,
        given: I64,
        names: NDArray[Any] | None = None,
        places: I64 | None = None,
        *,
        weighted: bool = False,
    ) -> None:
        self._dataset, self._names, self._weighted = dataset, names, weighted
        self._places = np.arange(len(given)) if places is None else places
        stay = self._places >= 0
        self.ids = np.flatnonzero(stay if weighted else stay & (treatment.weights > 0))
        self.weights = treatment.weights[self.ids]
        self.classes, self._given = treatment.classes[self.ids], given[self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        """Return an item.

        Raises:
            DataError: the target of a relabelled sample is not the class that the run was trained
                with, or is not one class.
            IndexError: there is no such item.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        item = self._dataset[int(self._places[self.ids[index]])]
        if self.classes[index] != AS_GIVEN:
            item = self._relabelled(item, index)
        return _with_weight(item, float(self.weights[index])) if self._weighted else item

    def _relabelled(self, item: Any, index: int) -> Any:
        inputs, given = pair_of(item, "the dataset")
        target = self._other(given, index)
        if isinstance(item, Mapping):
            (name,) = item.keys() - inputs.keys()
            return {**item, name: target}
        return _like(item, [item[0], target, *item[2:]])

    def _other(self, target: Any, index: int) -> Any:
        """Return the target of an item that gets another class."""
        sample, was, now = int(self.ids[index]), int(self._given[index]), int(self.classes[index])
        if isinstance(target, str) and self._names is not None:
            _check(sample, target, self._names[was])
            return str(self._names[now])
        if isinstance(target, Tensor):
            if target.dim() or target.is_floating_point():
                raise _no_class(sample, target)
            _check(sample, target.item(), was)
            return torch.as_tensor(now, dtype=target.dtype)
        if isinstance(target, bool) or not isinstance(target, int | np.integer):
            raise _no_class(sample, target)
        _check(sample, int(target), was)
        return type(target)(now)


def _check(sample: int, target: object, expected: object) -> None:
    """Refuse a dataset that is not the one of the run. Raises: DataError."""
    if target != expected:
        raise DataError(
            f"sample {sample} has the target {target}, and the run was trained with {expected}: "
            "give the dataset of the run, in its order"
        )


def _no_class(sample: int, target: object) -> DataError:
    return DataError(
        f"the target of sample {sample} is a {type(target).__name__} and not the number of one "
        "class, so no other class can replace it: give how='drop'"
    )


def _like(item: Any, parts: list[Any]) -> Any:
    """Return `parts` as a list or tuple of the type of `item`, a plain tuple if that fails."""
    if isinstance(item, list):
        return parts
    return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)


def _with_weight(item: Any, weight: float) -> Any:
    if isinstance(item, Mapping):
        return {**item, WEIGHT: weight}
    inputs, target = pair_of(item, "the dataset")
    return inputs, target, weight


def cleaned(
    dataset: Any,
    run: str | os.PathLike[str],
    *,
    method: str = DYNAMICS,
    how: str = DECIDED,
    keys: Sequence[str] | None = None,
) -> CleanedDataset:
    """Return a training set as the proposal of a run wants it.

    Args:
        dataset: training set of the run: a map-style dataset of (input, target), or of mappings
            with targets, such as one of Hugging Face. Its indices are the ids of the samples,
            unless `keys` are given.
        run: directory of the run, after `hydra_pipe.clean`.
        method: name of the proposal, as for `hydra_pipe.clean`.
        how: "proposed" relabels and drops as the files say, decisions included. The others are
            the treatments that `clean --retrain` compares: "drop" leaves out all proposed
            samples; "relabel" gives them the suggested labels, and keeps those without one;
            "mixed" relabels where the suggestion is likely right, and drops the others;
            "weighted" keeps all samples, and adds to each the weight of its loss, one less the
            chance that its label is wrong.
        keys: key of each sample of `dataset`, where its order or its size is another one than in
            the run. Samples are found by the keys that were recorded. Samples of the run that
            `dataset` lacks are left out.

    Raises:
        RunError: the run has no proposal, or no keys.
        UsageError: `how` is unknown, or the proposal has no chances.
        DataError: the dataset has another number of samples, or samples with keys that the run
            does not have. Its items raise `DataError` too if their targets are not those of the
            run.
    """
    if how not in HOW:
        raise UsageError(f"how={how!r}: give one of {', '.join(HOW)}")
    directory, stage = RunDirectory.open(run), CLEAN.of(method)
    directory.require(stage, directory.command(stage))
    n_samples = directory.stages[stage].count("n_samples", least=1)
    try:
        _, drop, judged, _, summary = read_proposal(directory.path / stage.area, n_samples)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunError(
            f"{directory.path}: the proposal is damaged ({error}): make it again with "
            f"{directory.command(stage)} --overwrite"
        ) from error
    places = None
    if keys is not None:
        places = _places(keys_of(directory, method), directory, dataset, keys, n_samples)
    if places is None and len(dataset) != n_samples:
        raise DataError(
            f"the dataset has {len(dataset):,} samples, and {directory.path} was trained on "
            f"{n_samples:,}: give the dataset of the run, in its order"
        )
    proposed = Proposed.of(drop, judged, n_samples)
    if how == WEIGHTED and proposed.weights is None:
        raise UsageError(
            f"how={how!r}: relevance ({method}) has no chances of wrong labels: give "
            f"method={DYNAMICS!r}"
        )
    given = np.full(n_samples, AS_GIVEN, np.int64)
    known = judged.column("given_class").fill_null(AS_GIVEN).to_numpy()
    given[judged.column("train_id").to_numpy()] = known
    names = None if summary.get("classes") is None else np.array(summary["classes"], object)
    return CleanedDataset(
        dataset, proposed.treated(how), given, names, places, weighted=how == WEIGHTED
    )


def _places(
    recorded: Keys | None,
    directory: RunDirectory,
    dataset: Any,
    keys: Sequence[str],
    n_samples: int,
) -> I64:
    """Return the place of each sample of the run in `dataset`, shape (sample,). -1: none.

    Raises:
        RunError: the run has no keys.
        DataError: the keys are not one for each sample of `dataset`, or the run lacks one.
    """
    if recorded is None:
        raise RunError(
            f"{directory.path} was recorded without keys of its samples: leave out keys=, and give "
            "the dataset of the run in its order"
        )
    given = checked_keys(keys, "keys", len(dataset), "samples of the dataset")
    ids = recorded.ids_of(given)
    if (ids < 0).any():
        raise DataError(
            f"{directory.path} has no training sample with the key "
            f"{shown(given[int(np.argmin(ids))])}: give samples of the run only"
        )
    places = np.full(n_samples, -1)
    places[ids] = np.arange(len(ids))
    return places
