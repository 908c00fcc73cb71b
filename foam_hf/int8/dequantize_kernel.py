"""Dequantization of INT8 weights as a Triton kernel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import DIRECT_LAUNCH, index_for_run, launch
from foam_hf.kernels.parts import store
from foam_hf.kernels.tables import MAX_COLUMNS, TRITON_DTYPES, device_of, takes_ptx

DEQUANTIZED = 2048  # elements of half a program, eight for each of its threads


@triton.jit
def _dequantize_kernel(
    codes, scales, out, numel, B: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr
):
    # Two stretches: a thread reads eight codes of each, as many as it can write at a time, and both before it writes.
    first = tl.program_id(0).to(tl.int64) * (2 * C)
    q, s = codes_and_scales(codes, scales, first, numel, B, C)
    next_q, next_s = codes_and_scales(codes, scales, first + C, numel, B, C)
    store_values(out, first, numel, q, s, B, C, DTYPE, NVIDIA)
    store_values(out, first + C, numel, next_q, next_s, B, C, DTYPE, NVIDIA)


@triton.jit
def codes_and_scales(codes, scales, start, numel, B: tl.constexpr, C: tl.constexpr):
    at, block = start + tl.arange(0, C), start // B + tl.arange(0, C // B)
    return tl.load(codes + at, mask=at < numel, other=0), tl.load(scales + block, mask=block * B < numel, other=0.0)


@triton.jit
def store_values(out, start, numel, q, s, B: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    at = start + tl.arange(0, C)
    x = q.to(tl.float32) * tl.reshape(tl.broadcast_to(s[:, None], (C // B, B)), (C,))
    if NVIDIA:
        tl.store(out + at, x.to(DTYPE), mask=at < numel)
    else:
        store(out + at, x, 0, at < numel, DTYPE, False)


# What a kernel is compiled for, and the sizes of its launch -> what ``launch`` takes, but for addresses.
_launches: dict[tuple[Any, ...], tuple[Any, int, int | None, tuple[Any, ...]]] = {}


def dequantize_into(out: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """``out`` (of any dtype a weight has) becomes ``codes * scales``; all are contiguous.

    False, and nothing is done, if no kernel takes blocks of this size.
    """
    device, numel = codes.device, codes.numel()
    key = device, out.dtype, numel, scales.numel()
    places = codes.data_ptr(), scales.data_ptr(), out.data_ptr()
    aligned = (places[0] | places[1] | places[2]) % 16 == 0
    known = _launches.get(key) if aligned else None
    with device_of(device):
        if known is not None:  # addresses: for tensors it would ask the driver
            compiled, programs, index, constants = known
            launch(compiled, programs, index, (*places, *constants))
            return True
        block = numel // scales.numel()
        if not fits_kernels(block):
            return False
        columns = max(DEQUANTIZED, block)
        programs = -(-numel // (2 * columns))
        constants = numel, block, columns, TRITON_DTYPES[out.dtype], takes_ptx(device)
        compiled = _dequantize_kernel[programs, 1, 1](codes, scales, out, *constants, num_warps=8)
        # As in KernelCall: what Triton compiled is called directly wherever it would find the same again.
        if DIRECT_LAUNCH and aligned and compiled is not None:  # None from Triton's interpreter
            _launches[key] = compiled, programs, index_for_run(device), constants
    return True


def fits_kernels(block_size: int) -> bool:
    """Whether the kernels take blocks of this many columns."""
    return block_size & (block_size - 1) == 0 and block_size <= MAX_COLUMNS
