"""Solvers that compute relevance, one a file. `methods.py` lists the solvers of each method."""
