"""How DeepSpeed's ZeRO divides a model: its settings, and the flat vectors that a process updates.

The arithmetic is that of `deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py` of version 0.19; tests compare it
with DeepSpeed itself. DeepSpeed is not needed to plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

STAGES = (1, 2, 3)
_ALIGNMENT = 2  # elements of a flat vector, times the processes
# Keys of "zero_optimization" whose value, unless it is one of these, changes memory in a way that is not planned.
_NOT_PLANNED: dict[str, tuple[Any, ...]] = {
    "offload_param": (None, {}),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_quantized_gradients": (False,),
    "parameter_alignment": (False,),
    "contiguous_gradients": (True,),
    "zenflow": (None, {}),
    "cpu_offload": (None, False),
}
_DEVICES = ("none", "cpu", "nvme")  # of offloading
_MODES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}  # sections -> what DeepSpeed casts weights to


@dataclass(frozen=True)
class Zero:
    """Settings of ZeRO that decide what a GPU holds; the defaults are DeepSpeed's own.

    Attributes:
        stage: 1 divides the optimizer's state and the fp32 masters, 2 the gradients too, 3 the weights too.
        gpus: processes that share the model, one a GPU.
        offload: whether masters, state and their gradients lie in host memory (`offload_optimizer`).
        reduce_bucket: elements of `reduce_bucket_size`.
        overlap: `overlap_comm`, which doubles the bucket of stages 1 and 2.
        live: elements that stage 3 keeps gathered at most (`stage3_max_live_parameters`).
        sub_group: elements that stage 3 updates at a time (`sub_group_size`).
        round_robin: `round_robin_gradients`, the order of weights in the flat vectors of stages 1 and 2.
        not_planned: keys of a config that change the memory, and that are not in the plan.
        mode: "bfloat16" or "float16" if a config has it enabled, to which DeepSpeed casts the weights.
    """

    stage: int
    gpus: int
    offload: bool = False
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    round_robin: bool = False
    not_planned: tuple[str, ...] = ()
    mode: str | None = None

    @property
    def words(self) -> str:
        offload = ", optimizer in host memory" if self.offload else ""
        return f"ZeRO-{self.stage} on {self.gpus} GPU{'s' if self.gpus > 1 else ''}{offload}"


def zero_settings(
    given: int | str | os.PathLike[str] | Mapping[str, Any], gpus: int, offload: bool, hidden_size: int | None
) -> Zero:
    """The settings of a stage, or of a DeepSpeed config.

    Args:
        given: 1, 2 or 3, which means DeepSpeed's defaults; a config's file, or its dict.
        gpus, offload: as in `Zero`; a config with `offload_optimizer` sets it too.
        hidden_size: of the model, from which transformers and accelerate fill in "auto" sizes.

    Raises:
        ValueError: no such stage, a file that is no DeepSpeed config, stage 0, or a value that its key cannot have.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ValueError(f"gpus is not a count, got {gpus!r}; expected an integer of 1 or more")
    if isinstance(given, Mapping):
        return _from_config(given, "the config", gpus, offload, hidden_size)
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else str(given)
    if text in map(str, STAGES):
        return Zero(int(text), gpus, offload)
    if not isinstance(given, str | os.PathLike) or not text.endswith(".json"):
        raise ValueError(f"zero is no stage, got {given!r}; expected 1, 2, 3, or the .json file of a DeepSpeed config")
    try:
        config = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"zero: cannot read {text}: {error}; expected a DeepSpeed config") from error
    return _from_config(config, text, gpus, offload, hidden_size)


def _from_config(config: Any, where: str, gpus: int, offload: bool, hidden_size: int | None) -> Zero:
    if not isinstance(config, Mapping):
        raise ValueError(f"zero: {where} is no DeepSpeed config, got {config!r:.80}; expected a JSON object")
    given = _section(config, "zero_optimization", where)
    stage = given.get("stage")
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"zero: {where} has zero_optimization.stage={stage!r}; expected 1, 2 or 3")
    section = {key: value for key, value in given.items() if value != "auto"}  # DeepSpeed takes its default there
    if given.get("reduce_bucket_size") == "auto":
        if hidden_size is None:
            raise ValueError(
                f"zero: {where} has reduce_bucket_size='auto', which this model does not fill in; expected a number"
            )
        section["reduce_bucket_size"] = hidden_size * hidden_size
    devices = [_device(section, f"offload_{part}", where) for part in ("optimizer", "param")]
    return Zero(
        int(stage),
        gpus,
        offload or devices[0] != "none",
        reduce_bucket=_size(section, "reduce_bucket_size", Zero.reduce_bucket, where, least=1),
        overlap=bool(section.get("overlap_comm")) and stage < 3,
        live=_size(section, "stage3_max_live_parameters", Zero.live, where),
        sub_group=_size(section, "sub_group_size", Zero.sub_group, where),
        round_robin=bool(section.get("round_robin_gradients")),
        not_planned=tuple(_not_planned(config, section, devices, where)),
        mode=next((mode for key, mode in _MODES.items() if _section(config, key, where).get("enabled") is True), None),
    )


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"zero: {where} has {key}={value!r}; expected a section, as {{...}}")
    return value or {}


def _device(section: Mapping[str, Any], key: str, where: str) -> str:
    device = _section(section, key, where).get("device", "none")
    if device not in _DEVICES:
        raise ValueError(f"zero: {where} has {key}.device={device!r}; expected one of {', '.join(_DEVICES)}")
    return str(device)


def _size(section: Mapping[str, Any], key: str, default: int, where: str, least: int = 0) -> int:
    value = section.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value < least or not float(value).is_integer():
        raise ValueError(f"zero: {where} has {key}={value!r}; expected a number of elements, {least} or more")
    return int(value)


def _not_planned(
    config: Mapping[str, Any], section: Mapping[str, Any], devices: Sequence[str], where: str
) -> Iterator[str]:
    """The keys of a config that change the memory, and that the plan leaves out."""
    for key, legal in _NOT_PLANNED.items():
        if section.get(key, legal[0]) not in legal and (key != "offload_param" or devices[1] != "none"):
            yield key
    if devices[0] == "nvme":
        yield "offload_optimizer to NVMe"
    if devices[0] != "none" and section["offload_optimizer"].get("ratio", 1) != 1:
        yield "offload_optimizer.ratio"
    if _section(config, "data_types", where).get("grad_accum_dtype"):
        yield "data_types"


class Segment(NamedTuple):
    """A run of adjacent elements of one weight in a flat vector: `size` of them from the element number `first`."""

    weight: Tensor
    first: int
    size: int


class Flat(NamedTuple):
    """A flat vector that one process updates: its elements, padding included, and where they come from."""

    numel: int
    segments: list[Segment]


def flats(weights: Sequence[Tensor], zero: Zero, rank: int) -> list[Flat]:
    """The flat vectors of one process, made of the weights of one param group."""
    if not weights:
        return []
    return list(_parts_of_each(weights, zero, rank)) if zero.stage == 3 else [_part_of_all(weights, zero, rank)]


def _part_of_all(weights: Sequence[Tensor], zero: Zero, rank: int) -> Flat:
    """Stages 1 and 2: the weights stand one behind the other, and each process has an equal part of the whole."""
    if zero.round_robin:
        weights = [p for first in range(zero.gpus) for p in weights[first :: zero.gpus]]
    step = _ALIGNMENT * zero.gpus
    size = _ALIGNMENT * -(-sum(p.numel() for p in weights) // step)
    begin, end, at = rank * size, (rank + 1) * size, 0
    segments = []
    for p in weights:
        first, last = max(begin, at), min(end, at + p.numel())
        if first < last:
            segments.append(Segment(p, first - at, last - first))
        at += p.numel()
    return Flat(size, segments)


def _parts_of_each(weights: Sequence[Tensor], zero: Zero, rank: int) -> Iterator[Flat]:
    """Stage 3: each process has an equal part of each weight; some of these parts make a sub-group."""
    segments: list[Segment] = []
    numel = 0
    for i, p in enumerate(weights):
        part = -(-p.numel() // zero.gpus)
        first = min(rank * part, p.numel())
        segments.append(Segment(p, first, min(part, p.numel() - first)))
        numel += part
        if numel >= zero.sub_group or i == len(weights) - 1:
            yield Flat(numel, [segment for segment in segments if segment.size])
            segments, numel = [], 0
