"""The paper's claims as experiments: matrices of runs (matrix.py), trained (cells.py), and weighed (verdict.py)."""
