import dataclasses
import re

import pytest
import yaml

from modip_ray import cli
from modip_ray.config import Config, ConfigError, config_dir, load, parse_override, read_yaml, task_names

DEFAULT = config_dir() / "default.yaml"
SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("override, parts", [
    ("planner.horizn=3", ["planner.", "'horizn'", "did you mean 'horizon'"]),
    ("planer.horizon=3", ["'planer'", "did you mean 'planner'"]),
    ("seeed=3", ["'seeed'", "did you mean 'seed'"]),
    ("planner.horizon.deep=3", ["planner.horizon", "expected int", "{'deep': 3}"]),
    ("planner=3", ["planner", "group of settings", "got 3"]),
    ("task=hoper-medium", ["'hoper-medium'", "did you mean one of hopper-medium"]), ("task=xyz", ["known tasks: can-mh"]),
    ("planner.horizon", ["key=value"]),
    ("=4", ["key=value"]),
    ("task.name=[1", ["cannot read the value"]),
])
def test_an_unusable_override_says_what_and_names_the_nearest(override, parts):
    with pytest.raises(ConfigError) as error:
        load(overrides=[override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("words, settings", [
    ("train task=hopper-medium --config demo run_dir=x seed=1", ["task=hopper-medium", "run_dir=x", "seed=1"]),
    ("study main out=x --table seeds=[0]", ["out=x", "seeds=[0]"]), ("train --config demo seed=1", ["seed=1"]),
    ("train seed=1 --config demo --seed=2", None), ("train seed=1 --config demo run_dir", None), ("eval runs/x guard.trust=1", None),
])
def test_settings_may_stand_before_and_behind_options(words, settings, capsys):
    if settings is not None:
        assert cli.parsed(words.split()).settings == settings
        return
    with pytest.raises(SystemExit, match="2"):
        cli.parsed(words.split())
    assert "unknown argument(s)" in capsys.readouterr().err


@pytest.mark.parametrize("override, parts", [
    ("seed=1.5", ["seed", "expected int", "1.5", "float"]),
    ("seed=true", ["seed", "expected int", "bool"]),
    ("policy.lr=fast", ["policy.lr", "expected float", "'fast'"]),
    ("policy.lr=", ["policy.lr", "expected float", "None"]),
    ("policy.lr=true", ["policy.lr", "expected float", "bool"]),
    ("serial=1", ["serial", "expected bool", "1"]),
    ("task.env=3", ["task.env", "expected str", "int"]),
    ("critic.head=twohot", ["critic.head", "'twohot'", "regression, two_hot", "did you mean 'two_hot'"]),
    ("critic.gamma=.nan", ["critic.gamma", "finite float", "nan"]),
    ("planner.max_wait_ms=.inf", ["planner.max_wait_ms", "finite float", "inf"]),
])
def test_a_wrong_type_names_field_value_and_type(override, parts):
    with pytest.raises(ConfigError) as error:
        load(overrides=[override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("overrides, parts", [
    (["seed=-1"], ["seed", "-1"]),
    (["policy.width=0"], ["policy.width", "positive"]),
    (["online.env_steps=-1"], ["online.env_steps", "negative"]),
    (["critic.gamma=1.01"], ["critic.gamma", "0..1"]),
    (["online.online_share_end=1.5"], ["online.online_share_end", "0..1"]),
    (["critic.bins=1"], ["critic.bins", "at least 2"]),
    (["policy.horizon=4", "planner.horizon=5"], ["planner.horizon", "policy.horizon=4"]),
    (["planner.horizon=2", "planner.n_action_steps=3"], ["planner.n_action_steps", "planner.horizon=2"]),
    (["policy.horizon=4", "planner.horizon=4", "policy.n_action_steps=5"], ["policy.n_action_steps", "policy.horizon=4"]),
    (["policy.n_action_steps=4", "distill.target=planned"], ["policy.n_action_steps", "planner.horizon=3", "imitates plans"]),
    (["policy.n_action_steps=4", "distill.reanalyze=0.1"], ["policy.n_action_steps", "planner.horizon=3", "imitates plans"]),
    (["policy.denoising_steps=20", "policy.sampling_steps=21"], ["policy.sampling_steps", "20"]),
    (["policy.denoising_steps=20", "planner.proposal_steps=21"], ["planner.proposal_steps", "1..policy.denoising_steps=20"]),
    (["planner.proposal_steps=0"], ["planner.proposal_steps", "got 0"]),
    (["planner.proposals=4", "planner.gaussian=0", "planner.elites=6"], ["planner.elites", "candidates"]),
    (["world_model.latent=100", "world_model.simnorm_group=8"], ["world_model.latent", "multiple"]),
    (["policy.kind=tdmpc2"], ["policy.kind", "maximises Q", "critic.target: value, planner.tail: value", "policy_q"]),
    (["policy.kind=tdmpc2", "planner.tail=policy_q", "distill.rule=realised"], ["distill.rule", "realised", "imitates nothing"]),
    (["policy.kind=tdmpc2", "planner.tail=policy_q", "resources.learner_replicas=2"], ["resources.learner_replicas", "got 2", "policy.kind: tdmpc2"]),
    (["critic.target_reduce=min_two"], ["critic.target_reduce", "critic.target: policy_q"]),
    (["critic.target_reduce=min_two", "critic.target=policy_q", "critic.members=1"], ["critic.members", "at least 2"]),
    (["planner.std_min=0.5", "guard.std_max=0.1"], ["guard.std_max", "planner.std_min=0.5"]),
    (["resources.planner_gpus=1.5"], ["resources.planner_gpus", "got 1.5", "at most 1 or a whole number"]),
    (["resources.learner_gpus=3", "resources.learner_replicas=2"], ["resources.learner_gpus", "got 3", "gives 1.5 to each of the two learners' processes"]),
])
def test_a_bad_range_or_relation_is_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(overrides=overrides)
    for part in parts:
        assert part in str(error.value)


def test_gpus_that_ray_can_give_are_accepted():
    for planner, learner in ((0, 0), (0.4, 0.4), (1, 2), (3, 4)):
        load(overrides=[f"resources.planner_gpus={planner}", f"resources.learner_gpus={learner}"])
    load(overrides=["resources.learner_gpus=3", "serial=true"])


def test_numbers_are_read_as_numbers():
    cfg = load(overrides=["policy.lr=1e-4", "critic.tau=1", "online.env_steps=2e3", "run_dir=null", "distill.min_gain=-0.5"])
    assert (cfg.policy.lr, cfg.critic.tau, cfg.online.env_steps, cfg.run_dir, cfg.distill.min_gain) == (1e-4, 1.0, 2000, None, -0.5)
    assert isinstance(cfg.critic.tau, float) and isinstance(cfg.online.env_steps, int)


def test_numbers_inside_a_mapping_or_a_list_are_numbers_too(tmp_path):
    given = "{rollout: {rollout: 1, memory: 1.3e9}, planner: {memory: 2e9}}"
    wanted = {"rollout": {"rollout": 1, "memory": 1.3e9}, "planner": {"memory": 2e9}}
    assert load(overrides=[f"resources.placement={given}"]).resources.placement == wanted
    assert load(write(tmp_path / "mine.yaml", f"resources: {{placement: {given}}}\n")).resources.placement == wanted
    found = read_yaml(write(tmp_path / "x.yaml", "numbers: [1e-4, -2E+3, .5e1, 1.e2]\ntext: ['1e5', \"1.3e9\", e5, 1e, 1e5x, 10.1e1.2]\n"))
    assert found == {"numbers": [1e-4, -2000.0, 5.0, 100.0], "text": ["1e5", "1.3e9", "e5", "1e", "1e5x", "10.1e1.2"]}


def test_text_in_quotes_that_looks_like_a_number_is_still_text_when_its_run_is_resumed(tmp_path):
    cfg = load(overrides=["run_dir='1e5'"])
    assert cfg.run_dir == "1e5" and load(write(tmp_path / "config.yaml", cfg.dump())) == cfg


def test_defaults_then_task_then_file_then_overrides(tmp_path):
    default = load()
    file = write(tmp_path / "mine.yaml", "task: hopper-medium\nseed: 11\npolicy: {width: 32, blocks: 1}\n")
    cfg = load(file, ["policy.width=64", "policy.width=48"])
    assert cfg.task.env == "Hopper-v4" and default.task.env == "HalfCheetah-v4"         # the file's task
    assert (cfg.seed, cfg.policy.blocks, cfg.policy.width) == (11, 1, 48)               # file, file, last override
    assert cfg.policy.horizon == default.policy.horizon                                 # untouched
    task_override = load(file, ["task=walker2d-medium"])
    assert task_override.task.env == "Walker2d-v4" and task_override.seed == 11


def test_the_file_wins_over_the_task_and_a_task_override_over_the_file(tmp_path):
    file = write(tmp_path / "mine.yaml", "task: {max_episode_steps: 77}\n")
    assert load(file).task.max_episode_steps == 77
    dumped = write(tmp_path / "config.yaml", load().dump())                             # spells the whole task group out
    assert load(dumped, ["task=hopper-medium"]).task.env == "Hopper-v4"
    assert load(dumped, ["task.max_episode_steps=5"]).task.max_episode_steps == 5


@pytest.mark.parametrize("text, part", [
    ("seed: !!python/object/apply:os.system ['exit 1']", "cannot be read as YAML data"),
    ("seed: !!python/name:os.system", "cannot be read as YAML data"),
    ("seed: [", "cannot be read as YAML data"),
    ("seed: 1\npolicy: {width: 3}\npolicy: {blocks: 1}", "'policy' is given twice (line 3, column 1)"),
    ("", "expected a mapping"),
    ("- 1", "expected a mapping"),
    ("policy: 3", "group of settings"),
    ("polcy: {width: 3}", "did you mean 'policy'"),
])
def test_a_file_that_is_no_settings_is_refused(tmp_path, text, part):
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match="bad.yaml") as error:
        load(file)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_text_that_looks_like_a_day_stays_text_and_a_broken_value_is_one_line():
    assert load(overrides=["run_dir=2026-11-30"]).run_dir == "2026-11-30"
    with pytest.raises(ConfigError, match="cannot read the value") as error:
        load(overrides=["run_dir=[a"])
    assert "\n" not in str(error.value)


def test_an_anchor_may_be_merged_and_its_keys_said_anew(tmp_path):
    text = "a: &a {x: 1}\nouter: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 3}\nd: {<<: *a, x: 4}\nday: 2026-13-45\n"
    found = read_yaml(write(tmp_path / "x.yaml", text))
    assert (found["outer"], found["c"].keys(), found["d"], found["day"]) == ({"inner": {"x": 2}}, {"x", "y"}, {"x": 4}, "2026-13-45")


def test_python_tags_are_refused_in_overrides_and_missing_files_named():
    with pytest.raises(ConfigError, match="cannot read the value"):
        load(overrides=["seed=!!python/object/apply:os.getpid []"])
    with pytest.raises(ConfigError, match="no configuration 'nowhere.yaml'"):
        load("nowhere.yaml")


def test_replace_is_a_checked_copy():
    cfg = load()
    assert cfg.replace({"seed": 5}).seed == 5 and cfg.seed == load().seed
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        cfg.replace({"policy.widht": 3})
    with pytest.raises(ConfigError, match="positive"):
        cfg.replace({"policy.width": 0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.policy.width = 3


@pytest.mark.parametrize("task, overrides, found", [
    ("hopper-medium", ["task.env_kwargs.ctrl_cost_weight=0", "task.env_kwargs.forward_reward_weight=2"], {"ctrl_cost_weight": 0, "forward_reward_weight": 2}),
    ("lift-ph", ["task.env_kwargs.gripper_ramp=false"], {"name": "Lift", "terminate_on_success": True, "gripper_ramp": False}),
    ("lift-ph", ["task.env_kwargs.a.b=1", "task.env_kwargs.a.c=2"], {"name": "Lift", "terminate_on_success": True, "a": {"b": 1, "c": 2}}),
    ("lift-ph", ["task.env_kwargs.name.of=1"], {"name": {"of": 1}, "terminate_on_success": True}),
    ("lift-ph", ["task.env_kwargs={name: Lift}"], {"name": "Lift"}),
])
def test_an_override_below_a_mapping_of_the_users_keeps_its_other_keys(task, overrides, found):
    assert load(overrides=[f"task={task}", *overrides]).task.env_kwargs == found
    assert load(overrides=[f"task={task}"]).replace(dict(map(parse_override, overrides))).task.env_kwargs == found


def test_a_range_of_workers_and_placements_can_be_set_key_by_key():
    cfg = load(overrides=["rollout.num_workers.min=1", "rollout.num_workers.max=4", "resources.placement.rollout.z=3", "resources.placement.planner.x=1"])
    again = cfg.replace({"rollout.num_workers.max": 8, "resources.placement.rollout.y": 2})
    assert (cfg.rollout.least, cfg.rollout.most, again.rollout.least, again.rollout.most) == (1, 4, 1, 8)
    assert cfg.resources.placement == {"rollout": {"z": 3}, "planner": {"x": 1}}
    assert again.resources.placement == {"rollout": {"z": 3, "y": 2}, "planner": {"x": 1}}


@pytest.mark.parametrize("overrides", [[], ["task=hopper-medium", "policy.lr=1e-5", "run_dir=a b", "data.max_transitions=7"]])
def test_dump_then_load_is_equal(tmp_path, overrides):
    cfg = load(overrides=overrides)
    assert load(write(tmp_path / "config.yaml", cfg.dump())) == cfg


def test_hash_follows_what_decides_results_only():
    cfg = load()
    same = cfg.replace({"run_dir": "elsewhere", "serial": not cfg.serial, "resources.torch_threads": 3, "log.every_s": 99.0})
    assert same.hash() == cfg.hash()
    assert len({cfg.hash(), cfg.replace({"seed": 9}).hash(), cfg.replace({"policy.width": 8}).hash()}) == 3


def test_task_files_are_there():
    assert {"halfcheetah-medium", "hopper-medium", "walker2d-medium"} <= set(task_names())


def test_default_yaml_holds_every_field_with_a_comment_above():
    lines = DEFAULT.read_text().splitlines()
    commented, missing, section = set(), [], None
    for above, line in zip(["", *lines], lines, strict=False):
        match = re.match(r"( *)([a-z_]+):(.*)", line)
        if not match:
            continue
        indent, key, rest = match.groups()
        if not indent and not rest.strip():                         # a group: its fields carry the comments
            section = key
            continue
        name = f"{section}.{key}" if indent else key
        comment = re.fullmatch(rf"{indent}# *(\S.*)", above)
        (commented.add(name) if comment else missing.append(name))
    assert missing == []
    tree = yaml.safe_load(DEFAULT.read_text())
    fields = {f"{k}.{n}" for k, v in tree.items() if isinstance(v, dict) for n in v} | {k for k, v in tree.items() if not isinstance(v, dict)}
    assert commented == fields
    assert set(tree) == set(SECTIONS)


@pytest.mark.parametrize("overrides, parts", [
    (["policy.width=1e9"], ["policy.width", "at most 65536"]),
    (["policy.lr_final=1e300"], ["policy.lr_final", "at most 100"]),
    ([f"policy.network={'x' * 5000}"], ["policy.network", "xxx...xxx", "mlp, unet"]),
    ([f"{'x' * 5000}=3"], ["unknown setting", "..."]),
])
def test_sizes_that_no_machine_has_are_refused_and_long_values_are_shown_short(overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(overrides=overrides)
    assert len(str(error.value)) < 500
    for part in parts:
        assert part in str(error.value)
