"""AdamW with moments of 8 bits, for parameters that do not fold: ``plain_state="8bit"``.

bitsandbytes quantizes the moments. Each block of 256 adjacent elements has a float32 scale, the largest magnitude in
the block. Each element is one of bitsandbytes' 256 dynamic values, which are dense near zero. The update is AdamW's,
from the new moments before they are quantized.

The square root of the second moment is stored, not the second moment itself. Rows of an embedding share blocks, and
moments of rare tokens are smaller than the others by orders of magnitude. A value below 2e-7 of the largest in its
block cannot be represented, and roots differ less than squares do. A root that is not zero is never quantized to zero,
so that no step divides by epsilon alone.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
from torch import Tensor

from foam_hf.rules.adam import adam_rule
from foam_hf.rules.by_rows import limit_numerator_, subtract_update_, update_rows
from foam_hf.rules.rule import Group, Rule, StateTensor
from foam_hf.tensors.folding import Level
from foam_hf.tensors.rows import CHUNK_GPU, Rows
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


def update_8bit(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        m, root = moments
        _, denominator = fraction = adam_rule(G, m, root.square_(), h)
        # Rounding can hold a first moment at one code while the root beside it goes on to shrink, so their quotient
        # needs a limit.
        limit_numerator_(m, denominator - h.c1 * h.eps)
        subtract_update_(W, fraction, h)
        root.sqrt_()

    moments = [QuantizedMoment(state[f"{name}_8bit"], state[f"{name}_absmax"], name == "exp_avg") for name in MOMENTS]
    multiple = BLOCK // math.gcd(grad.shape[-1], BLOCK)  # so that a chunk begins where a quantization block does
    update_rows(weight, grad, moments, update_chunk, h, multiple=multiple)


class QuantizedMoment:
    """A moment stored as codes and scales. Rows load as float32, and are quantized again when they are stored."""

    def __init__(self, codes: Tensor, absmax: Tensor, signed: bool) -> None:
        self.n = codes.shape[-1]
        self.codes, self.absmax, self.signed = codes.view(-1), absmax, signed
        self.values, self.midpoints = _dynamic_map(signed, codes.device)

    def load(self, rows: range) -> Tensor:
        """``rows`` as float32 (rows, n); the first of them must begin a quantization block."""
        from bitsandbytes.functional import dequantize_blockwise

        elements, blocks = _spans(rows, self.n)
        values = dequantize_blockwise(
            self.codes[elements], absmax=self.absmax[blocks], code=self.values, blocksize=BLOCK
        )
        return values.view(len(rows), self.n)

    def store(self, rows: range, x: Tensor, h: Hyper) -> None:
        elements, blocks = _spans(rows, self.n)
        codes, absmax = self._quantize(x.reshape(-1))
        if not self.signed:
            codes.masked_fill_((codes == 0) & (x.reshape(-1) > 0), 1)
        self.codes[elements], self.absmax[blocks] = codes, absmax

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type != "cpu":
            from bitsandbytes.functional import quantize_blockwise

            codes, held = quantize_blockwise(x, code=self.values, blocksize=BLOCK)
            return codes, held.absmax
        # On a CPU, bitsandbytes 0.50 gives zeros the code of 2e-5. Here they get the nearest code, as on a GPU.
        blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(-1)
        scaled = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
        codes = torch.bucketize(scaled, self.midpoints, out_int32=True)
        return codes.view(-1)[: x.numel()].to(torch.uint8), absmax


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """bitsandbytes' 256 values in ascending order, and the midpoints between neighbours."""
    from bitsandbytes.functional import create_dynamic_map

    values = create_dynamic_map(signed=signed)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def _spans(rows: range, n: int) -> tuple[slice, slice]:
    """The elements of ``rows``, and the quantization blocks that hold them."""
    start, stop = rows.start * n, rows.stop * n
    return slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    """For each moment, codes in the shape of the parameter and one scale for each quantization block."""
    state = {}
    for name in MOMENTS:
        state[f"{name}_8bit"] = StateTensor(p.shape, torch.uint8)
        state[f"{name}_absmax"] = StateTensor(torch.Size((-(-p.numel() // BLOCK),)), torch.float32)
    return state


ADAM_8BIT = Rule(
    name="8bit",
    words="second moment 8bit",
    plain_words="AdamW with moments of 8 bits",
    state=_state,
    update=update_8bit,
    unit="tensor",
    shards="nothing",
    asked_by=("plain_state", "8bit"),
    takes=lambda p, group: p.numel() >= SMALLEST,
    plain=True,
    require=require_bitsandbytes,
    temporary=lambda p, level: min(p.numel(), CHUNK_GPU) * (34 if p.element_size() < 4 else 25),
)
