"""What a training step needs beyond weights, gradients and optimizer state: activations, logits, temporary memory.

Nothing is modelled by formulas: a step of the model's own code is traced on the meta device, by `planner/trace.py`.
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
from foam_hf.planner.counting import foam_groups
from foam_hf.planner.peers import BY_NAME
from foam_hf.planner.plan import Estimate
from foam_hf.planner.trace import StepTrace, trace_step, with_value
from foam_hf.rules.all import rule_of

# Workspaces of cuBLAS, one for the forward thread and one for backward's, as an H100 has them: less on other GPUs.
WORKSPACE = 2 * 32 * 2**20

_ACCURACY = Path(__file__).with_name("accuracy.json")
_AUTOCAST = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a head of transformers computes its loss from, by the end of its class name: argument -> one for each token?
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
    """What the peak of one training step holds on top of weights, all gradients and optimizer state.

    The peak is often at the loss, before there are gradients: they are taken off it, so that the parts add up to it.
    It takes about a second; `activation_curve` tells many batch sizes at the price of two or three.

    Args:
        model: of transformers (peft's adapters in it, if those are trained) on the meta device, in the dtype it is
            trained in. A copy of it runs.
        batch, sequence: of one forward pass: sequences, and tokens in each.
        settings: the keyword arguments of `activation_curve`.

    Raises:
        ValueError: a size below 1, a setting out of range, a head whose loss is not known, or a model whose code
            cannot run on the meta device, because it depends on values.
    """
    return _Step(model, sequence, **settings).estimate(batch)


def activation_curve(model: nn.Module, sequence: int, **settings: Any) -> Callable[[int], Estimate]:
    """`activation_bytes` as a function of the batch alone, quick after its first two calls.

    The steps of two batches make the same allocations in the same order, and each grows in a straight line with the
    batch: so two of them tell all others. (Not a batch of one: it needs fewer copies.)

    Args:
        model, sequence: as for `activation_bytes`.
        autocast: "bfloat16" or "float16", for Trainer's `bf16=True` and `fp16=True` over float32 weights.
        gradient_checkpointing: as in TrainingArguments.
        gradient_release: each gradient is freed inside the backward pass: only the largest one is taken off.
        accumulation: gradients of earlier micro-batches are kept through the forward pass.
        attention: "sdpa" or "eager", as `attn_implementation`; default: as the model was built. "flash_attention_2"
            keeps what "sdpa" keeps.
        padding: some sequences of the batch are padded, so that attention needs a mask.

    Raises:
        ValueError: as `activation_bytes`; some at the call of the function that is returned.
    """
    return _Step(model, sequence, **settings).estimate_quickly


def optimizer_temporary_bytes(model: nn.Module, optim: str, optim_args: str | None = None) -> int:
    """The most that one step of an optimizer allocates and frees again, next to weights, gradients and state.

    FOAM's kernels on a GPU allocate nothing but the factored rule's, which keep sums of squares for the time of a
    step; fused and 8-bit AdamW, and SGD, nothing either. FOAM without a kernel (Muon,
    Adam-mini, moments of 8 bits) takes what it takes on a CPU, in larger chunks. Other optimizers say so in
    `planner/peers.py`.

    Args:
        model: its trainable parameters count, on whatever device.
        optim, optim_args: as in TrainingArguments.
    """
    if optim in FOAM_NAMES:
        return _foam_temporary_bytes(model, optim, optim_args)
    trained = [p for p in model.parameters() if p.requires_grad]
    return BY_NAME[optim].temporary(trained) if optim in BY_NAME else 0


def _foam_temporary_bytes(model: nn.Module, optim: str, optim_args: str | None) -> int:
    most = together = 0
    for group in foam_groups(model, optim, optim_args):
        for p in group["params"]:
            rule, level = rule_of(p, group)
            size = rule.temporary(p, level)
            most, together = max(most, 0 if rule.together else size), together + (size if rule.together else 0)
    return max(most, together)


@functools.cache
def accuracy() -> str:
    """How good the estimates are, in a few words: the largest error in the runs that were measured on GPUs.

    `recipes/benchmarks/memory/activation_peaks.py` measures them and writes the file.
    """
    found = json.loads(_ACCURACY.read_text(encoding="utf-8"))
    error, machines = 100 * found["largest_error"], ", ".join(found["machines"])
    return f"within {error:.1f}% of the peak in {found['runs']} runs measured on {machines}"


class _Step:
    """A model and the settings of its training step, to be traced with batches of any size."""

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
        self._sequence, self._padding = _size("sequence", sequence), padding
        self._settings: dict[str, Any] = {
            "autocast": _AUTOCAST[autocast],
            "releases_gradients": gradient_release,
            "keeps_gradients": accumulation,
        }
        self._model = copy.deepcopy(model).train()
        inner: Any = self._model
        if hasattr(inner, "get_base_model"):  # peft's
            inner = inner.get_base_model()
        self._labels = _labels(inner)
        inner.config.use_cache = False  # as Trainer sets it
        if attention is not None:
            inner.set_attn_implementation(attention)
        if gradient_checkpointing:
            enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        gradients = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        self._taken_off = max(gradients, default=0) if gradient_release else sum(gradients)
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
            if len(two) == len(three):  # the same allocations
                return self._estimate(max(at + (batch - 2) * (then - at) for at, then in zip(two, three, strict=True)))
        return self.estimate(batch)

    def _estimate(self, peak: int) -> Estimate:
        return Estimate(max(0, peak - self._taken_off) + WORKSPACE, self._note())

    def _note(self) -> str:
        """How good the estimate is: what ran on GPUs were models of text, whole."""
        absent = left_out(self._model, self._ran)
        if not absent:
            return accuracy()
        return f"with text alone: {', '.join(absent)} did not run and is not counted; not compared with a GPU"

    def _trace(self, batch: int) -> StepTrace:
        if _size("batch", batch) not in self._traces:
            try:
                self._traces[batch] = trace_step(self._model, self._inputs(batch), **self._settings)
            except Exception as error:  # whatever a model's code does not bear
                reason = (str(error).strip().splitlines() or [""])[0]
                raise ValueError(
                    f"a training step of {type(self._model).__name__} cannot be followed on the meta device: "
                    f"{type(error).__name__}: {reason}"
                ) from error
        return self._traces[batch]

    def _inputs(self, batch: int) -> dict[str, Tensor]:
        tokens, each = torch.zeros(batch, self._sequence, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        inputs = {name: tokens if of_tokens else each for name, of_tokens in self._labels.items()}
        inputs["input_ids"] = tokens
        inputs["attention_mask"] = torch.ones_like(tokens)  # as collators give it
        if self._padding:
            inputs["attention_mask"][0, -1] = 0
        return {name: with_value(value) for name, value in inputs.items()}


def left_out(model: nn.Module, ran: set[nn.Module]) -> list[str]:
    """Names of the model's parts none of whose modules with parameters are in `ran`, as a tower for images."""
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
    """The arguments that make `model` compute its loss."""
    for ending, labels in _HEADS.items():
        if type(model).__name__.endswith(ending):
            return labels
    raise ValueError(
        f"the loss of {type(model).__name__} is not known; expected a class whose name ends in {', '.join(_HEADS)}"
    )


def _size(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value
