"""00 - LIBERO demonstrations, recorded by a scripted expert on the real simulator.

reads   nothing but LIBERO itself (init states 0-19); or, with `source`, a folder of HDF5 files: LIBERO's
        own, OpenVLA's, or those of extras/from_lerobot.py (sim/demos.py says how they are read)
writes  <run>/data/<suite>/task_NN.hdf5 in LIBERO's own layout, and demos.json (what was kept, per task)
cost    about 1 s per demonstration and core at 64 px; 200 demonstrations are 85 MB
try     python 00_demos.py configs/smoke.yaml name=mine

The expert sees the simulator's state (poses and collision geometry) and acts through the same 7 numbers as
every policy: delta position, delta rotation, gripper. A task is a row of sim/expert.py's TASKS: a list of
primitives with parameters. A primitive is a generator of actions. Whoever drives it may disturb the actions,
record them, or stop when the task is solved.

Differs from the paper, which fine-tunes on LIBERO's human demonstrations:
- One smooth strategy, limited in speed and without hidden pauses: a small policy can imitate it.
- Noise is added to the executed action; the label stays clean (DART, arXiv 1703.09327). It teaches recovery.
- An observation stands *before* its action. In the official files it stands after it (create_dataset.py).
- Images only every `frame_every` steps (obs/image_steps), since rendering is most of the cost.
- A try that misses its grasp or its goal is dropped, counted, and repeated with other noise.
"""

import contextlib
import io
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

import common
from runtime import Count, Place, disk, refuse, stage, workers
from sim.demos import ENDING, read_demos
from sim.env import CRASHES, TaskEnv, instruction, suite_of, tasks
from sim.expert import TASKS, Expert, MissedGrasp, target_places

TURNS = {  # how images from elsewhere may stand
    "upright": np.s_[:],
    "turned by 180 degrees": np.s_[::-1, ::-1],
    "upside down": np.s_[::-1],
    "mirrored": np.s_[:, ::-1],
}


@dataclass
class Config(common.SceneConfig):
    section: ClassVar = "demos"
    n_init: Count = 20  # record from the first n init states of the group "demos"; `source` is taken whole
    demo_seed: int = 0  # of noise and waypoints; not `seed`: all training seeds share the demonstrations
    frame_every: Count = 4  # steps between two rendered observations
    action_noise: float = 0.04  # standard deviation added to the executed translation; rotation: 0.3 of it
    waypoint_jitter: float = 0.012  # waypoints move by up to this many metres along each axis
    tail: int = 4  # steps recorded after the first success
    max_tries: Count = 3  # tries per demonstration; after that it is left out, and counted
    source: Place = ""  # folder of files to use instead, <suite>/*_demo.hdf5 or another run's data/

    folder = property(lambda self: self.data_dir)

    def inputs(self) -> list[Path]:
        common.init_states("demos", self.n_init)
        if not self.source:
            for task in tasks(self):
                refuse(
                    task not in TASKS,
                    f"the expert cannot do {task} yet: "
                    "add a row to TASKS in sim/expert.py, or use demos.source",
                )
            return []
        source = Path(self.source)
        refuse(
            source.resolve().is_relative_to(self.data_dir.resolve()),
            f"demos.source={source} is the folder that this stage writes, or lies in it",
        )
        adopted(self)  # fails now if a file cannot serve
        return [source] if (source / "done.json").is_file() else []


# -------------------------------------------------------------------------------------------------- recording
def observation(env: TaskEnv, look: bool) -> dict[str, np.ndarray]:
    """What LIBERO's files hold of one step. Images are "opengl": turned by 180 degrees from policies' view.

    look: whether to render.
    """
    p = env.proprio()
    row = {
        "states": env.env.sim.get_state().flatten(),
        "robot_states": np.concatenate([p["gripper_qpos"], p["eef_pos"], p["eef_quat"]]),  # (9,)
        "obs/ee_pos": p["eef_pos"],
        "obs/ee_ori": p["axis_angle"],
        "obs/ee_states": np.concatenate([p["eef_pos"], p["axis_angle"]]),  # (6,)
        "obs/gripper_states": p["gripper_qpos"],
        "obs/joint_states": p["joint_pos"],
    }
    if look:
        row["obs/agentview_rgb"] = env.frame("agentview")[::-1, ::-1]
        row["obs/eye_in_hand_rgb"] = env.frame("wrist")[::-1, ::-1]
        row["obs/image_steps"] = np.array(env.steps)
    return row


def attempt(
    env: TaskEnv, init_state: int, cfg: Config, rng: np.random.Generator, see=observation
) -> tuple[str, dict]:
    """One try: its outcome ("success", "missed grasp", "no success", "crash") and, of a success, the arrays
    by dataset name and `success_step`.
    """
    env.reset(init_state)
    expert, rows, first_success = Expert(env, rng, cfg.waypoint_jitter), {}, None
    actions = itertools.chain.from_iterable(primitive(expert) for primitive in TASKS[env.suite, env.task_id])
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
    except CRASHES:
        return "crash", {}
    if first_success is None:
        return "no success", {}
    return "success", {key: np.stack(value) for key, value in rows.items()} | {"success_step": first_success}


def try_until_success(env: TaskEnv, init_state: int, cfg: Config, see=observation) -> tuple[list[str], dict]:
    """At most max_tries tries, each with other noise: their outcomes, and the arrays of a success."""
    outcomes, rows = [], {}
    while "success" not in outcomes and len(outcomes) < cfg.max_tries:
        # (the 0 has no meaning any more; without it all demonstrations would be others)
        rng = common.np_stream(cfg.demo_seed, "demo", env.suite, env.task_id, init_state, 0, len(outcomes))
        outcome, rows = attempt(env, init_state, cfg, rng, see)
        outcomes.append(outcome)
    return outcomes, rows


def file_attributes(env: TaskEnv) -> dict[str, str]:
    """The attributes of LIBERO's `data` group, the language as LIBERO's evaluations have it."""
    names = {"env_name": type(env.env).__name__, "problem_name": env.env.parsed_problem["problem_name"]}
    bddl = "/".join(["libero/libero/bddl_files", *Path(env.env.bddl_file_name).parts[-2:]])
    kwargs = {
        "robots": ["Panda"],
        "controller": "OSC_POSE",
        "camera_heights": env.image_size,
        "camera_widths": env.image_size,
    }
    return {
        "tag": "libero-v1",
        "macros_image_convention": "opengl",
        "env_name": names["env_name"],
        "bddl_file_name": bddl,
        "problem_info": json.dumps(
            {"domain_name": "robosuite", "language_instruction": env.instruction} | names
        ),
        "env_args": json.dumps({"type": 1, "bddl_file": bddl, "env_kwargs": kwargs} | names),
    }


def task_file(cfg: Config, suite: str, task: int) -> Path:
    return cfg.data_dir / suite / f"task_{task:02d}.hdf5"


def tries_file(cfg: Config, suite: str, task: int) -> Path:
    return cfg.data_dir / "tries" / f"{suite}-{task}.json"


def record_task(job: tuple[Config, str, int]) -> None:
    """Worker: record the demonstrations of one task into a file, and beside it what became of every try."""
    cfg, suite, task = job
    tries, content = [], io.BytesIO()  # in memory until it is whole: on a full disk HDF5 itself crashes
    with (
        contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env,
        h5py.File(content, "w") as file,
    ):
        data = file.create_group("data")
        for init_state in common.init_states("demos", cfg.n_init):
            outcomes, rows = try_until_success(env, init_state, cfg)
            success_step = rows.pop("success_step", None)
            tries.append(
                {"outcomes": outcomes, "steps": len(rows.get("actions", ())), "success_step": success_step}
            )
            if rows:
                demo = data.create_group(f"demo_{len(data)}")
                write_demo(demo, rows)
                demo.attrs.update(  # not LIBERO's
                    {
                        "init_state_id": init_state,
                        "success_step": success_step,
                        "target_places": target_places(env, init_state),
                    }
                )
        size = {"num_demos": len(data), "total": sum(summary["steps"] for summary in tries)}
        data.attrs.update(file_attributes(env) | size)
    disk.write_json(tries_file(*job), tries)  # first: a task whose file is there is done
    disk.write_atomic(task_file(*job), content.getvalue())


def write_demo(demo: h5py.Group, rows: dict[str, np.ndarray]) -> None:
    """Arrays by dataset name, and what LIBERO's files say of them."""
    steps = len(rows["actions"])
    demo.attrs.update({"num_samples": steps, "init_state": rows["states"][0]})
    last = (np.arange(steps) == steps - 1).astype(np.uint8)
    for key, value in (rows | {"rewards": last, "dones": last}).items():
        demo.create_dataset(key, data=value, compression="gzip" if value.dtype == np.uint8 else None)


# ------------------------------------------------------------------------------------------------------- main
def record(cfg: Config) -> list[dict]:
    """Record all tasks in `workers` processes; returns what became of the demonstrations of each."""
    jobs = [(cfg, suite, task) for suite, task in tasks(cfg)]
    for folder in (cfg.data_dir / "tries", *(cfg.data_dir / suite for suite in cfg.suites)):
        folder.mkdir(exist_ok=True)
    workers.run_missing(record_task, {task_file(*job): job for job in jobs}, cfg.workers, "demos")
    return [
        {"suite": suite, "task": task} | statistics(disk.read_json(tries_file(cfg, suite, task)))
        for _, suite, task in jobs
    ]


def statistics(demos: list[dict]) -> dict:
    """What became of the demonstrations of one task."""
    kept, tries = [d for d in demos if d["steps"]], [outcome for d in demos for outcome in d["outcomes"]]
    return {
        "demos": len(demos),
        "kept": len(kept),
        "first_try": sum(d["outcomes"] == ["success"] for d in demos),
        "missed_grasp": tries.count("missed grasp"),
        "no_success": tries.count("no success"),
        "crash": tries.count("crash"),
        "steps": round(sum(d["steps"] for d in kept) / max(len(kept), 1), 1),
        "success_step": round(sum(d["success_step"] for d in kept) / max(len(kept), 1), 1),
    }


def source_file(cfg: Config, suite: str, task: int) -> Path:
    """The file of `source` for a task, by the task's name, or by its number where another run made it."""
    names = (suite_of(suite).get_task(task).name + ENDING, f"task_{task:02d}.hdf5")
    places = (suite, f"{suite}_no_noops", "")  # the last not for a layout: its tasks have its suite's names
    folders = [Path(cfg.source) / place for place in places if place or suite not in common.LAYOUTS]
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    refuse(
        len(found) != 1,
        f"source: {folders[0]} holds {len(found)} files {' or '.join(names)}, but one is needed"
        + (f" of {' and '.join(map(str, found))}: name its folder" if found else ""),
    )
    return found[0]


def adopted(cfg: Config) -> list[dict]:
    """What each file of `source` gives; UserError unless later stages can take them all."""
    rows = []
    for suite, task in tasks(cfg):
        path = source_file(cfg, suite, task)
        demos = list(read_demos(path, task))
        again = "get it again, or leave the task out with tasks="
        refuse(not demos, f"source: {path} holds no demonstration; {again}")
        of, size = demos[0].instruction, max(demo.agentview.size for demo in demos)
        refuse(of != instruction(suite, task), f"source: {path} is of another task, {of!r}; {again}")
        refuse(
            any(demo.agentview.size != cfg.image_size for demo in demos),
            f"{path} has images of {size} px: set image_size={size} for this stage (02 and 04 keep theirs)",
        )
        rows.append(
            {
                "suite": suite,
                "task": task,
                "kept": len(demos),
                "steps": sum(len(demo.actions) for demo in demos),
                "no_ops": sum(demo.no_ops for demo in demos),
            }
        )
    return rows


def check_upright(cfg: Config) -> None:
    """UserError if images from elsewhere are turned or mirrored beside the simulator's.

    Looks at one demonstration of each suite. Scene and arm are the same in all of a task's init states.
    """
    # a run of the kit names its files otherwise
    others = [task for task in tasks(cfg) if source_file(cfg, *task).name.endswith(ENDING)]
    for suite, task in dict(others).items():  # the last of each suite
        path = source_file(cfg, suite, task)
        theirs = next(read_demos(path, task)).agentview[0].mean(2)  # (S, S)
        with contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env:
            env.reset(0)
            ours = env.frame("agentview").mean(2)
        alike = {name: np.corrcoef(theirs[turn].ravel(), ours.ravel())[0, 1] for name, turn in TURNS.items()}
        way = max(alike, key=alike.get)
        refuse(
            way != "upright",
            f"{path} has images that are {way} beside LIBERO's own files (correlation with the simulator's "
            f"{alike[way]:.2f}, as they are {alike['upright']:.2f}): turn obs/agentview_rgb and "
            "obs/eye_in_hand_rgb back",
        )


def adopt(cfg: Config) -> list[dict]:
    """Link the files of `source` to where later stages look."""
    rows = adopted(cfg)
    check_upright(cfg)
    for row in rows:
        link = task_file(cfg, row["suite"], row["task"])
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source_file(cfg, row["suite"], row["task"]).absolute())
    return rows


def main(cfg: Config, run: stage.Run) -> dict:
    if not (run.dir / "demos.json").is_file():  # written when every task's file is there
        rows = adopt(cfg) if cfg.source else record(cfg)
        disk.write_atomic(run.dir / "demos.json", json.dumps(rows, indent=1) + "\n")  # columns in this order
    shutil.rmtree(run.dir / "tries", ignore_errors=True)
    rows = disk.read_json(run.dir / "demos.json")
    for line in [rows[0].keys(), *(row.values() for row in rows)]:
        print("  ".join(f"{cell:>12}" for cell in line))
    return {"kept": sum(row["kept"] for row in rows)}


if __name__ == "__main__":
    stage.start(main, Config)
