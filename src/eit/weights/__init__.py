"""Weights on disk: what they say of themselves, reading, writing and converting them."""
