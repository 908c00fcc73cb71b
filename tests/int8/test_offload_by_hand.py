"""Offloaded INT8 weights in the hands of a caller: what it writes, catches, pickles and does in several threads."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.int8 import visits
from foam_hf.int8.weight import Int8Weight
from tests.int8.test_offload import DEEP, DEVICE, int8_model
from tests.int8.test_quantizer import assert_same_bits, bits
from tests.support.tiny_models import tiny_llama


def negate_codes(model: Any) -> None:
    for name, x in model.state_dict().items():
        if name.endswith("weight_codes"):
            x.neg_()


def copy_layers(model: Any) -> None:
    layers = model.model.layers
    with torch.no_grad():
        for to, source in ((0, 3), (1, 2), (5, 5)):  # of the same slot, of another, the same
            for p, q in zip(layers[to].parameters(), layers[source].parameters(), strict=True):
                p.copy_(q)


@pytest.mark.parametrize("write", [negate_codes, copy_layers])
def test_what_a_caller_writes_is_what_the_model_computes_with(write: Callable[[Any], None]) -> None:
    tokens = torch.arange(8, device=DEVICE).view(1, -1)
    models = [int8_model(lambda: tiny_llama(**DEEP), where) for where in (None, "cpu")]
    losses = []
    for model in models:
        model(input_ids=tokens, labels=tokens).loss.backward()  # the first layers are on the device now
        write(model)
        losses.append(model(input_ids=tokens, labels=tokens).loss)
    assert torch.equal(*losses)
    assert_same_bits(bits(models[1]), bits(models[0]))


@pytest.mark.parametrize("when", [2, 9, 14])  # a copy to the device, one in the backward pass, one back
def test_an_interrupt_in_a_copy_leaves_no_layer_stale(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [int8_model(lambda: tiny_llama(**DEEP), where) for where in (None, "cpu")]
    copy, count = visits.Layer._copy, 0

    def interrupted(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == when:
            raise KeyboardInterrupt
        copy(*args, **options)

    optimizer = FOAM(foam_param_groups(models[1]), lr=0.01, level=3)
    enable_gradient_release(models[1], optimizer)
    tokens = torch.arange(8, device=DEVICE).view(1, -1)
    with monkeypatch.context() as patched:
        patched.setattr(visits.Layer, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models[1](input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        loss = models[1](input_ids=tokens, labels=tokens).loss
        models[0].load_state_dict(models[1].state_dict())
        assert torch.equal(loss, models[0](input_ids=tokens, labels=tokens).loss)


def test_slots_that_found_no_memory_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``auto_find_batch_size`` does, and after an error of any other kind."""
    model, tokens = int8_model(tiny_llama, "cpu"), torch.arange(8, device=DEVICE).view(1, -1)

    def no_memory(sizes: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(visits, "slot_sizes", no_memory)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                model(input_ids=tokens)
    expected = int8_model(tiny_llama, None)(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_a_pickled_model_has_weights_that_are_not_offloaded() -> None:
    model, tokens, file = int8_model(tiny_llama, "cpu"), torch.arange(8, device=DEVICE).view(1, -1), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False).to(DEVICE)
    assert type(read.model.layers[0].mlp.up_proj.weight.data) is Int8Weight and read.hf_quantizer.offload is None
    assert torch.equal(read(input_ids=tokens).logits, model(input_ids=tokens).logits)


@torch.no_grad()
def test_several_threads_may_compute_with_a_model() -> None:
    model = int8_model(lambda: tiny_llama(**DEEP), "cpu").eval()
    tokens = [torch.arange(i, i + 8, device=DEVICE).view(1, -1) for i in range(3)]
    expected = [model(input_ids=each).logits for each in tokens]

    def compute(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(input_ids=tokens[i]).logits, expected[i]) for _ in range(10))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(compute, range(3)))
    finally:
        sys.setswitchinterval(interval)
