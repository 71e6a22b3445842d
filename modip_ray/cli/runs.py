"""`modip train`, `eval`, `restore`, `collect` and `report`: what makes a run folder and what reads one."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from modip_ray.cli.arguments import command, natural, positive
from modip_ray.config import Config, ConfigError, load, parse_override
from modip_ray.output_file import check_output


def add_parsers(commands) -> None:
    """Add them to the subparsers of the command line."""
    p = command(commands, "train", run_train, "train, or go on with the run in run_dir")
    p.add_argument("--config", help="a YAML file, or the name of one in configs/")
    p.add_argument("settings", nargs="*", metavar="key=value", help="over the file's settings, e.g. task=hopper-medium run_dir=runs/hopper")

    p = command(commands, "eval", run_eval, "measure a run again")
    p.add_argument("run_folder", type=Path, metavar="RUN")
    p.add_argument("--mode", choices=("bc", "policy", "mpc", "all"), default="mpc",
                   help="before fine-tuning, the diffusion policy alone, the planner; all: the three on the same seeds, with paired differences")
    p.add_argument("--episodes", type=positive, help="default: as in the run (eval.episodes)")
    p.add_argument("--seed", type=natural, help="first seed; default: the run's (eval.seed), with --checkpoint best the first that it was not chosen by")
    p.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help="best: by its periodic evaluations (log.keep_best)")
    p.add_argument("--json", type=Path, dest="json_file", help="also write the score there")
    p.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
                   help="act with another setting than the run's, e.g. --set resources.precision=fp32 --set guard.trust=0.1")

    p = command(commands, "restore", run_restore, "fetch a run's newest checkpoint from where log.mirror put it, to measure, export or serve it")
    p.add_argument("address", metavar="ADDRESS", help="a folder, s3://BUCKET/PATH, gs://BUCKET/PATH, ...")
    p.add_argument("run_folder", type=Path, metavar="RUN", help="the folder to make")

    p = command(commands, "collect", run_collect, "roll a policy out and write D4RL's HDF5 layout")
    p.add_argument("--policy", required=True, metavar="demonstrator|RUN|FILE.hdf5",
                   help="the shipped demonstrator, a run folder, or a D4RL file with a policy in it")
    p.add_argument("--mode", choices=("bc", "policy", "mpc"), default="policy", help="which way of acting of a run")
    p.add_argument("--task", help="task of configs/tasks; default halfcheetah-medium, for a RUN its own")
    p.add_argument("--transitions", type=positive, required=True)
    p.add_argument("--seed", type=natural, default=0)
    p.add_argument("--out", type=Path, required=True)

    p = command(commands, "report", run_report, "write report/index.html of a run, or report/comparison.html of several in the first one's folder")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument("--video", action="store_true", help="also render BC beside MODIP (needs OpenGL)")


def run_train(args: argparse.Namespace) -> int:
    cfg = load(args.config, args.settings)
    from modip_ray.run import train
    from modip_ray.session import Stopped
    try:
        summary = train(cfg)
    except Stopped:
        return 0
    if cfg.log.video:
        make_video(Path(summary["run_dir"]))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    from modip_ray.report.scores import interval, number
    from modip_ray.saved_run import compare_run, evaluate_run
    overrides = dict(parse_override(item) for item in args.settings)
    check_output(args.json_file)
    if args.mode == "all":
        found = compare_run(args.run_folder, args.episodes, args.seed, overrides, args.checkpoint)
        scores = found["scores"]
    else:
        found = evaluate_run(args.run_folder, args.mode, args.episodes, args.seed, overrides, args.checkpoint)
        scores = {args.mode: found}
    for mode, s in scores.items():
        also = "".join(f", {name} {number(m['mean'])}" for name, m in s["also"].items())
        print(f"{mode}: {s['metric']} {number(s['mean'])}  (95 %: {interval(s['ci95'])}, {s['episodes']} episodes{also}, normalised {number(s['normalized'])})")
    for mode, d in found.get("against_bc", {}).items():
        print(f"{mode} - bc, paired by seed: {number(d['mean'])}  (95 %: {interval(d['ci95'])})" + (f", {d['ratio']:.3f} x" if d["ratio"] is not None else ""))
    write_json(args.json_file, found)
    return 0


def run_restore(args: argparse.Namespace) -> int:
    from modip_ray.learning.mirror import Mirror
    from modip_ray.runfolder import AGAIN, RunError, disk_errors, mirror_errors
    if args.run_folder.exists():
        raise RunError(f"{args.run_folder}: is there already; give the name of a new folder")
    check_output(args.run_folder / "config.yaml")
    try:
        with mirror_errors(args.address):
            found = Mirror(args.address).pull(args.run_folder, lambda run: disk_errors(run, AGAIN))
        if found is None:
            raise RunError(f"{args.address}: has no finished checkpoint; expected what a run with log.mirror={args.address} puts there")
    except BaseException:
        shutil.rmtree(args.run_folder, ignore_errors=True)                          # the same command begins anew
        raise
    print(found.path)
    return 0


def run_collect(args: argparse.Namespace) -> int:
    from modip_ray.runfolder import AGAIN, disk_errors
    from modip_ray.saved_run import collect_run
    from modip_ray.tasks.d4rl_data import describe
    overrides = [f"data.transitions={args.transitions}", f"seed={args.seed}"]
    is_run = (Path(args.policy) / "config.yaml").is_file()
    cfg: Config | None = None if is_run else load(None, ([f"task={args.task}"] if args.task else []) + overrides)
    if is_run and args.task:
        raise ConfigError("--task cannot be given with a run folder: a run's policy acts in the run's own task")
    check_output(args.out, new=True)
    with disk_errors(args.out, AGAIN):
        print(describe(collect_run(cfg, args.policy, args.mode, args.transitions, args.seed, args.out)))
    return 0


def run_report(args: argparse.Namespace) -> int:
    from modip_ray.report.page import write_report
    from modip_ray.runfolder import AGAIN, RunError, disk_errors
    if args.video:
        for run in args.runs:
            make_video(run, write_page=False)
    try:
        with disk_errors(args.runs[0], AGAIN):
            print(write_report(args.runs))
    except ValueError as error:
        raise RunError(str(error)) from error
    return 0


def make_video(run: Path, write_page: bool = True) -> None:
    """report/video.mp4 of a run; where nothing can be rendered, says why and goes on."""
    from modip_ray.learning.evaluation import modes_of
    from modip_ray.policy import load
    from modip_ray.report.page import write_report
    from modip_ray.report.video import side_by_side
    from modip_ray.runfolder import saved_config
    from modip_ray.saved_run import rendering_env
    cfg = saved_config(run)
    pairs = [("BC", load(run, "bc").chunks), (cfg.method.upper(), load(run, modes_of(cfg)[-1]).chunks)]
    try:
        info = side_by_side(pairs, rendering_env(cfg), cfg.eval.seed, cfg.task.max_episode_steps, run / "report" / "video.mp4")
    except (RuntimeError, ValueError, OSError) as error:
        print(f"modip: no video: {error}", file=sys.stderr)
        return
    print(f"{info.path}  ({info.frames} frames, {info.seconds:.0f} s)")
    if write_page:
        write_report([run])


def write_json(path: Path | None, value: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1))
