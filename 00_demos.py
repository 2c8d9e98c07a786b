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

import contextlib
import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

import common
import disk
import memory
import runs
import sim
import workers
from common import UserError
from expert import TASKS, Expert, MissedGrasp


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


def attempt(env: sim.TaskEnv, init_state: int, cfg: Config, rng: np.random.Generator, see=observation) -> tuple[str, dict]:
    """One try: its outcome ("success", "missed grasp", "no success", "crash") and, of a success, the arrays by dataset name."""
    env.reset(init_state)
    expert, rows, first_success = Expert(env, rng, cfg.waypoint_jitter), {}, None
    actions = itertools.chain.from_iterable(
        primitive(expert, **parameters) for primitive, parameters in TASKS[env.suite, env.task_id]
    )
    spread = cfg.action_noise * np.array([1, 1, 1, 0.3, 0.3, 0.3, 0])
    try:
        for step, action in enumerate(itertools.islice(actions, env.max_steps)):
            if first_success is not None and step > first_success + cfg.tail:
                break
            executed = np.clip(action + spread * rng.standard_normal(7), -1, 1)
            row = see(env, step % cfg.frame_every == 0)
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


def try_until_success(env: sim.TaskEnv, init_state: int, repeat: int, cfg: Config, see=observation) -> tuple[list[str], dict]:
    """At most max_tries tries, each with other noise: the outcomes, and the arrays of the one that succeeded."""
    outcomes, rows = [], {}
    while "success" not in outcomes and len(outcomes) < cfg.max_tries:
        rng = common.np_stream(cfg.demo_seed, "demo", env.suite, env.task_id, init_state, repeat, len(outcomes))
        outcome, rows = attempt(env, init_state, cfg, rng, see)
        outcomes.append(outcome)
    return outcomes, rows


@contextlib.contextmanager
def hdf5_file(path: Path, write: Callable = disk.write_atomic) -> Iterator[h5py.File]:
    """An HDF5 file, made in memory and then written by rename: the library itself crashes on a disk that is full."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        yield file
    write(path, content.getvalue())


def record_demo(env: sim.TaskEnv, init_state: int, repeat: int, cfg: Config, path: Path) -> None:
    """Write one demonstration, or why there is none: an HDF5 file that a checksum follows."""
    outcomes, rows = try_until_success(env, init_state, repeat, cfg)
    success_step, steps = rows.pop("success_step", None), len(rows.get("actions", ()))
    summary = {"outcomes": outcomes, "steps": steps, "success_step": success_step}
    with hdf5_file(path, disk.write_sealed) as file:
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
        with h5py.File(io.BytesIO(disk.read_sealed(path))) as file:
            yield json.loads(file.attrs["summary"])
    if env:
        env.close()


def merge(parts: list[Path], path: Path) -> None:
    """One file per task from those of its demonstrations, written by rename."""
    with hdf5_file(path) as file:
        data = file.create_group("data")
        for part in parts:
            with h5py.File(io.BytesIO(disk.read_sealed(part))) as source:
                data.attrs.update({key: value for key, value in source.attrs.items() if key != "summary"})
                if "demo" in source:
                    source.copy("demo", data, name=f"demo_{len(data)}")
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
        demo = next(common.read_demos(found[0], task), None)
        if demo is None:
            raise UserError(f"source: {found[0]} holds no demonstration; record it again, or leave task {task} out with tasks=")
        if (size := demo.agentview.shape[1]) != cfg.image_size:
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
        raise UserError(f"the expert cannot do {unknown[0]} yet: add a row to TASKS in expert.py, or use demos.source")
    source = Path(cfg.source)
    if cfg.source and source.resolve() == cfg.data_dir.resolve():
        raise UserError(f"demos.source={source} is the folder that this stage writes")
    inputs = [source] if cfg.source and (source / "done.json").is_file() else []
    stage = runs.open_stage(
        __file__,
        cfg,
        cfg.data_dir,
        "suites tasks image_size render",
        inputs,
        ["expert.py", "grasps.py", "sim.py", "osc.py", "workers.py"],
    )
    if stage is None:
        return
    for suite in cfg.suites:
        (stage.dir / suite).mkdir(exist_ok=True)
    if not (stage.dir / "demos.json").is_file():  # written when every task's file is there
        rows = (adopt if cfg.source else record)(cfg, tasks)
        disk.write_atomic(stage.dir / "demos.json", json.dumps(rows, indent=1) + "\n")  # columns in this order
    shutil.rmtree(stage.dir / "parts", ignore_errors=True)
    rows = disk.read_json(stage.dir / "demos.json")
    for line in [rows[0], *(row.values() for row in rows)]:
        print("  ".join(f"{cell:>12}" for cell in line))
    stage.finish(kept=sum(row["kept"] for row in rows))


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "demos", sys.argv[1:])))
