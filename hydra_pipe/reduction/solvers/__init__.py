"""How relevance is computed, a solver a file. `methods.py` says which method has which."""
