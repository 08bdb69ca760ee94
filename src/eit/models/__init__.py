"""The models: the family (eit.py), its operators (ops.py), names (registry.py) and cost (complexity.py)."""

from eit import operators
from eit.models import ops

ops.FASTER_ON_CPU.update(operators.chosen())
