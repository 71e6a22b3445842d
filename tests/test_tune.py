"""Search with Ray Tune: settings checked before anything runs, trials that go on bit for bit, PBT."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from modip_ray.config import ConfigError, config_dir, load
from modip_ray.learning.checkpoint import newest
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.report.rundata import flatten
from modip_ray.runfolder import RunError
from modip_ray.search.report import TrialResult, read_rows, summary
from modip_ray.search.scores import aggregated, nested_bootstrap
from modip_ray.search.settings import trial_settings
from modip_ray.search.spec import load_search
from modip_ray.search.trial import Trial, start_checkpoint
from tests.fakes import SMALL, write_data
from tests.private_ray import private_ray

PARTS = ("learner_model", "learner_policy", "replay", "replay.rows_0000000", "bc")
TINY = {**SMALL, "pretrain.updates": 10, "pretrain.policy_updates": 10, "online.min_online": 20, "task.max_episode_steps": 15, "eval.every_episodes": 2}
SEARCHES = sorted(p.stem for p in (config_dir() / "tune").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.hdf5", 600)


def params(data: Path, **dotted) -> dict:
    """A trial's configuration on the point environment, 40 steps between reports."""
    return {**TINY, "data.source": str(data), "steps_per_iteration": 40, "online.env_steps": 160, **{k.replace("__", "."): v for k, v in dotted.items()}}


def same(a: Path, b: Path, seeds=(0,)) -> bool:
    """Two trial checkpoints hold the same numbers, bit for bit."""
    for seed in seeds:
        x, y = (newest(folder / f"seed_{seed}" / "checkpoints") for folder in (a, b))
        for part in PARTS:
            u, v = x.read(part), y.read(part)
            if u.keys() != v.keys() or not all(np.array_equal(u[k], v[k], equal_nan=u[k].dtype.kind == "f") for k in u):
                return False
    return True


# ---- settings --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("extra, words", [
    ({"taks": "hopper-medium"}, ["'taks'", "did you mean 'task'"]),
    ({"critc.gamma": 0.9}, ["'critc.gamma'", "'critic'"]),
    ({"critic.gama": 0.9}, ["'gama'", "did you mean 'gamma'"]),
    ({"critic.gamma": 1.5}, ["critic.gamma", "1.5", "0..1"]),
    ({"seed": 3}, ["seed", "'seeds'"]),
    ({"run_dir": "x"}, ["run_dir", "Tune keeps"]),
    ({"seeds": 0}, ["seeds", "got 0"]),
    ({"seeds": [1, 1]}, ["seeds", "different"]),
    ({"steps_per_iteration": 0}, ["steps_per_iteration", "got 0"]),
    ({"online.env_steps": 0}, ["online.env_steps", "online phase"]),
    ({"cpus": -1}, ["cpus", "-1"]),
    ({"resources.device": "cuda"}, ["gpus", "cuda"]), ({"task.env": "Walker2d-v4"}, ["task.family", "set task.family=walker2d"]),
    ({"gpus": 1.5}, ["gpus", "got 1.5", "whole number"]),
])
def test_a_configuration_that_cannot_run_says_what_and_names_the_nearest(extra, words):
    with pytest.raises(ConfigError) as error:
        trial_settings({"task": "hopper-medium", **extra})
    assert all(word in str(error.value) for word in words), error.value


def test_seeds_and_settings_of_a_trial():
    settings = trial_settings({"task": "hopper-medium", "seeds": 2, "planner.horizon": 2, "gpus": 0})
    assert settings.seeds == (0, 1) and settings.cfg.planner.horizon == 2 and settings.cfg.critic.gamma == 0.995
    member = settings.member(1)
    assert member.seed == 1 and member.serial and member.resources.device == "cpu"
    assert trial_settings({"seeds": [4, 7]}).seeds == (4, 7)
    assert trial_settings({"gpus": 0.5, "resources.device": "cuda:3"}).member(0).resources.device == "cuda", "the one that Ray gave it, which is its first"


def test_spaces_are_checked_at_their_extremes_and_mutations_by_name():
    from ray import tune

    from modip_ray.tune import MODIP, check_space, pbt
    good = {"task": "hopper-medium", "guard.std_max": tune.uniform(0.05, 0.3), "planner.horizon": tune.choice([2, 4]), "planner.elites": tune.randint(4, 20)}
    check_space(good)
    assert MODIP.default_resource_request({"task": "hopper-medium", "cpus": 2, "gpus": 0.5}).required_resources == {"CPU": 2.0, "GPU": 0.5}
    for key, bad, word in (("guard.std_max", tune.uniform(0.01, 0.3), "std_min"), ("planner.horizon", tune.choice([2, 9]), "policy.horizon"),
                           ("planner.elites", tune.randint(4, 200), "candidates"), ("critic.gamma", tune.grid_search([0.9, 2.0]), "0..1")):
        with pytest.raises(ConfigError, match=word):
            check_space({**good, key: bad})
    for key in ("critic.gamma", "policy.width", "world_model.latent", "data.transitions", "online.env_steps", "pretrain.updates", "policy.lr_final"):
        value = getattr(getattr(load(), key.split(".")[0]), key.split(".")[1])
        with pytest.raises(ConfigError, match=f"{key}: cannot be perturbed"):
            pbt({**good, key: tune.choice([value])})
    with pytest.raises(ConfigError, match="planned"):
        pbt({**good, "distill.target": "planned"})
    inside = pbt({**good, "guard.trust": tune.quniform(0.0, 0.5, 0.1)}, metric="mpc/mean", mode="max")._custom_explore_fn
    moved = inside({"guard.std_max": 0.36, "guard.trust": 0.36})
    assert moved["guard.std_max"] == 0.3 and moved["guard.trust"] == pytest.approx(0.4)


# ---- search files ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SEARCHES)
def test_shipped_searches_load_and_every_trial_of_them_could_run(name):
    from modip_ray.search.run import checked_scheduler, param_space
    search = load_search(name)
    checked_scheduler(search, param_space(search))
    assert search.out == f"runs/tune/{name}" and search.num_samples >= 8


def test_guard_asha_explains_every_field():
    lines = (config_dir() / "tune" / "guard_asha.yaml").read_text().splitlines()
    fields = [i for i, line in enumerate(lines) if re.match(r"[a-z_]+:", line)]
    for i in fields:
        assert lines[i - 1].startswith("#") or i - 1 in fields, f"no comment above {lines[i]}"
    from modip_ray.search.spec import Search
    assert {lines[i].split(":")[0] for i in fields} == set(Search.__dataclass_fields__)


@pytest.mark.parametrize("override, words", [
    ("num_sample=3", ["'num_sample'", "did you mean 'num_samples'"]),
    ("metric=mpc/meen", ["metric", "did you mean 'mpc/mean'"]),
    ("num_samples=0", ["num_samples", "positive"]),
    ("scheduler.kind=ash", ["scheduler", "asha, pbt, none"]),
    ("scheduler.grace_perod=2", ["'grace_perod'", "did you mean 'grace_period'"]),
    ("scheduler.grace_period=99", ["grace_period", "1..iterations"]),
    ("search.guard.trust={unifrm: [0, 1]}", ["search.guard.trust", "did you mean 'uniform'"]),
    ("search.guard.trust={uniform: [1, 0]}", ["search.guard.trust", "low below high"]),
    ("search.policy.lr={loguniform: [0, 1]}", ["search.policy.lr", "positive"]),
    ("search.guard.trust=0.3", ["search.guard.trust", "'settings'"]),
    ("settings.guard.trust=0.3", ["search.guard.trust", "fixed under 'settings'"]),
    ("settings.online.env_steps=5", ["online.env_steps", "iterations x steps_per_iteration"]),
    ("planner.horizon=3", ["settings.planner.horizon"]),
    ("num_samples", ["key=value"]),
])
def test_a_search_that_cannot_run_says_what_and_names_the_nearest(override, words):
    with pytest.raises(ConfigError) as error:
        load_search("tiny", [override])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_said(tmp_path, place):
    from modip_ray.search.run import opened
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"out: '.*{place}' cannot be made or written .*; choose another out"), opened(tmp_path / place, load_search("tiny")):
        pass


def test_the_home_folder_of_out_and_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_search("tiny", ["out=~/x"]).folder == tmp_path / "x"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(load(overrides=["online.env_steps=9"]).dump())
    settings = trial_settings({"start": "~/run", "online.env_steps": 7})
    assert (settings.start, settings.cfg.online.env_steps) == (tmp_path / "run", 7)


def test_an_unknown_search_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'guard_asha'"):
        load_search("gard_asha")


# ---- trials ----------------------------------------------------------------------------------------------------------------------------------

def test_the_interval_grows_with_the_spread_between_seeds():
    episodes = np.random.default_rng(0).normal(0, 1, (4, 50))
    narrow, wide = (np.diff(nested_bootstrap(episodes + shift * np.arange(4)[:, None], 2000))[0] for shift in (0.0, 5.0))
    assert wide > 5 * narrow > 0
    low, high = nested_bootstrap(episodes[:1], 2000)
    assert low < episodes[0].mean() < high


@pytest.mark.parametrize("metric, mean, seeds", [("mpc/mean", 0.5, [0.0, 1.0]), ("mpc/return", 2.0, [1.0, 3.0]), ("mpc/normalized", 50.0, [25.0, 75.0])])
def test_interval_and_seeds_of_a_table_are_the_metrics_own(metric, mean, seeds):
    measures = [{"subtasks/4": [value] * 3, "return": [ret] * 3} for value, ret in ((0.0, 1.0), (1.0, 3.0))]                # two training seeds
    reports = [SimpleNamespace(outcomes=[Outcome(Job(mode, (0, 1, 2)), m, [5] * 3) for mode in ("policy", "mpc")]) for m in measures]
    row = {k.replace(".", "/"): v for k, v in flatten(aggregated(load(overrides=["task=kitchen-complete"]), reports)).items()}
    search = load_search("tiny", [f"metric={metric}"])
    (trial,) = summary(search, [TrialResult(0, Path("t"), {}, [row], None, None)], 1.0)["trials"]
    assert (trial[metric], trial["by_seed"]) == (mean, seeds) and trial["ci95"] == seeds                           # the bootstrap's ends: one seed, drawn twice
    assert aggregated(load(overrides=["task.family=null"]), reports)["mpc"]["normalized_ci95"] is None


def test_a_restored_trial_goes_on_bit_for_bit_and_its_checkpoint_is_a_run_folder(tmp_path, data):
    settings = trial_settings(params(data, seeds=2))
    trial = Trial(settings, tmp_path / "shared")
    first = trial.iterate()
    trial.save(tmp_path / "saved")
    plain = trial.iterate()
    trial.save(tmp_path / "plain")
    trial.close()
    again = Trial(settings, tmp_path / "shared")
    again.load(tmp_path / "saved")
    restored = again.iterate()
    again.save(tmp_path / "restored")
    assert same(tmp_path / "plain", tmp_path / "restored", (0, 1)) and not same(tmp_path / "plain", tmp_path / "saved", (0, 1))
    timeless = {k for k in plain if k not in ("train_s", "eval_s")}
    assert {k: plain[k] for k in timeless} == {k: restored[k] for k in timeless}
    assert (first["env_steps"], plain["env_steps"]) == (42, 84) and not plain["done"] and len(plain["mpc"]["by_seed"]) == 2
    assert plain["mpc"]["mean"] == pytest.approx(np.mean(plain["mpc"]["by_seed"]))

    from modip_ray.saved_run import evaluate_run
    cfg = settings.member(1)
    measured = evaluate_run(tmp_path / "plain" / "seed_1", "mpc", cfg.eval.every_episodes, cfg.eval.seed)
    assert measured["mean"] == plain["mpc"]["by_seed"][1]


def test_iterations_are_of_the_same_steps_however_long_segments_are(tmp_path, data):
    """Four environments whose episodes all end after 15 steps: stored whole they would be 60 steps at a time, more than an iteration of 40."""
    trial = Trial(trial_settings(params(data, rollout__envs_per_worker=4, rollout__num_workers=1, rollout__segment_length=200)), tmp_path / "shared")
    assert [trial.iterate()["env_steps"] for _ in range(4)] == [40, 80, 120, 160]


def test_a_line_that_was_cut_short_is_passed_over_and_the_next_row_begins_its_own(tmp_path):
    from modip_ray.search.watch import Rows
    (tmp_path / "result.json").write_text('{"training_iteration": 1, "mpc": {"mean": 2}}\n{"training_it')
    assert [row["mpc/mean"] for row in read_rows(tmp_path)] == [2]
    Rows()._restore_from_remote("result.json", SimpleNamespace(local_path=str(tmp_path)))
    with (tmp_path / "result.json").open("a") as file:
        file.write('{"training_iteration": 2, "mpc": {"mean": 3}}\n')
    assert [row["mpc/mean"] for row in read_rows(tmp_path)] == [2, 3]


def test_perturbed_settings_are_in_force_on_the_donors_state_and_others_are_refused(tmp_path, data):
    donor = Trial(trial_settings(params(data)), tmp_path / "shared")
    donor.iterate()
    donor.save(tmp_path / "donor")
    changed = Trial(trial_settings(params(data, planner__horizon=4, policy__lr=5e-3, planner__gaussian=4)), tmp_path / "shared")
    changed.load(tmp_path / "donor")
    (system,) = changed.systems
    x, y = newest(tmp_path / "donor" / "seed_0" / "checkpoints"), system.learner.agent.flat("policy")
    state = x.read("learner_policy")
    assert all(np.array_equal(state[f"agent.{k}"], v.numpy()) for k, v in system.learner.agent.state_dict().items() if k.startswith("policy."))
    assert np.isfinite(y).all() and system.learner.updates == x.counters["updates"] and system.replay.env_steps == x.counters["env_steps"] > 0
    result = changed.iterate()
    assert result["env_steps"] >= 80 and result["updates"] > x.counters["updates"]
    assert system.learner.policy_opt.param_groups[0]["lr"] == pytest.approx(5e-3 * system.cfg.online.lr_scale)
    assert system.replay.replay.online.arrays["plan"].shape[1] == 4
    changed.save(tmp_path / "changed")
    back = Trial(trial_settings(params(data)), tmp_path / "shared")                 # and back to the shorter horizon
    back.load(tmp_path / "changed")
    assert back.iterate()["env_steps"] >= 120
    for key, value in (("critic__gamma", 0.9), ("policy__width", 16)):
        with pytest.raises(ConfigError, match=key.replace("__", ".")):
            Trial(trial_settings(params(data, **{key: value})), tmp_path / "shared").load(tmp_path / "donor")
    with pytest.raises(RunError, match="seed_0"):
        Trial(trial_settings(params(data, seeds=[5])), tmp_path / "shared").load(tmp_path / "donor")


def test_a_shared_pretraining_is_where_every_trial_starts(tmp_path, data):
    from modip_ray.run import train
    from tests.fakes import small
    cfg = small(tmp_path / "pre", data, serial=True).replace({**TINY, "data.source": str(data), "online.env_steps": 0, "eval.every_steps": 0})
    train(cfg)
    start = {"start": str(tmp_path / "pre"), "online.env_steps": 80, "steps_per_iteration": 40}
    trial = Trial(trial_settings({**start, "guard.trust": 0.1, "seeds": 2}), tmp_path / "shared")
    assert trial.iterate()["env_steps"] >= 40
    bc = start_checkpoint(tmp_path / "pre").read("bc")["policy"]
    assert all(np.array_equal(system.bc, bc) for system in trial.systems), "the same BC policy for every seed"
    for bad, word in (({"world_model.latent": 32}, "world_model.latent"), ({"policy.lr": 1.0}, "online.lr_scale"), ({"task": "kitchen"}, "leave one out")):
        with pytest.raises(ConfigError, match=word):
            trial_settings({**start, **bad})
    train(cfg.replace({"online.env_steps": 40, "log.keep_checkpoints": 1}))
    with pytest.raises(RunError, match="end of pre-training"):
        start_checkpoint(tmp_path / "pre")


def test_collected_data_are_shared_by_the_trials(tmp_path):
    tiny = {k: v for k, v in TINY.items() if not k.startswith("task.")}
    small = {**tiny, "task": "hopper-medium", "task.max_episode_steps": 50, "data.transitions": 300, "online.env_steps": 40, "steps_per_iteration": 40}
    for trust in (0.1, 0.2):
        trial = Trial(trial_settings({**small, "guard.trust": trust}), tmp_path / "shared")
        episodes = trial.offline_data().episodes
        assert sum(e.length for e in episodes) >= 300
    assert len(list((tmp_path / "shared").glob("hopper-medium-*.hdf5"))) == 1
    Trial(trial_settings({**small, "data.transitions": 400}), tmp_path / "shared").offline_data()
    assert len(list((tmp_path / "shared").glob("hopper-medium-*.hdf5"))) == 2


# ---- under Tune ------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cluster():
    with private_ray(num_cpus=2):
        yield


@pytest.mark.ray
@pytest.mark.parametrize("reuse_actors", [True, False], ids=["same-actors", "new-actors"])
def test_pbt_goes_on_from_the_donors_checkpoint_with_the_perturbed_setting(cluster, tmp_path, data, reuse_actors):
    """What Tune made of a takeover is made again by a plain trial from the donor's checkpoint: every number is the same."""
    from ray import tune

    from modip_ray.search.watch import Rows
    from modip_ray.tune import MODIP, pbt
    taken = []

    class Takeovers(tune.Callback):
        def on_trial_start(self, iteration, trials, trial, **info):
            if "@perturbed" in (trial.experiment_tag or ""):
                taken.append((trial.trial_id, Path(trial.checkpoint.path), dict(trial.config)))

    space = params(data, online__env_steps=80, policy__lr=tune.grid_search([1e-3, 3e-3]), planner__horizon=tune.choice([2, 3]),
                   guard__trust=tune.uniform(0, 0.5))
    config = tune.TuneConfig(scheduler=pbt(space, perturbation_interval=1, quantile_fraction=0.5, synch=True), metric="mpc/mean", mode="max",
                             reuse_actors=reuse_actors)
    results = tune.Tuner(MODIP, param_space=space, tune_config=config, run_config=tune.RunConfig(
        name="pbt", storage_path=str(tmp_path), callbacks=[Takeovers(), Rows()], verbose=0,
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1))).fit()
    assert not results.errors and len(results) == 2 and taken
    by_trial = {r.metrics["trial_id"]: r for r in results}
    trial_id, donor, changed = taken[-1]
    assert trial_id not in donor.parent.name, "the state is another trial's"
    kept = list((tmp_path / "pbt").glob("*/checkpoint_*"))
    assert kept and all(len(list(p.glob("seed_0/checkpoints/step_*"))) == 1 for p in kept), "no checkpoint was written over another"
    before = newest(donor / "seed_0" / "checkpoints").counters
    mine = by_trial[trial_id]
    rows = read_rows(Path(mine.path))
    assert [r["training_iteration"] for r in rows] == [1, 2]
    after = min((r for r in rows if r["env_steps"] > before["env_steps"]), key=lambda r: r["env_steps"])
    saved = next(Path(c.path) for c, m in mine.best_checkpoints if m["training_iteration"] == after["training_iteration"]
                 and newest(Path(c.path) / "seed_0" / "checkpoints").counters["env_steps"] == after["env_steps"])
    own = yaml.safe_load((saved / "seed_0" / "config.yaml").read_text())
    assert (own["policy"]["lr"], own["planner"]["horizon"], own["guard"]["trust"]) == (changed["policy.lr"], changed["planner.horizon"], changed["guard.trust"])
    donors = yaml.safe_load((donor / "seed_0" / "config.yaml").read_text())
    assert own != donors, "the settings were perturbed"

    replayed = Trial(trial_settings(changed), tmp_path / "shared")
    replayed.load(donor)
    result = replayed.iterate()
    replayed.save(tmp_path / "replayed")
    assert same(saved, tmp_path / "replayed")
    assert result["mpc"]["mean"] == after["mpc/mean"] and result["updates"] == after["updates"] > before["updates"]


@pytest.mark.ray
def test_a_wrong_key_ends_the_tuner_before_anything_runs(cluster, tmp_path, data):
    from ray import tune

    from modip_ray.tune import MODIP
    space = {**params(data), "critic.gama": tune.choice([0.9])}
    with pytest.raises(Exception, match="did you mean 'gamma'"):
        tune.Tuner(MODIP, param_space=space, run_config=tune.RunConfig(name="wrong", storage_path=str(tmp_path), verbose=0)).fit()
    assert not list((tmp_path / "wrong").glob("*/result.json"))
