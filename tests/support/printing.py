"""What a command prints, called in this process: to start one that imports torch and transformers takes seconds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any


def printed(function: Callable[..., Any], *arguments: Any) -> str:
    """What it prints to a stdout that is no terminal. AssertionError if it exits with a code other than 0."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            function(*arguments)
        except SystemExit as stopped:
            assert stopped.code in (None, 0), stopped.code
    return stdout.getvalue()
