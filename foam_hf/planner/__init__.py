"""The memory planner: predicts how much memory a training run takes, before it starts."""

from foam_hf.planner.planner import Planner, estimate_memory

__all__ = ["Planner", "estimate_memory"]
