"""From `relevance.zarr` to Parquet rankings. Imports no torch."""
