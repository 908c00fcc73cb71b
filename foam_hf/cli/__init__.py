"""The `foam-hf` command."""

from foam_hf.cli.command import main

__all__ = ["main"]
