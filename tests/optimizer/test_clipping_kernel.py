"""The kernels of clipping by the norm of all gradients, against the same in torch operations."""

from __future__ import annotations

import math

import pytest
import torch

from foam_hf.optimizer import FOAM, clipping, clipping_kernel, undo
from tests.support.tolerances import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

CASE = "clipping's kernels against the plain path"
SHAPES = [(3, 50), (1, 1), (64,), (0, 4), (129,)]


def drawn() -> undo._Moments:
    """Moments that an update has made of ``before``, some of squares and below what is left of the old ones."""
    generator = torch.Generator().manual_seed(0)
    xs, before, decays = [], [], [0.9] * len(SHAPES) + [0.999] * len(SHAPES)
    for i, (shape, decay) in enumerate(zip(SHAPES * 2, decays, strict=True)):
        old, gradient = torch.randn(2, *shape, generator=generator).mul_(1e-3)
        old, part = (old.abs(), gradient.square()) if i >= len(SHAPES) else (old, gradient)
        xs.append(torch.lerp(old, part, 1 - decay).to(DEVICE))
        before.append(old.to(DEVICE))
    xs[-1][:2] *= 0.9999
    return undo._Moments(xs, before, decays, len(SHAPES))


@pytest.mark.parametrize("ratio", [1.0, 0.25, 1e-6, 1.5, 0.0, math.nan, math.inf])
def test_moments_are_those_of_the_plain_correction(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(clipping_kernel, "ELEMENTS", 64)  # several programs, the last one not full
    fused, plain = drawn(), drawn()
    old = [x.clone() for x in fused.xs]
    ratios = torch.tensor([2.0, ratio, 3.0], device=DEVICE)
    squared = [i >= fused.firsts for i in range(len(fused.xs))]
    rescaling = clipping_kernel.Rescaling()
    rescaling.run(fused.xs, fused.before, fused.decays, squared, [1] * len(squared), ratios)
    undo._rescale(plain, undo._ratios(ratios)[1])
    for x, y, before, was in zip(fused.xs, plain.xs, drawn().before, old, strict=True):
        assert_within(x, y, CASE)
        if ratio == 1:
            assert torch.equal(x, was)
        elif not math.isfinite(ratio):
            assert torch.equal(x, before)


def test_each_moment_has_its_own_ratio_and_later_steps_may_have_others() -> None:
    rescaling, ratios = clipping_kernel.Rescaling(), torch.tensor([1.0, 0.5], device=DEVICE)
    for count in (1, 2, 2):
        xs = [torch.full((4,), 2.0, device=DEVICE) for _ in range(count)]
        before = [torch.zeros(4, device=DEVICE) for _ in range(count)]
        rescaling.run(xs, before, [0.9] * count, [False] * count, [*range(count)], ratios)
        assert [x[0].item() for x in xs] == [2.0, 1.0][:count]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_scales_of_buckets_are_those_of_the_plain_path(monkeypatch: pytest.MonkeyPatch, bad: float | None) -> None:
    monkeypatch.setattr(clipping_kernel, "NORMS", 4)
    params = [torch.nn.Parameter(torch.randn(8, 8, device=DEVICE)) for _ in range(9)]
    found = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
        optimizer = FOAM(params, lr=0.0)
        clip = clipping.ClipByAll(optimizer, 0.5)
        clip.begin(params, 1)
        scales = []
        for bucket in ([0, 1, 2, 3, 4, 8], [5], [6, 7]):
            grads = [torch.full((8, 8), 0.01 * (i + 1), device=DEVICE) for i in bucket]
            if bad is not None and 5 in bucket:
                grads[0][0, 0] = bad
            scales.append(clip.before([params[i] for i in bucket], grads))
        found.append(torch.cat([*scales, clip.squares().reshape(1)]))
    assert found[0].shape == (4,) and found[1][0] > 1 and (bad is None or found[1][1:].isnan()[:2].all())
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert_within(found[0].nan_to_num(), found[1].nan_to_num(), CASE)
