"""Method `hydra-exact`, which trains again. It needs torch, the pipeline and its data."""
