import json
from functools import partial

import h5py
import numpy as np
import pytest

from modip_ray.tasks import demonstrator
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import DataError, write_d4rl
from modip_ray.tasks.demonstrator import DEMONSTRATORS, TanhGaussianPolicy, demonstrator_path
from modip_ray.tasks.env_group import make_env
from modip_ray.tasks.episode import Episode


def weights(obs_dim=3, width0=5, width1=4, action_dim=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"fc0": (width0, obs_dim), "fc1": (width1, width0), "last_fc": (action_dim, width1), "last_fc_log_std": (action_dim, width1)}
    return {f"{k}.{p}": rng.normal(size=s if p == "weight" else s[:1]).astype(np.float32) for k, s in shapes.items() for p in ("weight", "bias")}


def save(path, **changes):
    arrays = {**weights(), "meta": json.dumps({"env_id": "Toy-v0"}), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_hand_computed_action():
    w = {"fc0.weight": [[1, 0]], "fc0.bias": [-1], "fc1.weight": [[2], [-1]], "fc1.bias": [0, 1], "last_fc.weight": [[1, 1]], "last_fc.bias": [-4],
         "last_fc_log_std.weight": [[0, 0]], "last_fc_log_std.bias": [-9]}
    policy = TanhGaussianPolicy({k: np.array(v, np.float32) for k, v in w.items()}, (-5.0, 2.0))
    # obs (3, 7): relu(3 - 1) = 2; relu(4, -2 + 1) = (4, 0); mean 4 + 0 - 4 = 0. obs (0, 0): relu(-1) = 0; relu(0, 1) = (0, 1); mean 1 - 4 = -3
    obs = np.array([[3, 7], [0, 0]], np.float32)
    assert policy.act(obs, deterministic=True)[:, 0] == pytest.approx([0, np.tanh(-3)])
    assert policy.distribution(obs)[1] == pytest.approx(np.exp(-5))                        # clipped from -9
    sampled = np.arctanh(policy.act(np.repeat(obs[:1], 20000, 0), np.random.default_rng(0)))
    assert sampled.mean() == pytest.approx(0, abs=2e-4) and sampled.std() == pytest.approx(np.exp(-5), rel=0.02)


def test_npz_round_trip_and_d4rl_round_trip(tmp_path):
    policy = TanhGaussianPolicy.from_npz(save(tmp_path / "p.npz"))
    assert policy.meta == {"env_id": "Toy-v0"} and (policy.obs_dim, policy.action_dim) == (3, 2) and policy.log_std_range == (-5.0, 2.0)
    episode = Episode(np.zeros((2, 3), np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), False)
    write_d4rl(tmp_path / "d.hdf5", [episode], {"policy": policy.to_metadata()})
    again = TanhGaussianPolicy.from_d4rl(tmp_path / "d.hdf5")
    obs = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    np.testing.assert_array_equal(policy.act(obs, deterministic=True), again.act(obs, deterministic=True))
    assert (policy.act(obs, np.random.default_rng(0)) == policy.act(obs, np.random.default_rng(0))).all()


@pytest.mark.parametrize(("changes", "words"), [
    ({"fc1.bias": None}, "misses fc1.bias; it has .*fc0.bias"),
    ({"fc1.weight": np.zeros((5, 4), np.float32)}, r"fc1 has weight \(5, 4\) .*expected \(out, in\) = \(4, 5\)"),
    ({"last_fc.bias": np.array([0, np.nan], np.float32)}, "last_fc.bias must be a finite float vector"),
    ({"last_fc.weight": np.zeros((2, 4), np.int64)}, "last_fc.weight must be a finite float matrix, got int64"),
    ({"fc0.bias": np.array([None, 1], object)}, "cannot be read as npz"),
    ({"meta": "{"}, "'meta' is not JSON"), ({"meta": "[1]"}, "must be a JSON object"),
])
def test_a_broken_npz_is_named(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        TanhGaussianPolicy.from_npz(save(tmp_path / "p.npz", **changes))


def test_a_cut_npz_is_refused(tmp_path):
    path = save(tmp_path / "p.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read as npz"):
        TanhGaussianPolicy.from_npz(path)
    with pytest.raises(DataError, match="no such file"):
        TanhGaussianPolicy.from_npz(tmp_path / "nothing.npz")


def test_bad_calls(tmp_path):
    policy = TanhGaussianPolicy.from_npz(save(tmp_path / "p.npz"))
    with pytest.raises(ValueError, match=r"must have shape \(B, 3\), got \(1, 4\): is this policy for another environment"):
        policy.act(np.zeros((1, 4), np.float32), deterministic=True)
    with pytest.raises(ValueError, match="pass rng"):
        policy.act(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("name", ["hopper_medium-v2.head.hdf5", "halfcheetah_medium-v2.head.hdf5"])
def test_recomputed_log_probabilities_equal_the_stored_ones(data_file, name):
    """A transposed or permuted weight matrix would still run, but not give these numbers."""
    policy = TanhGaussianPolicy.from_d4rl(data_file(name))
    with h5py.File(data_file(name)) as file:
        observations, actions, stored = (file[k][()] for k in ("observations", "actions", "infos/action_log_probs"))
    assert policy.log_std_range == (-20.0, 2.0)
    recomputed = policy.log_prob(observations, actions)
    assert np.corrcoef(recomputed, stored)[0, 1] > 0.99999999
    np.testing.assert_allclose(recomputed, stored, atol=0.02)                               # float32 rounding of actions next to ±1


def test_missing_and_unknown_demonstrators(monkeypatch, tmp_path):
    monkeypatch.setattr(demonstrator, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="python scripts/train_demonstrator.py Hopper-v4 --band 1200 1600 --out .*demonstrator_hopper.npz"):
        demonstrator_path("hopper")
    with pytest.raises(ValueError, match="no demonstrator 'ant'; there are halfcheetah, hopper, walker2d"):
        demonstrator_path("ant")



@pytest.mark.parametrize("name", DEMONSTRATORS)
def test_shipped_demonstrator_is_in_its_band(name):
    """Sampled episodes: the mean within the band, widened by three standard errors. Which episodes a seed gives depends on the processor."""
    path = demonstrator_path(name)
    env_id, (low, high), _ = DEMONSTRATORS[name]
    policy = TanhGaussianPolicy.from_npz(path)
    assert path.stat().st_size < 1_000_000 and policy.meta["env_id"] == env_id
    returns = np.array([e.ret for e in collect(policy, partial(make_env, env_id), 24_000, 1000, seed=123, num_envs=12)])
    margin = 3 * returns.std(ddof=1) / np.sqrt(len(returns))
    assert low - margin <= returns.mean() <= high + margin and margin < 0.4 * low, (returns.mean(), margin)
