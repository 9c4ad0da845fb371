"""From relevance to a decision: which training samples to relabel or drop. Only what trains again imports torch."""
