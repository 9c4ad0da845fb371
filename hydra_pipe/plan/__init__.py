"""Integers only: which columns, which chunks, how many bytes.

A plan is computed, printed and tested before a byte moves.
"""
