"""The physics that D4RL's MuJoCo data were recorded with, on today's MuJoCo.

Before MuJoCo 2.1.2 a capsule weighed, and turned, as a cylinder a little longer than its middle section; since then both are exact. Hopper,
Walker2d and HalfCheetah are made of capsules. With the old masses and inertias every recorded step of hopper_medium-v2 and halfcheetah_medium-v2
that we have is repeated to float32 rounding, without them none is (scripts/d4rl_study.py, docs/tasks.md).
"""
from __future__ import annotations

import gymnasium as gym
import mujoco
import numpy as np

from modip_ray.tasks.envs import make_env


def d4rl_env(env_id: str = "Hopper-v4", render_mode: str | None = None, **kwargs) -> gym.Env:
    """A gymnasium MuJoCo environment whose capsules weigh as when D4RL was recorded; its data match the -v4 ids."""
    return old_capsules(make_env(env_id, render_mode, **kwargs))


def old_capsules(env: gym.Env) -> gym.Env:
    """The same environment with the masses and inertias that MuJoCo gave capsules before 2.1.2, changed in place.

    Then a capsule of radius r and half length h counted as a cylinder of half length h + r/2. Geometry, contacts and all else stay. What the
    bodies weigh is worked out by MuJoCo's own compiler, from the model file with such cylinders added.
    """
    base = env.unwrapped
    if not isinstance(base, gym.envs.mujoco.MujocoEnv):
        raise ValueError(f"D4RL's physics are for gymnasium's MuJoCo environments (Hopper-v4, Walker2d-v4, HalfCheetah-v4, ...), got {type(base).__name__}")
    spec = mujoco.MjSpec.from_file(base.fullpath)
    exact = spec.compile()
    capsules = [(geom, geom.id) for geom in spec.geoms if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE]     # adding geoms below renumbers them
    for geom, i in capsules:
        radius, half = exact.geom_size[i, :2]
        cylinder = geom.parent.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[radius, half + radius / 2, 0], pos=exact.geom_pos[i],
                                        quat=exact.geom_quat[i], contype=0, conaffinity=0, density=geom.density, group=geom.group)
        if not np.isnan(geom.mass):
            cylinder.mass = geom.mass
        geom.mass = 0
    old = spec.compile()
    for key in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(base.model, key)[:] = getattr(old, key)
    mujoco.mj_setConst(base.model, base.data)                                       # what MuJoCo derives from them
    return env
