"""FOAM in axolotl: `plugins: [foam_hf.axolotl_plugin.FoamPlugin]` and `optimizer: foam` in its YAML.

axolotl imports this module in every process before it checks the YAML. The import registers the optimizer's names.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator

import foam_hf
from foam_hf.optim_args import FOAM_NAMES, foam_options


class FoamArgs(BaseModel):
    """The keys that the plugin adds to axolotl's YAML, and its checks before a model is loaded.

    axolotl derives its config class from this one. In axolotl 0.17 that class lists the legal optimizers; deriving it
    reads the list again, which then has FOAM's names. axolotl 0.19 has no such list.
    """

    foam_report_memory: bool = Field(
        default=False, description="measure the optimizer's bytes and log them (foam_hf.OptimizerMemoryCallback)"
    )

    @model_validator(mode="before")
    @classmethod
    def check_foam(cls, data: Any) -> Any:
        """Raise ValueError for an `optim_args` that FOAM does not take."""
        if data.get("optimizer") not in FOAM_NAMES:
            return data
        foam_options(data["optimizer"], data.get("optim_args"))
        return data


class FoamPlugin(BasePlugin):
    """Adds `optimizer: foam` (and FOAM's other names) to axolotl's YAML, with FOAM's keys under `optim_args`."""

    def get_input_args(self) -> str:
        """The dotted name of the class with the keys that this plugin adds to the YAML."""
        return "foam_hf.axolotl_plugin.FoamArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Translate axolotl's `optim_target_modules: all_linear` to "all-linear" of transformers."""
        spelled = cfg.optimizer in FOAM_NAMES and cfg.optim_target_modules == "all_linear"
        return {"optim_target_modules": "all-linear"} if spelled else {}

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """An `OptimizerMemoryCallback` if the YAML has `foam_report_memory: true`, for any optimizer."""
        return [foam_hf.OptimizerMemoryCallback()] if cfg.foam_report_memory else []
