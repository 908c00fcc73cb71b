"""FOAM with Muon: the folded momentum plus the residual goes into Muon's orthogonalisation.

For a matrix ``W`` of (rows, n), or each of the matrices that leading dimensions number, with ``mu`` the momentum,
``rho`` the residual's scale, and everything else as in ``by_rows``:

    g  = fold(G),  R = G - unfold(g)
    m <- mu m + (1 - mu) g                                  folded momentum, all that is kept
    B  = unfold((1 - mu) g + mu m) + rho R                  Nesterov's look-ahead, of the folded gradient
    W <- W (1 - lr weight_decay) - lr scale 0.2 sqrt(max(rows, n)) orthogonal(B)      at most 16 lr scale an element

``orthogonal`` is Muon's Newton-Schulz iteration in bfloat16, and the factor that of torch.optim.Muon with
``adjust_lr_fn="match_rms_adamw"``: a step has the root mean square of an AdamW step. Momentum (``lerp``, without bias
correction), Nesterov, decay, coefficients, 5 iterations and the smallest norm of 1e-7 are torch.optim.Muon's, so that
``level=0, scale=1`` is torch.optim.Muon, but for the limit, which no element of a matrix of fewer than 3,787 rows
and columns reaches, and in larger ones only one that is nearly alone in its row and column. ``orthogonal`` forgets
the length of ``B``: what counts is how much of it is residual. How it is weighed is our choice, as in the paper's
rule for Adam (arXiv 2512.07112): a running mean, and the residual of one step beside it. The paper's own
combination with Muon may differ.
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
LARGEST_VALUE = 1.3  # singular values, and so elements, of what five iterations give


def newton_schulz(B: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """A matrix ``B`` with singular values near 1 instead of its own, in bfloat16, as torch.optim.Muon computes it.

    For torch before 2.9, which has no Muon. As there, a ``B`` that is bfloat16 is overwritten.
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
    """Advance ``m`` by ``G``, both in blocks as in ``by_rows``, and write what is to be orthogonalised to ``B``."""
    g = fold(G)
    m.lerp_(g, 1 - h.b1)
    torch.sub(G, g, out=B).mul_(h.rho).add_(g.lerp(m, h.b1))


def update_muon(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    """One matrix at a time, of two or more dimensions; ``h.b1`` is the momentum.

    Temporaries, on any device: chunks of float32, then three matrices of bfloat16 and two squares of their shorter
    side.
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
        if size > LARGEST_STEP / LARGEST_VALUE:  # smaller matrices have no element that is limited
            direction.clamp_(-LARGEST_STEP / size, LARGEST_STEP / size)
        for chunk in parts:
            W = weight.load(chunk, h)
            W.add_(direction[chunk.start - first : chunk.stop - first], alpha=-step)
            weight.store(chunk, W, h)
    weight.finish()


def _direction(gradient: Tensor, momentum: Tensor, rows: range, width: int, h: Hyper) -> Tensor:
    """What is to be orthogonalised of ``rows``, float32; their momentum advances."""
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
    # What is orthogonalised, made in chunks, which where weights round are mostly random bits; then it, two matrices
    # of the iteration, two squares, and the copy of a matrix that some products make.
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
    matrices_only=True,
    temporary=_temporary_bytes,
)
