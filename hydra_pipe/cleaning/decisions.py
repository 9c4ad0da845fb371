"""Decisions of a person on samples, from a file. They override a proposal."""

import csv
import hashlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hydra_pipe.cleaning.proposal import Cleaning, divided
from hydra_pipe.errors import UsageError, shown
from hydra_pipe.store.data.clean_result import DECISIONS, DROP, KEEP, RELABEL, RETRAINING
from hydra_pipe.store.data.keys import Keys
from hydra_pipe.store.data.rankings import KEY

# Columns of the file. The first may be the keys of the samples.
COLUMNS = ("sample", "decision", "label")
_OF_KEYS = (KEY, *COLUMNS[1:])
# What happens to proposals that nobody has decided on: they stay proposed, or their samples stay.
PROPOSED = "proposed"
UNDECIDED = (PROPOSED, KEEP)
_EXAMPLE = (
    "write lines such as 17,relabel,3 below the line sample,decision,label, or keys below the line "
    "key,decision,label"
)


@dataclass(frozen=True)
class Decision:
    """A decision on a sample.

    Args:
        action: "keep", "relabel" or "drop".
        number: class that the sample gets. None unless the action is "relabel".
    """

    action: str
    number: int | None


@dataclass(frozen=True)
class Decisions:
    """Decisions of a file.

    Args:
        of_sample: decision on each sample, by its id.
        undecided: "proposed" or "keep": what happens to the other proposals.
        digest: SHA-256 of the file.
    """

    of_sample: dict[int, Decision]
    undecided: str
    digest: str

    @classmethod
    def read(cls, file: str | os.PathLike[str], undecided: str, keys: Keys | None) -> "Decisions":
        """Read a CSV file with the columns sample, decision and label, or key, decision and label.

        Args:
            file: path of the file.
            undecided: "proposed" or "keep".
            keys: keys of the training samples. None: they have none.

        Raises:
            UsageError: the file cannot be read, a line is no decision, or no sample has a key. The
                message has the number of the line.
            StoreError: keys are damaged.
        """
        if undecided not in UNDECIDED:
            raise UsageError(f"--undecided {undecided}: give one of {', '.join(UNDECIDED)}")
        try:
            content = Path(file).read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--decisions {file} cannot be read as text ({shown(error)}): give the CSV file "
                "that the page of the report saves"
            ) from error
        lines = csv.reader(StringIO(text, newline=""))
        columns = tuple(cell.strip() for cell in next(lines, []))
        if columns not in (COLUMNS, _OF_KEYS):
            raise UsageError(
                f"--decisions {file} does not begin with {','.join(COLUMNS)}: {_EXAMPLE}"
            )
        found: dict[int, Decision] = {}
        written = [
            (f"--decisions {file}, line {lines.line_num}", [cell.strip() for cell in cells])
            for cells in lines
            if cells
        ]
        if columns == _OF_KEYS:
            written = _with_ids(written, keys)
        for where, cells in written:
            sample, decision = _parsed(where, cells)
            if found.setdefault(sample, decision) != decision:
                raise UsageError(f"{where}: sample {sample} is decided twice: leave one line")
        return cls(found, undecided, hashlib.sha256(content).hexdigest())

    def are_of(self, found: Cleaning) -> bool:
        """Tell whether these decisions were made on a proposal already."""
        before = found.summary.get(DECISIONS)
        return isinstance(before, dict) and (before.get("sha256"), before.get("undecided")) == (
            self.digest,
            self.undecided,
        )


def _with_ids(
    written: list[tuple[str, list[str]]], keys: Keys | None
) -> list[tuple[str, list[str]]]:
    """Return lines, each with the place where it stands, with ids in place of keys.

    Raises:
        UsageError: no sample has a key.
    """
    of_lines = [cells[0] for _, cells in written]
    ids = [-1] * len(written) if keys is None else keys.ids_of(of_lines).tolist()
    for (where, _), key, sample in zip(written, of_lines, ids, strict=True):
        if sample < 0:
            raise UsageError(f"{where}: no training sample has the key {shown(key)}")
    return [
        (where, [str(sample), *cells[1:]])
        for (where, cells), sample in zip(written, ids, strict=True)
    ]


def _parsed(where: str, cells: list[str]) -> tuple[int, Decision]:
    if len(cells) != len(COLUMNS) or not cells[0].isdecimal():
        raise UsageError(
            f"{where} is no decision on a sample ({shown(','.join(cells))}): {_EXAMPLE}"
        )
    sample, action, label = int(cells[0]), cells[1], cells[2]
    if action not in (KEEP, RELABEL, DROP):
        raise UsageError(f"{where}: the decision is {shown(action)}: write keep, relabel or drop")
    if (action == RELABEL) != label.isdecimal() or (label and action != RELABEL):
        raise UsageError(
            f"{where}: {action} with the label {shown(label)}: write the number of a class for "
            "relabel, and nothing for keep and drop"
        )
    return sample, Decision(action, int(label) if label else None)


def decided(found: Cleaning, decisions: Decisions) -> Cleaning:
    """Return a proposal with decisions in place of its own actions.

    Args:
        found: the proposal, decided or not. Earlier decisions are forgotten.
        decisions: the decisions.

    Raises:
        UsageError: a decision is on a sample that was not judged, or names a class that the run
            does not have; or all samples would be dropped.
    """
    judged, n_samples = found.judged, len(found.keep) + found.drop.num_rows
    classes = found.summary.get("classes")
    _check(decisions, judged, n_samples, classes)
    keep, drop = divided(_with_decisions(judged, decisions, classes), n_samples)
    if drop.column("action").to_pylist().count(DROP) == n_samples:
        raise UsageError("--decisions drop all training samples, and some must stay: keep some")
    actions = Counter(decision.action for decision in decisions.of_sample.values())
    n_undecided = int(
        np.setdiff1d(
            divided(judged, n_samples)[1].column("train_id").to_numpy(),
            np.array(list(decisions.of_sample), np.int64),
        ).size
    )
    stay = "stay proposed (--undecided keep keeps these samples)"
    says = [
        f"{len(decisions.of_sample):,} samples decided: {actions[KEEP]:,} to keep, "
        f"{actions[RELABEL]:,} to relabel, {actions[DROP]:,} to drop",
        f"{n_undecided:,} proposals are undecided: they "
        f"{stay if decisions.undecided == PROPOSED else 'are kept as given'}",
    ]
    told = {
        "sha256": decisions.digest,
        "undecided": decisions.undecided,
        "n_decided": len(decisions.of_sample),
        "n_undecided": n_undecided,
        "says": says,
    }
    return replace(
        found,
        is_new=True,
        keep=keep,
        drop=drop,
        retraining=[],
        summary={k: v for k, v in found.summary.items() if k != RETRAINING} | {DECISIONS: told},
    )


def _check(
    decisions: Decisions, judged: pa.Table, n_samples: int, classes: list[Any] | None
) -> None:
    ids = set(judged.column("train_id").to_pylist())
    for sample, decision in decisions.of_sample.items():
        if sample >= n_samples:
            raise UsageError(
                f"--decisions: sample {sample}: the run has the samples 0 to {n_samples - 1}: give "
                "decisions on this run"
            )
        if sample not in ids and decision.action != KEEP:
            raise UsageError(
                f"--decisions: sample {sample} was never trained on: it can only be kept"
            )
        if decision.number is None:
            continue
        if classes is None:
            raise UsageError(
                f"--decisions: sample {sample}: the targets of this run are not known as classes, "
                "so none can be relabelled: keep or drop"
            )
        if decision.number >= len(classes):
            raise UsageError(
                f"--decisions: sample {sample}: label {decision.number}: the classes are 0 to "
                f"{len(classes) - 1}"
            )


def _with_decisions(judged: pa.Table, decisions: Decisions, classes: list[Any] | None) -> pa.Table:
    """Return the table of judged samples with decided actions and labels."""
    columns = {
        name: judged.column(name).to_pylist() for name in _CHANGED if name in judged.column_names
    }
    if decisions.undecided == KEEP:
        columns["action"] = [KEEP] * len(judged)
    given = judged.column("given_class").to_pylist()
    for row, sample in enumerate(judged.column("train_id").to_pylist()):
        decision = decisions.of_sample.get(sample)
        if decision is None:
            continue
        number = decision.number
        stays = decision.action == KEEP or (number is not None and number == given[row])
        columns["action"][row] = KEEP if stays else decision.action
        columns["decided"][row] = True
        columns["reason"][row] = "; ".join(filter(None, [_BY_PERSON, columns["reason"][row]]))
        if number is not None and number != columns["suggested_class"][row]:
            assert classes is not None, "_check has refused it"
            columns["suggested_class"][row] = number
            columns["suggested_label"][row] = classes[number]
            for name in _OF_SUGGESTION:
                if name in columns:
                    columns[name][row] = None
    for name, values in columns.items():
        at = judged.schema.get_field_index(name)
        field = judged.schema.field(at)
        judged = judged.set_column(at, field, pa.array(values, field.type))
    return judged


_BY_PERSON = "decided by a person"
_OF_SUGGESTION = ("suggested_chance", "suggested_confidence")
_CHANGED = ("action", "suggested_label", "suggested_class", "reason", "decided", *_OF_SUGGESTION)
