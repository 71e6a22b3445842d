import http.server
import json
import logging
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from modip_ray.report import MetricsLog, live_rows, read_metrics
from modip_ray.report.metrics import by_process
from modip_ray.report.sinks import SinkError, row_step, scalars

ROW = {"kind": "train", "phase": "online", "env_steps": 10, "updates": 1, "loss/value": 1.0}


def test_rows_are_on_disk_at_once_and_come_back_plain(tmp_path):
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    log.write(
        {
            "kind": "train",
            "a": np.float32(1.5),
            "n": np.int64(3),
            "flag": np.bool_(True),
            "list": np.array([[1.0, np.nan]]),
            "bad": float("inf"),
            "where": tmp_path,
        }
    )
    (row,) = read_metrics(tmp_path / "run")  # not closed yet
    assert row["a"] == 1.5 and row["n"] == 3 and row["flag"] is True and row["list"] == [[1.0, None]] and row["bad"] is None and row["where"] == str(tmp_path)
    assert row["wall_s"] >= 0
    log.close()
    log.close()


def test_a_row_without_kind_or_json_form_is_refused_and_leaves_no_trace(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(ValueError, match="no 'kind'"):
            log.write({"loss/value": 1.0})
        with pytest.raises(TypeError, match="'loss/value'.*object"):
            log.write({"kind": "train", "loss/value": object()})
    assert read_metrics(tmp_path) == []


def test_a_torn_last_line_is_skipped_by_the_reader_and_cut_on_open(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "updates": 1}\n{"kind": "train", "upda')
    assert [r["updates"] for r in read_metrics(tmp_path)] == [1]
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"kind": "train", "updates": 2})
    assert "torn last line of 23 bytes" in caplog.text
    assert [r["updates"] for r in read_metrics(tmp_path)] == [1, 2]


def test_a_whole_last_row_that_lacks_only_its_newline_is_kept(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "updates": 1}')
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"kind": "train", "updates": 2})
    assert [r["updates"] for r in read_metrics(tmp_path)] == [1, 2] and not caplog.text


@pytest.mark.parametrize("broken", [b"{half\n", b"[1, 2]\n"])
def test_a_broken_line_that_no_kill_explains_is_an_error(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train"}\n' + broken + b'{"kind": "train"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_no_run_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*run folder"):
        read_metrics(tmp_path / "nowhere")


def test_wall_time_goes_on_after_a_resume(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"kind": "train", "wall_s": 100.0})
    with MetricsLog(tmp_path, tensorboard=False) as log:
        assert 100.0 <= log.wall_s < 110.0


def test_a_resume_voids_what_lay_beyond_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for steps in (0, 100, 200, 300):
            log.write({"kind": "train", "phase": "online", "env_steps": steps, "updates": 50 + steps, "lost": True})
        log.write({"kind": "timing", "role": "learner", "seconds": {}, "counts": {}})
    with MetricsLog(tmp_path, tensorboard=False, resumed_at={"phase": "online", "env_steps": 150, "updates": 200}) as log:
        log.write({"kind": "train", "phase": "online", "env_steps": 200, "updates": 250, "lost": False})
    rows = live_rows(read_metrics(tmp_path))
    assert [(r["env_steps"], r["lost"]) for r in rows if r["kind"] == "train"] == [(0, True), (100, True), (200, False)]
    assert [r["kind"] for r in rows].count("timing") == 1


def test_in_pretraining_the_updates_decide_what_a_resume_voids():
    rows = [{"kind": "train", "env_steps": 0, "updates": u} for u in (1, 2, 3)]
    rows.append({"kind": "resume", "env_steps": 0, "updates": 2})
    assert [r["updates"] for r in live_rows(rows) if r["kind"] == "train"] == [1, 2]
    rows = [{"kind": "train", "env_steps": 0, "updates": 3, "policy_updates": u} for u in (10, 20, 30)]       # the world model's are over
    rows.append({"kind": "resume", "env_steps": 0, "updates": 3, "policy_updates": 20})
    assert [r["policy_updates"] for r in live_rows(rows) if r["kind"] == "train"] == [10, 20]


def test_processes_are_told_apart_also_where_one_went_back_behind_another():
    rows = [{"kind": "train", "updates": 5}, {"kind": "resume", "updates": 5}, {"kind": "train", "updates": 8}, {"kind": "resume", "updates": 3},
            {"kind": "timing"}]
    assert [[r["kind"] for r in p] for p in by_process(live_rows(rows))] == [[], ["resume"], ["resume", "timing"]]


def test_scalars_of_each_kind():
    assert scalars({"kind": "train", "phase": "online", "env_steps": 5, "loss/value": 2.0, "note": "x", "ok": True, "gone": None}) == {"loss/value": 2.0}
    evaluation = {"kind": "eval", "mode": "mpc", "env_steps": 7, "mean": 3.0, "ci95": [2.0, 4.0], "returns": [3.0], "episodes": 1}
    assert scalars(evaluation) == {"eval/mpc/mean": 3.0, "eval/mpc/ci95_low": 2.0, "eval/mpc/ci95_high": 4.0}
    system = {"kind": "system", "phase": "online", "env_steps": 7, "policy_updates": 2, "rollout/workers": 2.0}
    assert scalars(system) == {"system/rollout/workers": 2.0}
    assert scalars({"kind": "timing", "seconds": 3}) == {}
    assert row_step({"phase": "pretrain", "updates": 9, "policy_updates": 4, "env_steps": 0}) == 13
    assert row_step({"mode": "mpc", "updates": 9, "env_steps": 4}) == 4


def test_tensorboard_has_one_axis_a_phase_and_hides_lost_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def points(phase, tag):
        reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / phase))
        reader.Reload()
        return [(e.step, e.value) for e in reader.Scalars(tag)]

    with MetricsLog(tmp_path) as log:
        log.write({"kind": "train", "phase": "pretrain", "env_steps": 0, "updates": 500, "loss/value": 4.0})
        for steps in (10, 20, 30):
            log.write({"kind": "train", "phase": "online", "env_steps": steps, "updates": 600, "loss/value": 1.0})
        log.write({"kind": "eval", "mode": "mpc", "env_steps": 10, "updates": 600, "mean": 8.0, "ci95": [7.0, 9.0]})
        log.write({"kind": "system", "phase": "online", "env_steps": 10, "updates": 600, "rollout/workers": 3.0})
    with MetricsLog(tmp_path, resumed_at={"phase": "online", "env_steps": 20, "updates": 600}) as log:
        log.write({"kind": "train", "phase": "online", "env_steps": 30, "updates": 600, "loss/value": 2.0})
    assert points("pretrain", "loss/value") == [(500, 4.0)]
    assert points("online", "loss/value") == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert points("online", "eval/mpc/mean") == [(10, 8.0)] and points("online", "system/rollout/workers") == [(10, 3.0)]


def test_a_sink_whose_package_is_missing_is_left_out_with_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'ofline'.*offline"):
        MetricsLog(tmp_path, wandb_mode="ofline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    said = []
    with MetricsLog(tmp_path, wandb_mode="offline", say=said.append) as log:
        log.write(ROW)
    assert len(read_metrics(tmp_path)) == 1
    assert [("pip install tensorboard" in line, "pip install 'modip_ray[wandb]'" in line, "\n" in line) for line in said] == [(1, 0, 0), (0, 1, 0)]


class Failing:
    """A sink that breaks at its second row."""

    rows = 0

    def write(self, row):
        self.rows += 1
        if self.rows == 2:
            raise SinkError("the sink is full")

    def flush(self):
        raise AssertionError("it is out")

    close = flush


def test_a_sink_that_breaks_is_named_once_and_the_rows_go_on(tmp_path):
    said, sink = [], Failing()
    with MetricsLog(tmp_path, tensorboard=False, say=said.append) as log:
        log.add(lambda: sink)
        for _ in range(4):
            log.write(ROW)
        log.flush()
    assert said == ["the sink is full"] and sink.rows == 2 and len(read_metrics(tmp_path)) == 4


def test_rows_are_counted_by_kind_over_the_whole_file(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, tensorboard=False) as log:
            log.write({"kind": "incident", "text": "a worker died"})
    assert log.written == {"incident": 2}


# ---- Weights & Biases, without its server ----------------------------------------------------------------------------------------------------

SECRETS = {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "RAY_AUTH_TOKEN": "t0ken5ec2et"}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb in a process that has secrets, with a home of its own and nothing to read but the environment."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    yield wandb
    wandb.teardown()


def offline_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


def history(folder: Path) -> list[dict]:
    """Rows that an offline run holds, less wandb's own keys: records in LevelDB's log format (7 bytes of header, blocks of 32 KiB)."""
    import wandb
    from wandb.proto import wandb_internal_pb2
    wandb.teardown()                                                                # what `finish` left to it is on disk after that
    (path,) = folder.glob("*.wandb")
    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:                                                                # no room for a record's header
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)                      # part: 1 whole, 2 first, 3 middle, 4 last
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return rows


def test_wandb_offline_gets_scores_and_system_rows_and_a_resume_continues_its_run(tmp_path, wandb):
    run = tmp_path / "run"
    for steps in (10, 20):
        with MetricsLog(run, tensorboard=False, wandb_mode="offline", project="test", config={"seed": 0}) as log:
            log.write({"kind": "train", "phase": "online", "env_steps": steps, "updates": 1, "loss/value": 1.0})
            log.write({"kind": "eval", "mode": "mpc", "env_steps": steps, "updates": 1, "mean": 3.0, "ci95": [2.0, 4.0], "normalized": None})
            log.write({"kind": "system", "phase": "online", "env_steps": steps, "rollout/workers": 2.0, "note": "x"})
    folders = offline_runs(run)
    run_id = (run / "wandb_id").read_text().strip()
    assert len(folders) == 2 and all(f"-{run_id}" in folder.name for folder in folders)
    assert history(folders[-1]) == [{"online/env_steps": 20, "online/loss/value": 1.0},
                                    {"online/env_steps": 20, "online/eval/mpc/mean": 3.0, "online/eval/mpc/ci95_low": 2.0, "online/eval/mpc/ci95_high": 4.0},
                                    {"online/env_steps": 20, "online/system/rollout/workers": 2.0}]
    for file in (p for p in run.rglob("*") if p.is_file()):
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values()), f"a secret in {file}"


def test_wandb_online_without_a_server_or_a_key_goes_on_offline_with_one_line(tmp_path, wandb, monkeypatch):
    class NoSuchPage(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), NoSuchPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    server_gone = socket.create_server(("127.0.0.1", 0))
    gone = f"http://127.0.0.1:{server_gone.getsockname()[1]}"
    server_gone.close()
    for name, url, key, word in (("gone", gone, True, "does not answer"), ("keyless", there, False, "API key")):
        wandb.teardown()                                                            # it reads its settings once
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if not key:
            monkeypatch.delenv("WANDB_API_KEY")
        said = []
        with MetricsLog(tmp_path / name, tensorboard=False, wandb_mode="online", project="test", say=said.append) as log:
            log.write(ROW)
        (line,) = said
        assert word in line and "wandb sync" in line and "\n" not in line
        assert len(offline_runs(tmp_path / name)) == 1 and len(history(offline_runs(tmp_path / name)[0])) == 1
    server.shutdown()
    server.server_close()


def test_a_dead_wandb_does_not_stop_the_rows(tmp_path, wandb, monkeypatch):
    said = []
    with MetricsLog(tmp_path / "run", tensorboard=False, wandb_mode="offline", project="test", say=said.append) as log:
        (sink,) = log._sinks

        def lost(*args):
            raise ConnectionResetError("Connection lost")                           # what wandb raises where its service process was killed
        monkeypatch.setattr(sink._run, "log", lost)
        log.write(ROW)
        log.write(ROW)
        sink._run.finish()
    assert said == ["Weights & Biases stopped: Connection lost; metrics.jsonl goes on"] and len(read_metrics(tmp_path / "run")) == 2


def test_every_line_is_strict_json(make_run):
    def refuse(constant):
        raise AssertionError(constant)

    lines = (make_run() / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 150 and all(json.loads(line, parse_constant=refuse)["kind"] for line in lines)
