"""Variants of FOAM's rules that are studied before any of them may enter the product: one readable class, float32.

`study.py` trains with them beside the product; README.md says what was found. With all switches off, `Candidate`
is `foam_hf.FOAM` (a test holds the two together). Matrices only; plain parameters get AdamW. Parameters of one shape
are updated together, as (count, rows, columns): many small operations are what a small model would wait for.

    G = g + R: block means (unfolded) and residual;  M: the bias-corrected first moment;  V: the second moment
    U = (M + weight * R + ...) / (sqrt(V) + eps)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.rules.factored import LARGEST_CENTER
from foam_hf.rules.rule import LARGEST_STEP
from foam_hf.tensors.folding import fold, unfold

SWITCHES = {
    "first_moment_level": "level of the first moment, if not the second's; 'none' keeps none at all",
    "residual_in_correction": "whether the residual is divided by 1 - b1**t too; default: block yes, factored no",
    "residual_limit": "the residual's norm is at most so many times the first moment's, in each matrix",
    "agreement": "power p > 0: the residual's weight is (rms of M / rms of g)**p, measured in each matrix",
    "residual_start": "the weight grows from this share of itself to all of it (above 1: falls) over total_steps",
    "total_steps": "of the training",
    "two_way": "a second first moment of the residual, folded along the other dimension",
    "own_square": "whether the element's own square is in its second moment",
}


class Candidate(torch.optim.Optimizer):
    """FOAM with switches, for studies.

    Args:
        params: param groups such as `foam_hf.foam_param_groups` makes; float32. Folded ones are matrices.
        lr, betas, eps, weight_decay, level, scale, second_moment, residual_scale: as in `foam_hf.FOAM`.
        switches: see SWITCHES.

    Raises:
        ValueError: an unknown switch, a residual_start without total_steps, or a folded tensor that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: int | str = 8,
        scale: float = 0.25,
        second_moment: str = "block",
        residual_scale: float = 1.0,
        **switches: Any,
    ) -> None:
        if unknown := sorted(switches.keys() - SWITCHES.keys()):
            raise ValueError(f"unknown switch, got {unknown[0]!r}; expected some of {', '.join(SWITCHES)}")
        if switches.get("residual_start") is not None and not switches.get("total_steps"):
            raise ValueError("residual_start needs the length of the training; expected total_steps beside it")
        rule = {"level": level, "scale": scale, "second_moment": second_moment, "residual_scale": residual_scale}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **rule})
        self.switches = {**dict.fromkeys(SWITCHES), **switches}
        for group in self.param_groups:
            for p in group["params"]:
                if _folds(p, group) and p.dim() != 2:
                    raise ValueError(f"a folded parameter has shape {tuple(p.shape)}; expected a matrix")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for alike in _alike(group):
                state, *_ = [self.state[p] for p in alike]  # the first's is that of all, the others' stay empty
                state["step"] = state.get("step", 0) + 1
                if state.setdefault("count", len(alike)) != len(alike):
                    raise ValueError(f"{len(alike)} parameters of a shape have gradients; expected {state['count']}")
                G = torch.stack([p.grad for p in alike])
                update = self.folded_update if _folds(alike[0], group) else adam_update
                U = update(G, state, group)
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * (group["scale"] if alike[0].dim() > 1 else 1.0)
                torch._foreach_sub_(alike, list(U), alpha=rate)
        return loss

    def folded_update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """U of one matrix, or of many as (count, rows, columns), whose state moves on."""
        (b1, b2), t, n, level, first = group["betas"], state["step"], G.shape[-1], group["level"], self.first(group)
        c1, c2 = 1 - b1**t, 1 - b2**t
        factored = group["second_moment"] == "factored"
        before = factored_moment(G, state) if factored else None  # of the steps before this one
        self.advance(G, state, group)
        folded_g = fold(G, first)
        folded_m = state["folded_exp_avg"] / c1 if self.keeps_first() else folded_g
        M, R = unfold(folded_m, first, n), G - unfold(folded_g, first, n)
        if self.switches["two_way"]:
            rows = G.shape[-2]
            M = M + unfold(state["column_exp_avg"], level, rows).mT / c1
            R = R - unfold(fold(R.mT, level), level, rows).mT

        rho = group["residual_scale"] * self.weight(folded_m, R, state, c2)
        corrected = self.switches["residual_in_correction"]
        corrected = not factored if corrected is None else corrected
        own = self.switches["own_square"] is not False
        if before is not None:
            V = (b2 * before + (1 - b2) * G.square()) / c2
            if not own:  # at the first step there is no other
                V = before / (1 - b2 ** (t - 1)) if t > 1 else G.square()
        else:
            V = unfold(state["folded_exp_avg_sq"], level, n) / c2
            V = V + own * (rho * R).square() / (c2 if corrected else 1.0)
        N, S = M + rho * R / (c1 if corrected else 1.0), V.sqrt()
        if factored:  # as FOAM limits it; the studies of version 0.1.0 ran without
            limit, center = LARGEST_STEP * S, N - rho * G
            N, S = N.clamp(-limit, limit), torch.maximum(S, center.abs() / LARGEST_CENTER)
        return N / (S + group["eps"])

    def first(self, group: dict[str, Any]) -> int | str:
        """The level that parts a gradient into block means and residual."""
        given = self.switches["first_moment_level"]
        return group["level"] if given in (None, "none") else given

    def keeps_first(self) -> bool:
        return self.switches["first_moment_level"] != "none"

    def advance(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Take a gradient into the averages."""
        (b1, b2), level, first = group["betas"], group["level"], self.first(group)
        squares = G.square()
        folded_g = fold(G, first)
        if self.keeps_first():
            average(state, "folded_exp_avg", folded_g, b1)
        if self.switches["two_way"]:
            R = G - unfold(folded_g, first, G.shape[-1])
            average(state, "column_exp_avg", fold(R.mT, level), b1)
        if group["second_moment"] == "factored":
            average(state, "row_exp_avg_sq", squares.mean(-1), b2)
            average(state, "col_exp_avg_sq", squares.mean(-2), b2)
        else:
            average(state, "folded_exp_avg_sq", fold(squares, level), b2)
        if self.switches["agreement"] is not None:
            average(state, "mean_square", mean_of(folded_g.square()), b2)

    def weight(self, m: Tensor, R: Tensor, state: dict[str, Any], c2: float) -> Tensor | float:
        """What multiplies residual_scale, from the corrected folded moment, the residual and the state."""
        weight: Tensor | float = 1.0
        tiny = torch.finfo(torch.float32).tiny
        if (power := self.switches["agreement"]) is not None:
            # Gradients that agree over the steps have m as large as g; noise leaves sqrt((1 - b1) / (1 + b1)) of it.
            square = state["mean_square"] / c2
            weight = weight * (mean_of(m.square()) / square.clamp_min(tiny)).clamp(max=1.0) ** (power / 2)
        if (start := self.switches["residual_start"]) is not None:
            done = min(1.0, state["step"] / self.switches["total_steps"])
            weight = weight * (start + (1 - start) * done)
        if (limit := self.switches["residual_limit"]) is not None:
            rms_m, rms_r = mean_of(m.square()).sqrt(), mean_of(R.square()).sqrt()
            weight = weight * (limit * rms_m / rms_r.clamp_min(tiny)).clamp(max=1.0)
        return weight


def _folds(p: Tensor, group: dict[str, Any]) -> bool:
    return p.dim() > 1 and not (group["level"] == 0 and group["second_moment"] == "block")


def _alike(group: dict[str, Any]) -> list[list[Tensor]]:
    """The parameters that have a gradient, those of one shape together."""
    found: dict[torch.Size, list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is not None:
            found.setdefault(p.shape, []).append(p)
    return list(found.values())


def average(state: dict[str, Any], name: str, new: Tensor, beta: float) -> Tensor:
    """The running average `name`, started at zero, with `new` in it."""
    if name not in state:
        state[name] = torch.zeros_like(new)
    return state[name].lerp_(new, 1 - beta)


def mean_of(x: Tensor) -> Tensor:
    """The mean over each matrix of (..., rows, columns), as (..., 1, 1)."""
    return x.mean((-2, -1), keepdim=True)


def factored_moment(G: Tensor, state: dict[str, Any]) -> Tensor:
    """outer(r, c) / mean(r) of the row and column means in the state; zero before the first step."""
    if "row_exp_avg_sq" not in state:
        return torch.zeros_like(G)
    r, c = state["row_exp_avg_sq"], state["col_exp_avg_sq"]
    r = r / r.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return r.unsqueeze(-1) * c.unsqueeze(-2)


def adam_update(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    (b1, b2), t = group["betas"], state["step"]
    M = average(state, "exp_avg", G, b1) / (1 - b1**t)
    V = average(state, "exp_avg_sq", G.square(), b2) / (1 - b2**t)
    return M / (V.sqrt() + group["eps"])
