"""What the state of an optimizer takes: measured, and as expected before a run."""

from foam_hf.memory.measured import (
    UNAVAILABLE,
    MemoryBreakdown,
    adamw_state_bytes,
    breakdown,
    expected_state_bytes,
    format_bytes,
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
