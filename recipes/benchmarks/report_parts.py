"""What every report of the benchmarks is made of: Markdown tables, and a line on the machine."""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def heading(machine: dict) -> str:
    software = [
        f"{name} {machine[name]}" for name in ("torch", "triton", "transformers", "driver") if machine.get(name)
    ]
    copy = f"; a large copy moves {machine['copy_GBps']:.0f} GB/s, read and written" if "copy_GBps" in machine else ""
    return f"{machine['name']}, {', '.join(software)}, {machine['date']}{copy}."


def not_measured(rows: list[dict]) -> str:
    """The rows without numbers, and why: nothing that was tried is left out."""
    lines = [f"* {row['label']}: {row['status']}. {row['reason']}" for row in rows if row["status"] != "ok"]
    return "\n".join(lines)


def split(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
