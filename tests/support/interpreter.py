"""Triton's interpreter without work that it does again and again."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Let a device function that is called inside a kernel leave triton.language as the kernel's launch patched it.

    The interpreter patches all of it anew for every such call, which changes nothing and takes a third of its time.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another release of Triton
        return
    original, language = interpreter._patch_lang, interpreter.tl

    def patch(function: Any) -> Any:
        found = [value for value in function.__globals__.values() if value is language or value is language.core]
        if found and not any(language.core.is_builtin(module.arange) for module in found):
            return interpreter._LangPatchScope()
        return original(function)

    interpreter._patch_lang = patch
