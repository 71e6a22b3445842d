#!/usr/bin/env bash
# Every command of the paper's tables (arXiv 2606.10825) as far as this package has the method. Each resumes when it is given again.
# All of it is days of work: give one table's name, or none for everything, in the order below. More settings follow behind: they are for trying out, e.g.
#   configs/paper.sh main seeds='[0]' settings.online.env_steps=20000 out=runs/studies/try
set -euo pipefail

# The main table, MODIP and BC (the column of the diffusion policy before fine-tuning); the paper's own numbers of its rivals stand beside ours.
main() { modip study paper "$@"; }

# Two of its rivals from the same start, TD-MPC2 and DPPO, at the paper's budget. DQL, DSRL and PA-RL are not built here.
rivals() { modip study rivals out=runs/studies/paper_rivals settings.online.env_steps=1000000 seeds='[0, 1, 2, 3, 4]' "$@"; }

# The ablation table. Full, policy only (its DP-only column), and the tail Q(s, pi(s)):
ablations() { modip study paper_ablations "$@"; }

# ... the MLP prior in place of the diffusion policy;
mlp_prior() { modip study paper_ablations out=runs/studies/paper_mlp_prior methods='{mlp_prior: {policy.kind: gaussian, pretrain.start: null}}' "$@"; }

# ... and no offline pre-training.
no_pretraining() {
    modip study paper_ablations out=runs/studies/paper_no_pretraining methods='{no_pretraining: {}}' settings.pretrain.updates=0 settings.pretrain.policy_updates=0 "$@"
}

# The table of times: V tail against Q tail (planner.v_tail_vs_q_tail), policy-independent against policy-coupled critic (learner.policy_independent_vs_coupled).
times() { modip bench planner learner --json results/bench/paper_times.json "$@"; }

if [ $# -eq 0 ]; then
    main; rivals; ablations; mlp_prior; no_pretraining; times
else
    case $1 in
        main|rivals|ablations|mlp_prior|no_pretraining|times) "$@" ;;
        *) echo "paper.sh: got $1; tables: main, rivals, ablations, mlp_prior, no_pretraining, times" >&2; exit 2 ;;
    esac
fi
