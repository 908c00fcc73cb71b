"""Which weights of a model fold, and which of them decay: param groups for `FOAM`."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from foam_hf.optim_args import names_of, option
from foam_hf.rules.all import folding_rule

logger = logging.getLogger(__name__)

# Embeddings and heads where the layers have Muon: a table of vectors is no matrix to orthogonalise.
TABLE_OPTIONS = {"second_moment": "factored", "scale": 1.0}

# The names that transformers' Trainer keeps out of weight decay; searched in lower-cased names.
_NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_PEFT_EMBEDDINGS = ("lora_embedding_", "trainable_tokens_")


def plain_options() -> dict[str, Any]:
    """What makes a group plain AdamW, whatever the optimizer's own arguments say."""
    return {name: option(name).plain for name in names_of(lambda each: each.plain is not None)}


def foam_param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    target_modules: str | list[str] | None = None,
    fold_embeddings: bool | None = None,
    fold_head: bool | None = None,
    decay_parameter_names: Collection[str] | None = None,
    **folded_options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into folded and plain groups, with and without weight decay.

    A parameter folds if it has two or more dimensions and lies inside the base model or is an LM head. The base model
    is `model.base_model` where there is one (in a PEFT model, that of the wrapped model), else the whole model. Where
    models of transformers lie inside another module (a loss, a value head around them, a LightningModule) each has its
    base model, and the rest of that module is a head; models of which nothing is trained do not count. What does not
    fold gets plain AdamW: norms, biases, fresh classifiers, and PEFT's `modules_to_save` copies. With
    `second_moment="muon"` so do convolutions, and embeddings and heads that fold have the factored rule at scale 1:
    neither are matrices to orthogonalise. With `second_moment="adam_mini"` all but biases have Adam-mini's second
    moments, folded or not, and weights whose blocks have different numbers of rows are in groups of their own. DDP and
    `torch.compile` wrappers are looked through.

    Args:
        model: any `nn.Module`; parameters with `requires_grad=False` are left out, tied ones appear once.
        weight_decay: of the two decaying groups; 0 in the others.
        target_modules: fold fewer weights, chosen as by Trainer's `optim_target_modules`: a list of module names, of
            parts of names or of regexes that match whole names; or one such regex; or `"all-linear"` for every
            `nn.Linear` and transformers `Conv1D`. Names are those of `model.named_modules()`. A weight that would not
            fold without it does not fold with it either; a list entry that matches none that folds is warned about.
        fold_embeddings: None folds embeddings as all other matrices, `target_modules` permitting; True folds them
            whatever it says, False never. An LM head that is tied is an embedding.
        fold_head: the same for an LM head that is a weight of its own.
        decay_parameter_names: names, as in `model.named_parameters()`, that get weight decay. Default: the rule of
            `Trainer.get_decay_parameter_names`, all but biases and norms.
        **folded_options: fields of the folded groups: `level`, `scale`, `second_moment`, `residual_scale`,
            `stochastic_rounding`, `state_dtype`, `momentum`; `FOAM`'s own arguments hold for those not given.

    Returns:
        Groups `{"params": [...], "weight_decay": ..., ...}` in the order folded/decay, folded/no decay, plain/decay,
        plain/no decay, of Muon with the tables between; empty ones are left out. Parameters keep the order of
        `model.named_parameters()`.

    Raises:
        ValueError: no trainable parameter, no weight matched by `target_modules`, a weight decay that is negative, NaN
            or infinite.
        TypeError: an unknown folded option, or an argument of the wrong type.
    """
    names = foam_parameter_names(
        model,
        target_modules=target_modules,
        fold_embeddings=fold_embeddings,
        fold_head=fold_head,
        decay_parameter_names=decay_parameter_names,
        second_moment=folded_options.get("second_moment"),
    )
    option("weight_decay").check(weight_decay)
    _check_folded_options(folded_options)
    parameters = dict(model.named_parameters())
    kinds = {"folded": folded_options, "table": {**folded_options, **TABLE_OPTIONS}, "plain": plain_options()}
    rule, config = folding_rule(folded_options.get("second_moment")), getattr(_unwrap(model), "config", None)
    groups = []
    for group, members in names.items():
        kind, decay = group.split("/")
        for chosen, fields in rule.groups(model, members, kinds[kind], config):
            groups.append(
                {
                    "params": [parameters[name] for name in chosen],
                    "weight_decay": weight_decay if decay == "decay" else 0.0,
                    **fields,
                }
            )
    return groups


def foam_parameter_names(
    model: nn.Module,
    *,
    target_modules: str | list[str] | None = None,
    fold_embeddings: bool | None = None,
    fold_head: bool | None = None,
    decay_parameter_names: Collection[str] | None = None,
    second_moment: str | None = None,
) -> dict[str, list[str]]:
    """Parameter names by group: "folded/decay", "folded/no_decay", "plain/decay", "plain/no_decay".

    Of Muon also "table/decay" and "table/no_decay", embeddings and heads that fold. Arguments, order and errors are
    those of `foam_param_groups`; empty groups are left out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is not a torch.nn.Module, got {type(model).__name__}; expected the model to train")
    if isinstance(decay_parameter_names, str):
        raise TypeError(f"decay_parameter_names is one string, got {decay_parameter_names!r}; expected a list or set")
    option("fold_embeddings").check(fold_embeddings)
    option("fold_head").check(fold_head)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        frozen = sum(1 for _ in model.parameters())
        raise ValueError(
            f"the model has no trainable parameter, got {type(model).__name__} with {frozen} frozen ones; "
            "expected at least one with requires_grad=True"
        )
    layers, embeddings, heads = _foldable(model, trainable)
    choices = ((embeddings, fold_embeddings), (heads, fold_head))
    asked: set[int] = set().union(*(ids for ids, wanted in choices if wanted))
    folded = layers.union(*(ids for ids, wanted in choices if wanted is None))
    if target_modules is not None:
        folded = _narrow(model, folded, asked, target_modules)
    folded |= asked
    tables, unfit = set(), set()
    if folding_rule(second_moment).matrices_only:
        tables, unfit = embeddings | heads, _convolutions(model)
    decay = set(_decay_parameter_names(model) if decay_parameter_names is None else decay_parameter_names)
    groups: dict[str, list[str]] = {
        f"{kind}/{rule}": [] for kind in ("folded", "table", "plain") for rule in ("decay", "no_decay")
    }
    for name, p in trainable.items():
        kind = "plain" if id(p) not in folded or name in unfit else "table" if id(p) in tables else "folded"
        groups[f"{kind}/{'decay' if name in decay else 'no_decay'}"].append(name)
    return {group: members for group, members in groups.items() if members}


def grouping_options(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `foam_param_groups` among `options`, from which those go that are no fields of a group."""
    asked = [option(name) for name in names_of(lambda each: each.grouping) if name in options]
    return {each.name: options[each.name] if each.field else options.pop(each.name) for each in asked}


def layer_names(model: nn.Module) -> set[str]:
    """Names of the trainable matrices inside the base model that are no embeddings."""
    groups = foam_parameter_names(model, fold_embeddings=False, fold_head=False)
    return {name for group, names in groups.items() if group.startswith("folded") for name in names}


def _convolutions(model: nn.Module) -> set[str]:
    """Names of the parameters of convolutions, those of parametrized weights too."""
    return {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for own, _ in module.named_parameters()
    }


def _foldable(model: nn.Module, trainable: Mapping[str, Tensor]) -> tuple[set[int], set[int], set[int]]:
    """Ids of the trainable matrices: of the layers, of the embeddings, of the LM heads."""
    inside, heads = _inside_and_heads(model)
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters()
    }
    folded, foldable_embeddings, foldable_heads = set(), set(), set()
    for name, p in trainable.items():
        parts = name.split(".")
        if p.dim() < 2 or id(p) not in inside or "modules_to_save" in parts:
            continue
        # An embedding that also serves as LM head is an embedding.
        if id(p) in embeddings or any(part.startswith(_PEFT_EMBEDDINGS) for part in parts):
            foldable_embeddings.add(id(p))
        elif id(p) in heads:
            foldable_heads.add(id(p))
        else:
            folded.add(id(p))
    return folded, foldable_embeddings, foldable_heads


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _inside_and_heads(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters that lie inside a base model or are an LM head, and of the LM heads among them."""
    found = [one for one in _pretrained(model) if any(p.requires_grad for p in one.parameters())]
    inside: set[int] = set()
    heads: set[int] = set()
    for one in found or [model]:  # around frozen models, what is trained is no head of theirs
        base, of_base = _base_model_and_heads(one)
        heads |= of_base
        inside |= of_base | {id(p) for p in base.parameters()}
    return inside, heads


def wraps_models(module: nn.Module) -> bool:
    """Whether models of transformers or PEFT lie inside `module`, which is none itself."""
    return _pretrained(module) not in ([], [_unwrap(module)])


def _pretrained(module: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers or PEFT in `module`, known by what they can: neither is imported here."""
    module = _unwrap(module)
    of_transformers = callable(getattr(module, "get_output_embeddings", None)) and isinstance(
        getattr(module, "base_model", None), nn.Module
    )
    if of_transformers or callable(getattr(module, "get_base_model", None)):
        return [module]
    return list(dict.fromkeys(found for child in module.children() for found in _pretrained(child)))


def _base_model_and_heads(model: nn.Module) -> tuple[nn.Module, set[int]]:
    """The base model, and the ids of LM head parameters, which in some models (T5) lie inside it."""
    model = _unwrap(model)
    if callable(getattr(model, "get_base_model", None)):  # PEFT
        model = _unwrap(cast(Any, model).get_base_model())
    try:
        head = cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        head = None
    modules = head if isinstance(head, Iterable) and not isinstance(head, nn.Module) else [head]
    heads = {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    base = getattr(model, "base_model", None)
    return (_unwrap(base) if isinstance(base, nn.Module) else model), heads


def _narrow(model: nn.Module, folded: set[int], embeddings: set[int], targets: str | list[str]) -> set[int]:
    """The ids of `folded` whose modules `targets` names; an error if it names none that folds."""
    if isinstance(targets, str):
        entries = [targets]
    elif isinstance(targets, list | tuple) and all(isinstance(entry, str) for entry in targets):
        entries = list(targets)
    else:
        raise TypeError(
            f"target_modules is neither a string nor a list of strings, got {targets!r}; "
            "expected module names, a regex, or 'all-linear'"
        )
    all_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    narrowed: set[int] = set()
    used: set[str] = set()
    candidates = []
    for module_name, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False)} & (folded | embeddings)
        if not own:
            continue
        candidates.append(module_name)
        if all_linear:
            hits = set(entries) if _is_linear(module) else set()
        elif isinstance(targets, str):
            hits = {targets} if _fullmatch(targets, module_name, strict=True) else set()
        else:
            hits = {entry for entry in entries if entry in module_name or _fullmatch(entry, module_name, strict=False)}
        if hits:
            used |= hits
            narrowed |= own & folded
    if not used:
        raise ValueError(_no_match(targets, entries, candidates))
    for entry in entries:
        if entry not in used:
            logger.warning(
                "target_modules: %r matches no weight that folds; such are %s", entry, _some(candidates, entry)
            )
    return narrowed


def _is_linear(module: nn.Module) -> bool:
    # Conv1D, GPT-2's transposed linear layer, by name: transformers is not imported here.
    return isinstance(module, nn.Linear) or any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__
    )


def _fullmatch(pattern: str, name: str, *, strict: bool) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        if not strict:  # an entry of a list may be meant as part of a name
            return False
        raise ValueError(
            f"target_modules is not a valid regular expression ({error}), got {pattern!r}; "
            "expected a regex, a list of names, or 'all-linear'"
        ) from error


def _no_match(targets: str | list[str], entries: list[str], candidates: list[str]) -> str:
    if not candidates:
        return f"target_modules matches no weight that folds, got {targets!r}; this model has none at all"
    wanted = " ".join(entries)
    if isinstance(targets, str) and any(targets in name for name in candidates) and targets:
        return (
            f"target_modules (Trainer's optim_target_modules) matches no weight that folds, got {targets!r}; "
            f"a string is a regex of whole names: expected {'.*' + targets + '.*'!r}, or a list, [{targets!r}]"
        )
    return (
        f"target_modules (Trainer's optim_target_modules) matches no weight that folds, got {targets!r}; "
        f"expected names such as {_some(candidates, wanted)}, parts of them in a list, or 'all-linear'"
    )


def _some(candidates: list[str], wanted: str, count: int = 4) -> str:
    """The names nearest to `wanted`, by their last part, then the first of all."""
    by_last_part: dict[str, str] = {}
    for name in candidates:
        by_last_part.setdefault(name.rsplit(".", 1)[-1], name)
    last_wanted = re.split(r"[.\s*]+", wanted)[-1]
    near = [
        by_last_part[part] for part in difflib.get_close_matches(last_wanted, list(by_last_part), n=count, cutoff=0.5)
    ]
    near += [name for name in difflib.get_close_matches(wanted, candidates, n=count) if name not in near]
    chosen = list(dict.fromkeys([*near, *by_last_part.values()]))[:count]
    return ", ".join(repr(name) for name in chosen)


def _decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that decay by Trainer's rule: outside of nn.LayerNorm, not named like a bias or norm."""
    names = []
    layer_norms: list[str] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.LayerNorm) and prefix:
            layer_norms.append(f"{prefix}.")
        for own_name, _ in module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
            if not _NO_DECAY_NAMES.search(own_name.lower()) and not own_name.startswith(tuple(layer_norms)):
                names.append(own_name)
    return names


def _check_folded_options(options: dict[str, Any]) -> None:
    folded = names_of(lambda each: each.folded)
    for key in options:
        if key not in folded:
            own = ("weight_decay", "target_modules", "fold_embeddings", "fold_head", "decay_parameter_names")
            legal = (*folded, *own)
            near = difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"unknown option, got {key}={options[key]!r}; did you mean {near!r}? expected one of "
                f"{', '.join(legal)} (lr, betas and eps go to FOAM itself)"
            )
