"""Counts the memory of optimizers other than FOAM: state after one step, and temporary bytes during a step.

A peer is an optimizer of another package that plans are compared with. `PEERS`, at the end, has a record for each.
Each function counts what the optimizer's own code keeps when Trainer builds it; tests compare it with the real
optimizer, to the byte. State that is a Python number (most step counters) counts as 0. Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foam_hf.memory.measured import adamw_state_bytes
from foam_hf.optimizer.groups import layer_names

FLOAT = 4  # bytes of float32
# Adam-mini keeps one value a row for these weights: embeddings and heads, values, attention outputs, MLPs.
_MINI_ROWS = (
    *("embed", "embd", "wte", "lm_head", "output", "final_layer"),
    *("v_proj", "wv", "value", "o_proj", "wo", "attn.proj", "feed_forward", "linear", "mlp"),
)
_BNB_BLOCK = 256  # elements that share a scale in bitsandbytes
_BNB_SMALLEST = 4096  # bitsandbytes keeps float32 state for weights of fewer elements


def no_temporary_bytes(trained: Sequence[Tensor]) -> int:
    """The temporary bytes of a step that allocates nothing."""
    return 0


@dataclass(frozen=True)
class Peer:
    """How to count the memory of one optimizer.

    Attributes:
        names: the values of Trainer's `optim` that mean this optimizer; our own name if Trainer has none.
        state: (model, targets if there are any, **options) -> bytes of state after one step.
        targets: (model, `optim_target_modules`) -> names of the weights that the optimizer does not update as AdamW.
        options: key that Trainer reads from `optim_args` -> its legal words, or None for a number.
        temporary: trained tensors -> the most bytes that a step allocates and frees again.
        flat: whether the optimizer needs no shapes, so that it updates the flat vectors of DeepSpeed's ZeRO too.
    """

    names: tuple[str, ...]
    state: Callable[..., int]
    targets: Callable[[nn.Module, str | list[str] | None], set[str]] | None = None
    options: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    temporary: Callable[[Sequence[Tensor]], int] = no_temporary_bytes
    flat: bool = False

    def state_bytes(
        self, model: nn.Module, options: Mapping[str, Any], target_modules: str | list[str] | None = None
    ) -> int:
        """Bytes of state after one step for `model`, which may be on any device."""
        targets = (self.targets(model, target_modules),) if self.targets else ()
        return self.state(model, *targets, **options)


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter of all trained parameters; tied ones are listed once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module) -> int:
    """`torch.optim.AdamW`: two moments in the dtype of the weights, and a step of 4 bytes a tensor."""
    return adamw_state_bytes(model.parameters())


def adamw_8bit(model: nn.Module) -> int:
    """bitsandbytes' block-wise 8-bit AdamW, under Trainer's rule that embeddings keep float32 moments."""
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)  # as Trainer tests: not EmbeddingBag
    }
    found = 2 * 256 * FLOAT  # two tables of 256 values, one for each moment
    for p in trainable_parameters(model).values():
        if p.numel() < _BNB_SMALLEST or id(p) in embeddings:
            found += 2 * p.numel() * FLOAT
        else:
            found += 2 * (p.numel() + FLOAT * -(-p.numel() // _BNB_BLOCK))
    return found


def adamw_32bit(model: nn.Module) -> int:
    """bitsandbytes' 32-bit AdamW: two float32 moments for weights of any dtype."""
    return sum(2 * p.numel() * FLOAT for p in trainable_parameters(model).values())


def adafactor(model: nn.Module) -> int:
    """transformers' Adafactor, as Trainer sets it: no first moment; row and column means in at least float32."""
    found = 0
    for p in trainable_parameters(model).values():
        size = max(p.element_size(), FLOAT)
        moment = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel()
        found += (moment + 1) * size  # 1: the root mean square of the parameter
    return found


def sgd(model: nn.Module) -> int:
    """`torch.optim.SGD` without momentum keeps nothing."""
    return 0


def galore(model: nn.Module, targets: Collection[str], *, rank: int = 128, proj_type: str = "std") -> int:
    """GaLore's AdamW: the projection and the moments of the projected gradient for `targets`; AdamW for the rest."""
    found = 0
    for name, p in trainable_parameters(model).items():
        if name in targets:
            projection, low_rank = _svd_projection(p, rank, proj_type)
            found += projection + 2 * low_rank * p.element_size()
        else:
            found += 2 * p.numel() * p.element_size()
    return found


def apollo(
    model: nn.Module,
    targets: Collection[str],
    *,
    rank: int = 128,
    proj: str = "random",
    proj_type: str = "std",
) -> int:
    """APOLLO's AdamW: as GaLore, with a random projection by default, and the norm of the last scaled gradient."""
    found = 0
    for name, p in trainable_parameters(model).items():
        if name not in targets:
            found += 2 * p.numel() * p.element_size()
            continue
        if proj == "svd":
            projection, low_rank = _svd_projection(p, rank, proj_type)
        else:
            rows, columns = p.shape
            right = _projects_columns(p, proj_type)
            projection = rank * (columns if right else rows) * p.element_size()
            low_rank = rank * (rows if right else columns)
        found += projection + (2 * low_rank + 1) * p.element_size()
    return found


def muon(model: nn.Module, targets: Collection[str]) -> int:
    """`torch.optim.Muon` for the matrices of `targets`: one momentum in the weights' dtype. AdamW for the rest."""
    parameters = trainable_parameters(model)
    matrices = [p for name, p in parameters.items() if name in targets and p.dim() == 2]
    ids = {id(p) for p in matrices}
    momentum = sum(p.numel() * p.element_size() for p in matrices)
    return momentum + adamw_state_bytes(p for p in parameters.values() if id(p) not in ids)


def adam_mini(model: nn.Module) -> int:
    """Adam-mini 1.1.1: a full first moment, and a second one for each head, row or tensor, by the weight's name.

    Raises:
        ValueError: the model's config lacks hidden_size or num_attention_heads, or Adam-mini itself would fail on a
            parameter.
    """
    config = getattr(model, "config", None)
    hidden_size, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if hidden_size is None or heads is None:
        raise ValueError(
            f"adam_mini needs a config with hidden_size and num_attention_heads, got {type(model).__name__}"
        )
    head = hidden_size * hidden_size // heads
    found = 0
    for full_name, p in trainable_parameters(model).items():
        name = full_name.lower()
        if "bias" in name:
            second = p.numel()
        elif any(part in name for part in ("k_proj", "q_proj", "wq", "wk", "query", "key")):
            second, rest = divmod(p.numel(), head)
            if rest:
                raise ValueError(
                    f"adam_mini cannot divide {full_name} of shape {tuple(p.shape)} into heads of {head} elements"
                )
        elif any(part in name for part in _MINI_ROWS):
            if p.dim() < 2:
                raise ValueError(f"adam_mini takes {full_name} for a matrix, and it has shape {tuple(p.shape)}")
            second = p.shape[0]
        else:
            second = 1
        found += (p.numel() + second) * p.element_size()
    return found


def linear_targets(model: nn.Module, target_modules: str | list[str]) -> set[str]:
    """Names of the weights that Trainer's `optim_target_modules` gives to GaLore and APOLLO: `nn.Linear` only.

    Raises:
        ValueError: none matches.
    """
    from transformers.trainer_utils import check_target_module_exists

    everything = isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"
    found = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (everything or check_target_module_exists(target_modules, name))
    }
    if not found:
        raise ValueError(
            f"optim_target_modules matches no nn.Linear, got {target_modules!r}; expected parts of module names in a "
            "list, a regex of whole names, or 'all-linear'"
        )
    return found


def projected_targets(model: nn.Module, target_modules: str | list[str] | None) -> set[str]:
    """Names of the weights that GaLore and APOLLO project: `optim_target_modules`, or the linear weights of layers."""
    if target_modules:
        return linear_targets(model, target_modules)
    return layer_names(model) & linear_targets(model, "all-linear")


def _projects_columns(p: Tensor, proj_type: str) -> bool:
    """Whether the projection reduces the columns of the gradient to `rank`, not its rows."""
    tall = p.shape[0] >= p.shape[1]
    return {"std": tall, "reverse_std": not tall, "right": True, "left": False}[proj_type]


def _svd_projection(p: Tensor, rank: int, proj_type: str) -> tuple[int, int]:
    """(bytes of the projection, elements of the projected gradient) of a projection by the gradient's SVD.

    In float32 the projection is a slice of the SVD's factor and keeps the whole factor alive. In other dtypes it is a
    copy.
    """
    rows, columns = p.shape
    full = min(rows, columns)
    rank = min(rank, full)
    kept = full if p.dtype == torch.float32 else rank
    if proj_type == "full":
        return kept * (rows + columns) * p.element_size(), rank * rank
    right = _projects_columns(p, proj_type)
    return kept * (columns if right else rows) * p.element_size(), rank * (rows if right else columns)


def _second_moments(trained: Sequence[Tensor]) -> int:
    """AdamW that is not fused: the square roots of all second moments at the same time."""
    return sum(p.numel() * p.element_size() for p in trained)


def _float32_copies(trained: Sequence[Tensor]) -> int:
    """Adafactor: two float32 tensors of a weight's shape; for half precision also copies of gradient and weight."""
    return max((p.numel() * (8 if p.element_size() > 2 else 16) for p in trained), default=0)


def _full_updates(trained: Sequence[Tensor]) -> int:
    """GaLore and APOLLO: the update of a weight at full size, and one more tensor from which it is computed."""
    return max((2 * p.numel() * p.element_size() for p in trained), default=0)


_SIDES = ("std", "reverse_std", "right", "left")
_GALORE: dict[str, tuple[str, ...] | None] = {
    "rank": None,
    "update_proj_gap": None,
    "scale": None,
    "proj_type": (*_SIDES, "full"),
}
_APOLLO: dict[str, tuple[str, ...] | None] = {
    "rank": None,
    "update_proj_gap": None,
    "scale": None,
    "proj": ("random", "svd"),
    "scale_type": ("channel", "tensor"),
    "proj_type": _SIDES,
}
PEERS = (
    Peer(("adamw_torch",), adamw, temporary=_second_moments, flat=True),
    Peer(("adamw_torch_fused",), adamw, flat=True),
    Peer(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), adamw_8bit, flat=True),
    Peer(("paged_adamw_32bit",), adamw_32bit, flat=True),
    Peer(("adafactor",), adafactor, temporary=_float32_copies, flat=True),
    Peer(("sgd",), sgd, flat=True),
    Peer(("galore_adamw",), galore, projected_targets, _GALORE, _full_updates),
    Peer(("apollo_adamw",), apollo, projected_targets, _APOLLO, _full_updates),
    # Trainer has no name for torch.optim.Muon and for Adam-mini (of the adam-mini package); these are ours.
    Peer(("muon",), muon, lambda model, target_modules: layer_names(model)),
    Peer(("adam_mini",), adam_mini),
)
BY_NAME = {name: peer for peer in PEERS for name in peer.names}
