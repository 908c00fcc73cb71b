"""What a run will take, before it starts."""

from foam_hf.planner.planner import Planner, estimate_memory

__all__ = ["Planner", "estimate_memory"]
