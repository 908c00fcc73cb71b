"""What sharded_speed.py measures: models, optimizers and engines, in every process of a case's group."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.benchmarks.common.harness import elapsed, now, synchronize
from recipes.benchmarks.memory.memory_peak import LLAMAS

WARM_UP = 2  # steps that do not count: state is made and kernels are compiled
LR = 1e-5
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An engine and an optimizer.

    Attributes:
        engine: ddp, fsdp2, zero2 or zero3.
        release: with gradient release, so that the backward pass updates weights.
        int8: which linear layers have INT8 weights: "", "layers" of the decoder, or "all", the head too.
        own_units: embedding and head are units of FSDP2 of their own, as in accelerate; else the outermost unit
            gathers both at the same time.
        model, batch, sequence: in place of the command line's. The model has all its layers then.
        limit_gib: no more than this may be allocated on a GPU.
        gpus: the case is of these numbers alone.
    """

    label: str
    engine: str
    optimizer: str
    release: bool = False
    int8: str = ""
    own_units: bool = False
    model: str | None = None
    batch: int | None = None
    sequence: int | None = None
    limit_gib: float | None = None
    gpus: tuple[int, ...] = (1, 2, 4, 8)


EIGHT: dict[str, Any] = {"engine": "fsdp2", "optimizer": "foam", "release": True, "gpus": (2, 4)}
EIGHT |= {"model": "llama-3.1-8b", "batch": 1, "sequence": 512}
FOAM8, ADAMW = "foam, level 8", "torch AdamW, fused"
INT8 = f"FSDP2, INT8, {FOAM8}, gradient release"
CASES = {
    "fsdp2-foam": Case(f"FSDP2, {FOAM8}", "fsdp2", "foam"),
    "fsdp2-adamw": Case(f"FSDP2, {ADAMW}", "fsdp2", "adamw"),
    "zero2-foam": Case(f"ZeRO 2, {FOAM8}", "zero2", "foam"),
    "zero2-adamw": Case(f"ZeRO 2, {ADAMW}", "zero2", "adamw"),
    "zero3-foam": Case(f"ZeRO 3, {FOAM8}", "zero3", "foam"),
    "zero3-adamw": Case(f"ZeRO 3, {ADAMW}", "zero3", "adamw"),
    "fsdp2-foam-release": Case(f"FSDP2, {FOAM8}, gradient release", "fsdp2", "foam", release=True),
    "fsdp2-int8-release-8gib": Case(
        f"{INT8}, head INT8, embedding and head units of their own, at most 8 GiB",
        int8="all",
        own_units=True,
        limit_gib=8,
        **EIGHT,
    ),
    "fsdp2-int8-release-units": Case(
        f"{INT8}, embedding and head units of their own", int8="layers", own_units=True, **EIGHT
    ),
    "fsdp2-int8-release": Case(INT8, int8="layers", **EIGHT),
    "fsdp2-muon": Case("FSDP2, foam_muon, level 8", "fsdp2", "muon"),
    "fsdp2-torch-muon": Case("FSDP2, torch Muon; AdamW for the rest", "fsdp2", "torch-muon"),
    "zero2-deepspeed-muon": Case("ZeRO 2, DeepSpeed's Muon; Adam for the rest", "zero2", "deepspeed-muon"),
    "fsdp2-factored": Case(f"FSDP2, {FOAM8}, factored", "fsdp2", "factored"),
    "ddp-foam": Case(f"DDP, {FOAM8}", "ddp", "foam"),
    "ddp-adamw": Case(f"DDP, {ADAMW}", "ddp", "adamw"),
    "ddp-foam-release": Case(f"Release's own averaging, {FOAM8}", "ddp", "foam", release=True),
}


@dataclass
class Running:
    """What trains: `backward` of a loss, then `step`; `optimizers` are those whose steps are timed."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]


def environment_of(case: Case) -> dict[str, str]:
    """Under a limit no memory may be lost between blocks of other sizes."""
    return {} if case.limit_gib is None else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def start(device: str, limit_gib: float | None) -> None:
    """This process's GPU and its place in the group."""
    from datetime import timedelta

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if limit_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * 2**30 / total))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=2))


def config_of(model: str, layers: int | None, sequence: int) -> Any:
    from transformers import LlamaConfig

    fields = {**LLAMAS[model], **({} if layers is None else {"num_hidden_layers": layers})}
    return LlamaConfig(**fields, max_position_embeddings=sequence, use_cache=False)


def whole_model(config: Any, device: str) -> Any:
    """A model of random bf16 weights, the same in every process."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(BF16)  # no fp32 copy of the weights, not even for a moment
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@torch.no_grad()
def sharded_model(config: Any, device: str, int8: str, own_units: bool) -> Any:
    """A model of random weights under FSDP2, of which each process allocates its shard alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(BF16)
        if int8:
            convert_linears(model if int8 == "all" else model.model.layers)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for unit in [*model.model.layers, *([model.model.embed_tokens, model.lm_head] if own_units else [])]:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    for p in model.parameters():
        fill(p)
    # Its buffers are not in the shards, and to_empty has lost them.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train()


def convert_linears(model: nn.Module) -> None:
    from foam_hf.int8.models import convert_

    for module in [*model.modules()]:
        if isinstance(module, nn.Linear):
            convert_(module, 128 if module.in_features % 128 == 0 else 16)


def fill(p: torch.Tensor) -> None:
    """Random values in this process's part, of a weight of any kind."""
    local = p.to_local() if hasattr(p, "to_local") else p
    if hasattr(local, "codes"):
        local.codes.random_(-127, 128)
        local.scales.fill_(0.02 / 73)  # the codes' standard deviation
    elif p.dim() > 1:
        local.normal_(0, 0.02)
    else:
        local.fill_(1)


def optimizers_of(name: str, model: Any) -> list[torch.optim.Optimizer]:
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=LR, fused=True)]
    if name == "torch-muon":
        matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in known]
        return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]
    from foam_hf import FOAM, foam_param_groups

    # Embeddings as in the results: until version 0.3.0 they had the rule of other matrices.
    options = {"embedding_rule": "block"} if name == "foam" else {"second_moment": name}
    return [FOAM(foam_param_groups(model, **options), lr=LR)]


def of_torch(case: Case, config: Any, device: str) -> Running:
    """Under FSDP2 or DDP."""
    from foam_hf import enable_gradient_release

    if case.engine == "fsdp2":
        model: Any = sharded_model(config, device, case.int8, case.own_units)
    else:
        model = whole_model(config, device)
        if not case.release:
            ids = [torch.cuda.current_device()] if device == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    optimizers = optimizers_of(case.optimizer, model)
    if case.release:
        group = dist.group.WORLD if case.engine == "ddp" else None
        enable_gradient_release(model, optimizers[0], process_group=group)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return Running(model, optimizers, torch.Tensor.backward, step)


def of_deepspeed(case: Case, config: Any, batch: int, device: str) -> Running:
    """Under ZeRO, whose config is that of a user: only what DeepSpeed asks for."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # else it compiles C++ for collectives on a CPU
    stage = int(case.engine.removeprefix("zero"))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    model = whole_model(config, device)
    if case.optimizer == "deepspeed-muon":
        settings["optimizer"] = {"type": "Muon", "params": {"lr": LR}}
        for name, p in model.named_parameters():
            p.use_muon = p.dim() == 2 and ".layers." in name
        given: dict[str, Any] = {"model_parameters": list(model.parameters())}
    else:
        given = {"optimizer": optimizers_of(case.optimizer, model)[0]}
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=settings, **given)
    return Running(engine, [given.get("optimizer") or optimizer.optimizer], engine.backward, engine.step)


def measure(name: str, key: dict, steps: int, device: str) -> dict:
    """One row of the results, the same in every process: the slowest one's times, the largest one's bytes."""
    from foam_hf.memory import state_bytes

    case = CASES[name]
    start(device, case.limit_gib)
    cuda = device == "cuda"
    config = config_of(key["model"], key["layers"], key["sequence"])
    if case.engine.startswith("zero"):
        running = of_deepspeed(case, config, key["batch"], device)
    else:
        running = of_torch(case, config, device)
    building = torch.cuda.max_memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ms, of_optimizer = train(running, key, config.vocab_size, steps, device)
    held = sum(map(state_bytes, running.optimizers))
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
    slowest = torch.tensor([statistics.median(ms), statistics.median(of_optimizer)], device=device)
    largest = torch.tensor([held, building, *peaks], device=device)
    for numbers in (slowest, largest):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    step, alone = slowest.tolist()
    sizes = [number if cuda else None for number in largest.tolist()[1:]]
    return {
        "parameters": parameters_of(config),
        "ms": step,
        "optimizer_ms": None if case.release or case.optimizer == "deepspeed-muon" else alone,
        "tokens_per_s": 1000 * key["batch"] * key["sequence"] * key["gpus"] / step,
        "state_bytes_per_gpu": int(largest[0]),
        "building_peak_bytes_per_gpu": sizes[0],
        "peak_bytes_per_gpu": sizes[1],
        "peak_reserved_bytes_per_gpu": sizes[2],
        "limit_bytes": case.limit_gib and int(case.limit_gib * 2**30),
    }


def parameters_of(config: Any) -> int:
    """ZeRO 3 leaves weights without elements between steps, so count those of a model that was not cut."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def train(running: Running, key: dict, vocabulary: int, steps: int, device: str) -> tuple[list[float], list[float]]:
    """Milliseconds of each timed step, and of the optimizers' part of it."""
    tokens = torch.randint(vocabulary, (key["batch"], key["sequence"]), device=device)
    marks: list[Any] = []
    for optimizer in running.optimizers:
        optimizer.register_step_pre_hook(lambda *_: marks.append(now(device)))
        optimizer.register_step_post_hook(lambda *_: marks.append(now(device)))
    ms, of_optimizer = [], []
    for _ in range(WARM_UP + steps):
        marks.clear()
        synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        running.backward(running.model(input_ids=tokens, labels=tokens).loss)
        running.step()
        synchronize(device)
        ms.append(1000 * (time.perf_counter() - begin))
        of_optimizer.append(sum(map(elapsed, marks[::2], marks[1::2])))
    if not all(map(torch.isfinite, [running.model(input_ids=tokens, labels=tokens).loss])):
        raise RuntimeError("the loss is not finite after these steps; expected a number")
    return ms[WARM_UP:], of_optimizer[WARM_UP:]
