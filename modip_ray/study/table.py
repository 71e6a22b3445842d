"""What a study comes to, from its runs' files: results.json, results.md and curves. Means are over training seeds and evaluation episodes; nothing is rerun.

Intervals: of one task, a bootstrap that draws training seeds and then episodes within each; over tasks, rliable's interquartile mean with its
stratified bootstrap over training seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.checkpoint import write_synced
from modip_ray.learning.evaluation import MODES
from modip_ray.output_file import check_output
from modip_ray.report.published import NOTE, Published, published_for
from modip_ray.report.scores import ROWS, duration, interval, number
from modip_ray.runfolder import command_line, git_commit, machine, read_summary, versions
from modip_ray.session import PERIODIC
from modip_ray.start import BY_ITSELF, flat
from modip_ray.study.kept import keep_results, outcome
from modip_ray.study.spec import Cell, Study, task_of
from modip_ray.tasks.scores import normalized_score, resampled_means

RESAMPLES = 5_000
MARK = " (*)"
PHASES = ("pretrain", "online", "eval", PERIODIC)
NOT_APART = " (+)"
Runs = dict[int, dict[str, Any]]                                # summaries of one task and method by training seed


def nested_ci(groups: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of the groups' means, where groups are drawn first, then values within each, anew for a group that is drawn again.
    groups: an array a training seed."""
    rng, n = np.random.default_rng(seed), len(groups)
    picked = rng.integers(0, n, (resamples, n))
    means = np.empty((resamples, n))
    for k, g in enumerate(groups):
        drawn = picked == k
        means[drawn] = resampled_means(g, int(drawn.sum()), rng)
    return [float(x) for x in np.percentile(means.mean(1), [2.5, 97.5])]


def joined(scores: Sequence[Mapping[str, Any]], family: str | None) -> dict[str, Any]:
    """One mode's scores of several training seeds as one entry of results.json."""
    groups, returns = [np.array(s["values"]) for s in scores], [np.array(s["returns"]) for s in scores]
    mean_return = float(np.mean([r.mean() for r in returns]))
    return {"mean": float(np.mean([g.mean() for g in groups])), "ci95": nested_ci(groups), "episodes": sum(map(len, groups)), "seeds": len(groups),
            "by_seed": [float(g.mean()) for g in groups], "normalized": normalized_score(family, mean_return),
            "normalized_by_seed": [normalized_score(family, float(r.mean())) for r in returns]}


def paired(ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Difference over the same evaluation seeds of the same training seeds."""
    groups = [np.array(a["values"]) - np.array(b["values"]) for a, b in zip(ours, others, strict=True)]
    base = float(np.mean([np.mean(b["values"]) for b in others]))
    mean = float(np.mean([g.mean() for g in groups]))
    return {"mean": mean, "ci95": nested_ci(groups), "share": mean / base if base > 0 else None}


def acting(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scores of what a method is there for: its planner, or its policy where it has none."""
    return run["scores"].get("mpc", run["scores"]["policy"])


def finished(cells: Sequence[Cell]) -> Runs:
    return {cell.seed: summary for cell in cells if (folder := outcome(cell)) is not None and (summary := read_summary(folder)) is not None}


def task_results(cells: Sequence[Cell], runs: Runs, first: Runs, alike: bool) -> dict[str, Any]:
    """Of one task and method. runs: its `finished` ones, at least one; first: those of the method that others are compared with; alike: see `act_alike`."""
    done, both = list(runs.values()), [] if runs is first else [seed for seed in runs if seed in first]
    shared = [seed for seed in both if same_start(runs[seed], first[seed], alike)]
    family = cells[0].cfg.task.family
    scores = {name: [s["scores"][name] for s in done] for name in ("data", *MODES) if name in done[0]["scores"]}
    found = {name: joined(s, family) for name, s in scores.items()}
    return {**found, "metric": done[0]["scores"]["bc"]["metric"], "env_steps": min(s["env_steps"] for s in done), "updates": min(s["updates"] for s in done),
            "wall_s": float(np.mean([s["wall_s"] for s in done])), "own_start": cells[0].cfg.pretrain.start is None,
            "evaluations_apart": all(map(evaluations_apart, cells, done)),
            "phase_s": {name: float(np.mean([s["phase_s"].get(name, 0.0) for s in done])) for name in PHASES},
            "seeds_done": len(done), "seeds_wanted": len(cells),
            "against_bc": {mode: paired(scores[mode], scores["bc"]) for mode in scores if mode in ("policy", "mpc")},
            "against_first": paired(*([acting(of[seed]) for seed in shared] for of in (runs, first))) if shared else None,
            "other_start": [seed for seed in both if seed not in shared],
            "git": sorted({s["git"] for s in done})}


def evaluations_apart(cell: Cell, run: Mapping[str, Any]) -> bool:
    """False of an earlier version's run, in one process: its evaluations on the way are part of the phase that waited for them."""
    return PERIODIC in run["phase_s"] or not cell.cfg.eval.every_steps or not cell.cfg.one_process


def act_alike(cfg: Config, first: Config) -> bool:
    """The policy of the start acts in both methods before fine-tuning, in the same way in the same episodes: their BC scores are one number."""
    ours, theirs = flat(cfg), flat(first)
    return cfg.pretrain.start is not None and all(ours[key] == theirs[key] for key in (*BY_ITSELF, "eval.episodes", "eval.seed"))


def same_start(run: Mapping[str, Any], other: Mapping[str, Any], alike: bool) -> bool:
    """Both went on from one start, and acted in the same episodes. Where a start was made again on another kind of processor data and BC differ, at first in
    the last digits."""
    names = ("data", "bc") if alike else ("data",)
    return acting(run)["seeds"] == acting(other)["seeds"] and all(run["scores"][name]["values"] == other["scores"][name]["values"] for name in names)


def over_tasks(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Interquartile mean of normalised scores over all tasks that every method has with equally many seeds, two at least: {method: {mode: {iqm, ci95}}}."""
    from rliable import library, metrics
    shared = [t for t in next(iter(methods.values()), {}) if all(t in m and m[t]["bc"]["normalized"] is not None for m in methods.values())]
    seeds = {m[t]["seeds_done"] for m in methods.values() for t in shared}
    if not shared or len(seeds) != 1 or seeds == {1}:       # of one training seed the interval would be a point
        return {}
    matrices = {f"{name} {mode}": np.array([m[t][mode]["normalized_by_seed"] for t in shared]).T
                for name, m in methods.items() for mode in MODES if all(mode in m[t] for t in shared)}
    state = np.random.get_state()               # rliable 1.2 draws from NumPy's own generator, whatever random_state it is given
    np.random.seed(0)
    try:
        points, bands = library.get_interval_estimates(matrices, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2_000)
    finally:
        np.random.set_state(state)
    return {name: {mode: {"iqm": float(points[f"{name} {mode}"][0]), "ci95": bands[f"{name} {mode}"][:, 0].tolist(), "tasks": shared}
                   for mode in MODES if f"{name} {mode}" in matrices} for name in methods}


def results(study: Study) -> dict[str, Any]:
    own, cells, by = next(iter(study.methods)), study.cells(), defaultdict(list)
    for cell in cells:
        by[cell.task, cell.method].append(cell)
    runs = {(t, m): finished(by[t, m]) for t in study.tasks for m in study.methods}
    methods = {m: {t: task_results(by[t, m], runs[t, m], runs[t, own], act_alike(by[t, m][0].cfg, by[t, own][0].cfg)) for t in study.tasks if runs[t, m]}
               for m in study.methods}
    settings = cells[-1].cfg.eval
    return {"study": study.to_dict(), "evaluation": {"episodes": settings.episodes, "every_episodes": settings.every_episodes},
            "tasks": methods[own], "methods": methods, "over_tasks": over_tasks(methods),
            "command": command_line().replace(" --table", ""), "git": git_commit(), "machine": machine(), "versions": versions()}


def write_results(study: Study) -> dict[str, Any]:
    """results.json, results.md and curves.svg into the study's folder, of whatever is done."""
    from modip_ray.study.curves import write_curves
    found = results(study)
    check_output(study.folder / "results.json")                                     # its folder is gone where only what is kept is left
    pictures = write_curves(study)
    write_synced(study.folder / "results.md", markdown(found, pictures))
    write_synced(study.folder / "results.json", json.dumps(found, indent=1))
    if study.kept_folder is not None and found["tasks"]:
        keep_results(study, found, pictures)
    print(f"{study.folder / 'results.md'}", flush=True)
    return found


# ---- for people ------------------------------------------------------------------------------------------------------------------------------

def score_cell(entry: Mapping[str, Any] | None, base: Mapping[str, Any] | None = None) -> str:
    """'-' for a way of acting that a method does not have."""
    if entry is None:
        return "-"
    times = f", {entry['mean'] / base['mean']:.2f} x" if base is not None and base["mean"] > 0 else ""
    return f"{number(entry['mean'])} [{interval(entry['ci95'])}]{times}"


def paired_cell(diff: Mapping[str, Any] | None) -> str:
    """'-' where there is nothing to compare with."""
    if diff is None:
        return "-"
    share = "" if diff["share"] is None else f", {100 * diff['share']:+.1f} %"
    return f"{number(diff['mean'])} [{interval(diff['ci95'])}]{share}"


def times_cell(entry: Mapping[str, Any]) -> str:
    """Of the offline phase (behind "start +" where the start's comes to it), of the online one, and of evaluations."""
    spent, mark = entry["phase_s"], "" if entry["evaluations_apart"] else NOT_APART
    times = " / ".join(map(duration, (spent["pretrain"], spent["online"], spent["eval"] + spent[PERIODIC])))
    return f"{'' if entry['own_start'] else 'start + '}{times}{mark}"


def task_lines(task: str, methods: Mapping[str, Mapping[str, Any]], paper: Published | None) -> list[str]:
    """A table of one task: a row a method. paper: what is published of it."""
    have = {m: found[task] for m, found in methods.items() if task in found}
    if not have:
        return [f"## {task}", "", "no run is done yet", ""]
    own, first = next(iter(methods)), next(iter(have.values()))
    columns = ["method", "BC", "DP-only", "MPC-acting", "DP-only - BC, paired", *([f"acting - {own}'s, paired"] if len(methods) > 1 else []),
               "normalised BC / DP / MPC", "env steps", "seeds", "time offline / online / evaluating"]
    data = f"Data: {number(first['data']['mean'])}, {first['data']['episodes'] / first['data']['seeds']:,.0f} episodes for each training seed."
    lines = [f"## {task} ({first['metric']})", "", data, "",
             f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, r in have.items():
        base = None if r["own_start"] else r["bc"]
        cells = [name, score_cell(r["bc"]), score_cell(r["policy"], base), score_cell(r.get("mpc"), base),
                 paired_cell(r["against_bc"]["policy"]), *([paired_cell(r["against_first"]) + MARK * bool(r["other_start"])] if len(methods) > 1 else []),
                 " / ".join(number(r[mode]["normalized"] if mode in r else None) for mode in MODES), f"{r['env_steps']:,}",
                 f"{r['seeds_done']} of {r['seeds_wanted']}", times_cell(r)]
        lines.append("| " + " | ".join(cells) + " |")
    if any(r["other_start"] for r in have.values()):
        lines += ["", f"{MARK.strip()} data, BC or evaluation seeds are not those of {own} (other settings, or a start that was made again on another "
                  "machine): not paired."]
    if not all(r["evaluations_apart"] for r in have.values()):
        lines += ["", f"{NOT_APART.strip()} some of these runs are of an earlier version, which counted evaluations on the way in the phase that "
                  "waited for them."]
    lines += ["", f"Runs of commit {', '.join(sorted({git[:8] + git[40:] for r in have.values() for git in r['git']}))}."]
    if paper is not None:
        others = ", ".join(f"{method} {score}" for method, score in paper.others)
        lines += ["", f"Paper: BC {paper.bc}, MODIP {paper.modip}, {others}."]
    return [*lines, ""]


def markdown(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    apart = [name for name, tasks in found["methods"].items() if any(entry["own_start"] for entry in tasks.values())]
    but = f", but {', '.join(apart)}: their BC is a policy of their own, and no times BC are given" if apart else ""
    others = [name for name, settings in found["study"]["methods"].items() if any(key.startswith("eval.") for key in settings)]
    unlike = f", but {', '.join(others)}, with evaluation settings of their own" if others else ""
    lines = [f"# Study {found['study']['out']}", "", f"`{found['command']}`, {found['machine']['cpus']} cores", "",
             f"{ROWS['bc']}: the diffusion policy before fine-tuning; DP-only: the same network after it; MPC-acting: the planner. Mean [95 % interval], times "
             f"BC. All methods of a training seed go on from the same BC policy{but}. All are evaluated on the same seeds{unlike}. Acting: the "
             f"planner, or the policy of a method without one. {NOTE}", ""]
    for task, settings in found["study"]["tasks"].items():
        lines += task_lines(task, found["methods"], published_for(task_of(task, settings)))
    if found["over_tasks"]:
        tasks = next(iter(found["over_tasks"].values()))["bc"]["tasks"]
        lines += [f"## Over {', '.join(tasks)}", "", "Interquartile mean of normalised scores [95 % interval, stratified bootstrap over training seeds].", "",
                  "| method | " + " | ".join(ROWS[mode] for mode in MODES) + " |", "|" + "---|" * (1 + len(MODES))]
        for method, modes in found["over_tasks"].items():
            shown = (f"{number(modes[m]['iqm'])} [{interval(modes[m]['ci95'])}]" if m in modes else "-" for m in MODES)
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
        lines.append("")
    if pictures:
        apart_all = all(entry["evaluations_apart"] for tasks in found["methods"].values() for entry in tasks.values())
        way, end = found["evaluation"]["every_episodes"], found["evaluation"]["episodes"]
        lines += [f"Curves: the mean over training seeds, shaded from the least to the greatest one. Of {way} episodes a seed on the way, of {end} at the end. "
                  f"Minutes are of the online phase, evaluations not counted{NOT_APART if not apart_all else ''}.", ""]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in pictures), ""])
