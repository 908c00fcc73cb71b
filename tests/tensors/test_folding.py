from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foam_hf.tensors.folding import block_width, blocked, fold, num_blocks, split_moment, unfold
from tests.support.reference import block_bounds
from tests.support.tolerances import assert_within

levels = st.one_of(st.integers(0, 16), st.just("row"))


@settings(max_examples=200, deadline=None)
@given(level=levels, rows=st.integers(0, 5), n=st.integers(1, 70), leading=st.booleans())
def test_fold_is_the_mean_of_each_block_tail_included(level, rows, n, leading):
    x = torch.rand((2, rows, n) if leading else (rows, n)) + 0.5  # no mean near zero, whose error would be relative
    bounds = block_bounds(n, level)
    expected = torch.stack([x[..., start:stop].double().mean(-1) for start, stop in bounds], dim=-1)
    folded = fold(x, level)
    assert num_blocks(level, n) == len(bounds)
    assert_within(folded, expected, "one step against float64, float32 weights")


@settings(max_examples=200, deadline=None)
@given(level=levels, rows=st.integers(1, 5), n=st.integers(1, 70))
def test_unfolded_mean_and_residual_are_the_whole(level, rows, n):
    x = torch.randn(rows, n)
    residual = x - unfold(fold(x, level), level, n)
    assert_within(unfold(fold(x, level), level, n) + residual, x, "unfold(fold(X)) + residual against X, float32")
    # The residual is exactly what the mean loses: folding it leaves nothing.
    assert fold(residual, level).abs().max() <= 1e-6


@pytest.mark.parametrize(("level", "n", "width", "blocks"), [
    (0, 7, 1, 7), (2, 8, 4, 2), (2, 7, 4, 2), (2, 9, 4, 3), (8, 100, 100, 1), (16, 768, 768, 1), ("row", 768, 768, 1),
    (3, 1, 1, 1), ("row", 0, 1, 0),
])  # fmt: skip
def test_block_geometry(level, n, width, blocks):
    assert block_width(level, n) == width
    assert num_blocks(level, n) == blocks


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 12), rows=st.integers(1, 4), n=st.integers(1, 40), transposed=st.booleans())
def test_parts_are_views_that_cover_every_element_once(width, rows, n, transposed):
    width = min(width, n)
    x = torch.zeros(n, rows).t() if transposed else torch.zeros(rows, n)
    m = torch.zeros(rows, -(-n // width))
    for part, moment in zip(blocked(x, width), split_moment(m, width, n), strict=True):
        assert part.shape[:2] == moment.shape[:2] and moment.shape[2] == 1
        part.add_(1)
        moment.add_(1)
    assert bool((x == 1).all()) and bool((m == 1).all())
