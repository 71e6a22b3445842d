"""A small damage study: scripts/reader_study.py makes the large one."""
import os

import numpy as np
import pytest

from modip_ray.tasks import d4rl_data
from modip_ray.tasks.d4rl_data import read_d4rl, write_d4rl
from scripts import reader_study as study

FILES = 40
SOUND = {"refused", "equal", "announced", "other width", "changed"}


@pytest.fixture(scope="module")
def found():
    return study.damage(FILES, None, seed=1)


def test_every_damaged_file_is_refused_or_read_soundly(found):
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == FILES and set(outcomes) <= SOUND, found["details"]
    assert outcomes["refused"] >= FILES // 3 and outcomes["equal"] >= 1 and found["slowest_cpu_s"] < study.LIMIT_S


def test_what_changed_without_a_word_is_a_byte_that_hdf5_does_not_check(found):
    changed = [d for d in found["details"] if d["outcome"] == "changed"]
    assert all(d["kind"] in study.FLIPS for d in changed), changed
    assert all(d["source"] == "own" for d in changed if d["place"] == "payload"), changed     # the others are compressed, and zlib has a checksum


def test_checksums_would_find_every_flipped_byte():
    """HDF5's own, over data and structure: a proposal for our layout, measured beside the layout as it is without them."""
    found = study.checksums(40)
    assert set(found["fletcher32, v110"]) == {"bytes", "flips", "refused", "equal"} and found["fletcher32, v110"]["refused"] > 25
    assert found["plain"]["changed"] + found["plain"]["announced"] > 10


def test_the_study_tells_a_crash_and_a_hang(tmp_path, monkeypatch):
    """Readers that die, or take for ever, are found, and the next file is read all the same."""
    study.make_own(tmp_path / "own.hdf5")
    script = tmp_path / "judge.py"
    script.write_text('import os, sys, time\nprint("ready", flush=True)\nfor line in sys.stdin:\n'
                      '    if "dies" in line:\n        os.abort()\n    while "hangs" in line:\n        pass\n'
                      '    print(\'{"outcome": "equal", "message": ""}\', flush=True)\n')
    monkeypatch.setattr(study, "__file__", str(script))
    monkeypatch.setattr(study, "LIMIT_S", 1.0)
    names = ["good", "dies", "good", "hangs", "good"]
    answers = list(study.judged([(tmp_path / "own.hdf5", tmp_path / name) for name in names]))
    assert [a["outcome"] for a in answers] == ["equal", "crash", "equal", "hang", "equal"] and "status -6" in answers[1]["message"]


def test_verdicts(tmp_path):
    """Each outcome is told from the others."""
    original = tmp_path / "own.hdf5"
    study.make_own(original)
    expected = study.read(str(original))
    assert study.verdict(expected, str(original))["outcome"] == "equal"
    assert study.verdict(expected, str(tmp_path / "none.hdf5"))["outcome"] == "refused"
    episodes = expected.episodes
    write_d4rl(tmp_path / "fewer.hdf5", episodes[:-1], {})
    assert study.verdict(expected, str(tmp_path / "fewer.hdf5")) == {"outcome": "changed", "message": "2 episodes, 3 before"}
    other = [type(e)(e.observations, -e.actions, e.rewards, e.terminated) for e in episodes]
    write_d4rl(tmp_path / "other.hdf5", other, {})
    assert study.verdict(expected, str(tmp_path / "other.hdf5")) == {"outcome": "changed", "message": "3 of 3 episodes differ in actions"}
    with study.h5py.File(tmp_path / "other.hdf5", "r+") as file:
        study.rename(file, "next_observations", None)
    assert study.verdict(expected, str(tmp_path / "other.hdf5"))["outcome"] == "announced"


def test_payload_bytes_are_those_of_the_values(tmp_path):
    """There are as many as the arrays have, and the first one of an array changes its first value."""
    path, values = tmp_path / "plain.hdf5", np.arange(1.0, 101.0)
    with study.h5py.File(path, "w") as file:
        file["values"], file["group/flags"], file["group/text"] = values, np.ones(7, bool), np.bytes_("text")
        begin = file["values"].id.get_offset()
        file.create_dataset("group/chunks", data=np.zeros((5, 3)), chunks=(2, 3))           # three chunks, the last one half empty
    flags = study.payload_bytes(path)
    assert flags.sum() == values.nbytes + 7 + 4 + 3 * 48 and flags[begin:begin + values.nbytes].all() and not flags[:begin].all()
    content = bytearray(path.read_bytes())
    content[begin + 7] ^= 1
    path.write_bytes(content)
    with study.h5py.File(path) as file:
        assert (file["values"][1:] == values[1:]).all() and file["values"][0] != values[0]


@pytest.mark.parametrize("block", [1, 3, 7, 10_000])
def test_the_block_size_does_not_matter(tmp_path, monkeypatch, block):
    """read_d4rl compares rows in blocks; an unmarked end is found wherever it lies."""
    path = tmp_path / "own.hdf5"
    write_d4rl(path, study.toy_episodes(3), {})
    with study.h5py.File(path, "r+") as file:
        file["timeouts"][:] = False
        file["terminals"][:100] = False
    monkeypatch.setattr(d4rl_data, "BLOCK", block)
    read = read_d4rl(path)
    assert [e.length for e in read.episodes] == [60, 40, 50] and "first at row 59" in read.notes[0]


def test_a_large_file_takes_less_than_twice_its_size():
    """A smaller one than the file that the study measures."""
    figures = study.large(50_000)
    assert figures["own"]["read"] == figures["compressed"]["read"] == 50_000
    assert max(figures[key]["peak_over_raw"] for key in ("own", "compressed")) < 3.5        # below 2 at a million; fixed costs weigh more here


@pytest.mark.skipif(not os.environ.get("MODIP_TEST_DATA"), reason="real data: set MODIP_TEST_DATA to a folder with the D4RL head files")
def test_official_files(test_data):
    found = study.damage(FILES // 2, test_data, seed=2)
    assert set(found["outcomes"]) <= SOUND, found["details"]
    assert sum(found["outcomes"].values()) == FILES // 2 and found["slowest_cpu_s"] < study.LIMIT_S
