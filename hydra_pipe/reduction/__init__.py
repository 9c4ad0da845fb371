"""Reduction of `gradients.zarr` to `relevance.zarr`, out of core, with Dask. Imports no torch."""
