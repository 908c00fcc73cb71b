"""The plan of weights in host memory against a run: bytes on the device and in host memory, the hidden bus."""

from __future__ import annotations

import pytest
import torch

from foam_hf import FOAM, Int8Config, enable_gradient_release, estimate_memory, foam_param_groups
from foam_hf.int8.quantizer import quantize_model_
from foam_hf.memory import breakdown
from tests.support.tiny_models import tiny_llama

SIZE = {"batch": 2, "sequence": 16}
WIDE = {"hidden_size": 128, "intermediate_size": 160}


def test_weights_in_host_memory_leave_slots_on_the_device():
    config = tiny_llama(**WIDE, num_hidden_layers=5).config
    plan = estimate_memory(config, int8_weights=True, gradient_release=True, offload_weights=True, **SIZE)
    resident = estimate_memory(config, int8_weights=True, gradient_release=True, **SIZE)
    model = quantize_model_(tiny_llama(**WIDE, num_hidden_layers=5), Int8Config(offload="cpu"))
    optimizer = FOAM(foam_param_groups(model))
    handle = enable_gradient_release(model, optimizer)
    model(input_ids=torch.arange(8).view(1, -1), labels=torch.arange(8).view(1, -1)).loss.backward()
    optimizer.step()
    handle.remove()
    measured = breakdown(model, optimizer)
    assert (plan.weights, plan.state) == (measured.weights, measured.state)
    assert plan.host == model.hf_quantizer.offload.visits.host_bytes
    assert plan.weights < resident.weights and plan.activations == resident.activations
    assert plan.label == "foam (gradient release, INT8 weights in host memory)"
    # A forward pass at 100 TFLOPS takes as long as its bytes at 25 GB/s: two operations an element and token.
    assert plan.hidden_from == pytest.approx(100e12 / 25e9 / 2, rel=0.06)  # scales come on top
