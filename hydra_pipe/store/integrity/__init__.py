"""Integrity of a run: verification, comparison, repair and pruning."""
