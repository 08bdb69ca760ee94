"""What a vision transformer's layers hold, and where its heads look: measured (measure.py) and drawn (report.py)."""
