"""Where pickles of version 0.2 and earlier look for `Int8Weight`."""

from foam_hf.int8.weight import Int8Weight, _rebuild

__all__ = ["Int8Weight", "_rebuild"]
