#!/usr/bin/env bash
# All that is measured on a machine with one GPU, into results/gpu/, in slices of at most SLICE_S seconds: run it again until it says "all done".
#   scripts/gpu.sh                                     # needs the package and its requirements, and a torch that sees the card
#   DRY=1 scripts/gpu.sh                               # on a CPU: the same commands, small, into a folder of its own; no figure counts
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SLICE_S=${SLICE_S:-540}
OUT=${OUT:-results/gpu}; RUN=runs/gpu; DEVICE=cuda; ROWS="16 128 256 512"; SECONDS_EACH=5; SETTINGS=()
if [ -n "${DRY:-}" ]; then
  OUT=runs/gpu_dry/results; RUN=runs/gpu_dry/run; DEVICE=cpu; ROWS="2"; SECONDS_EACH=0.2
  SETTINGS=(resources.device=cpu resources.planner_gpus=0 resources.learner_gpus=0 resources.planner_cpus=0.2 resources.learner_cpus=0.2
            resources.rollout_cpus=0.2 rollout.num_workers=2 rollout.envs_per_worker=4 online.env_steps=400 online.min_online=100 pretrain.updates=50
            pretrain.policy_updates=50 data.transitions=2000 task.max_episode_steps=50 eval.every_steps=0 eval.episodes=2 resources.compile=false
            replay.capacity=5000)
fi
export OMP_NUM_THREADS=1
mkdir -p "$OUT"
BEGAN=$SECONDS
left() { echo $((SLICE_S - SECONDS + BEGAN)); }

[ -f "$OUT/kernels.json" ] || "$PYTHON" scripts/gpu_study.py --json "$OUT/kernels.json" --device "$DEVICE" --rows $ROWS --seconds "$SECONDS_EACH"

if [ ! -f "$RUN/summary.json" ]; then
  # SIGTERM, so that it saves; the same command goes on in the next slice
  timeout --signal=TERM --kill-after=60 "$(left)" "$PYTHON" -m modip_ray train --config gpu run_dir="$RUN" "${SETTINGS[@]}" || true
fi
if [ ! -f "$RUN/summary.json" ]; then
  echo "slice over; run it again"
  exit 3
fi
cp "$RUN/summary.json" "$OUT/halfcheetah.json"
"$PYTHON" -m modip_ray report "$RUN"
echo "all done: $OUT"
