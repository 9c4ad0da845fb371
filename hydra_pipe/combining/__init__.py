"""Combining the relevance of several runs: mean, standard error, agreement."""
