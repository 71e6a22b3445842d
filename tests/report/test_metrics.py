import json
import logging
import sys

import numpy as np
import pytest

from modip_ray.report import MetricsLog, live_rows, read_metrics
from modip_ray.report.sinks import row_step, scalars


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
    assert [r["updates"] for r in live_rows(rows)] == [1, 2]


def test_scalars_of_each_kind():
    assert scalars({"kind": "train", "phase": "online", "env_steps": 5, "loss/value": 2.0, "note": "x", "ok": True, "gone": None}) == {"loss/value": 2.0}
    evaluation = {"kind": "eval", "mode": "mpc", "env_steps": 7, "mean": 3.0, "ci95": [2.0, 4.0], "returns": [3.0], "episodes": 1}
    assert scalars(evaluation) == {"eval/mpc/mean": 3.0, "eval/mpc/ci95_low": 2.0, "eval/mpc/ci95_high": 4.0}
    assert scalars({"kind": "timing", "seconds": 3}) == {}
    assert row_step({"phase": "pretrain", "updates": 9, "env_steps": 0}) == 9 and row_step({"mode": "mpc", "updates": 9, "env_steps": 4}) == 4


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
    with MetricsLog(tmp_path, resumed_at={"phase": "online", "env_steps": 20, "updates": 600}) as log:
        log.write({"kind": "train", "phase": "online", "env_steps": 30, "updates": 600, "loss/value": 2.0})
    assert points("pretrain", "loss/value") == [(500, 4.0)]
    assert points("online", "loss/value") == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert points("online", "eval/mpc/mean") == [(10, 8.0)]


def test_wandb_modes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'ofline'.*offline"):
        MetricsLog(tmp_path, wandb_mode="ofline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        MetricsLog(tmp_path, tensorboard=False, wandb_mode="offline")


def test_missing_tensorboard_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        MetricsLog(tmp_path)


def test_wandb_offline_writes_one_run_that_a_resume_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (10, 20):
        with MetricsLog(tmp_path, tensorboard=False, wandb_mode="offline", project="test", config={"seed": 0}) as log:
            log.write({"kind": "train", "phase": "online", "env_steps": steps, "updates": 1, "loss/value": 1.0})
    run_id = (tmp_path / "wandb_id").read_text().strip()
    folders = [p.name for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(run_id) for name in folders)


def test_every_line_is_strict_json(make_run):
    def refuse(constant):
        raise AssertionError(constant)

    lines = (make_run() / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 150 and all(json.loads(line, parse_constant=refuse)["kind"] for line in lines)
