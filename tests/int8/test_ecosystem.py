"""INT8 weights under what others wrap around a model: torch.compile, LoRA, DDP, offloading of what autograd saves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from foam_hf import FOAM, foam_param_groups
from foam_hf.int8 import linear as int8_linear
from foam_hf.int8.weight import Int8Weight
from tests.support.tiny_models import tiny_llama


def small(dtype=torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype)
    return quantized(model)


def quantized(model: nn.Module, leave: str = "lm_head") -> nn.Module:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and leave not in name:
            layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight.detach(), 16))
    return model


def weights(model: nn.Module) -> list[Int8Weight]:
    return [p for p in model.parameters() if isinstance(p, Int8Weight)]


def test_a_compiled_model_trains_to_the_same_bits_and_keeps_no_floating_weight() -> None:
    torch._dynamo.reset()
    model = small()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [FOAM(m.parameters(), lr=1e-3, level=3) for m in (model, eager)]
    for _ in range(3):
        x = torch.randn(4, 64)
        for forward, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p.codes, q.codes) for p, q in zip(weights(model), weights(eager), strict=True))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(torch.randn(4, 64))
    # The second layer's codes are there for the gradient of its input, but no float32 weight is.
    assert (torch.int8, (32, 96)) in [(t.dtype, tuple(t.shape)) for t in saved]
    assert not [t for t in saved if t.is_floating_point() and tuple(t.shape) in ((96, 64), (32, 96))]


def test_a_compiled_backward_dequantizes_only_for_the_gradients_that_are_asked_for(monkeypatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = int8_linear.dequantize
    for needs, expected in ((False, [(32, 96)]), (True, [(32, 96), (96, 64)])):
        torch._dynamo.reset()
        compiled = torch.compile(small(), backend="aot_eager", fullgraph=True)
        loss = compiled(torch.randn(4, 64, requires_grad=needs)).sum()
        with monkeypatch.context() as patch:
            patch.setattr(
                int8_linear, "dequantize", lambda codes, *rest: asked.append((*codes.shape,)) or real(codes, *rest)
            )
            loss.backward()
        assert asked == expected
        asked.clear()


def test_adapters_train_on_frozen_int8_weights() -> None:
    from peft import LoraConfig, get_peft_model

    model = quantized(tiny_llama())
    before = [copy.deepcopy(w) for w in weights(model)]
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    optimizer = FOAM(foam_param_groups(model), lr=1e-2)
    ids = torch.randint(0, 64, (2, 10))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(w.codes, x.codes) for w, x in zip(weights(model), before, strict=True))
    with pytest.raises(NotImplementedError, match="expected .* a dequantized model to merge adapters into"):
        model.merge_and_unload()


def test_data_parallel_ranks_keep_the_same_bits(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")  # the children need not import everything again
    ranks = [context.Process(target=_one_rank, args=(tmp_path, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in found:
        start, wrapped, trained = (state[name] for name in ("start", "wrapped", "trained"))
        # Training has left its largest codes below 127: the first broadcast must not quantize it anew.
        assert torch.equal(start.codes, wrapped.codes) and torch.equal(start.scales, wrapped.scales)
        assert not torch.equal(start.codes, trained.codes)
    assert torch.equal(found[0]["trained"].codes, found[1]["trained"].codes)
    assert torch.equal(found[0]["trained"].scales, found[1]["trained"].scales)
    assert torch.equal(found[0]["alone"].codes, found[0]["trained"].codes)


def _one_rank(folder: Path, rank: int) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    codes, scales = torch.randint(-100, 101, (32, 64), dtype=torch.int8), torch.rand(32, 4) / 100
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(Int8Weight(codes, scales, torch.float32))
    alone, found = copy.deepcopy(layer), {"start": copy.deepcopy(layer.weight.detach())}
    parallel = nn.parallel.DistributedDataParallel(layer)
    found["wrapped"] = copy.deepcopy(layer.weight.detach())
    optimizers = [FOAM(m.parameters(), lr=1e-3, level=3) for m in (layer, alone)]
    for _ in range(3):
        halves = torch.randint(-3, 4, (2, 4, 64)).float()  # sums of integers are exact in any order
        for m, x, optimizer in zip((parallel, alone), (halves[rank], halves.flatten(0, 1)), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).mean().backward()
            optimizer.step()
    found |= {"trained": layer.weight.detach(), "alone": alone.weight.detach()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradient_release_gives_the_bits_of_the_ordinary_step() -> None:
    from foam_hf import enable_gradient_release

    model = small(torch.bfloat16)
    released = copy.deepcopy(model)
    optimizers = [FOAM(m.parameters(), lr=1e-3, level=3) for m in (model, released)]
    enable_gradient_release(released, optimizers[1])
    for _ in range(3):
        x = torch.randn(4, 64, dtype=torch.bfloat16)
        for m, optimizer in zip((model, released), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            assert m is model or all(p.grad is None for p in m.parameters())
            optimizer.step()
    for p, q in zip(weights(model), weights(released), strict=True):
        assert torch.equal(p.codes, q.codes) and torch.equal(p.scales, q.scales)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_backward_pass_through_weights_of_before_a_step_is_an_error(kernel, monkeypatch) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)
    model, x = small(), torch.randn(4, 64, requires_grad=True)
    optimizer = FOAM(model.parameters(), lr=1e-3, level=3)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = small(torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("of_input", [True, False], ids=["input trains", "input does not"])
def test_checkpointing_does_not_repeat_the_last_product_of_a_layer(of_input, monkeypatch) -> None:
    """As for ordinary weights: nobody reads the last output of the second forward pass."""
    from torch.utils.checkpoint import checkpoint

    model, x = small(torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=of_input)
    linears = sum(isinstance(p, Int8Weight) for p in model.parameters())
    made = []
    dequantize = Int8Weight.dequantize
    monkeypatch.setattr(Int8Weight, "dequantize", lambda *args: made.append(0) or dequantize(*args))
    model(x).square().sum().backward()
    plain, expected = len(made), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert len(made) - plain == plain + linears - 1
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_what_autograd_saves_can_be_offloaded() -> None:
    model, x = small(), torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = model(x).square().sum()
    y.backward()
    offloaded = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(offloaded, [x, *model.parameters()], strict=True))


def test_a_functional_call_takes_int8_weights() -> None:
    model, x = small(), torch.randn(4, 64)
    doubled = {name: p.dequantize() * 2 if isinstance(p, Int8Weight) else p for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), x), model(x))
    assert not torch.equal(torch.func.functional_call(model, doubled, x), model(x))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers_are_refused_at_their_first_step(optimizer) -> None:
    model = small()
    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(NotImplementedError, match="expected foam_hf.FOAM to train them"):
        optimizer(model.parameters(), lr=1e-3).step()
