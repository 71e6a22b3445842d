"""A short video of several policies side by side, each in its own environment from the same seed."""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modip_ray.report.scores import number

Act = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (obs (1, Do), slots (1,), reset (1,)) -> actions (1, c, Da)

MAX_FRAMES = 250
HEADER_PX = 46
_GL_HELP = (
    "expected a working OpenGL. Without a display install Debian's libegl1 and libgl1-mesa-dri and leave MUJOCO_GL unset (egl is then used), "
    "or set MUJOCO_GL=osmesa (needs libosmesa6) or, with a display, MUJOCO_GL=glfw, before Python starts"
)


@dataclass(frozen=True)
class VideoInfo:
    """What was recorded: environment steps, frames, each label's return so far, wall seconds, and whether the time budget cut it short."""

    path: Path
    steps: int
    frames: int
    returns: dict[str, float]
    seconds: float
    cut: bool


class _Panel:
    """One policy in one environment; holds the rest of its current action chunk and its last picture."""

    def __init__(self, label: str, act: Act, env: Any, seed: int):
        self.label, self.env, self._act = label, env, act
        self._observation, _ = env.reset(seed=seed)
        self._chunk: list[np.ndarray] = []
        self._first = True
        self.ret, self.steps, self.over = 0.0, 0, ""
        self._picture: np.ndarray | None = None
        self._frozen = False

    def step(self) -> None:
        if self.over:
            return
        if not self._chunk:
            observation = np.asarray(self._observation, dtype=np.float32)[None]  # (1, Do)
            actions = np.asarray(self._act(observation, np.zeros(1, dtype=np.int64), np.array([self._first])))  # (1, c, Da)
            if actions.ndim != 3 or actions.shape[0] != 1 or actions.shape[1] < 1:
                raise ValueError(f"act of {self.label!r}: got actions of shape {actions.shape}, expected (1, chunk of 1 or more, action size)")
            self._chunk, self._first = list(actions[0]), False
        self._observation, reward, terminated, truncated, _ = self.env.step(self._chunk.pop(0))
        self.ret += float(reward)
        self.steps += 1
        self.over = "ended" if terminated else "time limit" if truncated else ""

    def picture(self) -> np.ndarray:
        """(h, w, 3) uint8; the last one is kept once the episode is over."""
        if not self._frozen:
            self._picture = np.asarray(self.env.render(), dtype=np.uint8)
            self._frozen = bool(self.over)
        return self._picture

    def drawn(self, width: int) -> np.ndarray:
        """The picture at `width` pixels under a header with label, step and return."""
        from PIL import Image, ImageDraw, ImageFont

        picture = Image.fromarray(self.picture())
        height = round(picture.height * width / picture.width)
        panel = Image.new("RGB", (width, height + HEADER_PX), (22, 25, 29))
        panel.paste(picture.resize((width, height)), (0, HEADER_PX))
        draw = ImageDraw.Draw(panel)
        draw.text((8, 4), self.label, font=ImageFont.load_default(size=17), fill=(255, 255, 255))
        over = f"  {self.over}" if self.over else ""
        draw.text((8, 26), f"step {self.steps}  return {number(self.ret)}{over}", font=ImageFont.load_default(size=14), fill=(190, 200, 210))
        return np.asarray(panel)


def side_by_side(
    run_act_pairs: Sequence[tuple[str, Act]],
    env_factory_render: Callable[[], Any],
    seed: int,
    max_steps: int,
    path: str | Path,
    fps: float = 50,
    width: int = 320,
    budget_s: float = 25.0,
) -> VideoInfo:
    """Run every policy in its own environment from `seed` and write an mp4 with one panel of `width` pixels each, and its last picture as .jpg beside it.

    env_factory_render: makes a gymnasium environment with render_mode="rgb_array" (small pictures render faster; 320 x 240 is enough).
    fps: environment steps shown a second (at least 10 frames a second are played, so a strongly thinned video runs faster). About 250 steps look smooth.
    Environments step together; frames are skipped so that at most about 250 are rendered and the whole stays within `budget_s` wall seconds
    (all panels then stop at the same step, `cut` says so). MUJOCO_GL is set to egl where unset.
    Raises ValueError for bad arguments or action shapes, RuntimeError with advice where nothing can be rendered.
    """
    if not run_act_pairs or max_steps < 1:
        raise ValueError(f"side_by_side: got {len(run_act_pairs)} policies and max_steps={max_steps}, expected at least one of each")
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when the renderer is made
    path, started = Path(path), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    panels: list[_Panel] = []
    try:
        for label, act in run_act_pairs:
            panels.append(_Panel(label, act, _make(env_factory_render), seed))
        frame_s = _render_cost(panels)
        left = budget_s - (time.perf_counter() - started)
        skip = math.ceil(max_steps / min(MAX_FRAMES, max(25, int(0.7 * left / frame_s))))  # the rest of the budget is for acting
        return _record(panels, path, max_steps, skip, max(10.0, fps / skip), width - width % 2, started, budget_s)
    finally:
        for panel in panels:
            panel.env.close()


def _make(env_factory_render: Callable[[], Any]) -> Any:
    """The environment; says what is wrong where importing OpenGL fails, which some factories do."""
    try:
        return env_factory_render()
    except Exception as error:
        if any("OpenGL" in frame.filename or "gl_context" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise RuntimeError(_no_gl(error)) from error
        raise


def _no_gl(error: Exception) -> str:
    return f"rendering failed with {type(error).__name__}: {error}; MUJOCO_GL is {os.environ.get('MUJOCO_GL')!r}; {_GL_HELP}"


def _render_cost(panels: list[_Panel]) -> float:
    """Seconds to render one frame of all panels; the first try also tells whether rendering works at all."""
    try:
        for panel in panels:
            panel.picture()
    except Exception as error:  # EGL, OSMesa, GLFW and MuJoCo each raise types of their own
        raise RuntimeError(_no_gl(error)) from error
    if any(panel.picture() is None or panel.picture().ndim != 3 for panel in panels):
        raise ValueError('env_factory_render: its render() gave no picture, expected (h, w, 3); make it with render_mode="rgb_array"')
    begun = time.perf_counter()
    for panel in panels:
        panel.picture()
    return max(1e-4, time.perf_counter() - begun)


def _record(panels: list[_Panel], path: Path, max_steps: int, skip: int, fps: float, width: int, started: float, budget_s: float) -> VideoInfo:
    import imageio.v2 as imageio
    from PIL import Image

    partial = path.with_name(path.stem + ".partial.mp4")
    frames, cut, step = 0, False, 0
    with imageio.get_writer(partial, fps=fps, codec="libx264", quality=7, macro_block_size=2, output_params=["-movflags", "+faststart"]) as writer:
        for step in range(1, max_steps + 1):
            for panel in panels:
                panel.step()
            over = step == max_steps or all(panel.over for panel in panels)
            cut = not over and time.perf_counter() - started > budget_s
            if step % skip == 0 or over or cut:
                frame = np.concatenate([panel.drawn(width) for panel in panels], axis=1)  # (h, n * width, 3)
                writer.append_data(frame)
                frames += 1
            if over or cut:
                break
        held = round(fps)  # one second to read the last numbers
        for _ in range(held):
            writer.append_data(frame)
    os.replace(partial, path)
    Image.fromarray(frame).save(path.with_suffix(".jpg"), quality=80)
    returns = {panel.label: panel.ret for panel in panels}
    return VideoInfo(path, step, frames + held, returns, time.perf_counter() - started, cut)
