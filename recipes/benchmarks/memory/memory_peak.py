"""Peak memory and speed of full fine-tuning under the Hugging Face Trainer: INT8 weights and gradient release.

Models of the true shapes with random weights learn random tokens. A peak is of everything: building the model (INT8
weights come into being one layer at a time, or are read from a bf16 checkpoint), the first steps, the last ones. Every
case runs in a process of its own.

    python -m recipes.benchmarks.memory.memory_peak  # on a GPU: all cases
    python -m recipes.benchmarks.memory.memory_peak --cases 8b-int8-release,7b-bf16-release --resume
    python -m recipes.benchmarks.memory.memory_peak --device cpu --tiny  # tries the script, without peaks
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks.common.harness import (
    Results,
    add_options,
    machine_of,
    names_of,
    run_alone,
    run_cases,
    synchronize,
)
from recipes.benchmarks.speed.training_speed import MODELS as LLAMAS

LLAMAS = LLAMAS | {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
}
QWENS = {
    "qwen2.5-14b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    }
}
ROBERTAS = {
    "roberta-large": {
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "tiny": {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
}
WARM_UP = 2  # steps that do not count: state is made and kernels are compiled
CARD_GIB = 12


@dataclass(frozen=True)
class Case:
    """A model in `weights`, and what TrainingArguments would say.

    `weights`: float32 (under bf16 autocast), bfloat16, int8, or loaded: INT8 read by from_pretrained from bf16 files.
    "int8 offloaded" and "loaded offloaded" keep INT8 weights in host memory.
    """

    label: str
    model: str
    weights: str
    optim: str
    optim_args: str | None = None
    sequence: int = 512
    batch: int = 1
    checkpointing: bool = True
    liger: bool = False
    limit_gib: float | None = None  # no more than this may be allocated
    accumulation: int = 1  # backward passes a step


# Embeddings as in the results: until version 0.3.0 they had the rule of other matrices.
EMBEDDINGS, RELEASE = "fold_embeddings=true,embedding_rule=block", "gradient_release=true"
FOLDED = f"{EMBEDDINGS},fold_head=true"
RELEASED = f"{FOLDED},{RELEASE}"
EIGHT, SEVEN, ONE = "llama-3.1-8b", "llama-7b", "llama-1.1b"
GLUE: dict[str, Any] = {"sequence": 128, "batch": 32, "checkpointing": False}
CASES = {
    "8b-int8-release": Case("INT8, foam, gradient release", EIGHT, "int8", "foam", RELEASED, limit_gib=CARD_GIB),
    "8b-int8-release-liger": Case(
        "INT8, foam, gradient release, Liger", EIGHT, "int8", "foam", RELEASED, liger=True, limit_gib=CARD_GIB
    ),
    "8b-int8-release-accumulation": Case(
        "INT8, foam, gradient release, 4 micro-batches",
        EIGHT,
        "int8",
        "foam",
        RELEASED,
        limit_gib=CARD_GIB,
        accumulation=4,
    ),
    "8b-int8-loaded": Case(
        "INT8 from a bf16 checkpoint, foam, gradient release", EIGHT, "loaded", "foam", RELEASED, limit_gib=CARD_GIB
    ),
    "7b-bf16-release": Case("bf16, foam, gradient release", SEVEN, "bfloat16", "foam", RELEASED),
    "ladder-adamw-mixed": Case("fp32 and bf16 autocast, AdamW", ONE, "float32", "adamw_torch_fused"),
    "ladder-adamw": Case("bf16, AdamW", ONE, "bfloat16", "adamw_torch_fused"),
    "ladder-foam": Case("bf16, foam", ONE, "bfloat16", "foam", FOLDED),
    "ladder-release": Case("bf16, foam, gradient release", ONE, "bfloat16", "foam", RELEASED),
    "ladder-int8": Case("INT8, foam, gradient release", ONE, "int8", "foam", RELEASED),
    "glue-adamw": Case("AdamW", "roberta-large", "float32", "adamw_torch_fused", **GLUE),
    "glue-foam": Case("foam", "roberta-large", "float32", "foam", "fold_embeddings=false", **GLUE),
    "glue-embeddings": Case("foam, fold_embeddings", "roberta-large", "float32", "foam", EMBEDDINGS, **GLUE),
    "glue-release": Case(
        "foam, fold_embeddings, gradient release",
        "roberta-large",
        "float32",
        "foam",
        f"{EMBEDDINGS},{RELEASE}",
        **GLUE,
    ),
    "speed-adamw": Case("bf16, AdamW", EIGHT, "bfloat16", "adamw_torch_fused", sequence=2048),
    "speed-bf16-release": Case("bf16, foam, gradient release", EIGHT, "bfloat16", "foam", RELEASED, sequence=2048),
    "speed-int8-release": Case("INT8, foam, gradient release", EIGHT, "int8", "foam", RELEASED, sequence=2048),
    "speed4-adamw": Case("bf16, AdamW", EIGHT, "bfloat16", "adamw_torch_fused", sequence=2048, batch=4),
    "speed4-int8-release": Case(
        "INT8, foam, gradient release", EIGHT, "int8", "foam", RELEASED, sequence=2048, batch=4
    ),
}


def build(case: Case, model_name: str, sequence: int, device: str):
    """The model with random weights on `device`; INT8 ones never exist in floating point all at once."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    if case.model in ROBERTAS:
        model_class, config = RobertaForSequenceClassification, RobertaConfig(**ROBERTAS[model_name])
    elif model_name in QWENS:
        model_class = Qwen2ForCausalLM
        config = Qwen2Config(**QWENS[model_name], max_position_embeddings=sequence, use_cache=False)
    else:
        model_class = LlamaForCausalLM
        config = LlamaConfig(**LLAMAS[model_name], max_position_embeddings=sequence, use_cache=False)
    kind, _, offloaded = case.weights.partition(" ")
    if kind in ("int8", "loaded"):
        from foam_hf import Int8Config

        quantization = Int8Config(offload="cpu" if offloaded else None)
    if kind == "int8":
        return random_int8_model(config, quantization, device=device)
    if kind == "loaded":
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(model_class, config, Path(folder), device)
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            places = {"quantization_config": quantization, "device_map": {"": device}}
            return model_class.from_pretrained(folder, dtype=torch.bfloat16, **places)
    torch.set_default_dtype(getattr(torch, case.weights))  # no other copy of the weights, not even for a moment
    with torch.device(device):
        model = model_class(config)
    torch.set_default_dtype(torch.float32)
    return model


def random_int8_model(config, quantization_config, *, device="cpu", dtype=torch.bfloat16):
    """A causal model of random weights, INT8 from the start; `dtype` is that of the others and of the arithmetic."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from foam_hf.int8.quantizer import quantize_model_

    with init_empty_weights(include_buffers=False):  # buffers are small, and not every model can fill them later
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return quantize_model_(model, quantization_config, device=device).to(device)


def write_checkpoint(model_class, config, folder: Path, device: str) -> None:
    """Random bf16 weights in files of some 4 GB, as from the hub."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_class(config).named_parameters()}
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    files: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        shard[name] = drawn.fill_(1).cpu() if len(shape) < 2 else drawn.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > 4e9 or name == [*shapes][-1]:
            file = f"model-{len(set(files.values())):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def measure(name: str, model_name: str, sequence: int, batch: int, steps: int, device: str) -> dict:
    """One row of the results."""
    return measured(CASES[name], model_name, sequence, batch, steps, device)[0]


def measured(case: Case, model_name: str, sequence: int, batch: int, steps: int, device: str) -> tuple[dict, Any]:
    """One row of the results, and the model: train WARM_UP + steps steps, and time the latter."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from foam_hf.memory import breakdown  # its import also registers optim="foam"

    class Watch(TrainerCallback):
        """What weights, gradients and state take between backward pass and step, and when each step ended."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
            if state.global_step == 1:  # state is there since the first
                self.held = breakdown(model, optimizer)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            synchronize(device)
            self.ends.append(time.perf_counter())

    watch = Watch()
    cuda = device == "cuda"
    if case.limit_gib is not None and cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.limit_gib * 2**30 / total))
    set_seed(0)
    model = build(case, model_name, sequence, device)
    loading = torch.cuda.max_memory_allocated() if cuda else None
    tokens = torch.randint(3, 100, (batch * case.accumulation * (WARM_UP + steps), sequence))
    classifies = case.model in ROBERTAS
    rows = [{"input_ids": row, "labels": row[0] % 2 if classifies else row} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=case.accumulation,
            learning_rate=1e-5,
            bf16=case.weights == "float32",
            gradient_checkpointing=case.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=case.liger,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not cuda,
            optim=case.optim,
            optim_args=case.optim_args,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[watch])
        trainer.train()
    seconds = [end - start for start, end in zip(watch.ends, watch.ends[1:], strict=False)][WARM_UP - 1 :]
    ms = 1000 * statistics.median(seconds)
    held = watch.held
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": held.weights,
        "gradients_bytes": held.gradients,
        "state_bytes": held.state,
        "loading_peak_bytes": loading,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "limit_bytes": case.limit_gib and int(case.limit_gib * 2**30),
        "ms": ms,
        "tokens_per_s": 1000 * batch * case.accumulation * sequence / ms,
    }
    return row, model


def keys_of(cases: Mapping[str, Case], tiny: bool) -> list[dict]:
    """What tells a row from others: of each case its name, model and tokens."""
    return [
        {
            "case": name,
            "model": "tiny" if tiny else case.model,
            "sequence": 16 if tiny else case.sequence,
            "batch": case.batch,
        }
        for name, case in cases.items()
    ]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES), help="of the default, all")
    parser.add_argument("--steps", type=int, default=4, help=f"timed, after {WARM_UP} that are not")
    parser.add_argument("--peaks-only", action="store_true", help="no times: for a GPU that other work shares")
    parser.add_argument("--tiny", action="store_true", help="tiny models and 16 tokens in place of the true shapes")
    add_options(parser)
    options = parser.parse_args(argv)
    names = names_of(parser, options, "cases", CASES)
    machine = machine_of(options.device)
    print(machine["name"], flush=True)
    results = Results(options.results, "memory_peak", machine)

    def one(key: dict) -> dict:
        row = {"label": CASES[key["case"]].label, **run_alone(measure, *key.values(), options.steps, options.device)}
        if options.peaks_only and row["status"] == "ok":
            row["ms"] = row["tokens_per_s"] = None
        return row

    run_cases(results, keys_of({name: CASES[name] for name in names}, options.tiny), one, options)
    from recipes.benchmarks.memory.memory_report import memory_tables

    print(memory_tables(results.content))
    return results.content


if __name__ == "__main__":
    main()
