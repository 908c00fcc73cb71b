"""Quantizing a tensor to INT8 codes and scales, and dequantizing it.

``codes`` are int8 (..., n). ``scales`` are float32 (..., n / block size), one for each block of adjacent columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from foam_hf.kernels.choice import use_kernels

BLOCK_SIZE = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a weight may have outside
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


def check_parts(codes: Any, scales: Any, dtype: Any) -> None:
    """Raise what ``Int8Weight`` says for codes, scales and an outer dtype that do not make a weight."""
    if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or dtype not in DTYPES:
        raise TypeError(
            f"an INT8 weight of codes {getattr(codes, 'dtype', type(codes).__name__)} and dtype {dtype}; expected "
            f"torch.int8, and one of {', '.join(map(str, DTYPES))}"
        )
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32:
        raise TypeError(
            f"scales of an INT8 weight are {getattr(scales, 'dtype', type(scales).__name__)}; expected torch.float32"
        )
    fits = (
        codes.dim() > 0
        and codes.shape[:-1] == scales.shape[:-1]
        and (codes.shape[-1] % scales.shape[-1] == 0 if scales.shape[-1] else codes.shape[-1] == 0)
        and codes.device == scales.device
        and codes.is_contiguous()
        and scales.is_contiguous()
    )
    if not fits:
        raise ValueError(
            f"codes {tuple(codes.shape)} on {codes.device} and scales {tuple(scales.shape)} on {scales.device} do not "
            "make an INT8 weight; expected (..., n) and (..., n / block size), contiguous, on one device"
        )


def check_width(weight: Tensor, block_size: int) -> None:
    """Raise what ``Int8Weight.from_float`` says if ``weight`` cannot be quantized in blocks of ``block_size``."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"cannot quantize {weight.dtype} to INT8; expected one of {', '.join(map(str, DTYPES))}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size is out of range: got {block_size!r}; expected a positive integer")
    if weight.dim() == 0 or weight.shape[-1] % block_size:
        width = weight.shape[-1] if weight.dim() else None
        raise ValueError(
            f"blocks of {block_size} columns do not divide a weight of shape {tuple(weight.shape)}, width {width}; "
            "expected a block_size that divides the width, or this weight left as it is"
        )
