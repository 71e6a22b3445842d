import json
import time
from dataclasses import asdict

import pytest
import torch

from modip_ray.bench import history, replay
from modip_ray.bench import run as bench
from modip_ray.config import load
from modip_ray.model.networks import mlp

SMALL = ["policy.width=32", "policy.batch_size=16", "world_model.width=32", "world_model.latent=16", "world_model.batch_size=16", "critic.width=16",
         "planner.proposals=4", "planner.gaussian=4", "planner.elites=3", "planner.iterations=1",
         "data.transitions=2000", "rollout.num_workers=1", "rollout.envs_per_worker=2", "resources.compile=false"]


def flags():
    return [part for override in SMALL for part in ("--set", override)]


def test_every_group_measures_and_the_json_says_where(tmp_path, monkeypatch, capsys):
    for name, tenth in (("STORED", 100_000), ("IN_JOURNAL", 5_000), ("RING_BYTES", 20e6)):      # stored whole, however few seconds are asked for
        monkeypatch.setattr(replay, name, tenth)
    file = tmp_path / "deep" / "bench.json"
    bench.main([*(name for name in bench.BENCHES if name not in ("e2e", "channel", "scale")), "--json", str(file), "--seconds", "0.01", *flags()])
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert set(report) == {"rows", "machine", "git", "versions", "command"} and "torch" in report["versions"]
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    expected = {"planner.plans_per_s", *(f"planner.plans_per_s.rows_{n}" for n in (1, 8, 16, 64)), "planner.roofline",
                "planner.bf16_compile_vs_eager_fp32", "planner.v_tail_vs_q_tail", *(f"planner.v_tail_vs_q_tail.steps_{n}" for n in (1, 2, 5, 10)),
                "learner.policy_independent_vs_coupled", "learner.compiled_vs_eager",
                "learner.model_update_ms", "learner.policy_update_ms", "replay.sample_vs_memcpy", "weights.publish_ms",
                *(f"envs.steps_per_s.{t}" for t in ("halfcheetah", "hopper", "walker2d"))}
    assert expected <= set(rows)
    for name, row in rows.items():
        assert row["value"] > 0 and row["unit"] and name in printed
        if row["reference"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["reference"]) and row["against"]
    assert rows["planner.roofline"]["ratio"] < 1 and 0 < rows["replay.sample_vs_memcpy"]["ratio"] < 1.5


def test_only_what_was_asked_for(capsys):
    rows = bench.run_bench(["weights"], seconds=0.01, overrides=SMALL)
    assert [r.name for r in rows] == ["weights.publish_ms"] and "planner" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [(["plannr"], "did you mean 'planner'"), (["weights", "--set", "policy.widht=3"], "did you mean 'width'")])
def test_unknown_names_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_flops_by_hand():
    net, x = mlp([10, 20, 5]), torch.randn(7, 10)
    assert bench.flops(lambda: net(x)) == 2 * 7 * (10 * 20 + 20 * 5)
    with torch.inference_mode():
        assert bench.flops(lambda: net(x)) == 2 * 7 * (10 * 20 + 20 * 5)


def test_medians_take_turns_and_threads_are_given_back():
    calls, threads = [], torch.get_num_threads()
    slow, fast = bench.Setting(load(), 0.02).medians(lambda: (calls.append("a"), time.sleep(0.004)), lambda: calls.append("b"))
    assert 0.004 <= slow < 0.1 and fast < slow and calls[:6] == ["a", "b"] * 3
    bench.run_bench(["weights"], seconds=0.01, overrides=SMALL)
    assert torch.get_num_threads() == threads


def test_the_table_is_aligned():
    rows = [bench.Row("a", 1.23456, "ms"), bench.compared("longer", 20000.4, "1/s", 10000.2, "the old way")]
    head, first, second = bench.table(rows).splitlines()
    assert first.split() == ["a", "1.235", "ms"] and second.split() == ["longer", "20000", "1/s", "10000", "2", "the", "old", "way"]
    assert head.index("unit") == first.index("ms") == second.index("1/s")


def test_a_regression_shows_beside_the_newest_earlier_result(tmp_path, monkeypatch, capsys):
    def write(name, ratio, value=1.0, unit="plans/s"):
        rows = [bench.Row("planner.x", value, unit, 1.0, ratio), bench.Row("planner.y", 10.0, "ms")]
        (tmp_path / name).write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    write("2026-01-01.json", 9.0)
    write("kernels-2026-02-01.json", 2.0)
    write("undated.json", 99.0)
    before = history.earlier(tmp_path)
    assert before["planner.x"] == (2.0, "plans/s", "kernels-2026-02-01.json")
    rows = [bench.Row("planner.x", 7.0, "plans/s", 5.0, 1.4), bench.Row("planner.y", 12.0, "ms"), bench.Row("planner.new", 1.0, "ms")]
    head, x, y, new = bench.table(rows, before).splitlines()
    assert x.split()[4:6] == ["1.4", "2"] and y.split() == ["planner.y", "12", "ms", "10"] and new.split() == ["planner.new", "1", "ms"]
    assert history.regressions(rows, before) == ["worse than before: planner.x: 1.4, it was 2 in kernels-2026-02-01.json"]
    slow = [bench.Row("planner.y", 20.0, "ms"), bench.Row("planner.x", 0.1, "ms")]      # the second has another unit by now: another measurement
    assert history.regressions(slow, before) == ["worse than before: planner.y: 20, it was 10 in kernels-2026-02-01.json"]
    monkeypatch.chdir(tmp_path)                                     # no results/bench here: nothing to compare with
    bench.run_bench(["weights"], seconds=0.01, overrides=SMALL)
    assert "worse" not in capsys.readouterr().out
