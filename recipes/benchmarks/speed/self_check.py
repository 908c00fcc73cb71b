"""Whether a kernel is right on this machine: what is timed must first agree with the plain path on the same input."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.benchmarks.common.cases import Weights

ROWS = 37  # of each weight: a few programs, the last one not full
GUARD = 64  # elements on both sides of a weight that nothing may write
STEPS = 3
LR = 1e-3  # many spacings of a bfloat16 weight a step, so that a small error shows
POISON = 64 << 20  # bytes of freed memory full of NaN, which a step's buffers are made of
# The update may round another last bit, and then a bfloat16 weight may go to its other neighbour.
OTHER_NEIGHBOURS = 0.02
# Where a gradient is near 0, the factored rule divides a rounded difference by it: up to 1.1e-7 on an H200.
FLOAT32_ERROR = 2e-7


def check_kernels(
    weights: Weights,
    build: Callable[[Weights], list[Optimizer]],
    device: str,
    make: Callable[[Tensor], nn.Parameter] = nn.Parameter,
) -> None:
    """Step small weights of the same names, columns and dtypes as ``weights`` by the kernels and by the plain path.

    Memory around the weights, and what torch hands out uninitialised, is NaN, so that an element that is not
    written, written twice or read beyond the end is seen. ``make`` makes a parameter of a plain tensor: by default
    that tensor itself, or INT8 weights, which differ by codes.

    Raises:
        RuntimeError: they differ by more than rounding, or something beside the weights was written.
    """
    made = _small(weights, device)
    plain, _ = _trained(made, weights, build, make, kernel="reference")
    fused, rooms = _trained(made, weights, build, make, kernel="auto")
    for name, p in plain.items():
        found, expected, room = _values(fused[name]), _values(p), rooms[name]
        said = f"the kernels are not right on this machine, so nothing is timed: {name} {tuple(expected.shape)}"
        if not (room[:GUARD].isnan().all() and room[-GUARD:].isnan().all()):
            raise RuntimeError(f"{said}: memory beside the weight was written")
        if not found.isfinite().all():
            raise RuntimeError(f"{said}: {int((~found.isfinite()).sum())} elements are not finite")
        if torch.equal(found, made[name][0]):
            raise RuntimeError(f"{said}: it did not move")
        _compare(said, found, expected, _spacing(p))


def check_optimizer(optimizer: Optimizer, model: nn.Module, device: str) -> None:
    """``check_kernels`` of a FOAM's groups, for small weights in place of ``model``'s; as it, raises RuntimeError."""
    from foam_hf import FOAM

    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        ({field: group[field] for field in optimizer.defaults}, {names[id(p)] for p in group["params"]})
        for group in optimizer.param_groups
    ]

    def build(weights: Weights) -> list[Optimizer]:
        picked = [
            {**fields, "params": weights.pick(lambda name, p, mine=mine: name in mine)} for fields, mine in groups
        ]
        return [FOAM([group for group in picked if group["params"]])]

    check_kernels(Weights(dict(model.named_parameters())), build, device)


def _values(p: Tensor) -> Tensor:
    """The elements of a weight; of INT8 codes what they stand for, in float32."""
    return p.codes * _spacing(p) if hasattr(p, "codes") else p


def _spacing(p: Tensor) -> Tensor | None:
    """How far each element is from its neighbour; None for float32 weights, which are not rounded further."""
    if hasattr(p, "codes"):
        return p.scales.repeat_interleave(p.block_size, -1)[..., : p.shape[-1]]
    if p.dtype == torch.float32:
        return None
    _, exponent = torch.frexp(p.float().abs())
    return torch.ldexp(torch.ones_like(p, dtype=torch.float64), exponent - 8)


def _compare(said: str, found: Tensor, expected: Tensor, spacing: Tensor | None) -> None:
    error = (found.double() - expected.double()).abs()
    if spacing is None:
        if error.max() > FLOAT32_ERROR:
            raise RuntimeError(f"{said}: largest difference {error.max():.2e}; expected at most {FLOAT32_ERROR:.0e}")
        return
    spacings = error / spacing
    differing = (error > FLOAT32_ERROR).double().mean().item()
    near_zero = error <= FLOAT32_ERROR
    if spacings[~near_zero].numel() and spacings[~near_zero].max() > STEPS:
        raise RuntimeError(f"{said}: an element is {spacings[~near_zero].max():.0f} spacings away")
    if differing > OTHER_NEIGHBOURS * STEPS:
        raise RuntimeError(
            f"{said}: {100 * differing:.1f}% of the elements differ; expected rounding to do that rarely"
        )


def _small(weights: Weights, device: str) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """A weight and gradients for a few steps, for one of each kind of name and shape."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, tuple[Tensor, list[Tensor]]] = {}
    seen = set()
    for name, p in weights.named.items():
        shape = (min(ROWS, p.shape[0]), *p.shape[1:]) if p.dim() > 1 else tuple(p.shape)
        kind = shape, "embed" in name
        if kind in seen:
            continue
        seen.add(kind)
        drawn = [torch.randn(shape, device=device, generator=generator).to(p.dtype) for _ in range(1 + STEPS)]
        made[name] = drawn[0].mul_(0.02), [grad.mul_(1e-3) for grad in drawn[1:]]
    return made


def _trained(
    made: dict,
    weights: Weights,
    build: Callable[[Weights], list[Optimizer]],
    make: Callable[[Tensor], nn.Parameter],
    kernel: str,
) -> tuple:
    """The weights after all steps, and the memory in which each lies."""
    rooms, named = {}, {}
    for name, (weight, _) in made.items():
        rooms[name] = torch.full((weight.numel() + 2 * GUARD,), float("nan"), dtype=weight.dtype, device=weight.device)
        inside = rooms[name][GUARD:-GUARD].view_as(weight).copy_(weight)
        named[name] = make(inside)
    before = os.environ.get("FOAM_HF_KERNEL")
    os.environ["FOAM_HF_KERNEL"] = kernel if before in (None, "auto") or kernel == "reference" else before
    try:
        optimizers = build(Weights(named, weights.heads))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = LR
        for step in range(STEPS):
            for name, p in named.items():
                p.grad = made[name][1][step].clone()
            poison = torch.full((POISON // 4,), float("nan"), device=next(iter(named.values())).device)
            del poison
            for optimizer in optimizers:
                optimizer.step()
    finally:
        os.environ.pop("FOAM_HF_KERNEL")
        if before is not None:
            os.environ["FOAM_HF_KERNEL"] = before
    return {name: p.detach() for name, p in named.items()}, rooms
