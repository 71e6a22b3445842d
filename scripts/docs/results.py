"""The results page: the README's table, and every file of results/ with the command that made it and the pages that use it."""
import json
from collections.abc import Iterator
from pathlib import Path

from scripts.results_table import block

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("file", "made by", "commit", "discussed in")


def page() -> str:
    """Markdown with links relative to the repository's root."""
    rows = [row(path) for path in sorted((ROOT / "results").rglob("*.json"))]
    return "\n".join([
        "# Results", "", "What was measured is kept in files that hold the command, the commit, the machine and the package versions as well. Numbers that",
        "are in none of them come from scratch runs, and the page that has them says so. How methods are compared over seeds: [studies](docs/studies.md).", "",
        "## Scores", "", block(), "## All files", "", f"| {' | '.join(HEAD)} |", "|---|---|---|---|", *rows, ""])


def row(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    found = json.loads(path.read_text())
    made = "<br>".join(f"`{shown(c)}`" for c in dict.fromkeys(values(found, "command"))) or "not recorded in the file; the page has it"
    commits = ", ".join(dict.fromkeys(c[:9] for c in values(found, "git")))
    return f"| [{name.removeprefix('results/')}]({name}) | {made} | {commits} | {', '.join(pages_with(name))} |"


def shown(command: str) -> str:
    """With the folder of the script, which older files lack."""
    script = command.split()[0]
    folder = next((f for f in ("scripts", "cluster") if script.endswith(".py") and (ROOT / f / script).is_file()), None)
    return (f"python {folder}/{command}" if folder else command).replace("|", "\\|")


def values(found: dict, key: str) -> Iterator[str]:
    """Of the file as a whole, and of its sections where those were made one by one."""
    for part in (found, *found.values()):
        if isinstance(part, dict) and isinstance(part.get(key), str):
            yield part[key]


def pages_with(name: str) -> list[str]:
    """Links to the pages that link to a results file."""
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "cluster" / "README.md"]
    return [f"[{p.stem if p.name != 'README.md' else 'cluster'}]({p.relative_to(ROOT).as_posix()})" for p in pages if name in p.read_text()]
