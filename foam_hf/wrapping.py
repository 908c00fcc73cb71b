"""Wraps functions of transformers, so that each has one wrapper even if foam_hf is imported twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_THIS_IMPORT = object()  # marks wrappers of this import of foam_hf: a notebook may import it twice


def require(owner: Any, name: str) -> Any:
    """The attribute `name` of a module or class of transformers.

    Raises:
        ImportError: it does not exist; the message names it.
    """
    if not hasattr(owner, name):
        import transformers

        raise ImportError(
            f"foam_hf cannot register with transformers {transformers.__version__}: {owner.__name__} has no {name}; "
            "expected transformers 4.57 to 5.x."
        )
    return getattr(owner, name)


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrapper(owner.name)`. Idempotent; a wrapper of an earlier import is replaced.

    A wrapper that another package has wrapped stays: it cannot be taken out.
    """
    original = require(owner, name)
    # functools.wraps copies this attribute to wrappers of other packages.
    marked_import, marked_function = getattr(original, "_foam_hf", (None, None))
    wrapped_by_others = marked_import is not None and marked_function is not original
    if marked_import is _THIS_IMPORT or wrapped_by_others:
        return
    wrapped = wrapper(original if marked_import is None else original.__wrapped__)
    function = getattr(wrapped, "__func__", wrapped)
    function._foam_hf = (_THIS_IMPORT, function)
    setattr(owner, name, wrapped)
