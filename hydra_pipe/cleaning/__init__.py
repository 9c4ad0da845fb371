"""Cleaning: relevance as proposals of samples to relabel or drop. Only retraining imports torch."""
