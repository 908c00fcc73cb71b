"""The tables of offload_peak.py's results. Sizes are in GiB, 2**30 bytes, of host memory in GB."""

from recipes.benchmarks.common.report_parts import heading, not_measured, number, table
from recipes.benchmarks.memory.memory_report import GIB, gib

HOST_GB, PEAK_GIB, SPEED = 12, 7.3, 0.9  # what is to be reached
PAIRS = {"offload": "resident", "offload4": "resident4"}


def offload_tables(content: dict) -> str:
    """A row a case, what was not measured, and the targets."""
    rows = content["rows"]
    header = ["run", "model", "tokens a step", "limit GiB", "peak GiB", "reserved GiB", "host GB", "host peak GB"]
    header += ["ms a step", "tokens a second", "bus GB/s: in, out, each of both"]
    good = [row for row in rows if row["status"] == "ok"]
    measured = table(header, [_line(row) for row in good]) if good else ""
    return "\n\n".join(part for part in (heading(content), measured, not_measured(rows), targets(content)) if part)


def _line(row: dict) -> list[str]:
    bus = row["bus_GBps"]
    return [
        row["label"],
        row["model"],
        f"{row['batch']} x {row['sequence']}",
        gib(row["limit_bytes"]),
        gib(row["peak_bytes"]),
        gib(row["peak_reserved_bytes"]),
        number(row["host_bytes"] and row["host_bytes"] / 1e9),
        number(row["host_peak_bytes"] / 1e9),
        number(row["ms"], ".0f"),
        number(row["tokens_per_s"], ".0f"),
        ", ".join(number(bus[name], ".0f") for name in ("to_device", "to_host", "each_of_both")) if bus else "",
    ]


def hidden(row: dict, resident: dict) -> bool:
    """Whether by arithmetic the bus is hidden: all layers come in no more time than a forward pass takes.

    With checkpointing a forward pass is a quarter of a step's work, and half of what the bus brings.
    """
    seconds = row["host_bytes"] / (1e9 * row["bus_GBps"]["each_of_both"])
    return seconds <= resident["ms"] / 1000 / 4


def targets(content: dict) -> str:
    """Each target that these results can judge."""
    found = {row["case"]: row for row in content["rows"] if row["status"] == "ok" and row["peak_bytes"]}
    lines = []
    if row := found.get("8gb-offload"):
        peak, host = row["peak_bytes"] / GIB, row["host_bytes"] / 1e9
        lines.append(
            ["8 B on an 8 GB card: peak, loading included, GiB", f"<= {PEAK_GIB}", number(peak), peak <= PEAK_GIB]
        )
        lines.append(["the same: host memory of the weights, GB", f"<= {HOST_GB}", number(host), host <= HOST_GB])
    for case, other in PAIRS.items():
        row, resident = found.get(case), found.get(other)
        if row and resident:
            ratio = row["tokens_per_s"] / resident["tokens_per_s"]
            asked = hidden(row, resident)
            where = "the bus is hidden" if asked else "the bus is not hidden in the forward pass"
            what = f"{row['batch']} x {row['sequence']} tokens ({where}): tokens a second over the resident run's"
            lines.append([what, f">= {SPEED}" if asked else "", number(ratio), ratio >= SPEED if asked else None])
    rows = [[what, limit, value, {True: "yes", False: "no", None: ""}[met]] for what, limit, value, met in lines]
    return table(["target", "limit", "measured", "met"], rows) if rows else ""
