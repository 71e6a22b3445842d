import numpy as np

from modip_ray.learning.checkpoint import begin, commit, newest, write_state
from modip_ray.learning.live import newest_state, open_live, read_snapshot, write_snapshot


def state(updates):
    return {"updates": np.array(updates), "w": np.full(3, updates, np.float32)}


def checkpoint(run, updates):
    folder = begin(run / "checkpoints")
    write_state(folder, "learner", state(updates))
    commit(folder, {"env_steps": 0, "updates": updates, "policy_updates": 0}, 2)


def test_a_role_begins_from_whichever_is_newer(tmp_path):
    live = open_live(tmp_path, "p1")
    assert newest_state("learner", "updates", live, None) == (None, "the start")
    checkpoint(tmp_path, 10)
    found, source = newest_state("learner", "updates", live, None)
    assert found["w"].tolist() == [10] * 3 and source.startswith("checkpoint step_")
    write_snapshot(live, "learner", state(12))
    write_snapshot(live, "learner", state(15))
    found, source = newest_state("learner", "updates", live, None)
    assert found["w"].tolist() == [15] * 3 and source == "its snapshot"
    checkpoint(tmp_path, 20)
    assert int(newest_state("learner", "updates", live, None)[0]["updates"]) == 20
    assert int(newest_state("learner", "updates", None, newest(tmp_path / "checkpoints"))[0]["updates"]) == 20


def test_what_an_earlier_process_left_or_still_writes_is_not_taken(tmp_path):
    old = open_live(tmp_path, "p1")
    write_snapshot(old, "learner", state(99))
    new = open_live(tmp_path, "p2")
    assert not old.exists() and read_snapshot(new, "learner") is None


def test_a_snapshot_cut_short_leaves_the_one_before(tmp_path):
    live = open_live(tmp_path, "p1")
    write_snapshot(live, "learner", state(3))
    (live / ".learner" / "learner.safetensors").write_bytes(b"torn")
    assert int(read_snapshot(live, "learner")["updates"]) == 3
    write_snapshot(live, "learner", state(4))
    assert int(read_snapshot(live, "learner")["updates"]) == 4
