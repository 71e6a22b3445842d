"""What the replay has answered for comes back: after a crash at any moment, once each, whatever is sent again."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modip_ray.learning import replay_files
from modip_ray.learning.checkpoint import begin, commit, folders, newest, write_state
from modip_ray.learning.journal import JournalError
from modip_ray.learning.replay_server import Refused, restored_replay
from modip_ray.learning.segment import SeenIds, Segment, decode, encode
from modip_ray.tasks.episode import Episode
from tests.fakes import small

EPISODES = [Episode(np.zeros((9, 2), np.float32), np.zeros((8, 2), np.float32), np.zeros(8, np.float32), False)]
PLAN_H = 3


def config(**dotted):
    return small(**{"planner__horizon": PLAN_H, "replay__capacity": 60, **dotted})


def segment(number: int, length: int = 3, sender: str = "0/aaaa") -> Segment:
    """Every number in it says which segment and step it is."""
    t = np.arange(length + 1, dtype=np.float32)
    obs = np.stack([np.full(length + 1, number, np.float32), t], 1)
    plans, gains = np.broadcast_to(obs[:-1, None], (length, PLAN_H, 2)).copy(), np.where(t[:-1] % 2, np.nan, number).astype(np.float32)
    return Segment(obs, obs[:-1] + 0.5, np.float32(100 * number + t[:-1]), number % 2 == 0, plans, gains, f"{sender}/{number}")


class Run:
    """A run's folder and the replay in it, as the actor has it; `crash` is kill -9: nothing is closed or flushed."""

    def __init__(self, folder, **dotted):
        self.cfg, self.folder, self.updates, self.saved = config(**dotted), folder, 0, 0
        self.server = restored_replay(self.cfg, EPISODES, None, folder)

    def crash(self, exact=False):
        journal, self.server.journal = self.server.journal, None
        journal.lock.close()                                                        # the kernel does it for a process that dies
        self.server = restored_replay(self.cfg, EPISODES, newest(self.folder / "checkpoints"), self.folder, exact=exact)

    def save(self, keep=2):
        self.saved += 1
        folder = begin(self.folder / "checkpoints")
        for stream in ("model", "policy"):
            write_state(folder, f"learner_{stream}", {"updates": np.array(self.updates)})
        self.server.save(folder)
        return commit(folder, {"env_steps": self.server.env_steps, "updates": self.saved}, keep)

    def contents(self):
        """(segment, step) of every stored transition, oldest first, with all it should carry checked."""
        online = self.server.replay.online
        rows = online.newest(online.size)
        got = online.sequences(rows, 1, 1)
        out = [tuple(o) for o in got["obs"][:, 0].astype(int).tolist()]
        gains, plans = online.arrays["gain"][rows], online.arrays["plan"][rows]
        for i, (number, t) in enumerate(out):
            assert got["reward"][i, 0] == 100 * number + t and (got["action"][i, 0] == np.float32([number + 0.5, t + 0.5])).all()
            assert got["obs"][i, 1].tolist() == [number, t + 1] and (plans[i] == np.float32([number, t])).all()
            assert np.isnan(gains[i]) if t % 2 else gains[i] == number
        return out


def steps(*numbers, length=3):
    return [(n, t) for n in numbers for t in range(length)]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(replay_files, "CHUNK", 16)


def test_a_segment_out_and_in_again():
    bare = Segment(*(np.ones(s, np.float32) for s in ((3, 2), (2, 2), 2)), True)
    for one in (segment(4), segment(5), bare):
        two = decode(encode(one))
        assert (two.id, two.terminated) == (one.id, one.terminated)
        for key in ("observations", "actions", "rewards", "plans", "gains"):
            np.testing.assert_array_equal(getattr(one, key), getattr(two, key))
    assert segment(1, sender="3/abcd.2").incarnation == "abcd" and bare.incarnation == ""


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(8)), st.lists(st.sampled_from(["0/a", "1/b", "serial-12"]), min_size=8, max_size=8))
def test_ids_are_remembered_in_little_room(order, senders):
    seen, names = SeenIds(), [f"{sender}/{n}" for sender, n in zip(senders, order, strict=True)] + ["a name of its own"]
    for i, name in enumerate(names):
        assert name not in seen
        seen.add(name)
        seen = SeenIds.parse(seen.dump())
        assert all((other in seen) == (j <= i) for j, other in enumerate(names)) and len(seen) == i + 1
    assert "0/a" not in seen and "" not in seen
    in_turn = SeenIds()
    for n in range(1000):
        in_turn.add(f"0/a/{n}")
    assert in_turn.dump() == '{"0/a": [1000]}'
    old = SeenIds.parse('{"0/a": [1, 3, 5]}')
    assert [n for n in range(8) if f"0/a/{n}" in old] == [0, 3, 5], "of checkpoints whose workers counted for all shards together"


def test_what_was_answered_for_survives_kill_9_with_and_without_a_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.server.add([segment(0), segment(1)])
    run.crash()
    assert run.contents() == steps(0, 1) and run.server.env_steps == 6
    run.save()
    run.server.add([segment(2)])
    run.crash()
    assert run.contents() == steps(0, 1, 2) and run.server.env_steps == 9
    assert run.server.add([segment(1), segment(2), segment(3), segment(3)]) == 3, "sent again: stored once"
    run.crash()
    assert run.contents() == steps(0, 1, 2, 3) and run.server.env_steps == 12


def test_a_serial_run_goes_back_to_its_checkpoint(tmp_path):
    """What came after it is forgotten for good: the steps are made again, with the same ids and other numbers."""
    run = Run(tmp_path)
    run.server.add([segment(0)])
    run.save()
    run.server.add([segment(1)])
    run.crash(exact=True)
    assert run.contents() == steps(0) and run.server.env_steps == 3
    assert run.server.add([segment(1, length=4)]) == 4
    run.crash()
    assert run.contents() == steps(0) + steps(1, length=4)


def test_a_retired_worker_is_refused_also_after_restarts(tmp_path):
    run = Run(tmp_path)
    run.server.add([segment(0, sender="0/frozen.1")])
    run.server.retire("frozen")
    for restart in (None, run.crash, run.save, run.crash):
        if restart is not None:
            restart()
        with pytest.raises(Refused, match="frozen"):
            run.server.add([segment(1, sender="0/frozen"), segment(1)])
        assert run.server.add([segment(0, sender="0/frozen.1")]) == 0, "what was stored before is still answered for"
    assert run.contents() == steps(0) and run.server.refused == 2
    assert run.server.add([segment(1)]) == 3


def test_batches_come_from_what_is_stored_and_from_the_number_of_the_update(tmp_path):
    run = Run(tmp_path)
    run.server.add([segment(n) for n in range(9)])
    run.updates = 70
    for stream in ("model", "policy"):
        run.server.limiter.note(stream, 70)
    run.save()
    expected = {s: [run.server.sample(s) for _ in range(3)] for s in ("model", "policy")}
    run.crash()
    assert run.server.limiter.granted == {"model": 70, "policy": 70}
    for s, batches in expected.items():
        for update in (72, 70, 71):
            again = run.server.sample(s, update)
            assert all(np.array_equal(again[k], v, equal_nan=v.dtype.kind == "f") for k, v in batches[update - 70].items())
        assert run.server.limiter.granted[s] == 73
    assert not np.array_equal(expected["model"][0]["obs"], expected["model"][1]["obs"])


def test_a_full_disk_acknowledges_nothing(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.server.add([segment(0)])

    def full(file, data):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("modip_ray.learning.journal.os.write", full)
    with pytest.raises(JournalError, match=f"{tmp_path}/journal/replay: .*No space left"):
        run.server.add([segment(1)])
    monkeypatch.undo()
    assert run.contents() == steps(0) and run.server.env_steps == 3
    assert run.server.add([segment(1)]) == 3
    run.crash()
    assert run.contents() == steps(0, 1)


def test_a_damaged_record_of_the_journal_is_named_and_the_rest_is_used(tmp_path, capsys):
    run = Run(tmp_path)
    for n in range(3):
        run.server.add([segment(n)])
    part = run.server.journal.path(0)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    run.crash()
    assert run.contents() == steps(0, 2) and run.server.damaged == 1
    assert "damaged journal" in capsys.readouterr().err


def test_a_checkpoint_writes_what_is_new_and_shares_no_file_with_the_last(tmp_path):
    run, made, sent = Run(tmp_path), [], 0
    for _ in range(8):
        for _ in range(5):
            run.server.add([segment(sent)])
            sent += 1
        made.append(run.save())
        files = {p.name: p.stat().st_ino for p in made[-1].glob("replay.rows_*")}
        oldest, total = max(0, 3 * sent - 60), 3 * sent
        assert [int(n[12:19]) for n in sorted(files)] == list(range(oldest // 16, -(-total // 16)))
        if len(made) > 1:
            assert not set(files.values()) & {p.stat().st_ino for p in made[-2].iterdir()}
    assert folders(tmp_path / "checkpoints") == made[:-3:-1]


def test_files_are_linked_to_the_checkpoint_before_the_last(tmp_path):
    run = Run(tmp_path)
    run.server.add([segment(n) for n in range(11)])                                 # 33 transitions: two full chunks
    kept = [run.save(keep=9) for _ in range(4)]
    inodes = [next(f.glob("replay.rows_0000000.*")).stat().st_ino for f in kept]
    assert inodes[0] == inodes[2] != inodes[1] == inodes[3]
    tails = [next(f.glob("replay.rows_0000002.*")).stat().st_ino for f in kept]
    assert len(set(tails)) == 4, "a chunk that is not full is written each time"


def test_a_file_that_rots_is_not_taken_over(tmp_path):
    run = Run(tmp_path)
    run.server.add([segment(n) for n in range(11)])
    kept = [run.save(keep=9) for _ in range(2)]
    rotten = next(kept[0].glob("replay.rows_0000000.*"))
    data = bytearray(rotten.read_bytes())
    data[-5] ^= 4
    rotten.write_bytes(data)
    third = run.save(keep=9)
    assert next(third.glob("replay.rows_0000000.*")).stat().st_ino != rotten.stat().st_ino
    run.crash()
    assert run.contents() == steps(*range(11))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_happens_every_acknowledged_segment_is_there_once(tmp_path_factory, data):
    """Adds, segments sent again, checkpoints (whole and interrupted), kill -9, a damaged file of the newest checkpoint: the ring holds the newest of all that
    was acknowledged, in order, and the counts are those of all of it."""
    run, acknowledged, sent = Run(tmp_path_factory.mktemp("run")), [], 0
    for step in data.draw(st.lists(st.sampled_from(["add", "add", "again", "unanswered", "save", "interrupted", "crash", "damage"]), max_size=30)):
        if step == "add":
            new = [segment(sent + i, data.draw(st.integers(1, 9))) for i in range(data.draw(st.integers(1, 4)))]
            assert run.server.add(new) == sum(map(len, new))
            acknowledged += new
            sent += len(new)
        elif step == "again" and acknowledged:
            assert run.server.add(data.draw(st.lists(st.sampled_from(acknowledged), max_size=4))) == 0
        elif step == "unanswered":                                                  # stored, and killed before the answer was out: sent again, it counts
            new = segment(sent, 2)
            run.server.add([new])
            run.crash()
            assert run.server.add([new]) == 0
            acknowledged.append(new)
            sent += 1
        elif step == "save":
            run.save()
        elif step == "interrupted":
            run.server.save(begin(run.folder / "checkpoints"))
            run.crash()
        elif step == "crash":
            run.crash()
        elif step == "damage" and len(kept := folders(run.folder / "checkpoints")) == 2 and newest(run.folder / "checkpoints").path == kept[0]:
            file = data.draw(st.sampled_from(sorted(kept[0].iterdir())))
            content = bytearray(file.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
            assert newest(run.folder / "checkpoints").path == kept[1]
            run.crash()
            shutil.rmtree(kept[0])                                                  # as a resume sets it aside
        everything = [(int(s.id.rpartition("/")[2]), t) for s in acknowledged for t in range(len(s))]
        assert run.contents() == everything[-60:] and run.server.env_steps == len(everything)
        assert len(run.server.replay.seen) == len(acknowledged) and run.server.damaged == 0
