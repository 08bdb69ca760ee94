"""Weights -> files for other runtimes and other libraries."""
