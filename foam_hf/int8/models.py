"""INT8 weights in a model: which ones they are, converting them in place, loading state dicts into them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from foam_hf.int8.files import CODES, SCALES, TensorFiles, int8_block, kind, pair_problem
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer.groups import layer_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Plan:
    """What becomes of a model's weights.

    Attributes:
        blocks: parameter name -> columns a block, of those that become INT8.
        left: reason -> names of the layers' weights that stay as they are.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """What stays, and why."""
        return "; ".join(f"{len(names)} {reason} ({names[0]}, ...)" for reason, names in self.left.items())

    def summary(self, model: nn.Module) -> str:
        """One line on what becomes INT8."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        count, total = sum(sizes[name] for name in self.blocks), sum(sizes.values())
        blocks = ", ".join(map(str, sorted(set(self.blocks.values()), reverse=True)))
        return (
            f"INT8: {len(self.blocks)} weights of {type(model).__name__}, {count:,} of {total:,} parameters, "
            f"in blocks of {blocks}"
        )


def plan_int8(
    model: nn.Module,
    *,
    block_size: int = 128,
    head: bool = False,
    modules_to_not_convert: Collection[str] | None = None,
) -> Int8Plan:
    """Choose the weights that become INT8: those of `nn.Linear` modules inside the base model.

    Embeddings and norms stay as they are, and so do fused experts and GPT-2's `Conv1D`, which are no `nn.Linear`,
    weights that are tied to others or belong to several modules, and widths that no block divides.

    Args:
        model: on any device; on the meta device nothing is allocated.
        block_size: columns a block. A width that it does not divide takes the largest power of two below it that does,
            down to 16.
        head: convert the LM head too, where it is a weight of its own.
        modules_to_not_convert: names of modules to leave alone, parts of names, or regexes that match whole names.

    Raises:
        ValueError: nothing can be converted.
    """
    wanted = layer_names(model)
    owners = _owners(model)
    if head:
        wanted |= _head_names(model, owners)
    tied = _tied_names(model)
    plan = Int8Plan()
    unused = list(modules_to_not_convert or ())
    for name, p in model.named_parameters():
        if name not in wanted:
            continue
        module_name, module = owners[id(p)][0]
        excluding = [entry for entry in modules_to_not_convert or () if _names(entry, module_name)]
        unused = [entry for entry in unused if entry not in excluding]
        block = int8_block(p.shape[-1], block_size)
        if excluding:
            continue
        if not _is_linear(module) or p is not module.weight:
            kind_of = "in fused 3-D tensors" if p.dim() > 2 else f"of {type(module).__name__}, which is no nn.Linear"
            plan.left.setdefault(kind_of, []).append(name)
        elif name in tied or len(owners[id(p)]) > 1:
            plan.left.setdefault("tied or used by several modules", []).append(name)
        elif block is None:
            plan.left.setdefault(f"of width {p.shape[-1]}, which no block of 16 or more divides", []).append(name)
        else:
            plan.blocks[name] = block
    for entry in unused:
        logger.warning("modules_to_not_convert: %r names no weight that would become INT8", entry)
    if not plan.blocks:
        raise ValueError(
            f"no weight of {type(model).__name__} can become INT8: {str(plan) or 'none is left'}; "
            "expected nn.Linear weights inside the base model, of widths that 16 divides"
        )
    return plan


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Parameter id -> the modules that hold it, by name."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append((module_name, module))
    return owners


def _head_names(model: nn.Module, owners: dict[int, list[tuple[str, nn.Module]]]) -> set[str]:
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        logger.warning("head=True: %s has no LM head, so none becomes INT8", type(model).__name__)
        return set()
    names = {name for name, p in model.named_parameters() if p is weight}
    if names & _tied_names(model) or any(isinstance(module, nn.Embedding) for _, module in owners[id(weight)]):
        logger.warning("head=True: the LM head of %s is its embedding, which stays as it is", type(model).__name__)
        return set()
    return names


def _tied_names(model: nn.Module) -> set[str]:
    """Weights that transformers ties, also those that are still apart on the meta device."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def _is_linear(module: nn.Module) -> bool:
    # A subclass with a forward of its own may do anything with its weight.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _names(entry: str, module_name: str) -> bool:
    try:
        return entry in module_name or re.fullmatch(entry, module_name) is not None
    except re.error:
        return False


def module_of(model: nn.Module, name: str) -> nn.Linear:
    """The `nn.Linear` that holds the weight `name`."""
    return cast(nn.Linear, model.get_submodule(name.rpartition(".")[0]))


def install_(module: nn.Linear, weight: Int8Weight, requires_grad: bool = True) -> None:
    """Make `weight` the parameter of `module`."""
    module.weight = nn.Parameter(weight, requires_grad=requires_grad)
    accept_codes(module)


def convert_(module: nn.Linear, block: int) -> None:
    """Make the floating point weight of `module` an INT8 one, on its device."""
    old = module.weight
    install_(module, Int8Weight.from_float(old.detach(), block_size=block), old.requires_grad)


def accept_codes(module: nn.Linear) -> None:
    """Let state dicts hold the INT8 weight of `module` as codes and scales, both when they are made and loaded."""
    if "_int8_waiting" not in module.__dict__:
        module.__dict__["_int8_waiting"] = {}
        module.register_state_dict_post_hook(_save_codes)
        module.register_load_state_dict_pre_hook(_load_codes)


@torch.no_grad()
def materialize_(model: Any, plan: Int8Plan, device: torch.device) -> None:
    """Give random values to what is on the meta device, by the model's own rule, one module at a time.

    What `plan` makes INT8 is so before the next module gets its values.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, module, owner in _modules(model, "", model):
        prefix = f"{name}." if name else ""
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.is_meta and prefix + key not in tied}
        if not own:
            continue
        for key, p in own.items():
            setattr(module, key, nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad))
        owner._init_weights(module)
        block = plan.blocks.get(prefix + "weight")
        if block is not None:
            convert_(cast(nn.Linear, module), block)
    model.tie_weights()


def _modules(module: nn.Module, name: str, owner: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module with its name and the transformers model whose rule draws its weights."""
    owner = module if hasattr(module, "_init_weights") else owner
    yield name, module, owner
    for child_name, child in module.named_children():
        yield from _modules(child, f"{name}.{child_name}" if name else child_name, owner)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Make every INT8 weight of `model` a floating point one again, one after the other; how many there were.

    Args:
        dtype: of the new weights; the dtype that each shows by default.
    """
    count = 0
    for module in model.modules():
        weight: Any = module._parameters.get("weight")  # not an attribute: adapters show their base layer's
        if isinstance(weight, Int8Weight):
            module.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=weight.requires_grad)
            count += 1
    return count


def check_files(plan: Int8Plan, checkpoint_files: list[str], block_size: int) -> None:
    """Raise ValueError if the safetensors files do not hold sound codes and scales of every weight of `plan`.

    What they hold as a plain weight, as a head whose vocabulary was resized, leaves the plan.
    """
    files = TensorFiles(checkpoint_files)
    held = files.int8_weights(block_size)
    ends, plain = ({end for name in some for end in _ends(name)} for some in (held, files.kinds))
    for name in [name for name in plan.blocks if ends.isdisjoint(_ends(name)) and not plain.isdisjoint(_ends(name))]:
        logger.warning(f"INT8: {name} is no INT8 weight in the checkpoint, and stays as it is there")
        del plan.blocks[name]
    missing = [name for name in plan.blocks if ends.isdisjoint(_ends(name))]
    if missing and len(held) < len(plan.blocks):  # else transformers renames what it loads
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(plan.blocks)} INT8 weights, {missing[0]} the first; "
            f"expected {CODES} and {SCALES} of each"
        )


def _ends(name: str) -> list[str]:
    """The name as it may be in a model with a head, in one without, or under another prefix."""
    parts = name.split(".")
    return [".".join(parts[cut:]) for cut in range(min(3, len(parts) - 1))]


def _save_codes(module: nn.Linear, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """After `state_dict` has read `module`: plain tensors, that any format and tool can hold."""
    weight = state_dict.get(prefix + "weight")
    if isinstance(weight, Int8Weight):
        del state_dict[prefix + "weight"]
        state_dict[prefix + CODES], state_dict[prefix + SCALES] = weight.codes, weight.scales


def _load_codes(
    module: nn.Linear,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before `load_state_dict` reads `module`: put an INT8 weight together from codes and scales.

    They may come in two calls, as from two files of a sharded checkpoint: the first half waits for the second.
    """
    waiting: dict[str, Tensor] = module.__dict__["_int8_waiting"]
    waiting |= {part: state_dict.pop(prefix + part) for part in (CODES, SCALES) if prefix + part in state_dict}
    weight = module.weight
    if not waiting or not isinstance(weight, Int8Weight):
        return
    refusal = module.__dict__.pop("_int8_refusal", None)
    if refusal is not None:
        refusal.remove()
    if len(waiting) < 2:
        module.__dict__["_int8_refusal"] = module.register_forward_pre_hook(_refuse_half)
        return
    codes, scales = waiting.pop(CODES), waiting.pop(SCALES)
    problem = pair_problem(kind(codes), kind(scales), weight.block_size)
    if problem:
        error_msgs.append(f"INT8 weight {prefix}weight: {problem}")
    else:
        state_dict[prefix + "weight"] = Int8Weight(codes, scales, dtype=weight.dtype)


def _refuse_half(module: nn.Linear, args: Any) -> None:
    """Before a forward pass: a checkpoint that brought codes without scales must not be trained on."""
    (held,) = module.__dict__["_int8_waiting"]
    raise RuntimeError(
        f"an INT8 weight of shape {tuple(module.weight.shape)} was loaded from a checkpoint that has its {held} "
        f"without its {SCALES if held == CODES else CODES}; expected both"
    )
