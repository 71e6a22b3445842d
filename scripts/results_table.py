"""Write the README's result tables from what is kept under results/.

    python scripts/results_table.py            # rewrites the block between the results markers of README.md

Keep a run's summary with: cp runs/demo/summary.json results/demo.json; a paired evaluation with: modip eval RUN --mode all --json results/NAME_paired.json.
"""
import json
import sys
from pathlib import Path

from modip_ray.report.published import published_for
from modip_ray.report.scores import number
from modip_ray.study.table import paired_cell, score_cell

ROOT = Path(__file__).resolve().parent.parent
MAIN_STUDY, RIVALS = (ROOT / "results" / "studies" / f"{name}.json" for name in ("main", "rivals"))
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def paper(task: str, env_id: str = "") -> str:
    row = published_for(task, env_id)
    return f"{row.bc} -> {row.modip}" if row else ""


def run_row(path: Path) -> str:
    run = json.loads(path.read_text())
    s = run["scores"]
    cells = [number(s["data"]["mean"]), score_cell(s["bc"]), score_cell(s["policy"], s["bc"]), score_cell(s.get("mpc"), s["bc"])]
    minutes = f"{run['wall_s'] / 60:.0f} min"
    return f"| [{path.stem}](results/{path.name}) | {' | '.join(cells)} | {run['env_steps']:,} | {minutes} | {paper(path.stem, run['env_id'])} |"


def paired_lines(path: Path) -> list[str]:
    run = json.loads(path.read_text())
    episodes = run["scores"]["bc"]["episodes"]
    names = {"policy": "DP-only", "mpc": "MPC-acting"}
    return [f"- [{path.stem}](results/{path.name}): {names[mode]} minus BC over the same {episodes} seeds "
            f"{d['mean']:+.0f} [{d['ci95'][0]:+.0f}, {d['ci95'][1]:+.0f}], "
            f"{'-' if d['ratio'] is None else format(d['ratio'], '.2f')} x" for mode, d in run["against_bc"].items()]


def study_lines(path: Path) -> list[str]:
    """The main study's table, of the runs that are done."""
    study = json.loads(path.read_text())
    lines = ["[The main study](results/studies/main/results.md): 50 episodes for each training seed, the intervals over both.", "",
             "| task | online steps | seeds | data | BC | DP-only | MPC-acting | DP-only minus BC, same seeds | paper, BC -> MODIP |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, task in study["tasks"].items():
        bc = task["bc"]
        cells = [name, f"{task['env_steps']:,}", f"{task['seeds_done']} of {task['seeds_wanted']}", number(task["data"]["mean"]),
                 score_cell(bc), score_cell(task["policy"], bc), score_cell(task.get("mpc"), bc), paired_cell(task["against_bc"]["policy"]), paper(name)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def rivals_lines(path: Path) -> list[str]:
    """What each method came to on each task: its planner, or its policy where it has none. A method of one task's settings has no other."""
    study = json.loads(path.read_text())
    tasks, methods = list(study["study"]["tasks"]), {name: found for name, found in study["methods"].items() if found}
    steps = min(found[task]["env_steps"] for found in methods.values() for task in found)
    lines = [f"[Rivals](docs/method.md#rivals-so-far) on the same actors, replay and evaluation, {steps:,} online steps: the planner's score, or the policy's "
             "of a method without one (training seeds). BC: of MODIP's start.", "", f"| method | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    rows = {"BC": {task: entry["bc"] for task, entry in next(iter(methods.values())).items()},
            **{name: {task: entry.get("mpc", entry["policy"]) for task, entry in found.items()} for name, found in methods.items()}}
    for name, found in rows.items():
        cells = [f"{number(found[task]['mean'])} ({found[task]['seeds']})" if task in found else "" for task in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def block() -> str:
    paired = sorted((ROOT / "results").glob("*paired*.json"))
    runs = [p for p in sorted((ROOT / "results").glob("*.json")) if "config_hash" in json.loads(p.read_text())]      # the rest are studies of other things
    lines = [*study_lines(MAIN_STUDY), *rivals_lines(RIVALS),
             "Single runs. Raw return, mean and 95 % interval over fixed evaluation seeds, one training seed, two CPU cores. BC is the diffusion policy before",
             "fine-tuning, DP-only the same network after it, MPC-acting the planner.", "",
             "| run | data | BC | DP-only | MPC-acting | online steps | wall time | paper, BC -> MODIP, 1e6 steps |", "|---|---|---|---|---|---|---|---|",
             *(run_row(p) for p in runs), ""]
    for p in paired:
        lines += paired_lines(p)
    commands = [f"- {p.stem}: `{json.loads(p.read_text())['command']}`" for p in sorted([*runs, *paired, MAIN_STUDY, RIVALS])]
    return "\n".join([*lines, "", "Commands:", "", *commands, ""])


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{block()}{END}{tail}")


if __name__ == "__main__":
    main()
