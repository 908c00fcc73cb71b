"""FOAM in axolotl: `plugins: [foam_hf.axolotl_plugin.FoamPlugin]` and `optimizer: foam` in its YAML.

Importing this module, which axolotl does in every process before it checks the YAML, registers the optimizer's names.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator

import foam_hf
from foam_hf.optim_args import FOAM_NAMES, foam_options


class FoamArgs(BaseModel):
    """What the plugin adds to axolotl's YAML, and its checks of what is there, before a model is loaded.

    axolotl derives its config class anew from this one. Where that class lists the legal optimizers (0.17 does, 0.19
    takes any word), this is also what lets `optimizer: foam` in: the list is read again, with our names in it.
    """

    foam_report_memory: bool = Field(
        default=False, description="measure the optimizer's bytes and log them (foam_hf.OptimizerMemoryCallback)"
    )

    @model_validator(mode="before")
    @classmethod
    def check_foam(cls, data: Any) -> Any:
        """Refuse what FOAM cannot do, in the words of the YAML."""
        if data.get("optimizer") not in FOAM_NAMES:
            return data
        foam_options(data["optimizer"], data.get("optim_args"))
        return data


class FoamPlugin(BasePlugin):
    """Lets an axolotl YAML say `optimizer: foam` (or another of its names) with FOAM's keys under `optim_args`."""

    def get_input_args(self) -> str:
        """The class with the keys that this plugin adds to the YAML, by its dotted name."""
        return "foam_hf.axolotl_plugin.FoamArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """`optim_target_modules: all_linear` is axolotl's spelling; transformers' has a hyphen."""
        spelled = cfg.optimizer in FOAM_NAMES and cfg.optim_target_modules == "all_linear"
        return {"optim_target_modules": "all-linear"} if spelled else {}

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The measurement that `foam_report_memory: true` asks for, of any optimizer."""
        return [foam_hf.OptimizerMemoryCallback()] if cfg.foam_report_memory else []
