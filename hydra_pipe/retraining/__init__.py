"""Trainings made again with other weights of the samples: what evaluation and cleaning compare with."""
