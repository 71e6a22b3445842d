import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modip_ray.learning.replay import MixedReplay, ReplayBuffer, Segment, discounted_suffix, lambda_steps
from modip_ray.tasks.episode import Episode

FAST = settings(max_examples=60, deadline=None)


def by_hand(terminated: bool) -> ReplayBuffer:
    """Observations 0, 1, 2, 3; rewards 1, 2, 4; gamma 0.5; another episode in front and behind."""
    def episode(first, rewards):
        n = len(rewards)
        obs = np.arange(first, first + n + 1, dtype=np.float32)[:, None]
        return Segment.from_episode(Episode(obs, 10 * obs[:-1], np.array(rewards, np.float32), terminated))
    buffer = ReplayBuffer(20, 1, 1, 0.5)
    for segment in (episode(50, [7, 7]), episode(0, [1, 2, 4]), episode(80, [9, 9])):
        buffer.add(segment)
    return buffer


FROM_0_1_2 = np.array([2, 3, 4])


@pytest.mark.parametrize("n, terminated, returns, discounts, bootstrap", [
    (1, True, [1, 2, 4], [0.5, 0.5, 0], [1, 2, 3]),
    (1, False, [1, 2, 4], [0.5, 0.5, 0.5], [1, 2, 3]),
    (2, True, [2, 4, 4], [0.25, 0, 0], [2, 3, 3]),
    (2, False, [2, 4, 4], [0.25, 0.25, 0.5], [2, 3, 3]),
    (1000, True, [3, 4, 4], [0, 0, 0], [3, 3, 3]),
    (1000, False, [3, 4, 4], [0.125, 0.25, 0.5], [3, 3, 3]),
])
def test_n_step_targets_by_hand(n, terminated, returns, discounts, bootstrap):
    """A termination zeroes the discount; a time limit bootstraps from the true last observation, with gamma to the steps really taken."""
    for horizon in (0, 2):
        out = by_hand(terminated).sequences(FROM_0_1_2, horizon, n)
        assert out["n_step_return"][:, 0].tolist() == returns
        assert out["discount"][:, 0].tolist() == discounts
        assert out["bootstrap_obs"][:, 0, 0].tolist() == bootstrap
    from_0 = {k: v[0] for k, v in out.items()}                      # and along the sequence that starts at step 0
    assert from_0["n_step_return"].tolist() == returns and from_0["discount"].tolist() == discounts and from_0["bootstrap_obs"][:, 0].tolist() == bootstrap


@pytest.mark.parametrize("terminated", [True, False])
def test_a_sequence_at_the_end_by_hand(terminated):
    out = {k: v[0] for k, v in by_hand(terminated).sequences(np.array([3]), 4, 1).items()}
    assert out["mask"].tolist() == [1, 1, 0, 0]
    assert out["value_mask"].tolist() == [1, 1, 0, 0, 0]
    assert out["obs"][:3, 0].tolist() == [1, 2, 3]                  # 3: the true last observation, not the next episode's
    assert out["action"][:2, 0].tolist() == [10, 20] and out["reward"][:2].tolist() == [2, 4]
    assert out["terminated"].tolist() == [False, terminated, False, False]
    assert out["obs"].shape == (5, 1) and out["action"].shape == (4, 1) and out["bootstrap_obs"].shape == (5, 1)
    assert {out[k].dtype for k in ("obs", "action", "reward", "mask", "value_mask", "n_step_return", "discount", "bootstrap_obs")} == {np.dtype(np.float32)}


def test_discounted_suffix_by_hand():
    assert discounted_suffix(np.array([1, 2, 4], np.float32), 0.5).tolist() == [3, 4, 4, 0]
    assert discounted_suffix(np.array([], np.float32), 0.5).tolist() == [0]


# ---- properties: each number says which segment and step it came from

SEGMENTS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12)
PLAN_H = 2


def reward(segment: int, t: int) -> float:
    return np.float32(np.sin(3.7 * segment + 1.3 * t) * 10)


def make(number: int, length: int, terminated: bool) -> Segment:
    t = np.arange(length + 1, dtype=np.float32)
    obs = np.stack([np.full(length + 1, number, np.float32), t], 1)
    plans, gains = np.broadcast_to(obs[:-1, None, :], (length, PLAN_H, 2)) + 0.5, np.full(length, number, np.float32)
    return Segment(obs, obs[:-1].copy(), np.array([reward(number, i) for i in range(length)], np.float32), terminated, plans, gains, f"w/{number}")


def fill(capacity, segments, gamma=0.9, first=0) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, 2, 2, gamma, PLAN_H)
    for i, (length, terminated) in enumerate(segments, first):
        buffer.add(make(i, length, terminated))
    return buffer


def naive_n_step(number, t, length, terminated, n, gamma):
    steps = range(t, min(t + n, length))
    ret = sum(gamma ** (i - t) * float(reward(number, i)) for i in steps)
    end = steps[-1] + 1
    return ret, 0.0 if end == length and terminated else gamma ** (end - t), end


def check_everything(buffer: ReplayBuffer, segments: list, horizon: int, n: int) -> None:
    gamma, starts = buffer.gamma, np.arange(buffer.size)
    out, chunks = buffer.sequences(starts, horizon, n), buffer.chunks(starts, horizon, n, True)
    found = set()
    for row in range(buffer.size):
        number, t = (int(x) for x in out["obs"][row, 0])
        length, terminated = segments[number]
        found.add((number, t))
        left = length - t
        assert out["mask"][row].tolist() == [1.0] * min(left, horizon) + [0.0] * max(horizon - left, 0)             # prefix-shaped
        assert out["value_mask"][row].tolist() == [1.0] * min(left, horizon + 1) + [0.0] * max(horizon + 1 - left, 0)
        for k in range(min(left, horizon)):
            assert out["action"][row, k].tolist() == [number, t + k] and out["reward"][row, k] == reward(number, t + k)
            assert out["obs"][row, k + 1].tolist() == [number, t + k + 1]                                           # to the true last observation
            assert out["terminated"][row, k] == (terminated and t + k + 1 == length)
        assert not out["terminated"][row, min(left, horizon):].any()
        assert (out["obs"][row, :, 0] == number).all() and (out["action"][row, :, 0] == number).all()               # padding, too, is of the same segment
        for k in range(min(left, horizon + 1)):
            ret, discount, end = naive_n_step(number, t + k, length, terminated, n, gamma)
            np.testing.assert_allclose((out["n_step_return"][row, k], out["discount"][row, k]), (ret, discount), rtol=1e-4, atol=1e-4)
            assert out["bootstrap_obs"][row, k].tolist() == [number, end]
        assert chunks["obs"][row].tolist() == [number, t] and chunks["gain"][row] == number
        planned = min(horizon, PLAN_H)
        assert (chunks["chunk"][row, :planned] == np.float32([number + 0.5, t + 0.5])).all()
        assert chunks["mask"][row].tolist() == [1.0] * planned + [0.0] * (horizon - planned)
    everything = [(i, t) for i, (length, _) in enumerate(segments) for t in range(length)]
    assert found == set(everything[-buffer.capacity:])              # the newest transitions, each of them reachable


@FAST
@given(SEGMENTS, st.integers(9, 25), st.integers(1, 5), st.sampled_from([1, 2, 3, 1000]), st.sampled_from([0.5, 0.99, 1.0]))
def test_sequences_stay_in_their_segment(segments, capacity, horizon, n, gamma):
    buffer = fill(capacity, segments, gamma)
    assert buffer.total == sum(length for length, _ in segments) and buffer.size == min(buffer.total, capacity)
    check_everything(buffer, segments, horizon, n)


@FAST
@given(SEGMENTS, st.integers(9, 25))
def test_every_stored_transition_is_drawn(segments, capacity):
    buffer = fill(capacity, segments)
    drawn = buffer.draw(np.random.default_rng(0), 40 * capacity)
    counts = np.bincount(drawn, minlength=buffer.size)
    assert len(counts) == buffer.size and counts.min() > 0


@FAST
@given(SEGMENTS, SEGMENTS, st.integers(9, 25), st.integers(0, 30), st.integers(1, 12))
def test_rows_out_and_in_again_then_more(before, after, capacity, extra, chunk):
    """In pieces of any size, into the same or a larger ring: the same contents, and further segments do no harm."""
    one, two = fill(capacity, before), ReplayBuffer(capacity + extra, 2, 2, 0.9, PLAN_H)
    two.total = one.total - one.size
    for first in range(one.total - one.size, one.total, chunk):
        two.extend(one.rows(first, min(first + chunk, one.total)))
    assert (two.size, two.total) == (one.size, one.total) and two.open_end is None
    if not extra:
        assert two.head == one.head
        for key, value in one.sequences(np.arange(one.size), 3, 2).items():
            np.testing.assert_array_equal(two.sequences(np.arange(one.size), 3, 2)[key], value)
    stored = two.size
    for i, (length, terminated) in enumerate(after, len(before)):
        one.add(make(i, length, terminated))
        two.add(make(i, length, terminated))
    check_everything(one, before + after, 3, 2)
    assert len(two.end_obs) - len(two.free_ends) == (two.arrays["remaining"] == 1).sum()
    drawn = np.unique(two.draw(np.random.default_rng(0), 50 * two.capacity))
    assert set(drawn) == set(two.newest(two.size))
    found = [tuple(o) for o in two.sequences(two.newest(two.size), 1, 1)["obs"][:, 0].astype(int).tolist()]
    everything = [(i, t) for i, (length, _) in enumerate(before + after) for t in range(length)]
    added = sum(length for length, _ in after)                      # what was gone before stays gone; the larger ring keeps all the rest
    assert found == everything[len(everything) - min(two.capacity, stored + added):]
    out = two.sequences(two.newest(two.size), 3, 2)
    assert (out["obs"][:, :, 0] == out["obs"][:, :1, 0]).all() and (np.diff(out["mask"], axis=1) <= 0).all() and (out["mask"][:, 0] == 1).all()


@FAST
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_duplicate_ids_are_stored_once(numbers):
    mixed = MixedReplay(fill(10, [(3, False)]), ReplayBuffer(1000, 2, 2, 0.9, PLAN_H), 0, planned=True)
    seen = set()
    for number in numbers:
        assert mixed.add(make(number, number + 1, False)) is (number not in seen)
        seen.add(number)
    assert mixed.online.total == sum(number + 1 for number in seen)


# ---- the compiled gather against plain numpy

def plain_sequences(buffer: ReplayBuffer, start: np.ndarray, horizon: int, n_step: int | np.ndarray) -> dict[str, np.ndarray]:
    """`ReplayBuffer.sequences`, array by array."""
    k, n_step = np.arange(horizon + 1), np.broadcast_to(n_step, len(start))[:, None]
    remaining, end = buffer.arrays["remaining"][start, None], buffer.arrays["end"][start]             # (B, 1), (B,)
    step = np.minimum(k, remaining - 1)                                         # (B, H+1) offsets that stay inside the segment
    n = np.minimum(n_step, remaining - step)                                    # (B, H+1) steps really summed
    inside = remaining - step > n                                               # the segment goes on behind the n steps
    after = step + n - ~inside                                                  # where the n steps lead, or the segment's last record
    positions = start[:, None] + np.concatenate([step, after], 1)
    positions[positions >= buffer.capacity] -= buffer.capacity
    got = buffer.steps.take(positions.ravel(), 0, mode="clip").reshape(len(start), 2, horizon + 1, buffer.steps.shape[1])   # the one gather
    here, there = buffer.fields(got[:, 0]), buffer.fields(got[:, 1])                # (B, H+1, .)
    gamma_n = (buffer.gamma ** n).astype(np.float32)
    obs, bootstrap = np.ascontiguousarray(here["obs"]), np.ascontiguousarray(there["obs"])
    for observed, where in ((obs, k == remaining), (bootstrap, ~inside)):       # the true observation behind the segment's last action
        rows, columns = np.nonzero(where)
        observed[rows, columns] = buffer.end_obs[end[rows]]
    terminated, exists = buffer.end_terminated[end][:, None], k < remaining
    return {"obs": obs, "action": np.ascontiguousarray(here["action"][:, :horizon]), "reward": np.ascontiguousarray(here["reward"][:, :horizon]),
            "terminated": (terminated & (k + 1 == remaining))[:, :horizon], "mask": exists[:, :horizon].astype(np.float32),
            "value_mask": exists.astype(np.float32), "n_step_return": here["suffix"] - gamma_n * (there["suffix"] * inside),
            "discount": gamma_n * (inside | ~terminated), "bootstrap_obs": bootstrap}


@FAST
@given(SEGMENTS, st.integers(9, 40), st.integers(0, 5), st.sampled_from([1, 2, 3, 7, 1000]), st.sampled_from([0.5, 0.99, 1.0]), st.integers(0, 99))
def test_the_compiled_gather_equals_plain_numpy_bit_for_bit(segments, capacity, horizon, n_step, gamma, seed):
    buffer = fill(capacity, segments, gamma)
    buffer.arrays["obs"][:] += np.random.default_rng(seed).standard_normal(buffer.arrays["obs"].shape, dtype=np.float32)
    start = np.concatenate([np.arange(buffer.size), buffer.draw(np.random.default_rng(seed), 30)])
    for n in (n_step, np.random.default_rng(seed).integers(1, n_step + 1, len(start))):
        ours, plain = buffer.sequences(start, horizon, n), plain_sequences(buffer, start, horizon, n)
        assert ours.keys() == plain.keys()
        for key, value in plain.items():
            assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
            np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_targets_of_drawn_lengths_are_lambda_returns():
    """Their mean against the recursion G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}), which ends in V after n steps; V(s) is s here."""
    rng, gamma, lam, most, draws = np.random.default_rng(0), 0.9, 0.7, 4, 40_000
    buffer = ReplayBuffer(50, 1, 1, gamma)
    obs, rewards = rng.standard_normal((11, 1)).astype(np.float32), rng.standard_normal(10).astype(np.float32)
    buffer.add(Segment(obs, np.zeros((10, 1), np.float32), rewards, False))
    expected = obs[most, 0]
    for t in reversed(range(most)):
        ahead = obs[t + 1, 0]
        expected = rewards[t] + gamma * (ahead if t == most - 1 else (1 - lam) * ahead + lam * expected)
    n = lambda_steps(rng, draws, most, lam)
    assert set(n) == {1, 2, 3, 4} and (lambda_steps(rng, 9, most, 1.0) == most).all() and (lambda_steps(rng, 9, most, 0.0) == 1).all()
    out = buffer.sequences(np.zeros(draws, np.int64), 0, n)
    targets = out["n_step_return"][:, 0] + out["discount"][:, 0] * out["bootstrap_obs"][:, 0, 0]
    assert abs(targets.mean() - expected) < 4 * targets.std() / draws**0.5
    assert abs(targets[n == most].mean() - expected) > 10 * targets.std() / draws**0.5         # as it would be without lambda


# ---- by example

def test_segments_without_an_id_are_never_duplicates():
    mixed = MixedReplay(fill(10, [(3, False)]), ReplayBuffer(100, 2, 2, 0.9), 0, planned=False)
    segment = Segment(np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32), np.zeros(2, np.float32), False)
    assert mixed.add(segment) and mixed.add(segment) and mixed.online.size == 4


def test_a_refused_segment_is_not_remembered():
    mixed = MixedReplay(fill(10, [(3, False)]), ReplayBuffer(100, 2, 2, 0.9), 0, planned=False)
    bad = Segment(np.full((3, 2), np.nan, np.float32), np.zeros((2, 2), np.float32), np.zeros(2, np.float32), False, id="a")
    with pytest.raises(ValueError, match="'a': observations holds a non-finite number"):
        mixed.add(bad)
    assert mixed.add(Segment(np.zeros((3, 2), np.float32), bad.actions, bad.rewards, False, id="a"))


@pytest.mark.parametrize("change, message", [
    ({"observations": np.zeros((3, 2), np.float32)}, r"observations has shape \(3, 2\), expected \(4, 2\)"),
    ({"actions": np.zeros((3, 1), np.float32)}, r"actions has shape \(3, 1\), expected \(3, 2\)"),
    ({"rewards": np.array([0, np.inf, 0], np.float32)}, r"rewards holds a non-finite number at index \[1\]"),
    ({"plans": np.zeros((3, PLAN_H + 1, 2), np.float32)}, r"plans has shape \(3, 3, 2\), expected \(3, 2, 2\)"),
])
def test_bad_segments_are_refused_and_change_nothing(change, message):
    buffer = fill(9, [(2, True)])
    good = make(1, 3, False)
    bad = Segment(**{**{k: getattr(good, k) for k in good.__dataclass_fields__}, **change})
    with pytest.raises(ValueError, match="'w/1': " + message):
        buffer.add(bad)
    assert (buffer.size, buffer.total) == (2, 2)
    check_everything(buffer, [(2, True)], 3, 2)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"10 transitions, expected 1..9 \(replay.capacity\)"):
        fill(9, [(10, True)])
    with pytest.raises(ValueError, match="0 transitions"):
        fill(9, [(0, True)])
    with pytest.raises(ValueError, match="replay is empty"):
        ReplayBuffer(9, 2, 2, 0.9).draw(np.random.default_rng(0), 1)


@pytest.mark.parametrize("spoil, message", [
    (lambda s: s.pop("gain"), "gain missing"),
    (lambda s: s.update(steps=s["steps"][:, :1]), r"steps \(7, 1\), expected \(7, 8\)"),
    (lambda s: s.update(plan=s["plan"][:-1]), r"plan \(6, 2, 2\), expected \(7, 2, 2\)"),
    (lambda s: s.update({k: np.concatenate([v, v]) for k, v in s.items()}), "14 stored transitions do not fit the replay of 12"),
])
def test_rows_that_do_not_fit_are_refused(spoil, message):
    rows, other = fill(12, [(4, True), (3, False)]).rows(0, 7), fill(12, [(2, True)])
    spoil(rows)
    with pytest.raises(ValueError, match=message):
        other.extend(rows)
    check_everything(other, [(2, True)], 3, 2)


def test_chunks_by_hand():
    """Executed actions offline or where no plan is stored; the plan, of its own length, where one is."""
    buffer = ReplayBuffer(20, 1, 1, 0.5, plan_horizon=2)
    obs, actions = np.arange(4, dtype=np.float32)[:, None], 10 * np.arange(3, dtype=np.float32)[:, None]
    plans = np.array([[1, 2], [3, 4], [5, 6]], np.float32)[:, :, None]
    buffer.add(Segment(obs, actions, np.ones(3, np.float32), True, plans, np.array([0.5, np.nan, -1.0], np.float32)))
    start = np.arange(3)
    executed, planned = buffer.chunks(start, 3, 1, planned=False), buffer.chunks(start, 3, 1, planned=True)
    assert executed["chunk"][0, :, 0].tolist() == [0, 10, 20] and executed["chunk"][1, :2, 0].tolist() == [10, 20]
    assert executed["mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert planned["chunk"][0, :2, 0].tolist() == [1, 2] and planned["chunk"][1, :2, 0].tolist() == [10, 20] and planned["chunk"][2, :2, 0].tolist() == [5, 6]
    assert planned["mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 0]]                # the plan made at the last step reaches beyond it
    assert planned["discount"].tolist() == [0.5, 0.5, 0] and planned["bootstrap_obs"][:, 0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(planned["gain"], np.float32([0.5, np.nan, -1]))
    np.testing.assert_array_equal(buffer.arrays["action"][:3, 0], [0, 10, 20])          # a batch is a copy: what is stored stays


def test_batches_mix_offline_and_online_rows():
    mixed = MixedReplay(fill(50, [(9, False)] * 5), ReplayBuffer(50, 2, 2, 0.9, PLAN_H), 0, planned=True)
    assert (mixed.chunks(20, 2, 1, 0.5)["online"] == 0).all()       # nothing online yet: all offline
    mixed.add(make(100, 9, False))
    batch = mixed.chunks(20, 2, 1, 0.25)
    assert batch["online"].sum() == 5 and (batch["obs"][batch["online"], 0] == 100).all() and (batch["obs"][~batch["online"], 0] < 5).all()
    fraction = batch["chunk"][:, :, 0] % 1
    assert (fraction[~batch["online"]] == 0).all() and (fraction[batch["online"]] == 0.5).all()             # offline rows imitate what was done
    sequences = mixed.sequences(20, 2, 1, 0.75)
    assert (sequences["obs"][:, 0, 0] == 100).sum() == 15 and sequences["obs"].shape == (20, 3, 2)
    assert set(mixed.sequences(8, 2, 1, 1.0)["obs"][:, 0, 0]) == {100}


def test_the_same_seed_draws_the_same():
    def sample(seed):
        return MixedReplay(fill(50, [(9, False)] * 5), fill(50, [(9, True)] * 5), seed, planned=False).sequences(32, 3, 2, 0.5)["obs"]
    one, two, other = (sample(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_memory_is_little_more_than_the_data_themselves():
    """Raw: observation, action, reward, gain, plan, each once. Overwritten segments leave nothing behind."""
    buffer = ReplayBuffer(1000, 17, 6, 0.95, 3)
    segment = Segment(np.zeros((51, 17), np.float32), np.zeros((50, 6), np.float32), np.zeros(50, np.float32), False)
    for _ in range(70):
        buffer.add(segment)
    raw = 1000 * 4 * (17 + 6 + 1 + 1 + 3 * 6)
    assert len(buffer.end_obs) - len(buffer.free_ends) == 20
    assert buffer.steps.nbytes + sum(buffer.arrays[k].nbytes for k in ("gain", "plan")) + buffer.end_obs.nbytes < 1.2 * raw
