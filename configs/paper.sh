#!/usr/bin/env bash
# Every command of the paper's tables (arXiv 2606.10825) as far as this package has the method. Each resumes when it is given again.
# All of it is days of work: give one table's name, or none for everything, in the order below. More settings follow behind: they are for trying out, e.g.
#   configs/paper.sh main seeds='[0]' settings.online.env_steps=20000 out=runs/studies/try
set -euo pipefail

# The main table, MODIP and BC (the column of the diffusion policy before fine-tuning); the paper's own numbers of its rivals stand beside ours.
main() { modip study paper "$@"; }

# Its rivals from the same start at the paper's budget, on the demonstrators that come with the package: they compare with MODIP's rows there, not of main. TD-MPC2,
# DPPO (as published and with ten times its clip range), PA-RL, DQL (both of its weights) and DSRL.
rivals() { modip study rivals out=runs/studies/paper_rivals settings.online.env_steps=1000000 seeds='[0, 1, 2, 3, 4]' "$@"; }

# The ablation table: full (policy only is its DP-only column), the tail Q(s, pi(s)) with the critic that belongs to it, the MLP prior, no offline phase.
ablations() { modip study paper_ablations "$@"; }

# The table of times: V tail against Q tail (planner.v_tail_vs_q_tail), policy-independent against policy-coupled critic (learner.policy_independent_vs_coupled).
times() { modip bench planner learner --json results/bench/paper_times.json "$@"; }

if [ $# -eq 0 ]; then
    main; rivals; ablations; times
else
    case $1 in
        main|rivals|ablations|times) "$@" ;;
        *) echo "paper.sh: got $1; tables: main, rivals, ablations, times" >&2; exit 2 ;;
    esac
fi
