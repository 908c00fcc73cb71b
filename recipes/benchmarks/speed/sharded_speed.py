"""FOAM and fused AdamW on a LLaMA-shaped model under FSDP2: the optimizer's step, tokens a second, peak bytes a GPU.

Random bf16 weights learn random tokens, with gradient checkpointing; every decoder layer is a unit of FSDP2. Start it
once for each number of GPUs; rows of all of them go into one file, and the last column compares with one GPU.

    torchrun --standalone --nproc_per_node 2 -m recipes.benchmarks.speed.sharded_speed
    torchrun --standalone --nproc_per_node 2 -m recipes.benchmarks.speed.sharded_speed --device cpu \\
        --model tiny --sequence 16
"""

import argparse
import gc
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.common.harness import Results, elapsed, names_of, now, probe, synchronize
from recipes.benchmarks.common.report_parts import sharded_table
from recipes.benchmarks.speed.training_speed import MODELS

WARM_UP = 2  # steps that do not count: state is made and kernels are compiled
OPTIMIZERS = {
    "foam": "foam, level 8",
    "foam-factored": "foam, level 8, factored",
    "adamw-fused": "torch AdamW, fused",
}


def make_model(name: str, sequence: int, device: str) -> torch.nn.Module:
    """A model of random bf16 weights, of which each process allocates its shard alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    config = LlamaConfig(**MODELS[name], max_position_embeddings=sequence, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().normal_(0, 0.02) if p.dim() > 1 else p.to_local().fill_(1)
    # Its buffers are not in the shards, and to_empty has lost them.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train()


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "adamw-fused":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    from foam_hf import FOAM, foam_param_groups

    groups = foam_param_groups(model, fold_embeddings=False, fold_head=False)  # as when these were measured
    return FOAM(groups, lr=1e-5, second_moment="factored" if name == "foam-factored" else "block")


def measure(key: dict, steps: int, device: str) -> dict:
    from foam_hf.memory import state_bytes

    model = make_model(key["model"], key["sequence"], device)
    optimizer = make_optimizer(key["optimizer"], model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(MODELS[key["model"]]["vocab_size"], (key["batch"], key["sequence"]), device=device)
    ms, of_optimizer = [], []
    for _ in range(WARM_UP + steps):
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        before = now(device)
        optimizer.step()
        after = now(device)
        optimizer.zero_grad()
        synchronize(device)
        ms.append(1000 * (time.perf_counter() - start))
        of_optimizer.append(elapsed(before, after))
    slowest = torch.tensor([statistics.median(ms[WARM_UP:]), statistics.median(of_optimizer[WARM_UP:])], device=device)
    largest = torch.tensor(
        [state_bytes(optimizer), torch.cuda.max_memory_allocated() if device == "cuda" else 0], device=device
    )
    for numbers in (slowest, largest):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    step, alone = slowest.tolist()
    return {
        "status": "ok",
        "label": OPTIMIZERS[key["optimizer"]],
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": step,
        "optimizer_ms": alone,
        "tokens_per_s": 1000 * key["batch"] * key["sequence"] * key["gpus"] / step,
        "state_bytes_per_gpu": int(largest[0]),
        "peak_bytes_per_gpu": int(largest[1]) if device == "cuda" else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="llama-7b", choices=list(MODELS))
    parser.add_argument("--sequence", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step on each GPU")
    parser.add_argument("--optimizers", default="foam,adamw-fused", help=f"of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP} that are not")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(argv)
    chosen = names_of(parser, options, "optimizers", OPTIMIZERS)
    if "LOCAL_RANK" not in os.environ:
        parser.error("not started by torchrun; expected torchrun --standalone --nproc_per_node GPUS sharded_speed.py")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A process that runs out of memory leaves the others waiting: not for half an hour.
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo", timeout=timedelta(minutes=3))
    main_process = dist.get_rank() == 0
    results = Results(options.results, "sharded_speed", probe(options.device)) if main_process else None
    dist.barrier()
    for name in chosen:
        key = {
            "model": options.model,
            "sequence": options.sequence,
            "batch": options.batch,
            "optimizer": name,
            "gpus": dist.get_world_size(),
        }
        row = measure(key, options.steps, options.device)
        if results is not None:
            results.record(key, row)
            print(f"{name}: {row['optimizer_ms']:.3f} ms the optimizer, {row['ms']:.3f} ms a step", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if results is not None:
        print(sharded_table(results.content["rows"]), f"Results: {results.path}", sep="\n")
    dist.destroy_process_group()
    if options.device == "cpu":  # gloo's threads may abort the interpreter's end (pytorch pull request 179291)
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
