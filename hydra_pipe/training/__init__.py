"""Training a pipeline, with a recorder or without."""
