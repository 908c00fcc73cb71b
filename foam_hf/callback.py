"""`OptimizerMemoryCallback`: logs what the optimizer holds through the Trainer. `foam_hf.memory` does the counting."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foam_hf.memory import UNAVAILABLE, MemoryBreakdown, breakdown, format_bytes, state_bytes

logger = logging.getLogger(__name__)


def _never_raising(event: Callable[..., None]) -> Callable[..., None]:
    """A report that fails must not cost a training run: warn once with the reason, go on."""

    @functools.wraps(event)
    def guarded(self: OptimizerMemoryCallback, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            self._warn_once(
                f"the report on optimizer memory fails ({type(error).__name__}: {error}); training goes on"
            )

    return guarded


class OptimizerMemoryCallback(TrainerCallback):
    """Measure the optimizer's state, any optimizer's, and report it through the Trainer.

    After the first optimizer step it logs, with `trainer.log`, so that the console, TensorBoard, W&B and
    `trainer_state.json` get them:

    * `optim/state_bytes`: of this process, measured; `optim/state_bytes_per_param`: the same for each trainable
      parameter; `optim/adamw_ratio`: the same as a fraction of what `torch.optim.AdamW` would hold.
    * on CUDA, `optim/peak_allocated_bytes`, and `optim/weights_share`, `optim/gradients_share`, `optim/state_share`
      and `optim/rest_share`: the fractions of that peak that are weights, gradients (before they are zeroed), state
      on the GPU, and the rest.

    At the end of training it prints a table on the main process. With several processes it shows their sum and the
    largest of them; every process must have the callback then, as they exchange their numbers. What cannot be
    measured is left out of the logs, and "unavailable" in the table. No counter is reset.

    It warns when training resumes without the optimizer's state. It never raises into training.

    Attributes:
        trainer: the Trainer, or a weak proxy of it; `import foam_hf` binds it when training starts.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self._first: MemoryBreakdown | None = None
        self._to_measure = self._to_log = False
        self._resumed_without_state = False
        self._warnings: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}  # a weak proxy cannot be pickled

    @_never_raising
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start afresh; warn if training resumes from a checkpoint that has no optimizer."""
        self._first, self._to_measure, self._to_log = None, True, False
        # Whatever the files are called, what was restored is there.
        resumed = state.global_step > 0 and optimizer is not None
        self._resumed_without_state = resumed and state_bytes(optimizer) == 0
        folder = _checkpoint(args, state)
        # Also optimizer.bin, optimizer_0 (FSDP), rank0-of-2-optimizer.pt (XLA), global_step8 (DeepSpeed).
        saved = folder and any("optimizer" in name or name.startswith("global_step") for name in os.listdir(folder))
        if self._resumed_without_state and folder and not saved:
            self._resumed_without_state = False
            self._warn_of_lost_state(state, f"from {folder}, which has no optimizer.pt")

    @_never_raising
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure after the first step that was taken: state exists by now, and gradients exist still."""
        skipped = getattr(optimizer, "step_was_skipped", False)  # accelerate, when a loss scale overflowed
        if self._to_measure and not skipped and model is not None and optimizer is not None:
            self._to_measure = False  # also if it fails: a second try would fail too
            self._first = breakdown(model, optimizer)
            self._to_log = True
            # An optimizer that keeps nothing, as SGD, has lost nothing: only now is this one known to keep something.
            if self._resumed_without_state and self._first.state > 0:
                self._warn_of_lost_state(state, "but the optimizer's state was not restored")

    @_never_raising
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the first measurement, now that the step counts."""
        if self._to_log and self._first is not None:
            self._to_log = False
            should_log = control.should_log
            try:
                self._log(_metrics(self._first), state)
            finally:
                control.should_log = should_log  # or logging now would swallow Trainer's own log of this step

    @_never_raising
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Print the table on the main process."""
        row = None
        try:
            row = self._last_row(model, optimizer)
        finally:
            rows = _gather(row)  # even if this process has nothing to tell: the others wait for it
        measured = [row for row in rows if row is not None]
        if state.is_world_process_zero and measured:
            tqdm.write("\n" + _table(measured, _name(optimizer)))  # write: a progress bar may be open

    def _last_row(self, model: Any, optimizer: Any) -> dict[str, Any] | None:
        if self._first is None:
            return None
        last = breakdown(model, optimizer)
        peaks = [peak for peak in (self._first.peak, last.peak) if peak is not None]
        return {
            "parameters": last.parameters,
            "adamw": last.adamw,
            "state": last.state,
            "weights": last.weights,
            "gradients": self._first.gradients,  # by now they are zeroed
            "peak": max(peaks) if peaks else None,
        }

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


def _name(optimizer: Any) -> str:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def _gather(row: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """The rows of all processes, this one's alone if there is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [row]
    rows: list[dict[str, Any] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, row)
    return rows


def _table(rows: Sequence[dict[str, Any]], name: str) -> str:
    """An aligned table; a column of sums over processes, and one of the largest of them if there are several."""

    def combine(key: str, how: Callable[[list[int]], int]) -> int | None:
        values = [row[key] for row in rows]
        return None if None in values else how(values)

    def column(how: Callable[[list[int]], int]) -> list[str]:
        state, adamw, parameters = combine("state", how), combine("adamw", how), combine("parameters", how)
        return [
            format_bytes(state),
            format_bytes(adamw),
            _quotient(state, adamw, "{:.3g}"),
            _quotient(state, parameters, "{:.3g} B"),
            format_bytes(combine("weights", how)),
            format_bytes(combine("gradients", how)),
            format_bytes(combine("peak", how)),
        ]

    labels = ["optimizer state, measured", "AdamW would keep", "ratio", "state per trainable parameter"]
    labels += ["weights", "gradients", "peak allocated on GPU"]
    columns = [labels, column(sum)]
    header = ["", f"sum of {len(rows)} processes"]
    if len(rows) > 1:
        columns.append(column(max))
        header.append("largest process")
        columns = [[title, *cells] for title, cells in zip(header, columns, strict=True)]
    widths = [max(map(len, cells)) for cells in columns]
    where = " in the largest process" if len(rows) > 1 else ""
    lines = [f"Optimizer memory: {name}, {max(row['parameters'] for row in rows):,} trainable parameters{where}"]
    for label, *cells in zip(*columns, strict=True):
        values = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {label.ljust(widths[0])}  {values}")
    return "\n".join(lines)


def _quotient(part: int | None, whole: int | None, form: str) -> str:
    return form.format(part / whole) if part is not None and whole else UNAVAILABLE
