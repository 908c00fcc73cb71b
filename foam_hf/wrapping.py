"""Functions of other packages with a wrapper of ours around them: once, and by the foam_hf that was imported last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_LOAD = object()  # of this import of foam_hf: a notebook may import it twice


def require(owner: Any, name: str) -> Any:
    """The attribute, or an ImportError that names what moved."""
    if not hasattr(owner, name):
        import transformers

        raise ImportError(
            f"foam_hf cannot register with transformers {transformers.__version__}: {owner.__name__} has no {name}; "
            "expected transformers 4.57 to 5.x."
        )
    return getattr(owner, name)


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrapper(owner.name)`, once; what an earlier import of foam_hf put there is replaced."""
    original = require(owner, name)
    load, mine = getattr(original, "_foam_hf", (None, None))  # functools.wraps carries it through later wrappers
    if load is _LOAD or (load is not None and mine is not original):  # in the second case we are inside of another's
        return
    wrapped = wrapper(original if load is None else original.__wrapped__)
    function = getattr(wrapped, "__func__", wrapped)
    function._foam_hf = (_LOAD, function)
    setattr(owner, name, wrapped)
