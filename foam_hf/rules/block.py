"""The paper's rule (Wen et al., arXiv 2512.07112): Adam whose two moments are means over blocks of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from foam_hf.rules.by_rows import Fraction, fold, in_blocks, row_moments, subtract_update_, update_rows
from foam_hf.rules.micro_batches import update_micro_block
from foam_hf.rules.rule import ADAMS_LARGEST_STEP, Group, Rule, StateTensor
from foam_hf.tensors.folding import Level, block_width, num_blocks
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper


def block_rule(G: Tensor, m: Tensor, v: Tensor, h: Hyper) -> Fraction:
    """U = ((m + rho R) / c1) / (sqrt((v + rho^2 R^2) / c2) + eps)"""
    g = fold(G)
    R = G - g
    RR = R.square()
    m.lerp_(g, 1 - h.b1)
    v.lerp_(fold(RR) + g.square(), 1 - h.b2)  # fold(G*G): R has mean zero in every block
    torch.add(v / h.c2, RR, alpha=h.rho**2 / h.c2, out=RR)
    torch.add(m / h.c1, R, alpha=h.rho / h.c1, out=R)
    return R, RR.sqrt_().add_(h.eps)


def update_block(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    width = block_width(level, weight.place.columns)

    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        for Gi, Wi, mi, vi in in_blocks(width, G, W, moments=moments):
            subtract_update_(Wi, block_rule(Gi, mi, vi, h), h)

    moments = row_moments([*state.values()], weight, level)
    update_rows(weight, grad, moments, update_chunk, h, width=width, left_out_at=left_out_at)


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    folded = StateTensor(torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1]))), group["state_dtype"])
    return {"folded_exp_avg": folded, "folded_exp_avg_sq": folded}


BLOCK = Rule(
    name="block",
    words="second moment block",
    state=_state,
    update=update_block,
    kernel="foam_hf.rules.block_kernel",
    update_micro=update_micro_block,
    micro_kernel="foam_hf.rules.micro_batches_kernel",
    largest_step=ADAMS_LARGEST_STEP,
    squares=lambda p, level: ("folded_exp_avg_sq", block_width(level, p.shape[-1])),
    takes=lambda p, group: p.dim() > 1 and group["level"] != 0,  # with blocks of one column it is AdamW
)
