"""Pure functions on arrays and tensors: no disk, no Dask, no logging. Reads like docs/architecture.md, "The mathematics"."""
