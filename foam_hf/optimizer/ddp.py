"""Takes the reduction of gradients over from torch's DistributedDataParallel, which keeps a copy of all of them.

DDP goes on to send buffers before a forward pass, and to say in ``no_sync`` that nothing is to be reduced. All private
names of torch that this needs are in ``NAMES``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, distributed

# Name -> what it is for. `test_ddp_has_the_names_that_release_uses` looks for them in the installed torch.
NAMES = {
    "reducer": "holds the buckets, and reduces them",
    "logger": "keeps the reducer alive",
    "parameters_to_ignore": "names of weights whose gradients DDP does not average",
    "require_backward_grad_sync": "False inside of no_sync",
    "bucket_bytes_cap": "the user's bucket_cap_mb, in bytes",
    "static_graph": "an argument of DDP",
    "mixed_precision": "an argument of DDP",
    "_comm_hooks": "hooks of register_comm_hook",
    "_delay_all_reduce_params": "an argument of DDP",
    "_build_params_for_reducer": "makes the reducer's arguments",
    "_build_debug_param_to_name_mapping": "makes the reducer's arguments",
    "_ddp_init_helper": "makes reducer and logger",
}


class _Idle:
    """Stands in for DDP's reducer and logger. What a forward pass calls does nothing, everything else is an error."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    prepare_for_forward = prepare_for_backward = _rebuild_buckets = _delay_all_reduce = _nothing
    set_runtime_stats_and_log = set_error_and_log = _nothing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"gradient release averages the gradients in place of DDP's reducer, so DDP cannot use its {name}: got a "
            "call of join(), register_comm_hook() or another function of the reducer; expected it before "
            "enable_gradient_release, or training without gradient release"
        )


def take_over(ddp: Any) -> Callable[[], None]:
    """Free DDP's buckets and end its reduction.

    Returns:
        a function that gives it back to DDP.

    Raises:
        ValueError: DDP was told to do more than to average.
    """
    for what, asked in (
        ("a communication hook", ddp._comm_hooks),
        ("mixed_precision", ddp.mixed_precision),
        ("delay_all_reduce_named_params", ddp._delay_all_reduce_params),
    ):
        if asked:
            raise ValueError(
                f"gradient release averages the gradients in place of DDP: got a DistributedDataParallel with {what}; "
                "expected one without it, or training without gradient release"
            )
    ddp.reducer = ddp.logger = _Idle()

    def give_back() -> None:
        if not distributed.is_initialized():
            return  # the process group is gone, and with it all that DDP could do
        parameters, sparse = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
        if ddp.static_graph:
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()

    return give_back


def ignored_by(ddp: Any) -> list[Tensor]:
    """The weights whose gradients DDP was told not to average."""
    return [p for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore]
