"""The data of each stage: rows, test gradients, hypergradients, relevance, tables of clean and
evaluate.
"""
