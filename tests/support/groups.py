"""Tests that one process of pytest-xdist runs together: those of a group, else those of a file."""

import pytest

# Groups that take other processes, a browser, a cluster, a site, trainers or many seconds, the longest first. They are begun
# before all others, or one of them would be waited for alone; and `make quick` leaves them out.
SLOW = (
    "crash",
    "browser",
    "object stores",
    "test_hostile_runs",
    "test_transformers",
    "site",
    "ranks",
    "memory",
    "schedulers",
    "test_lightning",
    "notebook",
    "test_exact",
    "test_trainers_document",
    "test_checkpointing",
    "random models",
    "spark",
    "test_archive",
    "test_golden",
    "test_pipelines",
    "test_evaluate",
    "test_retrainer",
    "test_cleaning",
    "test_probe",
    "test_peers",
    "test_leftovers",
    "test_state",
    "test_streams",
    "test_bad_input",
    "test_export_memory",
)


def group_of(item: pytest.Item) -> str:
    """The group of a test: by its mark, or the name of its file."""
    marker = item.get_closest_marker("xdist_group")
    return str(marker.args[0]) if marker else item.path.stem
