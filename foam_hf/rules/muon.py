"""FOAM with Muon: Muon's orthogonalisation of the folded momentum plus the residual.

``W`` is a matrix (rows, n); leading dimensions count separate matrices. ``mu`` is the momentum, ``rho`` the residual's
scale, and other symbols are as in ``by_rows``:

    g  = fold(G),  R = G - unfold(g)
    m <- mu m + (1 - mu) g                                  folded momentum, the only state
    B  = unfold((1 - mu) g + mu m) + rho R                  Nesterov's look-ahead of the folded gradient
    W <- W (1 - lr weight_decay) - lr scale 0.2 sqrt(max(rows, n)) orthogonal(B)      at most 16 lr scale an element

``orthogonal`` makes the singular values of ``B`` nearly 1, see ``rules.orthogonal``: closer to 1 than the five
iterations of torch.optim.Muon do, and faster. The factor is that of torch.optim.Muon with
``adjust_lr_fn="match_rms_adamw"``, which gives a step the root mean square of an AdamW step. Momentum (``lerp``,
without bias correction), Nesterov, decay and the smallest norm of 1e-7 are those of torch.optim.Muon, so ``level=0,
scale=1`` is torch.optim.Muon except for ``orthogonal`` and the limit. No matrix of fewer than 3,787 rows and columns
reaches the limit, and in a larger one only an element that is nearly alone in its row and column.

``orthogonal`` ignores the length of ``B``, so only the ratio of momentum and residual counts. That ratio is our
choice, after the paper's rule for Adam (arXiv 2512.07112): a running mean plus the residual of one step. The paper's
own combination with Muon may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foam_hf.rules.by_rows import fold
from foam_hf.rules.orthogonal import LARGEST_VALUE, orthogonalized
from foam_hf.rules.rule import LARGEST_STEP, Group, OnWhole, Part, Rule, StateTensor
from foam_hf.tensors.finite import undo_if
from foam_hf.tensors.folding import Level, block_width, blocked, num_blocks, split_moment
from foam_hf.tensors.rows import Rows, as_rows, chunks, load, store, weight_rows
from foam_hf.tensors.step import Hyper

BATCH_ELEMENTS = 1 << 22  # of the matrices of one shape that kernels update at a time; a larger matrix is alone


def step_factor(rows: int, n: int) -> float:
    """What an orthogonal matrix is multiplied by, so that its step has the root mean square of an AdamW step."""
    return 0.2 * math.sqrt(max(rows, n))


def matrices_at_a_time(rows: int, n: int) -> int:
    """How many matrices of one shape kernels update at a time."""
    return max(1, BATCH_ELEMENTS // (rows * n)) if rows * n else 1


def cost(rows: int, n: int) -> int:
    """What the orthogonalisation of a matrix costs: multiplications, but for a factor.

    Eight symmetric products have the shorter side alone; two symmetric and two whole ones have both. A symmetric one
    takes two thirds of the time.
    """
    short, long = sorted((rows, n))
    return short * short * (16 * short + 10 * long)


def element_limit(factor: float) -> float:
    """The largest element of a matrix that counts, where it is multiplied by ``factor``."""
    # No element of a smaller matrix can reach the limit.
    return LARGEST_STEP / factor if factor > LARGEST_STEP / LARGEST_VALUE else math.inf


def muon_rule(G: Tensor, m: Tensor, B: Tensor, h: Hyper) -> None:
    """Update ``m`` by ``G`` and write the matrix to orthogonalise into ``B``; all are in blocks, as in ``by_rows``."""
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    torch.sub(G, g, out=B).mul_(h.rho).add_(g.lerp(m, h.b1))


def update_muon(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    """Update a weight of two or more dimensions, one matrix at a time; ``h.b1`` is the momentum."""
    if grad.numel() == 0:
        return
    rows, n = grad.shape[-2:]
    gradient, momentum = as_rows(grad, n), as_rows(state["folded_momentum"], num_blocks(level, n))
    for first in range(0, len(weight), rows):
        last = first + rows
        direction = _direction(gradient[first:last], momentum[first:last], level, h, first)
        _subtract(weight, first, direction, h, rows)
    weight.finish()


def _direction(gradient: Tensor, momentum: Tensor, level: Level, h: Hyper, first_row: int) -> Tensor:
    """The direction of the step of a matrix that begins at ``first_row`` of its tensor. Its momentum is updated."""
    rows, n = gradient.shape
    width = block_width(level, n)
    direction = torch.empty(rows, n, dtype=torch.float32, device=gradient.device)
    for chunk in chunks(rows, n, gradient.device):
        G, m = load(gradient, chunk), load(momentum, chunk)
        B = direction[chunk.start : chunk.stop]
        for Gi, mi, Bi in zip(blocked(G, width), split_moment(m, width, n), blocked(B, width), strict=True):
            muon_rule(Gi, mi, Bi, h)
        store(momentum, chunk, m, h, substream=1, first_row=first_row)
    direction = orthogonalized(direction)
    limit = element_limit(step_factor(rows, n))
    return direction.clamp_(-limit, limit) if limit < math.inf else direction


def _subtract(weight: Rows, first: int, direction: Tensor, h: Hyper, rows: int) -> None:
    """Update the rows of ``weight`` from ``first`` on by their ``direction``; their matrix has ``rows`` rows."""
    n = direction.shape[-1]
    step = h.lr * step_factor(rows, n) * h.scale
    for chunk in chunks(len(direction), n, direction.device):
        mine = range(first + chunk.start, first + chunk.stop)
        W = weight.load(mine, h)
        W.add_(direction[chunk.start : chunk.stop], alpha=-step)
        weight.store(mine, W, h)


class TorchHalves:
    """``rule.Halves`` in torch operations, one matrix at a time, for every device and kind of weight."""

    scaled = False

    def __init__(self, parts: Sequence[Part], own: slice, level: Level) -> None:
        self._parts, self._own, self._level = parts, parts[own], level
        self.dtype = torch.float32 if parts[0].moment.device.type == "cpu" else torch.float16  # of ``orthogonalized``

    def find(
        self, G: Tensor, M: Tensor, h: Hyper, grad_scale: Tensor | None, left_out: Tensor | None
    ) -> tuple[Tensor, None]:
        found = torch.empty(G.shape, dtype=self.dtype, device=G.device)
        for i, part in enumerate(self._own):
            grad = G[i]
            if grad_scale is not None:
                grad = grad.float() / (grad_scale if grad_scale.numel() == 1 else grad_scale[i])
            h = h._replace(stream=part.stream)
            found[i] = _direction(grad, M[i], self._level, h, part.whole.first_row)
        return found, None

    def subtract(
        self, X: Tensor, M: Sequence[Tensor], scales: Tensor | None, h: Hyper, left_out: Tensor | None
    ) -> None:
        for i, part in enumerate(self._parts):
            weight = weight_rows(part.weight, part.place)
            bad = torch.zeros((), dtype=torch.bool) if left_out is None else left_out[i]
            with undo_if(bad, [*weight.tensors, part.moment]) as wanted:
                if wanted:
                    part.moment.copy_(M[i])
                    _subtract(weight, 0, X[i], h._replace(stream=part.stream), part.place.rows)
                    weight.finish()


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    folded = torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1])))
    return {"folded_momentum": StateTensor(folded, group["state_dtype"])}


def _temporary_bytes(p: Tensor, level: Level) -> int:
    rows, n = p.shape[-2:]
    # Two buffers of the batch's matrices and four square ones of their shorter side, all of them float16.
    return matrices_at_a_time(rows, n) * (4 * rows * n + 8 * min(rows, n) ** 2)


MUON = Rule(
    name="muon",
    words="orthogonalised by Muon",
    state=_state,
    update=update_muon,
    kernel="foam_hf.rules.muon_kernel",
    unit="tensor",
    shards="rows, gathered",
    on_whole=OnWhole(matrices_at_a_time, cost, TorchHalves, "foam_hf.rules.muon_halves_kernel"),
    betas=lambda group: (group["momentum"], group["betas"][1]),
    table_fields={"second_moment": "factored", "scale": 1.0},  # a table of vectors is no matrix to orthogonalise
    temporary=_temporary_bytes,
)
