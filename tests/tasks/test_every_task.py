"""Every file in configs/tasks: it loads, names what exists, and says the metric and limits of its family."""
import pytest

from modip_ray.config import ConfigError, Task, load, task_names
from modip_ray.learning.env_source import env_factory
from modip_ray.report.published import published_for
from modip_ray.tasks.catalogue import catalogue

LIMITS = {"halfcheetah": 1000, "hopper": 1000, "walker2d": 1000, "kitchen": 280, "lift": 300, "can": 300, "square": 400, "transport": 800}
METRICS = {"kitchen": "subtasks", "lift": "success", "can": "success", "square": "success", "transport": "success"}


def test_the_papers_tasks_are_all_there():
    mujoco = {f"{e}-{d}" for e in ("halfcheetah", "hopper", "walker2d") for d in ("random", "medium", "medium-replay", "medium-expert", "expert")}
    kitchen = {f"kitchen-{d}" for d in ("complete", "partial", "mixed")}
    robomimic = {f"{e}-{d}" for e in ("lift", "can", "square", "transport") for d in ("ph", "mh")}
    assert set(task_names()) == mujoco | kitchen | robomimic


@pytest.mark.parametrize("name", task_names())
def test_task_file(name):
    cfg, family = load(overrides=[f"task={name}"]), name.split("-")[0]
    assert cfg.task.name == name
    assert (cfg.task.metric, cfg.task.max_episode_steps) == (METRICS.get(family, "return"), LIMITS[family])
    assert (cfg.task.family is None) == (METRICS.get(family) == "success")
    assert (cfg.data.rewards == "newly_done") == (family == "kitchen")
    assert (cfg.data.rewards == "until_success") == (cfg.task.metric == "success") == cfg.task.env_kwargs.get("terminate_on_success", False)
    assert cfg.data.source in catalogue() or (cfg.data.source == "demonstrator" and name.endswith("-medium"))
    assert callable(env_factory(cfg.task))
    if family not in ("transport",) and name != "kitchen-mixed":
        assert published_for(name, cfg.task.env) is not None


def test_extended_task_keeps_what_it_does_not_say():
    base, more = (load(overrides=[f"task={n}"]) for n in ("kitchen-complete", "kitchen-mixed"))
    assert more.task.env == base.task.env and more.data.rewards == "newly_done" and more.data.source == "d4rl/kitchen_mixed-v0"
    assert more.task.env_kwargs["tasks"] != base.task.env_kwargs["tasks"]


@pytest.mark.parametrize(("kwargs", "words"), [({"name": "Lfit"}, "no task 'Lfit'"), ({"nmae": "Lift"}, "nmae")])
def test_wrong_arguments_of_an_environment_are_named(kwargs, words):
    task = Task("t", "modip_ray.tasks.robosuite_env:robosuite_env", kwargs, None, "success", 10)
    with pytest.raises(ConfigError, match=f"env_kwargs=.*{words}"):
        env_factory(task)()
