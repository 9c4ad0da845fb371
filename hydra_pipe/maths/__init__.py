"""Pure functions on arrays and tensors: no disk, no Dask, no logging.

The formulas are those of docs/architecture.md, "The mathematics".
"""
