"""Keeps `optimizer_name` importable by its old path, which a training_args.bin of version 0.2 or earlier names."""

from foam_hf.trainer.names import optimizer_name

__all__ = ["optimizer_name"]
