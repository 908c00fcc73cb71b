"""Keeps `Int8Weight` importable by its old path, which pickles of version 0.2 and earlier name."""

from foam_hf.int8.weight import Int8Weight, _rebuild

__all__ = ["Int8Weight", "_rebuild"]
