"""Keeps `NonfiniteGradientError` importable by its path in version 0.2 and earlier."""

from foam_hf.optimizer.nonfinite import NonfiniteGradientError

__all__ = ["NonfiniteGradientError"]
