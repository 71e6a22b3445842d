"""The journal on a real disk: processes killed in the middle of a write, damaged bytes, a disk that is full."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modip_ray.learning import journal as journal_module
from modip_ray.learning.journal import HEADER, Journal, JournalError, Record, framed

ROOT = Path(__file__).resolve().parents[2]


def filled(folder, payloads, kind=1) -> Journal:
    journal = Journal(folder)
    for payload in payloads:
        journal.append([Record(kind, payload)])
    return journal


def payloads(journal, first=0) -> list[bytes]:
    return [r.payload for r in journal.read(first)]


def child(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_what_was_appended_is_read_in_order_and_parts_divide_it(tmp_path):
    journal = filled(tmp_path, [b"a", b""])
    journal.append([Record(2, b"b"), Record(1, b"c" * 5000)])
    assert journal.rotate() == journal.rotate() == 1, "an empty part is none"
    journal.append([Record(1, b"d")])
    journal.sync()
    assert list(journal.read(0)) == [Record(1, b"a"), Record(1, b""), Record(2, b"b"), Record(1, b"c" * 5000), Record(1, b"d")]
    assert payloads(journal, 1) == [b"d"] and journal.damage == []
    journal.close()
    again = filled(tmp_path, [b"e"])
    assert again.parts() == [0, 1, 2] and payloads(again, 1) == [b"d", b"e"]
    again.drop(before=1)
    assert again.parts() == [1, 2]
    again.drop(since=2)
    assert payloads(again) == [b"d"]


APPEND_FOR_EVER = """
import sys, numpy as np
from pathlib import Path
from modip_ray.learning.journal import Journal, Record
journal, n = Journal(Path(sys.argv[1])), 0
while True:
    journal.append([Record(1, n.to_bytes(4, "little") + bytes(200_000)), Record(1, (n + 1).to_bytes(4, "little"))])
    n += 2
    print(n, flush=True)
"""


def test_kill_9_in_the_middle_of_writing_loses_nothing_that_was_answered(tmp_path):
    """Three processes, one after the other, each killed at another moment. The next one opens the journal as it was left."""
    expected = 0
    for lines in (1, 7, 30):
        process = child(APPEND_FOR_EVER, tmp_path)
        answered = [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        answered += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.communicate()
        journal = Journal(tmp_path)
        numbers = [int.from_bytes(p[:4], "little") for p in payloads(journal, expected)]
        assert numbers[:answered[-1]] == list(range(answered[-1])) and len(numbers) <= answered[-1] + 2 and journal.damage == []
        journal.close()
        expected += 1
    assert Journal(tmp_path).parts() == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), cut=st.integers(0, 400))
def test_a_torn_end_costs_the_record_it_is_in_and_is_no_damage(tmp_path_factory, sizes, cut):
    folder = tmp_path_factory.mktemp("journal")
    written = [bytes([i]) * n for i, n in enumerate(sizes)]
    journal = filled(folder, written)
    journal.close()
    whole = journal.path(0).read_bytes()
    cut = min(cut, len(whole))
    journal.path(0).write_bytes(whole[:cut])
    ends = np.cumsum([HEADER.size + n for n in sizes])
    again = Journal(folder)
    assert payloads(again) == written[:int((ends <= cut).sum())] and again.damage == []
    again.append([Record(1, b"later")])
    assert payloads(again)[-1] == b"later"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_costs_one_record_and_is_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("journal")
    written = [bytes([i]) * n for i, n in enumerate(data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=6)))]
    written[0] += framed(Record(1, b"a record inside of a record"))               # must not come up as one while its own record is sound
    journal = filled(folder, written)
    journal.close()
    assert payloads(Journal(folder)) == written
    spoilt = bytearray(journal.path(0).read_bytes())
    at, bit = data.draw(st.integers(HEADER.size + len(written[0]), len(spoilt) - 1)), data.draw(st.integers(0, 7))
    spoilt[at] ^= 1 << bit
    journal.path(0).write_bytes(spoilt)
    starts = np.cumsum([0] + [HEADER.size + len(p) for p in written])
    hit = int(np.searchsorted(starts, at, "right")) - 1
    again = Journal(folder)
    found = payloads(again)
    assert found == written[:hit] + written[hit + 1:]
    named = [d for d in again.damage if f"part_000000: bytes {starts[hit]} to {starts[hit + 1]} " in d]
    assert len(named) == len(again.damage) == 1, again.damage


def test_bytes_that_are_missing_in_the_middle_cost_what_they_touch(tmp_path):
    written = [bytes([i]) * 50 for i in range(5)]
    journal = filled(tmp_path, written)
    journal.close()
    data = journal.path(0).read_bytes()
    journal.path(0).write_bytes(data[:80] + data[100:])
    again = Journal(tmp_path)
    assert payloads(again) == [written[0], *written[2:]] and len(again.damage) == 1


FILL_A_SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from modip_ray.learning.journal import Journal, JournalError, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
journal = Journal(Path(sys.argv[1]))
for n in range(10):
    try:
        journal.append([Record(1, bytes([n]) * 10_000), Record(1, bytes([n]) * (30_000 if n == 3 else 60_000))])
        print(n, flush=True)
    except JournalError as error:
        print(error, file=sys.stderr)
"""


def test_a_disk_that_takes_no_more_is_one_clear_error_and_nothing_of_that_call_counts(tmp_path):
    """A process that may write 100 kB a file: every call but the first is cut short in the middle; what it left is taken back."""
    out, err = child(FILL_A_SMALL_DISK, tmp_path / "j").communicate()
    answered = [int(line) for line in out.split()]
    errors = err.strip().splitlines()
    assert 0 in answered and len(answered) + len(errors) == 10 and errors
    assert all(str(tmp_path / "j") in e and "File too large" in e and "make room" in e for e in errors)
    journal = Journal(tmp_path / "j")
    assert sorted({p[0] for p in payloads(journal)}) == answered and len(payloads(journal)) == 2 * len(answered) and journal.damage == []


@pytest.mark.parametrize("cut", [0, 1, 25, 100])
def test_a_write_that_fails_half_way(tmp_path, monkeypatch, cut):
    journal = filled(tmp_path, [b"before"])
    write = os.write
    full = [cut, None]                                                              # bytes taken before there is no room left

    def short_of_room(file, data):
        taken = full.pop(0)
        if not taken:
            raise OSError(28, "No space left on device")
        return write(file, bytes(data)[:taken])
    monkeypatch.setattr(journal_module.os, "write", short_of_room)
    with pytest.raises(JournalError, match=f"{tmp_path}: .*No space left on device"):
        journal.append([Record(1, b"lost"), Record(1, bytes(100))])
    monkeypatch.undo()
    journal.append([Record(1, b"after")])
    assert payloads(journal) == [b"before", b"after"] and journal.damage == []
    journal.close()
    assert payloads(Journal(tmp_path)) == [b"before", b"after"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file/journal: cannot be opened"):
        Journal(tmp_path / "file" / "journal")


def test_one_process_at_a_time_and_a_dead_one_lets_go(tmp_path, monkeypatch):
    process = child(APPEND_FOR_EVER, tmp_path)
    process.stdout.readline()
    monkeypatch.setattr(journal_module, "LOCK_S", 0.3)
    with pytest.raises(JournalError, match=rf"another replay \(process {process.pid}\)"):
        Journal(tmp_path)
    process.kill()
    process.communicate()
    assert len(payloads(Journal(tmp_path))) >= 2


def test_open_files_do_not_pile_up(tmp_path):
    """A failing disk and many checkpoints: every part is closed again."""
    before = len(os.listdir("/proc/self/fd"))
    journal = Journal(tmp_path)
    for n in range(20):
        journal.append([Record(1, bytes([n]))])
        journal.rotate()
        journal.sync()
    assert len(os.listdir("/proc/self/fd")) <= before + 2           # the part that is written, and the lock
    journal.close()
    assert len(os.listdir("/proc/self/fd")) == before
