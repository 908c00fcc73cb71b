"""AdamW for what does not fold, with moments of 8 bits: ``plain_state="8bit"``.

A moment is quantized by bitsandbytes: each block of 256 adjacent elements has a float32 scale, the largest magnitude
in it, and an element is one of bitsandbytes' 256 dynamic values, which are dense near zero. The update is AdamW's, of
the new moments before they are quantized; weights round as everywhere in FOAM.

Of the second moment the root is kept. Rows of an embedding share blocks, and moments of tokens that are rare are
smaller by orders of magnitude: squares would drown at 2e-7 of the largest, roots at 2e-7 of its root. A root that is
not zero is never quantized to zero, so no step divides by epsilon alone.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from foam_hf.rules.by_rows import adam_rule, bounded_, step_
from foam_hf.tensors.folding import Level
from foam_hf.tensors.rows import as_rows, chunks, load, weight_rows
from foam_hf.tensors.step import Hyper

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # elements of the smallest tensor that is quantized, as in bitsandbytes
MOMENTS = ("exp_avg", "root_exp_avg_sq")


def require_bitsandbytes() -> None:
    """Raise ImportError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "plain_state='8bit' quantizes by bitsandbytes, which is not installed; expected "
            "`pip install bitsandbytes`, or plain_state='full'"
        )


def eight_bit_spec(p: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of the state of ``p``: codes as the parameter, and a scale for each block."""
    spec = {}
    for name in MOMENTS:
        spec[f"{name}_8bit"] = p.shape, torch.uint8
        spec[f"{name}_absmax"] = torch.Size((-(-p.numel() // BLOCK),)), torch.float32
    return spec


def update_8bit(p: Tensor, grad: Tensor, state: MutableMapping[str, Any], level: Level, h: Hyper) -> None:
    """Advance one parameter and its state by one step, in bounded chunks; arguments as for ``update_parameter``."""
    n = p.shape[-1]
    weight = weight_rows(p)
    gradient = as_rows(grad, n)
    first, root = (Quantized(state[f"{name}_8bit"], state[f"{name}_absmax"], name == "exp_avg") for name in MOMENTS)
    for rows in _block_chunks(len(weight), n, p.device):
        W, G = weight.load(rows, h), load(gradient, rows)
        m, v = first.load(rows, n), root.load(rows, n).square_()
        _, denominator = fraction = adam_rule(G, m, v, h)
        # A first moment that shrinks stays at a code whose neighbour is further away than it shrinks in a step, while
        # the scale of its root goes on to shrink.
        bounded_(m, denominator - h.c1 * h.eps)
        step_(W, fraction, h)
        weight.store(rows, W, h)
        first.store(rows, m)
        root.store(rows, v.sqrt_())
    weight.finish()


class Quantized:
    """A moment as codes and scales, of which whole blocks load as float32 and are stored."""

    def __init__(self, codes: Tensor, absmax: Tensor, signed: bool) -> None:
        self.codes, self.absmax, self.signed = codes.view(-1), absmax, signed
        self.values, self.borders = _dynamic_map(signed, codes.device)

    def load(self, rows: range, n: int) -> Tensor:
        """``rows``, the first of which begins a block, as float32 (rows, n)."""
        from bitsandbytes.functional import dequantize_blockwise

        elements, blocks = _places(rows, n)
        values = dequantize_blockwise(
            self.codes[elements], absmax=self.absmax[blocks], code=self.values, blocksize=BLOCK
        )
        return values.view(len(rows), n)

    def store(self, rows: range, x: Tensor) -> None:
        elements, blocks = _places(rows, x.shape[-1])
        codes, absmax = self._quantized(x.reshape(-1))
        if not self.signed:
            codes.masked_fill_((codes == 0) & (x.reshape(-1) > 0), 1)
        self.codes[elements], self.absmax[blocks] = codes, absmax

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type != "cpu":
            from bitsandbytes.functional import quantize_blockwise

            codes, held = quantize_blockwise(x, code=self.values, blocksize=BLOCK)
            return codes, held.absmax
        # On a CPU, bitsandbytes (0.50) gives zeros the code of 2e-5; here, too, it is the nearest.
        blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(-1)
        scaled = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
        codes = torch.bucketize(scaled, self.borders, out_int32=True)
        return codes.view(-1)[: x.numel()].to(torch.uint8), absmax


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """bitsandbytes' values in ascending order, and the middles between them."""
    from bitsandbytes.functional import create_dynamic_map

    values = create_dynamic_map(signed=signed)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def _places(rows: range, n: int) -> tuple[slice, slice]:
    start, stop = rows.start * n, rows.stop * n
    return slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def _block_chunks(rows: int, n: int, device: torch.device) -> Iterator[range]:
    """Chunks of rows that begin where a block does."""
    together = BLOCK // math.gcd(n, BLOCK)  # rows
    for chunk in chunks(-(-rows // together), n * together, device):
        yield range(chunk.start * together, min(chunk.stop * together, rows))
