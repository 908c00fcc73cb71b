"""`foam-hf estimate`: prints how much memory training takes with several optimizers, and what fits on a card."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foam_hf.cli.errors import CommandError
from foam_hf.cli.way_out import SWITCHES, WayOut, describe, find_way_out
from foam_hf.display import format_bytes
from foam_hf.optim_args import FOAM_NAMES, one_of_ours, option, split_optim_args, written

if TYPE_CHECKING:
    from foam_hf.planner.planner import Planner
    from foam_hf.planner.report import Row

COMPARED = "foam, foam_mini, adamw_torch_fused, adamw_8bit, adafactor, galore_adamw, apollo_adamw"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def add_parser(commands: Any) -> None:
    """Add `estimate` to the subparsers of `foam-hf`."""
    level = option("level").legal.describe(written)
    parser = commands.add_parser(
        "estimate",
        help="say what training a model takes, before anything but its config is read",
        usage="foam-hf estimate MODEL [--gpu 24GB] [--batch N] [--seq N] [option ...]",
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
        help=f"optimizers to compare, by Trainer's names, and muon, adam_mini (default: {COMPARED})",
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; sizes in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table as stacked bars (extra: plot)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def main(options: argparse.Namespace) -> int:
    """Print the plans; return the exit code: 1 if nothing fits on the card, whatever FOAM does, else 0.

    Raises:
        CommandError: a model, an optimizer or an option cannot be used, --plot needs matplotlib, or a picture cannot
            be written. The message is one line.
    """
    try:
        return _run_without_warnings(options)
    except BrokenPipeError:  # `| head` closed the pipe; devnull, or Python would report it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error


def _run_without_warnings(options: argparse.Namespace) -> int:
    if not options.json:  # importing torch and tracing a step take seconds
        print(f"foam-hf estimate: planning {options.model}, in about ten seconds ...", file=sys.stderr, flush=True)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # other packages warn about optional parts that they could not import
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(options)
    finally:
        logging.disable(before)


def _run(options: argparse.Namespace) -> int:
    from foam_hf.planner.planner import Planner
    from foam_hf.planner.report import draw, print_table, to_json

    # Parsed here because argparse would print the usage before the one line that matters.
    options.gpu_text, options.gpu = options.gpu, None if options.gpu is None else size_in_bytes(options.gpu)
    for name in ("batch", "seq", "lora_rank"):
        setattr(options, name, _positive_integer(name, getattr(options, name)))
    choices = chosen_optimizers(options.optim, options.level, options.optim_args)
    foam_only = [flag for flag in ("gradient_release", "int8_weights") if getattr(options, flag)]
    if foam_only and not any(_is_foam(name) for name, _ in choices):
        flag = foam_only[0].replace("_", "-")
        raise ValueError(
            f"--{flag} is FOAM's, and it is not among the optimizers; expected {one_of_ours()} in --optim"
        )
    if options.plot:
        _check_plot(options.plot)
    planner = Planner(options.model, **workload(options))
    rows = [_row(planner, name, arguments, options, foam_only) for name, arguments in choices]
    rows.sort(key=lambda row: row.plan.total)
    about = _describe_workload(planner, options)
    found = _way_out(planner, rows, options, choices)
    if options.plot:
        draw(rows, options.plot, title=f"{options.model}, {about['size']}", subtitle=about["step"], gpu=options.gpu)
    if options.json:
        print(to_json(rows, model=options.model, **about, gpu=options.gpu, way_out=_as_json(found)))
    else:
        print(f"{options.model}: {about['architecture']}, {about['size']}")
        print(f"The peak of a training step of {about['step']}:\n")
        print_table(rows, gpu=options.gpu)
        print("\n" + "\n".join(_notes(rows, foam_only)))
    if options.gpu is None or any(row.fits for row in rows):
        return 0
    if not options.json:
        print("\n" + "\n".join(_verdict(rows, options, found, planner)))
    return 0 if found is not None and found.fits else 1


def _as_json(found: WayOut | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**asdict(found.plan), "total": found.plan.total, "fits": found.fits, "switches": list(found.switches)}


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
    names: list[str] | None, levels: str | None, optim_args: str | None
) -> list[tuple[str, dict[str, str]]]:
    """(name, options) of each row of the table.

    Args:
        names: each a comma-separated list of optimizers; None for `COMPARED`.
        levels: a comma-separated list of FOAM's levels, a row each.
        optim_args: options; each optimizer gets those that it has.

    Raises:
        ValueError: an unknown or repeated name, or an option that no chosen optimizer has.
    """
    from foam_hf.planner.counting import OPTIMIZERS, option_keys

    chosen = [name.strip() for entry in names or [COMPARED] for name in entry.split(",")]
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
    }


def _row(planner: Planner, name: str, arguments: dict[str, str], options: Any, foam_only: list[str]) -> Row:
    from foam_hf.planner.report import Row

    release, int8 = ((flag in foam_only and _is_foam(name)) for flag in ("gradient_release", "int8_weights"))
    plan = planner.plan(name, arguments, gradient_release=release, int8_weights=int8)
    if options.gpu is None:
        return Row(plan)
    return Row(plan, plan.total <= options.gpu, planner.largest_batch(plan, options.gpu))


def _describe_workload(planner: Planner, options: Any) -> dict[str, str]:
    """Texts on the planned workload: the model's architecture and size, and the training step."""
    step = [f"{planner.batch} x {planner.sequence} tokens"]
    step += [f"LoRA of rank {options.lora_rank} on all linear layers"] if options.lora_rank else []
    step += [f"{mode} autocast" for mode in ("bf16", "fp16") if getattr(options, mode)]
    step += [f"{options.attention} attention"] if options.attention else []
    step += ["gradient checkpointing"] if options.gradient_checkpointing else []
    step += ["gradients accumulated"] if options.gradient_accumulation else []
    dtype = str(planner.dtype).removeprefix("torch.")
    count = planner.parameters
    size = f"{f'{count / 1e6:,.0f} M' if count >= 1e6 else f'{count:,}'} parameters in {dtype}"
    return {"architecture": planner.architecture, "size": size, "step": ", ".join(step)}


def _notes(rows: list[Row], foam_only: list[str]) -> list[str]:
    """The lines below the table: what is counted, what is estimated, and how well."""
    notes = [
        "Weights, gradients and state are counted to the byte. Activations are what the peak holds on top of them",
        f"(logits and temporary memory too), an estimate: {rows[0].plan.activations_note}.",
    ]
    if foam_only and not all(_is_foam(row.plan.optim) for row in rows):
        flags = " and ".join(flag.replace("_", " ").replace("int8", "INT8") for flag in foam_only)
        notes.append(f"Only FOAM has {flags}: the other optimizers are planned without.")
    return notes


def _verdict(rows: list[Row], options: Any, found: WayOut | None, planner: Planner) -> list[str]:
    """The lines to print if no row fits: the nearest plan, and a smaller batch or a way out that fits."""
    least = rows[0].plan
    nothing = "As asked, nothing" if found is not None and found.fits else "Nothing"
    lines = [
        f"{nothing} fits in {format_bytes(options.gpu)}: {least.label} comes nearest, {format_bytes(least.total)}."
    ]
    if batches := [row for row in rows if row.largest_batch]:
        most = max(row.largest_batch or 0 for row in batches)
        fit = [row.plan.label for row in batches if row.largest_batch == most]
        return [*lines, f"With --batch {most} would fit: {', '.join(fit)}."]
    if found is None:
        return lines
    return [*lines, *describe(found, options.model, planner, _command(options, planner))]


def _command(options: Any, planner: Planner) -> list[str]:
    """The words of the command that estimates this workload on this card, without optimizers and `SWITCHES`."""
    command = ["foam-hf", "estimate", options.model, "--gpu", options.gpu_text, "--seq", str(planner.sequence)]
    for name in ("architecture", "dtype", "attention", "lora_rank"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("bf16", "fp16", "gradient_accumulation", "trust_remote_code"):
        command += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    return command


def _way_out(planner: Planner, rows: list[Row], options: Any, choices: list[tuple[str, dict[str, str]]]) -> Any:
    """The switches of FOAM that make it fit; None without a card, or if a row fits with its batch or a smaller one."""
    if options.gpu is None or any(row.largest_batch for row in rows):
        return None
    asked = {name: bool(getattr(options, name)) for name in (*SWITCHES, "lora_rank", "gradient_accumulation")}
    return find_way_out(planner, options.gpu, asked, choices)


def _is_foam(name: str) -> bool:
    return name in FOAM_NAMES


def _check_plot(path: Path) -> None:
    """Raise an error, before the work, if matplotlib or the folder is missing or the file format is not supported."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: no folder {path.parent}; expected a file in a folder that exists")
    if path.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot: cannot draw {path.name!r}; expected a name that ends in .png, .pdf or .svg")


def _positive_integer(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"--{name.replace('_', '-')}: not a count, {text!r}; expected an integer of 1 or more")
    return int(text)
