"""Tiny LeRobotDatasets by lerobot's own writer: tests/fixtures/lerobot_*, for tests/test_lerobot_data.py.

    PYTHON tests/write_lerobot.py tests/fixtures v30_video v30_image      with lerobot 0.6.1 (format v3.0)
    PYTHON tests/write_lerobot.py tests/fixtures v21_video v21_image      with lerobot 0.3.3 (format v2.1)

PYTHON belongs to another environment, since the kit does not install lerobot. Columns are named as in the
published sets: v21_image as physical-intelligence/libero, the others as lerobot/libero. What the episodes
hold is a function of episode and step, so the tests know it without the files.
"""

import sys
from pathlib import Path

import numpy as np

SIZE = 64
SENTENCES = (
    "pick up the milk and place it in the basket",
    "turn on the stove",
)  # libero_object 7, libero_goal 7
EPISODES = ((0, 9), (1, 7), (0, 8))  # (sentence, steps)
NOOP = 4  # this step of every episode does nothing
NAMES = {  # agent view, wrist, state, action
    "v21_image": ("image", "wrist_image", "state", "actions"),
    "other": ("observation.images.image", "observation.images.image2", "observation.state", "action"),
}


def numbers(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions (T, 7) and states (T, 8): the gripper opens, and closes from step 5 on."""
    steps = np.arange(EPISODES[episode][1])
    closed = steps >= 5
    actions = np.zeros((len(steps), 7), np.float32)
    actions[:, 0], actions[:, 1], actions[:, 6] = (steps + 1) / 100, episode / 10, np.where(closed, 1, -1)
    actions[NOOP, :6] = 0
    finger = 0.02 + 0.004 * np.minimum(steps, 5) - 0.01 * np.clip(steps - 5, 0, 3)
    state = np.stack(
        [steps / 50, 0 * steps, 1 + 0 * steps, 3 + 0 * steps, 0 * steps, 0 * steps, finger, -finger], 1
    )
    return actions, state.astype(np.float32)


def picture(episode: int, step: int, wrist: bool) -> np.ndarray:
    """A frame as policies see it (S, S, 3): red grows to the right, green downwards."""
    row, column = np.mgrid[:SIZE, :SIZE]
    blue = np.full((SIZE, SIZE), 40 * episode + 10 * step + 60 * wrist)
    return np.stack([3 * column + step, 3 * row + 10, blue], -1).astype(np.uint8)


def write(folder: Path, name: str) -> None:
    import lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    agent, wrist, state, action = names = NAMES.get(name, NAMES["other"])
    kind = name.partition("_")[2]
    image = {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channel"]}
    rows = [{"dtype": "float32", "shape": (n,), "names": [key]} for key, n in ((state, 8), (action, 7))]
    features = dict(zip(names, (image, image, *rows), strict=True))
    where = {"repo_id": f"local/{name}", "root": folder / f"lerobot_{name}"}
    data = LeRobotDataset.create(
        fps=10, robot_type="panda", use_videos=kind == "video", features=features, **where
    )
    for episode, (task, steps) in enumerate(EPISODES):
        actions, states = numbers(episode)
        for step in range(steps):
            frame = {agent: picture(episode, step, False), wrist: picture(episode, step, True)}
            frame |= {state: states[step], action: actions[step]}
            if lerobot.__version__.startswith("0.3"):
                data.add_frame(frame, task=SENTENCES[task])
            else:
                data.add_frame(frame | {"task": SENTENCES[task]})
        data.save_episode()
    if hasattr(data, "finalize"):
        data.finalize()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write(Path(sys.argv[1]), name)
