"""INT8 weights on this machine: the fused update, dequantization, and linear layers beside bf16 ones.

Each case runs in a process of its own and is held against its floor: the time in which a plain copy moves its bytes.
The update is timed only where its kernel agrees with the plain path, see self_check.py.

    python -m recipes.benchmarks.speed.int8_speed  # on a GPU: everything but the sweep
    # the update's kernel with other tile sizes, to choose from:
    python -m recipes.benchmarks.speed.int8_speed --cases update --sweep
    python -m recipes.benchmarks.speed.int8_speed --device cpu --shapes tiny  # does it run?
"""

import argparse
import statistics

import torch
from torch import nn

from recipes.benchmarks.common.cases import SHAPES, Weights, make_weights
from recipes.benchmarks.common.harness import (
    Results,
    add_options,
    machine_of,
    names_of,
    run_alone,
    run_cases,
    synchronize,
    times,
)
from recipes.benchmarks.common.report_parts import int8_table
from recipes.benchmarks.speed.self_check import check_kernels
from recipes.benchmarks.speed.step_speed import host_ms, move_gradients, temporary_bytes

LR = 1e-5
# label, options of FOAM, whether weights are INT8, environment
UPDATES = {
    "int8": ("level 8", {}, True, {}),
    "int8-nearest": ("level 8, rounding to nearest", {"stochastic_rounding": False}, True, {}),
    "int8-decay": ("level 8, weight decay", {"weight_decay": 0.1}, True, {}),
    "int8-2": ("level 2", {"level": 2}, True, {}),
    "int8-row": ("level row", {"level": "row"}, True, {}),
    "int8-0": ("level 0 (AdamW)", {"level": 0}, True, {}),
    "int8-factored": ("level 8, factored, no kernel", {"second_moment": "factored"}, True, {}),
    "int8-reference": ("level 8, without its kernel", {}, True, {"FOAM_HF_KERNEL": "reference"}),
    "bf16": ("level 8, bf16 weights", {}, False, {}),
}
# Elements of a program, of a warp of it, registers of a thread (0: no limit).
SWEEP = [
    (2048, 512, 0), (2048, 512, 56), (2048, 512, 48), (4096, 512, 0), (4096, 512, 64), (1024, 512, 0),
    (4096, 1024, 0), (4096, 1024, 104), (4096, 1024, 96), (2048, 1024, 0), (2048, 1024, 96), (8192, 1024, 96),
]  # fmt: skip
TOKENS = (512, 2048, 8192)
BF16 = torch.bfloat16


def block_size(shapes: str) -> int:
    return 8 if shapes == "tiny" else 128


def measure_update(case: str, shapes: str, device: str, tile: tuple[int, int, int] | None) -> dict:
    """One optimizer step on the matrices of `shapes`, gradients in bf16."""
    from foam_hf import FOAM
    from foam_hf.int8.weight import Int8Weight
    from foam_hf.memory import state_bytes

    if tile is not None:
        from foam_hf.int8 import block_kernel

        block_kernel.TILE, block_kernel.WARP, block_kernel.REGISTERS = tile[0], tile[1], tile[2] or 255
    _, options, int8, _ = UPDATES[case]
    weights = make_weights(shapes, BF16, device)
    weights.named = {name: p for name, p in weights.named.items() if p.dim() > 1}

    def made(x: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(Int8Weight.from_float(x, block_size(shapes)) if int8 else x)

    def build(some: Weights) -> list[torch.optim.Optimizer]:
        return [FOAM(list(some.named.values()), lr=LR, **options)]

    if not UPDATES[case][3]:  # with kernels
        check_kernels(weights, build, device, made)
    moved = 0
    for name, p in weights.named.items():
        moved += p.grad.nbytes + 2 * p.numel() * (1 if int8 else 2)
        if int8:
            weights.named[name] = made(p.detach())
            weights.named[name].grad = p.grad
            moved += weights.named[name].scales.nbytes
    params = list(weights.named.values())
    (optimizer,) = build(weights)
    optimizer.step()
    synchronize(device)
    before = [p.codes.clone() for p in params[:3]] if int8 else []
    optimizer.step()
    changed = [(p.codes != old).float().mean().item() for p, old in zip(params[:3], before, strict=False)]
    del before
    repeats = int(min(50, max(5, 1000 / max(times(device, optimizer.step, 1)[0], 1e-3))))
    count = sum(p.numel() for p in params)
    return {
        "parameters": count,
        "ms": statistics.median(times(device, optimizer.step, repeats)),
        "ms_moved_gradients": statistics.median(
            times(device, optimizer.step, repeats, before=lambda: move_gradients(weights))
        ),
        "host_ms": host_ms(optimizer.step, device),
        "temporary_bytes_per_param": temporary_bytes(optimizer.step, device) / count if device == "cuda" else None,
        "codes_changed_by_a_step": statistics.mean(changed) if changed else None,
        "floor_bytes": moved + 2 * state_bytes(optimizer),
    }


def measure_dequantization(case: str, rows: int, columns: int, device: str) -> dict:
    """Codes to a new bf16 tensor, with more weights than a cache holds."""
    from foam_hf.int8.weight import Int8Weight

    size = rows * columns
    weights = [
        Int8Weight.from_float(torch.randn(rows, columns, device=device, dtype=BF16), 8 if columns % 128 else 128)
        for _ in range(max(1, (2**30 if device == "cuda" else 1) // size))
    ]

    def all_of_them() -> None:
        for weight in weights:
            weight.dequantize()

    ms = statistics.median(times(device, all_of_them, 20)) / len(weights)
    floor = weights[0].codes.nbytes + weights[0].scales.nbytes + 2 * size
    host = host_ms(all_of_them, device) / len(weights)
    return {"parameters": size, "ms": ms, "host_ms": host, "floor_bytes": floor}


def measure_linears(kind: str, shapes: str, tokens: int, device: str) -> dict:
    """Forward and backward of the linear layers of two layers of `shapes`; memory between the two is the inputs'."""
    from foam_hf.int8.weight import Int8Weight

    _, sizes, _, _ = SHAPES[shapes]
    layers = []
    for rows, columns in [size for size in sizes.values() if len(size) == 2] * 2:
        layer = nn.Linear(columns, rows, bias=False, device=device, dtype=BF16)
        if kind == "int8":
            layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight.detach(), block_size(shapes)))
        layers.append(layer)
    inputs = {c: torch.randn(tokens, c, device=device, dtype=BF16, requires_grad=True) for _, c in sizes_of(layers)}

    def step() -> None:
        for layer in layers:
            layer(inputs[layer.in_features]).sum().backward()
            layer.weight.grad = None

    return {
        "parameters": sum(layer.weight.numel() for layer in layers),
        "ms": statistics.median(times(device, step, 20)),
        "host_ms": host_ms(step, device),
        "temporary_bytes_per_param": None,
    }


def sizes_of(layers: list[nn.Linear]) -> set[tuple[int, int]]:
    return {(layer.out_features, layer.in_features) for layer in layers}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", default="llama-7b", choices=["llama-7b", "tiny"])
    parser.add_argument("--cases", default="update,dequantize,linear")
    parser.add_argument("--sweep", action="store_true", help="time the update of level 8 with other tile sizes")
    add_options(parser)
    options = parser.parse_args(argv)
    device, shapes = options.device, options.shapes
    chosen = names_of(parser, options, "cases", ("update", "dequantize", "linear"))
    machine = machine_of(device)
    print(f"{machine['name']}: a copy moves {machine['copy_GBps']:.0f} GB/s, read and written", flush=True)
    results = Results(options.results, "int8_speed", machine)
    matrices = sorted({size for size in SHAPES[shapes][1].values() if len(size) == 2})
    if shapes != "tiny":
        matrices.append((128256, 4096))
    sweep = {f"level 8, tile {tile}, warp {warp}, registers {limit or 'free'}": (tile, warp, limit)
             for tile, warp, limit in SWEEP}  # fmt: skip
    keys: list[dict] = []
    if "update" in chosen:
        keys += [{"what": "update", "case": label} for label, *_ in UPDATES.values()]
        keys += [{"what": "sweep", "case": label} for label in sweep if options.sweep]
    if "dequantize" in chosen:
        keys += [
            {"what": f"dequantize{how}", "case": f"{rows} x {columns}"}
            for how in ("", ", no kernel")
            for rows, columns in matrices
        ]
    if "linear" in chosen:
        tokens = TOKENS if shapes != "tiny" else (4,)
        keys += [{"what": f"linear, {t} tokens", "case": kind} for t in tokens for kind in ("bf16", "int8")]

    def one(key: dict) -> dict:
        what, case = key["what"], key["case"]
        if what == "update":
            name = next(name for name, (label, *_) in UPDATES.items() if label == case)
            row = run_alone(measure_update, name, shapes, device, None, env=UPDATES[name][3])
        elif what == "sweep":
            row = run_alone(measure_update, "int8", shapes, device, sweep[case])
        elif what.startswith("dequantize"):
            env = {"FOAM_HF_KERNEL": "reference"} if "no kernel" in what else {}
            row = run_alone(measure_dequantization, case, *map(int, case.split(" x ")), device, env=env)
        else:
            row = run_alone(measure_linears, case, shapes, int(what.split()[1]), device)
        if "floor_bytes" in row:
            row["floor_ms"] = row["floor_bytes"] / machine["copy_GBps"] / 1e6
            row["floor_ratio"] = row["ms"] / row["floor_ms"]
        return row

    run_cases(results, keys, one, options)
    print(int8_table(results.content["rows"]))
    return results.content


if __name__ == "__main__":
    main()
