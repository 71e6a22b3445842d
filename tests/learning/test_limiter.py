import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modip_ray.learning.limiter import STREAMS, RateLimiter
from tests.fakes import small


def limiter(**dotted) -> RateLimiter:
    return RateLimiter(small(pretrain__updates=10, pretrain__policy_updates=20, online__updates_per_step=0.5, online__env_steps=1000,
                             policy__updates_per_update=2, online__min_online=100, replay__samples_per_insert_slack=50.0, **dotted))


def test_only_offline_updates_before_min_online():
    rl = limiter()
    assert [rl.allowed(s) for s in STREAMS] == [10, 20]
    rl.insert(99)
    assert [rl.allowed(s) for s in STREAMS] == [10, 20]
    rl.insert(1)
    assert [rl.allowed(s) for s in STREAMS] == [10 + 50, 20 + 100]


def test_batches_handed_out_are_counted_and_say_which_are_online():
    rl = limiter()
    for update in range(10):
        assert rl.may_sample("model", update) and rl.may_sample("model")
        rl.note("model", update + 1)
    assert not rl.may_sample("model") and not rl.may_sample("model", 10) and rl.may_sample("model", 3) and rl.may_sample("policy")
    rl.note("model", 4)
    assert rl.granted["model"] == 10, "a batch asked for again changes nothing"
    assert not rl.is_online("model", 9) and rl.is_online("model", 10)


def test_collection_waits_for_the_slower_stream():
    rl = limiter()
    rl.set_counts(100, 60, 120)                 # both have made their updates for 100 steps
    assert rl.ahead() == 0 and rl.may_collect()
    rl.insert(51)
    assert not rl.may_collect()
    rl.granted["model"] += 26
    assert rl.ahead() == 51 and not rl.may_collect(), "the policy stream is still behind"
    rl.granted["policy"] += 1
    assert rl.ahead() == 50 and rl.may_collect()


def test_min_online_above_the_budget_does_not_block_learning_for_ever():
    rl = RateLimiter(small(online__env_steps=50, online__min_online=1000))
    rl.insert(50)
    assert rl.may_collect() and rl.allowed("model") > rl.offline["model"]


def test_no_updates_asked_for_never_stops_collection():
    rl = RateLimiter(small(online__updates_per_step=0.0))
    rl.insert(10**6)
    assert rl.may_collect()


@settings(max_examples=200, deadline=None)
@given(rate=st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), per=st.integers(0, 3), slack=st.integers(0, 60), minimum=st.integers(0, 120),
       inserts=st.lists(st.integers(1, 70), max_size=20), data=st.data())
def test_somebody_may_always_go_on(rate, per, slack, minimum, inserts, data):
    """No deadlock: whatever happened before, collection or one of the streams may proceed."""
    rl = RateLimiter(small(online__updates_per_step=rate, policy__updates_per_update=per, replay__samples_per_insert_slack=float(slack),
                           online__min_online=minimum, online__env_steps=200))
    for steps in inserts:
        rl.insert(steps)
        for s in STREAMS:
            for _ in range(data.draw(st.integers(0, 200))):
                if rl.may_sample(s):
                    rl.note(s, rl.granted[s] + 1)
        assert rl.may_collect() or any(rl.may_sample(s) for s in STREAMS)
        assert all(rl.granted[s] <= rl.allowed(s) for s in STREAMS)


@pytest.mark.parametrize("stream", STREAMS)
def test_counts_survive_a_resume(stream):
    rl = limiter()
    rl.set_counts(300, 77, 88)
    assert rl.inserted == 300 and rl.granted[stream] == {"model": 77, "policy": 88}[stream]
