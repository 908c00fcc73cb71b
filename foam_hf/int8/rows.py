"""How an INT8 weight takes an update: in code space, where a step far below one code is kept on average.

With ``d = delta / scale`` and ``u`` uniform in (0, 1), ``code += floor(d + u)``: the new code is on average the old
one plus ``d``, and without an update nothing changes.

* A block whose new codes leave [-127, 127] gets a new scale, which gives its largest element the code 127, and its
  elements, old values plus delta, are rounded to the new codes with the same ``u``: no code is clamped or wraps.
* A block whose largest new code is below 64 has its codes multiplied by a power of two, and its scale divided: that
  is exact, so keeping the resolution never costs a rounding.

``u`` has 22 random bits (see ``uniform``): probabilities are multiples of 2**-22, and an update of less than about
2**-23 of a code is lost. That is no worse than float32: it loses, at half a unit in the last place, what is under
2**-24 of the weight, which is 2**-24 of a code where the code is 1 and 2**-17 where it is 127.

Rounding is unbiased but noisy: after ``t`` steps a code is off by about the root of ``t * mean(|d|)``, and gradients
that point here and there make that more than what they move. So each odd step takes ``1 - u`` of the step before: a
step back then undoes a step to the last code, and any other is as unbiased as before. In 10,000 steps of a small
model this took a third off what INT8 weights cost (``recipes/benchmarks/robustness/int8_drift.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foam_hf.int8.codes import MAX_CODE, MIN_SCALE, block_scale
from foam_hf.tensors.places import Place
from foam_hf.tensors.rounding import random_words
from foam_hf.tensors.step import Hyper

if TYPE_CHECKING:
    from foam_hf.int8.weight import Int8Weight

SMALL_CODE = 63  # largest code of a block that has room for one more bit


class Int8Rows:
    """An INT8 weight as the rules see it, a kind of ``foam_hf.tensors.rows.Rows``: rows load as a change, and take it.

    It is whole: sharding is refused.
    """

    kind: ClassVar[str] = "int8"
    kernels: ClassVar[Mapping[str, str]] = dict.fromkeys(("block", "adam"), "foam_hf.int8.block_kernel")

    def __init__(self, weight: Int8Weight, place: Place) -> None:
        self.weight, self.place, self.block_size = weight, place, weight.block_size
        n, blocks = weight.codes.shape[-1], weight.scales.shape[-1]
        self.codes = weight.codes.view(-1, n).unflatten(1, (blocks, self.block_size))
        self.scales = weight.scales.view(-1, blocks, 1)

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight.codes, self.weight.scales

    def load(self, rows: range, h: Hyper) -> Tensor:
        """What weight decay alone changes in ``rows``, float32 (rows, n)."""
        codes = self.codes[rows.start : rows.stop]
        if not h.weight_decay:
            return torch.zeros(codes.shape, dtype=torch.float32, device=codes.device).flatten(1)
        return (codes * (self.scales[rows.start : rows.stop] * (-h.lr * h.weight_decay))).flatten(1)

    def unchanged(self, rows: range) -> Tensor:
        """What to store where nothing is to change."""
        shape = len(rows), self.weight.codes.shape[-1]
        return torch.zeros(shape, dtype=torch.float32, device=self.codes.device)

    def store(self, rows: range, delta: Tensor, h: Hyper) -> None:
        """Add ``delta``, float32 (rows, n)."""
        codes, scales = self.codes[rows.start : rows.stop], self.scales[rows.start : rows.stop]
        u = uniform(rows, delta.shape[-1], h, delta.device).view(codes.shape) if h.stochastic else 0.5
        new, new_scales = add_to_codes(codes, scales, delta.view(codes.shape), u)
        codes.copy_(new)
        scales.copy_(new_scales)

    def finish(self) -> None:
        torch.autograd.graph.increment_version(self.weight)  # autograd sees the outer tensor alone


def uniform(rows: range, n: int, h: Hyper, device: torch.device) -> Tensor:
    """Float32 numbers in (0, 1), odd multiples of 2**-23, for the columns ``0..n`` of ``rows``: shape (len(rows), n).

    Two columns share a random word: 22 of its bits are the number of the earlier, and 22 of the word turned by 16 bits
    that of the later. Each is uniform by itself, and the leading 16 bits of the two are bits of their own. Two steps
    share them too, the odd one with every bit inverted.
    """
    words = random_words(rows, n, seed=h.seed, step=h.step // 2, stream=4 * h.stream, device=device)
    if h.step % 2:
        words.bitwise_not_()
    turned = (words << 16).bitwise_or_((words >> 16).bitwise_and_(0xFFFF))
    bits = torch.stack((words, turned), -1).flatten(1)[:, :n]
    return bits.bitwise_and(0x7FFFFE).bitwise_or_(1).to(torch.float32).mul_(2.0**-23)


def add_to_codes(codes: Tensor, scales: Tensor, delta: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
    """New codes (rows, blocks, block size), as float32 integers, and scales (rows, blocks, 1).

    ``delta`` is float32, in the units of the weight; ``u = 0.5`` rounds to nearest.
    """
    new = (delta / scales).add_(u).floor_().add_(codes)
    peak = new.abs().amax(-1, keepdim=True)
    outside = ~(peak <= MAX_CODE)  # NaN too
    if delta.device.type != "cpu" or bool(outside.any()):  # elsewhere, asking would wait for the device
        values = codes * scales + delta
        fresh = block_scale(values.abs().amax(-1, keepdim=True))
        rounded = (values / fresh).add_(u).floor_().clamp_(-MAX_CODE, MAX_CODE).nan_to_num_(0.0)
        new, scales = torch.where(outside, rounded, new), torch.where(outside, fresh, scales)
        peak = torch.where(outside, float(MAX_CODE), peak)
    factor = (1 << (7 - torch.frexp(peak)[1])).float()  # the power of two that brings the peak into [64, 127]
    finer = torch.where(peak > 0, scales / factor, MIN_SCALE)
    room = (peak <= SMALL_CODE) & (finer >= MIN_SCALE)
    return torch.where(room, new * factor, new), torch.where(room, finer, scales)
