"""Counts the memory of optimizer state: measured in any optimizer, and expected of FOAM before a run."""

from foam_hf.display import UNAVAILABLE, format_bytes
from foam_hf.memory.measured import (
    MemoryBreakdown,
    adamw_state_bytes,
    breakdown,
    expected_state_bytes,
    headline,
    state_bytes,
    summarize,
)

__all__ = [
    "UNAVAILABLE",
    "MemoryBreakdown",
    "adamw_state_bytes",
    "breakdown",
    "expected_state_bytes",
    "format_bytes",
    "headline",
    "state_bytes",
    "summarize",
]
