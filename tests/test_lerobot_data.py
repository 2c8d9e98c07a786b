"""LeRobotDatasets, by way of extras/from_lerobot.py: lerobot's own files, and spoilt ones.

Needs the extra: pip install -e '.[lerobot-data]'
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_demo_files import adopt, pictures  # noqa: F401 (a fixture)
from write_lerobot import EPISODES, NOOP, SENTENCES, SIZE, numbers, picture

from runtime.errors import UserError
from sim.demos import read_demos

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from extras import from_lerobot  # noqa: E402

FORMATS = ("v30_video", "v30_image", "v21_video", "v21_image")
FIXTURES = Path(__file__).parent / "fixtures"
FILES = (
    "libero_object/pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5",
    "libero_goal/turn_on_the_stove_demo.hdf5",
)


@pytest.mark.parametrize("name", FORMATS)
def test_what_lerobots_own_writer_wrote_is_read(name, tmp_path, capsys):
    """From files of lerobot 0.6.1 and 0.3.3 to what 01 sees, by way of 00."""
    from_lerobot.main(str(FIXTURES / f"lerobot_{name}"), str(tmp_path / "files"))
    assert "3 of 3 episodes, of 2 tasks," in capsys.readouterr().out
    assert {str(p.relative_to(tmp_path / "files")) for p in (tmp_path / "files").rglob("*.hdf5")} == set(
        FILES
    )
    cfg = adopt(
        tmp_path / "files", tmp_path, suites=["libero_object", "libero_goal"], tasks=[7], image_size=SIZE
    )
    assert [row["no_ops"] for row in json.loads((cfg.data_dir / "demos.json").read_text())] == [2, 1]
    got = [demo for file in FILES for demo in read_demos(tmp_path / "files" / file, 0)]
    for demo, episode in zip(got, (0, 2, 1), strict=True):
        actions, state = numbers(episode)
        kept = [step for step in range(EPISODES[episode][1]) if step != NOOP]
        assert np.array_equal(demo.actions, actions[kept]) and np.array_equal(demo.state, state[kept])
        assert demo.instruction == SENTENCES[EPISODES[episode][0]]
        for film, wrist in ((demo.agentview, False), (demo.wrist, True)):
            want = np.stack([picture(episode, step, wrist) for step in kept])
            off = np.abs(film[:].astype(int) - want)
            assert not off.any() if name.endswith("image") else off.mean() < 4, off.mean()


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / f"lerobot_{name}", tmp_path / "source"))


def info_with(folder: Path, change) -> None:
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def column(folder: Path, name: str, change) -> None:
    (path,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(path)
    rows = np.array(table[name].to_pylist())
    change(rows)
    pq.write_table(table.set_column(table.column_names.index(name), name, [rows.tolist()]), path)


def one_episode(folder: Path, actions: np.ndarray, state: np.ndarray) -> Path:
    zeros = [0] * len(actions)
    table = {"episode_index": zeros, "task_index": zeros, "action": actions.tolist(), "state": state.tolist()}
    (folder / "data" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "data" / "chunk-000" / "file-000.parquet")
    return folder


def joints(rows):
    rows[:, 6] = 0.8


def zero_or_one(rows):
    rows[:, 6] = rows[:, 6] > 0


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "format v1.6": lambda f: info_with(f, lambda i: i.update(codebase_version="v1.6")),
    "no column observation.state or state": lambda f: info_with(
        f, lambda i: i["features"].pop("observation.state")
    ),
    "holds 24 of 99 steps": lambda f: info_with(f, lambda i: i.update(total_frames=99)),
    "images of shapes": lambda f: info_with(
        f, lambda i: i["features"]["observation.images.image"].update(shape=[3, 128, 128])
    ),
    "lacks frames from": lambda f: info_with(f, lambda i: i.update(fps=40)),
    "another state than LIBERO's": lambda f: column(f, "observation.state", joints),
    "beyond [-1, 1]": lambda f: column(f, "action", lambda a: a.__imul__(30)),
    "no gripper command below 0": lambda f: column(f, "action", lambda a: a[:, 6].clip(0.2, out=a[:, 6])),
    "fingers that open at 1": lambda f: column(f, "action", lambda a: a[:, 6].__imul__(-1)),
    "which closes them": lambda f: column(f, "action", zero_or_one),
    "not finite": lambda f: column(f, "action", lambda a: a[3].fill(np.nan)),
    "several tasks": lambda f: column(f, "task_index", lambda t: t[3:].fill(1)),
    "steps in two places": lambda f: column(f, "episode_index", lambda e: e[::2].fill(0)),
    "not a whole LeRobotDataset": lambda f: (f / "meta" / "tasks.parquet").unlink(),
    "not a whole LeRobotDataset, or": lambda f: cut(next(f.glob("videos/*image2/*/*.mp4"))),
    "not a whole LeRobotDataset, or ": lambda f: cut(next(f.glob("data/*/*.parquet"))),
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_dataset_that_is_not_what_it_seems_is_refused_and_nothing_written(line, tmp_path):
    folder = copy_of("v30_video", tmp_path)
    FAULTS[line](folder)
    with pytest.raises(UserError) as error:
        from_lerobot.main(str(folder), str(tmp_path / "target"))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_gripper_that_opens_at_1_and_closes_at_0_is_turned(tmp_path):
    def as_oxe(actions):
        actions[:, 6] = (1 - actions[:, 6]) / 2

    column(folder := copy_of("v30_video", tmp_path), "action", as_oxe)
    for source, target in ((FIXTURES / "lerobot_v30_video", "theirs"), (folder, "oxe")):
        from_lerobot.main(str(source), str(tmp_path / target))
    for file in FILES:
        theirs, oxe = ([*read_demos(tmp_path / name / file, 0)] for name in ("theirs", "oxe"))
        assert all(np.array_equal(a.actions, b.actions) for a, b in zip(theirs, oxe, strict=True))


@pytest.mark.parametrize(("command", "apart"), [(1, 0.08), (0, 0.08), (0, 0.0)])
def test_an_episode_with_one_gripper_command_alone_is_turned_too(command, apart, tmp_path, monkeypatch):
    """Of ones alone the fingers tell: those far apart were told to open, as in OXE."""
    state = np.zeros((5, 8), np.float32)
    state[:, 6], state[:, 7] = apart / 2, -apart / 2
    actions = np.full((5, 7), command, np.float32)
    seen = []
    monkeypatch.setattr(from_lerobot, "check_meaning", lambda whose, actions, state: seen.append(actions))
    folder = one_episode(tmp_path, actions, state)
    from_lerobot.read_numbers(folder, {"action": "action", "state": "state"}, 5)
    assert (seen[0][:, 6] == 1 - 2 * command).all()


def test_ones_that_close_the_fingers_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(from_lerobot, "check_meaning", lambda *_: None)
    folder = one_episode(tmp_path, np.ones((5, 7), np.float32), np.zeros((5, 8), np.float32))
    (_, actions, _) = from_lerobot.read_numbers(folder, {"action": "action", "state": "state"}, 5)[0]
    assert (actions[:, 6] == 1).all()


def test_a_layout_is_no_suite_here(tmp_path):
    with pytest.raises(UserError, match="libero_object_look"):
        from_lerobot.main("x", str(tmp_path / "y"), "libero_object_look")


def test_other_suites_and_sentences_of_several_tasks(tmp_path):
    source, target = FIXTURES / "lerobot_v21_image", tmp_path / "target"
    with pytest.raises(UserError, match="no episode of these suites"):
        from_lerobot.main(str(source), str(target), "libero_10")
    with pytest.raises(UserError, match="did you mean 'libero_goal'"):
        from_lerobot.main(str(source), str(target), "libero_goals")
    with pytest.raises(UserError, match=r"KITCHEN_SCENE3_turn_on_the_stove.* does not say which"):
        from_lerobot.main(str(source), str(target), "libero_goal", "libero_90")
    from_lerobot.main(str(source), str(target), "libero_goal")
    assert [path.name for path in target.iterdir()] == ["libero_goal"]
    with pytest.raises(UserError, match="must be a new folder"):
        from_lerobot.main(str(source), str(target))
    with pytest.raises(UserError, match="usage"):
        from_lerobot.main(str(source))


def test_without_the_extra_its_name_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(from_lerobot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"av, pyarrow is not installed; run: pip install -e '.\[lerobot-data\]'"
    ):
        from_lerobot.main("x", str(tmp_path / "target"))
