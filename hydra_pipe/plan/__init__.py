"""Integers only: which columns, which chunks, how many bytes. Computed, printed and tested before a byte moves."""
