"""Milliseconds, memory and first-step time of one optimizer step, for FOAM and its peers on this machine.

Every optimizer runs in a process of its own. FOAM's kernels are timed only where they agree with its plain path, see
self_check.py. A step is held against its floor: the time in which a plain copy moves
the bytes that the step must move.

    python -m recipes.benchmarks.speed.step_speed  # on a GPU: all shapes
    python -m recipes.benchmarks.speed.step_speed --shapes roberta-base --dtypes fp32 --optimizers foam,adamw-fused
    python -m recipes.benchmarks.speed.step_speed --device cpu --shapes roberta-base --dtypes fp32 \\
        --optimizers foam,adamw-foreach
"""

import argparse
import shutil
import statistics
import tempfile
import time

import torch

from recipes.benchmarks.common.cases import CASES, GAP, SHAPES, Weights, make_weights, skip_first_projection
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
from recipes.benchmarks.speed.self_check import check_kernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def floor_bytes(weights: Weights, state: int) -> int:
    """The bytes that a step must move: weight read and written, gradient read, state read and written.

    A parameter of FOAM at level L costs w + w + g + 2 * (2 * 4 / 2**L), as its state is two fp32 values a block; of
    the factored rule one such value and a row's and a column's share; of AdamW w + w + g + 2 * 2 * w. The state is
    measured, so this one line is the formula of every optimizer.
    """
    return sum(p.numel() * 2 * p.element_size() + p.grad.nbytes for p in weights.named.values()) + 2 * state


def first_step(shapes: str, dtype: str, name: str, device: str) -> dict:
    """Seconds of the very first step: state made, kernels compiled or found in the cache."""
    weights = make_weights(shapes, DTYPES[dtype], device)
    optimizers = CASES[name].build(weights)
    prepare(name, optimizers)
    synchronize(device)
    return {"first_step_s": first_call(optimizers, device)}


def check(shapes: str, dtype: str, name: str, device: str) -> dict:
    """Nothing, if the kernels are right on this machine."""
    if CASES[name].checked:
        check_kernels(make_weights(shapes, DTYPES[dtype], device), CASES[name].build, device)
    return {}


def prepare(name: str, optimizers: list) -> None:
    if name == "galore":
        skip_first_projection(optimizers[0])


def first_call(optimizers: list, device: str) -> float:
    start = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    synchronize(device)
    return time.perf_counter() - start


def measure(shapes: str, dtype: str, name: str, device: str) -> dict:
    """One row of the results, without what needs the copy speed."""
    from foam_hf.memory import state_bytes

    case = CASES[name]
    weights = make_weights(shapes, DTYPES[dtype], device)
    count = sum(p.numel() for p in weights.named.values())
    optimizers = case.build(weights)
    prepare(name, optimizers)
    synchronize(device)
    seconds = first_call(optimizers, device)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    estimate = max(times(device, step, repeats=1)[0], 1e-3)
    repeats = int(min(100, max(7, 1000 / estimate)))
    row = {
        "parameters": count,
        "ms": statistics.median(times(device, step, repeats)),
        "ms_moved_gradients": statistics.median(times(device, step, repeats, before=lambda: move_gradients(weights))),
        "host_ms": host_ms(step, device),
        "repeats": repeats,
        "first_step_s": seconds,
        "temporary_bytes_per_param": temporary_bytes(step, device) / count if device == "cuda" else None,
    }
    state = sum(map(state_bytes, optimizers))
    row |= {"state_bytes_per_param": state / count, "floor_bytes": floor_bytes(weights, state)}
    if case.refreshes:
        del optimizers, step
        row["ms_between_refreshes"], row["refresh_ms"] = row["ms"], refresh_ms(name, weights, device)
        row["ms"] += row["refresh_ms"] / GAP
    return row


def move_gradients(weights: Weights) -> None:
    """Give every weight the gradient of another of its shape: in training every step's gradients are new tensors."""
    by_size: dict[torch.Size, list] = {}
    for p in weights.named.values():
        by_size.setdefault(p.shape, []).append(p)
    for params in by_size.values():
        grads = [p.grad for p in params]
        for p, grad in zip(params, [*grads[1:], grads[0]], strict=True):
            p.grad = grad


def host_ms(step, device: str) -> float:
    """What Python takes to launch a step while the GPU has nothing else to do."""
    found = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        step()
        found.append(1000 * (time.perf_counter() - start))
    synchronize(device)
    return statistics.median(found)


def temporary_bytes(step, device: str) -> int:
    """The most that a step holds beyond what it found allocated."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def refresh_ms(name: str, weights: Weights, device: str) -> float:
    """What refreshing all projections adds to a step: measured on one matrix of each shape, times their number."""
    torch.linalg.svd(torch.randn(64, 64, device=device))  # loads the solver
    total = 0.0
    for shape in {p.shape for p in weights.matrices}:
        same = [p for p in weights.matrices if p.shape == shape]
        (optimizer,) = CASES[name].build(Weights({"matrix": same[0]}, weights.heads))
        with_refresh = 1000 * first_call([optimizer], device)
        usual = statistics.median(1000 * first_call([optimizer], device) for _ in range(3))
        if with_refresh < 1000:  # short enough that the first launch of its kernels would count: again, warm
            optimizer.state[same[0]]["step"] = GAP
            with_refresh = 1000 * first_call([optimizer], device)
        total += len(same) * max(0.0, with_refresh - usual)
    return total


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", default="llama-7b,roberta-base,qwen2.5-0.5b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--optimizers", default=",".join(CASES), help="of the default, all")
    add_options(parser)
    options = parser.parse_args(argv)
    known = {"shapes": SHAPES, "dtypes": DTYPES, "optimizers": CASES}
    chosen = {kind: names_of(parser, options, kind, names) for kind, names in known.items()}
    device = options.device
    machine = machine_of(device)
    print(f"{machine['name']}: a copy moves {machine['copy_GBps']:.0f} GB/s, read and written", flush=True)
    results = Results(options.results, "step_speed", machine)

    def one(key: dict) -> dict:
        case, args = CASES[key["optimizer"]], (*key.values(), device)
        cache = tempfile.mkdtemp()  # empty, so that the first step compiles
        env = {**case.env, "TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        try:
            row = run_alone(check, *args, env=case.env)  # apart from the cache, which must be empty
            if row["status"] == "ok":
                row = run_alone(measure, *args, env=env)
            row = {"label": case.label, **row}
            if row["status"] == "ok" and case.compiles and device == "cuda":
                row["first_step_cached_s"] = run_alone(first_step, *args, env=env).get("first_step_s")
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        if row["status"] == "ok":
            row["copy_GBps"] = machine["copy_GBps"]
            row["floor_ms"] = row["floor_bytes"] / row["copy_GBps"] / 1e6
            row["floor_ratio"] = row["ms"] / row["floor_ms"]
        return row

    keys = [
        {"shapes": shapes, "dtype": dtype, "optimizer": name}
        for shapes in chosen["shapes"]
        for dtype in chosen["dtypes"]
        for name in chosen["optimizers"]
        if dtype in CASES[name].dtypes
        and (not CASES[name].embedding or any("embed" in outside for outside in SHAPES[shapes][2]))
    ]
    run_cases(results, keys, one, options)
    from recipes.benchmarks.speed.report import step_tables

    print(step_tables(results.content))
    return results.content


if __name__ == "__main__":
    main()
