"""Write the README's result table from the summaries kept under results/.

    python scripts/results_table.py            # rewrites the block between the results markers of README.md

Keep a run's summary with: cp runs/demo/summary.json results/demo.json; a paired evaluation with: modip eval RUN --mode all --json results/NAME_paired.json.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PAPER = {"HalfCheetah-v4": "5108 -> 13775", "Hopper-v4": "3050 -> 3281", "Walker2d-v4": "5721 -> 6081"}


def cell(score: dict, bc: dict) -> str:
    low, high = score["ci95"]
    ratio = "" if score is bc else f", {score['mean'] / bc['mean']:.2f} x"
    return f"**{score['mean']:.0f}** [{low:.0f}, {high:.0f}]{ratio}"


def run_row(path: Path) -> str:
    run = json.loads(path.read_text())
    s = run["scores"]
    cells = [f"{s['data']['mean']:.0f}", cell(s["bc"], s["bc"]), cell(s["policy"], s["bc"]), cell(s["mpc"], s["bc"])]
    minutes = f"{run['wall_s'] / 60:.0f} min"
    return f"| [{path.stem}](results/{path.name}) | {' | '.join(cells)} | {run['env_steps']:,} | {minutes} | {PAPER.get(run['env_id'], '')} |"


def paired_lines(path: Path) -> list[str]:
    run = json.loads(path.read_text())
    episodes = run["scores"]["bc"]["episodes"]
    names = {"policy": "DP-only", "mpc": "MPC-acting"}
    return [f"- [{path.stem}](results/{path.name}): {names[mode]} minus BC over the same {episodes} seeds "
            f"{d['mean']:+.0f} [{d['ci95'][0]:+.0f}, {d['ci95'][1]:+.0f}], "
            f"{d['ratio']:.2f} x" for mode, d in run["against_bc"].items()]


def block() -> str:
    paired = sorted((ROOT / "results").glob("*paired*.json"))
    runs = [p for p in sorted((ROOT / "results").glob("*.json")) if "config_hash" in json.loads(p.read_text())]      # the rest are studies of other things
    lines = ["Raw return, mean and 95 % interval over fixed evaluation seeds, one training seed, two CPU cores. BC is the diffusion policy before",
             "fine-tuning, DP-only the same network after it, MPC-acting the planner.", "",
             "| run | data | BC | DP-only | MPC-acting | online steps | wall time | paper, BC -> MODIP, 1e6 steps |", "|---|---|---|---|---|---|---|---|",
             *(run_row(p) for p in runs), ""]
    for p in paired:
        lines += paired_lines(p)
    commands = [f"- {p.stem}: `{json.loads(p.read_text())['command']}`" for p in sorted([*runs, *paired])]
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
