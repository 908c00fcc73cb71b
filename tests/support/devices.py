"""Where workers run: over gloo on CPUs, or over NCCL with a GPU a process if FOAM_HF_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

DEVICE = os.environ.get("FOAM_HF_TEST_DEVICE", "cpu")
BACKEND = {"cpu": "gloo", "cuda": "nccl"}[DEVICE]
# Of a collective: on GPUs, which are lent for minutes, a process that fails must not leave the others waiting.
TIMEOUT = timedelta(minutes=30 if DEVICE == "cpu" else 1.5)


def kernel(name: str) -> str:
    """The value of FOAM_HF_KERNEL of a case; on a GPU the kernels, as there they are what runs."""
    return name if DEVICE == "cpu" else "auto"


def placed(x: Any) -> Any:
    """A tensor or a module on this process's device."""
    return x.to(DEVICE) if DEVICE == "cuda" else x


def choose_gpu() -> None:
    """This process's GPU, and arithmetic that gives the same bits in every run."""
    if DEVICE == "cpu":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Only this kind of attention has a backward pass that adds up in one order.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def start_group() -> None:
    """Join the process group of a launcher."""
    choose_gpu()
    dist.init_process_group(BACKEND, timeout=TIMEOUT)
