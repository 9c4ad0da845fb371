"""Export of `relevance.zarr` to Parquet rankings. Imports no torch."""
