"""``FOAM``, the optimizer, as a ``torch.optim.Optimizer``, and the error it raises for gradients that are NaN."""

from foam_hf.optimizer.foam import FOAM
from foam_hf.optimizer.nonfinite import NonfiniteGradientError

__all__ = ["FOAM", "NonfiniteGradientError"]
