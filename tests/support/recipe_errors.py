"""The errors of recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def exit_message(main: Callable[[list[str]], Any], argv: list[str]) -> str:
    """The message of one line with which `main` exits."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, str), "a message, not a bare exit status"
    assert "\n" not in caught.value.code
    return caught.value.code
