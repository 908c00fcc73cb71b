"""Keeps `OptimizerMemoryCallback` importable by its old path, which pickles of version 0.2 name."""

from foam_hf.trainer.callback import OptimizerMemoryCallback

__all__ = ["OptimizerMemoryCallback"]
