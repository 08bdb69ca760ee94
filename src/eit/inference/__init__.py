"""Trained models at work: accuracy, predictions, and exported files as models."""
