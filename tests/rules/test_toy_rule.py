"""A rule that the package does not know: a record here, a place in the tuple and a scale. All else works by itself."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

import foam_hf.rules.all
import foam_hf.tensors.rows
import tests.rules.test_safe_steps as safe_steps
from foam_hf import FOAM, enable_gradient_release, foam_param_groups, memory, optim_args
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer.checks import whole_weights_problem
from foam_hf.planner.activations import optimizer_temporary_bytes
from foam_hf.rules.by_rows import fold, in_blocks, row_moments, subtract_update_, update_rows
from foam_hf.rules.rule import Group, Rule, StateTensor
from foam_hf.tensors.folding import Level, block_width, num_blocks, unfold
from foam_hf.tensors.folding import fold as mean_of_blocks
from foam_hf.tensors.rows import Rows
from foam_hf.tensors.step import Hyper
from tests.support.tiny_models import language_data, tiny_llama


def update(
    weight: Rows, grad: Tensor, state: dict[str, Tensor], level: Level, h: Hyper, left_out_at: Tensor | None = None
) -> None:
    """U = sign(unfold(m) + rho R), with the folded momentum m."""
    width = block_width(level, weight.place.columns)

    def update_chunk(rows: range, G: Tensor, W: Tensor, moments: list[Tensor]) -> None:
        for Gi, Wi, mi in in_blocks(width, G, W, moments=moments):
            g = fold(Gi)
            mi.lerp_(g, 1 - h.b1)
            U = torch.sign(mi + h.rho * (Gi - g))
            subtract_update_(Wi, (U, torch.ones_like(U)), h)

    moments = row_moments([*state.values()], weight, level)
    update_rows(weight, grad, moments, update_chunk, h, width=width, left_out_at=left_out_at)


def state_of(p: Tensor, level: Level, group: Group) -> dict[str, StateTensor]:
    folded = torch.Size((*p.shape[:-1], num_blocks(level, p.shape[-1])))
    return {"folded_momentum": StateTensor(folded, group["state_dtype"])}


TOY = Rule(
    name="sign",
    words="the sign of a folded momentum",
    state=state_of,
    update=update,
    largest_step=1.0,
    temporary=lambda p, level: 20 * p.numel(),
)
OPTIONS: dict[str, Any] = {"second_moment": "sign", "level": 2, "lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new rule needs outside of its file: the tuple, and the scale, whose name is a legal second_moment."""
    monkeypatch.setattr(foam_hf.rules.all, "RULES", (TOY, *foam_hf.rules.all.RULES))
    monkeypatch.setitem(optim_args.SCALES, "sign", 1.0)
    legal = optim_args.Words(tuple(optim_args.SCALES))
    renewed = [
        dataclasses.replace(each, legal=legal) if each.name == "second_moment" else each for each in optim_args.OPTIONS
    ]
    monkeypatch.setattr(optim_args, "OPTIONS", tuple(renewed))


def weights() -> dict[str, Tensor]:
    """One of each kind."""
    values = torch.randn(6, 32)
    return {
        "float32": values,
        "bfloat16": values.bfloat16(),
        "int8": Int8Weight.from_float(values, 16),
        "three dimensions": torch.randn(2, 3, 10),
    }


def take_steps(optimizer: FOAM, gradients: list[list[Tensor]]) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()


def draw(some: dict[str, Tensor], steps: int) -> list[list[Tensor]]:
    return [[torch.randn(w.shape).to(w.dtype) for w in some.values()] for _ in range(steps)]


@pytest.mark.parametrize("level", [0, 2, "row"])
def test_a_step_is_the_formula(level: Level) -> None:
    weight, gradients = torch.randn(5, 13), [torch.randn(5, 13) for _ in range(3)]
    p = nn.Parameter(weight.clone())
    take_steps(FOAM([p], **{**OPTIONS, "level": level, "residual_scale": 0.5}), [[grad] for grad in gradients])
    m, expected = torch.zeros(5, num_blocks(level, 13)), weight.double()
    for grad in gradients:
        g = mean_of_blocks(grad, level)
        m = 0.9 * m + 0.1 * g
        U = torch.sign(unfold(m, level, 13) + 0.5 * (grad - unfold(g, level, 13)))
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * U
    assert (p - expected).abs().max().item() < 1e-6


def test_it_has_what_folds_and_adamw_the_rest() -> None:
    p, bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8))
    optimizer = FOAM([p, bias], **OPTIONS)
    take_steps(optimizer, [[torch.randn(4, 8), torch.randn(8)]])
    assert optimizer.state[p].keys() == {"step", "folded_momentum"}
    assert optimizer.state[bias].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "the sign of a folded momentum" in memory.summarize(optimizer)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_has_the_bits_of_one_that_went_on(
    monkeypatch: pytest.MonkeyPatch, state_dtype: torch.dtype, kernel: str
) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", kernel)  # it has none: beside weights that have
    some = weights() | {"bias": torch.randn(8)}
    options = {**OPTIONS, "state_dtype": state_dtype}
    first, rest = draw(some, 3), draw(some, 3)
    params = [nn.Parameter(copy.deepcopy(w)) for w in some.values()]
    optimizer = FOAM(params, **options)
    take_steps(optimizer, first)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = copy.deepcopy(params)
    resumed = FOAM(again, **options)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for each in (optimizer, resumed):
        take_steps(each, rest)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][name])), name


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    some = weights()
    gradients, runs = draw(some, 3), []
    for chunk in (1 << 18, 40):
        monkeypatch.setattr(foam_hf.tensors.rows, "CHUNK_CPU", chunk)
        runs.append([nn.Parameter(copy.deepcopy(w)) for w in some.values()])
        take_steps(FOAM(runs[-1], **OPTIONS), gradients)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_steps_below_a_spacing_arrive_on_average(kind: str) -> None:
    """Each is 1/50 of what the weight can hold."""
    ones = torch.ones(64, 64)
    if kind == "bfloat16":
        p, spacing = nn.Parameter(ones.bfloat16()), 2.0**-7
    else:
        p, spacing = nn.Parameter(Int8Weight.from_float(ones * 0.5, 64)), 0.5 / 127
    before = p.detach().float().mean().item()
    optimizer = FOAM([p], **{**OPTIONS, "lr": spacing / 50, "weight_decay": 0.0})
    take_steps(optimizer, [[torch.ones(64, 64, dtype=p.dtype)]] * 50)
    assert (before - p.detach().float().mean().item()) / spacing == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_blocks_that_are_not_finite_stay(bad: float) -> None:
    for kind, weight in weights().items():
        p = nn.Parameter(copy.deepcopy(weight))
        optimizer = FOAM([p], **OPTIONS, nonfinite="skip")
        ((good,), (poisoned,)) = draw({kind: weight}, 2)
        take_steps(optimizer, [[good]])
        before, momentum = p.detach().float().clone(), optimizer.state[p]["folded_momentum"].clone()
        poisoned[..., 0, 1] = bad
        take_steps(optimizer, [[poisoned]])
        after = p.detach().float()
        kept = torch.equal(after[..., 0, :4], before[..., 0, :4])
        assert (kept or kind == "int8") and bool(after.isfinite().all())  # a block of codes may have a new scale
        assert torch.equal(optimizer.state[p]["folded_momentum"][..., 0, 0], momentum[..., 0, 0])
        assert not torch.equal(after[..., 1, :], before[..., 1, :])


@pytest.mark.parametrize("kind", ["float32", "bfloat16 state", "INT8 weight"])
def test_no_element_moves_further_than_stated(kind: str) -> None:
    for pattern in safe_steps.HARDEST:
        found = safe_steps.largest_step(pattern, kind, level=5, second_moment="sign")
        assert found <= TOY.largest_step * (1 + 1e-4), pattern.__name__


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_state_takes_what_is_expected(state_dtype: torch.dtype) -> None:
    model = tiny_llama()
    optimizer = FOAM(foam_param_groups(model, second_moment="sign"), level=3, state_dtype=state_dtype)
    expected = memory.expected_state_bytes(optimizer.param_groups)
    model(**{name: value[None] for name, value in language_data(1)[0].items()})["loss"].backward()
    optimizer.step()
    assert memory.state_bytes(optimizer) == expected
    folding = [group for group in optimizer.param_groups if group["level"] != 0]
    blocks = sum(p.shape[:-1].numel() * num_blocks(3, p.shape[-1]) for group in folding for p in group["params"])
    assert expected < memory.adamw_state_bytes(model.parameters()) / 4
    assert sum(optimizer.state[p]["folded_momentum"].numel() for g in folding for p in g["params"]) == blocks


def test_the_plan_has_its_temporary_bytes() -> None:
    model = tiny_llama()
    largest = max(p.numel() for p in model.parameters() if p.dim() > 1)
    assert optimizer_temporary_bytes(model, "foam", "second_moment=sign") == 20 * largest
    assert optimizer_temporary_bytes(model, "foam", "embedding_rule=block") == 0


def in_two_processes(function: Callable[..., dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What ``function(rank)`` gives in each of two processes over gloo, forked from this one, which know the rule."""
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_as_rank, args=(function, folder, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _as_rank(function: Callable[..., dict[str, Any]], folder: Path, rank: int) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.save(function(rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


SPLIT = {  # shorter last blocks, and a rank without rows
    "rows": ((7, 13), Shard(0)),
    "few rows": ((1, 13), Shard(0)),
    "columns": ((3, 15), Shard(1)),
    "three dimensions": ((2, 3, 16), Shard(2)),
}


def sharded(rank: int) -> dict[str, Any]:
    """Weight and state of each case of `SPLIT` and dtype, all of it, and the same in one process."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for (case, (shape, placement)), dtype in itertools.product(SPLIT.items(), (torch.float32, torch.bfloat16)):
        p = nn.Parameter(torch.randn(shape).to(dtype))
        q = nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement]))
        alone, together = (FOAM([each], **{**OPTIONS, "state_dtype": dtype}) for each in (p, q))
        for grad in torch.randn(3, *shape).to(dtype):
            take_steps(alone, [[grad]])
            q.grad = distribute_tensor(grad, mesh, [placement])
            together.step()
        momentum = together.state[q]["folded_momentum"]
        assert isinstance(momentum, DTensor) and momentum.placements == (placement,)
        whole = [q.detach().full_tensor(), momentum.full_tensor()]
        found[f"{case} {dtype}"] = whole, [p.detach(), alone.state[p]["folded_momentum"]]
    return found


def test_shards_have_the_bits_of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", "reference")
    for found in in_two_processes(sharded, tmp_path):
        assert len(found) == 2 * len(SPLIT)
        for case, (together, alone) in found.items():
            assert all(map(torch.equal, together, alone)), case


def under_ddp(rank: int) -> dict[str, Any]:
    """Each rank has its half of a batch, and one process all of it."""
    layer = nn.Linear(32, 8)
    alone = copy.deepcopy(layer)
    parallel = nn.parallel.DistributedDataParallel(layer)
    optimizers = [FOAM(each.parameters(), **OPTIONS) for each in (layer, alone)]
    for halves in torch.randint(-3, 4, (3, 2, 4, 32)).float():  # sums of integers are exact in any order
        for each, x, optimizer in zip(
            (parallel, alone), (halves[rank], halves.flatten(0, 1)), optimizers, strict=True
        ):
            optimizer.zero_grad()
            each(x).mean().backward()
            optimizer.step()
    return {"together": layer.state_dict(), "alone": alone.state_dict()}


def test_ddp_has_the_bits_of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOAM_HF_KERNEL", "reference")
    for found in in_two_processes(under_ddp, tmp_path):
        for name, weight in found["alone"].items():
            assert torch.equal(found["together"][name], weight), name


def refused(rank: int) -> dict[str, Any]:
    """What FOAM says of a weight whose rows or columns are split, if the rule needs them whole."""
    mesh = init_device_mesh("cpu", (2,))
    words = {}
    p = nn.Parameter(distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]))
    for shards in ("nothing", "rows or columns"):
        foam_hf.rules.all.RULES = (dataclasses.replace(TOY, shards=shards), *foam_hf.rules.all.RULES[1:])
        try:
            FOAM([p], **OPTIONS)
            words[shards] = "taken"
        except ValueError as error:
            words[shards] = str(error)
    return words


def test_shards_of_a_rule_that_needs_whole_weights_are_refused(tmp_path: Path) -> None:
    for words in in_two_processes(refused, tmp_path):
        assert "second_moment='sign' needs whole weights: got a DTensor of shape (4, 8)" in words["nothing"]
        assert words["nothing"].endswith(
            "DDP, or second_moment='block' or 'factored' or 'muon' with plain_state='full'"
        )
        assert words["rows or columns"] == "taken"


def test_fsdp_takes_it_as_it_needs_no_whole_weights() -> None:
    assert whole_weights_problem({"second_moment": "sign"}) is None
    assert "expected second_moment=sign or block" in (whole_weights_problem({"second_moment": "adam_mini"}) or "")


def test_released_gradients_give_the_same_bits() -> None:
    runs = []
    for released in (False, True):
        model = tiny_llama()
        optimizer = FOAM(foam_param_groups(model, second_moment="sign", level=3), lr=0.01)
        if released:
            enable_gradient_release(model, optimizer)
        for row in language_data(3):
            model(**{name: value[None] for name, value in row.items()})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(model.parameters()))
    assert all(map(torch.equal, *runs))


def test_trainer_asks_for_it_by_name(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        optim="foam",
        optim_args="second_moment=sign,level=3",
        learning_rate=1e-3,
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=tiny_llama(), args=arguments, train_dataset=language_data(8))
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, FOAM)
    assert optimizer.state[trainer.model.model.layers[0].mlp.up_proj.weight].keys() == {"step", "folded_momentum"}
