"""What a frame costs if it draws all geometry, only what is in view, and (in fast mode) only what has moved.

    python tests/bench/rendering.py [tasks=libero_object/0,libero_goal/0] [steps=20]     four tasks: 3 minutes

Prints the CPU milliseconds (all threads) of an observation, both cameras at 64 pixels: medians over steps of
random actions. The three ways take turns at every step, and their images must be equal byte by byte.
Triangles are those of the meshes that both cameras draw, mean over the steps. The default mode draws
everything when a mirror is in view.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
from sim.env import LIBERO_CAMERAS, TaskEnv

WAYS = {"all": (False, False), "in view": (True, False), "in view, moved": (True, True)}  # cull, layers


def triangles(env: TaskEnv, cull: bool) -> int:
    """Number of triangles in the meshes that the frames of both cameras draw."""
    model = env.model
    drawn = 0
    faces = np.where(model.geom_type == env._mj.mjtGeom.mjGEOM_MESH, model.mesh_facenum[model.geom_dataid], 0)
    for name in LIBERO_CAMERAS.values():
        drawable, shown = model.geom_group != 0, ~env._out_of_view(model.camera(name).id)
        mirrored = env.render_mode == "default" and (drawable & shown & env._mirrors).any()
        drawn += int(faces[drawable & (shown | mirrored | (not cull))].sum())
    return drawn


def measure(suite: str, task: int, mode: str, steps: int) -> dict[str, tuple[float, float]]:
    """(median CPU ms, mean triangles) of each way that this scene can be drawn in."""
    env = TaskEnv(suite, task, 64, mode)
    env.reset(0)
    env.observe()  # makes the renderer
    out_of_view, glass = env._out_of_view, env._has_glass
    ways = {name: way for name, way in WAYS.items() if not way[1] or (mode == "fast" and not glass)}
    ms = {name: [] for name in ways}
    drawn = {name: [] for name in ways}
    rng = np.random.default_rng(0)
    push = np.zeros(7)
    for _ in range(steps):
        push = 0.8 * push + 0.5 * rng.standard_normal(7)
        env.step(push.clip(-1, 1))
        frames = {}
        for name, (cull, layers) in ways.items():
            env._out_of_view = out_of_view if cull else lambda camera: np.zeros(env.model.ngeom, bool)
            env._has_glass = not layers
            began = time.process_time()
            frames[name] = [env.frame(camera) for camera in common.CAMERAS]
            ms[name].append(1e3 * (time.process_time() - began))
            env._out_of_view = out_of_view
            drawn[name].append(triangles(env, cull))
        assert all(np.array_equal(frames["all"], frame) for frame in frames.values()), (suite, task, mode)
    env.close()
    return {name: (float(np.median(ms[name])), float(np.mean(drawn[name]))) for name in ways}


def main(
    tasks: str = "libero_object/0,libero_spatial/0,libero_goal/0,libero_10/0", steps: str = "20"
) -> None:
    print("| task | mode | triangles, all | in view | CPU ms, all | in view | in view, moved | gain |")
    print(8 * "|---" + "|")
    for suite, task in (name.split("/") for name in tasks.split(",")):
        for mode in ("fast", "default"):
            costs = measure(suite, int(task), mode, int(steps))
            cells = [f"{costs[name][1]:,.0f}" for name in ("all", "in view")]
            cells += [f"{costs[name][0]:.1f}" if name in costs else "drawn in full (glass)" for name in WAYS]
            if mode == "default":
                cells[-1] = ""
            gain = costs["all"][0] / min(ms for ms, _ in costs.values())
            print(f"| {suite} {task} | {mode} | {' | '.join(cells)} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
