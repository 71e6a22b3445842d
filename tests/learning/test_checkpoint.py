import errno
import json

import numpy as np
import pytest
import torch

from modip_ray.learning import checkpoint
from modip_ray.learning.build import agent_of, build_spec
from modip_ray.learning.checkpoint import (
    CheckpointError,
    as_bytes,
    begin,
    best,
    best_score,
    commit,
    commit_best,
    folders,
    newest,
    order,
    read_state,
    sha256,
    stage_best,
    verified,
    write_state,
)
from modip_ray.learning.learner import Learner
from modip_ray.learning.replay_server import build_replay
from modip_ray.learning.updater import Updater, learner_state, load_learner
from modip_ray.tasks.collect import collect
from tests.fakes import STEPS, Noisy, PointEnv, small


def save(root, steps: int, keep: int = 3):
    folder = begin(root)
    write_state(folder, "part", {"x": np.full(3, steps, np.float32)})
    return commit(folder, {"env_steps": steps, "updates": steps // 4}, keep)


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    for steps in (10, 200, 3000):
        save(tmp_path, steps, keep=2)
    found = newest(tmp_path)
    assert found.counters == {"env_steps": 3000, "updates": 750} and found.read("part")["x"].tolist() == [3000] * 3
    assert [p.name for p in folders(tmp_path)] == ["step_000003000_u0000750", "step_000000200_u0000050"]


def test_of_the_same_counters_saved_again_and_again_the_last_is_the_newest(tmp_path):
    """While only the policy's updates go on, the counters in the name stay; names that became free again must not be taken for new ones."""
    for value in range(12):
        folder = begin(tmp_path)
        write_state(folder, "part", {"x": np.full(1, value)})
        final = commit(folder, {"env_steps": 0, "updates": 1}, keep=2)
        assert final.is_dir() and newest(tmp_path).path == final and newest(tmp_path).read("part")["x"] == value
    assert len(folders(tmp_path)) == 2


def test_the_newest_is_newest_however_many_digits_its_counters_have(tmp_path):
    for steps in (999_999_990, 1_000_000_000, 1_000_000_010):
        assert save(tmp_path, steps, keep=2).is_dir() and newest(tmp_path).counters["env_steps"] == steps
    assert len(folders(tmp_path)) == 2 and order("step_000000001_u10000000.2") > order("step_000000001_u9999999.11")


def test_one_whose_file_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    """As by a bad sector: the file is there, and reading it is an error."""
    older, last = save(tmp_path, 10), save(tmp_path, 20)

    def failing(path):
        if path.parent == last:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256(path)
    monkeypatch.setattr(checkpoint, "sha256", failing)
    assert newest(tmp_path).path == older
    with pytest.raises(CheckpointError, match="cannot be read .Input/output error"):
        verified(last)


def test_no_checkpoint_is_none_and_an_unfinished_one_does_not_count(tmp_path):
    assert newest(tmp_path / "absent") is None
    folder = begin(tmp_path)
    write_state(folder, "part", {"x": np.zeros(1)})
    assert newest(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "marker"])
def test_a_damaged_newest_is_named_and_the_previous_one_used(tmp_path, capsys, damage):
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    part = last / "part.safetensors"
    if damage == "flip":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
    elif damage == "truncate":
        part.write_bytes(part.read_bytes()[:20])
    elif damage == "remove":
        part.unlink()
    else:
        (last / "done").write_text("{")
    assert newest(tmp_path).counters["env_steps"] == 10
    assert last.name in capsys.readouterr().err


def test_every_flipped_bit_of_the_marker_is_noticed(tmp_path):
    marker = save(tmp_path, 10) / "done"
    written = marker.read_bytes()
    for bit in range(8 * len(written)):
        data = bytearray(written)
        data[bit // 8] ^= 1 << bit % 8
        marker.write_bytes(data)
        with pytest.raises(CheckpointError):
            verified(marker.parent)
    marker.write_bytes(written)
    assert verified(marker.parent).counters["env_steps"] == 10


def test_when_none_is_sound_it_raises(tmp_path):
    for steps in (10, 20):
        (save(tmp_path, steps) / "done").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoint"):
        newest(tmp_path)


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.array([{"run": "code"}], dtype=object))
    (tmp_path / "evil.safetensors").write_bytes((tmp_path / "evil.npz").read_bytes())
    for name in ("evil.npz", "evil.safetensors"):
        with pytest.raises(CheckpointError, match="plain arrays"):
            read_state(tmp_path / name)


def test_arrays_come_back_as_they_were_however_they_lie_in_memory(tmp_path):
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = {"transposed": a.T, "strided": a[:, ::2], "scalar": np.array(3), "empty": a[:0], "flag": np.array([True]), "text": as_bytes("grün")}
    write_state(tmp_path, "part", state)
    found = read_state(tmp_path / "part.safetensors")
    assert all(np.array_equal(found[k], v) and found[k].dtype == v.dtype and found[k].shape == v.shape for k, v in state.items())
    assert found["text"].tobytes().decode() == "grün"


def test_a_checkpoint_of_format_1_is_read_and_one_of_a_later_format_refused(tmp_path):
    folder = tmp_path / "step_000000010_u0000002"
    folder.mkdir()
    np.savez(folder / "part.npz", x=np.arange(3), rngs=np.array('{"a": 1}'))
    (folder / "counters.json").write_text('{"env_steps": 10}')
    sums = {p.name: sha256(p) for p in folder.iterdir()}
    (folder / "done").write_text(json.dumps(sums, indent=1))
    found = newest(tmp_path)
    assert found.counters == {"env_steps": 10} and found.has("part") and not found.has("other")
    assert found.read("part")["x"].tolist() == [0, 1, 2] and json.loads(found.read("part")["rngs"].tobytes()) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"no component 'other'.*part.npz"):
        found.read("other")
    (folder / "done").write_text(json.dumps({"format": 3, "files": sums}))
    with pytest.raises(CheckpointError, match="format 3, this program reads 1 and 2"):
        newest(tmp_path)


def test_the_same_counters_saved_again_never_leave_a_moment_without_a_checkpoint(tmp_path):
    first = save(tmp_path, 10, keep=1)
    second = save(tmp_path, 10, keep=1)
    assert first != second and folders(tmp_path) == [second] and newest(tmp_path).path == second


def test_the_best_is_kept_without_its_replay_and_gives_way_to_a_better_one_only(tmp_path):
    assert best(tmp_path) is None and best_score(tmp_path) == float("-inf")
    for steps, score in ((10, 5.0), (20, 3.0), (30, 7.0)):
        folder = begin(tmp_path)
        for component in ("learner_model", "learner_policy", "bc", "replay"):
            write_state(folder, component, {"x": np.full(3, steps, np.float32)})
        staged = stage_best(commit(folder, {"env_steps": steps, "updates": 0}, keep=1))
        if score > best_score(tmp_path):
            commit_best(staged, score)
        found = best(tmp_path)
        assert (found.counters["env_steps"], found.counters["score"]) == ((10, 5.0) if steps < 30 else (30, 7.0))
        assert found.has("learner_policy") and found.has("bc") and not found.has("replay")
    assert len(list(tmp_path.glob("best_*"))) == 1 and [newest(tmp_path).path] == folders(tmp_path)
    half = tmp_path / "best_step_000000010_u0000000"                                # a removal that a kill cut short
    half.mkdir()
    assert best_score(tmp_path) == 7.0 and best(tmp_path).path == found.path
    (found.path / "bc.safetensors").unlink()
    assert best_score(tmp_path) == float("-inf")
    with pytest.raises(CheckpointError):
        best(tmp_path)


def test_a_writer_sets_damaged_ones_aside_so_that_they_do_not_count_as_kept(tmp_path):
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    (last / "part.safetensors").unlink()
    assert newest(tmp_path, set_aside=True).counters["env_steps"] == 10
    assert not last.exists() and [p.name for p in tmp_path.iterdir() if p.name.startswith(f"damaged_{last.name}")]
    save(tmp_path, 15, keep=2)
    assert [p.name[:14] for p in folders(tmp_path)] == ["step_000000015", "step_000000010"]


def test_marker_lists_every_file(tmp_path):
    last = save(tmp_path, 10)
    marker = json.loads((last / "done").read_text())
    assert marker["format"] == 2 and sorted(marker["files"]) == ["counters.json", "part.safetensors"]


@pytest.fixture(scope="module")
def parts():
    cfg = small(pretrain__updates=6, pretrain__policy_updates=6)
    episodes = collect(Noisy(), PointEnv, 300, STEPS, seed=0)
    return cfg, episodes, build_spec(cfg, episodes, -np.ones(2), np.ones(2))


def fresh(parts):
    cfg, episodes, spec = parts
    return Updater(cfg, Learner(cfg, agent_of(cfg, spec, torch.device("cpu")), cfg.seed)), build_replay(cfg, episodes)


def go_on(updater, replay, updates):
    losses = []
    for _ in range(updates):
        for stream in ("model", "policy"):
            updater.update(stream, replay.sample(stream))
            losses.append(updater.take_metrics())
    return losses


def everything(updater):
    return {k: v for part in learner_state(updater.learner).values() for k, v in part.items()}


def test_save_and_resume_equals_going_on(parts, tmp_path):
    """Losses, weights, EMA, target critic, optimiser moments, generators: all as if nothing had happened."""
    updater, replay = fresh(parts)
    go_on(updater, replay, 3)
    folder = begin(tmp_path)
    for stream, state in learner_state(updater.learner).items():
        write_state(folder, f"learner_{stream}", state)
    replay.save(folder)
    commit(folder, {"env_steps": 0, "updates": 3}, 1)
    expected = go_on(updater, replay, 4)

    resumed, replay2 = fresh(parts)
    saved = newest(tmp_path)
    for stream in ("model", "policy"):
        load_learner(resumed.learner, stream, saved.read(f"learner_{stream}"))
    replay2.load(saved, resumed.learner.updates, resumed.learner.policy_updates)
    assert go_on(resumed, replay2, 4) == expected
    a, b = everything(updater), everything(resumed)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert any(k.startswith("model_opt") for k in a) and any(k.startswith("policy_raw") for k in a) and "agent.policy.out.2.weight" in a


def test_a_learners_state_is_copied_over_an_earlier_copy(parts):
    updater, replay = fresh(parts)
    go_on(updater, replay, 1)
    first = learner_state(updater.learner)
    kept = {stream: dict(part) for stream, part in first.items()}
    go_on(updater, replay, 1)
    new, again = learner_state(updater.learner), learner_state(updater.learner, into=first)
    for stream, part in again.items():
        assert part.keys() == new[stream].keys()
        for key, value in part.items():
            assert np.array_equal(value, new[stream][key]) and (value is kept[stream][key] or key in ("updates", "guard", "streak", "value_guard")), key


def test_what_is_usual_of_gradients_is_kept(parts):
    """V's own further updates are judged by a guard of their own; a streak of skipped ones goes on."""
    cfg, _, spec = parts
    cfg = cfg.replace({"critic.updates_per_update": 2})
    one, other = (Learner(cfg, agent_of(cfg, spec, torch.device("cpu"))) for _ in range(2))
    one.value_guard.recent.fill_(3.0)
    one.guards["policy"].streak.fill_(2.0)
    for stream, state in learner_state(one).items():
        load_learner(other, stream, state)
    assert float(other.value_guard.recent.median()) == 3.0 and float(other.guards["policy"].streak) == 2.0 and float(other.guards["model"].streak) == 0.0


def test_a_checkpoint_of_other_networks_is_refused(parts):
    updater, _ = fresh(parts)
    state = learner_state(updater.learner)["model"]
    state["target_critic.net.weights.0"] = np.zeros((1, 2, 3), np.float32)
    with pytest.raises(CheckpointError, match="target_critic.net.weights.0"):
        load_learner(updater.learner, "model", state)


def test_each_stream_saves_what_it_trains(parts):
    updater, _ = fresh(parts)
    state = learner_state(updater.learner)
    assert not any(k.startswith(("agent.policy.", "policy")) for k in state["model"])
    assert not any(k.startswith(("agent.world_model", "agent.critic", "target_critic")) for k in state["policy"])
