"""The settings that a recording depends on, and the checks of a caller's arguments."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hydra_pipe.errors import DataError, RecordError, UsageError, shown
from hydra_pipe.maths.quantise import DTYPES
from hydra_pipe.plan.layout import ENCODING_CHOICES
from hydra_pipe.store import names
from hydra_pipe.store.data.keys import check_keys, digest_of_keys
from hydra_pipe.store.files import location
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.permission import check_writable
from hydra_pipe.store.run.stages import OWNED, RECORD, Settings

Labels = Sequence[int] | Sequence[str] | NDArray[Any]


def record_settings(
    encoding: str,
    dim: int,
    dtype: str | None,
    seed: int,
    n_samples: int,
    sample_keys: Sequence[str] | None,
) -> Settings:
    """Return the settings that every recording depends on; "exact" ignores the budget `dim`."""
    budget = None if encoding == "exact" else dim
    return {
        "encoding": encoding,
        "dim": budget,
        "dtype": dtype,
        "seed": seed,
        "n_samples": n_samples,
    } | setting_of_keys(names.SAMPLE_KEYS_GIVEN, sample_keys)


def setting_of_keys(name: str, keys: Sequence[str] | None) -> Settings:
    """Return the setting `name`, a digest of `keys`. No setting if there are no keys."""
    return {} if keys is None else {name: digest_of_keys(keys)}


def json_settings(settings: Settings) -> Settings:
    """Return `settings` as the manifest will return them, after a passage through JSON.

    Settings read from a manifest then compare equal to the same settings given again.

    Raises:
        UsageError: a value that JSON cannot hold.
    """
    try:
        normal: Settings = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a setting cannot be kept ({error}): give numbers, strings, lists and the like"
        ) from error
    return normal


def needs_recording(run: str | os.PathLike[str], settings: Settings, *, overwrite: bool) -> bool:
    """Tell whether `run` is yet to be recorded with `settings`. Write nothing.

    Raises:
        RunError: it was recorded, or begun, with other settings; or it holds something else.
        PermissionError: writing is not allowed there, or removing existing files is not.
    """
    directory = RunDirectory.open_or_none(run)
    needed = directory is None or overwrite or directory.has_work(RECORD, settings)
    if needed:
        check_writable(location(run), *OWNED)
    return needed


def check_options(encoding: str, dim: int, dtype: str | None) -> None:
    """Refuse impossible options. Raises: UsageError."""
    if encoding not in ENCODING_CHOICES:
        raise UsageError(
            f"encoding {encoding!r} is unknown: choose one of {', '.join(ENCODING_CHOICES)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if dim < 1:
        raise UsageError(f"dim is {dim}: it must be 1 or more")


def checked_ids(sample_ids: ArrayLike | Tensor, n_samples: int) -> NDArray[np.int64]:
    """Return `sample_ids` as int64, shape (batch,).

    Raises:
        RecordError: not integers, or not ids of this training set.
    """
    if isinstance(sample_ids, range):  # NumPy would ask a range for its items one by one
        ids = np.arange(sample_ids.start, sample_ids.stop, sample_ids.step)
    else:
        ids = np.asarray(sample_ids.cpu() if isinstance(sample_ids, Tensor) else sample_ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise RecordError(
            f"sample_ids has shape {ids.shape} and dtype {ids.dtype}: give one integer for each "
            "sample of the batch"
        )
    outside = ids[(ids < 0) | (ids >= n_samples)]
    if outside.size:
        raise RecordError(
            f"sample id {outside[0]} is not among the {n_samples} training samples: ids run from "
            f"0 to {n_samples - 1}"
        )
    return ids.astype(np.int64)


def checked_keys(
    keys: Any, name: str, count: int | None = None, samples: str = "samples"
) -> list[str]:
    """Return keys as a list of strings.

    Args:
        keys: sequence or array of strings.
        name: name of the keys, for messages.
        count: required number of keys; None: any number.
        samples: word for the samples, for messages.

    Raises:
        DataError: a key is no string, is empty or too long, or two samples have it; or the keys are
            not one for each sample.
    """
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise DataError(f"{name} is {shown(keys)}: give a list with one string for each sample")
    found = list(keys)
    if count is not None and len(found) != count:
        raise DataError(f"{name} has {len(found)} entries for {count} {samples}: give one for each")
    check_keys(found, name)
    return found


def checked_labels(
    labels: Any, name: str, count: int | None = None, samples: str = "samples"
) -> NDArray[Any]:
    """Return labels as an array of integers or strings, shape (sample,).

    Args:
        labels: sequence, array or tensor of labels.
        name: name of the labels, for messages.
        count: required number of labels; None: any number.
        samples: word for the labelled samples, for messages.

    Raises:
        DataError: the labels are of another kind or shape, or not one for each sample.
    """
    plain = labels.detach().cpu() if isinstance(labels, Tensor) else labels
    try:
        values = np.asarray(plain)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} cannot be an array ({error}): give one integer or string for each sample"
        ) from error
    if (
        values.dtype.kind == "O"
        and values.ndim == 1
        and all(isinstance(label, str) for label in values)
    ):
        values = values.astype(str)
    if values.ndim == 1 and values.dtype.kind == "b":
        values = values.astype(np.int64)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iuU"):
        raise DataError(
            f"{name} has shape {values.shape} and dtype {values.dtype}: give one integer or "
            "string for each sample"
        )
    if count is not None and len(values) != count:
        raise DataError(
            f"{name} has {len(values)} entries for {count} {samples}: give one for each"
        )
    return values
