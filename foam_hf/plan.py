"""Keeps `Estimate` and `Plan` importable by their old path, which pickles of version 0.2 name."""

from foam_hf.planner.plan import Estimate, Plan

__all__ = ["Estimate", "Plan"]
