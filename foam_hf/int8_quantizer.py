"""Keeps the names of `foam_hf.int8.quantizer` importable by their old path, which pickles of version 0.2 name."""

from foam_hf.int8.quantizer import Int8Config, Int8Quantizer

__all__ = ["Int8Config", "Int8Quantizer"]
