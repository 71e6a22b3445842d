"""What the readers of data files do with damaged and with large files; figures go to results/tasks/readers.json.

    python scripts/reader_study.py damage                 # 200 damaged files, made from four small ones of this script's making
    python scripts/reader_study.py damage --data FOLDER   # the same from official files in FOLDER (and our own layout)
    python scripts/reader_study.py checksums              # would HDF5's own checksums find single flipped bytes in our layout?
    python scripts/reader_study.py large                  # a file of a million transitions: seconds and memory
"""
from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from modip_ray.tasks.d4rl_data import read_d4rl, write_d4rl
from modip_ray.tasks.dataset import DataError, Dataset
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.readers import read_any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "tasks" / "readers.json"
ARRAYS = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")      # of our own layout
HOPPER = (11, 3)
MIB = 2**20


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("damage")
    p.add_argument("--files", type=int, default=200, help="damaged files in all")
    p.add_argument("--data", type=Path, help="folder with official files to damage, in place of made ones")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=lambda a: record("damage_official" if a.data else "damage", damage(a.files, a.data, a.seed), a.json))
    p = commands.add_parser("checksums")
    p.add_argument("--flips", type=int, default=200, help="damaged files for each way of writing")
    p.set_defaults(run=lambda a: record("checksums", checksums(a.flips), a.json))
    p = commands.add_parser("large")
    p.add_argument("--transitions", type=int, default=1_000_000)
    p.set_defaults(run=lambda a: record("large", large(a.transitions), a.json))
    for p in commands.choices.values():
        p.add_argument("--json", type=Path, default=RESULTS)
    for name, run in (("read-large", read_large), ("write-large", write_large)):           # run by the commands above, in processes of their own
        p = commands.add_parser(name)
        p.add_argument("arguments", nargs="+")
        p.set_defaults(run=lambda a, run=run: run(*a.arguments))
    commands.add_parser("judge").set_defaults(run=lambda a: judge())
    args = top.parse_args()
    args.run(args)


def record(section: str, figures: dict, path: Path) -> None:
    """Put the figures into their section of the results file, with where they come from."""
    from modip_ray.runfolder import command_line, git_commit, machine, versions  # here: the processes that only read start faster without
    known = json.loads(path.read_text()) if path.is_file() else {}
    libraries = versions() | {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
    known[section] = {"command": "python scripts/" + command_line(), "git": git_commit(), "machine": machine(), "versions": libraries, **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


# ---- damaged files ---------------------------------------------------------------------------------------------------------------------------

LIMIT_S = 10.0                                      # of processor time for one file; undamaged ones take some milliseconds
WALL_LIMIT_S = 600.0                                # on the clock, however busy the machine
MEMORY_GIB = 8                                      # address space of the process that reads
OFFICIAL = {"d4rl": "hopper_medium-v2.head.hdf5", "kitchen": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5", "robomimic": "lift_ph_first10_low_dim.hdf5"}
KINDS = ("byte", "byte", "byte in structure", "byte in structure", "sector", "cut", "rename", "number", "shape", "text")
FLIPS = ("byte", "byte in structure", "sector")


@dataclass(frozen=True)
class Mutation:
    """What was done to a copy of `source`. place: where the bytes lie, "payload", "structure" or (of a sector) "both"; "" where keys were changed."""

    source: str
    kind: str
    what: str
    place: str = ""


def damage(files: int, data: Path | None, seed: int) -> dict:
    """Damage small files in every way and let read_any read them; counts by outcome, and every file that was read as something else.

    Outcomes, for each damaged file:
    refused        DataError
    equal          the same episodes as before (the damage hit nothing that is read)
    announced      other episodes, and the dataset's notes say so
    other width    a sound file with another number of columns: what reads it for an environment refuses it (learning/offline_data.py)
    changed        other episodes, all finite and in range, and nothing said. HDF5 has no checksum over uncompressed data, nor (before superblock 2)
                   over its own structure: counted by where the damage lies
    unsound        NaN, or an action out of range, came through
    crash, hang    another exception, the death of the process; no answer after LIMIT_S of processor time
    """
    rng, mutations = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as folder:
        sources = originals(Path(folder), data)
        paths = []
        for k in range(files):
            name = list(sources)[k % len(sources)]
            kind = KINDS[k // len(sources) % len(KINDS)]
            paths.append(Path(folder) / f"{k}.hdf5")
            mutations.append(mutate(sources[name], paths[-1], name, kind, rng))
        outcomes = list(judged([(sources[m.source], path) for m, path in zip(mutations, paths, strict=True)]))
    tables: dict[str, Counter] = {"outcomes": Counter(), "by_kind": Counter(), "by_source": Counter(), "changed_by_place": Counter()}
    details = []
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        name = outcome["outcome"]
        tables["outcomes"][name] += 1
        tables["by_kind"][f"{mutation.kind}: {name}"] += 1
        tables["by_source"][f"{mutation.source}: {name}"] += 1
        if name == "changed":
            tables["changed_by_place"][mutation.place or "keys"] += 1
        if name not in ("refused", "equal"):
            details.append({"source": mutation.source, "kind": mutation.kind, "what": mutation.what, "place": mutation.place, **outcome})
    slowest = max(o["cpu_s"] for o in outcomes)
    return {"files": files, "seed": seed, "official": data is not None, "slowest_cpu_s": slowest, **{k: dict(sorted(t.items())) for k, t in tables.items()},
            "details": details}


# the files

def originals(folder: Path, data: Path | None) -> dict[str, Path]:
    """Undamaged files by kind."""
    makers: dict[str, Callable[[Path], None]] = {"d4rl": make_d4rl, "kitchen": make_kitchen, "robomimic": make_robomimic, "own": make_own}
    found = {}
    for name, make in makers.items():
        found[name] = folder / f"{name}.hdf5"
        if data is not None and name in OFFICIAL:
            found[name].write_bytes((data / OFFICIAL[name]).read_bytes())
        else:
            make(found[name])
    return found


def toy_episodes(seed: int, obs_dim: int = 11, action_dim: int = 3) -> list[Episode]:
    rng = np.random.default_rng(seed)
    return [made_episode(rng, steps, obs_dim, action_dim, terminated) for steps, terminated in ((60, True), (40, False), (50, True))]


def make_own(path: Path) -> None:
    write_d4rl(path, toy_episodes(0), {"env": "Hopper-v4", "policy": {"fc0": {"weight": np.ones((4, 11), np.float32)}}})


def make_d4rl(path: Path) -> None:
    """The layout of D4RL's MuJoCo files, compressed, with infos and a policy."""
    plain = path.with_name("plain.hdf5")
    make_own(plain)
    with h5py.File(plain) as source, h5py.File(path, "w") as file:
        for key, value in source.items():
            if isinstance(value, h5py.Dataset):
                file.create_dataset(key, data=value[()], compression="gzip")
        rows = len(source["rewards"])
        file.create_dataset("infos/qpos", data=np.zeros((rows, 6)), compression="gzip")
        file.create_dataset("infos/action_log_probs", data=np.zeros(rows, np.float32), compression="gzip")
        file["metadata/algorithm"], file["metadata/iteration"] = np.bytes_("SAC"), np.int32(400)
        file.create_dataset("metadata/policy/fc0/weight", data=np.ones((256, 11), np.float32), compression="gzip")


def make_kitchen(path: Path) -> None:
    """The layout of D4RL's kitchen files: no next_observations, the reward is the number of subtasks done so far."""
    episodes = toy_episodes(1, 60, 9)
    rewards = [np.minimum(4, np.arange(e.length) // (e.length // 4)).astype(np.float32) for e in episodes]
    ends = np.zeros(sum(e.length for e in episodes), bool)
    ends[np.cumsum([e.length for e in episodes]) - 1] = True
    arrays = {"observations": np.concatenate([e.observations[:-1] for e in episodes]), "actions": np.concatenate([e.actions for e in episodes]),
              "rewards": np.concatenate(rewards), "terminals": ends, "timeouts": np.zeros_like(ends), "infos": np.zeros(len(ends), np.int64)}
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")


def make_robomimic(path: Path) -> None:
    """The layout of robomimic's low_dim files for Lift, with the text attributes of variable size that they have."""
    rng = np.random.default_rng(2)
    with h5py.File(path, "w") as file:
        total, names = 0, []
        for k, steps in enumerate((30, 25, 35, 28)):
            names.append(f"demo_{k}")
            demo = file.create_group(f"data/demo_{k}")
            demo.attrs["num_samples"], demo.attrs["model_file"] = steps, "<mujoco model=\"base\">" + "<body name=\"x\"/>" * 1000 + "</mujoco>"
            observations = {key: rng.normal(size=(steps + 1, width)) for key, width in
                            (("object", 10), ("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2), ("robot0_joint_pos", 7))}
            observations["object"][:, 7:] = observations["robot0_eef_pos"] - observations["object"][:, :3]         # what Lift has there
            success = (np.arange(steps) >= steps - 5).astype(float)
            values = {**{f"obs/{k}": v[:-1] for k, v in observations.items()}, **{f"next_obs/{k}": v[1:] for k, v in observations.items()},
                      "actions": rng.uniform(-1, 1, (steps, 7)), "rewards": success, "dones": success.astype(np.int64), "states": rng.normal(size=(steps, 32))}
            for key, value in values.items():
                demo.create_dataset(key, data=value, compression="gzip")
            total += steps
        env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "reward_shaping": False}}
        file["data"].attrs["total"], file["data"].attrs["env_args"] = total, json.dumps(env_args, indent=4)
        file["mask/train"], file["mask/valid"] = np.array(names[:3], "S8"), np.array(names[3:], "S8")


# the damage

def mutate(original: Path, path: Path, source: str, kind: str, rng: np.random.Generator) -> Mutation:
    """Write a damaged copy of `original`."""
    content = bytearray(original.read_bytes())
    if kind in FLIPS:
        payload = payload_bytes(original)
        if kind == "sector":
            begin = int(rng.integers(len(content) // 512)) * 512
            hit = slice(begin, begin + 512)
            content[hit] = rng.integers(0, 256, len(content[hit]), np.uint8).tobytes()
            what, place = f"bytes {begin}..{begin + 511} random", "payload" if payload[hit].all() else "both" if payload[hit].any() else "structure"
        else:
            used = np.flatnonzero(~payload & (np.frombuffer(content, np.uint8) != 0))      # most zeros of HDF5's structure are unused room
            at = int(rng.choice(used) if kind == "byte in structure" else rng.integers(len(content)))
            old, content[at] = content[at], content[at] ^ int(rng.integers(1, 256))
            what, place = f"byte {at}: {old} -> {content[at]}", "payload" if payload[at] else "structure"
        path.write_bytes(content)
        return Mutation(source, kind, what, place)
    if kind == "cut":
        size = int(rng.integers(len(content)))
        path.write_bytes(content[:size])
        return Mutation(source, kind, f"{size} of {len(content)} bytes")
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if kind == "rename" or isinstance(item, h5py.Dataset) and item.ndim else None)
        name = names[rng.integers(len(names))]
        return Mutation(source, kind, {"rename": rename, "number": bad_number, "shape": bad_shape, "text": bad_type}[kind](file, name, rng))


def payload_bytes(path: Path) -> np.ndarray:
    """Flags (file size,): the byte belongs to the values of a dataset (stored plainly or in compressed chunks), not to HDF5's own structure."""
    flags = np.zeros(path.stat().st_size, bool)

    def mark(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.chunks is None:
            begin = item.id.get_offset()
            if begin is not None:
                flags[begin:begin + item.id.get_storage_size()] = True
            return
        for k in range(item.id.get_num_chunks()):
            chunk = item.id.get_chunk_info(k)
            flags[chunk.byte_offset:chunk.byte_offset + chunk.size] = True
    with h5py.File(path) as file:
        file.visititems(mark)
    return flags


def rename(file: h5py.File, name: str, rng: np.random.Generator) -> str:
    file.move(name, f"{name}_x")
    return f"{name} -> {name}_x"


def bad_number(file: h5py.File, name: str, rng: np.random.Generator) -> str:
    """NaN or infinity somewhere in it; names of demonstrations become others."""
    values = file[name][()]
    index = tuple(int(rng.integers(n)) for n in values.shape)
    bad = (np.nan, np.inf, -np.inf)[rng.integers(3)]
    if values.dtype.kind == "S":
        values = np.array(["nobody"] * len(values), "S8")
    else:
        values = values.astype(np.float64)
        values[index] = bad
    replace_values(file, name, values)
    return f"{name}[{', '.join(map(str, index))}] = {bad}"


def bad_shape(file: h5py.File, name: str, rng: np.random.Generator) -> str:
    values = file[name][()]
    how = ("one row less", "no rows", "one dimension more", "one column less", "one row more")[rng.integers(5)]
    changed = {"one row less": values[:-1], "no rows": values[:0], "one dimension more": values[..., None], "one column less": values[..., :-1],
               "one row more": np.concatenate([values, values[-1:]])}[how]
    replace_values(file, name, changed)
    return f"{name}: {how}, {values.shape} -> {changed.shape}"


def bad_type(file: h5py.File, name: str, rng: np.random.Generator) -> str:
    replace_values(file, name, np.full(file[name].shape, b"text"))
    return f"{name}: text"


def replace_values(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file.create_dataset(name, data=values, compression="gzip" if values.size else None)


# the readers' answer

def judged(pairs: list[tuple[Path, Path]]) -> Iterator[dict]:
    """What reading each (original, damaged) pair came to. One process reads many files; one that dies or hangs is replaced by the next."""
    process: subprocess.Popen | None = None
    answers: queue.Queue = queue.Queue()
    try:
        for original, damaged in pairs:
            if process is None:
                process, answers = start_judge()
            try:
                used = cpu_seconds(process.pid)
                process.stdin.write(json.dumps([str(original), str(damaged)]) + "\n")
                process.stdin.flush()
                line = answer_of(process, answers, used)
                seconds = cpu_seconds(process.pid) - used
            except TimeoutError as error:
                answer, seconds = {"outcome": "hang", "message": str(error)}, LIMIT_S
            except (BrokenPipeError, ProcessLookupError):
                answer, seconds = {"outcome": "crash", "message": f"the process died with status {process.wait(10)}"}, 0.0
            else:
                answer = json.loads(line)
            yield answer | {"cpu_s": round(seconds, 2)}
            if answer["outcome"] in ("hang", "crash"):
                process.kill()
                process.wait()
                process = None
    finally:
        if process is not None:
            process.kill()
            process.wait()


def start_judge() -> tuple[subprocess.Popen, queue.Queue]:
    process = subprocess.Popen([sys.executable, __file__, "judge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    answers: queue.Queue = queue.Queue()

    def listen() -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")
    threading.Thread(target=listen, daemon=True).start()
    try:
        if answers.get(timeout=WALL_LIMIT_S) != "ready\n":
            raise RuntimeError("the process that reads does not start")
    except BaseException:
        process.kill()
        raise
    return process, answers


def answer_of(process: subprocess.Popen, answers: queue.Queue, used: float) -> str:
    """The next line; TimeoutError when the process has worked on it for too long, ProcessLookupError when it has died."""
    end = time.monotonic() + WALL_LIMIT_S
    while True:
        try:
            line = answers.get(timeout=0.5)
        except queue.Empty:
            if cpu_seconds(process.pid) - used > LIMIT_S or time.monotonic() > end:
                raise TimeoutError(f"no answer after {cpu_seconds(process.pid) - used:.0f} s of processor time") from None
            continue
        if not line:
            raise ProcessLookupError
        return line


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used; ProcessLookupError when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError as error:
        raise ProcessLookupError from error
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def judge() -> None:
    """Answer lines of [original, damaged] with {"outcome", "message"}."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB * 2**30, MEMORY_GIB * 2**30))
    undamaged: dict[str, Dataset] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        original, damaged = json.loads(line)
        if original not in undamaged:
            undamaged[original] = read(original)
        print(json.dumps(verdict(undamaged[original], damaged)), flush=True)


def read(path: str) -> Dataset:
    """As a training run reads."""
    return read_any(path, max_episode_steps=1000, action_range=(-1.0, 1.0))


def verdict(expected: Dataset, path: str) -> dict:
    try:
        found = read(path)
    except DataError as error:
        return {"outcome": "refused", "message": str(error).replace(path, "FILE")[:300]}
    except Exception as error:                                                      # whatever it is: that it comes through is the finding
        return {"outcome": "crash", "message": f"{type(error).__name__}: {error}"[:300]}
    try:
        for k, episode in enumerate(found.episodes):
            episode.validate(f"episode {k}")
            if np.abs(episode.actions).max() > 1.001:
                raise ValueError(f"episode {k} has an action of {np.abs(episode.actions).max()}")
    except ValueError as error:
        return {"outcome": "unsound", "message": str(error)}
    if len(found.episodes) == len(expected.episodes) and all(map(same, found.episodes, expected.episodes)):
        return {"outcome": "equal", "message": "" if found.metadata == expected.metadata else "other metadata"}
    widths = [tuple(getattr(d.episodes[0], key).shape[1] for key in ("observations", "actions")) for d in (found, expected)]
    if widths[0] != widths[1]:
        return {"outcome": "other width", "message": f"(observations, actions) have {widths[0]} columns, {widths[1]} before"}
    if found.notes != expected.notes:
        return {"outcome": "announced", "message": "; ".join(n for n in found.notes if n not in expected.notes)}
    return {"outcome": "changed", "message": difference(found, expected)}


def same(a: Episode, b: Episode) -> bool:
    return a.terminated == b.terminated and all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("observations", "actions", "rewards"))


def difference(found: Dataset, expected: Dataset) -> str:
    if len(found.episodes) != len(expected.episodes):
        return f"{len(found.episodes)} episodes, {len(expected.episodes)} before"
    differing = [k for k, (a, b) in enumerate(zip(found.episodes, expected.episodes, strict=True)) if not same(a, b)]
    keys = sorted({key for k in differing for key in ("observations", "actions", "rewards")
                   if not np.array_equal(getattr(found.episodes[k], key), getattr(expected.episodes[k], key))})
    return f"{len(differing)} of {len(expected.episodes)} episodes differ in {', '.join(keys) or 'termination'}"


# would checksums help our own files?

def checksums(flips: int, seed: int = 0) -> dict:
    """Outcomes of single flipped bytes in our layout, written plainly, with fletcher32 over the data, and with libver v110 (over the structure) too."""
    rng, found = np.random.default_rng(seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = folder / "own.hdf5"
        make_own(own)
        for name, libver, options in (("plain", None, {}), ("fletcher32", None, {"fletcher32": True}), ("fletcher32, v110", "v110", {"fletcher32": True})):
            original, pairs = folder / f"{name}.hdf5", []
            with h5py.File(own) as source, h5py.File(original, "w", libver=libver) as file:
                for key in ARRAYS:
                    file.create_dataset(key, data=source[key][()], **options)
                file["metadata/env"] = source["metadata/env"][()]
            for k in range(flips):
                content = bytearray(original.read_bytes())
                content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
                pairs.append((original, folder / f"{name} {k}.hdf5"))
                pairs[-1][1].write_bytes(content)
            counts = Counter(answer["outcome"] for answer in judged(pairs))
            found[name] = {"bytes": original.stat().st_size, "flips": flips, **dict(sorted(counts.items()))}
    return found


# ---- large files -----------------------------------------------------------------------------------------------------------------------------

def large(transitions: int) -> dict:
    """Seconds and peak memory of read_d4rl on our own layout and on the same data compressed, as D4RL has it. Each is read in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        own, compressed = Path(folder) / "own.hdf5", Path(folder) / "compressed.hdf5"
        child("write-large", own, compressed, transitions)
        with h5py.File(own) as file:
            raw = sum(file[key].nbytes for key in ARRAYS)
        found = {"transitions": transitions, "obs_dim": HOPPER[0], "action_dim": HOPPER[1], "raw_mib": raw / MIB}
        for path in (own, compressed):
            figures = json.loads(child("read-large", path))
            peak = figures["peak_mib"] - figures["before_mib"]
            found[path.stem] = {"file_mib": path.stat().st_size / MIB, **figures, "peak_above_start_mib": peak, "peak_over_raw": peak / (raw / MIB)}
    return found


def child(*command: object) -> str:
    """Output of this script's `command`, run in a process of its own."""
    return subprocess.run([sys.executable, __file__, *map(str, command)], check=True, capture_output=True, text=True).stdout


def write_large(own: str, compressed: str, transitions: str) -> None:
    rng, left, episodes = np.random.default_rng(0), int(transitions), []
    while left:
        steps = min(left, int(rng.integers(200, 1001)))
        episodes.append(made_episode(rng, steps, *HOPPER, terminated=steps < 1000))
        left -= steps
    write_d4rl(own, episodes, {"env": "Hopper-v4"})
    with h5py.File(own) as source, h5py.File(compressed, "w") as file:
        for key, value in source.items():
            if isinstance(value, h5py.Dataset):
                file.create_dataset(key, data=value[()], compression="gzip")


def read_large(path: str) -> None:
    before, start, cpu = peak_mib(), time.perf_counter(), time.process_time()
    dataset = read_d4rl(path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "before_mib": before, "peak_mib": peak_mib(), "episodes": len(dataset.episodes),
                      "read": dataset.transitions}))


def peak_mib() -> float:
    """The most memory that this program has held. Not getrusage's ru_maxrss: a process inherits that of the one that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def made_episode(rng: np.random.Generator, steps: int, obs_dim: int, action_dim: int, terminated: bool) -> Episode:
    arrays = rng.normal(size=(steps + 1, obs_dim)), rng.uniform(-1, 1, (steps, action_dim)), rng.normal(size=steps)
    return Episode(*(a.astype(np.float32) for a in arrays), terminated)


if __name__ == "__main__":
    main()
