"""Connects `OptimizerMemoryCallback` with the Trainer that it logs through, and refuses a run without its events.

A run that asks for no report imports no callback.
"""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from typing import Any

VARIABLE = "FOAM_HF_REPORT_MEMORY"  # foam-hf run --report-memory: "1", or a picture's path


def bind_reports(trainer: Any) -> None:
    """Give `trainer` to its memory callbacks; add one if the environment asks for a report and there is none."""
    wanted = os.environ.get(VARIABLE)
    if not wanted and "foam_hf.trainer.callback" not in sys.modules:
        return
    from foam_hf.trainer.callback import OptimizerMemoryCallback

    if wanted and not _reports(trainer):
        trainer.add_callback(OptimizerMemoryCallback())
    for callback in _reports(trainer):
        callback.trainer = weakref.proxy(trainer)
        if callback.plot is None and wanted not in (None, "", "1"):
            callback.plot = Path(wanted)


def require_report_events(trainer: Any) -> None:
    """Let the optimizer's first step raise RuntimeError if a report was asked for and no callback got an event."""
    optimizer: Any = getattr(trainer, "optimizer", None)
    if not (os.environ.get(VARIABLE) or _reports(trainer)) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return
    from foam_hf.optimizer.releases import moves_nothing

    known, asked = weakref.ref(trainer), True

    def first_step(stepping: Any, *_: Any) -> None:
        nonlocal asked
        if asked and moves_nothing(stepping):
            return
        owner = known()
        if asked and owner is not None and not any(callback.heard for callback in _reports(owner)):
            raise RuntimeError(
                "a report on optimizer memory was asked for, and at the first step no event of training has reached "
                f"OptimizerMemoryCallback: {type(owner).__name__} has a training loop of its own, which does not call "
                "Trainer.train. Nothing was updated. Expected no --report-memory and no such callback, or "
                "OptimizerMemoryCallback() among the callbacks of a trainer that calls their on_train_begin"
            )
        asked = False

    optimizer.register_step_pre_hook(first_step)


def _reports(trainer: Any) -> list[Any]:
    module = sys.modules.get("foam_hf.trainer.callback")  # if the module was never imported, no callback exists
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
    if module is None or not isinstance(callbacks, list):
        return []
    return [callback for callback in callbacks if isinstance(callback, module.OptimizerMemoryCallback)]
