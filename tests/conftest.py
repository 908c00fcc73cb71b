from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

# Before any library starts its threads or looks for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

from tests.support.interpreter import patch_once

if not torch.cuda.is_available():  # read by Triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        patch_once()


_modules = 0


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """Every Trainer collects garbage; to look through torch and transformers takes longer than a tiny model trains."""
    global _modules
    if len(sys.modules) > _modules:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_log_level() -> None:
    """A Trainer with a log level of its own sets it for the whole process, and FOAM's first line depends on it."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_warning()


@pytest.fixture(autouse=True)
def _compile_nothing_else() -> Iterator[None]:
    """``torch_compile=True`` of one Trainer stays in the environment, where accelerate reads it for the next."""
    before = {name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        if name not in before:
            del os.environ[name]


@pytest.fixture
def forget_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process runs many Trainers, and accelerate would keep the first bf16=True for the others."""
    from accelerate.state import AcceleratorState  # imported late, as few tests need it

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` hands out files as they come: long ones first, so that no process waits for a long last one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("long") is None)
