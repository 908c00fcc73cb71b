"""Peak memory and speed with INT8 weights in host memory (`Int8Config(offload="cpu")`), and the speed of the bus.

The cases are those of memory_peak.py: true shapes, random weights, the Trainer, a process for each. "resident" cases
are the same without offload. The bus is measured in the process of each case, with the memory of its layers.

    python -m recipes.benchmarks.memory.offload_peak  # on a GPU: all cases
    python -m recipes.benchmarks.memory.offload_peak --cases 8gb-offload,offload,resident --resume
    python -m recipes.benchmarks.memory.offload_peak --device cpu --tiny  # tries the script
"""

import argparse
import resource
import time
from typing import Any

import torch

from recipes.benchmarks.common.harness import Results, add_options, machine_of, names_of, run_alone, run_cases
from recipes.benchmarks.memory.memory_peak import EIGHT, RELEASED, Case, keys_of, measured

DRIVER_GIB = 0.7  # what CUDA itself takes of a card
COPIES = 8  # of each layer's memory, to time the bus
OFFLOADED, LOADED = "int8 offloaded", "loaded offloaded"
LABELS = {OFFLOADED: "INT8 in host memory", LOADED: "INT8 in host memory, from a bf16 checkpoint", "int8": "INT8"}


def _case(model: str, weights: str, sequence: int, batch: int, card_gib: float | None = None) -> Case:
    limit = None if card_gib is None else card_gib - DRIVER_GIB
    label = f"{LABELS[weights]}, foam, gradient release"
    return Case(label, model, weights, "foam", RELEASED, sequence=sequence, batch=batch, limit_gib=limit)


CASES = {
    "8gb-offload": _case(EIGHT, OFFLOADED, 512, 1, card_gib=8),
    "6gb-offload": _case(EIGHT, OFFLOADED, 512, 1, card_gib=6),
    "offload": _case(EIGHT, OFFLOADED, 2048, 1),
    "resident": _case(EIGHT, "int8", 2048, 1),
    "offload4": _case(EIGHT, OFFLOADED, 2048, 4),
    "resident4": _case(EIGHT, "int8", 2048, 4),
    "12gb-14b-offload": _case("qwen2.5-14b", OFFLOADED, 512, 1, card_gib=12),
    "8gb-loaded": _case(EIGHT, LOADED, 512, 1, card_gib=8),
}


def measure(name: str, model_name: str, sequence: int, batch: int, steps: int, device: str) -> dict:
    """A row of memory_peak.py, and what the host holds and the bus does."""
    row, model = measured(CASES[name], model_name, sequence, batch, steps, device)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    visits = getattr(getattr(model.hf_quantizer, "offload", None), "visits", None)
    bus = bus_speed(visits.layers, device) if visits is not None and device == "cuda" else {}
    held = {"host_bytes": visits and visits.host_bytes, "host_peak_bytes": peak}
    return {**row, **held, "layers": visits and len(visits.layers), "bus_GBps": bus}


@torch.no_grad()
def bus_speed(layers: list[Any], device: str) -> dict:
    """GB/s of copies of whole layers to the device, back, and each way while both run."""
    homes = [layer.pages.view(0, torch.Size((layer.nbytes,)), torch.uint8) for layer in layers[:2]]
    there = [torch.empty_like(home, device=device) for home in homes]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    size = sum(home.numel() for home in homes) / len(homes)

    def seconds(*ways: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(COPIES):
            for way in ways:
                with torch.cuda.stream(streams[way]):
                    pair = (there[0], homes[0]) if way == 0 else (homes[1], there[1])
                    pair[0].copy_(pair[1], non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(0, 1)
    speeds = {"to_device": seconds(0), "to_host": seconds(1), "each_of_both": seconds(0, 1)}
    return {name: round(COPIES * size / taken / 1e9, 1) for name, taken in speeds.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES), help="of the default, all")
    parser.add_argument("--steps", type=int, default=4, help="timed, after two that are not")
    parser.add_argument("--tiny", action="store_true", help="tiny models and 16 tokens in place of the true shapes")
    add_options(parser)
    options = parser.parse_args(argv)
    names = names_of(parser, options, "cases", CASES)
    machine = machine_of(options.device)
    print(machine["name"], flush=True)
    results = Results(options.results, "offload_peak", machine)

    def one(key: dict) -> dict:
        return {"label": CASES[key["case"]].label, **run_alone(measure, *key.values(), options.steps, options.device)}

    run_cases(results, keys_of({name: CASES[name] for name in names}, options.tiny), one, options)
    from recipes.benchmarks.memory.offload_report import offload_tables

    print(offload_tables(results.content))
    return results.content


if __name__ == "__main__":
    main()
