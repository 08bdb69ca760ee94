"""The models: the family (eit.py), its operators (ops.py), names (registry.py) and cost (complexity.py)."""
