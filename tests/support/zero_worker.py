"""FOAM on DeepSpeed's engine, without the Trainer: what every process of tests/zero/test_engine.py runs, over gloo.

Each run is compared with the same run in one process without DeepSpeed. All processes see the same batches, so that
means over 2 or 4 processes are exact.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", os.environ.get("FOAM_HF_TEST_DEVICE", "cpu"))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.memory import expected_state_bytes, state_bytes
from tests.support.devices import BACKEND, DEVICE, choose_gpu, placed
from tests.support.tiny_models import tiny_llama
from tests.support.tolerances import assert_within, error
from tests.support.torchrun import launch

deepspeed.ops.__compatible_ops__.clear()  # else every process compiles C++ for collectives, or waits for it
STEPS, SHORT = 50, 4
BF16 = torch.bfloat16


class Net(nn.Module):
    """Rows of 256k and of odd widths, biases, and a weight of three dimensions whose rows are shorter than a block."""

    def __init__(self, sizes: tuple[int, ...] = (256, 37, 576, 64, 896, 5)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.experts = nn.Parameter(torch.randn(3, 5, 24) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.experts.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean() + torch.einsum("bi,eij->bej", x, self.experts).float().square().mean()


def param_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Folded and plain weights, with and without decay."""
    folded = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": folded[:-1], "weight_decay": 0.1, **options},
        {"params": folded[-1:], "level": 3, **options},
        {"params": plain, "level": 0, **{k: v for k, v in options.items() if k == "state_dtype"}},
    ]


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [placed(torch.randn(4, 256, generator=generator)) for _ in range(steps)]


def alone(
    steps: int, dtype: torch.dtype = torch.float32, masters: bool = False, **options: Any
) -> tuple[list[Tensor], FOAM]:
    """The weights after the last step of one process without DeepSpeed.

    ``masters``: the optimizer updates float32 copies of the weights, as in DeepSpeed.
    """
    model = placed(Net().to(dtype))
    weights = list(model.parameters())
    copies = [nn.Parameter(p.detach().float()) if masters else p for p in weights]
    of_copy = dict(zip(weights, copies, strict=True))
    groups = [{**group, "params": [of_copy[p] for p in group["params"]]} for group in param_groups(model, **options)]
    optimizer = FOAM(groups, lr=1e-3)
    for batch in batches(steps):
        model(batch).backward()
        for p, q in of_copy.items():
            q.grad = p.grad.to(q.dtype)
        optimizer.step()
        model.zero_grad()
        if masters:
            for p, q in of_copy.items():
                p.data.copy_(q.data)
    return [p.detach().float() for p in copies], optimizer


def engine_of(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, nn.Module, FOAM]:
    zero = {"memory_efficient_linear": False, **config.pop("zero")}  # or ZeRO 3 computes other bits of gradients
    model = placed(Net().to(dtype))
    optimizer = FOAM(param_groups(model, **options), lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **config,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, model, optimizer


def train(engine: Any, some: list[Tensor]) -> None:
    for batch in some:
        engine.backward(engine(batch))
        engine.step()


def whole(model: nn.Module) -> list[Tensor]:
    """All weights, in float32."""
    # With round_robin_gradients DeepSpeed 0.19 gathers other weights than asked for from ZeRO 2, so look at the model.
    found = [safe_get_full_fp32_param(p) if hasattr(p, "ds_id") else p for p in model.parameters()]
    return [x.detach().float().clone() for x in found]


def assert_same(mine: list[Tensor], theirs: list[Tensor], what: Any) -> None:
    worst = [(mine[i] - theirs[i]).abs().max().item() for i in range(len(theirs))]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), (what, worst)


def assert_follows(mine: list[Tensor], alone: list[Tensor], what: str) -> float:
    """The bits of one process. On GPUs kernels depend on addresses, so there it is the largest relative difference."""
    if DEVICE == "cpu":
        assert_same(mine, alone, what)
        return 0.0
    for a, b in zip(mine, alone, strict=True):
        half = what.startswith("bfloat16")
        assert_within(a, b, "ZeRO against one GPU, bfloat16, 4 steps" if half else "ZeRO against one GPU, 50 steps")
    return max(error(a, b) for a, b in zip(mine, alone, strict=True))


# ZeRO configs, and FOAM's options, whose runs have the bits of one process.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero 1": ({"zero": {"stage": 1}}, {}),
    "zero 2": ({"zero": {"stage": 2}}, {}),
    "zero 3": ({"zero": {"stage": 3}}, {}),
    "zero 2, round robin": ({"zero": {"stage": 2, "round_robin_gradients": True}}, {}),
    "zero 2, offload": ({"zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}),
    "zero 3, offload": ({"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {}),
    "zero 3, sub groups": ({"zero": {"stage": 3, "sub_group_size": 100_000}}, {}),
    "zero 1, row": ({"zero": {"stage": 1}}, {"level": "row"}),
    "zero 2, row": ({"zero": {"stage": 2}}, {"level": "row"}),
    "zero 3, row": ({"zero": {"stage": 3}}, {"level": "row"}),
    "zero 2, bfloat16 state": ({"zero": {"stage": 2}}, {"state_dtype": BF16}),
    "zero 3, bfloat16 state": ({"zero": {"stage": 3}}, {"state_dtype": BF16}),
}


def follows_one_process(name: str, steps: int) -> float:
    config, options = CASES[name]
    expected, one = alone(steps, **options)
    engine, model, optimizer = engine_of({**config, "zero": dict(config["zero"])}, **options)
    train(engine, batches(steps))
    differing = assert_follows(whole(model), expected, name)
    whole_state = expected_state_bytes(one.param_groups)
    assert whole_state == state_bytes(one)
    doubled = sum(
        state.shape.numel() * state.dtype.itemsize
        for parts in optimizer.flat_parts
        for part, cut in zip(parts.shared, parts.cuts, strict=True)
        for _, state in part.state.values()
        if cut.mine.first > cut.first  # counted by the process where the block begins
    )
    held = placed(torch.tensor([state_bytes(optimizer), doubled]))
    dist.all_reduce(held)
    assert int(held[0]) == whole_state + int(held[1]), (name, held, whole_state)
    assert 0 < int(held[1]) < 0.02 * whole_state or "row" in name, (name, held)
    return differing


BF16_CONFIG = {"bf16": {"enabled": True}}
BF16_MASTERS = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    "data_types": {"grad_accum_dtype": "bf16"},
}


def bfloat16(stage: int) -> float:
    """DeepSpeed keeps float32 copies of bfloat16 weights; if told not to, they round stochastically, by place."""
    expected, _ = alone(SHORT, BF16, masters=True)
    engine, model, _ = engine_of({"zero": {"stage": stage}, **BF16_CONFIG}, BF16)
    train(engine, batches(SHORT))
    mine = [safe_get_full_fp32_param(p) for p in model.parameters()]
    differing = assert_follows(mine, expected, f"bfloat16, zero {stage}")
    if stage > 1:
        expected, _ = alone(SHORT, BF16)
        engine, model, optimizer = engine_of({"zero": {"stage": stage}, **BF16_MASTERS}, BF16)
        train(engine, batches(SHORT))
        assert {parts.flat.tensor.dtype for parts in optimizer.flat_parts} == {BF16}
        differing = max(differing, assert_follows(whole(model), expected, f"bfloat16 copies, zero {stage}"))
    return differing


def float16() -> None:
    """DeepSpeed scales the loss, divides the gradients, and skips the same steps in all processes."""
    expected, _ = alone(SHORT)
    for stage in (2, 3):
        scaled = {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}  # the first steps overflow
        engine, model, optimizer = engine_of({"zero": {"stage": stage}, **scaled}, torch.float16)
        before = [safe_get_full_fp32_param(p) for p in model.parameters()]
        train(engine, batches(1))
        assert engine.skipped_steps == 1 and not optimizer.state
        assert_same([safe_get_full_fp32_param(p) for p in model.parameters()], before, "an overflow")
        scaled = {"fp16": {"enabled": True, "initial_scale_power": 8}}
        engine, model, optimizer = engine_of({"zero": {"stage": stage}, **scaled}, torch.float16)
        train(engine, batches(SHORT))
        assert engine.skipped_steps == 0
        mine = torch.cat([safe_get_full_fp32_param(p).flatten() for p in model.parameters()])
        whole_weights = torch.cat([w.flatten() for w in expected])
        assert_within(mine, whole_weights, "float16 under ZeRO against float32, 4 steps")


def resumes(stage: int, folder: Path, world: int, **zero: Any) -> None:
    """A run of a new engine that reads a checkpoint has the bits of the uninterrupted run."""
    config = {"stage": stage, **zero}
    engine, model, _ = engine_of({"zero": dict(config)}, state_dtype=BF16)
    train(engine, batches(2))
    place = folder / f"world{world}" / "_".join(map(str, config.values()))
    engine.save_checkpoint(str(place), tag="saved")
    train(engine, batches(4)[2:])
    expected = whole(model)
    engine, model, optimizer = engine_of({"zero": dict(config)}, state_dtype=BF16)
    assert engine.load_checkpoint(str(place), tag="saved")[0] is not None
    kinds = {x.dtype for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)}
    assert kinds == {BF16}, kinds  # torch casts them to the dtype of the weights
    train(engine, batches(4)[2:])
    assert_same(whole(model), expected, f"resumed, {config}, {world} processes")


def refused(message: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception as error:  # DeepSpeed has classes of its own
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def refuses_other_checkpoints(stage: int, folder: Path, world: int) -> None:
    engine, _, optimizer = engine_of({"zero": {"stage": stage}})
    zero = engine.optimizer
    train(engine, batches(1))
    saved = zero.state_dict()
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    states: list[Any] = [None] * world
    dist.all_gather_object(states, saved[key])
    rank = dist.get_rank()

    def load(checkpoint: dict[str, Any]) -> None:
        if stage == 3:  # a load that was refused leaves its vectors in the groups
            zero._clear_fp32_optimizer_param_groups()
        zero.load_state_dict([checkpoint] * world)

    refused(
        f"process={(rank + 1) % world}, and here process={rank}",
        lambda: load({**saved, key: states[rank - world + 1]}),
    )
    _, one = alone(1)
    refused("holds the state of whole weights", lambda: load({**saved, key: one.state_dict()}))
    refused("holds the state of flat vectors", lambda: one.load_state_dict(saved[key]))
    load(saved)
    if world == 4:  # two processes wrote it
        engine, *_ = engine_of({"zero": {"stage": stage}}, state_dtype=BF16)
        place = folder / "world2" / str(stage)
        reason = "" if stage == 3 else "world size"  # ZeRO 3 has an assertion without words
        refused(reason, lambda: engine.load_checkpoint(str(place), tag="saved"))


def refuses_before_the_first_step() -> None:
    """Nothing is updated if a rule needs whole matrices, or another number of blocks folds than was planned."""

    def first_step(stage: int, change: Callable[[FOAM], None] | None, **options: Any) -> Callable[[], None]:
        engine, model, optimizer = engine_of({"zero": {"stage": stage}}, **options)
        before = whole(model)
        if change is not None:
            change(optimizer)
        engine.backward(engine(batches(1)[0]))

        def step() -> None:
            try:
                engine.step()
            finally:
                assert_same(whole(model), before, "refused")
                assert not optimizer.state

        return step

    def another_level(optimizer: FOAM) -> None:
        optimizer.param_groups[0]["level"] = 4

    def other_groups(optimizer: FOAM) -> None:
        optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]

    def asked(stage: int) -> None:
        engine = llama_on(stage, embedding_rule="factored")[0]
        engine.backward(engine(**TOKENS).loss)
        engine.step()

    for stage in (2, 3):
        refused(
            "expected second_moment='block' (for embeddings and heads embedding_rule='block')", partial(asked, stage)
        )
        for rule in ("factored", "muon", "adam_mini"):
            options = {"second_moment": rule, **({} if rule == "factored" else {"level": 8})}
            refused(f"second_moment={rule!r} needs whole matrices", first_step(stage, None, **options))
        planned = "and FOAM was made for 6 weights that fold in"
        refused(planned, first_step(stage, another_level))
        # Else a vector would be trained as one long row.
        refused("are not those that FOAM was made with", first_step(stage, other_groups))
        _, model, optimizer = engine_of({"zero": {"stage": stage}})
        release = partial(enable_gradient_release, model, optimizer)
        refused("gradient release does not run with DeepSpeed's ZeRO", release)


TOKENS = {name: placed(torch.arange(24).view(2, 12)) for name in ("input_ids", "labels")}


def llama_on(stage: int, **options: Any) -> tuple[Any, nn.Module, FOAM]:
    """An engine for a model with embedding and head, in groups of `foam_param_groups`."""
    model = placed(tiny_llama())
    optimizer = FOAM(foam_param_groups(model, level=3, **options), lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **({"memory_efficient_linear": False} if stage == 3 else {})},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, model, optimizer


def groups_made_by_hand_need_no_option() -> None:
    """Embedding and head, which are factored elsewhere, have the block rule of other matrices."""
    alone = placed(tiny_llama())
    one = FOAM(foam_param_groups(alone, level=3, embedding_rule="block"), lr=1e-3)
    for _ in range(SHORT):
        alone(**TOKENS).loss.backward()
        one.step()
        one.zero_grad()
    for stage in (1, 2, 3):
        engine, model, optimizer = llama_on(stage)
        assert "factored" in {group["second_moment"] for group in optimizer.param_groups}
        for _ in range(SHORT):
            engine.backward(engine(**TOKENS).loss)
            engine.step()
        assert {group["second_moment"] for group in optimizer.param_groups} == {"block"}
        expected = [p.detach() for p in alone.parameters()]
        if stage < 3:
            assert_follows(whole(model), expected, f"a LLaMA, zero {stage}")
            continue
        for mine, theirs in zip(whole(model), expected, strict=True):
            assert_within(mine, theirs, "a LLaMA under ZeRO 3 by hand against one process, 4 steps")


def check_all(folder: Path) -> None:
    world = dist.get_world_size()
    for name in CASES:
        steps = STEPS if name.count(",") == 0 else SHORT
        if steps == STEPS or world == 2 or "row" in name:
            follows_one_process(name, steps)
    for stage in (1, 2, 3):
        resumes(stage, folder, world)
        refuses_other_checkpoints(stage, folder, world)
        if world == 2:
            bfloat16(stage)
    if world == 2:
        if get_accelerator().is_fp16_supported():  # not by every CPU
            float16()
        resumes(3, folder, world, sub_group_size=20_000)
        groups_made_by_hand_need_no_option()
        refuses_before_the_first_step()


def as_one_rank(check: Callable[..., None], *args: Any) -> None:
    """The function that every process of the launcher runs."""
    torch.set_num_threads(1)
    choose_gpu()
    deepspeed.init_distributed(BACKEND, verbose=False)
    try:
        check(*args)
    except BaseException:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    for processes in (2, 4):
        launch(processes, as_one_rank, check_all, Path(sys.argv[1]))
