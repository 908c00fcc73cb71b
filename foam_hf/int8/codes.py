"""Quantizing a tensor to INT8 codes and scales, and dequantizing it.

``codes`` are int8 (..., n). ``scales`` are float32 (..., n / block size), one for each block of adjacent columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels

BLOCK_SIZE = 128
MAX_CODE = 127
# The scale of a block of zeros. It is so small that the first update leaves the range of codes, and gives the block a
# new scale.
MIN_SCALE = 2.0**-100
# Elements that are held as float32 at a time: so few that they fit a core's cache, or that temporaries on a GPU stay
# small.
CHUNK_CPU, CHUNK_GPU = 1 << 17, 1 << 24


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scales``, computed in float32 and rounded to ``dtype`` (to nearest)."""
    if torch.compiler.is_compiling():  # the compiler fuses these operations into one kernel
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2).to(dtype)
    result = torch.empty_like(codes, dtype=dtype)
    if codes.numel() and use_kernels(codes.device) and _kernels().dequantize_into(result, codes, scales):
        return result
    for chunk_codes, chunk_scales, chunk_result in row_chunks(codes, scales, result):
        torch.mul(chunk_codes, chunk_scales, out=chunk_result)
    return result


@functools.cache
def _kernels() -> ModuleType:
    from foam_hf.int8 import dequantize_kernel  # imported here because Triton may be missing

    return dequantize_kernel


def quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (..., n) and scales (..., n / block_size) of ``x`` (..., n), rounded to nearest. Both are float32."""
    blocks = x.float().unflatten(-1, (-1, block_size))
    scales = block_scale(blocks.abs().amax(-1, keepdim=True))
    codes = (blocks / scales).round_().clamp_(-MAX_CODE, MAX_CODE).nan_to_num_(0.0)
    return codes.flatten(-2), scales.squeeze(-1)


def block_scale(absmax: Tensor) -> Tensor:
    """The scale at which an element of magnitude ``absmax`` has the largest code. It is NaN or infinite if that is."""
    return (absmax / MAX_CODE).clamp_min_(MIN_SCALE)


def row_chunks(codes: Tensor, scales: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a bounded number of rows at a time, in blocks.

    ``codes`` and ``others``, which may be copied, come as (rows, blocks, block size), ``scales`` as (rows, blocks, 1).
    """
    if codes.numel() == 0:
        return
    n, blocks = codes.shape[-1], scales.shape[-1]
    flat, flat_scales = codes.view(-1, blocks, n // blocks), scales.view(-1, blocks, 1)
    flat_others = [x.reshape(-1, blocks, n // blocks) for x in others]
    rows = max(1, (CHUNK_CPU if codes.device.type == "cpu" else CHUNK_GPU) // n)
    for i in range(0, flat.shape[0], rows):
        yield (flat[i : i + rows], flat_scales[i : i + rows], *(x[i : i + rows] for x in flat_others))
