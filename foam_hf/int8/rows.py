"""``Int8Rows``: how an INT8 weight is updated by stochastic rounding of its codes.

An update is usually far smaller than one code, so it changes few codes, and is right on average. With
``d = delta / scale`` and ``u`` uniform in (0, 1), ``code += floor(d + u)``. The new code is on average the old one
plus ``d``, and ``d = 0`` changes nothing.

* If a new code of a block is outside of [-127, 127], the block gets a new scale, at which its largest element has the
  code 127. All its elements, old values plus delta, are rounded to codes of this scale with the same ``u``. So no code
  is clamped or wraps around.
* If the largest new code of a block is below 64, its codes are multiplied by a power of two and its scale is divided
  by the same. This is exact, and keeps the resolution of 8 bits.

``u`` has 22 random bits (see ``uniform``), so probabilities are multiples of 2**-22, and an update of less than about
2**-23 of a code is lost. A float32 weight loses about as much: an update below half a unit in the last place, 2**-24
of the weight. That is 2**-24 of a code if the code is 1, and 2**-17 of a code if it is 127.

The rounding is unbiased but noisy: after ``t`` steps a code is off by about the root of ``t * mean(|d|)``. If
gradients change direction often, this is more than the weight has moved. Therefore each odd step uses ``1 - u`` of the
step before. If an update is the exact opposite of the one before, it then restores the old codes, and each step alone
is as unbiased as before. In 10,000 steps of a small model this removed a third of the loss that INT8 weights cost
(``recipes/benchmarks/robustness/int8_drift.py``).
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

SMALL_CODE = 63  # a block whose codes are at most this can be multiplied by two


class Int8Rows:
    """The rows of an INT8 weight, see ``foam_hf.tensors.rows.Rows``.

    ``load`` gives a change of the weight instead of its values, and ``store`` adds the change to the codes. A shard
    has whole rows, so that each block of it has its scale.
    """

    kind: ClassVar[str] = "int8"
    kernels: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("block", "adam"), "foam_hf.int8.block_kernel"),
        "block, micro-batches": "foam_hf.int8.micro_batches_kernel",
    }

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
        """The change of ``rows`` by weight decay, float32 (rows, n); zeros without decay."""
        codes = self.codes[rows.start : rows.stop]
        if not h.weight_decay:
            return torch.zeros(codes.shape, dtype=torch.float32, device=codes.device).flatten(1)
        return (codes * (self.scales[rows.start : rows.stop] * (-h.lr * h.weight_decay))).flatten(1)

    def unchanged(self, rows: range) -> Tensor:
        """A change of ``rows`` by nothing: zeros."""
        shape = len(rows), self.weight.codes.shape[-1]
        return torch.zeros(shape, dtype=torch.float32, device=self.codes.device)

    def store(self, rows: range, delta: Tensor, h: Hyper) -> None:
        """Add ``delta``, float32 (rows, n), to ``rows``."""
        codes, scales = self.codes[rows.start : rows.stop], self.scales[rows.start : rows.stop]
        first = self.place.first_row
        whole_rows = range(first + rows.start, first + rows.stop)
        u = uniform(whole_rows, delta.shape[-1], h, delta.device).view(codes.shape) if h.stochastic else 0.5
        new, new_scales = add_to_codes(codes, scales, delta.view(codes.shape), u)
        codes.copy_(new)
        scales.copy_(new_scales)

    def finish(self) -> None:
        self.weight.written()
        torch.autograd.graph.increment_version(self.weight)  # autograd does not see changes of codes and scales


def uniform(rows: range, n: int, h: Hyper, device: torch.device) -> Tensor:
    """Random float32 numbers in (0, 1) for all ``n`` columns of ``rows``: odd multiples of 2**-23, (len(rows), n).

    Two adjacent columns share a random word. The first takes 22 bits of it, the second 22 bits of the word rotated by
    16. Each number is uniform, and their leading 16 bits come from different bits of the word. An even step and the
    odd one after it share a word too, of which the odd step inverts every bit.
    """
    step, stream = h.step // 2, 4 * h.stream
    words = random_words(rows, n, seed=h.seed, step=step, stream=stream, device=device, micro=h.micro)
    if h.step % 2:
        words.bitwise_not_()
    rotated = (words << 16).bitwise_or_((words >> 16).bitwise_and_(0xFFFF))
    bits = torch.stack((words, rotated), -1).flatten(1)[:, :n]
    return bits.bitwise_and(0x7FFFFE).bitwise_or_(1).to(torch.float32).mul_(2.0**-23)


def add_to_codes(codes: Tensor, scales: Tensor, delta: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
    """Codes and scales after ``delta`` is added: float32 integers (rows, blocks, block size), and (rows, blocks, 1).

    ``delta`` is float32, in the units of the weight. ``u = 0.5`` rounds to nearest.
    """
    new = (delta / scales).add_(u).floor_().add_(codes)
    peak = new.abs().amax(-1, keepdim=True)
    outside = ~(peak <= MAX_CODE)  # NaN too
    if delta.device.type != "cpu" or bool(outside.any()):  # on a GPU the host would wait for the answer
        values = codes * scales + delta
        new_scales = block_scale(values.abs().amax(-1, keepdim=True))
        rounded = (values / new_scales).add_(u).floor_().clamp_(-MAX_CODE, MAX_CODE).nan_to_num_(0.0)
        new, scales = torch.where(outside, rounded, new), torch.where(outside, new_scales, scales)
        peak = torch.where(outside, float(MAX_CODE), peak)
    factor = (1 << (7 - torch.frexp(peak)[1])).float()  # the power of two that brings the peak into [64, 127]
    finer_scales = torch.where(peak > 0, scales / factor, MIN_SCALE)
    refine = (peak <= SMALL_CODE) & (finer_scales >= MIN_SCALE)
    return torch.where(refine, new * factor, new), torch.where(refine, finer_scales, scales)
