"""Optimizers that Trainer has no name for: torch's Muon and Adam-mini, by `--optim muon` and `--optim adam_mini`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from foam_hf.optimizer.groups import layer_names

# What --optim may say beside Trainer's names, and the name that TrainingArguments gets instead.
OTHERS = {"muon": "adamw_torch", "adam_mini": "adamw_torch"}


class Together(Optimizer):
    """Several optimizers as one, for Trainer's scheduler and checkpoints: their groups in order, and one state."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let every optimizer work on this one's groups and state, which loading a checkpoint replaces."""
        rest = self.param_groups
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups, rest = rest[:count], rest[count:]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


def build(name: str, model: nn.Module, args: Any, decaying: set[str]) -> Optimizer:
    """The optimizer of one of the names in OTHERS, with the settings of TrainingArguments.

    SystemExit for a package or a release that lacks it, and for `optim_args`, which neither has.
    """
    if args.optim_args:
        raise SystemExit(f"--optim_args: got {args.optim_args}; --optim {name} has none.")
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "adam_mini":
        try:
            from adam_mini import Adam_mini
        except ImportError:
            raise SystemExit("--optim adam_mini needs `pip install adam-mini`.") from None
        return Adam_mini(
            list(named.items()),
            **settings,
            weight_decay=args.weight_decay,
            dim=model.config.hidden_size,
            n_heads=model.config.num_attention_heads,
            n_kv_heads=model.config.num_key_value_heads,
            verbose=False,
        )
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"--optim muon: torch {torch.__version__} has no torch.optim.Muon; expected 2.9 or newer.")
    inside = layer_names(model)  # embeddings and heads are none to orthogonalise
    matrices = [p for key, p in named.items() if key in inside and p.dim() == 2]
    taken = {id(p) for p in matrices}
    groups = [
        {
            "params": [p for key, p in named.items() if id(p) not in taken and (key in decaying) == decays],
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    # match_rms_adamw: the same learning rate suits both.
    muon = torch.optim.Muon(
        matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, torch.optim.AdamW([group for group in groups if group["params"]], **settings))
