"""Milliseconds of one optimizer step on a CPU, for FOAM and torch's AdamW on the weights of RoBERTa-base.

The optimizers take turns in one process, a step each a round, so that other work on the machine meets all of them; the
least of all rounds is the one that it disturbed least.

    python -m recipes.benchmarks.speed.cpu_step
    python -m recipes.benchmarks.speed.cpu_step --threads 2 --rounds 20 --optimizers foam,adamw-foreach
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from recipes.benchmarks.common.cases import CASES, SHAPES, make_weights
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.common.harness import Results, names_of, probe

DEFAULT = "foam,foam-factored,foam-2,adamw-foreach,adamw-fused"


def measure(shapes: str, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round for each of CASES named, on the same fp32 weights and gradients."""
    weights = make_weights(shapes, torch.float32, "cpu")
    built = {name: CASES[name].build(weights) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, optimizers in built.items():
            start = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            if number:  # the first step makes the state
                found[name].append(1000 * (time.perf_counter() - start))
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", default="roberta-base", choices=list(SHAPES))
    parser.add_argument("--optimizers", default=DEFAULT, help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(argv)
    names = names_of(parser, options, "optimizers", CASES)
    if options.rounds < 1 or options.threads < 1:
        parser.error(f"--rounds {options.rounds} --threads {options.threads}: expected at least 1 of each")
    torch.set_num_threads(options.threads)
    load = round(os.getloadavg()[0], 2)
    results = Results(options.results, "cpu_step", probe("cpu"))
    for name, times in measure(options.shapes, names, options.rounds).items():
        row = {"label": CASES[name].label, "status": "ok", "ms_least": min(times), "ms": statistics.median(times)}
        row |= {"rounds": len(times), "load_before": load}
        results.record({"shapes": options.shapes, "optimizer": name}, row)
        print(f"{row['label']:24} least {row['ms_least']:7.1f} ms, median {row['ms']:7.1f} ms", flush=True)
    print(f"Results: {results.path}")
    return results.content


if __name__ == "__main__":
    main()
