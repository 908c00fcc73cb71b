"""Tokens a second and peak memory of whole training steps under the Hugging Face Trainer, with FOAM and its peers.

LLaMA-shaped models with random bf16 weights learn random tokens, with gradient checkpointing. Every optimizer runs in
a process of its own; one that runs out of memory is reported so. FOAM is timed only where its kernels agree with its
plain path, see self_check.py.

    python -m recipes.benchmarks.speed.training_speed  # on a GPU: all models and optimizers
    python -m recipes.benchmarks.speed.training_speed --models llama-7b --sequences 2048 --optimizers foam,adamw-fused
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from recipes.benchmarks.common.harness import (
    Results,
    add_options,
    elapsed,
    machine_of,
    names_of,
    now,
    run_alone,
    run_cases,
    synchronize,
)
from recipes.benchmarks.speed.self_check import check_optimizer

# LlamaConfig's fields.
MODELS = {
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
    },
}
WARM_UP = 2  # steps that do not count: state is made and kernels are compiled


@dataclass(frozen=True)
class Case:
    """What a user would write into TrainingArguments; `flash` alone has no name there."""

    label: str
    arguments: dict[str, Any] = field(default_factory=dict)
    flash: bool = False


PLAIN = "fold_embeddings=false,fold_head=false"  # as when these were measured
BLOCKS = "embedding_rule=block"  # the same
APOLLO = {"optim": "apollo_adamw", "optim_target_modules": ["self_attn", "mlp"]}
CASES = {
    "foam": Case("foam, level 8", {"optim": "foam", "optim_args": PLAIN}),
    "foam-factored": Case(
        "foam, level 8, factored", {"optim": "foam", "optim_args": f"second_moment=factored,{PLAIN}"}
    ),
    "foam-embeddings": Case(
        "foam, level 8, embeddings too", {"optim": "foam", "optim_args": f"fold_head=false,{BLOCKS}"}
    ),
    "adamw-fused": Case("adamw_torch_fused", {"optim": "adamw_torch_fused"}),
    "adamw-8bit": Case("adamw_8bit (bitsandbytes)", {"optim": "adamw_8bit"}),
    "adafactor": Case("adafactor", {"optim": "adafactor"}),
    "apollo": Case("apollo_adamw, rank 256", {**APOLLO, "optim_args": "rank=256,scale=1.0,scale_type=channel"}),
    "flash": Case("FlashAdamW, 24-bit master weights", flash=True),
    "foam-mini": Case("foam_mini", {"optim": "foam_mini", "optim_args": BLOCKS}),
}


def measure(model_name: str, sequence: int, batch: int, name: str, steps: int, device: str) -> dict:
    """One row of the results: train WARM_UP + steps steps, and time the latter."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from foam_hf.memory import state_bytes  # its import also registers optim="foam"

    class Clock(TrainerCallback):
        """When each step ended, and how long the optimizer took of it."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.optimizer: list[float] = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
            self.start = now(device)

        def on_optimizer_step(self, args, state, control, **kwargs) -> None:
            self.end = now(device)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            synchronize(device)
            self.ends.append(time.perf_counter())
            self.optimizer.append(elapsed(self.start, self.end))

    set_seed(0)
    config = LlamaConfig(**MODELS[model_name], max_position_embeddings=sequence, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)  # no fp32 copy of the weights, not even for a moment
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    tokens = torch.randint(config.vocab_size, (batch * (WARM_UP + steps), sequence))
    case, clock = CASES[name], Clock()
    optimizer = {}
    if case.flash:
        from flashoptim import FlashAdamW

        optimizer["optimizer_cls_and_kwargs"] = (FlashAdamW, {"lr": 1e-5})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            **case.arguments,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[clock], **optimizer)
        if case.arguments.get("optim", "").startswith("foam"):
            check_optimizer(trainer.create_optimizer(), model, device)
        trainer.train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)][WARM_UP - 1 :]
    ms = 1000 * statistics.median(seconds)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": ms,
        "tokens_per_s": 1000 * batch * sequence / ms,
        "optimizer_ms": statistics.median(clock.optimizer[WARM_UP:]),
        "optimizer_share": statistics.median(clock.optimizer[WARM_UP:]) / ms,
        "state_bytes": state_bytes(trainer.optimizer),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--models", default="llama-1.1b,llama-7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--sequences", default="1024,2048", help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--optimizers", default=",".join(CASES), help="of the default, all")
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP} that are not")
    add_options(parser)
    options = parser.parse_args(argv)
    known = {"models": MODELS, "optimizers": CASES}
    chosen = {kind: names_of(parser, options, kind, names) for kind, names in known.items()}
    machine = machine_of(options.device)
    print(machine["name"], flush=True)
    results = Results(options.results, "training_speed", machine)

    def one(key: dict) -> dict:
        return {
            "label": CASES[key["optimizer"]].label,
            **run_alone(measure, *key.values(), options.steps, options.device),
        }

    keys = [
        {"model": model, "sequence": int(sequence), "batch": options.batch, "optimizer": name}
        for model in chosen["models"]
        for sequence in options.sequences.split(",")
        for name in chosen["optimizers"]
    ]
    run_cases(results, keys, one, options)
    from recipes.benchmarks.speed.report import training_tables

    print(training_tables(results.content))
    return results.content


if __name__ == "__main__":
    main()
