"""FOAM and its rivals on LLaMA-shaped models on several GPUs: the optimizer's step, tokens a second, bytes a GPU.

Random bf16 weights learn random tokens, with gradient checkpointing, under FSDP2, DDP and DeepSpeed's ZeRO. Every case
is a group of processes of its own, which is ended if it fails or takes too long. First the kernels are checked.

    python -m recipes.benchmarks.speed.sharded_speed --gpus 1,2 --budget-s 400  # --resume goes on from there
    python -m recipes.benchmarks.speed.sharded_speed --cases fsdp2-foam,zero2-foam --gpus 2 --layers 32
    python -m recipes.benchmarks.speed.sharded_speed --device cpu --model tiny --layers 2 --sequence 16 --gpus 2
"""

import argparse

import torch

from recipes.benchmarks.common.cases import CASES as STEPS
from recipes.benchmarks.common.cases import make_weights
from recipes.benchmarks.common.groups import run_group, start_server
from recipes.benchmarks.common.harness import Results, add_options, machine_of, names_of, run_alone, run_cases
from recipes.benchmarks.common.report_parts import sharded_table
from recipes.benchmarks.memory.memory_peak import LLAMAS
from recipes.benchmarks.speed.self_check import check_kernels
from recipes.benchmarks.speed.sharded_engines import CASES, WARM_UP, environment_of, measure

PRELOAD = "torch,transformers.models.llama.modeling_llama"


def checked(device: str) -> dict:
    """Whether the kernels that the cases use agree with the plain path on this machine; RuntimeError if not."""
    weights = make_weights("llama-7b" if device == "cuda" else "tiny", torch.bfloat16, device)
    check_kernels(weights, STEPS["foam"].build, device)
    return {"ms": None}


def keys_of(options: argparse.Namespace, names: list[str], numbers: list[int]) -> list[dict]:
    """The cases, all of one number of GPUs before the next number."""
    tiny = options.model == "tiny"
    return [
        {
            "case": name,
            "model": options.model if tiny else case.model or options.model,
            "layers": options.layers if case.model is None or tiny else LLAMAS[case.model]["num_hidden_layers"],
            "sequence": options.sequence if tiny else case.sequence or options.sequence,
            "batch": case.batch or options.batch,
            "gpus": gpus,
        }
        for gpus in numbers
        for name, case in ((name, CASES[name]) for name in names)
        if gpus in case.gpus
    ]


def numbers_of(parser: argparse.ArgumentParser, text: str, names: list[str]) -> list[int]:
    """The numbers of GPUs that `text` lists; the parser's error if no case of `names` is of one of them."""
    known = sorted({gpus for name in names for gpus in CASES[name].gpus})
    if unknown := [number for number in text.split(",") if number.strip() not in map(str, known)]:
        parser.error(f"--gpus: no case for {', '.join(unknown)}; expected some of {', '.join(map(str, known))}")
    return [int(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES), help="of the default, all")
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, in this order")
    parser.add_argument("--model", default="llama-7b", choices=list(LLAMAS))
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, of cases without a model of their own")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step on each GPU")
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP} that are not")
    parser.add_argument("--case-s", type=float, default=60, help="a case that takes longer is ended")
    parser.add_argument("--preload", default=PRELOAD, help="modules that are imported once for all processes")
    add_options(parser)
    options = parser.parse_args(argv)
    names = names_of(parser, options, "cases", CASES)
    numbers = numbers_of(parser, options.gpus, names)
    device = options.device
    start_server([name for name in options.preload.split(",") if name])
    machine = machine_of(device)
    print(machine["name"], flush=True)
    check = run_alone(checked, device, timeout=120)
    print(f"the kernels agree with the plain path: {check['status']} {check.get('reason', '')}", flush=True)
    if check["status"] == "failed":
        raise SystemExit("nothing is timed")
    results = Results(options.results, "sharded_speed", machine)

    def one(key: dict) -> dict:
        name = key["case"]
        group = {"world": key["gpus"], "device": device, "timeout": options.case_s}
        row = run_group(measure, name, key, options.steps, device, **group, env=environment_of(CASES[name]))
        return {"label": CASES[name].label, **row}

    run_cases(results, keys_of(options, names, numbers), one, options)
    print(sharded_table(results.content["rows"]))
    return results.content


if __name__ == "__main__":
    main()
