"""`foam_param_groups`: param groups for `FOAM`, which decide which weights of a model fold and which decay."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from foam_hf.optim_args import default_scale, embedding_rule_of, names_of, option
from foam_hf.optimizer.tables import by_kind, table_fields
from foam_hf.optimizer.targets import select_targets
from foam_hf.rules.all import folding_rule
from foam_hf.tensors.places import whole

# Names of parameters that transformers' Trainer keeps out of weight decay; searched in lower-cased names.
_NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_PEFT_EMBEDDINGS = ("lora_embedding_", "trainable_tokens_")


def plain_options() -> dict[str, Any]:
    """The fields that make a group plain AdamW, whatever the arguments of the optimizer are."""
    return {name: option(name).plain for name in names_of(lambda each: each.plain is not None)}


def foam_param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    target_modules: str | list[str] | None = None,
    fold_embeddings: bool | None = None,
    fold_head: bool | None = None,
    embedding_scale: float | None = None,
    embedding_rule: str | None = None,
    decay_parameter_names: Collection[str] | None = None,
    **folded_options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into folded and plain groups, with and without weight decay.

    A parameter folds if it has two or more dimensions and lies inside the base model or is an LM head. All others get
    plain AdamW: norms, biases, fresh classifiers, and PEFT's `modules_to_save` copies.

    The base model is `model.base_model` if there is one (of a PEFT model, that of the wrapped model), else the whole
    model. If models of transformers lie inside another module (a loss, a value head, a LightningModule), each of them
    has its base model, and the rest of that module does not fold. Models without trainable weights do not count.
    Wrappers of DDP and `torch.compile` are removed first.

    Two rules group further:

    * `second_moment="muon"` is for matrices that can be orthogonalised. Convolutions get plain AdamW, and embeddings
      and LM heads that fold get the factored rule at scale 1.
    * `second_moment="adam_mini"` gives its second moments to all parameters but biases, whether they fold or not.
      Weights whose blocks have different numbers of rows are in different groups.

    Args:
        model: any `nn.Module`. Parameters with `requires_grad=False` are left out, and tied ones appear once.
        weight_decay: of the two groups that decay; it is 0 in the others.
        target_modules: folds only some of these weights, chosen as by Trainer's `optim_target_modules`: a list whose
            entries are module names, parts of names or regexes that match whole names; or one such regex; or
            `"all-linear"` for every `nn.Linear` and transformers `Conv1D`. Names are those of
            `model.named_modules()`. It never adds a weight. A list entry that matches no weight that folds gives a
            warning.
        fold_embeddings: None treats embeddings as all other matrices. True folds them even if `target_modules` does
            not name them, and False never folds them. A tied LM head is an embedding.
        fold_head: the same for an LM head that is not tied.
        embedding_scale: the `scale` of embeddings and LM heads that fold, with `second_moment="block"`; other rules do
            not read it. None is 1 with the factored rule, and `scale`, here or of FOAM, with the block rule.
        embedding_rule: their rule, also with `second_moment="block"` alone: "factored", with which they learn more
            from much text, or "block", that of other matrices. None is "factored", but "block" under DeepSpeed's ZeRO,
            with gradient release and several backward passes, of INT8 heads, and at level 0.
        decay_parameter_names: names, as in `model.named_parameters()`, that get weight decay. Default: those of
            `Trainer.get_decay_parameter_names`, which are all but biases and norms.
        **folded_options: fields of the folded groups: `level`, `scale`, `second_moment`, `residual_scale`,
            `stochastic_rounding`, `state_dtype`, `momentum`. Those that are not given are left to the arguments of
            `FOAM`.

    Returns:
        Groups `{"params": [...], "weight_decay": ..., ...}` in the order folded/decay, folded/no decay, plain/decay,
        plain/no decay; those of embeddings and heads with fields of their own come before plain ones. Empty groups
        are left out. Parameters keep the order of `model.named_parameters()`. Groups of embeddings whose rule is left
        open have a field `otherwise`, the rule and scale that FOAM gives them where they cannot be factored.

    Raises:
        ValueError: no parameter is trainable, `target_modules` matches no weight, the weight decay is negative, NaN
            or infinite, or the scale or rule of embeddings is not legal, also with a rule that does not read them.
        TypeError: an unknown folded option, or an argument of the wrong type.
    """
    option("embedding_scale").check(embedding_scale)
    option("embedding_rule").check(embedding_rule)
    rule, config = folding_rule(folded_options.get("second_moment")), getattr(_unwrap(model), "config", None)
    tables = rule.table_fields or table_fields(folded_options, embedding_scale, embedding_rule)
    names = foam_parameter_names(
        model,
        target_modules=target_modules,
        fold_embeddings=fold_embeddings,
        fold_head=fold_head,
        decay_parameter_names=decay_parameter_names,
        second_moment=folded_options.get("second_moment"),
        tables=bool(tables),
    )
    option("weight_decay").check(weight_decay)
    _check_folded_options(folded_options)
    parameters = dict(model.named_parameters())
    kinds = {
        "folded": folded_options,
        "table": {**folded_options, **tables},
        "plain": plain_options(),
    }
    groups: list[dict[str, Any]] = []
    for group, members in names.items():
        kind, decay = group.split("/")
        for chosen, fields in rule.groups(model, members, kinds[kind], config):
            weights = [parameters[name] for name in chosen]
            shared = {"weight_decay": weight_decay if decay == "decay" else 0.0, **fields}
            groups += [{"params": some, **each} for some, each in by_kind(weights, shared)]
    return groups


def foam_parameter_names(
    model: nn.Module,
    *,
    target_modules: str | list[str] | None = None,
    fold_embeddings: bool | None = None,
    fold_head: bool | None = None,
    decay_parameter_names: Collection[str] | None = None,
    second_moment: str | None = None,
    tables: bool = False,
) -> dict[str, list[str]]:
    """Parameter names by group: "folded/decay", "folded/no_decay", "plain/decay", "plain/no_decay".

    With `tables`, and of Muon, also "table/decay" and "table/no_decay", for embeddings and heads that fold. Arguments,
    order and errors are those of `foam_param_groups`. Empty groups are left out.
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
        folded = select_targets(model, folded, asked, target_modules)
    folded |= asked
    layers_alone = folding_rule(second_moment).table_fields is not None
    apart = embeddings | heads if tables or layers_alone else set()
    unfit = _convolutions(model) if layers_alone else set()
    decay = set(_decay_parameter_names(model) if decay_parameter_names is None else decay_parameter_names)
    groups: dict[str, list[str]] = {
        f"{kind}/{rule}": [] for kind in ("folded", "table", "plain") for rule in ("decay", "no_decay")
    }
    for name, p in trainable.items():
        kind = "plain" if id(p) not in folded or name in unfit else "table" if id(p) in apart else "folded"
        groups[f"{kind}/{'decay' if name in decay else 'no_decay'}"].append(name)
    return {group: members for group, members in groups.items() if members}


def grouping_options(options: dict[str, Any], *, blocks_alone: bool = False) -> dict[str, Any]:
    """The arguments of `foam_param_groups` among `options`. Those that are no fields of a group leave `options`.

    `blocks_alone` is that of `embedding_rule_of`.
    """
    asked = [option(name) for name in names_of(lambda each: each.grouping) if name in options]
    rule_of_tables = embedding_rule_of(options, blocks_alone=blocks_alone)
    chosen = {each.name: options[each.name] if each.field else options.pop(each.name) for each in asked}
    if rule_of_tables == "block":
        chosen["embedding_rule"] = "block"
        scale = options.get("scale") or default_scale(options.get("level", option("level").default), "block")
        if chosen.get("embedding_scale") == scale:
            del chosen["embedding_scale"]  # like other matrices: no groups of their own
    return chosen


def layer_names(model: nn.Module) -> set[str]:
    """Names of the trainable matrices inside the base model, without embeddings."""
    groups = foam_parameter_names(model, fold_embeddings=False, fold_head=False)
    return {name for group, names in groups.items() if group.startswith("folded") for name in names}


def _convolutions(model: nn.Module) -> set[str]:
    """Names of the parameters of convolutions, also of weights that `torch.nn.utils.parametrize` has replaced."""
    return {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for own, _ in module.named_parameters()
    }


def _foldable(model: nn.Module, trainable: Mapping[str, Tensor]) -> tuple[set[int], set[int], set[int]]:
    """Ids of the matrices that can fold: of layers, of embeddings, and of LM heads."""
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
        if whole(p).dim() < 2 or id(p) not in inside or "modules_to_save" in parts:
            continue
        # A weight that is both an embedding and an LM head counts as an embedding.
        if id(p) in embeddings or any(part.startswith(_PEFT_EMBEDDINGS) for part in parts):
            foldable_embeddings.add(id(p))
        elif id(p) in heads:
            foldable_heads.add(id(p))
        else:
            folded.add(id(p))
    return folded, foldable_embeddings, foldable_heads


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _inside_and_heads(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters that lie inside a base model or are an LM head, and of the LM heads among them."""
    trained = [inner for inner in _pretrained(model) if any(p.requires_grad for p in inner.parameters())]
    inside: set[int] = set()
    heads: set[int] = set()
    for inner in trained or [model]:  # modules around frozen models are no heads of these, and fold
        base, heads_of_base = _base_model_and_heads(inner)
        heads |= heads_of_base
        inside |= heads_of_base | {id(p) for p in base.parameters()}
    return inside, heads


def wraps_models(module: nn.Module) -> bool:
    """Whether models of transformers or PEFT lie inside `module`, and `module` itself is none."""
    return _pretrained(module) not in ([], [_unwrap(module)])


def _pretrained(module: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers or PEFT in `module`, found by their methods without importing either."""
    module = _unwrap(module)
    of_transformers = callable(getattr(module, "get_output_embeddings", None)) and isinstance(
        getattr(module, "base_model", None), nn.Module
    )
    if of_transformers or callable(getattr(module, "get_base_model", None)):
        return [module]
    return list(dict.fromkeys(found for child in module.children() for found in _pretrained(child)))


def _base_model_and_heads(model: nn.Module) -> tuple[nn.Module, set[int]]:
    """The base model, and the ids of the parameters of LM heads, which may lie inside the base model, as in T5."""
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


def _decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that decay in Trainer: those outside of nn.LayerNorm and not named as a bias or norm."""
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
            own = names_of(lambda each: each.grouping and not each.field)
            legal = (*folded, "weight_decay", "target_modules", *own, "decay_parameter_names")
            near = difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"unknown option, got {key}={options[key]!r}; did you mean {near!r}? expected one of "
                f"{', '.join(legal)} (lr, betas and eps go to FOAM itself)"
            )
