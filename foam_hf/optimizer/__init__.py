"""FOAM as a `torch.optim.Optimizer`, and what surrounds it."""

from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.nonfinite import NonfiniteGradientError

__all__ = ["FOAM", "NonfiniteGradientError"]
