"""The path of `NonfiniteGradientError` in version 0.2 and earlier."""

from foam_hf.optimizer.nonfinite import NonfiniteGradientError

__all__ = ["NonfiniteGradientError"]
