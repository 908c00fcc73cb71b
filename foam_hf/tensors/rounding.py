"""Stochastic rounding of float32 to bfloat16, with random bits that depend on an element's position and step alone.

The bits come from Philox 4x32 (Salmon et al., SC 2011). Its key is ``seed``. Its counter is made of the number of the
draw in the tensor, ``row * ceil(n / 8) + column // 8`` in 64 bits, the step and the stream. One draw of 128 bits
serves eight adjacent columns, 16 bits each. A step that writes a tensor once for each of its micro-batches adds
``micro * 2**48`` to the number of the draw. The number of processes, the size of chunks and the device do not enter,
so a resumed or sharded run writes the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest that pass every test of TestU01's BigCrush, by the paper's table 2
PHILOX_A, PHILOX_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
ELEMENTS_PER_DRAW = 8
MICRO_SHIFT = 48  # more draws than any tensor has
MAX_MICROS = 1 << 15
_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter, in the low 32 bits of int64; ``counter`` broadcasts, int64 in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(PHILOX_ROUNDS):
        # An int64 product wraps, but has the bits of the unsigned product. Only the next factors need masks.
        a, b = c0 * PHILOX_A, c2 * PHILOX_B
        c0, c2 = _mix(b, c1, k0), _mix(a, c3, k1)
        c1, c3 = b, a
        k0, k1 = (k0 + PHILOX_KEY_A) & _WORD, (k1 + PHILOX_KEY_B) & _WORD
    return c0, c1, c2, c3


def _mix(product: Tensor, word: Tensor, key: int) -> Tensor:
    return ((product >> 32) ^ word).bitwise_xor_(key).bitwise_and_(_WORD)


def random_bits(
    rows: range,
    n: int,
    *,
    seed: int,
    step: int,
    stream: int,
    device: torch.device,
    columns: range | None = None,
    micro: int = 0,
) -> Tensor:
    """16 random bits, as int32 in [0, 65536), for ``columns`` (default: all ``n``) of ``rows``: (len(rows), columns).

    ``rows`` and ``columns`` are indices in the whole tensor, whose rows have ``n`` columns. Each tensor that an
    optimizer writes has a ``stream`` of its own. ``micro`` is the number of the step's micro-batch, from 0.
    """
    columns = range(n) if columns is None else columns
    words = random_words(rows, n, seed=seed, step=step, stream=stream, device=device, columns=columns, micro=micro)
    # The low half of a word serves the earlier of two columns, as all platforms of torch are little-endian.
    first = columns.start % ELEMENTS_PER_DRAW
    bits = words.view(torch.int16)[:, first : first + len(columns)]
    return bits.to(torch.int32).bitwise_and_(0xFFFF)


def random_words(
    rows: range,
    n: int,
    *,
    seed: int,
    step: int,
    stream: int,
    device: torch.device,
    columns: range | None = None,
    micro: int = 0,
) -> Tensor:
    """Random words of 32 bits, one for every two columns of ``rows``: int32 (len(rows), 4 * draws).

    A draw has four words, for eight columns. The draws returned are all that serve one of ``columns`` (default: all
    ``n``).
    """
    columns = range(n) if columns is None else columns
    draws = -(-n // ELEMENTS_PER_DRAW)
    first, last = columns.start // ELEMENTS_PER_DRAW, -(-columns.stop // ELEMENTS_PER_DRAW)
    draw = torch.arange(rows.start * draws, rows.stop * draws, device=device).view(len(rows), draws)
    draw = draw[:, first:last].flatten() + (micro << MICRO_SHIFT)
    constant = torch.zeros(1, dtype=torch.int64, device=device)
    counter = (draw & _WORD, draw >> 32, constant + step, constant + stream)
    words = torch.empty(len(rows), last - first, 4, dtype=torch.int32, device=device)
    for i, word in enumerate(philox_4x32(counter, seed)):
        words[..., i] = word.view(len(rows), last - first)
    return words.flatten(1)


def stochastic_round_(x: Tensor, bits: Tensor) -> Tensor:
    """Round ``x`` (float32, contiguous, overwritten) to values of bfloat16, at random and without bias.

    A value between two neighbours becomes the larger in magnitude with probability (distance from the smaller) /
    (distance of the two). Values that bfloat16 holds exactly, infinities and NaN do not change.

    Args:
        x: float32, contiguous.
        bits: int32 in [0, 65536), in the shape of ``x``.

    Returns:
        ``x``, still float32; a cast to bfloat16 is exact.
    """
    nan = x.isnan()
    x.view(torch.int32).add_(bits).bitwise_and_(-0x10000)
    # Adding bits to a NaN could carry into its sign or make it an infinity.
    return x.masked_fill_(nan, float("nan"))
