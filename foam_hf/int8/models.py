"""Chooses the weights of a model that become INT8, and converts them in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from foam_hf.int8.files import CODES, SCALES, TensorFiles, int8_block
from foam_hf.int8.layers import Int8Layer, install_, int8_of
from foam_hf.int8.weight import Int8Weight
from foam_hf.optimizer.groups import layer_names
from foam_hf.optimizer.targets import matches
from foam_hf.tensors.places import is_sharded

logger = logging.getLogger("foam_hf")

Initializer = Callable[[nn.Module], Any]  # initializes the parameters of a module
Keeper = Callable[[Int8Weight], Int8Weight]  # takes a new weight to where it is kept


@dataclass(frozen=True)
class Int8Plan:
    """Which weights of a model become INT8.

    Attributes:
        blocks: name -> columns of a block, for each parameter that becomes INT8.
        left: reason -> names of the layers' weights that stay as they are.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """How many weights stay as they are, and why, with an example of each reason."""
        return "; ".join(f"{len(names)} {reason} ({names[0]}, ...)" for reason, names in self.left.items())

    def summary(self, model: nn.Module) -> str:
        """One line on the weights that become INT8."""
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

    Embeddings and norms stay as they are. So do fused experts and GPT-2's `Conv1D`, which are no `nn.Linear`, weights
    that are tied or belong to several modules, and weights whose width no block divides.

    Args:
        model: on any device; nothing is allocated for a model on the meta device.
        block_size: columns of a block. If it does not divide a width, the block has the largest smaller power of two
            that does, at least 16.
        head: convert the LM head too, if it is not tied to the embedding.
        modules_to_not_convert: modules to leave alone: names, parts of names, or regexes that match whole names.

    Raises:
        ValueError: no weight can be converted.
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
        excluding = [entry for entry in modules_to_not_convert or () if matches(entry, module_name)]
        unused = [entry for entry in unused if entry not in excluding]
        block = int8_block(p.shape[-1], block_size)
        if excluding:
            continue
        if not _is_linear(module) or p is not module.weight:
            reason = "in fused 3-D tensors" if p.dim() > 2 else f"of {type(module).__name__}, which is no nn.Linear"
            plan.left.setdefault(reason, []).append(name)
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
    """Id of a parameter -> (name, module) of each module that holds it."""
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
    """Names of the weights that transformers ties; on the meta device they may not be tied yet."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def _is_linear(module: nn.Module) -> bool:
    # A subclass with its own forward may use its weight in other ways.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def module_of(model: nn.Module, name: str) -> nn.Linear:
    """The `nn.Linear` that holds the weight `name`."""
    return cast(nn.Linear, model.get_submodule(name.rpartition(".")[0]))


def convert_(module: nn.Linear, block: int, keep: Keeper | None = None) -> None:
    """Make the floating point weight of `module` an INT8 one, on its device; `keep` may take it elsewhere."""
    old = module.weight
    weight = Int8Weight.from_float(old.detach(), block_size=block)
    install_(module, weight if keep is None else keep(weight), old.requires_grad)


@torch.no_grad()
def materialize_(
    model: Any,
    plan: Int8Plan,
    device: torch.device,
    initializer_of: Callable[[nn.Module], Initializer | None],
    keeper_of: Callable[[str], Keeper],
) -> None:
    """Allocate the parameters on the meta device and initialize them by the model's own rule, one module at a time.

    Each weight in `plan` becomes INT8 before the next module is allocated, so that little memory is needed.

    Args:
        model: a transformers model, changed in place.
        plan: which weights become INT8.
        device: of the new parameters.
        initializer_of: gives what initializes a module and its submodules, or None where the outer module's does.
        keeper_of: gives what takes the weight of a name to where it is kept.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, module, initialize in _with_initializers(model, "", initializer_of):
        prefix = f"{name}." if name else ""
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.is_meta and prefix + key not in tied}
        if not own:
            continue
        for key, p in own.items():
            setattr(module, key, nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad))
        initialize(module)
        block = plan.blocks.get(prefix + "weight")
        if block is not None:
            convert_(cast(nn.Linear, module), block, keeper_of(prefix + "weight"))
    model.tie_weights()


def _with_initializers(
    module: nn.Module, name: str, initializer_of: Callable[[nn.Module], Initializer | None], outer: Any = None
) -> Iterator[tuple[str, nn.Module, Initializer]]:
    """Yield every module with its name and its initializer, which may be that of an outer module."""
    initializer = initializer_of(module) or outer
    yield name, module, initializer
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        yield from _with_initializers(child, path, initializer_of, initializer)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Make every INT8 weight of `model` a floating point one, one after the other; return how many there were.

    Args:
        model: changed in place.
        dtype: of the new weights; by default each weight's own `dtype`.

    Raises:
        ValueError: the weights are sharded.
    """
    count = 0
    for module in model.modules():
        weight: Any = module._parameters.get("weight")  # `module.weight` of an adapter is that of its base layer
        if is_sharded(weight) and int8_of(weight) is not None:
            raise ValueError(
                "cannot dequantize INT8 weights that FSDP2 has sharded; expected this before fully_shard, or "
                "from_pretrained of the saved model with Int8Config(dequantize=True)"
            )
        if isinstance(weight, Int8Weight):
            module.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=weight.requires_grad)
            if type(module) in Int8Layer.__subclasses__():
                module.__class__ = cast(Any, module).plain
            count += 1
    return count


def check_files(plan: Int8Plan, checkpoint_files: list[str], block_size: int) -> None:
    """Raise ValueError if the safetensors files lack codes and scales of a weight of `plan`, or do not fit it.

    A weight that the files hold as a plain one is removed from the plan. A resized head is an example.
    """
    files = TensorFiles(checkpoint_files)
    held = files.int8_weights(block_size)
    ends, plain = ({end for name in some for end in _ends(name)} for some in (held, files.kinds))
    for name in [name for name in plan.blocks if ends.isdisjoint(_ends(name)) and not plain.isdisjoint(_ends(name))]:
        logger.warning(f"INT8: {name} is no INT8 weight in the checkpoint, and stays as it is there")
        del plan.blocks[name]
    missing = [name for name in plan.blocks if ends.isdisjoint(_ends(name))]
    if missing and len(held) < len(plan.blocks):  # otherwise transformers renames the weights as it loads them
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(plan.blocks)} INT8 weights, {missing[0]} the first; "
            f"expected {CODES} and {SCALES} of each"
        )


def _ends(name: str) -> list[str]:
    """The name without up to two of its first parts: models with and without a head have other prefixes."""
    parts = name.split(".")
    return [".".join(parts[cut:]) for cut in range(min(3, len(parts) - 1))]
