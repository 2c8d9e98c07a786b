"""Stage 00: LIBERO demonstrations, recorded by a scripted expert on the real simulator.

    python 00_demos.py configs/tiny.yaml [key=value ...]

Reads   nothing but LIBERO itself (init states 0-19); or, with `source`, a folder of LIBERO's official HDF5 files.
Writes  runs/<config>/data/<suite>/task_NN.hdf5 in LIBERO's own layout, and demos.json (what was kept, per task).
Cost    about 3 s per demonstration and core at 64 px; 200 demonstrations are 85 MB.

The expert sees the simulator's state (poses and collision geometry) and acts through the same 7 numbers as every policy:
delta position, delta rotation, gripper. A task is a row of TASKS: a list of primitives with their parameters. A primitive is a
generator of actions; whoever drives it may disturb the actions, record them, or stop when the task is solved.

Differences from the paper, which fine-tunes on LIBERO's human demonstrations:
- One strategy, smooth and limited in speed, without pauses of hidden length: what a small policy can imitate.
- Noise is added to the executed action, the label stays clean (DART, arXiv 1703.09327): it shows how to come back to the path.
- An observation stands *before* its action. The official files hold the one after it (scripts/create_dataset.py of LIBERO).
- Images only every `frame_every` steps (obs/image_steps), since rendering is most of the cost; `model_file` is left out.
- No regrasping: a try that misses its grasp or its goal is dropped, counted, and repeated with other noise.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

import common
import memory
import runs
import sim
import workers
from common import GRIPPER_CLOSE, GRIPPER_OPEN, UserError


@dataclass
class Config(common.RunConfig):
    n_init: int = 20  # record from the first n init states of the group "demos"
    demos_per_init: int = 1  # demonstrations per init state, each with its own noise and waypoints
    demo_seed: int = 0  # of noise and waypoints; not `seed`, since all training seeds share one set of demonstrations
    frame_every: int = 4  # steps between two rendered observations
    action_noise: float = 0.04  # standard deviation added to the executed translation (of 1), 0.3 of it to the rotation
    waypoint_jitter: float = 0.012  # waypoints move by up to this many metres along each axis
    tail: int = 4  # steps recorded after the first success
    max_tries: int = 3  # tries per demonstration; after that it is left out, and counted
    source: str = ""  # folder of files to use instead: LIBERO's own (<source>/<suite>/*_demo.hdf5) or another run's

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, demos_per_init=1, frame_every=1, max_tries=1, tail=0, action_noise=0, waypoint_jitter=0)


# -------------------------------------------------------------------------------------------------------------- geometry
Actions = Iterator[np.ndarray]
UP = np.array([0.0, 0.0, 1.0])
TOP_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # hand points down, fingers open along world y
SUPPORTS = {"floor", "main_table", "kitchen_table", "living_room_table", "study_table", "coffee_table"}
# The hand as two boxes around the grasp point: half extents along (opening, across), lowest height above the grasp point.
PALM, FINGERS, MAX_OPENING = (0.112, 0.040, 0.035), (0.065, 0.018, -0.010), 0.075  # metres
YAWS = range(-85, 90, 5)  # turns of the hand about the vertical that are tried, in degrees


def surface_points(model, data, geoms: list[int], spacing: float = 0.012) -> np.ndarray:
    """Points (N, 3) on the bounding boxes of geoms in world coordinates, at most `spacing` apart; cylinders are rounded."""
    clouds = [np.empty((0, 3))]
    for geom in geoms:
        centre, half = model.geom_aabb[geom].reshape(2, 3)
        axes = [np.linspace(-1, 1, int(np.clip(np.ceil(2 * h / spacing) + 1, 2, 25))) for h in half]
        unit = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        unit = unit[np.abs(unit).max(1) > 0.999]  # the surface of the box
        if model.geom_type[geom] in (3, 5):  # mjGEOM_CAPSULE, mjGEOM_CYLINDER
            unit[:, :2] /= np.maximum(np.linalg.norm(unit[:, :2], axis=1, keepdims=True), 1)
        clouds.append(data.geom_xpos[geom] + (centre + unit * half) @ data.geom_xmat[geom].reshape(3, 3).T)
    return np.concatenate(clouds)


def collisions(obstacles: np.ndarray, grasp_point: np.ndarray, opening: np.ndarray, across: np.ndarray) -> int:
    """How many obstacle points (N, 3) lie inside the open hand above grasp_point; opening and across are its unit axes."""
    offset = obstacles - grasp_point
    u, v, z = np.abs(offset @ opening), np.abs(offset @ across), offset[:, 2]
    return sum(int(((u < a) & (v < b) & (z > low)).sum()) for a, b, low in (PALM, FINGERS))


def top_grasp(points: np.ndarray, obstacles: np.ndarray, depth: float, yaws=YAWS) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above: across the narrowest side of an object, clear of its neighbours.

    points (N, 3) are the object's; the fingers close `depth` below its top, 8 mm above its bottom at least. The grasp may move
    along the object to get clear; among equals the smallest turn of the hand wins.
    """
    height = max(points[:, 2].max() - depth, points[:, 2].min() + 0.008)
    slab = points[(points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.020), :2]  # what the fingers will touch
    obstacles = obstacles[np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.22]
    best = np.inf
    for yaw in np.deg2rad(yaws):
        opening, across = np.array([-np.sin(yaw), np.cos(yaw), 0]), np.array([-np.cos(yaw), -np.sin(yaw), 0])
        u, v = slab @ opening[:2], slab @ across[:2]
        width, half_length = np.ptp(u), np.ptp(v) / 2
        for shift in (0, -0.5, 0.5) if half_length < 0.03 else (0, -0.25, 0.25, -0.5, 0.5, -0.75, 0.75):
            along = (v.max() + v.min()) / 2 + shift * half_length
            point = opening * (u.max() + u.min()) / 2 + across * along + UP * height
            hits = collisions(obstacles, point, opening, across)
            cost = width + 10 * (width > MAX_OPENING) + (hits > 0) + 0.001 * hits + 0.01 * abs(yaw) + 0.02 * abs(shift)
            if cost < best:
                best, position, rotation = cost, point, Rotation.from_rotvec(yaw * UP).as_matrix() @ TOP_DOWN
    return position, rotation


def turn_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) in world axes that turns rotation matrix a into b."""
    return Rotation.from_matrix(b @ a.T).as_rotvec()


def limit(vector: np.ndarray, norm: float) -> np.ndarray:
    return vector * min(1.0, norm / max(np.linalg.norm(vector), 1e-12))


# ---------------------------------------------------------------------------------------------------------------- expert
class MissedGrasp(Exception):
    """The object did not come along when the hand was lifted."""


class Expert:
    """What the primitives know of the scene (privileged), and the one law of motion that they share."""

    POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # metres and radians that OSC_POSE moves its goal by for an action of 1
    GAIN, TURN_GAIN, TURN_SPEED, ACCELERATION = 1.3, 1.4, 0.5, 0.35  # share of the remaining way per step, and bounds

    def __init__(self, env: sim.TaskEnv, rng: np.random.Generator, waypoint_jitter: float):
        self.env, self.last = env, np.zeros(6)  # last: the last clean action, without the gripper
        self.jitter = lambda: rng.uniform(-1, 1, 3) * waypoint_jitter  # of one waypoint, in metres

    @property
    def position(self) -> np.ndarray:
        return self.env.data.site_xpos[self.env.robot.eef_site_id].copy()

    @property
    def rotation(self) -> np.ndarray:
        return self.env.data.site_xmat[self.env.robot.eef_site_id].reshape(3, 3).copy()

    @property
    def gap(self) -> float:  # metres between the fingers, whose coordinates run from -0.04 to 0.04
        return np.ptp(self.env.data.qpos[self.env.robot._ref_gripper_joint_pos_indexes])

    def points(self, *names: str) -> np.ndarray:
        """Points (N, 3) on the collision geometry of objects and fixtures."""
        model, problem = self.env.model, self.env.env
        roots = [model.body((problem.objects_dict | problem.fixtures_dict)[name].root_body).rootid[0] for name in names]
        solid = (model.geom_contype | model.geom_conaffinity) > 0
        geoms = np.flatnonzero(solid & np.isin(model.body_rootid[model.geom_bodyid], roots))
        return surface_points(model, self.env.data, geoms)

    def obstacles(self, target: str) -> np.ndarray:
        return self.points(*sorted({*self.env.env.objects_dict, *self.env.env.fixtures_dict} - SUPPORTS - {target}))

    def towards(self, position: np.ndarray, rotation: np.ndarray, gripper: float, speed: float = 1.0) -> np.ndarray:
        """The next action (7,) on the way to a pose: proportional to what remains, bounded in speed and acceleration."""
        move = limit(self.GAIN * (position - self.position) / self.POSITION_SCALE, speed)
        turn = limit(self.TURN_GAIN * turn_between(self.rotation, rotation) / self.ROTATION_SCALE, self.TURN_SPEED)
        move = self.last[:3] + limit(move - self.last[:3], self.ACCELERATION)
        turn = self.last[3:] + limit(turn - self.last[3:], self.ACCELERATION / 2)
        self.last = np.clip(np.concatenate([move, turn]), -1, 1)
        return np.append(self.last, gripper)


# ------------------------------------------------------------------------------------------------------------ primitives
def move_to(e: Expert, position, rotation, gripper, tolerance=0.025, turn_tolerance=np.inf, speed=1.0, patience=80) -> Actions:
    """Go straight to a pose until it is within tolerance (metres, radians), for at most `patience` steps."""
    for _ in range(patience):
        away, turn = position - e.position, turn_between(e.rotation, rotation)
        if np.linalg.norm(away) < tolerance and np.linalg.norm(turn) < turn_tolerance:
            return
        yield e.towards(position, rotation, gripper, speed)


def descend(e: Expert, position, rotation, tolerance=0.007, speed=0.8, patience=50) -> Actions:
    """Come down on a pose through a funnel: only as low as the hand is aligned, lest a finger lands on the object."""
    for _ in range(patience):
        aside = np.linalg.norm((position - e.position)[:2])
        turn = np.linalg.norm(turn_between(e.rotation, rotation))
        if aside < tolerance and turn < 0.08 and abs(e.position[2] - position[2]) < tolerance:
            return
        lowest = position[2] + 8 * max(0, aside - 0.006) + 0.15 * max(0, turn - 0.1)
        yield e.towards(np.append(position[:2], min(lowest, max(e.position[2], position[2]))), rotation, GRIPPER_OPEN, speed)


def grip(e: Expert, position, rotation, patience=12) -> Actions:
    """Close the fingers in place until they move no more."""
    for step in range(patience):
        gap = e.gap
        yield e.towards(position, rotation, GRIPPER_CLOSE)
        if step >= 4 and gap - e.gap < 0.0005:
            return


def pick_top(e: Expert, target: str, depth=0.024, yaws=YAWS) -> Actions:
    """Grasp an object from above and lift it by 6 cm."""
    position, rotation = top_grasp(e.points(target), e.obstacles(target), depth, yaws)
    yield from move_to(e, position + 0.08 * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)
    before = e.points(target)[:, 2].min()
    yield from move_to(e, e.position + 0.06 * UP, rotation, GRIPPER_CLOSE, patience=20)
    if e.points(target)[:, 2].min() < before + 0.02:
        raise MissedGrasp(target)


def drop_into(e: Expert, target: str, container: str, shift: tuple[float, float] = (0, 0)) -> Actions:
    """Carry the held object over a container, lower it below the rim, let go, and rise. shift: from its middle, in metres."""
    rotation, rim = e.rotation, e.points(container)[:, 2].max()
    middle = e.env.data.site(f"{container}_contain_region").xpos[:2] + shift
    height = rim + 0.03 + e.position[2] - e.points(target)[:, 2].min()  # of the hand, with the object just above the rim
    lifted = np.append(e.position[:2], max(height - 0.05, e.position[2] + 0.02)) + e.jitter()
    yield from move_to(e, lifted, rotation, GRIPPER_CLOSE, tolerance=0.04)
    offset = (e.points(target).max(0) + e.points(target).min(0))[:2] / 2 - e.position[:2]
    over = np.append(middle - offset, height) + e.jitter()
    yield from move_to(e, over, rotation, GRIPPER_CLOSE)
    inside = np.append(over[:2], max(over[2] - 0.09, rim + 0.015))  # the hand itself stays above the rim
    yield from move_to(e, inside, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.8)
    yield from release(e, rotation)


def release(e: Expert, rotation) -> Actions:
    """Open the fingers in place until the object is free, then rise by 10 cm."""
    position, wide = e.position, min(e.gap + 0.02, 0.075)
    for _ in itertools.takewhile(lambda _: e.gap <= wide, range(8)):
        yield e.towards(position, rotation, GRIPPER_OPEN)
    yield from move_to(e, position + 0.10 * UP, rotation, GRIPPER_OPEN, speed=0.7, patience=30)


# ----------------------------------------------------------------------------------------------------------------- tasks
def into_basket(name: str, shift: tuple[float, float] = (0, 0), **grasp) -> list[tuple]:
    return [(pick_top, {"target": name, **grasp}), (drop_into, {"target": name, "container": "basket_1", "shift": shift})]


LIBERO_OBJECT = [
    *map(into_basket, ("alphabet_soup_1", "cream_cheese_1", "salad_dressing_1", "bbq_sauce_1", "ketchup_1")),
    *map(into_basket, ("tomato_sauce_1", "butter_1")),
    into_basket("milk_1", depth=0.030),  # any higher, and the gable of a carton wedges the fingers
    into_basket("chocolate_pudding_1"),
    into_basket("orange_juice_1", depth=0.030, yaws=range(70, 115, 5)),  # across the roof, whose ends hook on open fingers
]
TASKS = {("libero_object", task): steps for task, steps in enumerate(LIBERO_OBJECT)}


# ------------------------------------------------------------------------------------------------------------- recording
def observation(env: sim.TaskEnv, look: bool) -> dict[str, np.ndarray]:
    """What LIBERO's files hold of one step. Images are "opengl": turned by 180 degrees from what policies see."""
    p = env.proprio()
    hand = np.concatenate([p["eef_pos"], p["axis_angle"]])  # (6,)
    obs = {"ee_pos": hand[:3], "ee_ori": hand[3:], "ee_states": hand}
    obs |= {"gripper_states": p["gripper_qpos"], "joint_states": p["joint_pos"]}
    if look:
        obs |= {"agentview_rgb": env.frame("agentview")[::-1, ::-1], "eye_in_hand_rgb": env.frame("wrist")[::-1, ::-1]}
        obs["image_steps"] = np.array(env.steps)
    robot = np.concatenate([p["gripper_qpos"], p["eef_pos"], p["eef_quat"]])  # (9,)
    return {"states": env.env.sim.get_state().flatten(), "robot_states": robot} | {f"obs/{k}": v for k, v in obs.items()}


def attempt(env: sim.TaskEnv, task: list[tuple], init_state: int, cfg: Config, rng: np.random.Generator) -> tuple[str, dict]:
    """One try: its outcome ("success", "missed grasp", "no success", "crash") and, of a success, the arrays by dataset name."""
    env.reset(init_state)
    expert, rows, first_success = Expert(env, rng, cfg.waypoint_jitter), {}, None
    actions = itertools.chain.from_iterable(primitive(expert, **parameters) for primitive, parameters in task)
    spread = cfg.action_noise * np.array([1, 1, 1, 0.3, 0.3, 0.3, 0])
    try:
        for step, action in enumerate(itertools.islice(actions, env.max_steps)):
            if first_success is not None and step > first_success + cfg.tail:
                break
            executed = np.clip(action + spread * rng.standard_normal(7), -1, 1)
            row = observation(env, look=step % cfg.frame_every == 0)
            for key, value in (row | {"actions": action, "actions_executed": executed}).items():
                rows.setdefault(key, []).append(value)
            if env.step(executed) and first_success is None:
                first_success = step
    except MissedGrasp:
        return "missed grasp", {}
    except sim.CRASHES:
        return "crash", {}
    arrays = {key: np.stack(value) for key, value in rows.items()} | {"success_step": first_success}
    return ("success", arrays) if first_success is not None else ("no success", {})


def record_demo(env: sim.TaskEnv, init_state: int, repeat: int, cfg: Config, path: Path) -> None:
    """Try until the expert succeeds, at most max_tries times; write one demonstration, or why there is none, by rename."""
    outcomes = []
    while "success" not in outcomes and len(outcomes) < cfg.max_tries:
        rng = common.np_stream(cfg.demo_seed, "demo", env.suite, env.task_id, init_state, repeat, len(outcomes))
        outcome, rows = attempt(env, TASKS[env.suite, env.task_id], init_state, cfg, rng)
        outcomes.append(outcome)
    success_step, steps = rows.pop("success_step", None), len(rows.get("actions", ()))
    summary = {"outcomes": outcomes, "steps": steps, "success_step": success_step}
    with runs.replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(file_attributes(env) | {"summary": json.dumps(summary)})
        if rows:
            demo, last = file.create_group("demo"), (np.arange(steps) == steps - 1).astype(np.uint8)
            demo.attrs.update({"num_samples": steps, "init_state": rows["states"][0]})
            demo.attrs.update({"init_state_id": init_state, "success_step": success_step})  # not in LIBERO's
            for key, value in (rows | {"rewards": last, "dones": last}).items():
                demo.create_dataset(key, data=value, compression="gzip" if value.dtype == np.uint8 else None)


def file_attributes(env: sim.TaskEnv) -> dict[str, str]:
    """The attributes of LIBERO's `data` group, the language as LIBERO's evaluations have it."""
    names = {"env_name": type(env.env).__name__, "problem_name": env.env.parsed_problem["problem_name"]}
    bddl = "/".join(["libero/libero/bddl_files", *Path(env.env.bddl_file_name).parts[-2:]])
    info = {"domain_name": "robosuite", "language_instruction": env.instruction} | names
    kwargs = {"robots": ["Panda"], "controller": "OSC_POSE", "camera_heights": env.image_size, "camera_widths": env.image_size}
    env_args = {"type": 1, "bddl_file": bddl, "env_kwargs": kwargs} | names
    text = {"tag": "libero-v1", "macros_image_convention": "opengl", "env_name": names["env_name"], "bddl_file_name": bddl}
    return text | {"problem_info": json.dumps(info), "env_args": json.dumps(env_args)}


def record_task(job: tuple[Config, str, int]) -> Iterator[dict]:
    """Record the demonstrations of one task that are not in its folder yet; yield the summary of each."""
    cfg, suite, task = job
    folder, env = cfg.data_dir / "parts" / suite / f"task_{task:02d}", None
    folder.mkdir(parents=True, exist_ok=True)
    for init_state, repeat in itertools.product(common.init_states("demos", cfg.n_init), range(cfg.demos_per_init)):
        path = folder / f"{init_state:02d}-{repeat:02d}.hdf5"
        if not path.is_file():
            env = env or sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
            record_demo(env, init_state, repeat, cfg, path)
        try:
            with h5py.File(path) as file:
                summary = json.loads(file.attrs["summary"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({runs.one_line(error)}); remove it, the same command records it again"
            ) from error
        yield summary
    if env:
        env.close()


def merge(parts: list[Path], path: Path) -> None:
    """One file per task from those of its demonstrations, written by rename."""
    with runs.replacing(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for part in parts:
            try:
                with h5py.File(part) as source:
                    data.attrs.update({key: value for key, value in source.attrs.items() if key != "summary"})
                    if "demo" in source:
                        source.copy("demo", data, name=f"demo_{len(data)}")
            except (OSError, RuntimeError) as error:
                why = runs.one_line(error)
                raise UserError(f"{part} does not go into {path} ({why}); remove it if it is damaged, or make room") from error
        data.attrs["num_demos"], data.attrs["total"] = len(data), sum(int(d.attrs["num_samples"]) for d in data.values())


# ------------------------------------------------------------------------------------------------------------------ main
def record(cfg: Config, tasks: list[tuple[str, int]]) -> list[dict]:
    """Record all tasks in `workers` processes, one file per demonstration; merge them into one per task."""
    demos, items = [[] for _ in tasks], workers.parallel(record_task, [(cfg, *pair) for pair in tasks], cfg.workers)
    bar = common.progress(items, total=len(tasks) * cfg.n_init * cfg.demos_per_init, desc="demos", unit="demo")
    for index, demo in bar:
        demos[index].append(demo)
        bar.set_postfix_str(f"kept {sum(d['steps'] > 0 for ds in demos for d in ds)}/{sum(map(len, demos))}")
    for suite, task in tasks:
        name = f"{suite}/task_{task:02d}"
        merge(sorted((cfg.data_dir / "parts" / name).glob("*.hdf5")), cfg.data_dir / f"{name}.hdf5")
    return [{"suite": suite, "task": task} | statistics(ds) for (suite, task), ds in zip(tasks, demos, strict=True)]


def statistics(demos: list[dict]) -> dict:
    """What became of the demonstrations of one task."""
    kept, tries = [d for d in demos if d["steps"]], [outcome for d in demos for outcome in d["outcomes"]]
    counts = {"demos": len(demos), "kept": len(kept), "first_try": sum(d["outcomes"] == ["success"] for d in demos)}
    counts |= {outcome.replace(" ", "_"): tries.count(outcome) for outcome in ("missed grasp", "no success", "crash")}
    return counts | {key: round(sum(d[key] for d in kept) / max(len(kept), 1), 1) for key in ("steps", "success_step")}


def adopt(cfg: Config, tasks: list[tuple[str, int]]) -> list[dict]:
    """Link LIBERO's official files, or those of another run of this kit, to where later stages look; one reader serves both."""
    rows = []
    for suite, task in tasks:
        folder, official = Path(cfg.source) / suite, f"*{sim.instruction(suite, task).replace(' ', '_')}_demo.hdf5"
        found = sorted([*folder.glob(official), *folder.glob(f"task_{task:02d}.hdf5")])
        if len(found) != 1:
            raise UserError(f"source: {folder} holds {len(found)} files {official} or task_{task:02d}.hdf5, but one is needed")
        size = next(common.read_demos(found[0], task)).agentview.shape[1]
        if size != cfg.image_size:
            raise UserError(f"{found[0]} has images of {size} px: set image_size={size}")
        link = cfg.data_dir / suite / f"task_{task:02d}.hdf5"
        link.unlink(missing_ok=True)
        link.symlink_to(found[0].resolve())
        rows.append({"suite": suite, "task": task, "kept": sum(1 for _ in common.read_demos(link, task))})
    return rows


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "demos")
    common.init_states("demos", cfg.n_init)  # fails where they would reach into another group
    tasks = sim.tasks(cfg)
    if unknown := [] if cfg.source else [pair for pair in tasks if pair not in TASKS]:
        raise UserError(f"the expert cannot do {unknown[0]} yet: add a row to TASKS in 00_demos.py, or use demos.source")
    source = Path(cfg.source)
    if cfg.source and source.resolve() == cfg.data_dir.resolve():
        raise UserError(f"demos.source={source} is the folder that this stage writes")
    inputs = [source] if cfg.source and (source / "done.json").is_file() else []
    stage = runs.open_stage(
        __file__, cfg, cfg.data_dir, "suites tasks image_size render", inputs, ["sim.py", "osc.py", "workers.py"]
    )
    if stage is None:
        return
    for suite in cfg.suites:
        (stage.dir / suite).mkdir(exist_ok=True)
    if not (stage.dir / "demos.json").is_file():  # written when every task's file is there
        rows = (adopt if cfg.source else record)(cfg, tasks)
        runs.write_atomic(stage.dir / "demos.json", json.dumps(rows, indent=1) + "\n")  # columns in this order
    shutil.rmtree(stage.dir / "parts", ignore_errors=True)
    rows = runs.read_json(stage.dir / "demos.json")
    for line in [rows[0], *(row.values() for row in rows)]:
        print("  ".join(f"{cell:>12}" for cell in line))
    stage.finish(kept=sum(row["kept"] for row in rows))


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "demos", sys.argv[1:])))
