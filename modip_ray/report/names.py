"""Every number that rows of metrics.jsonl carry, by kind of row: its unit and meaning. Ray's metrics, `modip status` and docs/observe.md read it here.

A number without an entry is recorded and exported all the same, under its own name; tests/actors/test_metrics.py says which entry is missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    unit: str
    meaning: str


COUNTERS = {
    "env_steps": Measure("steps", "environment steps stored in replay"),
    "updates": Measure("updates", "of world model and critic"),
    "policy_updates": Measure("updates", "of the diffusion policy"),
}
TRAIN = {
    "loss/consistency": Measure("", "latent prediction against the encoded next observation"),
    "loss/reward": Measure("", "predicted reward"),
    "loss/termination": Measure("", "predicted end of the episode"),
    "loss/value": Measure("", "critic"),
    "loss/policy": Measure("", "denoising loss of the diffusion policy"),
    "model/grad_norm": Measure("", "gradient of world model and critic, before clipping"),
    "policy/grad_norm": Measure("", "gradient of the diffusion policy"),
    "guard/skipped_model": Measure("updates", "of world model and critic skipped, their numbers not finite or exploding, since this process began"),
    "guard/skipped_value": Measure("updates", "of V beyond one a world-model update (critic.updates_per_update), skipped likewise"),
    "guard/skipped_policy": Measure("updates", "of the diffusion policy skipped likewise"),
    "value/target_mean": Measure("reward", "the critic's targets, mean of a batch"),
    "value/target_std": Measure("reward", "the critic's targets, deviation in a batch"),
    "distill/share": Measure("share", "of the policy's batches that the distillation rule lets it imitate"),
    "distill/share_of_plans": Measure("share", "of the accepted plans in the policy's batches, those that it imitates"),
    "ppo/loss": Measure("", "clipped policy loss of a rival that PPO trains"),
    "ppo/kl": Measure("", "its estimated divergence from the policy that collected"),
    "ppo/clipped": Measure("share", "of its ratios outside the clip range"),
    "rollout/return": Measure("reward", "finished training episodes, exploration included"),
}
ROLES = {                           # processes, by the names of <run>/live/processes.json
    "driver": "the driver process", "store": "the weight store", "replay": "the replay actors", "learner_model": "the learner of world model and critic",
    "learner_policy": "the policy's learner", "planner": "the planners", "evaluator": "the evaluators", "rollout": "the rollout workers",
}
RESTARTED = tuple(role for role in ROLES if role not in ("driver", "rollout"))      # by Ray; the others end the run, or are replaced
LEARNER = ("replay", "collection", "snapshot")
WAITS = {"driver": ("learners", "flush"), "learner_model": LEARNER, "learner_policy": LEARNER, "rollout": ("planner", "learning"),
         "replay": ("collection", "learning"), "store": ("weights",)}
SYSTEM = {
    "rollout/workers": Measure("", "rollout workers at work"),
    "rollout/nodes": Measure("", "machines that they are on"),
    "rollout/waiting": Measure("", "workers wanted and not there: no room in the cluster yet, or starting"),
    "rollout/joined": Measure("", "workers that came, since this process began"),
    "rollout/lost": Measure("", "workers that died, hung or left with their node, since this process began"),
    "rollout/acknowledged": Measure("steps", "collected by this process's workers and stored for sure"),
    "rollout/env_crashed": Measure("", "environments that raised and were made anew, since this process began"),
    "rollout/env_hung": Measure("", "environments that did not come back from a step; their workers were replaced"),
    "rollout/env_bad": Measure("", "environments that returned numbers that are not finite, wrong shapes or types, and were made anew"),
    "replay/ahead": Measure("steps", "environment steps that the slower learner has not made its updates for"),
    "replay/transitions": Measure("", "online transitions in replay"),
    "replay/segments": Measure("", "segments that came into replay"),
    "replay/stored": Measure("steps", "environment steps in segments that came into replay"),
    "planner/rows_per_batch": Measure("rows", "observations planned for at once"),
    "planner/answer_ms": Measure("ms", "from a worker's request to its plan, waiting for the batch included"),
    "planner/queued": Measure("requests", "waiting at the planners now"),
    "planner/updates_behind": Measure("updates", "that the planner's world model lacks, the oldest planner's"),
    "planner/seconds_behind": Measure("s", "since the weights that the planner lacks were published"),
    "planner/not_finite": Measure("plans", "that were not finite: the policy's own action was taken, since this process began"),
    **{f"{role}/restarts": Measure("", f"restarts of {ROLES[role]} since this process began") for role in RESTARTED},
    **{f"{role}/rss_mb": Measure("MB", f"memory of {who}, together") for role, who in ROLES.items()},
    **{f"{role}/refs": Measure("", f"references to Ray's objects that {who} hold") for role, who in ROLES.items()},
    "ray/object_store_mb": Measure("MB", "in Ray's object stores, all nodes"),
    **{f"wait/{role}/{reason}": Measure("share", f"of the time of {ROLES[role]}: waiting for {reason}")
       for role, reasons in WAITS.items() for reason in reasons},
    "run/incidents": Measure("", "workers lost, planners restarted and the like, in the whole run"),
    "run/resumes": Measure("", "times that the run went on from a checkpoint"),
    "eval/episodes": Measure("episodes", "of the final evaluation that are done"),
}
DIAGNOSTICS = {
    "value_corr": Measure("", "correlation of predicted value and realised return"),
    "plan_gain_mean": Measure("reward", "the planner's predicted gain over the policy's own proposal"),
    "plan_share_accepted": Measure("share", "plans that were acted on: their gain is above guard.min_gain"),
    "plan_share_distilled": Measure("share", "distill/share_of_plans at that time"),
    "plan_corr": Measure("", "correlation of the return predicted for executed plans and the one that followed, in the planner's evaluation episodes"),
    "plan_bias": Measure("reward", "predicted less realised return of executed plans, mean"),
    "plan_spread": Measure("reward", "disagreement of the value ensemble about the refined plan's gain over the policy's proposals, accepted or not"),
    "plan_spread_rejected": Measure("reward", "the same about rejected candidates"),
    "plan_candidates_std": Measure("reward", "deviation of the predicted gains of one search's candidates"),
    "plan_distance": Measure("", "of the refined plan, accepted or not, from the nearest proposal of the policy, root mean square over actions in -1..1"),
    "proposal_distance": Measure("", "of a proposal from the nearest other one"),
}
SCORE = {
    "mean": Measure("score", "evaluation: mean over its episodes, of the task's own measure"),
    "ci95_low": Measure("score", "lower end of the mean's 95 % interval"),
    "ci95_high": Measure("score", "upper end"),
    "normalized": Measure("score", "the mean as D4RL normalises it, where it does"),
}
