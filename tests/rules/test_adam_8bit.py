"""Moments of 8 bits for what does not fold: near AdamW's, exact in checkpoints, as many bytes as promised."""

from __future__ import annotations

import copy
import importlib.util
import io

import pytest
import torch
from torch import nn

import foam_hf.tensors.rows
from foam_hf import FOAM, foam_param_groups
from foam_hf.memory import expected_state_bytes, state_bytes, summarize
from foam_hf.rules.adam_8bit import QuantizedMoment, _dynamic_map
from tests.support import tiny_models
from tests.support.rules import FOLDING


def train(weight, grads, **options):
    """The weight after one step for each gradient, and the optimizer."""
    p = nn.Parameter(weight.clone())
    optimizer = FOAM([p], **{"lr": 0.01, "level": 0, "scale": 1.0, **options})
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_follows_the_cpu(dtype):
    """There, bitsandbytes rounds to the nearest code by itself."""
    weight, grads = torch.randn(256, 64).to(dtype), [torch.randn(256, 64).to(dtype) + 0.3 for _ in range(20)]
    expected, _ = train(weight, grads, plain_state="8bit")
    found, optimizer = train(weight.cuda(), [grad.cuda() for grad in grads], plain_state="8bit")
    (state,) = optimizer.state.values()
    assert state["exp_avg_8bit"].is_cuda and (state["root_exp_avg_sq_8bit"] > 0).all()
    assert (found.cpu().float() - expected.float()).norm() < 0.02 * (expected.float() - weight.float()).norm()


def rare_tokens(steps, rows=256, n=64):
    """Gradients of an embedding: row i has one in every i-th step, and is small in proportion."""
    grads = []
    for t in range(1, steps + 1):
        seen = torch.tensor([t % (i + 1) == 0 for i in range(rows)])
        grads.append(torch.randn(rows, n) * seen[:, None] / torch.arange(1, rows + 1)[:, None])
    return grads


@pytest.mark.parametrize("shape", [(256, 64), (37, 123), (4500,)], ids=str)
def test_a_trajectory_stays_near_adamw(shape):
    weight, grads = torch.randn(shape), [torch.randn(shape) + 0.3 for _ in range(40)]
    exact, _ = train(weight, grads, weight_decay=0.1)
    quantized, optimizer = train(weight, grads, weight_decay=0.1, plain_state="8bit")
    (state,) = optimizer.state.values()
    assert state.keys() == {
        *("step", "exp_avg_8bit", "exp_avg_absmax", "root_exp_avg_sq_8bit", "root_exp_avg_sq_absmax")
    }
    assert (quantized - exact).norm() < 0.1 * (exact - weight).norm()


def test_rows_of_rare_tokens_never_move_further_than_adamw_moves_them():
    """Where a second moment were rounded to zero, a step would be as large as the moment over eps."""
    weight, grads = torch.zeros(256, 64), rare_tokens(120)
    exact, _ = train(weight, grads)
    quantized, _ = train(weight, grads, plain_state="8bit")
    assert quantized.abs().max() < 1.5 * exact.abs().max()
    assert ((quantized - exact).norm(dim=1) < 0.35 * exact.norm(dim=1) + 1e-3).all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values_and_roots_never_become_zero(signed):
    x = torch.randn(7, 300) * 10.0 ** -torch.arange(7).unsqueeze(1)
    x[0, :40] = 0.0
    x = x if signed else x.abs()
    moment = QuantizedMoment(torch.zeros(7, 300, dtype=torch.uint8), torch.zeros(9), signed)
    moment.store(range(7), x, None)
    values, _ = _dynamic_map(signed, x.device)
    scale = moment.absmax.repeat_interleave(256)[:2100].view(7, 300)
    loaded = moment.load(range(7))
    nearest = (x.unsqueeze(-1) / scale.unsqueeze(-1) - values).abs().amin(-1) * scale
    assert ((loaded - x).abs() <= nearest * (1 + 1e-5) + (1e-7 if signed else 3.3e-7) * scale).all()
    assert (loaded[0, :40] == 0).all()
    assert signed or (loaded[x > 0] > 0).all()


@pytest.mark.parametrize("n", [64, 123, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing(monkeypatch, dtype, n):
    weight, grads = torch.randn(600, n).to(dtype), [torch.randn(600, n).to(dtype) for _ in range(3)]
    whole, _ = train(weight, grads, plain_state="8bit")
    monkeypatch.setattr(foam_hf.tensors.rows, "CHUNK_CPU", 256 * n)
    chunked, _ = train(weight, grads, plain_state="8bit")
    assert torch.equal(whole, chunked)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(80, 60), nn.Linear(60, 80), nn.LayerNorm(80), nn.Linear(80, 30))


def make(net, **options):
    return FOAM(foam_param_groups(net, level=2, fold_embeddings=False), **{"plain_state": "8bit", **options})


def run(net, optimizer, steps, start=0):
    for t in range(start, start + steps):
        torch.manual_seed(t)
        optimizer.zero_grad()
        net(torch.randint(80, (4, 5))).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second_moment", [rule for rule in FOLDING if rule != "adam_mini"])  # which excludes 8bit
def test_resumed_run_is_bit_identical_and_its_bytes_are_counted(second_moment, dtype):
    nets = [model().to(dtype) for _ in range(2)]
    straight = make(nets[0], second_moment=second_moment)
    run(nets[0], straight, 8)
    first = make(nets[1], second_moment=second_moment)
    run(nets[1], first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = make(nets[1], second_moment=second_moment)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.state[nets[1][0].weight]["exp_avg_8bit"].dtype == torch.uint8
    run(nets[1], second, 5, start=3)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
    assert state_bytes(straight) == expected_state_bytes(straight.param_groups)
    # 4800 elements in 19 blocks; what is smaller than 4096 keeps its dtype
    assert straight.state[nets[0][0].weight]["exp_avg_8bit"].numel() == 4800
    assert straight.state[nets[0][0].weight]["exp_avg_absmax"].shape == (19,)
    assert straight.state[nets[0][1].bias].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_what_folds_stays_as_it_was():
    net = model()
    optimizer = make(net)
    run(net, optimizer, 1)
    assert optimizer.state[net[1].weight].keys() == {"step", "folded_exp_avg", "folded_exp_avg_sq"}
    assert "unfolded (AdamW with moments of 8 bits): 1 tensor, 4,800 parameters, 9.75 kB" in summarize(optimizer)


def test_checkpoints_of_the_other_state_are_refused():
    net = model()
    saved = {}
    for plain_state in ("full", "8bit"):
        copied = copy.deepcopy(net)
        optimizer = make(copied, plain_state=plain_state)
        run(copied, optimizer, 1)
        saved[plain_state] = optimizer.state_dict()
    for mine, other in (("full", "8bit"), ("8bit", "full")):
        with pytest.raises(ValueError, match=f"plain_state='{other}'.* has plain_state='{mine}'"):
            make(net, plain_state=mine).load_state_dict(saved[other])
    for group in saved["full"]["param_groups"]:  # of a version without the option
        del group["plain_state"], group["mini_rows"]
    make(net, plain_state="full").load_state_dict(saved["full"])


def test_it_can_be_planned_but_not_trained_without_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(ImportError, match="'8bit' quantizes by bitsandbytes, which is not installed; expected `pip"):
        make(model())
    assert expected_state_bytes(make(model().to("meta")).param_groups) > 0


def test_combinations_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="plain_state is not valid: got '4bit'"):
        make(model(), plain_state="4bit")
    groups = foam_param_groups(tiny_models.tiny_llama(), second_moment="adam_mini")
    with pytest.raises(ValueError, match="plain_state='8bit' quantizes AdamW's moments.* got both"):
        FOAM(groups, plain_state="8bit")
