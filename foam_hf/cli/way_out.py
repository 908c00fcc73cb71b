"""Finds the switches of FOAM that make a model fit on a card if nothing that `foam-hf estimate` planned fits.

A way out, `way_out` in the command's JSON, is such a set of switches.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foam_hf.cli.errors import CommandError
from foam_hf.cli.recipes import recipe_folders
from foam_hf.display import format_bytes
from foam_hf.optim_args import FOAM_NAMES, split_optim_args

if TYPE_CHECKING:
    from foam_hf.planner.plan import Plan
    from foam_hf.planner.planner import Planner

# The cheapest one first; the last needs the first and the one before it.
SWITCHES = ("gradient_release", "gradient_checkpointing", "int8_weights", "offload_weights")
_FLAGS = {"offload_weights": "--offload"}  # where it is not the name
_FOLDING = {"fold_embeddings": "true", "fold_head": "true"}


@dataclass(frozen=True)
class WayOut:
    """FOAM with the fewest switches that make a batch fit; if nothing fits, the one with all switches that is nearest.

    Attributes:
        plan: the memory that it takes.
        switches: the names of `SWITCHES` that are on, including those that the user asked for.
        fits: whether the plan is within the card's bytes.
    """

    plan: Plan
    switches: tuple[str, ...]
    fits: bool

    @property
    def optim_args(self) -> str:
        """The text for TrainingArguments, which take gradient release as an option."""
        release = "gradient_release=true" if "gradient_release" in self.switches else ""
        return ",".join(filter(None, [self.plan.options, release]))


def find_way_out(
    planner: Planner, gpu: int, asked: Mapping[str, bool], choices: list[tuple[str, dict[str, str]]], batch: int = 1
) -> WayOut | None:
    """Find the fewest switches that must be added so that `batch` sequences stay within `gpu` bytes.

    Args:
        planner: of the model and the workload that did not fit.
        gpu: bytes of the card.
        asked: name -> whether the user asked for it: `SWITCHES`, and "lora_rank", "zero" and "fsdp2", which exclude
            some.
        choices: (name, options) of the planned optimizers; the first FOAM among them is used, and its rule with a row
            as block ("foam_mini") where that makes the difference.
        batch: sequences. For more than one INT8 weights are not added: a smaller batch changes less.
    """
    optim, options = next(((n, o) for n, o in choices if n in FOAM_NAMES), ("foam", {}))
    excluded = {
        "gradient_release": asked["lora_rank"] or asked["zero"],
        "gradient_checkpointing": False,
        "int8_weights": asked["lora_rank"] or asked["zero"],
        "offload_weights": asked["lora_rank"] or asked["zero"] or asked["fsdp2"],
    }
    legal = SWITCHES if batch == 1 else SWITCHES[:2]
    missing = [name for name in legal if not asked[name] and not excluded[name]]
    # A planner traces each step once, so all attempts share these two.
    variants = {on: planner.variant(batch=batch, gradient_checkpointing=on) for on in (False, True)}
    last = None
    for added, name_of_optim, arguments in _attempts(missing, optim, options):
        on = {name: asked[name] or name in added for name in SWITCHES}
        if (not added and (name_of_optim, arguments) in choices) or (
            on["offload_weights"] and not (on["gradient_release"] and on["int8_weights"])
        ):
            continue
        variant = variants[on["gradient_checkpointing"]]
        try:
            of_plan: dict[str, Any] = {name: on[name] for name in SWITCHES if name != "gradient_checkpointing"}
            plan = variant.count(name_of_optim, arguments, **of_plan)
        except (ValueError, ImportError):  # no weight of this model can become INT8 or visit, or an old transformers
            continue
        everything = len(added) == len(missing)
        if plan.total > gpu and not everything:  # too large even without activations, which take time to trace
            continue
        plan = variant.with_batch(plan, batch)
        if last is None or plan.total < last.plan.total:
            last = WayOut(plan, tuple(name for name in SWITCHES if on[name]), plan.total <= gpu)
        if last.fits:
            break
    return last


def _attempts(
    missing: list[str], optim: str, options: dict[str, str]
) -> Iterator[tuple[tuple[str, ...], str, dict[str, str]]]:
    """Yield (switches to add, FOAM's name, its options), fewest switches first.

    For each number of switches, attempts in which a whole row is a block follow those of the user's level. If the
    user's options keep embeddings or the head from folding, attempts that fold them come last.
    """
    for folding in ({}, _FOLDING) if any(options.get(name, "true") != "true" for name in _FOLDING) else ({},):
        kinds = [(optim, {**options, **folding})]
        kinds += [by_rows] if (by_rows := _by_rows(*kinds[0])) else []
        for count in range(len(missing) + 1):
            for name, arguments in kinds:
                yield from ((added, name, arguments) for added in itertools.combinations(missing, count))


def _by_rows(optim: str, options: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    """(name, options) of the same rule with a row as its block, the least state it can have; None if it is that."""
    whole = {**FOAM_NAMES[optim], **options}
    if whole.get("level") == "row":
        return None
    others = {key: value for key, value in options.items() if key != "level"}
    if optim == "foam" and whole.get("second_moment", "block") == "block":
        return "foam_mini", others
    return optim, {**others, "level": "row"}


def describe(found: WayOut, model: str, planner: Planner, command: list[str]) -> list[str]:
    """The lines to print on a way out: its memory and, if it fits, the code, the recipe and the estimate's command.

    Args:
        found: the way out.
        model: as the user typed it.
        planner: of the model.
        command: the words of the estimate, without optimizers and switches.
    """
    flags = " ".join(_FLAGS.get(name, "--" + name.replace("_", "-")) for name in found.switches)
    flags_and = f"{flags} and " if flags else ""
    would = "takes" if found.fits else "would still take"
    with_options = f" ({found.plan.options})" if found.plan.options else ""
    host = f", and {format_bytes(found.plan.host)} of host memory" if found.plan.host else ""
    lines = [
        f"{found.plan.optim}{with_options} with {flags_and}a batch of {found.plan.batch} {would} "
        f"{format_bytes(found.plan.total)}{host}."
    ]
    if not found.fits:
        return lines
    lines += offload_notes(found.plan, planner.accumulates) if found.plan.offload_weights else []
    lines += ["In a script:", *(f"    {line}" for line in _script(found, model, planner))]
    if recipe := recipe_command(found, model, planner.sequence):
        lines += ["By the recipe, whose config has these settings:", *(f"    {line}" for line in recipe)]
    command += ["--batch", str(found.plan.batch)] if found.plan.batch > 1 else []
    command += ["--optim", found.plan.optim]
    command += ["--optim-args", found.plan.options] if found.plan.options else []
    return [*lines, "Planned by:", f"    {shlex.join([*command, *flags.split()])}"]


def offload_notes(plan: Plan, accumulates: bool) -> list[str]:
    """The lines on a plan with INT8 weights in host memory: what crosses the bus, and when that is hidden.

    A step that accumulates gradients updates weights, and so brings them back, in each of its micro-batches.
    """
    from foam_hf.planner.offload import ARITHMETIC, BUS

    unit = "micro-batch" if accumulates else "step"
    return [
        f"INT8 weights cross the bus three times a {unit}, {format_bytes(plan.host)} each: in for the forward pass, "
        "in for the backward pass, and back.",
        f"That is hidden behind the arithmetic from {plan.hidden_from:,} tokens a {unit}: bytes / bus = 2 x weights x "
        "tokens / arithmetic",
        f"in the forward pass, if the bus has {BUS} GB/s each way and the arithmetic {ARITHMETIC} TFLOPS.",
    ]


def _script(found: WayOut, model: str, planner: Planner) -> list[str]:
    """The lines of Python that load the model and make its TrainingArguments."""
    arguments = [f"optim={found.plan.optim!r}"]
    arguments += [f"optim_args={found.optim_args!r}"] if found.optim_args else []
    arguments += [f"per_device_train_batch_size={found.plan.batch}"]
    arguments += ["gradient_checkpointing=True"] if "gradient_checkpointing" in found.switches else []
    dtype = str(planner.dtype).removeprefix("torch.")
    loading = f"dtype={dtype!r}"
    if "int8_weights" in found.switches:
        where = "offload='cpu'" if "offload_weights" in found.switches else ""
        loading += f", quantization_config=foam_hf.Int8Config({where})"
    return [
        f"model = {planner.architecture}.from_pretrained({hub_name(model)!r}, {loading})",
        f"args = TrainingArguments(..., {', '.join(arguments)})",
    ]


def recipe_command(found: WayOut, model: str, sequence: int) -> list[str]:
    """The commands that train this model by a bundled config with the found switches; [] if it has no config."""
    method = "int8" if "int8_weights" in found.switches else "full"
    for name, path, settings in bundled_configs():
        if settings.get("method") != method or not same_model(settings["model_name_or_path"], model):
            continue
        flags = ["--per_device_train_batch_size", str(found.plan.batch), "--max_length", str(sequence)]
        have = _pairs(settings.get("optim_args") or "")
        wanted = _pairs(found.optim_args)
        if not wanted.items() <= have.items() or settings.get("optim") != found.plan.optim:
            flags += ["--optim", found.plan.optim]
            flags += ["--optim_args", ",".join(f"{k}={v}" for k, v in {**have, **wanted}.items())] if wanted else []
        if "gradient_checkpointing" in found.switches and not settings.get("gradient_checkpointing"):
            flags += ["--gradient_checkpointing", "true"]
        flags += ["--int8_offload", "true"] if "offload_weights" in found.switches else []
        run = ["python", "instruct/train.py", "--config", f"{name}/{path.name}", *flags]
        copies = [f"foam-hf recipes copy {each}" for each in dict.fromkeys(("instruct", name))]
        return ["; ".join(copies), f"{shlex.join(run)} --dataset_path DATA --output_dir RUN"]
    return []


def bundled_configs() -> list[tuple[str, Path, dict[str, Any]]]:
    """(recipe, file, settings) of every config for the instruct recipe's script, those of `quantized` first."""
    import yaml  # installed with transformers

    try:
        folders = recipe_folders()
    except CommandError:  # this installation has no recipes
        return []
    found = []
    for name in ("quantized", "instruct"):
        for path in sorted(folders[name].glob("*.yaml")) if name in folders else ():
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(settings, dict) and isinstance(settings.get("model_name_or_path"), str):
                found.append((name, path, settings))
    return found


def same_model(of_config: str, asked: str) -> bool:
    """Whether two names mean the same model: the last part of each, in small letters and without "-instruct"."""
    names = [name.lower().rstrip("/").rsplit("/", 1)[-1].removesuffix("-instruct") for name in (of_config, asked)]
    return names[0] == names[1]


def hub_name(model: str) -> str:
    """The name of `model` for from_pretrained; for a built-in name the hub's, if a bundled config has it."""
    from foam_hf.planner.model_configs import BUILTIN

    if model.lower() not in BUILTIN:
        return model
    known = [s["model_name_or_path"] for _, _, s in bundled_configs() if same_model(s["model_name_or_path"], model)]
    return known[0] if known else model


def _pairs(optim_args: str) -> dict[str, str]:
    return dict(split_optim_args(optim_args))
