"""A study file (configs/studies/*.yaml): which methods are compared on which tasks with which seeds. Data only, strict like config/."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modip_ray.config import Config, ConfigError, config_dir, load, nearest, parse_scalar, read_yaml, task_names
from modip_ray.config.tree import typed
from modip_ray.learning.env_source import check_family
from modip_ray.learning.offline_data import rolls_out

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
START = "start"                     # the method that only pre-trains
OFFLINE = {"online.env_steps": 0, "eval.episodes": 1, "eval.every_steps": 0}     # its own settings: each method evaluates what it begins with


@dataclass(frozen=True)
class Cell:
    """One run of a study. `start`: the run whose pre-training it goes on from, as far as its settings agree with that one's (pretrain.start)."""

    task: str
    method: str
    seed: int
    folder: Path
    cfg: Config
    start: Cell | None = None
    kept: Path | None = None        # where its small files stay

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/seed_{self.seed}"


@dataclass(frozen=True)
class Study:
    """One study. Settings are dotted, as on the command line; where two say the same field, the later of settings, tasks, methods counts.

    tasks   : {name in configs/tasks: settings}; with another name of one's own, the settings say which: {lift: {task: lift-ph}}
    methods : {name: settings}; the first one is the study's own, the others are compared with it. One with pretrain.start: null does its own pre-training,
              so that its BC is another
    """

    out: str | None = None
    tasks: dict = field(default_factory=dict)
    methods: dict = field(default_factory=dict)
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    settings: dict = field(default_factory=dict)
    #: A folder for the small files of finished runs (settings, summary, evaluations), which go on counting where the run folders are gone; null: none.
    kept: str | None = None
    #: Runs at a time on this machine; each is a train command of its own, with its own Ray.
    at_once: int = 1

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(str(self.out)))

    @property
    def kept_folder(self) -> Path | None:
        return Path(os.path.expanduser(self.kept)) if self.kept else None

    def cells(self) -> list[Cell]:
        """Every run, those first that others go on from. ConfigError names the run whose settings are not valid."""
        found = []
        for task in self.tasks:
            for seed in self.seeds:
                start = self.cell(task, START, seed)
                found += [start, *(self.cell(task, method, seed, start) for method in self.methods)]
        return found

    def cell(self, task: str, method: str, seed: int, start: Cell | None = None) -> Cell:
        folder = self.folder / task / method / f"seed_{seed}"
        own = OFFLINE if start is None else {"pretrain.start": str(start.folder), **self.methods[method]}
        try:
            of_task = {k: v for k, v in self.tasks[task].items() if k != "task"}
            base = load(None, [f"task={task_of(task, self.tasks[task])}"])
            cfg = base.replace({**self.settings, **of_task, **own, "seed": seed, "run_dir": str(folder)})
            if start is not None and cfg.data.cache is None and rolls_out(cfg.data.source):
                cfg = cfg.replace({"data.cache": str(start.folder / "data.hdf5")})
            check_family(cfg.task)
        except ConfigError as error:
            raise ConfigError(f"task {task}, method {method}: {error}") from error
        kept = self.kept_folder
        return Cell(task, method, seed, folder, cfg, start, kept / task / method / f"seed_{seed}" if kept is not None else None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def task_of(name: str, settings: Mapping[str, Any]) -> str:
    """The name in configs/tasks of a study's task."""
    return settings.get("task", name)


def load_study(file: str | Path, overrides: Sequence[str] = ()) -> Study:
    """A study file with key=value on top: seeds='[0, 1]', settings.online.env_steps=30000, methods.modip.guard.trust=0.1."""
    path = find_study(file)
    tree = read_yaml(path)
    for item in overrides:
        key, sep, text = item.partition("=")
        head, *rest = key.split(".", 2 if key.startswith(("tasks.", "methods.")) else 1)
        if not sep or not head or (rest and head not in ("settings", "tasks", "methods")):
            raise ConfigError(f"override {item!r} is not of the form key=value, settings.KEY=value, tasks.TASK.KEY=value or methods.METHOD.KEY=value")
        level = tree
        for name in (head, *rest)[:-1]:
            if not isinstance(level.get(name) or {}, Mapping):
                raise ConfigError(f"{path}: {name}: got {level[name]!r}, expected a mapping")
            level[name] = dict(level.get(name) or {})
            level = level[name]
        level[(head, *rest)[-1]] = parse_scalar(text)
    given = {item.partition("=")[0] for item in overrides}
    if "out" in given and "kept" not in given:                                      # a study of one's own does not replace what is kept of the shipped one
        tree["kept"] = None
    return build_study(tree, str(path), path.stem)


def find_study(file: str | Path) -> Path:
    """A path as given, or the name of a file under configs/studies."""
    folder = config_dir() / "studies"
    for path in (Path(file), folder / file, folder / f"{file}.yaml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    raise ConfigError(f"no study {str(file)!r}{nearest(Path(file).stem, names)}: not a file, and {folder} holds {', '.join(names)}")


def build_study(tree: Mapping[str, Any], source: str, name: str) -> Study:
    """Types and names checked; `name`: the folder's name where the file gives none."""
    study = typed(Study, {**Study().to_dict(), **tree}, "")
    study = dataclasses.replace(study, out=study.out or f"runs/studies/{name}", tasks={t: s or {} for t, s in study.tasks.items()},
                                methods={m: s or {} for m, s in study.methods.items()})
    for group, known in (("tasks", task_names()), ("methods", None)):
        entries = getattr(study, group)
        if not entries:
            raise ConfigError(f"{source}: {group}: names none; at least one is needed")
        for key, settings in entries.items():
            if not isinstance(key, str) or not NAME.fullmatch(key) or key == START:
                raise ConfigError(f"{source}: {group}: got the name {key!r}; names become folders: text of letters, digits, '_', '.', '-', and not {START!r}")
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{source}: {group}.{key}: got {settings!r}, expected a mapping of dotted settings, e.g. {{planner.iterations: 0}}")
            if known is not None and (task := task_of(key, settings)) not in known:
                raise ConfigError(f"{source}: {group}: unknown task {task!r}{nearest(str(task), known)}")
    if not study.seeds or not all(isinstance(s, int) and s >= 0 for s in study.seeds) or len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"{source}: seeds: got {study.seeds!r}, expected a list of different whole numbers, e.g. [0, 1, 2]")
    if study.at_once < 1:
        raise ConfigError(f"{source}: at_once: got {study.at_once}, must be at least 1")
    free = [(study.settings, ""), *((s, "task") for s in study.tasks.values()),            # the one key of these that a group may have after all
            *((s, "pretrain.start" if s.get("pretrain.start", START) is None else "") for s in study.methods.values())]
    for group, allowed in free:
        for key in ("run_dir", "seed", "task", "pretrain.start"):
            if key in group and key != allowed:
                raise ConfigError(f"{source}: {key} is set by the study itself; remove it")
    return study
