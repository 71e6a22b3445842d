import threading
import time

import pytest

from modip_ray.timing import Timer, build_tree, format_tree, merge_snapshots, walk


def test_blocks_are_summed_and_counted_even_when_they_raise():
    timer = Timer()
    for _ in range(3):
        with timer("plan/ddim"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timer("plan"):
        raise KeyError
    snapshot = timer.snapshot()
    assert snapshot["counts"] == {"plan/ddim": 3, "plan": 1}
    assert 0.03 <= snapshot["seconds"]["plan/ddim"] < 5


def test_a_block_costs_about_a_microsecond():
    timer = Timer()
    best = float("inf")
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(2000):
            with timer("x"):
                pass
        best = min(best, (time.thread_time() - begun) / 2000)
    assert best < 20e-6  # generous: the machine may be busy


def test_same_name_may_overlap_and_threads_lose_nothing():
    timer = Timer()
    with timer("a"), timer("a"):
        pass

    def work():
        for _ in range(2000):
            timer.add("b", 0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.snapshot()["counts"] == {"a": 2, "b": 8000} and timer.snapshot()["seconds"]["b"] == 4000.0


@pytest.mark.parametrize("name", ["", "/plan", "plan//ddim", "plan/"])
def test_names_must_be_paths(name):
    with pytest.raises(ValueError, match="expected words joined by single slashes"), Timer()(name):
        pass


def test_merge_sums_by_name():
    merged = merge_snapshots([{"seconds": {"a": 1.0}, "counts": {"a": 2}}, {"seconds": {"a": 0.5, "b": 1.0}, "counts": {"a": 1, "b": 1}}])
    assert merged == {"seconds": {"a": 1.5, "b": 1.0}, "counts": {"a": 3, "b": 1}}


def test_tree_sums_untimed_parents_and_keeps_timed_ones():
    roots = build_tree({"seconds": {"wait/replay": 2.0, "wait/weights": 1.0, "plan": 5.0, "plan/ddim": 1.0}, "counts": {"plan": 2}})
    found = [(depth, node.path, node.seconds, node.is_wait) for depth, node in walk(roots)]
    assert found == [
        (0, "plan", 5.0, False),
        (1, "plan/ddim", 1.0, False),
        (0, "wait", 3.0, True),
        (1, "wait/replay", 2.0, True),
        (1, "wait/weights", 1.0, True),
    ]


def test_a_name_that_only_begins_like_wait_is_no_wait():
    (node,) = build_tree({"seconds": {"waiting_room": 1.0}, "counts": {}})
    assert not node.is_wait


def test_format_tree_shows_shares_and_the_rest():
    text = format_tree({"seconds": {"plan": 5.0, "plan/ddim": 1.0, "wait/replay": 2.0}, "counts": {"plan": 10, "plan/ddim": 10, "wait/replay": 4}}, total=10.0)
    lines = [line.split() for line in text.splitlines()]
    assert ["plan", "50.0%", "5.00", "10", "500.000"] in lines
    assert ["ddim", "10.0%", "1.00", "10", "100.000"] in lines
    assert ["not", "timed", "30.0%", "3.00"] in lines
    assert "  ddim" in text and text.index("plan") < text.index("wait")
