"""What this machine tells of itself, as other systems tell it."""

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_pipe import units
from hydra_pipe.reduction import executors


def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert executors.n_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert executors.n_cores() == 1


def test_with_affinity_only_the_cores_of_this_process_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert executors.n_cores() == 3


@pytest.mark.parametrize(
    ("platform", "told", "n_bytes"), [("darwin", 3 * 2**20, 3 * 2**20), ("linux", 3072, 3 * 2**20)]
)
def test_without_proc_the_peak_counts_in_bytes(
    monkeypatch: pytest.MonkeyPatch, platform: str, told: int, n_bytes: int
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=told))
    assert units.resident_bytes() == n_bytes
