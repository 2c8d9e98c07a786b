"""06 - Multi-view and temporal InfoNCE on the frozen vision tower, and what retrieval with it is worth.

reads   <run>/data/ (00), <run>/<backbone>/seed<k>/sft/ (01) or `checkpoint`
writes  <run>/<backbone>/seed<k>/head[-at<start>][-random]/: heads/<split>-<variant>.safetensors,
        metrics.jsonl, rows.json, table.{json,md}, done.json
cost    the tower sees each image once; then 36 heads train (with ten tasks): 2 minutes on one core
try     python 06_pretrain_head.py configs/tiny.yaml start=final
        python 06_pretrain_head.py configs/tiny.yaml start=final encoder=random

The paper's pretraining of a projection head. An image becomes the mean of the tower's patches, and the head
maps it to a unit vector. InfoNCE asks the agent view at step t to find two partners among the batch: the
wrist view at t, and the agent view at t + 5. Retrieval uses the agent view alone, in four protocols:

    all frames          the paper's: the head saw every frame; the nearest may be the next of the same episode
    other episodes      the same head; neighbours come from other episodes
    held-out episodes   neither the head nor 01 saw the query's episode; neighbours come from those they saw
    held-out tasks      the head never saw the query's task; neighbours come from other episodes of all tasks

recall@k is the share of queries with a right frame among their k nearest. Right is a frame of the same task,
of the same episode, or of the same moment (same task, at most `near` steps apart).

The head has three variants. "paper" is the paper's. In "masked", anchors of one episode that are near each
other are no negatives of each other, nor are their partners. "corrected" is masked, and its input is
standardised; the first layer absorbs that after training.
They are compared with the head before training, the tower's features, 8 x 8 pixels, proprioception and
chance. In "held-out tasks" the head has not seen the query's task, but the tower has: 01 trained it on all
tasks. Only encoder=random avoids this.

Differs from the paper: the pooling; the tower is the SFT policy's; the anchors come from the demonstrations.
The paper's frames are LIBERO's, one per step. Here the partner is the recorded image nearest to t + 5: that
of t + 4 where every 4th step has one. Left out: augmentation, queues of negatives, approximate search.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Frames  # arrays; load_frames lists them
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
import common
from backbones.layers import siglip_features
from report import stats
from report.head import retrieval_report
from report.tables import publish
from runtime import Count, disk, refuse, stage, workers
from sim.demos import demonstrations

ANCHORS = 30  # of an episode, evenly spaced
TEMPERATURE = 0.07
TEMPORAL = 0.5  # weight of the temporal term; the views' term has the rest
MASK = 10  # masked and corrected: anchors of one episode at most so many steps apart are no negatives
FOLDS = 10  # groups of tasks; each is held out once
AT = (1, 5, 10)  # the k of recall@k
# variant of the head -> (near frames are no negatives, the input is standardised)
VARIANTS = {"paper": (False, False), "masked": (True, False), "corrected": (True, True)}


@dataclass
class Config(common.SceneConfig, common.StartConfig):
    section: ClassVar = "head"
    encoder: Literal["sft", "random"] = "sft"  # random: a control, the tower's weights shuffled
    gap: Count = 5  # steps from an anchor to its temporal partner
    near: int = 10  # at most so many steps apart, two frames of a task are of the same moment
    holdout: int = 2  # init states held out, the last ones; as many as in 01 gives the same ones
    epochs: Count = 10
    batch_size: Annotated[int, 2] = 128  # anchors
    log_every: Count = 10

    folder = property(
        lambda self: self.seed_dir / (self.variant("head") + ("-random" if self.encoder == "random" else ""))
    )

    def inputs(self) -> list[Path]:
        refuse(
            self.blank_images,
            "black images are all alike, so there is nothing to retrieve; set blank_images=false",
        )
        inputs = [stage.require(self.data_dir, "demos", f" name={self.name}"), *self.sft_inputs()]
        if not self.checkpoint:
            held = disk.read_json(inputs[1] / "done.json")["config"]["holdout"]
            refuse(self.holdout > held, f"01 held out {held} init states; set head.holdout={held}")
        return inputs


# ---------------------------------------------------------------------------------------------- head and loss
class Head(nn.Module):
    """Linear -> GELU -> Linear -> unit length: (B, W) -> (B, D). One head for all views.

    It has 656,000 parameters at the published sizes, W = 1152 and D = 128.
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 512), nn.Linear(512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.fc2(F.gelu(self.fc1(x.float()))), dim=-1)

    def fold_in(self, mean: Tensor, spread: Tensor) -> Self:
        """Absorb the standardisation: afterwards head(x) is what head((x - mean) / spread) was."""
        weight = self.fc1.weight.data.double() / spread.double()
        self.fc1.bias.data = (
            self.fc1.bias.data.double() - weight @ mean.double().expand(weight.shape[1])
        ).float()
        self.fc1.weight.data = weight.float()
        return self


def info_nce(a: Tensor, b: Tensor, temperature: float, negatives: Tensor) -> Tensor:
    """Symmetric InfoNCE: a[i] (B, D) has to find b[i] among all of b, and b[i] a[i] among all of a.

    arXiv 1807.03748, in both directions as CLIP's. Guessing gives log(B).
    negatives: (B, B), True where b[j] may be a negative of a[i].
    """
    logits = a @ b.T / temperature  # (B, B), the positives on the diagonal
    positives = torch.eye(len(a), dtype=torch.bool, device=a.device)
    logits = logits.masked_fill(~(negatives | positives), -torch.inf)
    log_p = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()  # (B,)
    return -log_p.mean() / 2


# --------------------------------------------------------------------------------------------------- features
def tower_of(policy) -> nn.Module:
    """The SigLIP tower of either backbone."""
    from transformers import SiglipVisionModel

    towers = [module for module in policy.modules() if isinstance(module, SiglipVisionModel)]
    refuse(not towers, "the policy has no SigLIP tower; put siglip into model.towers")
    return towers[0]


def pooled(policy, images: Tensor) -> Tensor:
    """uint8 images (B, h, w, 3) -> float32 (B, W): the mean over the tower's patches.

    The patches are those that the policy reads: behind the last norm for pi-0.5, before the last block for
    OpenVLA. It is a mean because SigLIP has no CLS token, and published policies come without its attention
    pooling.
    """
    tower = tower_of(policy)
    table = tower.embeddings.position_embedding.weight  # (patches, W)
    pixels = policy.pixels(images.to(table.device))[:, -3:]  # of OpenVLA's fused pixels, SigLIP's come last
    x = siglip_features(tower, pixels.to(table.dtype))  # (B, patches, W)
    return (x if tower.post_layernorm is None else tower.post_layernorm(x)).float().mean(1)


def shuffle_weights(module: nn.Module, seed: int) -> None:
    """Every tensor keeps its numbers, and so its scale, in random places."""
    for name, p in module.named_parameters():
        p.data = p.data.flatten()[
            torch.randperm(p.numel(), generator=common.stream(seed, name)).to(p.device)
        ].view_as(p)


# ----------------------------------------------------------------------------------------------------- frames
def choose(steps: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images of an episode, taken at `steps`, that become frames; its anchors (A,) and their partners.

    A partner is as many images ahead as come nearest to `gap` steps, at least one. The last image, which
    shows the goal, is a frame too. Anchors and partners are numbers among the frames.
    """
    ahead = max(1, round(gap / float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    n = max(0, len(steps) - ahead)  # images that have a partner
    anchors = np.unique(np.linspace(0, n - 1, min(ANCHORS, n)).round().astype(int))
    kept = np.unique([*anchors, *anchors + ahead, len(steps) - 1])
    return kept, np.searchsorted(kept, anchors), np.searchsorted(kept, anchors + ahead)


def shrink(images: np.ndarray, size: int = 8) -> np.ndarray:
    """uint8 (B, S, S, 3) -> (B, size * size * 3): means of blocks. Cuts off what is left at the border."""
    s = images.shape[1] // size
    return (
        images[:, : s * size, : s * size]
        .reshape(-1, size, s, size, s, 3)
        .mean((2, 4), dtype=np.float32)
        .reshape(len(images), -1)
    )


@torch.no_grad()
def load_frames(cfg: Config) -> Frames:
    """The frames (N,) that are used of all demonstrations, and the anchors (A,) among them. Arrays:

    suite, task, episode, step: (N,); task and episode count over all suites
    held: (N,) bool, of a held-out episode
    state: (N, 8).  pixels: (N, 192), the agent view at 8 x 8
    agentview, wrist: (N, W), features by the policy's tower
    anchors, partners: (A,), numbers of frames; a partner is its anchor's temporal positive
    """
    policy = backbones.load_sft(cfg)
    if cfg.encoder == "random":
        shuffle_weights(tower_of(policy), cfg.seed)
    episodes, tasks, n = [], {}, 0
    demos = workers.progress(demonstrations(cfg, cfg.holdout), desc="encode", unit="episode")
    for episode, (suite, held, demo) in enumerate(demos):
        task = common.LAYOUTS.get(suite, suite), demo.task  # in any layout
        kept, anchors, partners = choose(demo.image_steps, cfg.gap)
        episodes.append(
            {
                "suite": np.full(len(kept), suite),
                "task": np.full(len(kept), tasks.setdefault(task, len(tasks))),
                "episode": np.full(len(kept), episode),
                "step": demo.image_steps[kept],
                "held": np.full(len(kept), held),
                "state": demo.state[demo.image_steps[kept]],
                "pixels": shrink(demo.agentview[kept]),
                "agentview": pooled(policy, torch.from_numpy(demo.agentview[kept])).cpu().numpy(),
                "wrist": pooled(policy, torch.from_numpy(demo.wrist[kept])).cpu().numpy(),
                "anchors": n + anchors,
                "partners": n + partners,
            }
        )
        n += len(kept)
    return Frames(**{key: np.concatenate([part[key] for part in episodes]) for key in episodes[0]})


# --------------------------------------------------------------------------------------------------- training
def protocols(frames: Frames) -> dict[str, list[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """Name -> parts: (split, training set, queries, gallery, ids). Each part has heads of its own.

    Training set, queries and gallery number the anchors. A query gets no neighbour of its own id. A protocol
    that lacks a training set or queries is left out: nothing is held out, or there is only one task.
    """
    episode, held = frames.episode[frames.anchors], frames.held[frames.anchors]
    fold = frames.task[frames.anchors] % FOLDS
    every = np.arange(len(fold))
    kept = np.flatnonzero(~held)
    parts = {
        "all frames": [("all", every, every, every, every)],
        "other episodes": [("all", every, every, every, episode)],
        "held-out episodes": [("episodes", kept, np.flatnonzero(held), kept, episode)],
        "held-out tasks": [
            (f"tasks-{part}", np.flatnonzero(fold != part), np.flatnonzero(fold == part), every, episode)
            for part in np.unique(fold)
        ],
    }
    return {
        name: own for name, own in parts.items() if all(len(on) and len(asked) for _, on, asked, *_ in own)
    }


def splits(frames: Frames) -> dict[str, np.ndarray]:
    """Name -> the anchors that a head is trained on."""
    return {split: on for parts in protocols(frames).values() for split, on, *_ in parts}


def fresh_head(frames: Frames, cfg: Config) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        return Head(frames.agentview.shape[1]).to(cfg.device)


def loss_terms(head: Head, views: dict, frames: Frames, index: np.ndarray, masked: bool) -> dict[str, Tensor]:
    """Both terms of the loss on the anchors of `index` (B,).

    views: camera -> what the head is shown of each frame (N, W).
    """
    at = frames.anchors[index]
    now, wrist, then = head(
        torch.cat([views["agentview"][at], views["wrist"][at], views["agentview"][frames.partners[index]]])
    ).chunk(3)  # (B, D) each
    step, episode = frames.step[at], frames.episode[at]
    alike = (abs(step[:, None] - step) <= MASK) & (episode[:, None] == episode)
    negatives = torch.from_numpy(~alike if masked else np.full_like(alike, True)).to(now.device)
    return {
        "views": info_nce(now, wrist, TEMPERATURE, negatives),
        "temporal": info_nce(now, then, TEMPERATURE, negatives),
    }


def train(frames: Frames, on: np.ndarray, split: str, variant: str, cfg: Config) -> tuple[Head, list[dict]]:
    """A head trained on the anchors `on`, and its log."""
    masked, standardised = VARIANTS[variant]
    mean, spread = torch.zeros(1), torch.ones(1)
    if standardised:  # each dimension, over these anchors and both cameras
        x = np.concatenate([frames.agentview[frames.anchors[on]], frames.wrist[frames.anchors[on]]])
        mean, spread = torch.from_numpy(x).mean(0), torch.from_numpy(x).std(0) + 1e-6
    views = {
        "agentview": ((torch.from_numpy(frames.agentview) - mean) / spread).to(cfg.device),
        "wrist": ((torch.from_numpy(frames.wrist) - mean) / spread).to(cfg.device),
    }
    head = fresh_head(frames, cfg)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.01)
    steps = max(1, cfg.epochs * len(on) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    logged = []
    for step in workers.progress(range(steps), desc=f"head {split} {variant}", unit="step", leave=False):
        # 1. a batch of anchors, and both terms of the loss
        index = on[common.shuffled(cfg.seed, f"head {split}", step, cfg.batch_size, len(on)).numpy()]
        terms = loss_terms(head, views, frames, index, masked)

        # 2. one step of the optimiser
        ((1 - TEMPORAL) * terms["views"] + TEMPORAL * terms["temporal"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        # 3. the log
        if step % cfg.log_every == 0 or step == steps - 1:
            row = {"trained_on": split, "variant": variant, "step": step + 1}
            logged.append(row | {key: term.item() for key, term in terms.items()})
    return head.cpu().fold_in(mean, spread), logged


def train_all(frames: Frames, cfg: Config, folder: Path) -> dict[tuple[str, str], Head]:
    """A head for every split and variant, written to heads/; their logs go to metrics.jsonl."""
    smallest = min((len(on) for on in splits(frames).values()), default=0)
    refuse(
        cfg.batch_size > smallest,
        f"head.batch_size={cfg.batch_size} is more than "
        f"the {smallest} anchors of the smallest training set; lower it, or head.gap",
    )
    heads, logged = {}, []
    (folder / "heads").mkdir(exist_ok=True)
    for (split, on), variant in itertools.product(splits(frames).items(), VARIANTS):
        head, log = train(frames, on, split, variant, cfg)
        disk.save_tensors(folder / "heads" / f"{split}-{variant}.safetensors", head.state_dict())
        heads[split, variant] = head.to(cfg.device)
        logged += log
    disk.write_rows(folder / "metrics.jsonl", logged)
    return heads


# -------------------------------------------------------------------------------------------------- retrieval
@torch.no_grad()
def representations(frames: Frames, heads: dict, split: str, cfg: Config) -> dict[str, Tensor]:
    """Name -> unit vectors (N, D) of the agent view of every frame. Nothing is fitted outside the split."""
    on = frames.anchors[splits(frames)[split]]
    raw = torch.from_numpy(frames.agentview).to(cfg.device)  # (N, W)

    def standardised(x: np.ndarray) -> Tensor:
        x = (x - x[on].mean(0)) / (x[on].std(0) + 1e-6)
        return F.normalize(torch.from_numpy(x).float().to(cfg.device), dim=1)

    return {
        **{f"head, {variant}": heads[split, variant](raw) for variant in VARIANTS},
        "head before training": fresh_head(frames, cfg)(raw),
        "encoder": F.normalize(raw, dim=1),
        "encoder, standardised": standardised(frames.agentview),
        "pixels 8 x 8": standardised(frames.pixels),
        "proprioception": standardised(frames.state),
    }


def nearest(queries: Tensor, gallery: Tensor, allowed: np.ndarray, k: int) -> np.ndarray:
    """The gallery's rows (Q, k) with the largest inner products to each query, best first.

    allowed (Q, G): others come last.
    """
    return (
        (queries @ gallery.T)
        .masked_fill(~torch.from_numpy(allowed).to(queries.device), -torch.inf)
        .topk(min(k, len(gallery)), dim=1)
        .indices.cpu()
        .numpy()
    )


def chance(right: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """recall@k (Q,) of k different candidates drawn at random, `right` of them right.

    1 - C(c - r, k) / C(c, k)
    """
    missed = [np.maximum(candidates - right - i, 0) / np.maximum(candidates - i, 1) for i in range(k)]
    return (1 - np.prod(missed, axis=0)) * (right > 0)


def score(
    frames: Frames, vectors: dict, queries, gallery, ids, near: int
) -> dict[tuple[str, str], np.ndarray]:
    """(name of the vectors, or "chance", kind of right) -> recall@AT of each query, (Q, len(AT)).

    vectors: name -> unit vectors (N, D) of all frames.  For the others see `protocols`.
    """
    g, recalls = frames.anchors[gallery], defaultdict(list)
    for some in np.split(queries, range(512, len(queries), 512)):  # few at a time: memory
        q = frames.anchors[some]
        allowed = ids[some][:, None] != ids[gallery]  # (512, G)
        of_task = allowed & (frames.task[q][:, None] == frames.task[g])
        kinds = {
            "task": of_task,
            "episode": allowed & (frames.episode[q][:, None] == frames.episode[g]),
            "moment": of_task & (abs(frames.step[q][:, None] - frames.step[g]) <= near),
        }
        for name, x in vectors.items():
            rows = nearest(x[q], x[g], allowed, max(AT))
            for kind, right in kinds.items():
                hits = np.take_along_axis(right, rows, axis=1)  # (512, 10)
                recalls[name, kind].append(np.stack([hits[:, :k].any(1) for k in AT], axis=1))
        for kind, right in kinds.items():
            recalls["chance", kind].append(
                np.stack([chance(right.sum(1), allowed.sum(1), k) for k in AT], axis=1)
            )
    return {key: np.concatenate(blocks).astype(float) for key, blocks in recalls.items()}


def recall_rows(frames: Frames, heads: dict, cfg: Config) -> Iterator[dict]:
    """A row for every protocol, representation, kind of right, suite and k."""
    for protocol, parts in protocols(frames).items():
        scores = [
            score(frames, representations(frames, heads, split, cfg), queries, gallery, ids, cfg.near)
            for split, _, queries, gallery, ids in parts
        ]
        recalls = {key: np.concatenate([part[key] for part in scores]) for key in scores[0]}
        asked = frames.anchors[np.concatenate([queries for _, _, queries, *_ in parts])]
        suites = sorted(set(frames.suite[asked]))
        # where no frame can be right, such as another one of the own episode, there is nothing to find
        kept = [key for key in recalls if recalls["chance", key[1]].any()]
        places = itertools.product(kept, suites if len(suites) == 1 else [*suites, "all"], enumerate(AT))
        for (name, kind), suite, (i, k) in places:
            of = np.full(len(asked), True) if suite == "all" else frames.suite[asked] == suite
            recall = recalls[name, kind][of, i]
            yield {
                "suite": suite,
                "protocol": protocol,
                "right": kind,
                "n": int(of.sum()),
                "unit": "share",
                "metric": f"recall@{k}",
                "features": name,
                "value": recall.mean(),
                # chance is no estimate
                "ci95": None
                if name == "chance"
                else stats.share_over_clusters(recall, frames.episode[asked][of]),
            }


def progress_rows(frames: Frames, heads: dict, cfg: Config) -> Iterator[dict]:
    """Along each held-out episode, all of which succeed: does similarity to the goal rise?

    A robot at work has no image of its own goal. So the last frames of the task's training episodes show it,
    and the similarity is a mean over them. "rising": the share of frames that are more similar than the one
    before (chance 1/2). "rank correlation": Spearman's, of similarity and time (chance 0).
    """
    from scipy.stats import spearmanr

    last = np.flatnonzero(np.append(np.diff(frames.episode) > 0, True))
    episodes = np.unique(frames.episode[frames.held])
    for name, x in representations(frames, heads, "episodes", cfg).items():
        rising, correlation = [], []
        for episode in episodes:
            own = np.flatnonzero(frames.episode == episode)
            goals = last[~frames.held[last] & (frames.task[last] == frames.task[own[0]])]
            similarity = (x[own] @ x[goals].T).mean(1).cpu().numpy()
            rising.append((np.diff(similarity) > 0).mean())
            correlation.append(spearmanr(similarity, frames.step[own]).statistic)
        yield from (
            {
                "suite": "all",
                "protocol": "progress",
                "right": "",
                "n": len(episodes),
                "unit": unit,
                "metric": metric,
                "features": name,
                "value": float(np.mean(values)),
                "ci95": stats.over_clusters(np.array(values), episodes),
            }
            for metric, unit, values in (
                ("rising", "share", rising),
                ("rank correlation", "correlation", correlation),
            )
        )


# ------------------------------------------------------------------------------------------------------- main
def main(cfg: Config, run: stage.Run) -> dict:
    # 1. features of all frames, and a head for every split and variant
    frames = load_frames(cfg)
    heads = train_all(frames, cfg, run.dir)
    trained = sum(p.numel() for p in heads["all", "paper"].parameters())
    print(
        f"[06_pretrain_head] {len(frames.anchors)} anchors, {len(heads)} heads of {trained:,} parameters",
        flush=True,
    )

    # 2. retrieval by each of them, and by what they are compared with
    disk.write_json(
        run.dir / "rows.json",
        [*recall_rows(frames, heads, cfg), *(progress_rows(frames, heads, cfg) if frames.held.any() else ())],
    )
    return {
        "parameters": trained,
        "anchors": len(frames.anchors),
        "episodes": int(frames.episode[-1]) + 1,
    }


def show_table(cfg: Config) -> None:
    timing, rows = disk.read_json(cfg.folder / "timing.json"), disk.read_json(cfg.folder / "rows.json")
    about = {
        "backbone": cfg.backbone,
        "encoder": cfg.encoder,
        "train_seeds": [cfg.seed],
        "command": timing["command"],
        "commit": timing["commit"],
    }
    publish(cfg.folder / "table", [about | row for row in rows], retrieval_report(rows, cfg))


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview, after=show_table)
