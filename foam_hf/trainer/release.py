"""Gradient release in the Trainer (`optim_args="gradient_release=true"`): registers its hooks and replaces clipping.

The hooks are registered in `TrainerCallback.on_train_begin`: `model.to()`, which drops the hooks of quantized weights,
has run by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed
from transformers import TrainerCallback

from foam_hf.optimizer.release import GradientRelease, enable_gradient_release
from foam_hf.trainer.names import releases_gradients, requested_options
from foam_hf.trainer.private import (
    ddp_of,
    ddp_settings,
    is_deepspeed_enabled,
    is_fsdp_enabled,
    micro_batches_of_step,
    prepare_without_ddp,
    replace_clipping,
)
from foam_hf.trainer.refusals import refuse_kept_gradients_of

logger = logging.getLogger("foam_hf")


@contextmanager
def release_while_training(trainer: Any) -> Iterator[None]:
    """Register gradient release when training begins, if the arguments then ask for it; remove it at the end.

    Raises:
        ValueError: the run needs gradients after the backward pass.
    """
    if releases_gradients(trainer.args):
        refuse_kept_gradients_of(trainer)
    callback = _Release(trainer)
    trainer.add_callback(callback)
    averages = releases_gradients(trainer.args) and not (is_fsdp_enabled(trainer) or is_deepspeed_enabled(trainer))
    restore = prepare_without_ddp(trainer) if averages else None
    try:
        yield
    finally:
        trainer.remove_callback(callback)
        callback.remove()
        if restore is not None:
            restore()


def _warn(args: Any) -> None:
    """Warn that gradient release saves little under torch_compile."""
    if args.should_log and args.torch_compile:
        logger.warning(
            "gradient_release=true: a model compiled as a whole (torch_compile=True) returns all gradients at once, "
            "so less memory is saved, or none"
        )
    if args.should_log and args.world_size > 1 and args.ddp_bucket_cap_mb is not None:
        logger.warning(
            f"gradient_release=true: ddp_bucket_cap_mb={args.ddp_bucket_cap_mb} has no effect, as gradients are sent "
            "in packs of 25 MiB without DDP's buckets"
        )


class _Release(TrainerCallback):
    """Registers the hooks when training begins; again when `auto_find_batch_size` starts it over."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._handle: GradientRelease | None = None
        self._clip_as_before: Callable[[], None] | None = None
        self._warned = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.remove()
        trainer = self._trainer
        if not releases_gradients(trainer.args):
            return
        refuse_kept_gradients_of(trainer)
        if not self._warned:
            self._warned = True
            _warn(trainer.args)
        # Not earlier: each trial of a hyperparameter search has an accelerator of its own.
        self._clip_as_before = replace_clipping(trainer.accelerator, self.grad_norm)
        ddp, settings = ddp_of(trainer), ddp_settings(trainer)
        averages = trainer.args.world_size > 1 and ddp is None and not is_fsdp_enabled(trainer)
        self._handle = enable_gradient_release(
            trainer.model if ddp is None else ddp,
            trainer.optimizer,
            max_grad_norm=trainer.args.max_grad_norm,
            clip_by=requested_options(trainer.args).get("clip_by", "all"),
            accumulation=trainer.args.gradient_accumulation_steps,
            process_group=distributed.group.WORLD if averages else None,
            broadcast_buffers=getattr(settings, "broadcast_buffers", True),
        )

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The last step of an epoch may have fewer micro-batches."""
        if self._handle is not None and not self._handle.unfinished:
            self._handle.accumulation = micro_batches_of_step(self._trainer)

    def grad_norm(self, *_: Any, **__: Any) -> Tensor | None:
        """Replaces `accelerator.clip_grad_norm_`: gradients are freed, so it only returns their norm, or None."""
        if self._handle is None:
            return None
        self._handle.finish()  # every process comes here, and weights that only others use count too
        return self._handle.grad_norm

    def remove(self) -> None:
        handle, self._handle = self._handle, None
        clip_as_before, self._clip_as_before = self._clip_as_before, None
        if clip_as_before is not None:
            clip_as_before()
        if handle is None:
            return
        if handle.unfinished:
            logger.warning(
                f"gradient release: the last backward pass did not reach its optimizer step, and had updated "
                f"{handle.unfinished} parameters, which stay updated"
            )
        handle.remove()
