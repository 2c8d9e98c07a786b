"""Cells: success and latency with caches and with fewer denoise steps (the paper's inference section).

reads   <run>/<backbone>/seed<k>/sft/ (01); or `checkpoint`, published or a student of extras/distill.py
writes  <run>/<backbone>/seed<k>/cell-<name>[-val]/: episodes.jsonl, summary.json, done.json; beside the
        folder cells[-val].{json,md}, the table of all cells so far
cost    50 episodes, 2 to 10 s each on one core
try     python -m extras.cells configs/tiny.yaml start=final execute=2 cells.reuse=chunk cells.threshold=0.98
        python -m extras.cells configs/tiny.yaml start=final denoise_steps=2 cells.solver=midpoint

A cell is one setting of these keys, `execute` (actions carried out between two looks) and `denoise_steps`.
Every cell is paired, episode by episode, with the one that looks as often, reuses nothing and takes ten Euler
steps.

A look is an observation that the policy gets: one every `execute` steps of the environment. Without reuse
each look is answered by an inference, of whose chunk k = `execute` actions are carried out. A look that
reuses something instead is a hit. What it reuses:

    chunk    the last chunk goes on where it stopped. No action is carried out twice: k of its H are if no
             look is a hit, all H if every look is
    prefix   denoising runs again, from fresh noise, on the keys and values of an older observation; where the
             state is part of the prefix, the actions learn nothing new
    patches  as VLA-Cache (arXiv 2502.02175): image patches that stand still keep their keys and values. Those
             that moved, those that the instruction attends to, the state and the text are computed anew in
             every layer, and attend to old and new ones

Similarity is the cosine of pixel values in [-1, 1]: of whole images, where the less similar camera counts, or
patch by patch. It always compares with the frame that the kept values come from. `cap` limits how many looks
in a row may reuse.

Differs from the paper: an action is carried out once; the similarity check is part of the latency; a test
shows what a hit cannot see, and the table says it; a cell that only looks less often (execute=5, 10) is the
baseline that a cache has to beat.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import backbones
import common
from backbones.layers import Prefix, project_kv, rotary, rotate
from report import episodes
from report.tables import listing, publish
from runtime import HERE, Count, disk, refuse, stage
from sim.env import CRASHES, TaskEnv, carry_out, tasks

# What a look that reuses all it may can still learn, of what the policy sees (test_extras.py measures it)
SEES_ON_A_HIT = {"none": ["state", "images"], "chunk": [], "prefix": [], "patches": ["state", "images"]}


@dataclass
class Config(common.SceneConfig, common.ActingConfig):
    section: ClassVar = "cells"
    by_torchrun: ClassVar = True
    reuse: Literal["none", "chunk", "prefix", "patches"] = "none"
    threshold: Annotated[float, -1] = 0.98  # similarity that allows reuse; the paper: 0.92, 0.95, 0.98, 0.999
    cap: Count = 4  # looks in a row that may reuse
    relevant: Annotated[float, 0, 1] = 0.25  # patches: share of image tokens, the most attended, always anew
    solver: Literal["euler", "midpoint", "heun"] = "euler"  # the last two evaluate the flow twice a step
    group: Literal["val", "test"] = "val"  # init states: "val" (35-39, for every choice) or "test" (40-49)
    n_init: Count = 5  # init states per task

    @property
    def cell(self) -> str:
        """E.g. none-k5-euler10, chunk0.98x4-k2-euler10, student-none-k8-euler1."""
        return "".join(
            [
                f"{Path(self.checkpoint).name}-" if self.checkpoint else "",
                self.reuse,
                "" if self.reuse == "none" else f"{self.threshold:g}x{self.cap}",
                f"-k{self.execute}-{self.solver}{self.denoise_steps}",
                "" if self.start == "final" else f"-at{self.start}",
            ]
        )

    suffix = property(lambda self: "-val" if self.group == "val" else "")
    folder = property(lambda self: self.seed_dir / f"cell-{self.cell}{self.suffix}")

    def inputs(self) -> list[Path]:
        refuse(
            self.blank_images, "caches compare images, and black ones are all alike; set blank_images=false"
        )
        refuse(
            self.backbone != "pi05" and (self.reuse == "patches" or self.solver != "euler"),
            f"reuse={self.reuse} with solver={self.solver} needs pi05's layers or its flow; "
            f"with {self.backbone} use reuse=chunk or prefix, and solver=euler",
        )
        common.init_states(self.group, self.n_init)
        tasks(self)
        return self.sft_inputs()


# ------------------------------------------------------------------------------------------------ the solvers
@torch.no_grad()
def solve(policy, prefix: Prefix, noise: Tensor, steps: int, solver: str) -> Tensor:
    """The flow from noise (B, H, D) at t = 1 to a chunk (B, H, D) at t = 0.

    solver: "euler", or "midpoint" or "heun", which evaluate the flow twice a step.
    """
    x, h = noise.float().to(prefix.valid.device), 1 / steps
    later = {"euler": [], "midpoint": [h / 2], "heun": [h]}[solver]  # when a step evaluates once more
    times = [1 - i * h - after for i in range(steps) for after in (0.0, *later)]
    around = policy.surroundings(prefix, x.shape[1])
    modulations = zip(  # those of one time after the other
        *(m.split(1) for m in policy.modulations(torch.tensor(times, device=x.device))), strict=True
    )
    for _ in range(steps):
        v = policy.flow(around, x, next(modulations))
        for after in later:
            second = policy.flow(around, x - after * v, next(modulations))
            v = second if solver == "midpoint" else (v + second) / 2
        x = x - h * v
    return x


# ------------------------------------------------------------------------------------------------- similarity
def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of two observations' pixels, uint8 (cameras, S, S, 3): that of the less similar camera."""
    a, b = (x.flatten(1).float() / 127.5 - 1 for x in (a, b))
    return F.cosine_similarity(a, b).min().item()


def patches(pixels: Tensor, size: int) -> Tensor:
    """Images (cameras, 3, s, s) -> (patches, 3 size^2), in the order of the prefix's tokens."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)


# ------------------------------------------------------------------------------------------------ patch reuse
@torch.no_grad()
def refresh(
    policy, tokens: Tensor, valid: Tensor, old: Prefix | None, index: Tensor, images: int
) -> tuple[Prefix, Tensor]:
    """pi-0.5's prefix of one observation: keys and values of the tokens `index` anew, the others from `old`.

    tokens (1, S, width), valid (1, S).  index (R,): in ascending order; all of them where there is no `old`.
    Also returns how much state and text attend to each of the first `images` tokens, in the last layer that
    attends, as a mean over heads and queries.
    """
    from backbones.pi05 import attend, key_bias

    bias = key_bias(valid, tokens.dtype)
    rope = tuple(table[:, index] for table in rotary(valid.cumsum(1) - 1, policy.cfg.vlm.head_dim))
    asking = index >= images  # state and text
    x, attention, kept = tokens[:, index], tokens.new_zeros(images), []
    layers = policy.language_model.layers
    for i, layer in enumerate(layers):
        h = layer.input_layernorm(x)
        k, v = project_kv(layer.self_attn, h, rope)  # (1, kv heads, R, head_dim)
        if old is not None:
            k = old.keys[:, i].index_copy(2, index, k)  # (1, kv heads, S, head_dim)
            v = old.values[:, i].index_copy(2, index, v)
        kept.append((k, v))
        if i == len(layers) - 1:
            break
        if i == len(layers) - 2:
            q = layer.self_attn.q_proj(h[:, asking]).unflatten(-1, (k.shape[1], -1, k.shape[-1]))
            q = rotate(
                q, *(table[:, asking, :, None] for table in rope)
            )  # (1, R', kv heads, shared, head_dim)
            scores = torch.einsum("brkgd,bksd->brkgs", q, k) * k.shape[-1] ** -0.5
            attention = scores.softmax(-1).mean((0, 1, 2, 3))[:images]
        x = x + attend(layer.self_attn, h, rope, k, v, bias)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return Prefix(*(torch.stack(each, 1) for each in zip(*kept, strict=True)), valid), attention


# -------------------------------------------------------------------------------------------------- the actor
@contextlib.contextmanager
def timed(seconds: dict, part: str, device: torch.device) -> Iterator[None]:
    """Add the time of the block to seconds[part]: CPU time; on a GPU wall time, until its work is done."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    began = now()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[part] += now() - began


@dataclass
class Actor:
    """A policy in one episode. Call it with each observation: it gives the actions (n, 7) to carry out.

    rule: a config with reuse, threshold, cap, relevant, execute, denoise_steps, solver, noise_scale, seed.
    """

    policy: object
    rule: object
    where: tuple  # suite, task, init state: they give the policy's noise
    looks: int = 0
    hits: float = 0.0  # looks that reused something; with patches the share of image tokens kept
    seconds: dict = field(default_factory=lambda: dict.fromkeys(("check", "encode", "act"), 0.0))
    chunk: np.ndarray | None = None  # what the last inference found, without the actions of earlier looks
    streak: int = 0  # looks in a row that reused
    prefix: Prefix | None = None
    seen: Tensor | None = None  # images, or patches, that the kept values come from
    age: Tensor | int = 0  # patches: looks since a token was computed
    attention: Tensor | None = None  # patches: how much state and text attend to each image token

    device = cached_property(lambda self: next(self.policy.parameters()).device)

    @torch.no_grad()
    def __call__(self, obs: dict) -> np.ndarray:
        rule = self.rule
        with timed(self.seconds, "check", self.device):
            images = torch.from_numpy(np.stack([obs[camera] for camera in common.CAMERAS]))
            obs = backbones.collate([obs])
            # whether the last inference still serves: there are actions left, and little has changed
            hit = (
                rule.reuse in ("chunk", "prefix")
                and self.seen is not None
                and self.streak < rule.cap
                and (rule.reuse == "prefix" or len(self.chunk) >= 2 * rule.execute)
                and similarity(images, self.seen) >= rule.threshold
            )
            self.hits += hit
            self.streak = self.streak + 1 if hit else 0
            if rule.reuse != "patches":
                self.seen = self.seen if hit else images
        if hit and rule.reuse == "chunk":
            self.chunk = self.chunk[rule.execute :]
        else:
            with timed(self.seconds, "encode", self.device):
                if rule.reuse == "patches":
                    self.keep_what_stands_still(obs)
                elif not hit:
                    self.prefix = self.policy.encode(obs)
            with timed(self.seconds, "act", self.device):
                self.chunk = self.infer()
        self.looks += 1
        return self.chunk[: rule.execute]

    def infer(self) -> np.ndarray:
        rule, policy = self.rule, self.policy
        refuse(
            rule.execute > policy.horizon,
            f"execute={rule.execute} actions of a chunk, but the policy's have {policy.horizon}; "
            "lower execute",
        )
        sample = (
            policy.sample_actions if rule.solver == "euler" else partial(solve, policy, solver=rule.solver)
        )
        noise = rule.noise_scale * policy.noise(1, common.stream(rule.seed, "eval", *self.where, self.looks))
        return np.asarray(policy.unnormalise(sample(self.prefix, noise, steps=rule.denoise_steps)[0].cpu()))

    def keep_what_stands_still(self, obs: dict) -> None:
        """The prefix of `obs`; image tokens that need no refreshing come from the one before."""
        rule, policy, old = self.rule, self.policy, self.prefix
        inputs = [x.to(self.device) for x in policy.inputs(obs)]
        tokens, valid = policy.embed_prefix(*inputs)
        now = patches(inputs[0][0], policy.cfg.vision.patch_size)  # (image tokens, pixels)
        n, stale = len(now), torch.ones(tokens.shape[1], dtype=torch.bool, device=self.device)
        if old is not None:
            still = (F.cosine_similarity(now, self.seen) >= rule.threshold) & (self.age < rule.cap)
            still[self.attention.topk(int(rule.relevant * n)).indices] = False
            stale[:n] = ~still
            self.hits += still.float().mean().item()
            # the text may be longer or shorter than before (states as digits), and is made anew in any case
            old = Prefix(old.keys[..., :n, :], old.values[..., :n, :], old.valid[:, :n]).widen(len(stale))
        self.seen = torch.where(stale[:n, None], now, now if self.seen is None else self.seen)
        self.age = torch.where(stale[:n], 0, self.age + 1)
        self.prefix, self.attention = refresh(policy, tokens, valid, old, stale.nonzero()[:, 0], n)


# --------------------------------------------------------------------------------------------------- episodes
def play(env: TaskEnv, actor: Actor, init: int) -> dict:
    """One episode from init state `init`. Its seconds end up in timing.json, as wall times do."""
    began, crash = time.time(), ""
    try:
        env.reset(init)
        while not env.success and env.steps < env.max_steps:
            carry_out(env, actor(env.observe()))
    except CRASHES as error:  # the simulator diverged: neither success nor failure of the policy
        crash = type(error).__name__
    return {
        "suite": env.suite,
        "task": env.task_id,
        "init_state": init,
        "success": not crash and bool(env.success),
        "steps": env.steps,
        "crash": crash,
        "looks": actor.looks,
        "hits": round(actor.hits, 3),
        "wall_s": {"episode": 0.0 if crash else round(time.time() - began, 2)} | actor.seconds,
    }


def evaluate(job: tuple[Config, Path, str, int, list[int]]) -> None:
    """Worker: play the missing episodes of one task, and append a row of played.jsonl for each."""
    cfg, folder, suite, task, missing = job
    policy = backbones.load_sft(cfg)
    with contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env:
        for init in missing:
            disk.append_jsonl(
                folder / "played.jsonl",
                play(env, Actor(policy, cfg, (suite, task, init)), init) | {"seed": cfg.seed},
            )


# ----------------------------------------------------------------------------------------------------- tables
# what a cell and its baseline must share, beside the weights
PROTOCOL = ("suites", *episodes.PROTOCOL)


def teacher(facts: dict) -> dict:
    """Of a student's cell what the student was made from, by its done.json; of any other cell itself."""
    done = HERE / facts["config"]["checkpoint"] / "done.json"
    made_from = disk.read_json(done) if done.is_file() else {"stage": ""}
    return made_from if made_from["stage"] in ("distill", "05_distill") else facts


def cells_table(cfg: Config) -> list[dict]:
    """A row per finished cell, paired with the one that looks as often, reuses nothing, takes ten steps."""
    finished = episodes.finished(cfg.seed_dir, "cell-*", cfg.group)
    of_cell = {facts["cell"]: (facts, played) for facts, played, _ in finished}
    rows = []
    for facts, played, timing in finished:
        used, seconds = facts["config"], timing["episodes_s"].values()
        steps, looks = (max(1, sum(row[key] for row in played)) for key in ("steps", "looks"))
        spent = {part: 1e3 * sum(s[part] for s in seconds) / steps for part in ("check", "encode", "act")}
        row = {
            "name": facts["cell"],
            "suite": " ".join(used["suites"]),
            "backbone": cfg.backbone,
            "policy": "sft",
            "group": cfg.group,
            "train_seeds": episodes.train_seeds(facts),
            "sees_on_a_hit": SEES_ON_A_HIT[used["reuse"]],
            "hit_rate": sum(row["hits"] for row in played) / looks,
            "ms_per_step": sum(spent.values()),
            "ms_per_step_parts": spent,
            "command": timing["command"],
            "commit": timing["commit"],
            **episodes.summarise(played),
        }
        name = replace(
            cfg,
            reuse="none",
            solver="euler",
            denoise_steps=10,
            execute=used["execute"],
            start=teacher(facts)["config"]["start"],
            checkpoint=teacher(facts)["config"]["checkpoint"],
        ).cell
        base, others = of_cell.get(name, (facts, []))
        made_from = teacher(facts)["inputs"]
        if others and name != facts["cell"] and episodes.comparable(facts, base, PROTOCOL, made_from):
            test = episodes.paired(played, others)
            row |= {"paired_with": name} | test if test["paired_n"] else {}
        rows.append(row)
    return rows


CELLS = {  # heading -> cell. ms per step: of the environment
    "cell": "{name}",
    "success": "{successes} / {n}",
    "95 % interval": "{ci95[0]:.0%} to {ci95[1]:.0%}",
    "hits": "{hit_rate:.0%}",
    "ms per step": "{ms_per_step:.2f}",
    "of it the check": "{ms_per_step_parts[check]:.2f}",
    "a hit sees": lambda row: (  # what of a new observation reaches the actions then
        "" if row["name"].startswith("none") else " and ".join(row["sees_on_a_hit"]) or "nothing new"
    ),
    "over no reuse": lambda row: f"{100 * row['diff_vs_sft']:+.0f} points" if "gained" in row else "",
    "gained / lost": lambda row: "{gained} / {lost}".format_map(row) if "gained" in row else "",
    "p": lambda row: f"{row['p_vs_sft']:.2g}" if "gained" in row else "",
}


def main(cfg: Config, run: stage.Run) -> dict:
    return episodes.play_all(run, evaluate, tasks(cfg), f"cell {cfg.cell}", cell=cfg.cell)


def show_table(cfg: Config) -> None:
    """All cells so far of this seed and group: cells.json, cells.md."""
    rows = cells_table(cfg)
    publish(cfg.seed_dir / f"cells{cfg.suffix}", rows, listing(rows, CELLS))


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview, after=show_table)
