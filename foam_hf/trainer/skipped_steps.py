"""Reports steps that DeepSpeed leaves out because gradients were NaN or infinite, as FOAM reports its own.

DeepSpeed looks at the norm of all gradients before it calls an optimizer, so FOAM never sees them.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from foam_hf.optimizer.nonfinite import NonfiniteGradientError
from foam_hf.trainer.names import foam_of
from foam_hf.trainer.private import skipped_steps


class SkippedSteps(TrainerCallback):
    """Raises NonfiniteGradientError for a step that DeepSpeed leaves out, if ``nonfinite`` is "error"."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = skipped_steps(self._trainer)  # of a run that was resumed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self._seen = self._seen, skipped_steps(self._trainer)
        foam = foam_of(self._trainer)
        if self._seen > before and any(group["nonfinite"] == "error" for group in getattr(foam, "param_groups", ())):
            raise NonfiniteGradientError(
                f"step {state.global_step}: gradients are NaN or infinite, so DeepSpeed left out the whole step, and "
                "no weight has changed. Expected finite gradients: a lower learning rate, other data or clipping may "
                "help; nonfinite='skip' lets DeepSpeed leave out such steps, and goes on",
                [],
            )
