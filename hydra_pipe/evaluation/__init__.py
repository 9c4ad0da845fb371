"""Evaluation: relevance against the truth, found by training with less weight on some samples."""
