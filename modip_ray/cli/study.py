"""`modip study`: methods x tasks x seeds, and the tables that come of them."""

from __future__ import annotations

import argparse

from modip_ray.cli.arguments import command


def add_parser(commands) -> None:
    """Add `study` to the subparsers of the command line."""
    text = "compare methods on tasks over seeds, or go on with the study in its folder"
    p = command(commands, "study", run, text)
    p.add_argument("study_file", metavar="STUDY", help="a YAML file, or the name of one in configs/studies")
    p.add_argument("settings", nargs="*", metavar="key=value", help="over the file's fields, e.g. seeds='[0]' tasks.hopper-medium.online.env_steps=30000; "
                   "with out=FOLDER nothing is put into the file's `kept`")
    p.add_argument("--table", action="store_true", help="run nothing: write the tables of what is done")


def run(args: argparse.Namespace) -> int:
    from modip_ray.study.spec import load_study
    study = load_study(args.study_file, args.settings)
    if args.table:
        from modip_ray.runfolder import AGAIN, disk_errors
        from modip_ray.study.table import write_results
        with disk_errors(study.folder, AGAIN):
            write_results(study)
    else:
        from modip_ray.study.run import run_study
        run_study(study)
    return 0
