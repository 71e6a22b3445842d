"""MODIP for Ray Tune: a Trainable that Tune can pause, checkpoint, restore and perturb.

    from ray import tune
    from modip_ray.tune import MODIP

    space = {"task": "hopper-medium", "seeds": 2, "guard.std_max": tune.uniform(0.05, 0.3), "planner.horizon": tune.choice([2, 3, 4])}
    results = tune.Tuner(MODIP, param_space=space, tune_config=tune.TuneConfig(metric="mpc/mean", mode="max", num_samples=8)).fit()

Keys are dotted settings and those of `search.settings.SEARCH_KEYS`. A trial is a configuration: its seeds are trained one after the other in the
trial's process and aggregated before anything is compared. `search/trial.py` has the logic, this the shell.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.fs import FileSelector, LocalFileSystem
from ray import tune

from modip_ray.search.settings import SEARCH_KEYS, check_mutation, trial_settings
from modip_ray.search.space import check_space, pbt

if TYPE_CHECKING:
    from modip_ray.search.trial import Trial

__all__ = ["MODIP", "SEARCH_KEYS", "check_mutation", "check_space", "pbt"]


class MODIP(tune.Trainable):
    """config: see above. Each report has {"mpc", "policy"}/{mean, return, normalized; ci95 and by_seed of each} (search/scores.py), env_steps, updates,
    policy_updates, train_s, eval_s.

    A trial is done after online.env_steps. ConfigError for a setting that cannot be used comes from the driver where it can, when the trial is made.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """One process with `cpus` and `gpus`. Tune asks in the driver before a trial begins, so this is where its settings are checked."""
        settings = trial_settings(config)
        return tune.PlacementGroupFactory([{"CPU": settings.cpus, "GPU": settings.gpus}])

    def setup(self, config: dict[str, Any]) -> None:
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))                      # relative paths mean what they mean to the driver
        self.trial = self.new_trial(config, None)

    def new_trial(self, config: dict[str, Any], data: tuple | None) -> Trial:
        from modip_ray.search.trial import Trial
        return Trial(trial_settings(config), self.shared_folder(), data)

    def shared_folder(self) -> Path:
        """Of the whole search: beside the trials' folders, or on this node where those are on remote storage."""
        storage = self._storage
        if storage is None:
            return Path(self.logdir) / "data"
        local = isinstance(storage.storage_filesystem, LocalFileSystem)
        return Path(storage.experiment_fs_path if local else Path(storage.trial_working_directory).parent) / "data"

    def step(self) -> dict[str, Any]:
        return self.trial.iterate()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self._storage is not None:
            use_new_folder(self._storage)
        self.trial.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.trial.load(Path(checkpoint))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another configuration in this process (reuse_actors): the state is dropped, the offline data stay."""
        self.trial.close()
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))
        self.trial = self.new_trial(new_config, self.trial.data)
        return True

    def cleanup(self) -> None:
        self.trial.close()


def use_new_folder(storage: Any) -> None:
    """Have Tune keep the checkpoint under a number that the trial has not used yet.

    Tune loses count where PBT stops a trial that is saving (2.60): the next checkpoint would be written into the folder of one that others go on from.
    """
    found = storage.storage_filesystem.get_file_info(FileSelector(storage.trial_fs_path, allow_not_found=True))
    numbers = [int(f.base_name.removeprefix("checkpoint_")) for f in found if f.base_name.startswith("checkpoint_")]
    storage.current_checkpoint_index = max([storage.current_checkpoint_index, *numbers])
