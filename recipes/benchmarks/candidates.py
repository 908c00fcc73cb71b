"""Variants of FOAM's rules that are studied before any of them may enter the product: one readable class, float32.

`quality.py` trains with them beside the product; `quality.md` says what was found. With no switch thrown, `Candidate`
is `foam_hf.FOAM` (a test holds the two together). Matrices only; plain parameters get AdamW.

    G = g + R: block means (unfolded) and residual;  M: the bias-corrected first moment;  V: the second moment
    U = (M + weight * R + ...) / (sqrt(V) + eps)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foam_hf.folding import fold, unfold

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
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    folds = _folds(p, group)
                    U = self.folded_update(p.grad, state, group) if folds else adam_update(p.grad, state, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(U, alpha=group["lr"] * (group["scale"] if p.dim() > 1 else 1.0))
        return loss

    def folded_update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """U of one matrix, whose state moves on."""
        (b1, b2), t, n, level = group["betas"], state["step"], G.shape[-1], group["level"]
        c1, c2 = 1 - b1**t, 1 - b2**t
        first = level if self.switches["first_moment_level"] is None else self.switches["first_moment_level"]
        if first == "none":
            folded_g = folded_m = fold(G, level)
            c1 = 1.0  # a mean over this step alone has no bias
        else:
            folded_g = fold(G, first)
            folded_m = average(state, "folded_exp_avg", folded_g, b1)
        R = G - unfold(folded_g, level if first == "none" else first, n)
        M = unfold(folded_m, level if first == "none" else first, n) / c1
        if self.switches["two_way"]:
            folded_columns = fold(R.T, level)
            kept = unfold(average(state, "column_exp_avg", folded_columns, b1), level, G.shape[0]).T / c1
            R, M = R - unfold(folded_columns, level, G.shape[0]).T, M + kept

        rho = group["residual_scale"] * self.weight(folded_g, folded_m / c1, R, state, b2, c2)
        factored = group["second_moment"] == "factored"
        corrected = self.switches["residual_in_correction"]
        corrected = not factored if corrected is None else corrected
        own = 0.0 if self.switches["own_square"] is False else 1.0
        if factored:
            before = factored_before(G, state, b2)  # means of the steps before; this step's own square is added
            V = (b2 * before + (1 - b2) * own * G.square()) / c2 if own else before_or_own(before, G, b2, t)
        else:
            v = unfold(average(state, "folded_exp_avg_sq", fold(G.square(), level), b2), level, n)
            V = v / c2 + own * (rho * R).square() / (c2 if corrected else 1.0)
        return (M + rho * R / (c1 if corrected else 1.0)) / (V.sqrt() + group["eps"])

    def weight(self, g: Tensor, m: Tensor, R: Tensor, state: dict[str, Any], b2: float, c2: float) -> Tensor | float:
        """What multiplies residual_scale, from block means `g`, their corrected average `m` and the residual."""
        weight: Tensor | float = 1.0
        tiny = torch.finfo(torch.float32).tiny
        if (power := self.switches["agreement"]) is not None:
            # Gradients that agree over the steps have m as large as g; noise leaves sqrt((1 - b1) / (1 + b1)) of it.
            square = average(state, "mean_square", g.square().mean(), b2) / c2
            weight = weight * (m.square().mean() / square.clamp_min(tiny)).clamp(max=1.0) ** (power / 2)
        if (start := self.switches["residual_start"]) is not None:
            done = min(1.0, state["step"] / self.switches["total_steps"])
            weight = weight * (start + (1 - start) * done)
        if (limit := self.switches["residual_limit"]) is not None:
            rms_m, rms_r = m.square().mean().sqrt(), R.square().mean().sqrt()
            weight = weight * (limit * rms_m / rms_r.clamp_min(tiny)).clamp(max=1.0)
        return weight


def _folds(p: Tensor, group: dict[str, Any]) -> bool:
    return p.dim() > 1 and not (group["level"] == 0 and group["second_moment"] == "block")


def average(state: dict[str, Any], name: str, new: Tensor, beta: float) -> Tensor:
    """The running average `name`, started at zero, with `new` in it."""
    old = state.setdefault(name, torch.zeros_like(new))
    return old.lerp_(new, 1 - beta)


def factored_before(G: Tensor, state: dict[str, Any], b2: float) -> Tensor:
    """outer(r, c) / mean(r) of the steps before this one, whose squares are averaged in for the next."""
    squares = G.square()
    r = state.setdefault("row_exp_avg_sq", torch.zeros_like(squares[:, 0]))
    c = state.setdefault("col_exp_avg_sq", torch.zeros_like(squares[0]))
    before = torch.outer(r / r.mean().clamp_min(torch.finfo(torch.float32).tiny), c)
    r.lerp_(squares.mean(1), 1 - b2)
    c.lerp_(squares.mean(0), 1 - b2)
    return before


def before_or_own(before: Tensor, G: Tensor, b2: float, t: int) -> Tensor:
    """The corrected second moment of the steps before; at the first there is none but the gradient's own."""
    return before / (1 - b2 ** (t - 1)) if t > 1 else G.square()


def adam_update(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    (b1, b2), t = group["betas"], state["step"]
    M = average(state, "exp_avg", G, b1) / (1 - b1**t)
    V = average(state, "exp_avg_sq", G.square(), b2) / (1 - b2**t)
    return M / (V.sqrt() + group["eps"])
