"""AdamW as ``torch.optim.AdamW`` computes it, for parameters that do not fold."""

from __future__ import annotations

from torch import Tensor

from foam_hf.rules.by_rows import Fraction, row_moments, subtract_update_, update_rows
from foam_hf.rules.rule import ADAMS_LARGEST_STEP, Group, Rule, StateTensor
from foam_hf.tensors.folding import Level
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper


def adam_rule(G: Tensor, m: Tensor, v: Tensor, h: Hyper) -> Fraction:
    """U = (m / c1) / (sqrt(v / c2) + eps)"""
    m.lerp_(G, 1 - h.b1)
    v.mul_(h.b2).addcmul_(G, G, value=1 - h.b2)
    return m, v.sqrt().mul_(h.c1 / h.c2**0.5).add_(h.c1 * h.eps)


def update_adam(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        m, v = moments
        subtract_update_(W, adam_rule(G, m, v, h), h)

    moments = row_moments([*state.values()], weight, 0)
    update_rows(weight, grad, moments, update_chunk, h, left_out_at=left_out_at)


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    tensor = StateTensor(p.shape, group["state_dtype"])
    return {"exp_avg": tensor, "exp_avg_sq": tensor}


ADAM = Rule(
    name="adam",
    words="second moment block",  # a group of level 0 asks for the block rule, and gets AdamW
    state=_state,
    update=update_adam,
    kernel="foam_hf.rules.block_kernel",
    largest_step=ADAMS_LARGEST_STEP,
    asked_by=("plain_state", "full"),
    takes=lambda p, group: True,
    plain=True,
    plain_words="plain AdamW",
)
