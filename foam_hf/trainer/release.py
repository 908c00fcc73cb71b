"""`optim_args="gradient_release=true"` inside the Hugging Face Trainer: refusals, hooks while it trains, clipping.

What this file relies on, in transformers 4.57 to 5.x: `TrainerCallback.on_train_begin` comes when model and optimizer
are where they stay, after `model.to()` has dropped the hooks of quantized weights; between backward pass and step,
Trainer clips and measures gradients with `trainer.accelerator.clip_grad_norm_`, which is ours while it trains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from foam_hf.optimizer.release import GradientRelease, enable_gradient_release, refuse_distributed

logger = logging.getLogger("foam_hf")


def refuse_arguments(args: Any) -> None:
    """Raise ValueError for TrainingArguments that need gradients to outlive the backward pass."""
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            "gradient_release=true updates each weight inside the backward pass, so that no gradient is left to add "
            f"to: got gradient_accumulation_steps={args.gradient_accumulation_steps}; expected 1, with a larger "
            "per_device_train_batch_size if it fits, or gradient_release=false"
        )
    if args.fp16:
        raise ValueError(
            "gradient_release=true updates each weight before a loss scaler could look for overflows in all of them: "
            "got fp16=True; expected bf16=True or float32, or gradient_release=false"
        )


def _refuse_run(trainer: Any) -> None:
    """The same for what only the trainer knows."""
    refuse_arguments(trainer.args)
    if trainer.model is not None:  # between the trials of a hyperparameter search there is none
        refuse_distributed(trainer.model)
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"gradient_release=true trains on one GPU: got {trainer.args.n_gpu}, which DataParallel would share; "
            "expected one of them in CUDA_VISIBLE_DEVICES, or gradient_release=false"
        )
    if getattr(trainer.accelerator, "scaler", None) is not None:
        raise ValueError(
            "gradient_release=true updates each weight before a loss scaler could look for overflows in all of them: "
            f"got mixed_precision={trainer.accelerator.mixed_precision!r} from accelerate; expected 'bf16' or 'no', "
            "or gradient_release=false"
        )


@contextmanager
def released(trainer: Any, asked: Callable[[Any], bool]) -> Iterator[None]:
    """Release gradients as soon as training begins, if the arguments then are `asked`, and not after this context.

    Raises:
        ValueError: the run needs gradients to outlive the backward pass.
    """
    if asked(trainer.args):
        _refuse_run(trainer)
    callback = _Release(trainer, asked)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)
        callback.remove()


def _warn(args: Any) -> None:
    """Say what releasing gradients changes."""
    if args.should_log and args.max_grad_norm:
        logger.warning(
            f"gradient_release=true: max_grad_norm={args.max_grad_norm} bounds the norm of each weight's gradient on "
            "its own, as the norm of all is known only after the updates; the logged grad_norm is that of all, before "
            "clipping. max_grad_norm=0 turns both off"
        )
    if args.should_log and args.torch_compile:
        logger.warning(
            "gradient_release=true: a model compiled as a whole (torch_compile=True) returns all gradients at once, "
            "so less memory is saved, or none"
        )


class _Release(TrainerCallback):
    """Registers the hooks, again where `auto_find_batch_size` begins anew."""

    def __init__(self, trainer: Any, asked: Callable[[Any], bool]) -> None:
        self._trainer, self._asked = trainer, asked
        self._handle: GradientRelease | None = None
        self._accelerator: Any = None  # whose clip_grad_norm_ is ours
        self._warned = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.remove()
        trainer = self._trainer
        if not self._asked(trainer.args):
            return
        _refuse_run(trainer)
        if not self._warned:
            self._warned = True
            _warn(trainer.args)
        self._accelerator = trainer.accelerator  # a hyperparameter search has made a new one by now
        self._accelerator.clip_grad_norm_ = self.grad_norm
        self._handle = enable_gradient_release(
            trainer.model, trainer.optimizer, max_grad_norm=trainer.args.max_grad_norm
        )

    def grad_norm(self, *_: Any, **__: Any) -> Tensor | None:
        """In place of `accelerator.clip_grad_norm_`, when nothing is left to clip; None is not logged."""
        return None if self._handle is None else self._handle.grad_norm

    def remove(self) -> None:
        handle, self._handle = self._handle, None
        accelerator, self._accelerator = self._accelerator, None
        if accelerator is not None:
            del accelerator.clip_grad_norm_
        if handle is None:
            return
        if handle.unfinished:
            logger.warning(
                f"gradient release: the last backward pass did not reach its optimizer step, and had updated "
                f"{handle.unfinished} parameters, which stay updated"
            )
        handle.remove()
