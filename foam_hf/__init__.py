"""FOAM (Folded Optimizer with Approximate Moment) for the Hugging Face Trainer.

`import foam_hf` registers `optim="foam"` and FOAM's other names with transformers: now if transformers is imported
already, else when it is imported. The import is cheap: torch and transformers are imported when a name needs them.
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any

from foam_hf._import_hook import on_import
from foam_hf._version import __version__

if TYPE_CHECKING:
    from foam_hf import memory
    from foam_hf.int8.quantizer import Int8Config
    from foam_hf.optimizer.foam import FOAM
    from foam_hf.optimizer.groups import foam_param_groups
    from foam_hf.optimizer.release import enable_gradient_release
    from foam_hf.planner.planner import estimate_memory
    from foam_hf.trainer.callback import OptimizerMemoryCallback


__all__ = [
    "FOAM",
    "Int8Config",
    "OptimizerMemoryCallback",
    "__version__",
    "enable_gradient_release",
    "estimate_memory",
    "foam_param_groups",
    "memory",
]

_LAZY_MODULES = {
    "FOAM": "foam_hf.optimizer",
    "Int8Config": "foam_hf.int8.quantizer",
    "OptimizerMemoryCallback": "foam_hf.trainer.callback",
    "enable_gradient_release": "foam_hf.optimizer.release",
    "estimate_memory": "foam_hf.planner",
    "foam_param_groups": "foam_hf.optimizer.groups",
}


def __getattr__(name: str) -> Any:
    if name == "memory":
        return importlib.import_module("foam_hf.memory")
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY_MODULES[name]), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _register_names(module: types.ModuleType) -> None:
    from foam_hf.trainer.names import register_names

    register_names(module)
    _patch(module)


def _patch(module: types.ModuleType) -> None:
    from foam_hf.trainer.patches import patch

    patch(module)


def _register_int8(module: types.ModuleType) -> None:
    importlib.import_module("foam_hf.int8.quantizer")  # registers itself when it is imported


def _register_int8_weight(module: types.ModuleType) -> None:
    importlib.import_module("foam_hf.int8.weight")  # registers Int8Weight for `torch.load(weights_only=True)`


on_import("transformers.training_args", _register_names)
on_import("transformers.trainer", _patch)
on_import("transformers.modelcard", _patch)
on_import("accelerate.accelerator", _patch)
on_import("transformers.quantizers.auto", _register_int8)
on_import("foam_hf.optimizer", _register_int8_weight)
