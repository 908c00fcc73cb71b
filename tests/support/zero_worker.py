"""FOAM on DeepSpeed's engine, without the Trainer: what every process of tests/zero/test_engine.py runs, over gloo.

Each run is compared with the same run in one process without DeepSpeed. All processes see the same batches, so that
means over 2 or 4 processes are exact.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from foam_hf import FOAM
from foam_hf.memory import expected_state_bytes, state_bytes
from tests.support.torchrun import launch

deepspeed.ops.__compatible_ops__.clear()  # else every test run compiles C++ for collectives over shared memory
STEPS, SHORT = 50, 4
BF16 = torch.bfloat16


class Net(nn.Module):
    """Rows of 256k and of odd widths, biases, and a weight of three dimensions whose rows are shorter than a block."""

    def __init__(self, sizes: tuple[int, ...] = (256, 37, 576, 512, 896, 5)) -> None:
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
        {"params": folded[-1:], **{"level": 3, **options}},
        {"params": plain, "level": 0, **{k: v for k, v in options.items() if k == "state_dtype"}},
    ]


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 256, generator=generator) for _ in range(steps)]


def alone(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], FOAM]:
    """The weights after the last step of one process without DeepSpeed."""
    model = Net().to(dtype)
    optimizer = FOAM(param_groups(model, **options), lr=1e-3)
    for batch in batches(steps):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().float() for p in model.parameters()], optimizer


def engine_of(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, nn.Module, FOAM]:
    zero = {"memory_efficient_linear": False, **config.pop("zero")}  # or ZeRO 3 computes other bits of gradients
    model = Net().to(dtype)
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


# ZeRO configs, and FOAM's options, whose runs have the bits of one process.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero 1": ({"zero": {"stage": 1}}, {}),
    "zero 2": ({"zero": {"stage": 2}}, {}),
    "zero 3": ({"zero": {"stage": 3}}, {}),
    "zero 2, round robin": ({"zero": {"stage": 2, "round_robin_gradients": True}}, {}),
    "zero 2, offload": ({"zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}),
    "zero 3, offload": ({"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {}),
    "zero 3, sub groups": ({"zero": {"stage": 3, "sub_group_size": 100_000}}, {}),
    "zero 2, row": ({"zero": {"stage": 2}}, {"level": "row"}),
    "zero 3, row": ({"zero": {"stage": 3}}, {"level": "row"}),
    "zero 2, bfloat16 state": ({"zero": {"stage": 2}}, {"state_dtype": BF16}),
    "zero 3, bfloat16 state": ({"zero": {"stage": 3}}, {"state_dtype": BF16}),
}


def follows_one_process(name: str, steps: int) -> None:
    config, options = CASES[name]
    expected, one = alone(steps, **options)
    engine, model, optimizer = engine_of({**config, "zero": dict(config["zero"])}, **options)
    train(engine, batches(steps))
    assert_same(whole(model), expected, name)
    whole_state = expected_state_bytes(one.param_groups)
    assert whole_state == state_bytes(one)
    doubled = sum(
        state.shape.numel() * state.dtype.itemsize
        for parts in optimizer.flat_parts
        for part, cut in zip(parts.shared, parts.cuts, strict=True)
        for _, state in part.state.values()
        if cut.mine.first > cut.first  # counted by the process where the block begins
    )
    held = torch.tensor([state_bytes(optimizer), doubled])
    dist.all_reduce(held)
    assert int(held[0]) == whole_state + int(held[1]), (name, held, whole_state)
    assert 0 < int(held[1]) < 0.02 * whole_state or "row" in name, (name, held)


def check_all(folder: Path) -> None:
    for name in CASES:
        if os.environ.get("FOAM_HF_TEST_TRACE"):
            print(dist.get_rank(), name, flush=True)
        follows_one_process(name, STEPS if name.count(",") == 0 else SHORT)


def as_one_rank(check: Callable[..., None], *args: Any) -> None:
    """The function that every process of the launcher runs."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        check(*args)
    except BaseException:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    for processes in (2, 4):
        launch(processes, as_one_rank, check_all, Path(sys.argv[1]))
