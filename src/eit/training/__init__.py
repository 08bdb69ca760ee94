"""Training: one loop, its checkpoints and the folder of a run."""
