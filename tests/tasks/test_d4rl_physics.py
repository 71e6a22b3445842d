import cloudpickle
import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest

from modip_ray.tasks.d4rl_physics import d4rl_env, old_capsules
from modip_ray.tasks.envs import make_env


def worst_step(env, file, rows):
    """Largest difference (rows,) of the next observation when recorded steps are repeated from their recorded states."""
    base, worst = env.unwrapped, []
    base.reset(seed=0)
    with h5py.File(file) as data:
        qpos, qvel, actions, following = (data[k][:rows] for k in ("infos/qpos", "infos/qvel", "actions", "next_observations"))
    for q, v, a, expected in zip(qpos, qvel, actions, following, strict=True):
        mujoco.mj_resetData(base.model, base.data)
        base.data.qpos[:], base.data.qvel[:] = q, v
        worst.append(np.abs(base.step(a.astype(np.float64))[0] - expected).max())
    known = np.abs(qvel).max(1) < 10 if "hopper" in file.name else np.ones(rows, bool)      # Hopper's file clips velocities at 10
    return np.array(worst)[known]


@pytest.mark.parametrize(("env_id", "name", "rounding"), [
    ("Hopper-v4", "hopper_medium-v2.head.hdf5", 2e-6), ("HalfCheetah-v4", "halfcheetah_medium-v2.head.hdf5", 1e-4),
])
def test_recorded_steps_are_repeated(data_file, env_id, name, rounding):
    file = data_file(name)
    assert worst_step(d4rl_env(env_id), file, 400).max() < rounding
    assert np.median(worst_step(make_env(env_id), file, 400)) > 100 * rounding              # and today's masses do not do it


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Walker2d-v4"])
def test_mass_by_hand(env_id):
    """Density 1000 kg/m^3; a cylinder of half length h + r/2 has the volume pi r^2 (2 h + r)."""
    env = d4rl_env(env_id)
    model = env.unwrapped.model
    capsules = model.geom_size[model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE]
    assert model.body_mass.sum() == pytest.approx(sum(1000 * np.pi * r**2 * (2 * h + r) for r, h, _ in capsules))
    assert model.body_subtreemass[1] == pytest.approx(model.body_mass.sum())                # what is derived from the masses follows
    assert make_env(env_id).unwrapped.model.body_mass.sum() > 1.02 * model.body_mass.sum()
    np.testing.assert_array_equal(model.geom_size, make_env(env_id).unwrapped.model.geom_size)


def test_total_mass_set_in_the_file_stays():
    assert d4rl_env("HalfCheetah-v4").unwrapped.model.body_mass.sum() == pytest.approx(14)


def test_it_crosses_processes_and_starts_alike():
    make = cloudpickle.loads(cloudpickle.dumps(lambda: d4rl_env(env_id="Hopper-v4")))
    env = make()
    obs, _ = env.reset(seed=3)
    assert obs.shape == (11,) and env.step(np.zeros(3))[4]["x_position"] is not None
    np.testing.assert_array_equal(obs, make_env("Hopper-v4").reset(seed=3)[0])              # the same starts


def test_other_environments_are_refused():
    with pytest.raises(ValueError, match="for gymnasium's MuJoCo environments .*got CartPoleEnv"):
        old_capsules(gym.make("CartPole-v1"))
