"""Relevance held against the truth: trainings in which some samples count for less, and what is told from them."""
