"""Dequantization of INT8 weights as a Triton kernel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foam_hf.kernels.calls import DIRECT_LAUNCH
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


_compiled: dict[Any, Any] = {}


def dequantize_into(out: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """``out`` (of any dtype a weight has) becomes ``codes * scales``; all are contiguous.

    False, and nothing is done, if no kernel takes blocks of this size.
    """
    numel = codes.numel()
    block = numel // scales.numel()
    if not fits_kernels(block):
        return False
    columns = max(DEQUANTIZED, block)
    grid = -(-numel // (2 * columns)), 1, 1
    device = codes.device
    constants = block, columns, TRITON_DTYPES[out.dtype], takes_ptx(device)
    # As in KernelCall: what Triton compiled is called directly wherever it would find the same again.
    places = codes.data_ptr(), scales.data_ptr(), out.data_ptr()
    whole = numel % 16 == 0 and numel < 2**31 and (places[0] | places[1] | places[2]) % 16 == 0
    key = device, *constants
    with device_of(device):
        if whole and key in _compiled:
            _compiled[key][grid](*places, numel, *constants)  # addresses: for tensors it would ask the driver
            return True
        compiled = _dequantize_kernel[grid](codes, scales, out, numel, *constants, num_warps=8)
    if DIRECT_LAUNCH and whole and compiled is not None:  # None from Triton's interpreter
        _compiled[key] = compiled
    return True


def fits_kernels(block_size: int) -> bool:
    """Whether the kernels take blocks of this many columns."""
    return block_size & (block_size - 1) == 0 and block_size <= MAX_COLUMNS
