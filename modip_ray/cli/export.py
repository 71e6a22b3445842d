"""`modip export RUN`: the diffusion policy as a file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from modip_ray.cli.arguments import command
from modip_ray.output_file import check_output
from modip_ray.progress import size_text


def add_parser(commands) -> None:
    p = command(commands, "export", run_export, "write a run's policy, normaliser inside, for PyTorch or ONNX Runtime without Ray; checked on the run's data")
    p.add_argument("run_folder", type=Path, metavar="RUN")
    p.add_argument("--to", choices=("torch-export", "onnx", "safetensors"), required=True, help="a .pt2 program, an ONNX model, or the weights alone")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/export/<task>-<mode>.<suffix>")
    p.add_argument("--mode", "--weights", choices=("policy", "bc"), default="policy", help="the policy as it is now (default), or before fine-tuning")
    p.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: as the run acts (policy.sampling_steps)")


def run_export(args: argparse.Namespace) -> int:
    from modip_ray.export import TOLERANCE, export_run
    check_output(args.out)
    done = export_run(args.run_folder, args.to, args.out, args.mode, args.steps)
    m = done.metadata
    print(f"{done.path}  ({size_text(done.path.stat().st_size)}, {m['mode']} of {m['checkpoint']}, {m['denoising_steps']} denoising steps: "
          f"observation {shape(m['input']['observation'])}, noise {shape(m['input']['noise'])} -> actions {shape(m['output']['actions'])})")
    print(f"checked on {done.checked:,} observations of the run's data: largest difference to PyTorch {done.difference:.2g}, allowed {TOLERANCE:g}")
    return 0


def shape(sizes: list) -> str:
    return f"({', '.join(map(str, sizes))})"
