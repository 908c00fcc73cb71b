"""What kernels for wide blocks share: lanes that each read chunks of 16 bytes of a block, and sums over a block.

A tile is (chunks * lanes, columns of a chunk): with two dimensions the compiler has no choice of layout, so that a
lane is a thread, and what a lane holds of a block's chunks stays in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foam_hf.kernels.parts import add_pairs


@triton.jit
def in_chunks(x, count: tl.constexpr):
    """What each of (T,) lanes holds, for ``count`` chunks of it: (count * T, 1)."""
    return tl.reshape(tl.broadcast_to(x[None, :], (count, x.shape[0])), (count * x.shape[0], 1))


@triton.jit
def lane_sums(g, count: tl.constexpr):
    """Of each lane's elements in ``count`` chunks, and of their squares: (T,)."""
    T: tl.constexpr = g.shape[0] // count
    return tl.sum(tl.reshape(tl.sum(g, 1), (count, T)), 0), tl.sum(tl.reshape(tl.sum(g * g, 1), (count, T)), 0)


@triton.jit
def block_sums(x, y, L: tl.constexpr):
    """The sums of two (T,) over each block of ``L`` lanes, in every lane of the block."""
    R: tl.constexpr = x.shape[0] // L
    x, y = tl.reduce((tl.reshape(x, (R, L)), tl.reshape(y, (R, L))), 1, add_pairs)
    return _over_lanes(x, L), _over_lanes(y, L)


@triton.jit
def _over_lanes(x, L: tl.constexpr):
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], L)), (x.shape[0] * L,))
