"""A run directory and its stages: the manifest, locks, footprints of files, and the runner of
stages.
"""
