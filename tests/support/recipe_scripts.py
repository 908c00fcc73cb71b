"""The training scripts of the recipes as modules, each under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_train(recipe: Path, name: str) -> ModuleType:
    """Import the train.py of a recipe's folder as `name`, once: `train` may be that of the GLUE recipe."""
    if name not in sys.modules:
        sys.path.insert(0, str(recipe))
        spec = importlib.util.spec_from_file_location(name, recipe / "train.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
