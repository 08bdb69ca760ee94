"""The paper's claims as experiments: read (experiment.py), trained and measured (runs.py), judged (verdict.py)."""
