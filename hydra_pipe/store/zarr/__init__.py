"""Zarr v3 as this project writes and reads it: codec, arrays, shards. The package of this name is
elsewhere.
"""
