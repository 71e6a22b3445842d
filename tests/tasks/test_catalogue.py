"""Downloads are tested against a real HTTP server on this machine."""
import hashlib
import http.server
import os
import socket
import threading

import pytest

from modip_ray.tasks import catalogue as cat
from modip_ray.tasks.dataset import DataError

BODY = cat.HDF5_BEGINS + bytes(range(256)) * 400
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's body as its `mode` says, and writes down the Range of every request."""

    def do_GET(self):
        server, body = self.server, self.server.body
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.mode != "no ranges" else 0
        if server.mode == "404" or begin >= len(body):
            self.send_error(404 if server.mode == "404" else 416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin + (server.mode == 'wrong range')}-{len(body) - 1}/{len(body)}")
        if server.mode != "no length":
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        end = len(body)
        if server.mode == "cut" or server.mode == "cut once" and len(server.ranges) == 1:
            end = min(end, begin + 30_000)
        if server.mode == "nothing":
            end = begin
        server.gate.wait(60)
        self.wfile.write(body[begin:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.mode, server.ranges, server.gate = BODY, "plain", [], threading.Event()
        server.gate.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def entries(address):
    size = len(BODY)
    kinds = {"toy/a-v0": (size, SHA, "confirmed"), "toy/wrong-v0": (size, "0" * 64, "confirmed"), "toy/third-v0": (size, "1" * 64, "third-party"),
             "toy/unknown-v0": (None, None, "none")}
    return {name: cat.Entry(name, address, *rest) for name, rest in kinds.items()}


@pytest.fixture
def toy(server, tmp_path, monkeypatch):
    """The catalogue's names lead to the server, its files to a fresh folder."""
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(cat, "WAIT_S", 0.01)
    found = entries(f"http://127.0.0.1:{server.server_address[1]}/a.hdf5")
    monkeypatch.setattr(cat, "catalogue", lambda: found)
    return server


def part_of(name, content):
    path = cat.local_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    cat._part(path).write_bytes(content)
    return cat._part(path)


def visible(path):
    return sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))


# ---- the table -------------------------------------------------------------------------------------------------------------------------------

def test_the_table_is_sound():
    for name, e in cat.catalogue().items():
        assert e.name == name and e.address.startswith(("http://", "https://")) and e.address.endswith(".hdf5")
        assert e.checksum in ("confirmed", "third-party", "none") and (e.sha256 is None) == (e.checksum == "none")
        assert e.sha256 is None or len(bytes.fromhex(e.sha256)) == 32 and e.size > 10_000
    assert len({e.address for e in cat.catalogue().values()}) == len(cat.catalogue()) >= 40
    assert len({e.sha256 for e in cat.catalogue().values() if e.sha256}) == sum(e.sha256 is not None for e in cat.catalogue().values())
    medium = cat.find("d4rl/hopper_medium-v2")
    assert medium.size == 152_756_557 and medium.sha256.startswith("5bdf1bc4a713") and medium.address.endswith("gym_mujoco_v2/hopper_medium-v2.hdf5")


@pytest.mark.parametrize(("typed", "meant"), [("hopper-medium-v2", "d4rl/hopper_medium-v2"), ("d4rl/kitchen-complete", "d4rl/kitchen_complete-v0"),
                                              ("robomimic/lift", "robomimic/lift_ph"), ("lift_pg", "robomimic/lift_ph")])
def test_a_mistyped_name_gets_the_nearest_ones(typed, meant):
    with pytest.raises(DataError, match=r"not in the catalogue \(did you mean") as error:
        cat.find(typed)
    assert repr(meant) in str(error.value)


def test_a_name_like_nothing():
    with pytest.raises(DataError, match="'%%%': not in the catalogue .'modip data list'"):
        cat.find("%%%")


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path))
    assert cat.local_path("robomimic/lift_ph") == tmp_path / "robomimic" / "lift_ph.hdf5"
    monkeypatch.delenv("MODIP_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cat.data_dir() == tmp_path / "cache" / "modip_ray" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cat.data_dir() == tmp_path / "home" / ".cache" / "modip_ray" / "data"


def test_the_official_kitchen_file(data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path))
    path = cat.local_path("d4rl/kitchen_complete-v0")
    path.parent.mkdir()
    path.write_bytes(data_file("mini_kitchen_microwave_kettle_light_slider-v0.hdf5").read_bytes())
    assert cat.fetch("d4rl/kitchen_complete-v0") == path and cat.state("d4rl/kitchen_complete-v0") == "verified"


# ---- downloads that succeed ------------------------------------------------------------------------------------------------------------------

def test_fresh_download(toy):
    seen = []
    assert cat.state("toy/a-v0") == "absent"
    path = cat.fetch("toy/a-v0", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY and path == cat.local_path("toy/a-v0") and visible(path) == ["a-v0.hdf5"]
    assert seen[-1] == (len(BODY), len(BODY)) and cat.state("toy/a-v0") == "verified"
    assert cat.fetch("toy/a-v0") == path and toy.ranges == [None]                           # the second time nothing is asked for


def test_resumes_from_half(toy):
    part_of("toy/a-v0", BODY[:50_000])
    assert cat.state("toy/a-v0") == "partly downloaded"
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == ["bytes=50000-"]


def test_a_server_without_ranges_sends_all_again(toy):
    toy.mode = "no ranges"
    part_of("toy/a-v0", b"x" * 50_000)
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == ["bytes=50000-"]


def test_a_transfer_that_breaks_off_is_taken_up_again(toy):
    toy.mode = "cut once"
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == [None, "bytes=30000-"]


def test_a_complete_part_needs_no_server(toy):
    part_of("toy/a-v0", BODY)
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == []


def test_a_part_that_is_too_long_is_thrown_away(toy):
    part_of("toy/a-v0", BODY + b"more")
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == [None]


def test_without_a_checksum(toy):
    toy.mode = "no length"
    assert cat.fetch("toy/unknown-v0").read_bytes() == BODY and cat.state("toy/unknown-v0") == "no checksum known"
    assert "unverified: no checksum known" in cat.find("toy/unknown-v0").facts()


def test_a_complete_part_of_unknown_size(toy):
    part_of("toy/unknown-v0", BODY)                                                         # the server answers 416: nothing follows
    assert cat.fetch("toy/unknown-v0").read_bytes() == BODY and toy.ranges == [f"bytes={len(BODY)}-", None]


def test_three_at_once_download_once(toy, monkeypatch):
    monkeypatch.setattr(cat, "POLL_S", 0.005)
    toy.gate.clear()
    paths, waited = [], threading.Event()
    threads = [threading.Thread(target=lambda: paths.append(cat.fetch("toy/a-v0", lambda done, total: waited.set()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert waited.wait(60)                                                                  # one is told how far another is, which is held up
    toy.gate.set()
    for thread in threads:
        thread.join(60)
    assert paths == [cat.local_path("toy/a-v0")] * 3 and toy.ranges == [None] and paths[0].read_bytes() == BODY


# ---- downloads that fail ---------------------------------------------------------------------------------------------------------------------

def refused(name, words):
    """Every refusal says what, from where, and how to do it by hand."""
    with pytest.raises(DataError, match=words) as error:
        cat.fetch(name)
    message, entry = str(error.value), cat.find(name)
    assert entry.address in message and f"as {cat.local_path(name)}" in message and not cat.local_path(name).exists()
    if entry.sha256:
        assert entry.sha256 in message and f"{entry.size:,} bytes" in message
    return message


def test_a_wrong_checksum_leaves_nothing(toy):
    refused("toy/wrong-v0", f"is not the expected file: sha256 {SHA}, expected 000000.*It was deleted")
    assert visible(cat.local_path("toy/wrong-v0")) == []
    assert "a third-party checksum, which may be wrong" in refused("toy/third-v0", "expected 11111")


def test_no_progress_ends_it_and_keeps_the_part(toy):
    toy.mode = "nothing"
    part = part_of("toy/a-v0", BODY[:1000])
    refused("toy/a-v0", r"ended after 1,000 of 102,408 bytes. 1,000 bytes are kept in .*the same command goes on from there")
    assert part.read_bytes() == BODY[:1000]


def test_a_server_that_always_cuts_is_followed_to_the_end(toy):
    toy.mode = "cut"
    assert cat.fetch("toy/a-v0").read_bytes() == BODY and toy.ranges == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_another_size_is_not_downloaded(toy):
    toy.body = BODY + b"longer"
    refused("toy/a-v0", "offers 102,414 bytes, expected 102,408: the file has changed, or a proxy")


def test_a_page_in_place_of_a_file(toy):
    toy.body = b"<html>please log in</html>"
    refused("toy/unknown-v0", "begins with b'<html>pl' and is no HDF5 file")


def test_not_found(toy):
    toy.mode = "404"
    refused("toy/a-v0", "answers 404 Not Found")


def test_another_range_than_asked_for(toy):
    toy.mode = "wrong range"
    part_of("toy/a-v0", BODY[:1000])
    refused("toy/a-v0", "asked for bytes from 1000 and sends 'bytes 1001-")


def test_no_connection(toy, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    found = entries(f"http://127.0.0.1:{port}/a.hdf5")
    monkeypatch.setattr(cat, "catalogue", lambda: found)
    refused("toy/a-v0", "cannot be reached .*Connection refused")
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    assert "secret" not in refused("toy/a-v0", rf"cannot be reached .* through the proxy 127.0.0.1:{port}\)")


def test_no_room_on_the_disk(toy, monkeypatch):
    monkeypatch.setattr(cat.shutil, "disk_usage", lambda path: cat.shutil._ntuple_diskusage(10, 3, 7))
    with pytest.raises(DataError, match="102,408 bytes are still to come and the disk has 7 free"):
        cat.fetch("toy/a-v0")


def test_a_folder_that_cannot_be_made(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written .*set MODIP_DATA_DIR to another folder"):
        cat.fetch("toy/a-v0")


# ---- files placed by hand --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hashed(monkeypatch):
    """Paths that were read to compute a checksum."""
    paths, real = [], cat.sha256_of
    monkeypatch.setattr(cat, "sha256_of", lambda path: paths.append(path) or real(path))
    return paths


def by_hand(name, content=BODY):
    path = cat.local_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_file_placed_by_hand_is_read_once(toy, hashed):
    path = by_hand("toy/a-v0")
    assert cat.state("toy/a-v0") == "not checked"
    assert cat.fetch("toy/a-v0") == path and cat.fetch("toy/a-v0") == path and toy.ranges == []
    assert hashed == [path] and cat.state("toy/a-v0") == "verified"
    os.utime(path, ns=(1, 1))
    assert cat.state("toy/a-v0") == "not checked" and cat.verify("toy/a-v0") == "verified" and len(hashed) == 2
    cat.verify("toy/a-v0", again=True)
    assert len(hashed) == 3


@pytest.mark.parametrize(("content", "words"), [(BODY[:-1], "102,407 bytes, expected 102,408"), (BODY[:-1] + b"?", "sha256 .* expected"),
                                                (b"?" + BODY[1:], "is no HDF5 file")])
def test_a_wrong_file_placed_by_hand_is_named_and_kept(toy, content, words):
    path = by_hand("toy/a-v0", content)
    with pytest.raises(DataError, match=f"is not the official toy/a-v0: .*{words}.*give its path"):
        cat.fetch("toy/a-v0")
    assert path.read_bytes() == content and toy.ranges == []
    assert cat.state("toy/a-v0") == ("wrong size" if len(content) != len(BODY) else "not checked")


def test_verify_without_a_file(toy):
    with pytest.raises(DataError, match=f"no such file; 'modip data download toy/a-v0' fetches it.*{SHA}"):
        cat.verify("toy/a-v0")


def test_a_folder_that_cannot_be_written_is_read_each_time(toy, hashed, monkeypatch):
    path = by_hand("toy/a-v0")
    monkeypatch.setattr(cat.os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError("read-only")))
    assert cat.fetch("toy/a-v0") == cat.fetch("toy/a-v0") == path and len(hashed) == 2
