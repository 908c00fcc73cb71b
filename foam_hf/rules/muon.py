"""FOAM with Muon: Muon's orthogonalisation of the folded momentum plus the residual.

``W`` is a matrix (rows, n); leading dimensions count separate matrices. ``mu`` is the momentum, ``rho`` the residual's
scale, and other symbols are as in ``by_rows``:

    g  = fold(G),  R = G - unfold(g)
    m <- mu m + (1 - mu) g                                  folded momentum, the only state
    B  = unfold((1 - mu) g + mu m) + rho R                  Nesterov's look-ahead of the folded gradient
    W <- W (1 - lr weight_decay) - lr scale 0.2 sqrt(max(rows, n)) orthogonal(B)      at most 16 lr scale an element

``orthogonal`` is Muon's Newton-Schulz iteration in bfloat16. The factor is that of torch.optim.Muon with
``adjust_lr_fn="match_rms_adamw"``, which gives a step the root mean square of an AdamW step. Momentum (``lerp``,
without bias correction), Nesterov, decay, coefficients, 5 iterations and the smallest norm of 1e-7 are those of
torch.optim.Muon, so ``level=0, scale=1`` is torch.optim.Muon except for the limit. No matrix of fewer than 3,787 rows
and columns reaches the limit, and in a larger one only an element that is nearly alone in its row and column.

``orthogonal`` ignores the length of ``B``, so only the ratio of momentum and residual counts. That ratio is our
choice, after the paper's rule for Adam (arXiv 2512.07112): a running mean plus the residual of one step. The paper's
own combination with Muon may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foam_hf.rules.by_rows import fold
from foam_hf.rules.rule import LARGEST_STEP, Group, Rule, StateTensor
from foam_hf.tensors.folding import Level, block_width, blocked, num_blocks, split_moment
from foam_hf.tensors.rows import CHUNK_GPU, Rows, as_rows, chunks, load, store
from foam_hf.tensors.step import Hyper

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from Keller Jordan's Muon
ITERATIONS, SMALLEST_NORM = 5, 1e-7
LARGEST_VALUE = 1.3  # no singular value after five iterations is larger, and so no element is


def newton_schulz(B: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """``B`` with its singular values replaced by numbers near 1, in bfloat16, as torch.optim.Muon computes it.

    This is for torch before 2.9, which has no Muon. As in torch, a ``B`` of bfloat16 is overwritten.
    """
    a, b, c = coefficients
    tall = B.shape[0] > B.shape[1]
    X = B.bfloat16().T if tall else B.bfloat16()
    X.div_(X.norm().clamp(min=eps))
    for _ in range(iterations):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


def _newton_schulz() -> Callable[..., Tensor]:
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz
    except ImportError:
        return newton_schulz
    return _zeropower_via_newtonschulz


orthogonalize = _newton_schulz()


def muon_rule(G: Tensor, m: Tensor, B: Tensor, h: Hyper) -> None:
    """Update ``m`` by ``G`` and write the matrix to orthogonalise into ``B``; all are in blocks, as in ``by_rows``."""
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    torch.sub(G, g, out=B).mul_(h.rho).add_(g.lerp(m, h.b1))


def update_muon(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    """Update a weight of two or more dimensions, one matrix at a time; ``h.b1`` is the momentum.

    It allocates chunks of float32, then three matrices of bfloat16 and two square ones of their shorter side.
    """
    if grad.numel() == 0:
        return
    rows, n = grad.shape[-2:]
    width = block_width(level, n)
    gradient, momentum = as_rows(grad, n), as_rows(state["folded_momentum"], num_blocks(level, n))
    size = 0.2 * math.sqrt(max(rows, n))
    step = h.lr * size * h.scale
    for first in range(0, len(weight), rows):
        parts = [range(first + chunk.start, first + chunk.stop) for chunk in chunks(rows, n, grad.device)]
        direction = torch.empty(rows, n, dtype=torch.bfloat16, device=grad.device)
        for chunk in parts:
            direction[chunk.start - first : chunk.stop - first] = _direction(gradient, momentum, chunk, width, h)
        direction = orthogonalize(direction, COEFFICIENTS, ITERATIONS, SMALLEST_NORM)
        if size > LARGEST_STEP / LARGEST_VALUE:  # no element of a smaller matrix can reach the limit
            direction.clamp_(-LARGEST_STEP / size, LARGEST_STEP / size)
        for chunk in parts:
            W = weight.load(chunk, h)
            W.add_(direction[chunk.start - first : chunk.stop - first], alpha=-step)
            weight.store(chunk, W, h)
    weight.finish()


def _direction(gradient: Tensor, momentum: Tensor, rows: range, width: int, h: Hyper) -> Tensor:
    """``rows`` of the matrix to orthogonalise, float32. Their momentum is updated."""
    G, m = load(gradient, rows), load(momentum, rows)
    B, n = torch.empty_like(G), G.shape[-1]
    for Gi, mi, Bi in zip(blocked(G, width), split_moment(m, width, n), blocked(B, width), strict=True):
        muon_rule(Gi, mi, Bi, h)
    store(momentum, rows, m, h, substream=1)
    return B


def _state(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    folded = torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1])))
    return {"folded_momentum": StateTensor(folded, group["state_dtype"])}


def _temporary_bytes(p: Tensor, level: Level) -> int:
    rows, n = p.shape[-2:]
    # The matrix to orthogonalise is made in chunks, most of whose bytes are random bits if weights round. After that
    # it is held with two matrices of the iteration, two square ones, and the copy of a matrix that some products make.
    made = 2 * rows * n + min(rows * n, CHUNK_GPU) * (18 if p.element_size() < 4 else 6)
    return max(made, 8 * rows * n + 4 * min(rows, n) ** 2)


MUON = Rule(
    name="muon",
    words="orthogonalised by Muon",
    state=_state,
    update=update_muon,
    unit="tensor",
    shards="nothing",
    betas=lambda group: (group["momentum"], group["betas"][1]),
    table_fields={"second_moment": "factored", "scale": 1.0},  # a table of vectors is no matrix to orthogonalise
    temporary=_temporary_bytes,
)
