"""The options of `foam-hf estimate`: its parser, and what their texts mean."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import Any

from foam_hf.optim_args import option, split_optim_args, written

COMPARED = "foam, foam_mini, adamw_torch_fused, adamw_8bit, adafactor, galore_adamw, apollo_adamw"
COMPARED_IF_SHARED = "foam, foam_mini, adamw_torch_fused, adamw_8bit, adafactor"  # those that may be divided
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def add_parser(commands: Any) -> None:
    """Add `estimate` to the subparsers of `foam-hf`."""
    level = option("level").legal.describe(written)
    parser = commands.add_parser(
        "estimate",
        help="say what training a model takes, before anything but its config is read",
        usage="foam-hf estimate MODEL [--gpu 24GB] [--batch N] [--seq N] [--fsdp2|--zero N] [--gpus N] [option ...]",
        description="What a training step takes at its peak, for several optimizers side by side: weights, gradients "
        "and optimizer state counted to the byte, activations estimated. Nothing but a config is read.",
        epilog="exit codes: 0; 1 if nothing fits on --gpu, whatever the package does; 2 for a model, an option or a "
        "size that cannot be used",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name on the model hub, a local folder, a config.json, or one of the built-in models, which need no "
        "network: llama-60m, -130m, -350m, -1b, -3b, -7b, -13b, llama-3.1-8b, qwen2.5-0.5b, qwen2.5-7b, "
        "roberta-base, roberta-large",
    )
    parser.add_argument(
        "--gpu",
        metavar="SIZE",
        help="memory of the card, as 24GB: say what fits, and with which batch. GB are decimal, which leaves 7%% of a "
        "card sold as 24GB to CUDA itself; 24GiB plans with all of it",
    )
    parser.add_argument("--batch", default="1", metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument("--seq", metavar="N", help="tokens in each (default: 512)")
    parser.add_argument(
        "--optim",
        action="append",
        metavar="NAME,...",
        help=f"optimizers to compare, by Trainer's names, and muon, adam_mini (default: {COMPARED}; with --fsdp2 "
        "and --zero those that they can divide)",
    )
    parser.add_argument("--level", metavar="N,...", help=f"FOAM's level, {level}; several make several rows")
    parser.add_argument(
        "--optim-args",
        metavar="KEY=VALUE,...",
        help="as Trainer's; each optimizer takes the keys that it has; `foam-hf run --help` lists FOAM's",
    )
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="the class of transformers to train, as BertForSequenceClassification (default: the config's first)",
    )
    parser.add_argument(
        "--dtype", choices=[*_DTYPES, *_DTYPES.values()], help="of the weights (default: the config's)"
    )
    mixed = parser.add_mutually_exclusive_group()
    mixed.add_argument("--bf16", action="store_true", help="Trainer's bf16: compute float32 weights in bfloat16")
    mixed.add_argument("--fp16", action="store_true", help="Trainer's fp16: compute float32 weights in float16")
    parser.add_argument("--attention", choices=["sdpa", "eager"], help="default: the model's own, mostly sdpa")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations layer by layer")
    parser.add_argument("--gradient-accumulation", action="store_true", help="keep gradients from batch to batch")
    parser.add_argument("--gradient-release", action="store_true", help="update inside the backward pass (FOAM alone)")
    parser.add_argument("--int8-weights", action="store_true", help="train INT8 weights (FOAM alone)")
    parser.add_argument("--lora-rank", metavar="N", help="train LoRA adapters on all linear layers instead")
    parser.add_argument("--fsdp2", action="store_true", help="FSDP2 divides the model: what one of --gpus takes")
    parser.add_argument(
        "--zero",
        metavar="STAGE",
        help="DeepSpeed's ZeRO 1, 2 or 3, or the .json file of a DeepSpeed config: what one of --gpus takes",
    )
    parser.add_argument("--gpus", metavar="N", help="GPUs that share the model; --batch is each one's")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="INT8 weights in host memory, with gradient release (FOAM alone); with --zero: the optimizer there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; sizes in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table as stacked bars (extra: plot)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def size_in_bytes(text: str) -> int:
    """The bytes of "24GB", "24G" or "24 GiB"; units are decimal, and binary with an "i".

    Raises:
        ValueError: the text is no size, has no unit, or is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"--gpu: not a size, {text!r}; expected something like 24GB or 16GiB")
    if not match[2] and not text.strip().lower().endswith("b"):
        raise ValueError(f"--gpu: no unit in {text!r}; expected something like {text.strip()}GB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])
    if size == 0:
        raise ValueError(f"--gpu: no memory at all, {text!r}; expected something like 24GB")
    return size


def chosen_optimizers(
    names: list[str], levels: str | None, optim_args: str | None
) -> list[tuple[str, dict[str, str]]]:
    """(name, options) of each row of the table.

    Args:
        names: each a comma-separated list of optimizers.
        levels: a comma-separated list of FOAM's levels, a row each.
        optim_args: options; each optimizer gets those that it has.

    Raises:
        ValueError: an unknown or repeated name, or an option that no chosen optimizer has.
    """
    from foam_hf.planner.counting import OPTIMIZERS, option_keys

    chosen = [name.strip() for entry in names for name in entry.split(",")]
    for name in chosen:
        if name not in OPTIMIZERS:
            near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown optimizer {name!r}; {hint}expected one of {', '.join(OPTIMIZERS)}")
        if chosen.count(name) > 1:
            raise ValueError(f"--optim has {name!r} twice; for several levels of FOAM: --level 2,8")
    pairs = split_optim_args(optim_args)
    for key, _ in pairs:
        if not any(key in option_keys(name) for name in chosen):
            known = sorted({key for name in chosen for key in option_keys(name)})
            raise ValueError(f"--optim-args: none of {', '.join(chosen)} has {key!r}; they have {', '.join(known)}")
    rows = []
    for name in chosen:
        arguments = {key: value for key, value in pairs if key in option_keys(name)}
        if levels is None or "level" not in option_keys(name):
            rows.append((name, arguments))
            continue
        if "level" in arguments:
            raise ValueError(f"the level is given twice, --level {levels} and --optim-args {optim_args}; expected one")
        given = [level.strip() for level in levels.split(",")]
        if twice := [level for level in given if given.count(level) > 1]:
            raise ValueError(f"--level has {twice[0]} twice, got {levels}; expected levels that differ")
        rows += [(name, {"level": level, **arguments}) for level in given]
    if levels is not None and not any("level" in option_keys(name) for name in chosen):
        raise ValueError(f"--level is FOAM's, and none of {', '.join(chosen)} has it; expected foam in --optim")
    return rows


def workload(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Planner`, from the command line."""
    import torch

    return {
        "batch": options.batch,
        "sequence": options.seq,
        "dtype": getattr(torch, _DTYPES.get(options.dtype, options.dtype)) if options.dtype else None,
        "autocast": "bfloat16" if options.bf16 else "float16" if options.fp16 else None,
        "attention": options.attention,
        "gradient_checkpointing": options.gradient_checkpointing,
        "accumulation": options.gradient_accumulation,
        "lora_rank": options.lora_rank,
        "architecture": options.architecture,
        "trust_remote_code": options.trust_remote_code,
        "fsdp2": options.fsdp2,
        "zero": options.zero,
        "gpus": options.gpus,
        "offload": bool(options.offload and options.zero),
    }


def take_up_offload(options: Any) -> None:
    """Let `offload_weights` say whether --offload means INT8 weights, and switch on what these need."""
    options.offload_weights = bool(options.offload and not options.zero)
    if options.offload_weights:
        options.int8_weights = options.gradient_release = True


def check_sharing(options: Any) -> None:
    """Raise ValueError for options of FSDP2 and ZeRO that lack another, or that exclude each other."""
    if options.zero == "":  # of a variable that a script has not set
        raise ValueError("--zero: no stage, got ''; expected 1, 2, 3, or the .json file of a DeepSpeed config")
    if options.fsdp2:
        if options.zero or options.offload:
            raise ValueError(f"{'--zero' if options.zero else '--offload'} excludes --fsdp2; expected one of them")
        if options.gpus is None:
            raise ValueError("--fsdp2 divides a model over GPUs, and their number is not given: --gpus 2")
        return
    if not options.zero:
        if options.gpus:
            raise ValueError(
                "--gpus is for models that are divided; expected --fsdp2, or --zero 1, 2 or 3, with it. Under DDP "
                "each GPU takes what one takes, and a copy of the gradients"
            )
        return
    if options.gpus is None:
        raise ValueError(f"--zero {options.zero} divides a model over GPUs, and their number is not given: --gpus 2")
    for name in ("gradient_release", "int8_weights"):
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} does not run under --zero {options.zero}; expected one of them"
            )


def check_plot(path: Path) -> None:
    """Raise an error, before the work, if matplotlib or the folder is missing or the file format is not supported."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: no folder {path.parent}; expected a file in a folder that exists")
    if path.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot: cannot draw {path.name!r}; expected a name that ends in .png, .pdf or .svg")


def positive_integer(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"--{name.replace('_', '-')}: not a count, {text!r}; expected an integer of 1 or more")
    return int(text)
