"""A LeRobotDataset of LIBERO as the HDF5 files that 00 takes.

    pip install -e '.[lerobot-data]'
    python -m extras.from_lerobot SOURCE TARGET [SUITE ...]

SOURCE is a folder in format v2.0, v2.1 or v3.0, with images as mp4 or as PNG in parquet: lerobot/libero,
HuggingFaceVLA/libero, physical-intelligence/libero. Without a SUITE the four suites of ten tasks are taken,
as far as SOURCE holds them. TARGET gets one file per task, in the layout of OpenVLA's files.

All but the images is read and checked first; then one episode at a time is in memory. TARGET appears when all
of it is written. A step takes 0.4 MB at 256 px: images are not compressed, so that 01 finds each at once.
"""

import importlib.util
import io
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

import common
from runtime import UserError, disk, one_line, one_of, refuse, stage, workers
from sim.demos import ENDING, check_meaning
from sim.env import suite_of

with suppress(ModuleNotFoundError):  # main says so
    import av
    import pyarrow.parquet as pq

NAMES = {  # what the kit needs -> what published sets call it
    "agentview": ("observation.images.image", "image"),
    "wrist": ("observation.images.image2", "observation.images.wrist_image", "wrist_image"),
    "state": ("observation.state", "state"),
    "action": ("action", "actions"),
}
OBSERVED = ("ee_pos", "ee_ori", "gripper_states", "agentview_rgb", "eye_in_hand_rgb")  # LIBERO's names


def read_info(folder: Path) -> tuple[dict, dict[str, str]]:
    """info.json, and the dataset's name of each column of NAMES."""
    info = json.loads(disk.read_text(folder / "meta" / "info.json"))
    version, known, columns = info["codebase_version"], list(info["features"]), {}
    refuse(version not in ("v2.0", "v2.1", "v3.0"), f"{folder} has format {version}, not v2.0, v2.1 or v3.0")
    for what, names in NAMES.items():
        columns[what] = next((name for name in names if name in known), None)
        refuse(not columns[what], f"{folder} has no column {' or '.join(names)}, but {', '.join(known)}")
    return info, columns


def read_sentences(folder: Path) -> dict[int, str]:
    """The instruction of each task number."""
    if (folder / "meta" / "tasks.parquet").is_file():  # v3.0
        rows = pq.read_table(folder / "meta" / "tasks.parquet").to_pylist()
    else:
        rows = map(json.loads, disk.read_text(folder / "meta" / "tasks.jsonl").splitlines())
    return {row.pop("task_index"): " ".join(next(iter(row.values())).lower().split()) for row in rows}


def read_numbers(folder: Path, columns: dict, total: int) -> dict[int, tuple[int, np.ndarray, np.ndarray]]:
    """Episode -> task number, actions (T, 7) and states (T, 8), in the order of the files, checked."""
    names, episodes = ["episode_index", "task_index", columns["action"], columns["state"]], {}
    for path in sorted(folder.glob("data/*/*.parquet")):
        rows = zip(*(column.to_pylist() for column in pq.read_table(path, columns=names)), strict=True)
        for number, of in itertools.groupby(rows, itemgetter(0)):
            _, tasks, *numbers = zip(*of, strict=True)
            actions, state = (np.array(x, np.float32) for x in numbers)
            whose, shapes = f"{folder}: episode {number} has", (actions.shape[1:], state.shape[1:])
            refuse(number in episodes, f"{whose} steps in two places; download it again")
            refuse(
                shapes != ((7,), (8,)), f"{whose} actions and states of shapes {shapes}, not (7,) and (8,)"
            )
            refuse(len({*tasks}) > 1, f"{whose} several tasks; split it")
            # as in OXE: 0 closes, 1 opens. Ones alone are OXE's too, if they leave the fingers 7 cm apart
            if {*actions[:, 6]} <= {0, 1} and (0 in actions[:, 6] or state[-1, 6] - state[-1, 7] > 0.07):
                actions[:, 6] = 1 - 2 * actions[:, 6]
            check_meaning(whose, actions, state)
            fingers = state[:, 6:] * [1, -1]
            refuse(
                fingers.min() < -0.01 or fingers.max() > 0.05 or abs(state[:, :3]).max() > 2,
                f"{whose} another state than LIBERO's: the hand's pose (6), two fingers in metres (2)",
            )
            episodes[number] = (tasks[0], actions, state)
    frames = sum(len(actions) for _, actions, _ in episodes.values())
    refuse(frames != total, f"{folder} lacks files: it holds {frames} of {total} steps; download it again")
    return episodes


# ----------------------------------------------------------------------------------------------------- images
def clip(path: Path, start: float, steps: int, fps: float) -> np.ndarray:
    """The frames (steps, S, S, 3) of a video from `start` seconds on."""
    with av.open(str(path)) as video:
        video.seek(int(start * av.time_base))  # to a key frame at or before it
        shown = itertools.takewhile(
            lambda frame: frame.time < start + (steps - 0.5) / fps, video.decode(video=0)
        )
        frames = {round((frame.time - start) * fps): frame.to_ndarray(format="rgb24") for frame in shown}
    refuse(set(range(steps)) - set(frames), f"{path} lacks frames from {start:.2f} s on; download it again")
    return np.stack([frames[step] for step in range(steps)])


def videos(folder: Path, info: dict, key: str, episodes: dict[int, int]) -> Iterator[np.ndarray]:
    """The frames (T, S, S, 3) of a camera, episode by episode. episodes: number -> T."""
    names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    where = {  # in v3.0; older formats keep one file per episode
        row["episode_index"]: [row[name] for name in names]
        for path in folder.glob("meta/episodes/*/*.parquet")
        for row in pq.read_table(path, columns=["episode_index", *names]).to_pylist()
    }
    for number, steps in episodes.items():
        chunk, file, start = where.get(number, (number // info["chunks_size"], number, 0.0))
        its = {"chunk_index": chunk, "file_index": file, "episode_chunk": chunk, "episode_index": number}
        yield clip(folder / info["video_path"].format(video_key=key, **its), start, steps, info["fps"])


def pngs(folder: Path, info: dict, key: str, episodes: dict[int, int]) -> Iterator[np.ndarray]:
    """The same of a dataset with images in parquet, a few of which are in memory at a time."""
    files = (  # in small buffers: else it holds whole row groups
        pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        for path in sorted(folder.glob("data/*/*.parquet"))
    )
    batches = (batch for file in files for batch in file.iter_batches(16, columns=["episode_index", key]))
    rows = (row for batch in batches for row in zip(*(c.to_pylist() for c in batch), strict=True))
    for number, cells in itertools.groupby(rows, itemgetter(0)):
        if number in episodes:
            yield np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for _, cell in cells])


# ------------------------------------------------------------------------------------------------------- main
def write(folder: Path, episodes: dict, of: dict[int, str], films: list[Iterator], size: int) -> None:
    """The files of all tasks. of: episode -> file."""
    names = "actions", *(f"obs/{name}" for name in OBSERVED)
    for number, *views in zip(workers.progress(of, unit="episode"), *films, strict=True):
        _, actions, state = episodes[number]
        seen, image = [view.shape for view in views], (len(actions), size, size, 3)
        refuse(seen != [image] * 2, f"episode {number} has images of shapes {seen}, not {image}")
        (folder / of[number]).parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / of[number], "a") as file:
            data = file.require_group("data")
            data.attrs["macros_image_convention"] = "opengl"  # upside down
            rows = (actions, *np.split(state, [3, 6], axis=1), *(view[:, ::-1, ::-1] for view in views))
            demo = data.create_group(f"demo_{len(data)}")
            for name, row in zip(names, rows, strict=True):
                demo[name] = row


def convert(source: Path, target: Path, tasks: dict[str, list[str]]) -> str:
    """Read, check and write; returns what to do next. tasks: instruction -> files to write."""
    (info, columns), sentences, of = read_info(source), read_sentences(source), {}
    episodes = read_numbers(source, columns, info["total_frames"])
    for number, (task, *_) in episodes.items():
        files = tasks.get(sentences[task], ())
        which = f"{sentences[task]!r} is the instruction of {' and '.join(files)}"
        refuse(len(files) > 1, f"{which}, and {source} does not say which: name other suites")
        of |= dict.fromkeys([number][: len(files)], *files)
    refuse(
        not of,
        f"{source} has no episode of these suites; one of its instructions is {min(sentences.values())!r}",
    )
    steps = {number: len(episodes[number][1]) for number in of}
    size = max(info["features"][columns["agentview"]]["shape"])
    videos_of = {key: info["features"][key]["dtype"] == "video" for key in map(columns.get, common.CAMERAS)}
    films = [(videos if video else pngs)(source, info, key, steps) for key, video in videos_of.items()]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        write(Path(temporary, "whole"), episodes, of, films, size)
        Path(temporary, "whole").rename(target)
    suites = ",".join(sorted({file.partition("/")[0] for file in of.values()}))
    return (
        f"{len(of)} of {len(episodes)} episodes, of {len({*of.values()})} tasks, are in {target}. Next:\n"
        f"python 00_demos.py CONFIG {shlex.quote(f'demos.source={target}')}"
        f" suites=[{suites}] image_size={size}"
    )


def main(source: str = "", target: str = "", *suites: str) -> None:
    refuse(not target, "usage: python -m extras.from_lerobot SOURCE TARGET [SUITE ...]")
    missing = [name for name in ("av", "pyarrow") if importlib.util.find_spec(name) is None]
    refuse(missing, f"{', '.join(missing)} is not installed; run: pip install -e '.[lerobot-data]'")
    place, tasks = Path(target).absolute(), {}
    refuse(place.exists() or not place.parent.is_dir(), f"{target} must be a new folder in one that exists")
    for suite in suites or common.SUITES[:4]:
        one_of("suite", suite, common.SUITES)  # no layout: its sentences are its suite's
        for task in suite_of(suite).tasks:
            tasks.setdefault(task.language.lower(), []).append(f"{suite}/{task.name}{ENDING}")
    try:
        print(convert(Path(source), place, tasks))
    except disk.UNREADABLE as error:  # of pyarrow, PyAV, Pillow and h5py
        why = f"is not a whole LeRobotDataset, or {target} can't be written ({one_line(error)})"
        raise UserError(f"{source} {why}") from error


if __name__ == "__main__":
    stage.command_line(lambda: main(*sys.argv[1:]))
