"""report/index.html of a run, report/comparison.html of several: one self-contained file, light and dark, readable on a phone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from modip_ray.output_file import check_output
from modip_ray.report import plan_sections, sections, system_sections
from modip_ray.report.compare import comparison, names_of
from modip_ray.report.parts import esc, missing
from modip_ray.report.rundata import RunData, load_run
from modip_ray.report.scores import duration
from modip_ray.report.style import CSS
from modip_ray.report.svg import with_unique_ids

UNFINISHED = "No summary.json: the run is still going or was stopped. This page shows metrics.jsonl as it is now; the same train command resumes the run."

_SECTIONS = (
    sections.score_table,
    sections.learning,
    sections.video,
    sections.world_model,
    sections.value_calibration,
    plan_sections.planner,
    sections.losses,
    system_sections.system,
    sections.timing,
    sections.configuration,
)


def write_report(run_dirs: str | Path | Sequence[str | Path]) -> Path:
    """Write `<run_dir>/report/index.html` and return its path; of several runs `<first run_dir>/report/comparison.html`, each one folded below.

    Works on unfinished runs. Raises FileNotFoundError for a folder without metrics.jsonl, ValueError for an empty list or a broken file, ConfigError
    where nothing can be written there.
    """
    folders = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    if not folders:
        raise ValueError("write_report: got no run folder, expected at least one, as written by 'modip train run_dir=...'")
    path = Path(folders[0]).resolve() / "report" / ("index.html" if len(folders) == 1 else "comparison.html")
    runs = [load_run(folder, path.parent) for folder in folders]
    check_output(path, mend="give access, or make the report of a copy of the run")
    partial = path.with_suffix(".partial")
    partial.write_text(render(runs), encoding="utf-8")
    os.replace(partial, path)
    return path


def render(runs: Sequence[RunData]) -> str:
    """The page's HTML."""
    if len(runs) == 1:
        body = header(runs[0], "h1") + run_sections(runs[0])
    else:
        each = [f'<details class="run"><summary>All of {esc(name)}</summary>' + header(run, 'h2 class="run-title"') + run_sections(run) + "</details>"
                for name, run in zip(names_of(runs), runs, strict=True)]
        body = f"<h1>{len(runs)} runs</h1>" + comparison(runs) + "".join(each)
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>MODIP report: {esc(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{with_unique_ids(body)}\n</main>\n</body>\n</html>\n"
    )


def header(run: RunData, tag: str) -> str:
    """Title, state of the run, and the four scores as tiles."""
    name = esc(run.title)
    badge = '<span class="badge">finished</span>' if run.finished else '<span class="badge open">unfinished</span>'
    facts = [f"run <code>{esc(run.path.name)}</code>"]
    for key, unit in (("env_steps", "environment steps"), ("updates", "updates")):
        value = run.summary.get(key, run.latest(key))
        facts += [f"{int(value):,} {unit}"] if value is not None else []
    wall = run.summary.get("wall_s", run.latest("wall_s"))
    facts += [f"{duration(wall)} wall time"] if wall is not None else []
    facts += [f"resumed {len(run.resumes)} time{'s' if len(run.resumes) > 1 else ''}"] if run.resumes else []
    why = "" if run.finished else missing(UNFINISHED)
    return f'<{tag}>{run.method} on {name} {badge}</{tag.split()[0]}><p class="note">{" · ".join(facts)}</p>{why}{sections.tiles(run)}'


def run_sections(run: RunData) -> str:
    return "\n".join(build(run) for build in _SECTIONS)
