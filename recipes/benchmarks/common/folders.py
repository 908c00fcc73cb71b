"""Where things are in a clone, and the scripts of the recipes as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
RECIPES = BENCHMARKS.parent
ROOT = RECIPES.parent


def load_script(script: Path, name: str) -> ModuleType:
    """`script` as a module of this name, anew at each call: a study's runs change some of its functions."""
    folder = str(script.parent)
    sys.path[:0] = [] if folder in sys.path else [folder]  # its siblings
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
