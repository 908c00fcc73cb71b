"""Which optimizers update inside the backward pass, and what becomes of those that were to and do not."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

active: weakref.WeakSet[Any] = weakref.WeakSet()  # each GradientRelease lives as long as its hooks


def is_released(optimizer: Optimizer) -> bool:
    """Whether hooks update the parameters of `optimizer` inside the backward pass."""
    return any(release._optimizer is optimizer for release in active)


def expect_release(optimizer: Optimizer) -> None:
    """Let the first step of `optimizer` raise RuntimeError if no hook releases its gradients by then."""
    asked = True

    def first_step(stepping: Optimizer, *_: Any) -> None:
        nonlocal asked
        if asked and not is_released(stepping):
            raise RuntimeError(
                "gradient_release=true was asked for, and at the first step no hook releases gradients: Trainer.train "
                "sets them up, and this run has a training loop of its own, which does not call it (PPO trainers have "
                "one). Nothing was updated. Expected gradient_release=false, or "
                "foam_hf.enable_gradient_release(model, optimizer) before the first backward pass"
            )
        asked = False

    optimizer.register_step_pre_hook(first_step)
