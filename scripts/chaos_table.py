"""Write the table of docs/faults.md from results/chaos.json.

    python scripts/chaos_table.py            # rewrites the block between the chaos markers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- chaos:begin -->", "<!-- chaos:end -->"
SHOWN = 9                           # figures of a test


def row(entry: dict) -> str:
    """One test; figures that are lists or mappings are in the JSON file only."""
    plain = [f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
             for name, value in entry["figures"].items() if isinstance(value, int | float | str)]
    passed, length = "yes" if entry["passed"] else "**no**", "fast" if entry["fast"] else "full"
    return f"| {entry['name']} | {passed} | {length}, {entry['seconds'] / 60:.1f} min | {'; '.join([*plain[:SHOWN], *entry['missed']])} |"


def block(found: dict) -> str:
    machine, at = found["machine"], [entry["at"][:10] for entry in found["tests"]]
    head = [f"[results/chaos.json](../results/chaos.json), {min(at)} to {max(at)}, {machine['cpus']} processors, {machine['memory_gb']} GB.", "",
            "| test | passed | length | figures |", "|---|---|---|---|"]
    return "\n".join([*head, *map(row, found["tests"])])


def main() -> None:
    page, source = ROOT / "docs" / "faults.md", ROOT / "results" / "chaos.json"
    if not source.exists():
        sys.exit(f"{source}: is not there; `make chaos` writes it")
    text = page.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{page}: the markers {BEGIN} and {END} are missing")
    page.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{block(json.loads(source.read_text()))}\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
