"""The report: one HTML page about a run's relevance."""
