"""Memory through a training step by kind, as measured on a GPU: `python step_memory.py --figure step_memory.png`

A model of random weights learns random tokens under Trainer; foam_hf.OptimizerMemoryCallback draws its second step and
prints what was measured beside what was predicted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

DEFAULT = "fold_embeddings=false,fold_head=false"


def train(options: argparse.Namespace, use_cpu: bool = False) -> None:
    """Three steps of the model that `options` names; the callback draws."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    from foam_hf import OptimizerMemoryCallback
    from foam_hf.planner.model_configs import load_config

    set_seed(0)
    config = load_config(options.model)
    config.use_cache = False
    with torch.device("cpu" if use_cpu else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (3 * options.batch, options.seq))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=options.batch,
            optim=options.optim,
            optim_args=options.optim_args,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=use_cpu,
            **({"gradient_checkpointing": True} if options.gradient_checkpointing else {}),
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model, args, train_dataset=rows, callbacks=[OptimizerMemoryCallback(plot=options.figure)]).train()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--figure", type=Path, required=True, help="picture to draw: .png, .pdf or .svg")
    parser.add_argument("--model", default="llama-1b", help="as foam-hf estimate takes it (default: llama-1b)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--optim", default="foam")
    parser.add_argument("--optim_args", help=f"(default: {DEFAULT} for foam)")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    options = parser.parse_args(argv)
    if options.optim == "foam" and options.optim_args is None:
        options.optim_args = DEFAULT
    if not torch.cuda.is_available():
        raise SystemExit("step_memory.py measures the memory of a GPU, and there is none")
    train(options)


if __name__ == "__main__":
    main()
