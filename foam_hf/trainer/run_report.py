"""What a training run held, beside what was predicted: the table at the run's end."""

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


@dataclass(frozen=True)
class Predicted:
    """Bytes that one process was predicted to hold; None where nothing can tell.

    Attributes:
        weights, gradients, state: counted.
        activations, peak: estimated, for the largest batch that was seen; None where there is no GPU.
        note: of the estimate: the batch it is for, and how good it is.
    """

    weights: int
    gradients: int
    state: int | None
    activations: int | None = None
    peak: int | None = None
    note: str = ""


class BatchWatch:
    """Remembers the largest batch of token ids that a model in training was given.

    Attributes:
        largest: (sequences, tokens in each), or None.
        padded: some tokens of it were masked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.largest: tuple[int, int] | None = None
        self.padded = False
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if not (model.training and isinstance(tokens, Tensor) and tokens.dim() == 2):
            return
        if self.largest is None or tokens.numel() > self.largest[0] * self.largest[1]:
            self.largest = (tokens.shape[0], tokens.shape[1])
            mask = kwargs.get("attention_mask")  # read here alone: it makes the host wait for the GPU
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
    """What a run of `args` (TrainingArguments) with `model` was predicted to hold; nothing is allocated.

    Args:
        model: as trained, without hooks of ours; a copy of it on the meta device is looked at.
        optimizer: that ran, without wrappers; a script may have made it without `args.optim`.
        watch: tells the batch.
        on_gpu: estimate activations too.
        whole: what holds all weights that are trained, if that is not `model`.
    """
    whole = on_meta(model if whole is None else whole)
    optim = _name_of_choice(args, optimizer)
    release = optim in FOAM_NAMES and bool(foam_options(optim, args.optim_args).get("gradient_release"))
    counted, state = count_bytes(whole, "sgd"), None  # which keeps nothing
    if optim:
        counted = count_bytes(
            whole, optim, args.optim_args, target_modules=args.optim_target_modules, gradient_release=release
        )
        state = counted.state
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
            accumulation=args.gradient_accumulation_steps > 1,
            padding=watch.padded,
        )
    except ValueError as error:
        return replace(predicted, note=f"{shape}: {error}")
    activations = max(estimate.bytes, optimizer_temporary_bytes(model, optim))
    peak = None if state is None else counted.weights + counted.gradients + state + activations
    return replace(predicted, activations=activations, peak=peak, note=f"{shape}; activations {estimate.note}")


def _name_of_choice(args: Any, optimizer: Any) -> str:
    """`args.optim`, if its state can be counted and it is what ran; "" for an optimizer that a script made itself."""
    optim = str(getattr(args.optim, "value", args.optim))
    made = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
    return optim if optim in OPTIMIZERS and optim.removeprefix("paged_").split("_")[0] in made else ""


def row(first: MemoryBreakdown, last: MemoryBreakdown) -> dict[str, int | None]:
    """What one process measured: `first` while there were gradients, `last` at the end."""
    peaks = [peak for peak in (first.peak, last.peak) if peak is not None]
    peak = max(peaks) if peaks else None
    parts = last.weights + first.gradients + last.state
    return {
        "parameters": last.parameters,
        "weights": last.weights,
        "gradients": first.gradients,  # by now they are zeroed
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


def table(rows: Sequence[dict[str, int | None]], name: str, predicted: Predicted | None = None) -> str:
    """An aligned table of the rows of all processes: measured, their sum and the largest of them if there are several,
    and what was predicted for one."""
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
