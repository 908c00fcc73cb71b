"""Layers with an INT8 weight: their state dicts hold its codes and scales, as plain tensors that any file can hold.

Sharded by FSDP2 the weight is a DTensor whose part on each rank is an ``Int8Weight``. Codes and scales in a state dict
are then two DTensors with the weight's placements. So ``torch.distributed.checkpoint`` gathers, saves and reshards
them exactly, and the files have the same names with FSDP2 and without.

This file relies on these names of torch, beside those that FSDP2 documents: ``get_model_state_dict`` and
``set_model_state_dict`` read each key of a state dict as an attribute of its module, and ask each module for its
``named_buffers(recurse=False)``. ``_get_model_state_dict`` is wrapped: with ``ignore_frozen_params`` it removes frozen
weights by the names of parameters, which are not those of codes and scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foam_hf._import_hook import on_import
from foam_hf.int8.files import CODES, SCALES, pair_problem, shape_and_dtype
from foam_hf.int8.linear import linear
from foam_hf.int8.weight import Int8Weight
from foam_hf.tensors.places import is_sharded, local
from foam_hf.wrapping import wrap

_frozen_stay: ContextVar[bool] = ContextVar("foam_hf_frozen_stay", default=False)


def int8_of(weight: Any) -> Int8Weight | None:
    """``weight`` if it is INT8; of an INT8 weight that is sharded, the part of this rank; None for any other."""
    part = local(weight) if isinstance(weight, Tensor) else None
    return part if isinstance(part, Int8Weight) else None


class Int8Layer(nn.Linear):
    """What a class of linear layers gets when its weight becomes INT8."""

    plain: ClassVar[type[nn.Linear]]

    @property
    def weight_codes(self) -> Tensor:
        """The weight's codes, int8 (m, n); a DTensor if it is sharded."""
        return self._parts()[0]

    @property
    def weight_scales(self) -> Tensor:
        """The weight's scales, float32 (m, n / block size); a DTensor if it is sharded."""
        return self._parts()[1]

    def _parts(self) -> tuple[Tensor, Tensor]:
        weight = self._parameters.get("weight")
        if int8_of(weight) is None:
            raise AttributeError("this layer's weight is not INT8")
        return parts_of(cast(Tensor, weight))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As in torch; without ``recurse`` also codes and scales of a sharded weight, see the top of this file."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        weight = self._parameters.get("weight")
        if not recurse and is_sharded(weight) and int8_of(weight) is not None:
            for name, part in zip((CODES, SCALES), parts_of(cast(Tensor, weight)), strict=True):
                yield f"{prefix}.{name}" if prefix else name, part

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> Any:
        """As in torch. FSDP2 calls it when it has sharded the weight; a ValueError if it did so by columns."""
        weight: Any = self._parameters.get("weight")
        if is_sharded(weight) and int8_of(weight) is None:
            raise ValueError(
                f"INT8 weights are sharded by rows alone: got one of shape {tuple(weight.shape)} with placements "
                f"{weight.placements}; expected Shard(0), which is what fully_shard does without shard_placement_fn"
            )
        return super().register_load_state_dict_post_hook(hook)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_layer, (self.plain,), self.__dict__


class Int8Linear(Int8Layer):
    """An ``nn.Linear`` with an INT8 weight."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As in torch, without its search for tensor subclasses."""
        weight: Any = self._parameters.get("weight")
        if isinstance(weight, Int8Weight) and type(input) is Tensor and not torch.compiler.is_compiling():
            return linear(input, weight, self.bias)
        return super().forward(input)


@functools.cache
def _int8_class(plain: Any) -> type[Int8Layer]:
    return Int8Linear if plain is nn.Linear else type(f"Int8{plain.__name__}", (Int8Layer, plain), {"plain": plain})


def _new_layer(plain: Any) -> nn.Linear:
    made = _int8_class(plain)
    return made.__new__(made)


def install_(module: nn.Linear, weight: Int8Weight, requires_grad: bool = True) -> None:
    """Make ``weight`` the parameter of ``module``."""
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    accept_codes(module)


def accept_codes(module: nn.Linear) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of ``module`` hold its INT8 weight as codes and scales."""
    plain: Any = type(module)
    if not issubclass(plain, Int8Layer):
        module.__class__ = _int8_class(plain)
    if "_int8_waiting" not in module.__dict__:
        module.__dict__["_int8_waiting"] = {}
        module.register_state_dict_post_hook(_save_codes)
        module.register_load_state_dict_pre_hook(_load_codes)


def parts_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of an INT8 weight, which share its memory: two DTensors if ``weight`` is one."""
    part = local(weight)
    assert isinstance(part, Int8Weight)
    if not is_sharded(weight):
        return part.stored()
    blocks = weight.shape[-1] // part.block_size
    return _sharded_as(weight, part.codes, weight.shape[-1]), _sharded_as(weight, part.scales, blocks)


def _sharded_as(weight: Any, part: Tensor, columns: int) -> Tensor:
    """A DTensor of ``columns`` columns with the rows of ``weight``, of which this rank holds ``part``."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*weight.shape[:-1], columns))
    strides = torch.empty(shape, device="meta").stride()
    with torch.no_grad():
        return DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=strides
        )


def _save_codes(module: nn.Linear, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Replace an INT8 weight in a new state dict by two plain tensors, which any file format can hold."""
    weight = state_dict.get(prefix + "weight")
    if int8_of(weight) is None or (_frozen_stay.get() and not module.weight.requires_grad):
        return
    del state_dict[prefix + "weight"]
    state_dict[prefix + CODES], state_dict[prefix + SCALES] = parts_of(cast(Tensor, weight))


def _load_codes(
    module: nn.Linear,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Make an INT8 weight of the codes and scales in a state dict, before `load_state_dict` reads `module`.

    Two files of a sharded checkpoint give them in two calls; then the first is kept until the second comes.
    """
    waiting: dict[str, Tensor] = module.__dict__["_int8_waiting"]
    waiting |= {part: state_dict.pop(prefix + part) for part in (CODES, SCALES) if prefix + part in state_dict}
    weight, mine = module.weight, int8_of(module.weight)
    if not waiting or mine is None:
        return
    refusal = module.__dict__.pop("_int8_refusal", None)
    if refusal is not None:
        refusal.remove()
    if len(waiting) < 2:
        module.__dict__["_int8_refusal"] = module.register_forward_pre_hook(_refuse_incomplete_weight)
        return
    codes, scales = waiting.pop(CODES), waiting.pop(SCALES)
    problem = pair_problem(shape_and_dtype(codes), shape_and_dtype(scales), mine.block_size)
    problem = problem or _placement_problem(codes, scales, weight)
    if problem:
        error_msgs.append(f"INT8 weight {prefix}weight: {problem}")
        return
    loaded: Tensor = Int8Weight(local(codes), local(scales), dtype=weight.dtype)
    state_dict[prefix + "weight"] = _sharded_as(weight, loaded, weight.shape[-1]) if is_sharded(weight) else loaded


def _placement_problem(codes: Any, scales: Any, weight: Any) -> str:
    """Why codes and scales are not sharded as ``weight``, or ""."""

    def layout(x: Any) -> Any:
        return (x.device_mesh, tuple(x.placements)) if is_sharded(x) else "no DTensor"

    if layout(codes) == layout(scales) == layout(weight):
        return ""
    return (
        f"codes are {layout(codes)}, scales {layout(scales)}, the weight is {layout(weight)}; expected the same: "
        "torch.distributed.checkpoint.state_dict.set_model_state_dict shards whole tensors"
    )


def _refuse_incomplete_weight(module: nn.Linear, args: Any) -> None:
    """Raise RuntimeError before a forward pass if a checkpoint had codes without scales, or scales without codes."""
    (held,) = module.__dict__["_int8_waiting"]
    raise RuntimeError(
        f"an INT8 weight of shape {tuple(module.weight.shape)} was loaded from a checkpoint that has its {held} "
        f"without its {SCALES if held == CODES else CODES}; expected both"
    )


def _wrap_get_model_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``_get_model_state_dict``: frozen INT8 weights keep their names if they are to be removed by these."""

    @functools.wraps(original)
    def _get_model_state_dict(model: Any, info: Any) -> Any:
        token = _frozen_stay.set(info.ignore_frozen_params)
        try:
            return original(model, info)
        finally:
            _frozen_stay.reset(token)

    return _get_model_state_dict


def _register(module: ModuleType) -> None:
    if hasattr(module, "_get_model_state_dict"):
        wrap(module, "_get_model_state_dict", _wrap_get_model_state_dict)


on_import("torch.distributed.checkpoint.state_dict", _register)
