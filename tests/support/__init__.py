"""What many tests use: pipelines to record, comparisons, processes. Fixtures are in conftest.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
