"""`estimate_memory` and `Planner`: the memory that training a model takes, computed from its config alone."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from foam_hf.int8.models import convert_, module_of, plan_int8
from foam_hf.optim_args import FOAM_NAMES, foam_options, one_of_ours, split_optim_args
from foam_hf.planner.activations import activation_curve, optimizer_temporary_bytes
from foam_hf.planner.counting import count_bytes
from foam_hf.planner.fsdp2 import buffer_bytes, refuse_whole_weights, shard_of
from foam_hf.planner.meta_models import main_input, meta_model, on_meta, positions, with_adapters
from foam_hf.planner.model_configs import ModelError, load_config
from foam_hf.planner.offload import offloaded
from foam_hf.planner.plan import Estimate, Plan
from foam_hf.planner.zero import Zero, zero_settings
from foam_hf.planner.zero_bytes import count_zero

_MAX_BATCH = 1 << 20  # sequences; only a toy model fits more, and no user needs that number


def estimate_memory(
    model: Any,
    optim: str = "foam",
    optim_args: str | Mapping[str, Any] | None = None,
    *,
    gradient_release: bool = False,
    int8_weights: bool = False,
    offload_weights: bool = False,
    target_modules: str | list[str] | None = None,
    **workload: Any,
) -> Plan:
    """Plan the memory of one training step at its peak: weights, gradients and state counted, activations estimated.

    Nothing is allocated: the model is built on the meta device. The code that groups weights for training groups them
    here too.

    Args:
        model: a built-in name (`model_configs.BUILTIN`), a local folder, a config.json, a name on the hub, a
            transformers config, or a model on any device, which is planned as it is.
        optim, optim_args: as in `TrainingArguments`; the names are those of `counting.OPTIMIZERS`. "muon" is
            `torch.optim.Muon` for the weights that FOAM folds, "adam_mini" is the adam-mini package's.
        gradient_release: the update runs inside the backward pass (FOAM only).
        int8_weights: the weights that `foam_hf.Int8Config` quantizes are INT8 (FOAM only).
        offload_weights: they are in host memory, as by `Int8Config(offload="cpu")`; with gradient_release.
        target_modules: Trainer's `optim_target_modules`; without it GaLore and APOLLO project the `nn.Linear` weights
            that FOAM folds.
        **workload: the arguments of `Planner`: batch, sequence, dtype and so on.

    Raises:
        ValueError: an unknown model or optimizer, an option that the optimizer does not have, a size below 1, or a
            sequence longer than the model's positions.
    """
    planner = Planner(model, **workload)
    return planner.plan(
        optim,
        optim_args,
        gradient_release=gradient_release,
        int8_weights=int8_weights,
        offload_weights=offload_weights,
        target_modules=target_modules,
    )


class Planner:
    """Plans several optimizers on one model and one workload; the model is built, and each step traced, once.

    Args:
        model: as for `estimate_memory`.
        batch, sequence: sequences on the device at a time, and tokens in each; by default 1 and 512 (fewer tokens if
            the model has fewer learned positions).
        dtype: of the weights; default: the config's.
        autocast: "bfloat16" or "float16", for Trainer's `bf16` and `fp16` over float32 weights.
        gradient_checkpointing: as in `TrainingArguments`.
        accumulation: gradients of earlier batches are kept through the forward pass.
        attention: `attn_implementation`: "sdpa" or "eager"; default: the model's own.
        lora_rank: train LoRA adapters (peft) of this rank on all linear layers, instead of the weights.
        architecture: the class of transformers to build, as "BertForSequenceClassification"; default: the config's.
        trust_remote_code: run the code that comes with a model.
        zero: a stage of DeepSpeed's ZeRO, or a DeepSpeed config as a .json file or a dict. The plan is then that of
            one GPU. With `autocast`, or with the config's bf16 or fp16, DeepSpeed casts the weights to it.
        fsdp2: FSDP2 divides the model, as accelerate sets it up. The plan is that of one GPU.
        gpus: how many share the model under FSDP2 or ZeRO; batch is each GPU's own.
        offload: ZeRO's optimizer is in host memory, as by a config's `offload_optimizer`.

    Attributes:
        model: on the meta device, as it is trained.
        architecture: name of the model's class.
        parameters: how many the model has without adapters; tied ones count once.
        dtype: of most parameters.
        batch, sequence: as given, or the defaults.
        zero: the settings of ZeRO, or None.
        fsdp2: how many GPUs share the model under FSDP2, or 0.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int = 1,
        sequence: int | None = None,
        dtype: torch.dtype | None = None,
        autocast: str | None = None,
        gradient_checkpointing: bool = False,
        accumulation: bool = False,
        attention: str | None = None,
        lora_rank: int | None = None,
        architecture: str | None = None,
        trust_remote_code: bool = False,
        fsdp2: bool = False,
        zero: Any = None,
        gpus: int | None = None,
        offload: bool = False,
    ) -> None:
        for name, size in (("batch", batch), ("sequence", sequence), ("lora_rank", lora_rank)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} is not a size, got {size!r}; expected an integer of 1 or more")
        _check_sharing(fsdp2, zero, gpus, offload)
        computing = None if zero is None or autocast is None else getattr(torch, autocast)
        if not isinstance(model, nn.Module):
            config = model
            if isinstance(model, str | os.PathLike):
                config = load_config(os.fspath(model), trust_remote_code=trust_remote_code)
            dtype = computing or dtype
            model = meta_model(config, dtype=dtype, architecture=architecture, trust_remote_code=trust_remote_code)
        elif dtype is not None or architecture is not None:
            raise ValueError(
                f"a model is planned as it is, got one with dtype={dtype} and architecture={architecture}; expected a "
                "config, or neither of them"
            )
        most = positions(model)
        if sequence is not None and most is not None and sequence > most:
            main = main_input(model)
            other = "" if main in (None, "input_ids") else f"; its main input is {main}, and plans are of text alone"
            raise ModelError(
                f"the model has positions for {most} tokens, got sequences of {sequence}; expected --seq {most} "
                f"or less (sequence= in Python){other}"
            )
        self.architecture = type(model).__name__
        self.parameters = sum(p.numel() for p in model.parameters())
        sizes: Counter[torch.dtype] = Counter()
        for p in model.parameters():
            sizes[p.dtype] += p.numel()
        self.dtype = max(sizes, key=lambda dtype: sizes[dtype])
        self.model = on_meta(model) if lora_rank is None else with_adapters(on_meta(model), lora_rank)
        self._adapted = lora_rank
        self.fsdp2 = gpus if fsdp2 and gpus else 0
        self.zero: Zero | None = None
        if zero is not None and gpus is not None:
            self.zero = zero_settings(zero, gpus, offload, _hidden_size(model))
            if self.zero.mode is not None and autocast not in (None, self.zero.mode):
                raise ValueError(
                    f"zero={zero!r} computes in {self.zero.mode}, got autocast={autocast!r}; expected one of them"
                )
            self.dtype = computing or (getattr(torch, self.zero.mode) if self.zero.mode else self.dtype)
            self.model = copy.deepcopy(self.model).to(self.dtype)  # DeepSpeed casts everything
        self.batch, self.sequence = batch, sequence or min(512, most or 512)
        self._step: dict[str, Any] = {
            "autocast": autocast if self.zero is None else None,
            "gradient_checkpointing": gradient_checkpointing,
            "accumulation": accumulation,
            "attention": attention,
        }
        self._models = {False: self.model}  # whether weights are INT8 -> the model; variants share the dict
        self._curves: dict[tuple[bool, bool, bool], Callable[[int], Estimate]] = {}

    def plan(self, optim: str = "foam", optim_args: str | Mapping[str, Any] | None = None, **choices: Any) -> Plan:
        """The plan of one optimizer; arguments and errors are those of `estimate_memory`."""
        return self.with_batch(self.count(optim, optim_args, **choices), self.batch)

    def count(
        self,
        optim: str = "foam",
        optim_args: str | Mapping[str, Any] | None = None,
        *,
        gradient_release: bool = False,
        int8_weights: bool = False,
        offload_weights: bool = False,
        target_modules: str | list[str] | None = None,
    ) -> Plan:
        """The plan without activations: batch and activations are 0."""
        if optim in FOAM_NAMES:
            gradient_release = gradient_release or foam_options(optim, optim_args).get("gradient_release", False)
        elif int8_weights:
            raise ValueError(f"int8_weights are FOAM's, got them with optim={optim!r}; expected {one_of_ours()}")
        if self.zero is not None and (gradient_release or int8_weights):
            what = "gradient_release" if gradient_release else "int8_weights"
            raise ValueError(
                f"{what} does not run under DeepSpeed's ZeRO: got zero={self.zero.stage}; expected one of them"
            )
        if offload_weights and (self.fsdp2 or self._adapted or not (int8_weights and gradient_release)):
            raise ValueError(
                "offload_weights is for INT8 weights and gradient release on one GPU, without adapters: got "
                f"int8_weights={int8_weights}, gradient_release={gradient_release}, fsdp2={bool(self.fsdp2)} and "
                f"lora_rank={self._adapted}; expected True, True, False and None"
            )
        model = self._model_with(int8_weights)
        if self.fsdp2:
            refuse_whole_weights(optim, optim_args)
        counted = count_bytes(
            shard_of(model, self.fsdp2) if self.fsdp2 else model,
            optim,
            optim_args,
            target_modules=target_modules,
            gradient_release=gradient_release,
            accumulation=self._step["accumulation"],
        )
        plan = Plan(
            optim=optim,
            options=",".join(f"{key}={value}" for key, value in split_optim_args(optim_args)),
            gradient_release=gradient_release,
            int8_weights=int8_weights,
            **asdict(counted),
            batch=0,
            sequence=self.sequence,
            activations=0,
            activations_note="",
        )
        if offload_weights:
            found = offloaded(model, plan_int8(self.model).blocks)
            weights = plan.weights - found.weights + found.slots
            plan = replace(plan, weights=weights, host=found.host, hidden_from=found.hidden_from)
            return replace(plan, offload_weights=True)
        if self.fsdp2:
            computing = None if self._step["autocast"] is None else getattr(torch, self._step["autocast"])
            return replace(
                plan,
                fsdp2=True,
                gpus=self.fsdp2,
                buffers=buffer_bytes(model, self.fsdp2, computing),
                parameters=sum(p.numel() for p in model.parameters()),
                trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            )
        return plan if self.zero is None else self._shared(plan, optim_args, target_modules)

    def _shared(self, plan: Plan, optim_args: Any, target_modules: str | list[str] | None) -> Plan:
        """A plan without activations, for one of the GPUs that share the model."""
        assert self.zero is not None
        accumulation = self._step["accumulation"]
        found = count_zero(
            self.model, self.zero, plan.optim, optim_args, accumulation=accumulation, target_modules=target_modules
        )
        return replace(plan, zero=self.zero.words, gpus=self.zero.gpus, **asdict(found))

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return bool(self._step["accumulation"])

    @property
    def sharing(self) -> str:
        """How several GPUs share the model, in words, or ""."""
        if self.fsdp2:
            return f"FSDP2 on {self.fsdp2} GPU{'s' if self.fsdp2 > 1 else ''}"
        return self.zero.words if self.zero else ""

    def variant(self, *, batch: int, gradient_checkpointing: bool) -> Planner:
        """A planner of the same model and workload but for these two settings."""
        other = copy.copy(self)
        other.batch, other._curves = batch, {}
        other._step = {**self._step, "gradient_checkpointing": gradient_checkpointing}
        return other

    def with_batch(self, plan: Plan, batch: int) -> Plan:
        """A plan of this planner, for `batch` sequences instead of its own."""
        # Stages 2 and 3 free a gradient once it is on its way, as gradient release does.
        released = plan.gradient_release or (self.zero is not None and self.zero.stage > 1)
        estimate = self._activations(plan, batch, released)
        most = estimate.bytes
        if self.fsdp2 and not released:
            # Where activations peak, no gradient is kept yet: FSDP2 keeps parts of them, and frees the whole ones.
            most = max(most, self._activations(plan, batch, True).bytes - plan.gradients)
        # The peak is either in forward and backward or in the optimizer's step.
        blocks_alone = plan.gradient_release and self.accumulates
        if self.fsdp2:
            model = self._model_with(plan.int8_weights)
            shard = shard_of(model, self.fsdp2)
            found = optimizer_temporary_bytes(
                model, plan.optim, plan.options, shard, self.fsdp2, blocks_alone=blocks_alone
            )
            step = found - plan.buffers
        elif self.zero is None:
            step = optimizer_temporary_bytes(self.model, plan.optim, plan.options, blocks_alone=blocks_alone)
        else:
            step = plan.step - plan.gradients - plan.buffers
        return replace(plan, batch=batch, activations=max(most, step), activations_note=estimate.note)

    def _activations(self, plan: Plan, batch: int, released: bool) -> Estimate:
        """The activations of a step; `released` says whether whole gradients are freed in the backward pass."""
        key = (released, plan.gradient_release, plan.int8_weights)
        if key not in self._curves:
            model = self._model_with(plan.int8_weights)
            step = {**self._step, "accumulation": self._step["accumulation"] and not plan.gradient_release}
            self._curves[key] = activation_curve(model, self.sequence, gradient_release=released, **step)
        return self._curves[key](batch)

    def largest_batch(self, plan: Plan, limit: int) -> int:
        """The largest batch with which a plan of this planner stays within `limit` bytes; 0 if even 1 is too large."""
        low, high = 0, 1
        while high <= _MAX_BATCH and self.with_batch(plan, high).total <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.with_batch(plan, middle).total <= limit else (low, middle)
        return low

    def _model_with(self, int8_weights: bool) -> nn.Module:
        """The model on the meta device; with `int8_weights`, those that `foam_hf.Int8Config` quantizes are INT8."""
        if int8_weights not in self._models:
            quantized = copy.deepcopy(self.model)
            for name, block in plan_int8(quantized).blocks.items():
                convert_(module_of(quantized, name), block)
            self._models[True] = quantized
        return self._models[int8_weights]


def _check_sharing(fsdp2: bool, zero: Any, gpus: int | None, offload: bool) -> None:
    """Raise ValueError for options on several GPUs that lack another, or that exclude each other."""
    if fsdp2 and (zero is not None or offload):
        raise ValueError(f"fsdp2 excludes ZeRO: got zero={zero!r} and offload={offload}; expected one of them")
    if fsdp2 and (isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1):
        raise ValueError(f"fsdp2 needs the number of GPUs, got gpus={gpus!r}; expected gpus=2 or more")
    if not fsdp2 and zero is None and (gpus is not None or offload):
        raise ValueError(
            f"gpus and offload are FSDP2's and ZeRO's, got gpus={gpus} and offload={offload} without them; expected "
            "fsdp2=True, or zero=1, 2 or 3, or offload_weights=True for INT8 weights. DDP takes on each GPU what one "
            "takes, and a copy of the gradients unless they are released"
        )
    if zero is not None and gpus is None:
        raise ValueError(f"zero={zero!r} needs the number of GPUs, got none; expected gpus=2 or more")


def _hidden_size(model: nn.Module) -> int | None:
    """The size from which transformers and accelerate fill in what is "auto" in a DeepSpeed config."""
    config: Any = getattr(model, "config", None)
    for each in (config, getattr(config, "text_config", None)):
        for name in ("hidden_size", "hidden_sizes"):
            if size := getattr(each, name, None):
                return int(size if isinstance(size, int) else max(size))
    return None
