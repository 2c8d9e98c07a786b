"""Files of demonstrations, whoever made them: one reader for three layouts.

This kit's have obs/image_steps: the step before which each image stands. LIBERO's own hold each observation
*after* its action (create_dataset.py), so the reader pairs it with the next one. OpenVLA's
(regenerate_libero_dataset.py) hold it before its action, and no attributes; extras/from_lerobot.py writes
the same. Images are upside down ("opengl") in all of them.

Of files from elsewhere the reader leaves out the no-ops, as OpenVLA does. It takes the instruction from the
file's name, as LIBERO's evaluations do: the sentence inside is another one in a quarter of the 130 tasks.
Images stay on disk until somebody looks at them.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from common import INIT_GROUPS
from runtime import disk, refuse

IN_MEMORY = 4 * 10**8  # bytes of a camera's images that a stage reads all at once; more stay on disk
ENDING = "_demo.hdf5"  # of LIBERO's names, and of all who follow them


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read; what is wrong with it becomes a UserError."""
    with (
        disk.reading(
            path, "get it again, or record it with 00_demos.py", "is not a complete LIBERO HDF5 file"
        ),
        h5py.File(path, "r", locking=False) as file,
    ):
        yield file


@dataclass
class Film:
    """The frames (N, S, S, 3) of a camera in one demonstration, uint8, turned by 180 degrees."""

    path: Path
    name: str
    rows: np.ndarray  # (N,) their places in the file
    size: int

    def __getitem__(self, index) -> np.ndarray:
        """Read the frames of a number, a slice, or an array of increasing numbers."""
        with opened(self.path) as file:
            return np.ascontiguousarray(file[self.name][self.rows[index]][..., ::-1, ::-1, :])


class Films:
    """The frames of many demonstrations in a row, read when a batch selects them."""

    def __init__(self, films: list[Film]):
        self.films, self.ends = films, np.cumsum([len(film.rows) for film in films])

    def select(self, index: torch.Tensor) -> torch.Tensor:
        films = np.searchsorted(self.ends, index.numpy(), side="right")
        return torch.from_numpy(
            np.stack([self.films[k][i - self.ends[k]] for k, i in zip(films, index.tolist(), strict=True)])
        )


def frames(films: list[Film]) -> torch.Tensor | Films:
    """The frames (N, S, S, 3) of many demonstrations: a tensor, or Films where they exceed IN_MEMORY."""
    if sum(len(film.rows) * film.size**2 * 3 for film in films) > IN_MEMORY:
        return Films(films)
    return torch.from_numpy(np.concatenate([film[:] for film in films]))


@dataclass
class Demo:
    """One demonstration."""

    task: int
    number: int  # its number in the file
    init_state: int  # LIBERO init state it starts from; -1 where the file does not say (all but this kit's)
    instruction: str
    actions: np.ndarray  # (T, 7) environment units
    state: np.ndarray  # (T, 8) eef_pos, axis-angle, gripper_qpos, each before the action of its row
    image_steps: np.ndarray  # (N,) the step of each frame
    agentview: Film
    wrist: Film
    places: np.ndarray  # (2, 3) of the target, as sim.expert.target_places; NaN where the file has none
    no_ops: int  # steps of the file that are left out


def sentence(stem: str) -> str:
    """LIBERO's instruction for a task of this name."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", stem).replace("_", " ")


def acting(actions: np.ndarray) -> np.ndarray:
    """The steps that do something: the hand moves, or the gripper is told another thing than before."""
    moves, grip = np.linalg.norm(actions[:, :6], axis=1) >= 1e-4, actions[:, 6]
    acts = moves | (np.diff(grip, prepend=grip[:1]) != 0)
    return np.flatnonzero(acts & np.logical_or.accumulate(moves))  # nothing before the first movement


def check_finite(whose: str, *arrays: np.ndarray) -> None:
    refuse(
        not all(np.isfinite(array).all() for array in arrays),
        f"{whose} values that are not finite; get it again, or record it with 00_demos.py",
    )


def check_meaning(whose: str, actions: np.ndarray, state: np.ndarray) -> None:
    """UserError unless all is finite and the actions are LIBERO's: in [-1, 1], of the gripper -1 to open."""
    check_finite(whose, actions, state)
    refuse(
        np.abs(actions).max() > 1 + 1e-6, f"{whose} actions beyond [-1, 1], LIBERO's range: scale them back"
    )
    grip, gap = actions[:, 6], state[:, 6] - state[:, 7]  # metres between the fingers
    refuse(
        0 <= grip.min() < grip.max(),
        f"{whose} no gripper command below 0: LIBERO's is -1 to open, 1 to close",
    )
    # a gap that is not in metres tells nothing
    closes = (np.diff(gap) * grip[:-1]).sum() < 0.01 or gap.min() < -0.01 or gap.max() > 0.1
    refuse(
        not closes, f"{whose} fingers that open at 1, which closes them in LIBERO; change the command's sign"
    )


def read_demos(path: Path, task: int) -> Iterator[Demo]:
    """Demonstrations of a LIBERO HDF5 file of any of the three layouts.

    Raises:
        UserError: no HDF5 file, truncated, keys missing, or values not finite or of another meaning.
    """
    with opened(path) as file:
        data, real = file["data"], path
        while not real.name.endswith(ENDING) and real.is_symlink():  # 00 links files from elsewhere
            real = real.parent / real.readlink()
        convention = data.attrs.get("macros_image_convention", "opengl")
        refuse(
            convention not in ("opengl", b"opengl"),
            f"{path} has {convention!r} images, not 'opengl' ones; make it again",
        )
        if real.name.endswith(ENDING):
            instruction = sentence(real.name.removesuffix(ENDING))
        else:
            text = json.loads(data.attrs["problem_info"])["language_instruction"]
            instruction = text if isinstance(text, str) else " ".join(text)
        for number, name in sorted((int(name.rpartition("_")[2]), name) for name in data):
            group = data[name]
            obs, actions = group["obs"], group["actions"][()].astype(np.float32)
            state = np.concatenate([obs[k][()] for k in ("ee_pos", "ee_ori", "gripper_states")], axis=1)
            steps = obs["image_steps"][()] if "image_steps" in obs else np.arange(len(actions))
            images = [obs[key] for key in ("agentview_rgb", "eye_in_hand_rgb")]
            size, bad = images[0].shape[1], f"{path}: {name} has"
            check_finite(bad, actions, state)  # also of steps that do nothing, which are left out below
            image = (len(steps), size, size, 3)
            as_usual = (
                (actions.shape[1:], state.shape) == ((7,), (len(actions), 8))
                and all(i.shape == image and i.dtype == np.uint8 for i in images)
                and steps.dtype.kind in "iu"
                and (len(steps) > 0 and steps.min() >= 0 and steps.max() < len(actions))
            )
            refuse(not as_usual, f"{bad} unexpected shapes; is this a LIBERO demonstration file?")
            rows, no_ops, state = np.arange(len(steps)), 0, state.astype(np.float32)
            if "image_steps" not in obs:
                late = int("problem_info" in data.attrs)  # after its action, unless the arm's joints tell
                if "states" in group and "joint_states" in obs:  # states: time, the arm's joints, ...; before
                    joints, states = obs["joint_states"][:-1], group["states"][:, 1:8]
                    late = int(np.abs(joints - states[1:]).sum() < np.abs(joints - states[:-1]).sum())
                actions, state = actions[late:], state[: len(state) - late]
                rows = acting(actions)
                refuse(not len(rows), f"{bad} no step in which the robot moves; leave it out")
                no_ops, steps = len(actions) - len(rows), np.arange(len(rows))
                actions, state = actions[rows], state[rows]
            check_meaning(bad, actions, state)
            films = [Film(path, i.name, rows, size) for i in images]
            yield Demo(
                task=task,
                number=number,
                init_state=int(group.attrs.get("init_state_id", -1)),
                instruction=instruction,
                actions=actions,
                state=state,
                image_steps=steps,
                agentview=films[0],
                wrist=films[1],
                places=np.asarray(group.attrs.get("target_places", np.full((2, 3), np.nan)), np.float32),
                no_ops=no_ops,
            )


def demonstrations(cfg, holdout: int) -> Iterator[tuple[str, bool, Demo]]:
    """(suite, held out, demonstration) of all demonstrations of a run, always in this order.

    Held out are those from the last `holdout` init states of each task, where it has more than so many.

    Raises:
        UserError: there are none, one starts from another group's init state, or images differ in size.
    """
    sizes = set()
    for suite in cfg.suites:
        folder = cfg.data_dir / suite
        paths = [folder / f"task_{task:02d}.hdf5" for task in sorted(cfg.tasks)]
        paths = paths or sorted(folder.glob("task_*.hdf5")) or [folder / "task_00.hdf5"]
        for path in paths:
            refuse(not path.is_file(), f"{path} is not there; run 00_demos.py for this suite and task too")
        for path in paths:
            demos = list(read_demos(path, int(path.stem.rpartition("_")[2])))
            for demo in demos:
                refuse(
                    demo.init_state not in (-1, *INIT_GROUPS["demos"]),
                    f"{path}: demo_{demo.number} starts from init state {demo.init_state}, "
                    "which is kept for another purpose",
                )
            starts = [d.init_state if d.init_state >= 0 else d.number for d in demos]
            distinct = sorted(set(starts))
            held = distinct[len(distinct) - holdout :] if len(distinct) > holdout else []
            sizes |= {demo.agentview.size for demo in demos}
            refuse(len(sizes) > 1, f"{path}: images of {sorted(sizes)} pixels do not go together")
            yield from ((suite, start in held, demo) for start, demo in zip(starts, demos, strict=True))
    refuse(not sizes, f"no demonstrations in {cfg.data_dir} of {cfg.suites}, tasks {cfg.tasks or 'all'}")
