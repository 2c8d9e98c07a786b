"""A LeRobotDataset of LIBERO as the HDF5 files that 00 takes.

    pip install -e '.[lerobot-data]'
    python -m extras.from_lerobot SOURCE TARGET [SUITE ...]

SOURCE is a folder in format v2.0, v2.1 or v3.0, with images as mp4 or as PNG in parquet: lerobot/libero,
HuggingFaceVLA/libero, physical-intelligence/libero. Without a SUITE the four suites of ten tasks are taken,
as far as SOURCE holds them. TARGET gets one file per task, in the layout of OpenVLA's files.

All but the images is read and checked first; then one episode at a time is in memory. TARGET appears when all
of it is written. A step takes 0.4 MB at 256 px: images are not compressed, so that 01 finds each at once.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

import common
from runtime import UserError, one_line, one_of, refuse, stage, workers
from sim.demos import ENDING, check_meaning
from sim.env import instruction, suite_of, task_count

with contextlib.suppress(ModuleNotFoundError):  # main says so
    import av
    import pyarrow.parquet as pq

NAMES = {  # what the kit needs -> what published sets call it
    "agentview": ("observation.images.image", "image"),
    "wrist": (
        "observation.images.image2",
        "observation.images.wrist_image",
        "wrist_image",
    ),
    "state": ("observation.state", "state"),
    "action": ("action", "actions"),
}
ERRORS = (
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


class Episode(NamedTuple):
    number: int
    file: str  # <suite>/<name of the task>_demo.hdf5
    actions: np.ndarray  # (T, 7)
    state: np.ndarray  # (T, 8)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what the libraries say of a damaged dataset, and ours of a missing key, into a UserError."""
    try:
        yield
    except ERRORS as error:
        why = f"is not a whole LeRobotDataset ({one_line(error)})"
        raise UserError(f"{folder} {why}; download it again") from error


def open_source(folder: Path) -> tuple[dict, dict[str, str]]:
    """info.json, and the dataset's name of each column of NAMES."""
    with reading(folder):
        info = json.loads((folder / "meta" / "info.json").read_text(encoding="utf-8"))
        version, known = info["codebase_version"], list(info["features"])
        refuse(
            version not in ("v2.0", "v2.1", "v3.0"),
            f"{folder} has format {version}, not v2.0, v2.1 or v3.0",
        )
    columns = {what: [name for name in names if name in known] for what, names in NAMES.items()}
    for what, found in columns.items():
        names = " or ".join(NAMES[what])
        refuse(
            len(found) != 1,
            f"{folder} needs one column {names}, but has {', '.join(known)}",
        )
    return info, {what: found[0] for what, found in columns.items()}


def sentences(folder: Path) -> dict[int, str]:
    """The instruction of each task number."""
    if (folder / "meta" / "tasks.parquet").is_file():  # v3.0
        rows = pq.read_table(folder / "meta" / "tasks.parquet").to_pylist()
    else:
        lines = (folder / "meta" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    return {row.pop("task_index"): " ".join(next(iter(row.values())).lower().split()) for row in rows}


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/*/*.parquet"))


def read_episodes(folder: Path, info: dict, columns: dict, tasks: dict[str, list[str]]) -> list[Episode]:
    """The episodes of `tasks` (instruction -> files to write), in the dataset's order, checked."""
    named, found, frames = sentences(folder), [], 0
    for path in data_files(folder):
        names = ["episode_index", "task_index", columns["action"], columns["state"]]
        number, task, *rows = (column.to_pylist() for column in pq.read_table(path, columns=names))
        actions, state = (np.array(x, np.float32) for x in rows)
        frames += len(number)
        refuse(
            number != sorted(number),
            f"{path}: the episodes are mixed; download it again",
        )
        for episode, first, n in zip(*np.unique(number, True, return_counts=True), strict=True):
            files = tasks.get(named[task[first]], [])
            several = f"{named[task[first]]!r} may be any of {', '.join(files)}; take other suites"
            refuse(
                len(files) > 1,
                f"{folder} does not say which task an episode is of: {several}",
            )
            ours = slice(first, first + n)
            found += [Episode(int(episode), file, actions[ours], state[ours]) for file in files]
    refuse(
        frames != info["total_frames"],
        f"{folder} lacks files: it holds {frames} of {info['total_frames']} steps",
    )
    refuse(
        not found,
        f"{folder} has no episode of these suites; its instructions are like {[*named.values()][:1]}",
    )
    for episode in found:
        check_episode(f"{folder}: episode {episode.number} has", episode.actions, episode.state)
    return found


def check_episode(whose: str, actions: np.ndarray, state: np.ndarray) -> None:
    """UserError unless actions and state are what LIBERO's are."""
    shapes, n = (actions.shape, state.shape), len(actions)
    refuse(
        shapes != ((n, 7), (n, 8)),
        f"{whose} actions and states of {shapes}, not of 7 and 8 numbers",
    )
    finite = np.isfinite(actions).all() and np.isfinite(state).all()
    refuse(not finite, f"{whose} values that are not finite; download it again")
    left, right = state[:, 6], state[:, 7]
    fingers = left.min() > -0.01 and left.max() < 0.05 and right.min() > -0.05 and right.max() < 0.01
    refuse(
        not fingers or np.abs(state[:, :3]).max() > 2,
        f"{whose} another state than LIBERO's: position and rotation of the hand, the two fingers in metres",
    )
    check_meaning(whose, actions, state)


# ----------------------------------------------------------------------------------------------------- images
def clip(path: Path, start: float, steps: int, fps: float) -> np.ndarray:
    """The frames (steps, S, S, 3) of a video from `start` seconds on."""
    frames = {}
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        video.seek(int(start / stream.time_base), stream=stream)  # to a key frame at or before it
        for frame in video.decode(stream):
            step = round((frame.time - start) * fps)
            if 0 <= step < steps:
                frames[step] = frame.to_ndarray(format="rgb24")
            if step >= steps - 1:
                break
    refuse(
        len(frames) != steps,
        f"{path} lacks frames from {start:.2f} s on; download it again",
    )
    return np.stack([frames[step] for step in range(steps)])


def video_places(folder: Path, info: dict, key: str) -> dict[int, tuple[Path, float]]:
    """The file of each episode's video, and the second at which it begins there."""
    rows, names = (
        [],
        [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")],
    )
    for path in folder.glob("meta/episodes/*/*.parquet"):  # v3.0: many episodes in a file
        rows += pq.read_table(path, columns=["episode_index", *names]).to_pylist()
    where = {
        row["episode_index"]: (
            {"chunk_index": row[names[0]], "file_index": row[names[1]]},
            row[names[2]],
        )
        for row in rows
    }
    if not rows:
        size = info["chunks_size"]
        where = {
            n: ({"episode_chunk": n // size, "episode_index": n}, 0.0) for n in range(info["total_episodes"])
        }
    return {
        n: (folder / info["video_path"].format(video_key=key, **its), at) for n, (its, at) in where.items()
    }


def pictures(folder: Path, info: dict, key: str, episodes: list[Episode]) -> Iterator[np.ndarray]:
    """The frames (T, S, S, 3) of a camera, episode by episode."""
    with reading(folder):
        if info["features"][key]["dtype"] == "video":
            places = video_places(folder, info, key)
            for episode in episodes:
                yield clip(*places[episode.number], len(episode.actions), info["fps"])
        else:
            wanted = {episode.number for episode in episodes}
            for number, cells in itertools.groupby(png_files(folder, key), key=lambda row: row[0]):
                if number in wanted:
                    yield np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for _, cell in cells])


def png_files(folder: Path, key: str) -> Iterator[tuple[int, dict]]:
    """(episode, cell) of all steps, a few at a time in memory."""
    for path in data_files(folder):
        for batch in pq.ParquetFile(path).iter_batches(16, columns=["episode_index", key]):
            yield from zip(*(column.to_pylist() for column in batch), strict=True)


# ------------------------------------------------------------------------------------------------------- main
def write(folder: Path, episodes: list[Episode], films: list[Iterator[np.ndarray]]) -> int:
    """Write the files of all tasks; returns the images' size."""
    files = {}
    with contextlib.ExitStack() as stack:
        for episode, *views in zip(workers.progress(episodes, unit="episode"), *films, strict=True):
            size = views[0].shape[1]
            image = (len(episode.actions), size, size, 3)
            wrong = any(view.shape != image or view.dtype != np.uint8 for view in views)
            refuse(
                wrong,
                f"episode {episode.number} has images of {[v.shape[1:] for v in views]}, not {image[1:]}",
            )
            if episode.file not in files:
                (folder / episode.file).parent.mkdir(exist_ok=True)
                file = files[episode.file] = stack.enter_context(h5py.File(folder / episode.file, "w"))
                file.create_group("data").attrs["macros_image_convention"] = "opengl"  # upside down
            demo = files[episode.file]["data"].create_group(f"demo_{len(files[episode.file]['data'])}")
            rows = np.split(episode.state, [3, 6], axis=1)
            rows += [view[:, ::-1, ::-1] for view in views]
            names = (
                "ee_pos",
                "ee_ori",
                "gripper_states",
                "agentview_rgb",
                "eye_in_hand_rgb",
            )
            for name, row in zip(names, rows, strict=True):
                demo[f"obs/{name}"] = row
            demo["actions"] = episode.actions
    return size


def main(source: str = "", target: str = "", *suites: str) -> None:
    refuse(not target, "usage: python -m extras.from_lerobot SOURCE TARGET [SUITE ...]")
    for name in ("av", "pyarrow"):
        missing = importlib.util.find_spec(name) is None
        refuse(
            missing,
            f"the package {name} is not installed; run: pip install -e '.[lerobot-data]'",
        )
    folder, target, tasks = Path(source), Path(target), {}
    refuse(target.exists(), f"{target} is there already; remove it, or name another folder")
    refuse(
        not target.absolute().parent.is_dir(),
        f"there is no folder {target.absolute().parent}; make it first",
    )
    for suite in suites or common.SUITES[:4]:
        one_of("suite", suite, common.MAX_STEPS)
        for task in range(task_count(suite)):
            name = f"{suite}/{suite_of(suite).get_task(task).name}{ENDING}"
            tasks.setdefault(instruction(suite, task).lower(), []).append(name)
    info, columns = open_source(folder)
    with reading(folder):
        episodes = read_episodes(folder, info, columns, tasks)
        size = max(info["features"][columns["agentview"]]["shape"])
        steps = sum(len(episode.actions) for episode in episodes)
    need, free = (
        2 * 3 * size**2 * steps,
        shutil.disk_usage(target.absolute().parent).free,
    )
    refuse(
        need > free,
        f"{target} will take {need / 1e9:.1f} GB, but {free / 1e9:.1f} are free; name fewer suites",
    )
    films = [pictures(folder, info, columns[camera], episodes) for camera in common.CAMERAS]
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as temporary:
        size = write(Path(temporary), episodes, films)
        Path(temporary).chmod(0o755)
        Path(temporary).rename(target)
        Path(temporary).mkdir()  # for TemporaryDirectory to remove
    files = sorted({episode.file for episode in episodes})
    suites = ",".join(sorted({file.partition("/")[0] for file in files}))
    print(
        f"{len(episodes)} episodes of {len(files)} tasks are in {target}; name these with tasks= if some are missing"
    )
    print(f"python 00_demos.py CONFIG demos.source={target} suites=[{suites}] image_size={size}")


if __name__ == "__main__":
    stage.command_line(lambda: main(*sys.argv[1:]))
