from __future__ import annotations

import importlib.util
import os

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# The files that take longest on one core, in their order; `make test` hands out files as they come, so that the last
# ones, when a process may have to wait for the other, are short.
LONGEST_FIRST = (
    *("test_sharding", "test_kernels", "test_benchmarks", "test_instruct_recipe", "test_int8_trainer"),
    "test_model_families",
    *("test_demo", "test_runs", "test_activations", "test_glue_recipe", "test_cli", "test_instruct_study"),
    *("test_docs", "test_release", "test_estimate", "test_callback", "test_planner"),
    *("test_profile", "test_instruct_gguf", "test_int8_benchmarks", "test_quantizer"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {name: number for number, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))
