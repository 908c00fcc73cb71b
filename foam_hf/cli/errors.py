"""The error that ends a `foam-hf` command with one line on stderr."""

from __future__ import annotations


class CommandError(Exception):
    """A message for the user, and the exit code of the command."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
