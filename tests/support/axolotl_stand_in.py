"""A small copy of axolotl's plugin interface and of how it trains from a YAML, as axolotl needs its own environment.

`python axolotl_stand_in.py CONFIG.yaml ...` does what axolotl 0.17 and 0.19 do: import the plugins, derive the config
class from the plugins' classes and validate, build TrainingArguments and Trainer, add the plugins' arguments and
callbacks, train. As in 0.17, the config class lists the optimizers that were legal before a plugin was imported.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from transformers.training_args import OptimizerNames


class BasePlugin:
    """The hooks of axolotl's class that FoamPlugin may override; they do nothing there either."""

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def get_training_args(self, cfg: Any) -> dict | None: ...

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        return []


for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin


class Config(BaseModel):
    plugins: list[str] = []
    optimizer: OptimizerNames | None = None
    optim_args: str | dict[str, Any] | None = None
    optim_target_modules: list[str] | str | None = None
    embedding_lr: float | None = None
    learning_rate: float
    max_steps: int
    output_dir: str


class Settings(dict):
    """A dict whose keys are attributes, as in axolotl; a missing key is None."""

    __getattr__ = dict.get


def dotted(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def main(path: str) -> None:
    content = Settings(yaml.safe_load(Path(path).read_text()))
    plugins = [dotted(name)() for name in content.get("plugins", [])]
    for plugin in plugins:
        plugin.register(content)
    extra = [dotted(name) for plugin in plugins if (name := plugin.get_input_args())]
    cfg = Settings(type("Merged", (Config, *extra), {})(**content).model_dump(exclude_none=True))

    from tiny_models import language_data, tiny_llama
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {key: cfg[key] for key in ("learning_rate", "max_steps", "output_dir")}
    settings |= {"optim": cfg.optimizer, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    if isinstance(cfg.optim_args, dict):
        settings["optim_args"] = ",".join(f"{key}={value}" for key, value in cfg.optim_args.items())
    if cfg.optim_target_modules:
        settings["optim_target_modules"] = cfg.optim_target_modules
    for plugin in plugins:
        settings |= plugin.get_training_args(cfg) or {}
    trainer = Trainer(tiny_llama(), TrainingArguments(**settings), train_dataset=language_data())
    for plugin in plugins:
        for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
    trainer.train()
    print("trained with", type(trainer.optimizer.optimizer).__name__, trainer.args.optim_target_modules)
    print("levels", sorted({str(group.get("level")) for group in trainer.optimizer.param_groups}))


if __name__ == "__main__":
    for config in sys.argv[1:]:
        print("config", config)
        try:
            main(config)
        except ValidationError as error:
            print(f"{config} refused: {error}")
