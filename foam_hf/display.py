"""Formats numbers of bytes, and holds the colors and file formats of pictures."""

from __future__ import annotations

UNAVAILABLE = "unavailable"
PICTURES = (".png", ".pdf", ".svg")  # file formats of pictures
INK = "#202124"
# They differ in brightness too, for grey print, and blue and orange differ for color-blind readers.
KIND_COLORS = {
    "weights": "#3d4450",
    "masters": "#6d7584",
    "gradients": "#a3aab4",
    "state": "#e08a1e",
    "buffers": "#d6dae0",
    "activations": "#7db4e0",
}


def format_bytes(n: int | None) -> str:
    """`n` bytes in decimal units: "512 B", "1.23 MB"; "unavailable" for None."""
    if n is None:
        return UNAVAILABLE
    if abs(n) < 1000:
        return f"{n} B"
    value = n / 1000
    for unit in ("kB", "MB", "GB"):
        if abs(value) < 999.995:  # more would print as 1000.00
            return f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def missing_for_pictures() -> str | None:
    """Why pictures cannot be drawn, and what to install; None if they can."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return "drawing needs matplotlib, which is not installed; expected: pip install matplotlib"
    return None
