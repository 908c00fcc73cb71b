"""The table at the end of a training run: memory as measured, beside memory as the planner predicts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from foam_hf.display import UNAVAILABLE, format_bytes
from foam_hf.memory.measured import MemoryBreakdown
from foam_hf.optim_args import FOAM_NAMES, foam_options
from foam_hf.planner.activations import activation_bytes, optimizer_temporary_bytes
from foam_hf.planner.counting import OPTIMIZERS, count_bytes
from foam_hf.planner.meta_models import on_meta
from foam_hf.planner.offload import slots_instead


@dataclass(frozen=True)
class Predicted:
    """The bytes that the planner predicts for one process.

    Attributes:
        weights, gradients: counted.
        state: counted; None for an optimizer that the planner does not know.
        activations, peak: estimated for the largest batch that was seen; None if there is no GPU.
        note: for which batch the estimate is, and how good it is.
    """

    weights: int
    gradients: int
    state: int | None
    activations: int | None = None
    peak: int | None = None
    note: str = ""


class BatchWatch:
    """Records the largest batch of token ids that a model in training mode gets.

    Attributes:
        largest: (sequences, tokens in each), or None before the first batch.
        padded: whether some tokens of this batch were masked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.largest: tuple[int, int] | None = None
        self.padded = False
        self._handle = model.register_forward_pre_hook(self._record_batch, with_kwargs=True)

    def _record_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if not (model.training and isinstance(tokens, Tensor) and tokens.dim() == 2):
            return
        if self.largest is None or tokens.numel() > self.largest[0] * self.largest[1]:
            self.largest = (tokens.shape[0], tokens.shape[1])
            mask = kwargs.get("attention_mask")  # read for a larger batch only: reading waits for the GPU
            self.padded = isinstance(mask, Tensor) and not bool(mask.all())

    def stop(self) -> None:
        self._handle.remove()


def predict(
    model: nn.Module,
    optimizer: Any,
    args: Any,
    watch: BatchWatch,
    *,
    on_gpu: bool,
    whole: nn.Module | None = None,
) -> Predicted:
    """Predict the memory of one process that trains `model` under `args`; nothing is allocated.

    Args:
        model: as trained, without hooks of this package, because it is copied to the meta device.
        optimizer: the one that ran, without wrappers; a script may have made it without `args.optim`.
        args: TrainingArguments.
        watch: has seen the largest batch.
        on_gpu: whether to estimate activations.
        whole: a module with all trained weights, if some are outside of `model`.
    """
    whole = model if whole is None else whole
    visiting = slots_instead(whole)
    whole = on_meta(whole)
    optim = _countable_optim(args, optimizer)
    release = optim in FOAM_NAMES and bool(foam_options(optim, args.optim_args).get("gradient_release"))
    counted, state = count_bytes(whole, "sgd"), None  # sgd counts weights and gradients without any state
    if optim:
        counted = count_bytes(
            whole,
            optim,
            args.optim_args,
            target_modules=args.optim_target_modules,
            gradient_release=release,
            accumulation=args.gradient_accumulation_steps > 1,
        )
        state = counted.state
    counted = replace(counted, weights=counted.weights + visiting)
    predicted = Predicted(counted.weights, counted.gradients, state)
    if not on_gpu or watch.largest is None:
        return predicted
    batch, sequence = watch.largest
    model = on_meta(model)
    shape = f"for {batch} x {sequence} tokens, the largest batch seen"
    try:
        estimate = activation_bytes(
            model,
            batch,
            sequence,
            autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            gradient_release=release,
            accumulation=args.gradient_accumulation_steps > 1 and not release,
            padding=watch.padded,
        )
    except ValueError as error:
        return replace(predicted, note=f"{shape}: {error}")
    blocks_alone = release and args.gradient_accumulation_steps > 1
    of_step = optimizer_temporary_bytes(model, optim, args.optim_args, blocks_alone=blocks_alone)
    activations = max(estimate.bytes, of_step)
    peak = None if state is None else counted.weights + counted.gradients + state + activations
    return replace(predicted, activations=activations, peak=peak, note=f"{shape}; activations {estimate.note}")


def _countable_optim(args: Any, optimizer: Any) -> str:
    """`args.optim` if the planner knows it and `optimizer` is one of its kind; "" if a script made another."""
    optim = str(getattr(args.optim, "value", args.optim))
    made = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
    return optim if optim in OPTIMIZERS and optim.removeprefix("paged_").split("_")[0] in made else ""


def measured_row(first: MemoryBreakdown, last: MemoryBreakdown) -> dict[str, int | None]:
    """The bytes that one process measured.

    Args:
        first: after the first step, when gradients still exist.
        last: at the end of training.
    """
    peaks = [peak for peak in (first.peak, last.peak) if peak is not None]
    peak = max(peaks) if peaks else None
    parts = last.weights + first.gradients + last.state
    return {
        "parameters": last.parameters,
        "weights": last.weights,
        "gradients": first.gradients,  # at the end they are freed
        "state": last.state,
        "activations": None if peak is None else peak - parts,
        "peak": peak,
        "adamw": last.adamw,
    }


_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "activations": "activations, at the peak",
    "peak": "peak allocated on GPU",
}


def format_table(rows: Sequence[dict[str, int | None]], name: str, predicted: Predicted | None = None) -> str:
    """The aligned table of a run.

    Args:
        rows: one `measured_row` a process. With several processes the table has their sum and the largest one.
        name: of the optimizer's class.
        predicted: for one process; a column of its own.
    """
    several = len(rows) > 1
    measured: dict[str, Callable[..., int]] = {"measured": sum}
    if several:
        measured = {f"sum of {len(rows)} processes": sum, "largest process": max}
    columns = [["", *_LABELS.values(), "AdamW would keep", "state / AdamW's", "state per trainable parameter"]]
    columns += [[header, *_column(rows, how)] for header, how in measured.items()]
    if predicted is not None:
        sizes = [format_bytes(getattr(predicted, kind)) for kind in _LABELS]
        columns.append(["predicted for one" if several else "predicted", *sizes, "", "", ""])
    widths = [max(map(len, cells)) for cells in columns]
    where = " in the largest process" if several else ""
    parameters = max(row["parameters"] or 0 for row in rows)
    lines = [f"Optimizer memory: {name}, {parameters:,} trainable parameters{where}"]
    for label, *cells in zip(*columns, strict=True):
        values = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {label.ljust(widths[0])}  {values}")
    if predicted is not None and predicted.note:
        lines.append(f"  predicted {predicted.note}")
    return "\n".join(lines)


def _column(rows: Sequence[dict[str, int | None]], how: Callable[..., int]) -> list[str]:
    def combined(key: str) -> int | None:
        values = [row[key] for row in rows]
        return None if None in values else how(values)

    state, adamw, parameters = combined("state"), combined("adamw"), combined("parameters")
    return [
        *(format_bytes(combined(kind)) for kind in _LABELS),
        format_bytes(adamw),
        _quotient(state, adamw, "{:.3g}"),
        _quotient(state, parameters, "{:.3g} B"),
    ]


def _quotient(part: int | None, whole: int | None, form: str) -> str:
    return form.format(part / whole) if part is not None and whole else UNAVAILABLE
