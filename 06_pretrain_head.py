"""06 - Multi-view and temporal InfoNCE on the frozen vision tower, and what retrieval by the embedding is worth (paper: pretraining).

reads   <run>/data/ (00), <run>/<backbone>/seed<k>/sft/ (01) or `checkpoint`
writes  <run>/<backbone>/seed<k>/head[-at<step>][-random]/: heads/*.safetensors (`all` is the paper's), agentview.npy and
        wrist.npy (pooled features), metrics.jsonl, retrieval.json, table.{json,md}, {loss,neighbours,map}.png, done.json
cost    configs/tiny.yaml: see README. The tower sees each image once; 24 heads are trained on what it gave
try     python 06_pretrain_head.py configs/tiny.yaml start=final
        python 06_pretrain_head.py configs/tiny.yaml start=final encoder=random

An image becomes the mean of the tower's patches, and the head maps it to a unit vector. The loss asks the agent view at t to find,
among the batch, the wrist view at t, and the agent view at t + 5 steps. Retrieval is by the agent view alone, in four protocols:

    all frames          the head saw every frame; a frame's neighbour may be the one beside it in the same episode (the paper's)
    other episodes      the same head; neighbours come from other episodes
    held-out episodes   the head never saw the query's episode, nor did 01_sft.py (the last init states); neighbours are what it saw
    held-out tasks      the head never saw the query's task; neighbours come from other episodes of all tasks

Beside the head stand: the same loss without near frames of one episode as negatives ("masked"), the head before training, the
tower's features as they are, 8 x 8 pixels, proprioception (both standardised), and chance, exactly. recall@k is the share of queries with
a right frame among the k nearest; right is one of the same task, the same episode, or the same moment (same task, |dt| <= near).
In "held-out tasks" only the head is new to the task: the tower was fine-tuned on all of them, unless encoder=random.

t + 5: the paper's frames are LIBERO's, one per step of 0.05 s. Here t counts steps too, and the partner is the image nearest to
t + gap: one image further on where every 4th step has one (t + 4), exactly 5 in the official files.
With torchrun, each process encodes its episodes and takes its rows of every batch (ranks.py).
Differs from the paper: pooling (contrastive.py), the tower is the SFT policy's; anchors are what the demonstrations hold.
Left out: augmentation, queues of negatives, approximate search.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import memory
import ranks
import runs
from contrastive import Head, info_nce, load_head, pooled, tower_of

CAMERAS = ("agentview", "wrist")
AT = (1, 5, 10)  # the k of recall@k


@dataclass
class Config(common.RunConfig):
    encoder: str = "sft"  # or "random", the control: the same tower with the entries of each weight shuffled
    anchors: int = 30  # of an episode, evenly spaced
    gap: int = 5  # steps from an anchor to its temporal positive
    hidden: int = 512
    dim: int = 128
    temperature: float = 0.07
    temporal: float = 0.5  # weight of the temporal term; the views have the rest
    mask: int = 10  # masked heads: frames of the same episode within so many steps are no negatives
    epochs: int = 10
    batch_size: int = 128  # anchors
    lr: float = 3e-4  # cosine to 0
    weight_decay: float = 0.01
    near: int = 10  # steps within which two frames of a task are of the same moment
    holdout: int = 2  # init states of each task that are held out, the last ones; those of 01_sft.py when as many
    folds: int = 10  # parts in which tasks are held out
    log_every: int = 10
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.one_of("head.encoder", self.encoder, ("sft", "random"))
        common.at_least(self, anchors=1, gap=1, hidden=1, dim=1, mask=0, epochs=1, batch_size=2, lr=0, near=0, holdout=0)
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


def demonstrations(cfg: Config) -> Iterator[tuple[str, int, bool, common.Demo]]:
    """(suite, task, held out, demonstration) of all of them, in one order; the task counts over all suites."""
    task = -1
    for suite in cfg.suites:
        for path in sorted((cfg.data_dir / suite).glob("task_*.hdf5")):
            number = int(path.stem.rpartition("_")[2])
            if cfg.tasks and number not in cfg.tasks:
                continue
            task += 1
            demos = list(common.read_demos(path, number))
            starts = [d.init_state if d.init_state >= 0 else d.number for d in demos]
            distinct = sorted(set(starts))  # as in 01_sft.py
            held = distinct[len(distinct) - cfg.holdout :] if len(distinct) > cfg.holdout else []
            yield from ((suite, task, start in held, demo) for start, demo in zip(starts, demos, strict=True))


def choose(steps: np.ndarray, anchors: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the anchors among an episode's images (taken at `steps`), and of their partners: both (A,).

    The partner lies as many images ahead as come nearest to `gap` steps, one at least.
    """
    ahead = max(1, round(gap / float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    n = len(steps) - ahead  # images that have a partner
    chosen = np.unique(np.linspace(0, n - 1, min(anchors, n)).round().astype(int)) if n > 0 else np.zeros(0, int)
    return chosen, chosen + ahead


def used(demo: common.Demo, cfg: Config) -> np.ndarray:
    """Positions of the images that become frames: anchors, partners, and the last one, which shows the goal."""
    return np.unique(np.concatenate([*choose(demo.image_steps, cfg.anchors, cfg.gap), [len(demo.image_steps) - 1]]))


def shrink(images: np.ndarray, size: int = 8) -> np.ndarray:
    """uint8 (B, S, S, 3) -> (B, size * size * 3): means of blocks, what is left over at the border cut off."""
    b, s = len(images), images.shape[1] // size
    return images[:, : s * size, : s * size].reshape(b, size, s, size, s, 3).mean((2, 4), dtype=np.float32).reshape(b, -1)


def list_frames(cfg: Config) -> Frames:
    rows, anchors, partners, n = [], [], [], 0
    for episode, (suite, task, held, demo) in enumerate(demonstrations(cfg)):
        kept = used(demo, cfg)
        a, b = choose(demo.image_steps, cfg.anchors, cfg.gap)
        anchors.append(n + np.searchsorted(kept, a))
        partners.append(n + np.searchsorted(kept, b))
        steps, k = demo.image_steps[kept], len(kept)
        of_episode = [np.full(k, value) for value in (suite, task, episode)]
        rows.append([*of_episode, steps, np.full(k, held), demo.state[steps], shrink(demo.agentview[kept])])
        n += k
    if not rows:
        raise common.UserError(f"no demonstrations under {cfg.data_dir} for suites {cfg.suites}, tasks {cfg.tasks or 'all'}")
    return Frames(*(np.concatenate(column) for column in zip(*rows, strict=True)), *map(np.concatenate, (anchors, partners)))


# -------------------------------------------------------------------------------------------------------------- features
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
        if ranks.first() and not (folder / f"{camera}.npy").is_file():
            temporary = folder / f".{camera}.tmp"
            np.lib.format.open_memmap(temporary, "w+", np.float32, (len(frames.step), width))[:] = np.nan
            temporary.rename(folder / f"{camera}.npy")
    ranks.wait()
    tables = {camera: np.load(folder / f"{camera}.npy", mmap_mode="r+") for camera in CAMERAS}
    bar = common.progress(demonstrations(cfg), total=frames.episode[-1] + 1, desc="encode", unit="episode")
    for episode, (*_, demo) in enumerate(bar):
        first, last = np.searchsorted(frames.episode, [episode, episode + 1])
        if episode % ranks.size() == ranks.rank():
            for camera, table in tables.items():
                if np.isnan(table[first:last]).any():
                    table[first:last] = pooled(policy, torch.from_numpy(getattr(demo, camera)[used(demo, cfg)])).cpu()
    for table in tables.values():
        table.flush()
    ranks.wait()
    return {camera: np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in CAMERAS}


def shuffle_weights(module: torch.nn.Module, seed: int) -> None:
    """Every tensor keeps its numbers, and so its scale, in random places."""
    for name, p in module.named_parameters():
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=common.stream(seed, name)).to(p.device)].view_as(p)


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


def losses(head: Head, features: dict, frames: Frames, index: np.ndarray, masked: bool, cfg: Config, share: bool) -> dict:
    """Both terms of the loss on the anchors of `index` (B,); with `share` the mean over this rank's rows alone."""
    at, later = frames.anchors[index], frames.partners[index]
    views = [features["agentview"][at], features["wrist"][at], features["agentview"][later]]
    now, wrist, then = head(torch.from_numpy(np.concatenate(views)).to(head.fc1.weight.device)).chunk(3)  # (B, D) each
    rows = ranks.share(torch.arange(len(index))) if share else None
    negatives = None
    if masked:
        step, episode = frames.step[at], frames.episode[at]
        near = (abs(step[:, None] - step) <= cfg.mask) & (episode[:, None] == episode)
        negatives = torch.from_numpy(~near).to(now.device)
    return {k: info_nce(now, x, cfg.temperature, negatives, rows) for k, x in (("views", wrist), ("temporal", then))}


def train(features: dict, frames: Frames, on: np.ndarray, name: str, cfg: Config) -> tuple[Head, list[dict]]:
    """A head trained on the anchors `on`, and what was logged; heads that leave episodes out log the loss on them as well."""
    if cfg.batch_size > len(on):
        raise common.UserError(f"head.batch_size={cfg.batch_size} is more than the {len(on)} anchors of {name}; lower it")
    masked, logged = name.endswith("-masked"), []
    head = fresh_head(features["agentview"].shape[1], cfg).to(ranks.place(cfg.device))
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps = max(1, cfg.epochs * len(on) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    held = np.flatnonzero(frames.held[frames.anchors]) if name.startswith("episodes") else np.zeros(0, int)
    held = common.np_stream(cfg.seed, "held").permutation(held)[: len(held) // cfg.batch_size * cfg.batch_size]
    for step in common.progress(range(steps), desc=f"head {name}", unit="step", leave=False):
        index = on[common.shuffled(cfg.seed, f"head {name}", step, cfg.batch_size, len(on)).numpy()]
        terms = losses(head, features, frames, index, masked, cfg)
        ((1 - cfg.temporal) * terms["views"] + cfg.temporal * terms["temporal"]).backward()
        ranks.average_gradients(head.parameters())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % cfg.log_every == 0 or step == steps - 1:
            row = ranks.mean({key: term.item() for key, term in terms.items()}) | {"head": name, "step": step + 1}
            with torch.no_grad():
                batches = [losses(head, features, frames, i, masked, cfg) for i in held.reshape(-1, cfg.batch_size)]
            for key in terms if batches else ():
                row |= ranks.mean({f"held_out_{key}": float(np.mean([batch[key].item() for batch in batches]))})
            logged.append(row)
    return head.requires_grad_(False), logged


def train_all(features: dict, frames: Frames, cfg: Config, folder: Path) -> dict[str, Head]:
    """A head for every split, with all negatives and masked; one that is there already is read."""
    heads, metrics = {}, folder / "metrics.jsonl"
    if ranks.first():
        (folder / "heads").mkdir(exist_ok=True)
        runs.keep_rows(metrics, lambda row: (folder / "heads" / f"{row['head']}.safetensors").is_file())
    ranks.wait()
    for split, on in splits(frames, cfg).items():
        for name in (split, f"{split}-masked"):
            path = folder / "heads" / f"{name}.safetensors"
            if not path.is_file():
                head, logged = train(features, frames, on, name, cfg)
                ranks.wait()  # no rank sees the file before all have looked for it
                if ranks.first():
                    runs.write_rows(metrics, [*runs.read_jsonl(metrics), *logged])
                    runs.save_tensors(path, head.state_dict())
                ranks.wait()
            heads[name] = load_head(path).to(ranks.place(cfg.device))
    return heads


# ------------------------------------------------------------------------------------------------------------- retrieval
def nearest(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    query_id: torch.Tensor | None = None,
    gallery_id: torch.Tensor | None = None,
    block: int = 2048,
) -> torch.Tensor:
    """Rows of the gallery (G, D) with the largest inner products to each query (Q, D), best first: (Q, k). Exact.

    A query never gets a row of its own id (its episode, or itself). No more than 512 x block products are held at a time.
    """
    found = []
    for first in range(0, len(queries), 512):
        q = queries[first : first + 512]
        own = None if query_id is None else query_id[first : first + 512]
        best = q.new_full((len(q), k), -torch.inf)
        rows = torch.zeros(len(q), k, dtype=torch.long, device=q.device)
        for start in range(0, len(gallery), block):
            products = q @ gallery[start : start + block].T  # (512, block)
            if own is not None:
                ids = gallery_id[start : start + block]
                if own.min() <= ids.max() and ids.min() <= own.max():  # numbered in order, most blocks have no id in common
                    products.masked_fill_(own[:, None] == ids, -torch.inf)
            top, at = products.topk(min(k, products.shape[1]), dim=1)
            best, order = torch.cat([best, top], 1).topk(k, dim=1)
            rows = torch.cat([rows, at + start], 1).gather(1, order)
        found.append(rows)
    return torch.cat(found)


def count_right(label, step, of_label, of_step, near: int | None) -> np.ndarray:
    """For each query (label, step), how many gallery frames have its label and a step within `near` (None: any): (Q,)."""
    far = 1 + max(step.max(), of_step.max())  # steps of one label never reach those of the next
    keys = np.sort(of_label * 2 * far + of_step)
    near = far - 1 if near is None else min(near, far - 1)
    low, high = label * 2 * far + np.maximum(step - near, 0), label * 2 * far + step + near
    return np.searchsorted(keys, high, "right") - np.searchsorted(keys, low, "left")


def chance(right: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """Recall@k (Q,) of k different candidates drawn at random, of which `right` are right: 1 - C(c - r, k) / C(c, k)."""
    miss = np.ones(len(right))
    for i in range(k):
        miss *= np.maximum(candidates - right - i, 0) / np.maximum(candidates - i, 1)
    return 1 - miss
