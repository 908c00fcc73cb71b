"""Which devices the fused kernels serve; on all others, the same updates run in torch operations."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

KERNEL_VARIABLE = "FOAM_HF_KERNEL"


def use_kernels(device: torch.device) -> bool:
    """Whether parameters on ``device`` are updated by the fused kernels; ``FOAM_HF_KERNEL`` decides otherwise.

    ``auto`` (the default): on NVIDIA, AMD and Intel GPUs where Triton is installed. ``reference``: nowhere.
    ``triton``: everywhere, also on a CPU under Triton's interpreter.

    Raises:
        ValueError: the variable has another value.
    """
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"{KERNEL_VARIABLE} is not valid: got {choice!r}; expected 'auto', 'reference' or 'triton'")
    return choice == "triton" or (choice == "auto" and device.type in ("cuda", "xpu") and _triton_installed())


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
