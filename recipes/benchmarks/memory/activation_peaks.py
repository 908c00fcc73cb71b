"""The peak of a training step as `foam-hf estimate` predicts it, against what a GPU allocates, under Trainer.

Models of true shapes with random weights, built on the GPU from their configs; all cases in one process, in minutes.

    # on a GPU: all cases; --resume goes on where a run was cut off:
    python -m recipes.benchmarks.memory.activation_peaks
    # every case at a tiny size, nothing measured: does it run?
    python -m recipes.benchmarks.memory.activation_peaks --device cpu --tiny
"""

import argparse
import gc
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import foam_hf
from foam_hf.int8.weight import Int8Weight
from foam_hf.memory import breakdown, format_bytes
from foam_hf.planner.activations import activation_bytes, optimizer_temporary_bytes
from foam_hf.planner.counting import count_bytes
from foam_hf.planner.meta_models import meta_model
from foam_hf.planner.model_configs import load_config
from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.common.harness import Results, add_options, probe

ACCURACY = Path(foam_hf.__file__).parent / "planner" / "accuracy.json"  # which foam-hf estimate quotes
STEPS = 3  # the first one makes the state, and is not measured
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000, "layer_types": ["full_attention"] * 2, "max_window_layers": 2}


@dataclass(frozen=True)
class Case:
    """One training run. `step` are settings of `activation_bytes`, which Trainer gets in its own words."""

    model: str
    batch: int
    sequence: int
    optim: str = "foam"
    dtype: str = "bfloat16"
    step: dict[str, Any] = field(default_factory=dict)
    int8: bool = False


CHECKPOINTING = {"gradient_checkpointing": True}
AUTOCAST = {"autocast": "bfloat16"}
CASES = {
    "llama-350m": Case("llama-350m", 16, 256),
    "llama-350m, 1024 tokens": Case("llama-350m", 8, 1024, "adamw_torch_fused"),
    "llama-350m, accumulation": Case("llama-350m", 8, 256, step={"accumulation": True}),
    "llama-1b": Case("llama-1b", 4, 1024),
    "llama-1b, checkpointing": Case("llama-1b", 8, 2048, step=CHECKPOINTING),
    "llama-1b, eager attention": Case("llama-1b", 2, 1024, step={"attention": "eager"}),
    "llama-1b, padded": Case("llama-1b", 4, 1024, step={"padding": True}),
    "llama-1b, foreach AdamW": Case("llama-1b", 1, 128, "adamw_torch", step=CHECKPOINTING),
    "llama-1b, gradient release": Case("llama-1b", 1, 512, step={**CHECKPOINTING, "gradient_release": True}),
    "llama-7b, checkpointing": Case("llama-7b", 1, 2048, step=CHECKPOINTING),
    "llama-3.1-8b, INT8, release": Case(
        "llama-3.1-8b", 1, 512, step={**CHECKPOINTING, "gradient_release": True}, int8=True
    ),
    "qwen2.5-0.5b": Case("qwen2.5-0.5b", 8, 512),
    "qwen2.5-0.5b, padded": Case("qwen2.5-0.5b", 8, 512, "adamw_torch_fused", step={"padding": True}),
    "qwen2.5-0.5b, checkpointing": Case("qwen2.5-0.5b", 4, 2048, "adamw_torch_fused", step=CHECKPOINTING),
    "qwen2.5-0.5b, autocast": Case("qwen2.5-0.5b", 4, 512, "adamw_torch_fused", "float32", AUTOCAST),
    "roberta-base, fp32": Case("roberta-base", 16, 128, "adamw_torch_fused", "float32"),
    "roberta-base, autocast": Case("roberta-base", 32, 128, dtype="float32", step=AUTOCAST),
    "roberta-large, padded": Case("roberta-large", 16, 512, dtype="float32", step={**AUTOCAST, "padding": True}),
    "roberta-large, bf16": Case("roberta-large", 16, 512),
    "roberta-large, eager attention": Case("roberta-large", 8, 512, step={"attention": "eager"}),
    "roberta-large, one sequence": Case("roberta-large", 1, 128, "adamw_torch_fused"),
}


def optim_args(case: Case, gradient_release: bool = False) -> str | None:
    """FOAM's as these runs were measured: version 0.1.0 kept embeddings and heads plain."""
    if case.optim != "foam":
        return None
    return "fold_embeddings=false,fold_head=false" + (",gradient_release=true" if gradient_release else "")


def build(case: Case, device: str, tiny: bool) -> torch.nn.Module:
    config = load_config(case.model)
    if tiny:
        for name, value in TINY.items():
            if hasattr(config, name):
                setattr(config, name, value)
    dtype = getattr(torch, case.dtype)
    model_class = type(meta_model(config, dtype=dtype))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no float32 copy of the weights, not even for a moment
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    if "attention" in case.step:
        model.set_attn_implementation(case.step["attention"])
    if case.int8:
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(Int8Weight.from_float(module.weight, 64 if tiny else 128))
    return model


def predict(case: Case, tiny: bool) -> dict[str, Any]:
    """The bytes by kind, from the meta device alone."""
    model = build(case, "meta", tiny)
    batch, sequence = size(case, tiny)
    started = time.perf_counter()
    activations = activation_bytes(model, batch, sequence, **case.step).bytes
    seconds = time.perf_counter() - started
    activations = max(activations, optimizer_temporary_bytes(model, case.optim, optim_args(case)))
    counted = count_bytes(
        model, case.optim, optim_args(case), gradient_release=case.step.get("gradient_release", False)
    )
    kinds = {kind: getattr(counted, kind) for kind in ("weights", "gradients", "state")} | {"activations": activations}
    return {**kinds, "total": sum(kinds.values()), "seconds": round(seconds, 2)}


def size(case: Case, tiny: bool) -> tuple[int, int]:
    return (min(case.batch, 2), 32) if tiny else (case.batch, case.sequence)


def train(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """The bytes by kind of the second and third step, as the GPU's allocator counts them."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    on_gpu = device == "cuda"

    class Meter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if on_gpu and state.global_step == 1:
                torch.cuda.reset_peak_memory_stats()

        def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs) -> None:
            self.measured = breakdown(model, optimizer)  # gradients are there still

    set_seed(0)
    model, meter = build(case, device, tiny), Meter()
    (batch, sequence), step = size(case, tiny), case.step
    passes = 2 if step.get("accumulation") else 1
    classifies = "Classification" in type(model).__name__
    rows = []
    for index in range(STEPS * passes * batch):
        tokens = torch.randint(3, 900, (sequence,))
        mask = torch.ones_like(tokens)
        if step.get("padding"):
            mask[sequence - 1 - index % 4 :] = 0
        row = {"input_ids": tokens, "attention_mask": mask, "labels": 0 if classifies else tokens}
        rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=passes,
            gradient_checkpointing=step.get("gradient_checkpointing", False),
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16="autocast" in step,
            optim=case.optim,
            optim_args=optim_args(case, gradient_release=bool(step.get("gradient_release"))),
            learning_rate=1e-5,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not on_gpu,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[meter])
        trainer.train()
    kinds = {kind: getattr(meter.measured, kind) for kind in ("weights", "gradients", "state")}
    if not on_gpu:
        return {**kinds, "activations": None, "total": None}
    peak, free, total = torch.cuda.max_memory_allocated(), *torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        **kinds,
        "activations": peak - sum(kinds.values()),
        "total": peak,
        "reserved": torch.cuda.max_memory_reserved(),
        "outside_of_torch": total - free - reserved,  # the CUDA context, and whatever else is on the GPU
    }


def clean() -> int:
    """Forget the last case; the bytes that stay allocated."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    row = {name: getattr(case, name) for name in ("model", "optim", "dtype", "int8", "step")}
    row["batch"], row["sequence"] = size(case, tiny)
    try:
        row["held_before"] = clean() if device == "cuda" else None
        row["predicted"] = predict(case, tiny)
        row["measured"] = train(case, device, tiny)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {
            **row,
            "status": "does not fit" if isinstance(error, torch.OutOfMemoryError) else "failed",
            "reason": reason,
        }
    predicted, measured = row["predicted"]["total"], row["measured"]["total"]
    return {**row, "status": "ok", "error": None if measured is None else predicted / measured - 1}


def table(rows: list[dict]) -> str:
    """Markdown; the error is the prediction's, of the whole peak."""
    header = ["case", "batch x tokens", "optimizer", "measured peak", "of it activations", "predicted peak", "error"]
    lines = [header, ["---", "---", "---", "---:", "---:", "---:", "---:"]]
    for row in rows:
        if row["status"] != "ok":
            continue
        measured, predicted = row["measured"], row["predicted"]
        error = "" if row["error"] is None else f"{100 * row['error']:+.1f}%"
        shape = f"{row['batch']} x {row['sequence']}"
        numbers = [measured["total"], measured["activations"], predicted["total"]]
        lines.append([row["case"], shape, row["optim"], *map(format_bytes, numbers), error])
    failed = [f"* {row['case']}: {row['status']}. {row['reason']}" for row in rows if row["status"] != "ok"]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(["", *failed] if failed else [])])


def quoted(folder: Path) -> dict:
    """What `foam-hf estimate` says of its errors: those of all runs on GPUs whose results are in `folder`."""
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("activation_peaks-nvidia-*.json")]
    errors = [abs(row["error"]) for run in measured for row in run["rows"] if row.get("error") is not None]
    machines = sorted({run["machine"]["name"] for run in measured})
    return {"largest_error": max(errors), "runs": len(errors), "machines": machines}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--cases", default=None, help=f"separated by semicolons, of: {'; '.join(CASES)} (default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="every model in a tiny size")
    add_options(parser)
    options = parser.parse_args(argv)
    chosen = options.cases.split(";") if options.cases else list(CASES)
    unknown = [name for name in map(str.strip, chosen) if name not in CASES]
    if unknown:
        parser.error(f"--cases: unknown {'; '.join(unknown)}; expected some of {'; '.join(CASES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no cuda device to measure on; expected a GPU, or --device cpu --tiny")
    machine = probe(options.device)
    print(f"{machine['name']}, foam_hf {foam_hf.__version__}", flush=True)
    results, started = Results(options.results, "activation_peaks", machine), time.monotonic()
    for name in map(str.strip, chosen):
        key = {"case": name}
        if options.resume and results.has(key):
            continue
        if time.monotonic() - started > options.budget_s:
            print("--budget-s is over; add --resume to go on")
            break
        row = measure(CASES[name], options.device, options.tiny)
        results.record(key, row)
        said = (
            row.get("reason")
            or f"{format_bytes(row['measured']['total'])}, predicted {format_bytes(row['predicted']['total'])}"
        )
        print(f"{time.monotonic() - started:6.1f} s  {name}: {row['status']}, {said}", flush=True)
    rows = results.content["rows"]
    errors = [abs(row["error"]) for row in rows if row.get("error") is not None]
    print(f"\n{table(rows)}\n\nResults: {results.path}")
    if errors:
        print(f"error: at most {100 * max(errors):.1f}%, mean {100 * math.fsum(errors) / len(errors):.1f}%")
    if errors and options.results == RESULTS:
        write_json(ACCURACY, quoted(RESULTS))
    return results.content


if __name__ == "__main__":
    main()
