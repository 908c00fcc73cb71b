"""The quantizer of an `Int8Config`, for `from_pretrained(..., quantization_config=foam_hf.Int8Config())`.

This file relies on these names of transformers 5.6 to 5.x: `register_quantization_config` and `register_quantizer`,
which are public, the hooks of `HfQuantizer` that it overrides, `AutoHfQuantizer.merge_quantization_configs` and
`PreTrainedModel.save_pretrained`. The last two are wrapped, because the one ignores `dequantize=True` for a checkpoint
that is quantized already, and the other `state_dict=...` for a quantized model.
`PreTrainedModel._init_weights` is called: it initializes the weights of a module. All other names that this package
relies on are in `foam_hf/trainer/patches.py`, `foam_hf/trainer/private.py` and `foam_hf/planner/fsdp2.py`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from foam_hf._import_hook import on_import
from foam_hf.display import format_bytes
from foam_hf.int8.config import Int8Config, check_version
from foam_hf.int8.files import CODES, METHOD, SCALES
from foam_hf.int8.layers import accept_codes, install_
from foam_hf.int8.models import (
    Int8Plan,
    check_files,
    convert_,
    dequantize_,
    materialize_,
    module_of,
    plan_int8,
)
from foam_hf.int8.offload import Offload
from foam_hf.int8.weight import Int8Weight
from foam_hf.tensors.places import is_sharded
from foam_hf.wrapping import wrap

logger = logging.getLogger("foam_hf")


class Int8Quantizer(HfQuantizer):
    """The quantizer that transformers calls while it loads, trains or saves a model with an `Int8Config`."""

    quantization_config: Int8Config

    def __init__(self, quantization_config: Int8Config, **kwargs: Any) -> None:
        check_version()
        super().__init__(quantization_config, **kwargs)
        if quantization_config.dequantize and not self.pre_quantized:
            raise ValueError(
                "Int8Config(dequantize=True) makes a checkpoint of INT8 weights plain, but this one is plain already; "
                "expected no quantization_config, or one without dequantize"
            )
        self.plan = Int8Plan()
        self.offload: Offload | None = None  # of a model that is offloaded, once its weights are known
        self._dtypes: dict[str, torch.dtype] = {}
        self._device: torch.device | None = None  # that offloaded weights visit, if the caller said so

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that Trainer trains the quantized weights themselves, without adapters."""
        return True

    @property
    def quantized_element_size(self) -> float:
        return 1 + torch.float32.itemsize / self.quantization_config.block_size

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        # transformers plans device maps and warms up the allocator by these sizes.
        quantized = self.param_needs_quantization(model, param_name)
        return self.quantized_element_size if quantized else param.element_size()

    def update_device_map(self, device_map: Any) -> Any:
        """With offload the weights are read on the CPU, and go on from there: the model is nowhere as a whole."""
        if self.quantization_config.offload is None or device_map is None:
            return device_map
        places = {*device_map.values()} if isinstance(device_map, dict) else {device_map}
        if len(places) > 1:
            raise ValueError(
                f"offload='cpu' trains on one device, got a device_map with {', '.join(sorted(map(str, places)))}; "
                "expected one, as device_map={'': 0}"
            )
        (place,) = places
        self._device = _device_named(place)
        return None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
        if self.quantization_config.offload is not None and processes > 1:
            raise ValueError(
                f"offload='cpu' trains in one process, got WORLD_SIZE={processes}; expected Int8Config() without "
                "offload, or one process"
            )
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"INT8 weights cannot be offloaded, got a device_map with {', '.join(sorted(places))}; "
                "expected one device, or GPUs alone"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.plan = plan_int8(model, **self.quantization_config.choice())
        if self.quantization_config.offload is not None:
            self.offload = Offload(model, self.plan.blocks)
            _tell_without_gpu(self.offload)
        if not self.pre_quantized:
            logger.info(self.plan.summary(model))
            if self.plan.left:
                logger.warning(f"INT8: these folded weights of {type(model).__name__} stay as they are: {self.plan}")
            return
        if checkpoint_files is not None:
            check_files(self.plan, checkpoint_files, self.quantization_config.block_size)
        # Two plain buffers take the place of the weight: the loader fills them from any file, like other buffers.
        for name, block in self.plan.blocks.items():
            module = module_of(model, name)
            rows, width = module.weight.shape
            self._dtypes[name] = module.weight.dtype
            # transformers initializes missing parameters, and `_init_weights` reads `module.weight` as it does so.
            module.register_parameter("weight", None)  # keeps the order of parameters
            module.__dict__["weight"] = torch.empty(rows, width, dtype=self._dtypes[name], device="meta")
            module.register_buffer(CODES, torch.empty(rows, width, dtype=torch.int8, device="meta"))
            module.register_buffer(SCALES, torch.empty(rows, width // block, dtype=torch.float32, device="meta"))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        plain = self.pre_quantized and self.quantization_config.dequantize
        for name, block in self.plan.blocks.items():
            module = module_of(model, name)
            if self.pre_quantized:
                weight = Int8Weight(getattr(module, CODES), getattr(module, SCALES), dtype=self._dtypes[name])
                delattr(module, CODES)
                delattr(module, SCALES)
                del module.__dict__["weight"]
                if self.offload is not None:
                    weight = self.offload.take(name, weight)
                if plain:
                    module.weight = nn.Parameter(weight.dequantize())
                else:
                    install_(module, weight)
            elif isinstance(module.weight, Int8Weight):
                accept_codes(module)
            else:  # the checkpoint lacks this weight, so transformers initialized it
                convert_(module, block, self._keep(name))
        if self._device is not None:
            model.to(self._device)

    def _keep(self, name: str) -> Callable[[Int8Weight], Int8Weight]:
        """What takes the weight called ``name`` to where it is kept: host memory if it is offloaded."""
        return functools.partial(self.offload.take, name) if self.offload is not None else lambda weight: weight

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self.plan.blocks

    def get_quantize_ops(self) -> Any:
        return _quantize_operation()(self.plan, self._keep, self._device)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The state dict that `save_pretrained` was given, or None: it then makes one of the model.

        Raises:
            ValueError: none was given, and FSDP2 has sharded the model.
        """
        given = _given_state.get()
        if given is None and any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"save_pretrained of a {type(model).__name__} that is sharded got no state_dict; expected "
                "Trainer.save_model(), or save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
            )
        return given, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Make the INT8 weights of a model plain, for `model.dequantize()`.

        Args:
            model: changed in place.
            dtype: of the new weights; by default each weight's own. transformers would take the config's, which is
                wrong after `model.to(...)`.
        """
        dequantize_(model, dtype)
        self.remove_quantization_config(model)
        return model


@functools.cache
def _quantize_operation() -> Any:
    from transformers.core_model_loading import ConversionOps  # imported late, as transformers does

    class QuantizeInt8(ConversionOps):
        """Quantizes a weight that was just read, on its device; the floating point copy is freed at once."""

        def __init__(self, plan: Int8Plan, keep: Callable[[str], Any], device: torch.device | None) -> None:
            self.plan, self.keep, self.device = plan, keep, device

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
            ((key, value),) = input_dict.items()
            value = value[0] if isinstance(value, list) else value
            expected = tuple(module_of(model, full_layer_name).weight.shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"{full_layer_name} has shape {tuple(value.shape)}; expected {expected}")
            block = self.plan.blocks[full_layer_name]
            input_dict.clear()
            value = value if self.device is None else value.to(self.device)
            return {key: nn.Parameter(self.keep(full_layer_name)(Int8Weight.from_float(value, block_size=block)))}

    return QuantizeInt8


def _device_named(place: Any) -> torch.device:
    """The device of an entry of a device_map; of "auto" and its like the GPU, if there is one."""
    if place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place == "disk":
        raise ValueError("offload='cpu' trains on one device, got device_map 'disk'; expected one, as {'': 0}")
    return torch.device(place)


def _tell_without_gpu(offload: Offload) -> None:
    size = format_bytes(offload.visits.host_bytes)
    if torch.cuda.is_available():
        logger.info(f"INT8: {size} of weights in {len(offload.visits.layers)} layers stay in host memory")
    else:
        logger.warning(
            f"offload='cpu' saves memory of a GPU, and torch sees none: got {size} of INT8 weights to offload"
        )


def quantize_model_(model: Any, config: Int8Config | None = None, *, device: torch.device | str | None = None) -> Any:
    """Make the weights of a model INT8 in place, as `from_pretrained` does.

    Parameters on the meta device are allocated and initialized one module at a time. So the whole model never exists
    in floating point.

    Args:
        model: a transformers model.
        config: which weights, and their blocks; `Int8Config()` by default.
        device: for parameters on the meta device; the CPU by default. Other parameters keep their device.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no transformers model, or `config` no `Int8Config`.
        ValueError: no weight can be converted.
    """
    from transformers import PreTrainedModel

    config = Int8Config() if config is None else config
    if not isinstance(config, Int8Config):
        raise TypeError(f"config is no Int8Config, got {type(config).__name__}; expected foam_hf.Int8Config(...)")
    if not issubclass(type(model), PreTrainedModel):
        raise TypeError(f"model is no transformers model, got {type(model).__name__}; expected a PreTrainedModel")
    quantizer = Int8Quantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    if any(p.is_meta for p in model.parameters()):
        place = torch.device("cpu" if device is None else device)
        rule = lambda module: getattr(module, "_init_weights", None)  # noqa: E731
        materialize_(model, quantizer.plan, place, rule, quantizer._keep)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _wrap_merge_configs(original: Callable[..., Any]) -> Any:
    """Wrap `merge_quantization_configs`: it keeps `dequantize=True`, and warns of what the checkpoint overrides."""

    @functools.wraps(original)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked, held = quantization_config_from_args, quantization_config
        method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
        if not isinstance(asked, Int8Config) or method != METHOD:
            return original(held, asked)
        merged = Int8Config.from_dict(held if isinstance(held, dict) else held.to_dict())
        merged.dequantize, merged.offload = asked.dequantize, asked.offload
        other = [
            f"{name}={value!r} instead of {asked.choice()[name]!r}"
            for name, value in merged.choice().items()
            if value != asked.choice()[name]
        ]
        if other and not merged.dequantize:
            logger.warning(
                f"INT8: the checkpoint's weights are INT8 already, and its own settings are used: {', '.join(other)}"
            )
        return merged

    return staticmethod(merge_quantization_configs)


_given_state: ContextVar[dict[str, Any] | None] = ContextVar("foam_hf_given_state", default=None)


def _wrap_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.save_pretrained`: INT8 models are saved from the state dict that it is given."""

    @functools.wraps(original)
    def save_pretrained(
        model: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> Any:
        token = _given_state.set(state_dict)
        try:
            return original(model, save_directory, is_main_process, state_dict, **kwargs)
        finally:
            _given_state.reset(token)

    return save_pretrained


def _wrap_saving(module: ModuleType) -> None:
    wrap(module.PreTrainedModel, "save_pretrained", _wrap_save_pretrained)


def _register() -> None:
    """Register `foam_int8` with transformers, with the classes of this import of foam_hf. Idempotent."""
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        mapping.pop(METHOD, None)  # an earlier import of foam_hf in a notebook may have registered its own
    auto.register_quantization_config(METHOD)(Int8Config)
    auto.register_quantizer(METHOD)(Int8Quantizer)
    wrap(auto.AutoHfQuantizer, "merge_quantization_configs", lambda merge: staticmethod(_wrap_merge_configs(merge)))
    on_import("transformers.modeling_utils", _wrap_saving)


_register()
