"""The paper's claims as experiments: files of experiments (experiment.py), runs (runs.py), and weighed (verdict.py)."""
