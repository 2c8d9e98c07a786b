"""What of one inference may serve the next look: chunk reuse, prefix reuse, patch reuse, and cheaper solvers of the flow.

A look is a rendered observation, every `execute` steps of the environment. Without reuse each is answered by an inference of its
own, so that k = `execute` of the chunk's H actions are carried out. On a hit:

    chunk    the last chunk goes on where it stands, each of its actions is executed once: between k of H (never a hit) and H of H
    prefix   the denoising runs again, from fresh noise, on the keys and values of an older observation; where the state is part
             of the prefix, a token or text, the actions learn nothing new
    patches  as VLA-Cache (arXiv 2502.02175): image patches that stand still keep their keys and values; those that moved, those
             that the instruction attends to, the state and the text are computed anew in every layer, and see old and new

Similarity is the cosine of pixel values in [-1, 1]: of whole images, the less similar camera counting, or patch by patch, always
to the frame that the kept values come from. `cap` bounds how many looks in a row may reuse.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from backbones.layers import Prefix, project_kv, rotary, rotate

REUSE, SOLVERS = ("none", "chunk", "prefix", "patches"), ("euler", "midpoint", "heun")


# ------------------------------------------------------------------------------------------------------------- the solvers
@torch.no_grad()
def solve(policy, prefix: Prefix, noise: Tensor, steps: int, solver: str) -> Tensor:
    """The flow from noise (B, H, D) at t = 1 to a chunk (B, H, D) at t = 0; midpoint and Heun evaluate it twice a step."""
    x, h = noise.float().to(prefix.valid.device), 1 / steps
    second = {"euler": [], "midpoint": [h / 2], "heun": [h]}[solver]
    times = torch.tensor([1 - i * h - later for i in range(steps) for later in (0.0, *second)], device=x.device)
    around = policy.surroundings(prefix, x.shape[1])
    at = list(zip(*(m.split(1) for m in policy.modulations(times)), strict=True))  # of each time, what the norms make of it
    for _ in range(steps):
        v = policy.flow(around, x, at.pop(0))
        if second:
            later = policy.flow(around, x - second[0] * v, at.pop(0))
            v = later if solver == "midpoint" else (v + later) / 2
        x = x - h * v
    return x


# --------------------------------------------------------------------------------------------------------------- similarity
def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of two observations' pixels, uint8 (cameras, S, S, 3), the smaller one of the cameras."""
    a, b = (x.flatten(1).float() / 127.5 - 1 for x in (a, b))
    return F.cosine_similarity(a, b).min().item()


def patches(pixels: Tensor, size: int) -> Tensor:
    """Images (cameras, 3, s, s) -> (patches, 3 size^2), in the order of the prefix's tokens."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------------ patch reuse
@torch.no_grad()
def refresh(policy, tokens: Tensor, valid: Tensor, old: Prefix | None, index: Tensor, images: int) -> tuple[Prefix, Tensor]:
    """pi-0.5's prefix of one observation with the keys and values of its tokens `index` anew, the others' from `old`.

    tokens (1, S, width), valid (1, S), index (R,) in ascending order: all of them where there is no `old`. Also returns how much
    state and text attend to each of the `images` first tokens in the last layer that attends, averaged over heads and queries.
    """
    from backbones.pi05 import attend, key_bias

    all_rope, bias = rotary(valid.cumsum(1) - 1, policy.cfg.vlm.head_dim), key_bias(valid, tokens.dtype)
    x, rope = tokens[:, index], tuple(part[:, index] for part in all_rope)
    keys, values = ([], []) if old is None else (list(part.clone().unbind(1)) for part in (old.keys, old.values))
    attention, (*_, last) = tokens.new_zeros(images), policy.language_model.layers
    for i, layer in enumerate(policy.language_model.layers):
        h = layer.input_layernorm(x)
        k, v = project_kv(layer.self_attn, h, rope)  # (1, kv heads, R, head_dim)
        if old is None:
            keys.append(k)
            values.append(v)
        else:
            keys[i][:, :, index], values[i][:, :, index] = k, v
        if layer is last:
            break
        if i == len(policy.language_model.layers) - 2:
            asking = h[:, index >= images]
            q = layer.self_attn.q_proj(asking).unflatten(
                -1, (k.shape[1], -1, k.shape[-1])
            )  # (1, R', kv heads, sharing, head_dim)
            q = rotate(q, *(part[:, index >= images, :, None] for part in rope))
            scores = torch.einsum("brkgd,bksd->brkgs", q, keys[i]) * k.shape[-1] ** -0.5
            attention = scores.softmax(-1).mean((0, 1, 2, 3))[:images]
        x = x + attend(layer.self_attn, h, rope, keys[i], values[i], bias)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return Prefix(torch.stack(keys, 1), torch.stack(values, 1), valid), attention


# --------------------------------------------------------------------------------------------------------------- the actor
@contextlib.contextmanager
def timed(seconds: dict, part: str, device: torch.device):
    """Adds the time of the block to seconds[part]: CPU time of this process; with a GPU wall time, its work done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    began = now()
    yield
    seconds[part] += now() - began


class Actor:
    """A policy in one episode: call it with an observation and the look's number k, and it gives the actions (n, 7) to carry out.

    rule: a config with reuse, threshold, cap, relevant, execute, denoise_steps, solver, noise_scale, seed.
    Counts looks, hits (for patches, the share of image tokens kept) and seconds by what they went to.
    """

    def __init__(self, policy, rule, where: tuple):
        self.policy, self.rule, self.where, self.device = policy, rule, where, next(policy.parameters()).device
        self.looks, self.hits, self.seconds = 0, 0.0, dict.fromkeys(("check", "encode", "act"), 0.0)
        self.seen = self.chunk = self.prefix = None  # images that the kept values come from, the chunk, the prefix
        self.streak = self.index = 0  # looks in a row that reused; actions of the chunk that are behind
        if rule.execute > policy.horizon:
            raise common.UserError(f"execute={rule.execute} actions of a chunk, but the policy's chunks have {policy.horizon}")
        if rule.reuse == "patches" and policy.backbone != "pi05":
            raise common.UserError(f"reuse=patches is written for pi05, not for {policy.backbone}; use chunk or prefix")
        if rule.solver != "euler" and policy.backbone != "pi05":
            raise common.UserError(f"solver={rule.solver} needs a flow; {policy.backbone} has none")

    def __call__(self, obs: dict, k: int) -> np.ndarray:
        rule, self.looks = self.rule, self.looks + 1
        with timed(self.seconds, "check", self.device):
            obs, images = common.collate([obs]), torch.from_numpy(np.stack([obs["agentview"], obs["wrist"]]))
            hit = rule.reuse in ("chunk", "prefix") and self.may_reuse(images)
            self.hits, self.streak = self.hits + hit, self.streak + 1 if hit else 0
            if not hit:
                self.seen = images if rule.reuse != "patches" else self.seen
        if hit and rule.reuse == "chunk":
            self.index += rule.execute
        else:
            with timed(self.seconds, "encode", self.device):
                if rule.reuse == "patches":
                    self.keep_what_stands_still(obs)
                elif not hit:
                    with torch.no_grad():
                        self.prefix = self.policy.encode(obs)
            with timed(self.seconds, "act", self.device):
                self.chunk, self.index = self.infer(k), 0
        return self.chunk[self.index : self.index + rule.execute]

    def may_reuse(self, images: Tensor) -> bool:
        """Whether the last inference still serves: it has actions left, the cap is not reached, and little has changed."""
        rule = self.rule
        if self.seen is None or self.streak >= rule.cap:
            return False
        if rule.reuse == "chunk" and self.index + 2 * rule.execute > len(self.chunk):
            return False
        return similarity(images, self.seen) >= rule.threshold

    def infer(self, k: int) -> np.ndarray:
        rule, policy = self.rule, self.policy
        noise = rule.noise_scale * policy.noise(1, common.stream(rule.seed, "eval", *self.where, k))
        if rule.solver == "euler":
            chunk = policy.sample_actions(self.prefix, noise, rule.denoise_steps)
        else:
            chunk = solve(policy, self.prefix, noise, rule.denoise_steps, rule.solver)
        return np.asarray(policy.unnormalise(chunk[0].cpu()))

    def keep_what_stands_still(self, obs: dict) -> None:
        """The prefix of `obs`, image tokens that need no refreshing taken from the one before."""
        rule, policy, device = self.rule, self.policy, self.device
        inputs = [x.to(device) for x in policy.inputs(obs)]
        with torch.no_grad():
            tokens, valid = policy.embed_prefix(*inputs)
        now = patches(inputs[0][0], policy.cfg.vision.patch_size)  # (image tokens, pixels)
        n, stale = len(now), torch.ones(tokens.shape[1], dtype=torch.bool, device=device)
        if self.prefix is not None:
            wanted = self.attention.topk(int(rule.relevant * n)).indices
            still = (F.cosine_similarity(now, self.seen) >= rule.threshold) & (self.age < rule.cap)
            still[wanted] = False
            stale[:n] = ~still
            self.hits += still.float().mean().item()
        else:
            self.seen, self.age = now, torch.zeros(n, dtype=torch.long, device=device)
        self.seen = torch.where(stale[:n, None], now, self.seen)
        self.age = torch.where(stale[:n], 0, self.age + 1)
        old = self.prefix  # its text may be longer or shorter (states as digits), and is made anew in any case
        if old is not None:
            images = Prefix(old.keys[..., :n, :], old.values[..., :n, :], old.valid[:, :n])
            old = images.widen(tokens.shape[1])
        self.prefix, self.attention = refresh(policy, tokens, valid, old, stale.nonzero()[:, 0], n)


def sees_on_a_hit(policy, rule) -> list[str]:
    """What of a new observation reaches the actions when the rule reuses all it may: "state", "images", both or neither.

    Actors look at one observation and then at ones that differ in the state, or in a quarter of one image; whole images always
    count as similar enough. Where the actions agree to the last bit, the change was not seen.
    """

    def acted(second: dict) -> np.ndarray:
        actor = Actor(policy, always, ("information", 0, 0))
        actor(first, 0)
        return actor(second, 1)

    rng = np.random.default_rng(0)
    size = getattr(getattr(policy.cfg, "vision", policy.cfg), "image_size", 64)
    images = {c: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for c in ("agentview", "wrist")}
    first = images | {"state": np.zeros(8, np.float32), "instruction": "pick up the milk"}
    always = replace(rule, threshold=0.5 if rule.reuse == "patches" else -1.0, cap=100, relevant=0.0, execute=1)
    moved = images["agentview"].copy()
    moved[: size // 2, : size // 2] = 255 - moved[: size // 2, : size // 2]
    changes = {"state": first | {"state": np.full(8, 0.5, np.float32)}, "images": first | {"agentview": moved}}
    same = acted(first)
    return [name for name, second in changes.items() if not np.array_equal(acted(second), same)]
