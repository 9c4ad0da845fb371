"""Cleaning: proposals of samples to relabel or drop, decisions on them, and what they gain."""
