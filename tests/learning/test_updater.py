from itertools import islice

import pytest

from modip_ray.learning.updater import Updater
from tests.learning.test_guard import batches
from tests.learning.test_learner import make_learner

#: Of 20 environment steps, half an update each, two of the policy for one of the model.
SETTINGS = ("pretrain.updates=2", "pretrain.policy_updates=4", "online.env_steps=20", "online.updates_per_step=0.5", "policy.updates_per_update=2",
            "online.lr_final_scale=0.2", "online.policy_lr_scale=0.5")


@pytest.mark.parametrize(("stream", "offline", "online"), [("model", 2, 10), ("policy", 4, 20)])
def test_step_sizes_fall_over_the_updates_of_their_own_phase(stream, offline, online):
    learner = make_learner(*SETTINGS)
    updater = Updater(learner.cfg, learner)
    opt, lr = (learner.value_opt, learner.cfg.world_model.lr) if stream == "model" else (learner.policy_opt, learner.cfg.policy.lr)
    seen = []
    for batch in islice(batches(stream), offline + online + 1):
        updater.update(stream, batch)
        seen.append(opt.param_groups[0]["lr"] / lr)
    assert seen[0] == pytest.approx(1.0) and seen[offline] == pytest.approx(0.5)
    assert seen[offline + online // 2] == pytest.approx(0.5 * 0.6) and seen[-1] == pytest.approx(0.5 * 0.2)
    assert sorted(seen[offline:], reverse=True) == seen[offline:]
