"""06 - Multi-view and temporal InfoNCE on the frozen vision tower, and what retrieval by it is worth.

reads   <run>/data/ (00), <run>/<backbone>/seed<k>/sft/ (01) or `checkpoint`
writes  <run>/<backbone>/seed<k>/head[-at<step>][-random]/: heads/<trained on>-<variant>.safetensors, agentview.npy
        and wrist.npy (pooled features), metrics.jsonl, rows.json, table.{json,md}, {loss,neighbours,map}.png, done.json
cost    the tower sees each image once; on what it gave 36 heads are trained (ten tasks), of 656,000 parameters at most
try     python 06_pretrain_head.py configs/tiny.yaml start=final
        python 06_pretrain_head.py configs/tiny.yaml start=final encoder=random

The paper's pretraining. An image becomes the mean of the tower's patches, the head maps it to a unit vector. The loss asks the
agent view at t to find, among the batch, the wrist view at t, and the agent view at t + 5 steps. Retrieval is by the agent view
alone, in four protocols:

    all frames          the head saw every frame, and the best neighbour may be the next frame of the same episode (the paper's)
    other episodes      the same head; neighbours come from other episodes
    held-out episodes   neither the head nor 01_sft.py saw the query's episode (the last init states); neighbours from the rest
    held-out tasks      the head never saw the query's task; neighbours come from other episodes of all tasks

The head comes in three variants: "paper"; "masked", where near anchors of one episode are no negatives, nor are their partners;
"corrected", which also standardises what comes in (over the training frames; folded into the first layer afterwards, so it is
the same head). Beside them: the head before training, the tower's features as they are and standardised, 8 x 8 pixels and
proprioception (both standardised), and chance, exactly. recall@k is the share of queries with
a right frame among the k nearest; right is one of the same task, of the same episode, or of the same moment (same task,
|dt| <= near). In "held-out tasks" only the head is new to the task: the tower was fine-tuned on all, unless encoder=random.

t + 5: the paper's frames are LIBERO's, one per step of 0.05 s. Here t counts steps too, and the partner is the image nearest to
t + gap: one image further on where every 4th step has one (t + 4), exactly 5 in the official files.
With torchrun, each process encodes its episodes and takes its rows of every batch (ranks.py).
Differs from the paper: pooling (contrastive.py), the tower is the SFT policy's; anchors are what the demonstrations hold.
Left out: augmentation, queues of negatives, approximate search.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import disk
import memory
import ranks
import runs
import stats
from contrastive import Head, info_nce, load_head, pooled, shuffle_weights, tower_of
from head_report import markdown, plot_losses, plot_map, plot_neighbours
from retrieval import AT, hits, nearest

CAMERAS = ("agentview", "wrist")
VARIANTS = {
    "paper": (False, False),
    "masked": (True, False),
    "corrected": (True, True),
}  # (negatives masked, input standardised)


@dataclass
class Config(common.RunConfig):
    encoder: str = "sft"  # or "random", the control: the same tower with the entries of each weight shuffled
    anchors: int = 30  # of an episode, evenly spaced
    gap: int = 5  # steps from an anchor to its temporal positive
    hidden: int = 512
    dim: int = 128
    temperature: float = 0.07
    temporal: float = 0.5  # weight of the temporal term; the views have the rest
    mask: int = (
        10  # in masked and corrected: frames of the same episode within so many steps are no negatives
    )
    epochs: int = 10
    batch_size: int = 128  # anchors
    lr: float = 3e-4  # cosine to 0
    weight_decay: float = 0.01
    near: int = 10  # steps within which two frames of a task are of the same moment
    holdout: int = (
        2  # init states of each task that are held out, the last ones; those of 01_sft.py when as many
    )
    folds: int = 10  # parts in which tasks are held out
    log_every: int = 10
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.one_of("head.encoder", self.encoder, ("sft", "random"))
        common.at_least(
            self, anchors=1, gap=1, hidden=1, dim=1, mask=0, epochs=1, batch_size=2, lr=0, near=0, holdout=0
        )
        common.at_least(self, folds=2, log_every=1, threads=1, temporal=0)
        common.divisible("head.batch_size", self.batch_size)
        if self.temporal > 1 or self.temperature <= 0:
            raise common.UserError("head.temporal must lie between 0 and 1, and head.temperature above 0")


# ------------------------------------------------------------------------------------------------------------------ data
@dataclass
class Frames:
    """What is known of the frames (N,) beside their features, and which are anchors (A,), by number."""

    suite: np.ndarray
    task: np.ndarray  # over all suites
    episode: np.ndarray
    step: np.ndarray
    held: np.ndarray  # bool: of a held-out episode
    state: np.ndarray  # (N, 8)
    pixels: np.ndarray  # (N, 192), the agent view at 8 x 8
    anchors: np.ndarray
    partners: np.ndarray  # (A,) the temporal positives


def choose(steps: np.ndarray, anchors: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the anchors among an episode's images (taken at `steps`), and of their partners: both (A,).

    The partner lies as many images ahead as come nearest to `gap` steps, one at least.
    """
    ahead = max(1, round(gap / float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    n = len(steps) - ahead  # images that have a partner
    chosen = (
        np.unique(np.linspace(0, n - 1, min(anchors, n)).round().astype(int)) if n > 0 else np.zeros(0, int)
    )
    return chosen, chosen + ahead


def used(demo: common.Demo, cfg: Config) -> np.ndarray:
    """Positions of the images that become frames: anchors, partners, and the last one, which shows the goal."""
    return np.unique(
        np.concatenate([*choose(demo.image_steps, cfg.anchors, cfg.gap), [len(demo.image_steps) - 1]])
    )


def shrink(images: np.ndarray, size: int = 8) -> np.ndarray:
    """uint8 (B, S, S, 3) -> (B, size * size * 3): means of blocks, what is left over at the border cut off."""
    b, s = len(images), images.shape[1] // size
    return (
        images[:, : s * size, : s * size]
        .reshape(b, size, s, size, s, 3)
        .mean((2, 4), dtype=np.float32)
        .reshape(b, -1)
    )


def list_frames(cfg: Config) -> Frames:
    rows, anchors, partners, n, tasks = [], [], [], 0, {}
    for episode, (suite, held, demo) in enumerate(common.demonstrations(cfg, cfg.holdout)):
        task = tasks.setdefault((suite, demo.task), len(tasks))  # counts over all suites
        kept = used(demo, cfg)
        a, b = choose(demo.image_steps, cfg.anchors, cfg.gap)
        anchors.append(n + np.searchsorted(kept, a))
        partners.append(n + np.searchsorted(kept, b))
        steps, k = demo.image_steps[kept], len(kept)
        of_episode = [np.full(k, value) for value in (suite, task, episode)]
        rows.append([*of_episode, steps, np.full(k, held), demo.state[steps], shrink(demo.agentview[kept])])
        n += k
    return Frames(
        *(np.concatenate(column) for column in zip(*rows, strict=True)),
        *map(np.concatenate, (anchors, partners)),
    )


# -------------------------------------------------------------------------------------------------------------- features
def is_whole(path: Path) -> bool:
    """Whether a table is there in its full length: opened for writing, NumPy would fill a shorter one up with zeros."""
    try:
        np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return False
    return True


@torch.no_grad()
def encode(cfg: Config, folder: Path, frames: Frames) -> dict[str, np.memmap]:
    """Pooled features (N, W) of both cameras, float32 files of the folder, memory-mapped.

    What is missing is NaN, so a run that was stopped goes on where it was.
    """
    policy = common.load_sft(cfg)
    if cfg.encoder == "random":
        shuffle_weights(tower_of(policy), cfg.seed)
    width = tower_of(policy).embeddings.position_embedding.weight.shape[1]
    for camera in CAMERAS:
        if ranks.first() and not is_whole(folder / f"{camera}.npy"):
            with disk.replacing(folder / f"{camera}.npy") as temporary:
                table = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(frames.step), width))
                with open(
                    temporary, "r+b"
                ) as file:  # a disk that is full shows here, and not as a crash while writing to memory
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                table[:] = np.nan
    ranks.wait()
    tables = {camera: np.load(folder / f"{camera}.npy", mmap_mode="r+") for camera in CAMERAS}
    bar = common.progress(
        common.demonstrations(cfg, cfg.holdout), total=frames.episode[-1] + 1, desc="encode", unit="episode"
    )
    for episode, (*_, demo) in enumerate(bar):
        first, last = np.searchsorted(frames.episode, [episode, episode + 1])
        if episode % ranks.size() == ranks.rank():
            for camera, table in tables.items():
                if np.isnan(table[first:last]).any():
                    table[first:last] = pooled(
                        policy, torch.from_numpy(getattr(demo, camera)[used(demo, cfg)])
                    ).cpu()
    for table in tables.values():
        table.flush()
    ranks.wait()
    return {camera: np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in CAMERAS}


# -------------------------------------------------------------------------------------------------------------- training
def splits(frames: Frames, cfg: Config) -> dict[str, np.ndarray]:
    """By name, the anchors (numbers among the anchors) that a head is trained on."""
    held, fold = frames.held[frames.anchors], frames.task[frames.anchors] % cfg.folds
    found = {"all": np.flatnonzero(fold >= 0)}
    if held.any():
        found["episodes"] = np.flatnonzero(~held)
    if len(np.unique(fold)) > 1:
        found |= {f"tasks-{part}": np.flatnonzero(fold != part) for part in np.unique(fold)}
    return found


def fresh_head(width: int, cfg: Config) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        return Head(width, cfg.hidden, cfg.dim)


def losses(
    see, features: dict, frames: Frames, index: np.ndarray, masked: bool, cfg: Config
) -> dict[str, torch.Tensor]:
    """Both terms of the loss on the anchors of `index` (B,), a mean over this rank's rows. see: features -> unit vectors."""
    at, later = frames.anchors[index], frames.partners[index]
    views = [features["agentview"][at], features["wrist"][at], features["agentview"][later]]
    now, wrist, then = see(torch.from_numpy(np.concatenate(views))).chunk(3)  # (B, D) each
    rows, negatives = ranks.share(torch.arange(len(index))), None
    if masked:
        step, episode = frames.step[at], frames.episode[at]
        near = (abs(step[:, None] - step) <= cfg.mask) & (episode[:, None] == episode)
        negatives = torch.from_numpy(~near).to(now.device)
    return {
        key: info_nce(now, x, cfg.temperature, negatives, rows)
        for key, x in (("views", wrist), ("temporal", then))
    }


def train(
    features: dict, frames: Frames, on: np.ndarray, split: str, variant: str, cfg: Config
) -> tuple[Head, list[dict]]:
    """A head trained on the anchors `on`, and what was logged; "episodes" logs the loss on the held-out ones as well."""
    if cfg.batch_size > len(on):
        raise common.UserError(
            f"head.batch_size={cfg.batch_size} is more than the {len(on)} anchors of {split}; lower it"
        )
    masked, standardised = VARIANTS[variant]
    device, logged = ranks.place(cfg.device), []
    head = fresh_head(features["agentview"].shape[1], cfg).to(device)
    mean, spread = torch.zeros(1), torch.ones(1)
    if standardised:  # each dimension over these frames and both cameras
        x = torch.from_numpy(np.concatenate([features[camera][frames.anchors[on]] for camera in CAMERAS]))
        mean, spread = x.mean(0), x.std(0) + 1e-6
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps = max(1, cfg.epochs * len(on) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    held = np.flatnonzero(frames.held[frames.anchors]) if split == "episodes" else np.zeros(0, int)
    held = common.np_stream(cfg.seed, "held").permutation(held)[
        : len(held) // cfg.batch_size * cfg.batch_size
    ]

    def terms(index: np.ndarray) -> dict[str, torch.Tensor]:
        return losses(lambda x: head(((x - mean) / spread).to(device)), features, frames, index, masked, cfg)

    for step in common.progress(range(steps), desc=f"head {split} {variant}", unit="step", leave=False):
        found = terms(on[common.shuffled(cfg.seed, f"head {split}", step, cfg.batch_size, len(on)).numpy()])
        ((1 - cfg.temporal) * found["views"] + cfg.temporal * found["temporal"]).backward()
        ranks.average_gradients(head.parameters())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % cfg.log_every == 0 or step == steps - 1:
            row = ranks.mean({key: term.item() for key, term in found.items()})
            with torch.no_grad():
                batches = [terms(index) for index in held.reshape(-1, cfg.batch_size)]
            if batches:
                row |= ranks.mean(
                    {f"held_out_{k}": float(np.mean([b[k].item() for b in batches])) for k in found}
                )
            logged.append(row | {"trained_on": split, "variant": variant, "step": step + 1})
    return head.cpu().fold_in(mean, spread).requires_grad_(False), logged


def train_all(features: dict, frames: Frames, cfg: Config, folder: Path) -> dict[tuple[str, str], Head]:
    """A head for every split and variant; one that is there already is read."""
    heads, metrics = {}, folder / "metrics.jsonl"
    paths = {
        (split, variant): folder / "heads" / f"{split}-{variant}.safetensors"
        for split in splits(frames, cfg)
        for variant in VARIANTS
    }
    if ranks.first():
        (folder / "heads").mkdir(exist_ok=True)
        disk.keep_rows(
            metrics, lambda row: paths[row["trained_on"], row["variant"]].is_file(), "trained_on variant"
        )
    ranks.wait()
    for (split, variant), path in paths.items():
        there = path.is_file()
        ranks.wait()  # all have looked before the first one writes
        if not there:
            head, logged = train(features, frames, splits(frames, cfg)[split], split, variant, cfg)
            if ranks.first():
                disk.write_rows(metrics, [*disk.read_jsonl(metrics), *logged])
                disk.save_tensors(path, head.state_dict())
            ranks.wait()
        heads[split, variant] = load_head(path).to(ranks.place(cfg.device))
    return heads


# ------------------------------------------------------------------------------------------------------------- retrieval
def representations(
    features: dict, frames: Frames, heads: dict, split: str, cfg: Config
) -> dict[str, torch.Tensor]:
    """What the agent view of every frame is retrieved by, unit vectors (N, D), by name. Nothing is fitted outside the split."""
    device, on = ranks.place(cfg.device), frames.anchors[splits(frames, cfg)[split]]
    raw = torch.from_numpy(np.array(features["agentview"])).to(device)  # (N, W)
    found = {f"head, {variant}": heads[split, variant](raw) for variant in VARIANTS}
    found["head before training"] = fresh_head(raw.shape[1], cfg).requires_grad_(False).to(device)(raw)

    def standardised(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((x - x[on].mean(0)) / (x[on].std(0) + 1e-6)).float().to(device)

    others = {"encoder": raw, "encoder, standardised": standardised(features["agentview"])}
    others |= {"pixels 8 x 8": standardised(frames.pixels), "proprioception": standardised(frames.state)}
    return found | {name: torch.nn.functional.normalize(x, dim=1) for name, x in others.items()}


def protocols(frames: Frames, cfg: Config) -> dict[str, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]:
    """Each protocol's parts: (split whose heads are used, queries, gallery, ids that exclude one another), of anchors."""
    episode, held = frames.episode[frames.anchors], frames.held[frames.anchors]
    fold, every = frames.task[frames.anchors] % cfg.folds, np.arange(len(episode))
    found = {"all frames": [("all", every, every, every)], "other episodes": [("all", every, every, episode)]}
    names = splits(frames, cfg)
    if "episodes" in names:
        found["held-out episodes"] = [("episodes", np.flatnonzero(held), np.flatnonzero(~held), episode)]
    if left_out := [int(name.removeprefix("tasks-")) for name in names if name.startswith("tasks-")]:
        found["held-out tasks"] = [
            (f"tasks-{part}", np.flatnonzero(fold == part), every, episode) for part in left_out
        ]
    return found


def score(
    frames: Frames, x: torch.Tensor, queries: np.ndarray, gallery: np.ndarray, ids: np.ndarray, cfg: Config
) -> dict:
    """retrieval.hits of a part of a protocol, for unit vectors x of all frames (N, D)."""
    q, g = frames.anchors[queries], frames.anchors[gallery]
    kinds = {
        "task": (frames.task, None),
        "episode": (frames.episode, None),
        "moment": (frames.task, cfg.near),
    }
    kinds = {right: (label[q], label[g], near) for right, (label, near) in kinds.items()}
    return hits(x[q], x[g], ids[queries], ids[gallery], frames.step[q], frames.step[g], kinds)


def retrieval(features: dict, frames: Frames, heads: dict, cfg: Config) -> list[dict]:
    """A row for every protocol, representation, suite, kind of right and k."""
    rows = []
    for protocol, parts in protocols(frames, cfg).items():
        queries, scores = frames.anchors[np.concatenate([part[1] for part in parts])], {}
        for split, *rest in parts:
            for name, x in representations(features, frames, heads, split, cfg).items():
                scores.setdefault(name, []).append(score(frames, x, *rest, cfg))
        suites = sorted(set(frames.suite[queries]))
        for name, found in scores.items():
            for right in found[0]:
                hit, by_chance = (np.concatenate([part[right][i] for part in found]) for i in (0, 1))
                if not by_chance.any():  # there is nothing to find: the own episode is excluded
                    continue
                for suite in suites + ["all"] * (len(suites) > 1):
                    of = (frames.suite[queries] == suite) | (suite == "all")
                    about = {
                        "suite": suite,
                        "protocol": protocol,
                        "right": right,
                        "n": int(of.sum()),
                        "unit": "share",
                    }
                    for i, k in enumerate(AT):
                        said = about | {"metric": f"recall@{k}"}
                        value = hit[of, :k].any(1).astype(float)
                        interval = stats.cluster_bootstrap(value, frames.episode[queries][of], n=2000)
                        rows.append(said | {"features": name, "value": value.mean(), "ci95": interval})
                        if name == "proprioception":  # once, as the last row
                            rows.append(
                                said | {"features": "chance", "value": by_chance[of, i].mean(), "ci95": None}
                            )
    return rows


def progress_rows(features: dict, frames: Frames, heads: dict, cfg: Config) -> list[dict]:
    """Along each held-out episode (all of them succeed): does similarity to the goal rise?

    The goal is shown by the last frames of the task's training episodes, since a robot at work has no image of its own end; the
    similarity is a mean over them. "rising": the share of frames more similar than the one before (chance 1/2).
    "rank correlation": Spearman's, of similarity and time (chance 0).
    """
    from scipy.stats import spearmanr

    last = np.flatnonzero(np.append(np.diff(frames.episode) > 0, True))
    rows, episodes = [], np.unique(frames.episode[frames.held])
    for name, x in representations(features, frames, heads, "episodes", cfg).items():
        found = {"rising": [], "rank correlation": []}
        for episode in episodes:
            own = np.flatnonzero(frames.episode == episode)
            goals = last[~frames.held[last] & (frames.task[last] == frames.task[own[0]])]
            similarity = (x[own] @ x[goals].T).mean(1).cpu().numpy()
            found["rising"].append((np.diff(similarity) > 0).mean())
            found["rank correlation"].append(spearmanr(similarity, frames.step[own]).statistic)
        for metric, values in found.items():
            interval = stats.cluster_bootstrap(np.array(values), episodes, n=2000)
            said = {"suite": "all", "protocol": "progress", "right": "", "n": len(episodes), "metric": metric}
            said |= {"unit": "share" if metric == "rising" else "correlation"}
            rows.append(said | {"features": name, "value": float(np.mean(values)), "ci95": interval})
    return rows


def neighbours(vectors: dict, frames: Frames, part: tuple, names: tuple[str, str], cfg: Config) -> tuple:
    """Six queries, each with the three nearest by two heads: frames (6, 7), which are of the right moment, and the images."""
    _, queries, gallery, ids = part
    a, chosen = frames.anchors, queries[np.linspace(0, len(queries) - 1, 8).round().astype(int)[1:-1]]
    shown = [a[chosen][:, None]]
    for name in names:
        x, of = vectors[name], [torch.from_numpy(ids[rows]) for rows in (chosen, gallery)]
        shown.append(
            a[gallery][nearest(x[a[chosen]], x[a[gallery]], 3, *(i.to(x.device) for i in of)).cpu().numpy()]
        )
    shown, images = np.concatenate(shown, axis=1), {}
    for episode, (*_, demo) in enumerate(common.demonstrations(cfg, cfg.holdout)):
        own = np.intersect1d(shown, np.flatnonzero(frames.episode == episode))
        at = used(demo, cfg)[own - np.searchsorted(frames.episode, episode)]
        images |= dict(zip(own.tolist(), demo.agentview[at], strict=True))
    query = shown[:, :1]
    right = (frames.task[shown] == frames.task[query]) & (
        abs(frames.step[shown] - frames.step[query]) <= cfg.near
    )
    return shown, right, images


# ------------------------------------------------------------------------------------------------------------------ main
def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "head")
    if cfg.blank_images:
        raise common.UserError(
            "black images are all alike: there is nothing to retrieve; set blank_images=false"
        )
    runs.require(cfg.data_dir, "demos")
    inputs = [cfg.data_dir, *common.sft_inputs(cfg)]
    name = (
        "head"
        + ("" if cfg.start == "final" else f"-at{cfg.start}")
        + ("-random" if cfg.encoder == "random" else "")
    )
    shared = f"suites tasks backbone seed image_size {common.SFT_KEYS}"
    code = ["contrastive.py", "retrieval.py", "head_report.py", "stats.py", *cfg.policy_code]
    stage = runs.open_stage(__file__, cfg, cfg.seed_dir / name, shared, inputs, code)
    if stage is not None:
        torch.set_num_threads(cfg.threads)
        frames = list_frames(cfg)
        features = encode(cfg, stage.dir, frames)
        heads = train_all(features, frames, cfg, stage.dir)
        if not ranks.first():
            return
        trained = sum(p.numel() for p in heads["all", "paper"].parameters())
        print(
            f"[06_pretrain_head] {len(frames.anchors)} anchors, {len(heads)} heads of {trained:,} parameters",
            flush=True,
        )
        rows = retrieval(features, frames, heads, cfg)
        if frames.held.any():
            rows += progress_rows(features, frames, heads, cfg)
        disk.write_json(stage.dir / "rows.json", rows)
        parts = protocols(frames, cfg)
        (part,) = parts.get("held-out episodes", parts["other episodes"])
        vectors = representations(features, frames, heads, part[0], cfg)
        plot_losses(disk.read_jsonl(stage.dir / "metrics.jsonl"), cfg, stage.dir / "loss.png")
        plot_map(vectors, frames, stage.dir / "map.png")
        names = ("head, paper", "head, corrected")
        plot_neighbours(
            *neighbours(vectors, frames, part, names, cfg), frames, names, stage.dir / "neighbours.png"
        )
        stage.finish(parameters=trained, anchors=len(frames.anchors), episodes=int(frames.episode[-1]) + 1)
    if not ranks.first():
        return
    folder = cfg.seed_dir / name
    timing, rows = disk.read_json(folder / "timing.json"), disk.read_json(folder / "rows.json")
    about = {"backbone": cfg.backbone, "encoder": cfg.encoder, "train_seeds": [cfg.seed]}
    about |= {"command": timing["command"], "commit": timing["commit"]}
    disk.write_json(folder / "table.json", [about | row for row in rows])
    disk.write_atomic(folder / "table.md", markdown(rows, cfg))
    print(markdown(rows, cfg), flush=True)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "head", sys.argv[1:])))
