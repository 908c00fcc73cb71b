"""Says, when training begins, that FOAM was asked for and another optimizer is the one that trains."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from transformers import TrainerCallback

from foam_hf.trainer.names import foam_of, name_of, uses_foam
from foam_hf.trainer.private import unwrapped_optimizer

logger = logging.getLogger("foam_hf")


class UnusedFoam(TrainerCallback):
    """Tells of a training that begins without FOAM: by then every kind of Trainer has its own optimizer."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrapped_optimizer(self._trainer)
        if self._told or not args.should_log or optimizer is None or foam_of(self._trainer) is not None:
            return
        self._told = True
        optim, made = name_of(args.optim), type(optimizer).__name__
        if uses_foam(args):
            logger.warning(
                f"optim={optim!r} is not used: {type(self._trainer).__name__} was given {made} or makes it itself; "
                "expected no optimizer and no optimizer class beside optim, or another optim"
            )
        elif os.environ.get("FOAM_HF_SUMMARY") or not os.environ.get("FOAM_HF_REPORT_MEMORY"):  # reports compare
            print(
                f"foam-hf run: this run trains with optim={optim!r} ({made}), not with FOAM; for FOAM: --optim foam, "
                "or optim='foam' in the script",
                file=sys.stderr,
                flush=True,
            )
