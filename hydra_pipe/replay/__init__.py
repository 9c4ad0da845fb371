"""Training again: method `hydra-exact`. It needs torch, the pipeline and its data."""
