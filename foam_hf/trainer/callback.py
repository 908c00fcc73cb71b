"""`OptimizerMemoryCallback` measures the optimizer's memory in a training run and logs it through the Trainer."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foam_hf.display import PICTURES, missing_for_pictures
from foam_hf.memory.measured import MemoryBreakdown, breakdown, state_bytes
from foam_hf.memory.profile import StepRecorder, draw
from foam_hf.trainer.run_report import BatchWatch, Predicted, format_table, measured_row, predict

logger = logging.getLogger("foam_hf")

_ENDINGS = ", ".join(PICTURES)


@dataclass(frozen=True)
class _EventArguments:
    """The arguments with which Trainer calls a callback."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    model: Any = None
    optimizer: Any = None


def _event(react: Callable[[Any, _EventArguments], None]) -> Callable[..., None]:
    """Make `react` an event of `TrainerCallback` that warns once, and does not raise, when `react` fails."""

    @functools.wraps(react)
    def event(
        self: OptimizerMemoryCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        try:
            react(self, _EventArguments(args, state, control, model, optimizer))
        except Exception as error:
            self._warn_once(
                f"the report on optimizer memory fails ({type(error).__name__}: {error}); training goes on"
            )

    return event


class OptimizerMemoryCallback(TrainerCallback):
    """Measure the optimizer's state, any optimizer's, and report it through the Trainer.

    It measures the Trainer's model, and the loss if the loss has weights (sentence-transformers). After the first
    optimizer step it calls `trainer.log`, so the console, TensorBoard, W&B and `trainer_state.json` get:

    * `optim/state_bytes`: the bytes of optimizer state in this process. `optim/state_bytes_per_param`: these bytes
      for each trainable parameter. `optim/adamw_ratio`: these bytes as a fraction of `torch.optim.AdamW`'s.
    * on CUDA, `optim/peak_allocated_bytes`, and the fractions of this peak that weights, gradients (before they are
      zeroed), state on the GPU, and the rest take: `optim/weights_share`, `optim/gradients_share`,
      `optim/state_share` and `optim/rest_share`.

    At the end of training the main process prints a table. It compares the measured bytes with those that
    `foam-hf estimate` predicts for the model, the arguments and the largest batch. With several processes the table
    has their sum and the largest of them; the processes exchange their numbers, so every one must have the callback.
    A number that cannot be measured is missing in the logs and "unavailable" in the table. No counter is reset.

    It warns when training resumes without the optimizer's state. It never raises into training.

    Args:
        plot: a file that ends in .png, .pdf or .svg. The main process draws into it its GPU memory through the second
            step, by kind. This needs matplotlib.

    Raises:
        ValueError: `plot` has another ending.

    Attributes:
        trainer: the Trainer, or a weak proxy of it; `import foam_hf` binds it when training starts.
        heard: whether an event of training has reached this callback.
    """

    def __init__(self, plot: str | os.PathLike[str] | None = None) -> None:
        if plot is not None and Path(plot).suffix.lower() not in PICTURES:
            raise ValueError(f"plot is no picture, got {os.fspath(plot)!r}; expected a file ending in {_ENDINGS}")
        self.plot = None if plot is None else Path(plot)
        self.trainer: Any = None
        self.heard = False
        self._watch: BatchWatch | None = None
        self._recorder: StepRecorder | None = None
        self._should_record = False
        self._first: MemoryBreakdown | None = None
        self._should_measure = self._should_log = self._gets_optimizer_steps = False
        self._resumed_without_state = False
        self._warnings: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Neither a weak proxy nor the hooks of a model in training can be pickled.
        return {**self.__dict__, "trainer": None, "_watch": None, "_recorder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of another version may lack attributes.
        self.__dict__.update({**OptimizerMemoryCallback().__dict__, **state})

    @_event
    def on_train_begin(self, event: _EventArguments) -> None:
        """Start afresh; warn if training resumes from a checkpoint that has no optimizer."""
        self.heard = True
        event = self._with_trainer_model(event)
        model, state, optimizer = event.model, event.state, event.optimizer
        self._remove_hooks()
        self._first, self._should_measure, self._should_log = None, True, False
        if model is not None:
            self._watch = BatchWatch(model)
            self._should_record = self.plot is not None and state.is_world_process_zero and self._can_draw(model)
        # The optimizer's own state decides: the names of its files differ between engines.
        resumed = state.global_step > 0 and optimizer is not None
        self._resumed_without_state = resumed and state_bytes(optimizer) == 0
        folder = _checkpoint(event.args, state)
        # Also optimizer.bin, optimizer_0 (FSDP), rank0-of-2-optimizer.pt (XLA), global_step8 (DeepSpeed).
        saved = folder and any("optimizer" in name or name.startswith("global_step") for name in os.listdir(folder))
        if self._resumed_without_state and folder and not saved:
            self._resumed_without_state = False
            self._warn_of_lost_state(state, f"from {folder}, which has no optimizer.pt")

    @_event
    def on_step_begin(self, event: _EventArguments) -> None:
        """Record the second step: it is the first one with optimizer state."""
        self.heard = True
        event = self._with_trainer_model(event)
        model = event.model
        if self._should_record and self._first is not None and model is not None and event.optimizer is not None:
            self._should_record = False
            self._recorder = StepRecorder(model, event.optimizer, _gpus(model))
            self._recorder.start()

    @_event
    def on_pre_optimizer_step(self, event: _EventArguments) -> None:
        """Sample memory after the backward pass and after clipping."""
        if self._recorder is not None:
            self._recorder.before_optimizer()

    @_event
    def on_optimizer_step(self, event: _EventArguments) -> None:
        """Measure after the first step: state exists then, and gradients are not freed yet."""
        if self._recorder is not None:
            self._recorder.after_optimizer()
        self._gets_optimizer_steps = True
        self._measure(self._with_trainer_model(event))

    @_event
    def on_step_end(self, event: _EventArguments) -> None:
        """Log the first measurement after Trainer has counted the step, and draw the recorded step."""
        event = self._with_trainer_model(event)
        step = event.state.global_step
        if not self._gets_optimizer_steps:  # some other training loops call this event and not on_optimizer_step
            self._measure(event)
        if self._recorder is not None and self.plot is not None:
            recorder, self._recorder = self._recorder, None
            title = f"{type(event.model).__name__}, {_class_name(event.optimizer)}: GPU memory through step {step}"
            draw(recorder.stop(), self.plot, title=title)
            tqdm.write(f"Memory through step {step} is drawn in {self.plot}")
        if self._should_log and self._first is not None:
            self._should_log = False
            should_log = event.control.should_log
            try:
                self._log(_metrics(self._first), event.state)
            finally:
                event.control.should_log = should_log  # trainer.log resets it, and Trainer would not log this step

    @_event
    def on_train_end(self, event: _EventArguments) -> None:
        """Print the table on the main process."""
        if self._should_record:
            self._warn_once(f"{self.plot} is not drawn: training had no second step, the first one with all memory")
        event = self._with_trainer_model(event)
        own = None
        try:
            own = self._measured_row(event.model, event.optimizer)
        finally:
            rows = _gather(own)  # even after an error: the other processes wait for this one
        measured = [found for found in rows if found is not None]
        if event.state.is_world_process_zero and measured:
            printed = format_table(measured, _class_name(event.optimizer), self._predicted(event))
            tqdm.write("\n" + printed)  # write: a progress bar may be open

    def _with_trainer_model(self, event: _EventArguments) -> _EventArguments:
        """Replace arguments and model by the Trainer's: setfit gives callbacks its own, and its model is no module."""
        model = event.model
        if model is None or isinstance(model, nn.Module):
            return event
        try:
            return replace(event, args=self.trainer.args, model=self.trainer.model)
        except (AttributeError, ReferenceError):
            raise TypeError(
                f"the model that callbacks get is no torch.nn.Module but a {type(model).__name__}, and no Trainer is "
                "known; expected `import foam_hf` before training"
            ) from None

    def _with_loss(self, model: nn.Module) -> nn.Module:
        """`model`, together with those losses of the Trainer that have weights of their own."""
        try:
            loss = getattr(self.trainer, "loss", None)
        except ReferenceError:  # the Trainer is gone, and `self.trainer` is a weak proxy
            return model
        losses = [one for one in (loss.values() if isinstance(loss, dict) else [loss]) if isinstance(one, nn.Module)]
        known = {id(p) for p in model.parameters()}
        with_weights = [one for one in losses if any(id(p) not in known for p in one.parameters())]
        return nn.ModuleList([model, *with_weights]) if with_weights else model

    def _measure(self, event: _EventArguments) -> None:
        """Measure memory once, after a step that was not skipped."""
        model, optimizer = event.model, event.optimizer
        skipped = getattr(optimizer, "step_was_skipped", False)  # accelerate sets it when a loss scale overflowed
        if not self._should_measure or skipped or model is None or optimizer is None:
            return
        self._should_measure = False  # before measuring: after an error a second try would fail too
        self._first = breakdown(self._with_loss(model), optimizer)
        self._should_log = True
        # SGD keeps no state and so has lost none: only after a step is it known whether an optimizer keeps any.
        if self._resumed_without_state and self._first.state > 0:
            self._warn_of_lost_state(event.state, "but the optimizer's state was not restored")

    def _measured_row(self, model: Any, optimizer: Any) -> dict[str, int | None] | None:
        if self._first is None:
            return None
        return measured_row(self._first, breakdown(self._with_loss(model), optimizer))

    def _predicted(self, event: _EventArguments) -> Predicted | None:
        watch = self._watch
        self._remove_hooks()  # `predict` copies the model, hooks included
        try:
            if watch is None:
                return None
            model, optimizer = event.model, _unwrapped(event.optimizer)
            if getattr(optimizer, "flat_parts", None):
                return None  # what ZeRO makes of a model is not predicted from the model alone
            whole, on_gpu = self._with_loss(model), bool(_gpus(model))
            return predict(model, optimizer, event.args, watch, on_gpu=on_gpu, whole=whole)
        except Exception as error:  # the table still has the measured numbers
            self._warn_once(f"the report lacks what was predicted ({type(error).__name__}: {error})")
            return None

    def _remove_hooks(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        if self._recorder is not None:
            self._recorder.stop()
        self._watch = self._recorder = None

    def _can_draw(self, model: Any) -> bool:
        missing = missing_for_pictures()
        if not _gpus(model):
            missing = "the model is not on a CUDA device, so there is no GPU memory to draw; expected a run on a GPU"
        if missing is not None:
            self._warn_once(f"{self.plot} will not be drawn: {missing}")
        return missing is None

    def _log(self, metrics: dict[str, float], state: TrainerState) -> None:
        try:
            log = self.trainer.log
        except (AttributeError, ReferenceError):
            self._warn_once(
                "OptimizerMemoryCallback does not know its Trainer, so TensorBoard and the like miss its report: "
                "expected `import foam_hf` before training; the numbers are in trainer_state.json all the same: "
                f"{metrics}"
            )
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        log(metrics)

    def _warn_of_lost_state(self, state: TrainerState, what: str) -> None:
        if state.is_world_process_zero:
            logger.warning(
                f"training resumes at step {state.global_step} {what}: its moments start from zero, and the first "
                "steps will differ from those of an uninterrupted run; expected a checkpoint with optimizer.pt and "
                "scheduler.pt, which Trainer writes unless save_only_model=True"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning(message)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str | None:
    """The folder that training resumes from, if it can be found: callbacks do not see the argument of `train`."""
    own = os.path.join(args.output_dir or "", f"checkpoint-{state.global_step}")
    for folder in (args.resume_from_checkpoint, own):
        if isinstance(folder, str) and os.path.isdir(folder):
            return folder
    return None


def _metrics(measured: MemoryBreakdown) -> dict[str, float]:
    metrics: dict[str, float | None] = {
        "optim/state_bytes": measured.state,
        "optim/state_bytes_per_param": measured.state_per_parameter,
        "optim/adamw_ratio": measured.adamw_ratio,
        "optim/peak_allocated_bytes": measured.peak,
    }
    metrics |= {f"optim/{part}_share": share for part, share in (measured.shares or {}).items()}
    return {name: value for name, value in metrics.items() if value is not None}


def _gpus(model: Any) -> set[torch.device]:
    return {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == "cuda"}


def _unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def _class_name(optimizer: Any) -> str:
    return type(_unwrapped(optimizer)).__name__


def _gather(row: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """The rows of all processes; [row] in a run of one process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [row]
    rows: list[dict[str, Any] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, row)
    return rows
