"""Estimates the memory of a training step beyond weights, gradients and optimizer state.

This is activations, logits and temporary memory. No formula models them: `planner/trace.py` runs a step of the model's
own code on the meta device and counts its allocations.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.optim_args import FOAM_NAMES
from foam_hf.optimizer.gathering import gathering_bytes
from foam_hf.planner.counting import foam_groups
from foam_hf.planner.meta_models import main_input
from foam_hf.planner.peers import BY_NAME
from foam_hf.planner.plan import Estimate
from foam_hf.planner.trace import DataDependentError, StepTrace, trace_step, with_value
from foam_hf.rules.all import rule_of

# Workspaces of cuBLAS on an H100, one for the thread of the forward pass and one for backward's; smaller elsewhere.
WORKSPACE = 2 * 32 * 2**20

_ACCURACY = Path(__file__).with_name("accuracy.json")
_AUTOCAST = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# End of a class name in transformers -> the arguments of its loss, each with whether it has one value a token.
_HEADS = {
    "ForCausalLM": {"labels": True},
    "LMHeadModel": {"labels": True},
    "ForMaskedLM": {"labels": True},
    "ForConditionalGeneration": {"labels": True},
    "ForTokenClassification": {"labels": True},
    "ForSequenceClassification": {"labels": False},
    "ForQuestionAnswering": {"start_positions": False, "end_positions": False},
}


def activation_bytes(model: nn.Module, batch: int, sequence: int, **settings: Any) -> Estimate:
    """Estimate the bytes at the peak of one training step beyond weights, all gradients and optimizer state.

    The peak is often at the loss, when no gradient exists yet. The bytes of all gradients are subtracted even then, so
    that the four parts of a plan add up to the peak. A call takes about a second; `activation_curve` estimates many
    batch sizes in the time of two or three.

    Args:
        model: a transformers model (with peft's adapters if those are trained) on the meta device, in the dtype in
            which it is trained. A copy of it runs.
        batch, sequence: sequences in one forward pass, and tokens in each.
        settings: the keyword arguments of `activation_curve`.

    Raises:
        ValueError: a size below 1, a setting out of range, a head whose loss is not known, or a model whose code
            depends on values, so that it cannot run on the meta device.
    """
    return _TrainingStep(model, sequence, **settings).estimate(batch)


def activation_curve(model: nn.Module, sequence: int, **settings: Any) -> Callable[[int], Estimate]:
    """`activation_bytes` as a function of the batch alone; only its first two calls are slow.

    Two batch sizes make the same allocations in the same order, and each allocation is linear in the batch size. So
    the steps of batches 2 and 3 determine those of larger ones. (A batch of 1 makes fewer copies.)

    Args:
        model, sequence: as for `activation_bytes`.
        autocast: "bfloat16" or "float16", for Trainer's `bf16=True` and `fp16=True` over float32 weights.
        gradient_checkpointing: as in TrainingArguments.
        gradient_release: each gradient is freed inside the backward pass; only the largest one is subtracted.
        accumulation: gradients of earlier micro-batches are kept through the forward pass.
        attention: "sdpa" or "eager", as `attn_implementation`; default: as the model was built. "flash_attention_2"
            keeps the same tensors as "sdpa".
        padding: some sequences of the batch are padded, so attention needs a mask.

    Raises:
        ValueError: as `activation_bytes`; the returned function raises some of them.
    """
    return _TrainingStep(model, sequence, **settings).estimate_quickly


def optimizer_temporary_bytes(
    model: nn.Module,
    optim: str,
    optim_args: str | None = None,
    shard: nn.Module | None = None,
    gpus: int = 1,
    *,
    blocks_alone: bool = False,
) -> int:
    """The most bytes that one step of an optimizer on a GPU allocates and frees again.

    FOAM's kernels allocate nothing, except that those of the factored rule keep sums of squares during the step, and
    Muon's a few matrices. Rules without a kernel (Adam-mini, moments of 8 bits) allocate as on a CPU, in larger
    chunks. Muon gathers the matrices that GPUs share, some at a time. The bytes of other optimizers are in
    `planner/peers.py`.

    Args:
        model: its trainable parameters are counted, on any device.
        optim, optim_args: as in TrainingArguments.
        shard: what one of ``gpus`` holds of ``model`` under FSDP2.
        blocks_alone: as for ``embedding_rule_of``.
    """
    if optim in FOAM_NAMES:
        groups = foam_groups(model, optim, optim_args, blocks_alone=blocks_alone)
        parts = groups if shard is None else foam_groups(shard, optim, optim_args, blocks_alone=blocks_alone)
        return _foam_temporary_bytes(groups, parts, 0 if shard is None else gpus)
    trained = [p for p in (shard or model).parameters() if p.requires_grad]
    return BY_NAME[optim].temporary(trained) if optim in BY_NAME else 0


def _foam_temporary_bytes(groups: list[dict[str, Any]], parts: list[dict[str, Any]], gpus: int) -> int:
    """The largest temporary of a weight, or the sum over all weights whose rule allocates for all of them at once.

    ``parts`` are the groups of what one of ``gpus`` holds; with 0 of them nothing is divided.
    """
    most = together = 0
    for group, mine in zip(groups, parts, strict=True):
        for p, part in zip(group["params"], mine["params"], strict=True):
            rule, level = rule_of(p, group)
            gathered = rule.on_whole is not None and gpus > 1
            size = rule.temporary(p if gathered else part, level)
            size += gathering_bytes(p, group, gpus) if gathered else 0
            most, together = max(most, 0 if rule.together else size), together + (size if rule.together else 0)
    return max(most, together)


@functools.cache
def accuracy() -> str:
    """The largest error of the estimates in the runs that were measured on GPUs, as part of a sentence.

    `recipes/benchmarks/memory/activation_peaks.py` measures the runs and writes the file that this reads.
    """
    found = json.loads(_ACCURACY.read_text(encoding="utf-8"))
    error, machines = 100 * found["largest_error"], ", ".join(found["machines"])
    return f"within {error:.1f}% of the peak in {found['runs']} runs measured on {machines}"


class _TrainingStep:
    """A model and the settings of its training step, which can be traced with batches of any size."""

    def __init__(
        self,
        model: nn.Module,
        sequence: int,
        *,
        autocast: str | None = None,
        gradient_checkpointing: bool = False,
        gradient_release: bool = False,
        accumulation: bool = False,
        attention: str | None = None,
        padding: bool = False,
    ) -> None:
        if autocast not in _AUTOCAST:
            raise ValueError(f"autocast is 'bfloat16', 'float16' or None, got {autocast!r}")
        if attention not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attention is 'sdpa' or 'eager', got {attention!r}; flash attention keeps what sdpa keeps"
            )
        self._sequence, self._padding = _check_size("sequence", sequence), padding
        self._settings: dict[str, Any] = {
            "autocast": _AUTOCAST[autocast],
            "releases_gradients": gradient_release,
            "keeps_gradients": accumulation,
        }
        self._model = copy.deepcopy(model).train()
        inner: Any = self._model
        if hasattr(inner, "get_base_model"):  # peft's wrapper
            inner = inner.get_base_model()
        self._inner, self._labels = inner, _labels(inner)
        inner.config.use_cache = False  # Trainer sets it too
        if attention is not None:
            inner.set_attn_implementation(attention)
        if gradient_checkpointing:
            enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        gradients = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = max(gradients, default=0) if gradient_release else sum(gradients)
        self._traces: dict[int, StepTrace] = {}
        self._ran: set[nn.Module] = set()
        for module in self._model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda ran, _: self._ran.add(ran))

    def estimate(self, batch: int) -> Estimate:
        return self._estimate(self._trace(batch).peak)

    def estimate_quickly(self, batch: int) -> Estimate:
        if batch > 3:
            two, three = self._trace(2).levels, self._trace(3).levels
            if len(two) == len(three):  # both made the same allocations
                return self._estimate(max(at + (batch - 2) * (then - at) for at, then in zip(two, three, strict=True)))
        return self.estimate(batch)

    def _estimate(self, peak: int) -> Estimate:
        return Estimate(max(0, peak - self._gradient_bytes) + WORKSPACE, self._note())

    def _note(self) -> str:
        """How good the estimate is: only whole models of text were compared with GPUs."""
        absent = parts_that_did_not_run(self._model, self._ran)
        if not absent:
            return accuracy()
        return f"with text alone: {', '.join(absent)} did not run and is not counted; not compared with a GPU"

    def _trace(self, batch: int) -> StepTrace:
        if _check_size("batch", batch) not in self._traces:
            try:
                self._traces[batch] = trace_step(self._model, self._inputs(batch), **self._settings)
            except Exception as error:  # a model's own code can raise anything
                reason = (str(error).strip().splitlines() or [""])[0]
                raise ValueError(
                    f"a training step of {type(self._model).__name__} cannot be followed on the meta device: "
                    f"{type(error).__name__}: {reason}{self._given(error)}"
                ) from error
        return self._traces[batch]

    def _given(self, error: Exception) -> str:
        """What the model was given, for the message on an error of its own code; the shapes may be why it raised."""
        if isinstance(error, DataDependentError):
            return ""
        given = f"; it was given text alone, {self._sequence:,} tokens a sequence (--seq, or sequence= in Python)"
        main = main_input(self._inner)
        if main not in (None, "input_ids"):
            given += f", and its main input is {main}; expected a model of text"
        return given

    def _inputs(self, batch: int) -> dict[str, Tensor]:
        tokens, each = torch.zeros(batch, self._sequence, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        inputs = {name: tokens if of_tokens else each for name, of_tokens in self._labels.items()}
        inputs["input_ids"] = tokens
        inputs["attention_mask"] = torch.ones_like(tokens)  # collators add it
        if self._padding:
            inputs["attention_mask"][0, -1] = 0
        return {name: with_value(value) for name, value in inputs.items()}


def parts_that_did_not_run(model: nn.Module, ran: set[nn.Module]) -> list[str]:
    """Names of the model's parts (as a vision tower) with parameters of which no module is in `ran`."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # peft's
    prefix = getattr(base, "base_model_prefix", "")
    parts = dict(base.named_children())
    if isinstance(body := parts.get(prefix), nn.Module):
        parts |= {f"{prefix}.{name}": part for name, part in body.named_children()}
    found = []
    for name, part in parts.items():
        holders = [m for m in part.modules() if any(True for _ in m.parameters(recurse=False))]
        if holders and ran.isdisjoint(holders):
            found.append(name)
    return found


def _labels(model: nn.Module) -> dict[str, bool]:
    """Name -> whether it has one value a token, of the arguments that make `model` compute its loss."""
    for ending, labels in _HEADS.items():
        if type(model).__name__.endswith(ending):
            return labels
    raise ValueError(
        f"the loss of {type(model).__name__} is not known; expected a class whose name ends in {', '.join(_HEADS)}, "
        "given as --architecture (architecture= in Python)"
    )


def _check_size(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value
