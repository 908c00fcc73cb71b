"""Which optimizers use gradient release, and an error for a run that asked for it and trains without it.

It is apart from ``release.py`` so that ``FOAM`` can import it.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

active: weakref.WeakSet[Any] = weakref.WeakSet()  # every GradientRelease whose hooks are alive


def is_released(optimizer: Optimizer) -> bool:
    """Whether gradient release updates the parameters of `optimizer`, inside the backward pass."""
    return any(release._optimizer is optimizer for release in active)


def moves_nothing(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0: by such a step torch creates the state that it loads under FSDP2."""
    return not any(float(group["lr"]) for group in optimizer.param_groups)


def expect_release(optimizer: Optimizer) -> None:
    """Make the first step of `optimizer` raise RuntimeError if gradient release is not enabled by then."""
    unchecked = True

    def first_step(stepping: Optimizer, *_: Any) -> None:
        nonlocal unchecked
        if unchecked and moves_nothing(stepping):
            return
        if unchecked and not is_released(stepping):
            raise RuntimeError(
                "gradient_release=true was asked for, and at the first step no hook releases gradients: Trainer.train "
                "sets them up, and this run has a training loop of its own, which does not call it (PPO trainers have "
                "one). Nothing was updated. Expected gradient_release=false, or "
                "foam_hf.enable_gradient_release(model, optimizer) before the first backward pass"
            )
        unchecked = False

    optimizer.register_step_pre_hook(first_step)
