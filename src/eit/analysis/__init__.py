"""Frequencies, attention and class token of a vision model: measured (measure.py), compared (compare.py), reported."""
