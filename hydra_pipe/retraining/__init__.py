"""Trainings repeated with other weights of the samples, for evaluation and cleaning."""
