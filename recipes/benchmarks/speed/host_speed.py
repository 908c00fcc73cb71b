"""What a step costs the host: Python and the driver, for many small tensors and for the weights of RoBERTa-base.

`host_ms` is the time until `step` returns while the GPU has nothing else to do, `wall_ms` that of a step among many
that are queued without waiting, `ms` what the GPU's events say of these. Gradients stay where they are, or are other
tensors in every step. The learning rate changes in every step, as a schedule's.

    python -m recipes.benchmarks.speed.host_speed
    PYTHONPATH=OTHER_CHECKOUT python recipes/benchmarks/speed/host_speed.py --label before  # another version
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from recipes.benchmarks.common.cases import CASES, Weights, make_weights
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.common.harness import Results, elapsed, now, probe, synchronize

COLUMNS = 512
MODELS = ("roberta-base fp32", "roberta-base bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Move = Callable[[], None]


def small_tensors(count: int, device: str) -> Weights:
    """So many parameters, every second one a vector."""
    named = {}
    for i in range(count):
        shape = (16, COLUMNS) if i % 2 == 0 else (COLUMNS,)
        named[f"{i}.weight"] = nn.Parameter(torch.randn(shape, device=device))
    for p in named.values():
        p.grad = torch.randn_like(p)
    return Weights(named)


def mover(weights: Weights) -> Move:
    """Gives every weight another gradient than before, of two that it has."""
    others = [(p, [p.grad, p.grad.clone()]) for p in weights.named.values()]

    def move() -> None:
        for p, pair in others:
            p.grad = pair[0] if p.grad is pair[1] else pair[1]

    return move


def measure(weights: Weights, optimizer: str, moved: bool, device: str, repeats: int) -> dict:
    """One row of the results."""
    (built,) = CASES[optimizer].build(weights)
    move: Move = mover(weights) if moved else lambda: None
    alone, marks, steps = [], [], 0

    def prepare() -> None:
        nonlocal steps
        steps += 1
        for group in built.param_groups:
            group["lr"] = 1e-5 / steps
        move()

    for number in range(repeats + 3):
        prepare()
        synchronize(device)
        start = time.perf_counter()
        built.step()
        if number > 2:
            alone.append(1000 * (time.perf_counter() - start))
    synchronize(device)
    start, spent = time.perf_counter(), 0.0
    for _ in range(repeats):
        before = time.perf_counter()
        prepare()
        spent += time.perf_counter() - before
        marks.append((now(device), built.step(), now(device)))
    synchronize(device)
    wall = time.perf_counter() - start - spent
    return {
        "parameters": len(weights.named),
        "host_ms": statistics.median(alone),
        "host_ms_least": min(alone),
        "wall_ms": 1000 * wall / repeats,
        "ms": statistics.median(elapsed(begin, end) for begin, _, end in marks),
        "repeats": repeats,
    }


def made(case: str, device: str) -> Weights:
    if case in MODELS:
        shapes, dtype = case.split()
        return make_weights(shapes, DTYPES[dtype], device)
    return small_tensors(int(case), device)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", default=f"200,2000,{','.join(MODELS)}", help="numbers of tensors, or models")
    parser.add_argument("--optimizers", default="foam,adamw-fused", help=f"of {', '.join(CASES)}")
    parser.add_argument("--label", default="", help="of the rows, to tell versions of foam_hf apart")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(argv)
    cases, optimizers = options.cases.split(","), options.optimizers.split(",")
    for case in cases:
        if case not in MODELS and not (case.isdigit() and int(case) > 1):
            parser.error(f"--cases: got {case!r}; expected a number of tensors above 1, or one of {', '.join(MODELS)}")
    if unknown := [name for name in optimizers if name not in CASES]:
        parser.error(f"--optimizers: got {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected at least 1")
    started = time.monotonic()
    results = Results(options.results, "host_speed", probe(options.device))
    keys = [(case, name, moved) for case in cases for name in optimizers for moved in (False, True)]
    for case, name, moved in keys:
        if time.monotonic() - started > options.budget_s:
            print("--budget-s is over")
            break
        key = {"label": options.label, "case": case, "optimizer": name, "moved_gradients": moved}
        try:
            row = {"status": "ok", **measure(made(case, options.device), name, moved, options.device, options.repeats)}
            said = ", ".join(f"{each} {row[each]:.3f}" for each in ("host_ms", "host_ms_least", "wall_ms", "ms"))
        except Exception as error:  # one case must not cost the others
            traceback.print_exc()
            row, said = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}, "failed"
        results.record(key, row)
        print(f"{options.label} {case} {name}{', gradients moved' if moved else ''}: {said}", flush=True)
    print(f"Results: {results.path}")
    return results.content


if __name__ == "__main__":
    main()
