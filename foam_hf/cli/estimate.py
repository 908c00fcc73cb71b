"""`foam-hf estimate`: prints how much memory training takes with several optimizers, and what fits on a card."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from foam_hf.cli.errors import CommandError
from foam_hf.cli.estimate_options import (
    COMPARED,
    COMPARED_IF_SHARED,
    check_plot,
    check_sharing,
    chosen_optimizers,
    positive_integer,
    size_in_bytes,
    take_up_offload,
    workload,
)
from foam_hf.cli.way_out import SWITCHES, WayOut, describe, find_way_out, offload_notes
from foam_hf.display import format_bytes
from foam_hf.optim_args import FOAM_NAMES, one_of_ours

if TYPE_CHECKING:
    from foam_hf.planner.planner import Planner
    from foam_hf.planner.report import Row
    from foam_hf.planner.zero import Zero


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
    for name in ("batch", "seq", "lora_rank", "gpus"):
        setattr(options, name, positive_integer(name, getattr(options, name)))
    check_sharing(options)
    take_up_offload(options)
    names = options.optim or [COMPARED_IF_SHARED if options.zero or options.fsdp2 else COMPARED]
    choices = chosen_optimizers(names, options.level, options.optim_args)
    foam_only = [flag for flag in ("gradient_release", "int8_weights", "offload_weights") if getattr(options, flag)]
    if foam_only and not any(_is_foam(name) for name, _ in choices):
        flag = "offload" if options.offload_weights else foam_only[0].replace("_", "-")
        raise ValueError(
            f"--{flag} is FOAM's, and it is not among the optimizers; expected {one_of_ours()} in --optim"
        )
    if options.plot:
        check_plot(options.plot)
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
        each = ", on each GPU" if planner.sharing else ""
        print(f"The peak of a training step of {about['step']}{each}:\n")
        print_table(rows, gpu=options.gpu)
        print("\n" + "\n".join(_notes(rows, foam_only, planner) + _or_adapters(rows, foam_only, options)))
    if options.gpu is None or any(row.fits for row in rows):
        return 0
    if not options.json:
        print("\n" + "\n".join(_verdict(rows, options, found, planner)))
    return 0 if found is not None and found.fits else 1


def _as_json(found: WayOut | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**asdict(found.plan), "total": found.plan.total, "fits": found.fits, "switches": list(found.switches)}


def _row(planner: Planner, name: str, arguments: dict[str, str], options: Any, foam_only: list[str]) -> Row:
    from foam_hf.planner.report import Row

    choices = {flag: _is_foam(name) for flag in foam_only}
    plan = planner.plan(name, arguments, **choices)
    if options.gpu is None:
        return Row(plan)
    return Row(plan, plan.total <= options.gpu, planner.largest_batch(plan, options.gpu))


def _describe_workload(planner: Planner, options: Any) -> dict[str, str]:
    """Texts on the planned workload: the model's architecture and size, and the training step."""
    step = [f"{planner.batch} x {planner.sequence} tokens"]
    step += [f"LoRA of rank {options.lora_rank} on all linear layers"] if options.lora_rank else []
    modes = () if planner.zero else ("bf16", "fp16")  # DeepSpeed casts the weights themselves
    step += [f"{mode} autocast" for mode in modes if getattr(options, mode)]
    step += [f"{options.attention} attention"] if options.attention else []
    step += ["gradient checkpointing"] if options.gradient_checkpointing else []
    step += ["gradients accumulated"] if options.gradient_accumulation else []
    step += [planner.sharing] if planner.sharing else []
    dtype = str(planner.dtype).removeprefix("torch.")
    count = planner.parameters
    size = f"{f'{count / 1e6:,.0f} M' if count >= 1e6 else f'{count:,}'} parameters in {dtype}"
    return {"architecture": planner.architecture, "size": size, "step": ", ".join(step)}


def _notes(rows: list[Row], foam_only: list[str], planner: Planner) -> list[str]:
    """The lines below the table: what is counted, what is estimated, and how well."""
    notes = [
        "Weights, gradients and state are counted to the byte. Activations are what the peak holds on top of them",
        f"(logits and temporary memory too), an estimate: {rows[0].plan.activations_note}.",
    ]
    if foam_only and not all(_is_foam(row.plan.optim) for row in rows):
        flags = " and ".join(flag.replace("_", " ").replace("int8", "INT8") for flag in foam_only[:2])
        notes.append(f"Only FOAM has {flags}: the other optimizers are planned without.")
    if found := [row.plan for row in rows if row.plan.offload_weights]:
        notes += offload_notes(found[0], planner.accumulates)
    if planner.fsdp2:
        notes.append(
            "Buffers are gathered weights and whole gradients, of the two layers where most are alive at a time."
        )
    return notes + (_zero_notes(planner.zero) if planner.zero else [])


def _or_adapters(rows: list[Row], foam_only: list[str], options: Any) -> list[str]:
    """Where FOAM fits with plain weights and gradients, adapters fit too: the choice, and where it was measured."""
    if options.lora_rank or foam_only or not any(row.fits and _is_foam(row.plan.optim) for row in rows):
        return []
    return [
        "Every weight can be trained here, and so can LoRA adapters (--lora-rank 16 plans them): which learn more,",
        "by the size of the data, is in docs/choosing.md.",
    ]


def _zero_notes(zero: Zero) -> list[str]:
    """The lines on ZeRO: its fp32 masters, and the sizes that a config can change."""
    gathered = f", and up to {zero.live:,} gathered weights" if zero.stage == 3 else ""
    notes = [
        "ZeRO updates masters, float32 copies of the weights. DeepSpeed's buffers are counted from its source (0.19),",
        f"all in use at the peak: gradients in buckets of {zero.reduce_bucket:,} elements{gathered}.",
    ]
    if zero.not_planned:
        notes.append(f"Not in the plan, though it changes the memory: {', '.join(zero.not_planned)} of the config.")
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
        lines += [f"With --batch {most} would fit: {', '.join(fit)}."]
    if found is None:
        return lines
    return [*lines, *describe(found, options.model, planner, _command(options, planner))]


def _command(options: Any, planner: Planner) -> list[str]:
    """The words of the command that estimates this workload on this card, without optimizers and `SWITCHES`."""
    command = ["foam-hf", "estimate", options.model, "--gpu", options.gpu_text, "--seq", str(planner.sequence)]
    for name in ("architecture", "dtype", "attention", "lora_rank", "zero", "gpus"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("bf16", "fp16", "gradient_accumulation", "trust_remote_code", "fsdp2"):
        command += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    return [*command, *(["--offload"] if options.zero and options.offload else [])]


def _way_out(planner: Planner, rows: list[Row], options: Any, choices: list[tuple[str, dict[str, str]]]) -> Any:
    """The switches of FOAM that make it fit: None without a card, if a row fits, or if only a smaller batch would."""
    if options.gpu is None or any(row.fits for row in rows):
        return None
    names = (*SWITCHES, "lora_rank", "zero", "fsdp2")
    asked = {name: bool(getattr(options, name)) for name in names}
    smaller = any(row.largest_batch for row in rows)
    found = find_way_out(planner, options.gpu, asked, choices, planner.batch if smaller else 1)
    return None if smaller and found is not None and not found.fits else found


def _is_foam(name: str) -> bool:
    return name in FOAM_NAMES
