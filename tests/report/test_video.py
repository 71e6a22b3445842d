import functools

import numpy as np
import pytest

from modip_ray.report.video import MAX_FRAMES, side_by_side


class Painter:
    """An environment that paints its step number; ends after `length` steps."""

    made: list = []

    def __init__(self, length=10**9, error=None):
        self.length, self.error, self.closed, self.actions = length, error, False, []
        Painter.made.append(self)

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return np.zeros(3), {}

    def step(self, action):
        self.actions.append(action.tolist())
        self.steps += 1
        return np.full(3, self.steps), 2.0, self.steps >= self.length, False, {}

    def render(self):
        if self.error:
            raise self.error
        return np.full((48, 64, 3), self.steps % 256, dtype=np.uint8)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def forget():
    Painter.made = []


def chunks_of_two(seen):
    def act(obs, slots, reset):
        assert obs.shape == (1, 3) and obs.dtype == np.float32 and slots.tolist() == [0] and reset.shape == (1,)
        seen.append((float(obs[0, 0]), bool(reset[0])))
        return np.array([[[seen[-1][0]], [seen[-1][0] + 0.5]]])

    return act


def frames_of(path):
    imageio = pytest.importorskip("imageio.v2")
    with imageio.get_reader(path) as reader:
        return [np.asarray(frame) for frame in reader]


def test_two_panels_with_chunks_and_an_early_end(tmp_path):
    seen_a, seen_b, lengths = [], [], iter((4, 10**9))
    path = tmp_path / "report" / "video.mp4"
    info = side_by_side([("BC", chunks_of_two(seen_a)), ("MODIP", chunks_of_two(seen_b))], lambda: Painter(next(lengths)), 7, 10, path, fps=20, width=64)
    assert info.returns == {"BC": 8.0, "MODIP": 20.0} and info.steps == 10 and not info.cut
    assert seen_a == [(0.0, True), (2.0, False)] and len(seen_b) == 5  # asked again only when the chunk is used up
    assert Painter.made[0].actions == [[0.0], [0.5], [2.0], [2.5]] and all(env.closed and env.seed == 7 for env in Painter.made)
    frames = frames_of(path)
    assert len(frames) == info.frames == 10 + 20 and frames[0].shape == (48 + 46, 128, 3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["video.jpg", "video.mp4"]


def test_long_episodes_are_thinned(tmp_path):
    info = side_by_side([("BC", chunks_of_two([]))], Painter, 0, 1000, tmp_path / "v.mp4", fps=10, width=64)
    assert info.steps == 1000 and info.frames <= MAX_FRAMES + 10


def test_budget_cuts_all_panels_at_the_same_step(tmp_path):
    import time

    def slow(obs, slots, reset):
        time.sleep(0.05)
        return np.zeros((1, 1, 1))

    info = side_by_side([("a", slow), ("b", slow)], Painter, 0, 1000, tmp_path / "v.mp4", fps=10, width=64, budget_s=0.5)
    assert info.cut and 1 <= info.steps < 30 and len({env.steps for env in Painter.made}) == 1


def test_no_gl_gives_advice_and_closes(tmp_path):
    with pytest.raises(RuntimeError, match="AttributeError: eglQueryString.*libegl1"):
        side_by_side([("a", chunks_of_two([]))], functools.partial(Painter, error=AttributeError("eglQueryString")), 0, 5, tmp_path / "v.mp4")
    assert Painter.made[0].closed and not (tmp_path / "v.mp4").exists()


def test_wrong_arguments_and_action_shapes_are_named(tmp_path):
    with pytest.raises(ValueError, match="0 policies"):
        side_by_side([], Painter, 0, 5, tmp_path / "v.mp4")
    with pytest.raises(ValueError, match=r"'flat'.*\(1, 6\).*chunk"):
        side_by_side([("flat", lambda *_: np.zeros((1, 6)))], Painter, 0, 5, tmp_path / "v.mp4")


def test_other_errors_of_the_factory_stay_what_they_are(tmp_path):
    def factory():
        raise KeyError("no such task")

    with pytest.raises(KeyError, match="no such task"):
        side_by_side([("a", chunks_of_two([]))], factory, 0, 5, tmp_path / "v.mp4")


def test_a_real_mujoco_environment(tmp_path):
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    make = functools.partial(gymnasium.make, "HalfCheetah-v5", render_mode="rgb_array", width=96, height=64)
    try:
        info = side_by_side([("still", lambda *_: np.zeros((1, 4, 6)))], make, 0, 8, tmp_path / "v.mp4", fps=10, width=96)
    except RuntimeError as error:
        if "rendering failed" not in str(error):
            raise
        pytest.skip(f"no OpenGL here: {error}")
    assert info.steps == 8 and frames_of(tmp_path / "v.mp4")[0][60:].std() > 5  # something is to be seen
