"""Recording of a training run to `gradients.zarr`: hooks, encoder, recorder."""
