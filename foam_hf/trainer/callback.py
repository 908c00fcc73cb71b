"""`OptimizerMemoryCallback`: logs what the optimizer holds through the Trainer. `foam_hf.memory` does the counting."""

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
from foam_hf.trainer.run_report import BatchWatch, Predicted, predict, row, table

logger = logging.getLogger(__name__)

_ENDINGS = ", ".join(PICTURES)


@dataclass(frozen=True)
class _Moment:
    """What Trainer says to a callback when something happens."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    model: Any = None
    optimizer: Any = None


def _event(react: Callable[[Any, _Moment], None]) -> Callable[..., None]:
    """An event of `TrainerCallback`. A report that fails must not cost a training run: warn once, go on."""

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
            react(self, _Moment(args, state, control, model, optimizer))
        except Exception as error:
            self._warn_once(
                f"the report on optimizer memory fails ({type(error).__name__}: {error}); training goes on"
            )

    return event


class OptimizerMemoryCallback(TrainerCallback):
    """Measure the optimizer's state, any optimizer's, and report it through the Trainer.

    It measures the Trainer's model, and the loss where that has weights (sentence-transformers). After the first
    optimizer step it logs, with `trainer.log`, so that the console, TensorBoard, W&B and
    `trainer_state.json` get them:

    * `optim/state_bytes`: of this process, measured; `optim/state_bytes_per_param`: the same for each trainable
      parameter; `optim/adamw_ratio`: the same as a fraction of what `torch.optim.AdamW` would hold.
    * on CUDA, `optim/peak_allocated_bytes`, and `optim/weights_share`, `optim/gradients_share`, `optim/state_share`
      and `optim/rest_share`: the fractions of that peak that are weights, gradients (before they are zeroed), state
      on the GPU, and the rest.

    At the end of training it prints a table on the main process: what was measured, beside what `foam-hf estimate`
    predicts of the model, the arguments and the largest batch. With several processes it shows their sum and the
    largest of them; every process must have the callback then, as they exchange their numbers. What cannot be
    measured is left out of the logs, and "unavailable" in the table. No counter is reset.

    It warns when training resumes without the optimizer's state. It never raises into training.

    Args:
        plot: a file that ends in .png, .pdf or .svg: draw memory through the second step into it, by kind, as
            measured on the GPU. It needs matplotlib. The main process draws its own.

    Raises:
        ValueError: `plot` has another ending.

    Attributes:
        trainer: the Trainer, or a weak proxy of it; `import foam_hf` binds it when training starts.
        heard: an event of training has reached this callback.
    """

    def __init__(self, plot: str | os.PathLike[str] | None = None) -> None:
        if plot is not None and Path(plot).suffix.lower() not in PICTURES:
            raise ValueError(f"plot is no picture, got {os.fspath(plot)!r}; expected a file ending in {_ENDINGS}")
        self.plot = None if plot is None else Path(plot)
        self.trainer: Any = None
        self.heard = False
        self._watch: BatchWatch | None = None
        self._recorder: StepRecorder | None = None
        self._to_record = False
        self._first: MemoryBreakdown | None = None
        self._to_measure = self._to_log = self._hears_steps = False
        self._resumed_without_state = False
        self._warnings: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # a weak proxy cannot be pickled, nor the hooks of a model that is in training
        return {**self.__dict__, "trainer": None, "_watch": None, "_recorder": None}

    @_event
    def on_train_begin(self, moment: _Moment) -> None:
        """Start afresh; warn if training resumes from a checkpoint that has no optimizer."""
        self.heard = True
        moment = self._of_trainer(moment)
        model, state, optimizer = moment.model, moment.state, moment.optimizer
        self._take_hooks_off()
        self._first, self._to_measure, self._to_log = None, True, False
        if model is not None:
            self._watch = BatchWatch(model)
            self._to_record = self.plot is not None and state.is_world_process_zero and self._can_draw(model)
        # Whatever the files are called, what was restored is there.
        resumed = state.global_step > 0 and optimizer is not None
        self._resumed_without_state = resumed and state_bytes(optimizer) == 0
        folder = _checkpoint(moment.args, state)
        # Also optimizer.bin, optimizer_0 (FSDP), rank0-of-2-optimizer.pt (XLA), global_step8 (DeepSpeed).
        saved = folder and any("optimizer" in name or name.startswith("global_step") for name in os.listdir(folder))
        if self._resumed_without_state and folder and not saved:
            self._resumed_without_state = False
            self._warn_of_lost_state(state, f"from {folder}, which has no optimizer.pt")

    @_event
    def on_step_begin(self, moment: _Moment) -> None:
        """Record the step after the first one: from then on there is state."""
        self.heard = True
        moment = self._of_trainer(moment)
        model = moment.model
        if self._to_record and self._first is not None and model is not None and moment.optimizer is not None:
            self._to_record = False
            self._recorder = StepRecorder(model, moment.optimizer, _gpus(model))
            self._recorder.start()

    @_event
    def on_pre_optimizer_step(self, moment: _Moment) -> None:
        """Backward is over, and gradients are clipped."""
        if self._recorder is not None:
            self._recorder.before_optimizer()

    @_event
    def on_optimizer_step(self, moment: _Moment) -> None:
        """Measure after the first step that was taken: state exists by now, and gradients exist still."""
        if self._recorder is not None:
            self._recorder.after_optimizer()
        self._hears_steps = True
        self._measure(self._of_trainer(moment))

    @_event
    def on_step_end(self, moment: _Moment) -> None:
        """Log the first measurement, now that the step counts; draw the step that was recorded."""
        moment = self._of_trainer(moment)
        step = moment.state.global_step
        if not self._hears_steps:  # a training loop of somebody else's, with this event alone
            self._measure(moment)
        if self._recorder is not None and self.plot is not None:
            recorder, self._recorder = self._recorder, None
            title = f"{type(moment.model).__name__}, {_name(moment.optimizer)}: GPU memory through step {step}"
            draw(recorder.stop(), self.plot, title=title)
            tqdm.write(f"Memory through step {step} is drawn in {self.plot}")
        if self._to_log and self._first is not None:
            self._to_log = False
            should_log = moment.control.should_log
            try:
                self._log(_metrics(self._first), moment.state)
            finally:
                moment.control.should_log = should_log  # or logging now would swallow Trainer's own log of this step

    @_event
    def on_train_end(self, moment: _Moment) -> None:
        """Print the table on the main process."""
        if self._to_record:
            self._warn_once(f"{self.plot} is not drawn: training had no second step, the first one with all memory")
        moment = self._of_trainer(moment)
        own = None
        try:
            own = self._row(moment.model, moment.optimizer)
        finally:
            rows = _gather(own)  # even if this process has nothing to tell: the others wait for it
        measured = [found for found in rows if found is not None]
        if moment.state.is_world_process_zero and measured:
            printed = table(measured, _name(moment.optimizer), self._predicted(moment))
            tqdm.write("\n" + printed)  # write: a progress bar may be open

    def _of_trainer(self, moment: _Moment) -> _Moment:
        """With Trainer's arguments and model: setfit gives callbacks its own, whose model is no module."""
        model = moment.model
        if model is None or isinstance(model, nn.Module):
            return moment
        try:
            return replace(moment, args=self.trainer.args, model=self.trainer.model)
        except (AttributeError, ReferenceError):
            raise TypeError(
                f"the model that callbacks get is no torch.nn.Module but a {type(model).__name__}, and no Trainer is "
                "known; expected `import foam_hf` before training"
            ) from None

    def _with_loss(self, model: nn.Module) -> nn.Module:
        """`model`, and a loss of the Trainer that has weights of its own."""
        try:
            loss = getattr(self.trainer, "loss", None)
        except ReferenceError:  # of a weak proxy
            return model
        losses = [one for one in (loss.values() if isinstance(loss, dict) else [loss]) if isinstance(one, nn.Module)]
        known = {id(p) for p in model.parameters()}
        weighty = [one for one in losses if any(id(p) not in known for p in one.parameters())]
        return nn.ModuleList([model, *weighty]) if weighty else model

    def _measure(self, moment: _Moment) -> None:
        """Once, after a step that was taken."""
        model, optimizer = moment.model, moment.optimizer
        skipped = getattr(optimizer, "step_was_skipped", False)  # accelerate, when a loss scale overflowed
        if not self._to_measure or skipped or model is None or optimizer is None:
            return
        self._to_measure = False  # also if it fails: a second try would fail too
        self._first = breakdown(self._with_loss(model), optimizer)
        self._to_log = True
        # An optimizer that keeps nothing, as SGD, has lost nothing: only now is this one known to keep something.
        if self._resumed_without_state and self._first.state > 0:
            self._warn_of_lost_state(moment.state, "but the optimizer's state was not restored")

    def _row(self, model: Any, optimizer: Any) -> dict[str, int | None] | None:
        return None if self._first is None else row(self._first, breakdown(self._with_loss(model), optimizer))

    def _predicted(self, moment: _Moment) -> Predicted | None:
        watch = self._watch
        self._take_hooks_off()  # or the model's copy would have them
        try:
            if watch is None:
                return None
            model, optimizer = moment.model, _inner(moment.optimizer)
            whole, on_gpu = self._with_loss(model), bool(_gpus(model))
            return predict(model, optimizer, moment.args, watch, on_gpu=on_gpu, whole=whole)
        except Exception as error:  # what was measured is shown all the same
            self._warn_once(f"the report lacks what was predicted ({type(error).__name__}: {error})")
            return None

    def _take_hooks_off(self) -> None:
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
    """The folder that training resumes from, as far as a callback can tell: `train` keeps its argument to itself."""
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


def _inner(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def _name(optimizer: Any) -> str:
    return type(_inner(optimizer)).__name__


def _gather(row: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """The rows of all processes, this one's alone if there is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [row]
    rows: list[dict[str, Any] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, row)
    return rows
