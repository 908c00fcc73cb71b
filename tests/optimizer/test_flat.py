"""Flat vectors of parts of weights, as ZeRO makes them, in one process: where blocks are cut, and their updates."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from foam_hf import FOAM
from foam_hf.optimizer.deepspeed import Flat, flats_of
from foam_hf.optimizer.flat_parts import FlatParts
from foam_hf.tensors.flat import Span, spans_between, split

BF16 = torch.bfloat16


@pytest.mark.parametrize(("columns", "width"), [(37, 8), (24, 8), (5, 256), (7, 1), (16, 16)])
def test_every_element_lies_in_one_whole_block_or_in_a_cut_one(columns: int, width: int) -> None:
    """For all ways to cut four rows out: rectangles are whole blocks, and what is left belongs to cut blocks."""
    total = 4 * columns
    width = min(width, columns)

    def block_of(element: int) -> tuple[int, int]:
        return element // columns, element % columns // width

    for begin, end in itertools.combinations(range(total + 1), 2):
        rectangles, cuts = split(Span(3, begin, end - begin, 1000), columns, width)
        assert len(rectangles) <= 3 and len(cuts) <= 2
        found = []
        for each in rectangles:
            first = each.first_row * columns + each.first_column
            assert each.weight == 3 and each.at == 1000 + first - begin
            assert each.first_column == 0 or each.rows == 1
            found += range(first, first + each.rows * each.columns)
        whole = {block_of(element) for element in found}
        for cut in cuts:
            mine = range(cut.mine.first, cut.mine.first + cut.mine.size)
            assert cut.mine.at == 1000 + cut.mine.first - begin and 0 < cut.mine.size < cut.size
            assert {block_of(e) for e in range(cut.first, cut.first + cut.size)} == {block_of(cut.first)}
            assert block_of(cut.first) not in whole
            found += mine
        assert sorted(found) == list(range(begin, end))
        for row, block in whole:
            first = row * columns + block * width
            assert set(range(first, min(first + width, (row + 1) * columns))) <= set(found)


def flat_optimizer(weights: list[torch.Tensor], begin: int, end: int, **options: Any) -> tuple[FOAM, nn.Parameter]:
    """A FOAM whose weights lie one behind the other, of which this process holds the elements from begin to end."""
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = FOAM(params, **options)
    starts = itertools.accumulate((w.numel() for w in weights), initial=0)
    offsets = [(i, start, w.numel()) for i, (w, start) in enumerate(zip(weights, starts, strict=False))]
    vector = nn.Parameter(torch.cat([w.flatten() for w in weights])[begin:end].clone())
    group = optimizer.param_groups[0]
    group["params"] = [vector]
    flat = Flat(vector, 0, None, 0, (spans_between(begin, end, offsets),), vector.device)
    known = optimizer._weights
    known.parts = {id(vector): FlatParts(flat, known.weights, group)}
    optimizer.kept = params  # the model, which owns them
    return optimizer, vector


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_vector_steps_as_the_weights_do(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, stochastic rounding of weights and moments included, with gradients that move."""
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    torch.manual_seed(0)
    weights = [torch.randn(5, 37).to(dtype), torch.randn(3, 40).to(dtype), torch.randn(7).to(dtype)]
    options: dict[str, Any] = {"level": 3, "lr": 0.01, "state_dtype": BF16, "weight_decay": 0.1}
    one = FOAM([nn.Parameter(w.clone()) for w in weights], **options)
    begin, end = 37 + 24, 5 * 37 + 3 * 40 + 5  # from the third block of a row to the middle of the bias
    optimizer, vector = flat_optimizer(weights, begin, end, **options)
    kept = []
    for _ in range(3):
        grads = [torch.randn(w.shape).to(dtype) for w in weights]
        for p, grad in zip(one.param_groups[0]["params"], grads, strict=True):
            p.grad = grad
        vector.grad = torch.cat([grad.flatten() for grad in grads])[begin:end].clone()
        kept.append(vector.grad)  # so that the next one lies elsewhere
        one.step()
        optimizer.step()
        whole = torch.cat([p.detach().flatten() for p in one.param_groups[0]["params"]])
        assert torch.equal(vector, whole[begin:end])
    assert optimizer.state[vector]["step"] == 3


def test_a_vector_that_is_moved_is_followed() -> None:
    """DeepSpeed's offload_states moves vectors between steps: the storage that they leave must not be updated."""
    weights = [torch.randn(4, 16)]
    optimizer, vector = flat_optimizer(weights, 0, 64, level=2, lr=0.01)
    vector.grad = torch.ones(64)
    optimizer.step()
    left = vector.data
    vector.data = left.clone()
    before = left.clone()
    vector.grad = torch.ones(64)
    optimizer.step()
    assert torch.equal(left, before) and not torch.equal(vector, before)


def test_nan_gradients_are_reported_with_the_name_of_the_weight() -> None:
    from foam_hf.optimizer import NonfiniteGradientError

    optimizer, vector = flat_optimizer([torch.ones(4, 16), torch.ones(2, 8)], 8, 80, level=2, lr=0.01)
    vector.grad = torch.ones(72)
    vector.grad[60] = torch.nan  # in the second weight
    with pytest.raises(NonfiniteGradientError) as caught:
        optimizer.step()
    assert caught.value.parameters[0] is optimizer.kept[1]


@pytest.mark.parametrize("key", ["layout", "folded_exp_avg"])
def test_state_of_another_vector_is_refused(key: str) -> None:
    """As elastic and universal checkpoints of DeepSpeed write it into `optimizer.state` without load_state_dict."""
    optimizer, vector = flat_optimizer([torch.ones(4, 16)], 0, 64, level=2, lr=0.01)
    vector.grad = torch.ones(64)
    optimizer.step()
    state = optimizer.state[vector]
    state[key] = state[key] + 1 if key == "layout" else state[key][:-1]
    with pytest.raises(ValueError, match="state of a flat vector of 64 elements does not fit it"):
        optimizer.step()


def test_a_deepspeed_without_a_name_is_an_error_that_names_it() -> None:
    p = nn.Parameter(torch.ones(4))
    p._z3_optimizer = object()
    p.ds_tensor = torch.ones(2)
    with pytest.raises(ImportError, match="lacks 'grad_position', by which FOAM finds its weights"):
        flats_of([{"params": [p]}], [[(0, p)]])
