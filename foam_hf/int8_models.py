"""Keeps the names of `foam_hf.int8.models` importable by their old path, which pickles of version 0.2 name."""

from foam_hf.int8.layers import _load_codes, _save_codes
from foam_hf.int8.layers import _refuse_incomplete_weight as _refuse_half
from foam_hf.int8.models import Int8Plan

__all__ = ["Int8Plan", "_load_codes", "_refuse_half", "_save_codes"]
