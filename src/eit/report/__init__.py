"""Pages to look at: of a run (run.py) and of an evaluation (mistakes.py), with advice that follows from the figures."""
