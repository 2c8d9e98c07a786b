"""Inference reuse and cheaper solvers of the flow: what the cells of extras/cells.py are made of.

A look is an observation that the policy gets: one every `execute` steps of the environment. Without reuse
each look is answered by an inference, of whose chunk k = `execute` actions are carried out. A look that
reuses something instead is a hit. What it reuses:

    chunk    the last chunk goes on where it stands; each of its H actions is carried out once, so between k
             of H (never a hit) and all H
    prefix   denoising runs again, from fresh noise, on the keys and values of an older observation; where the
             state is part of the prefix, the actions learn nothing new
    patches  as VLA-Cache (arXiv 2502.02175): image patches that stand still keep their keys and values. Those
             that moved, those that the instruction attends to, the state and the text are computed anew in
             every layer, and attend to old and new ones

Similarity is the cosine of pixel values in [-1, 1]: of whole images, where the less similar camera counts, or
patch by patch. It always compares with the frame that the kept values come from. `cap` limits how many looks
in a row may reuse.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from backbones import collate
from backbones.layers import Prefix, project_kv, rotary, rotate
from runtime.errors import UserError


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
    of_norm = [m.split(1) for m in policy.modulations(torch.tensor(times, device=x.device))]
    modulations = zip(*of_norm, strict=True)  # those of one time after the other
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
            whole_k, whole_v = old.keys[:, i].clone(), old.values[:, i].clone()  # (1, kv heads, S, head_dim)
            whole_k[:, :, index], whole_v[:, :, index] = k, v
            k, v = whole_k, whole_v
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
    keys, values = (torch.stack(each, 1) for each in zip(*kept, strict=True))
    return Prefix(keys, values, valid), attention


# -------------------------------------------------------------------------------------------------- the actor
@contextlib.contextmanager
def timed(seconds: dict, part: str, device: torch.device) -> Iterator[None]:
    """Add the time of the block to seconds[part]: CPU time; on a GPU wall time, until its work is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    began = now()
    yield
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
    chunk: np.ndarray | None = None
    index: int = 0  # actions of the chunk that are carried out
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
            obs = collate([obs])
            hit = rule.reuse in ("chunk", "prefix") and self.may_reuse(images)
            self.hits += hit
            self.streak = self.streak + 1 if hit else 0
            if rule.reuse != "patches":
                self.seen = self.seen if hit else images
        if hit and rule.reuse == "chunk":
            self.index += rule.execute
        else:
            with timed(self.seconds, "encode", self.device):
                if rule.reuse == "patches":
                    self.keep_what_stands_still(obs)
                elif not hit:
                    self.prefix = self.policy.encode(obs)
            with timed(self.seconds, "act", self.device):
                self.chunk = self.infer()
                self.index = 0
        self.looks += 1
        return self.chunk[self.index : self.index + rule.execute]

    def may_reuse(self, images: Tensor) -> bool:
        """Whether the last inference still serves: there are actions left, and little has changed."""
        rule = self.rule
        if self.seen is None or self.streak >= rule.cap:
            return False
        has_actions = rule.reuse == "prefix" or self.index + 2 * rule.execute <= len(self.chunk)
        return has_actions and similarity(images, self.seen) >= rule.threshold

    def infer(self) -> np.ndarray:
        rule, policy = self.rule, self.policy
        if rule.execute > policy.horizon:
            longer = f"execute={rule.execute} actions of a chunk, but the policy's have {policy.horizon}"
            raise UserError(f"{longer}; lower execute")
        noise = policy.noise(1, common.stream(rule.seed, "eval", *self.where, self.looks))
        sample = (
            policy.sample_actions if rule.solver == "euler" else partial(solve, policy, solver=rule.solver)
        )
        chunk = sample(self.prefix, rule.noise_scale * noise, steps=rule.denoise_steps)
        return np.asarray(policy.unnormalise(chunk[0].cpu()))

    def keep_what_stands_still(self, obs: dict) -> None:
        """The prefix of `obs`; image tokens that need no refreshing come from the one before."""
        rule, policy, old = self.rule, self.policy, self.prefix
        inputs = [x.to(self.device) for x in policy.inputs(obs)]
        tokens, valid = policy.embed_prefix(*inputs)
        now = patches(inputs[0][0], policy.cfg.vision.patch_size)  # (image tokens, pixels)
        n, stale = len(now), torch.ones(tokens.shape[1], dtype=torch.bool, device=self.device)
        if old is None:
            self.seen = now
        else:
            still = (F.cosine_similarity(now, self.seen) >= rule.threshold) & (self.age < rule.cap)
            still[self.attention.topk(int(rule.relevant * n)).indices] = False
            stale[:n] = ~still
            self.hits += still.float().mean().item()
            # the text may be longer or shorter than before (states as digits), and is made anew in any case
            of_images = Prefix(old.keys[..., :n, :], old.values[..., :n, :], old.valid[:, :n])
            old = of_images.widen(tokens.shape[1])
        self.seen = torch.where(stale[:n, None], now, self.seen)
        self.age = torch.where(stale[:n], 0, self.age + 1)
        self.prefix, self.attention = refresh(policy, tokens, valid, old, stale.nonzero()[:, 0], n)


def sees_on_a_hit(policy, rule) -> list[str]:
    """What of a new observation reaches the actions if all that may be reused is: "state", "images".

    Actors look at one observation and then at others that differ in the state, or in a quarter of one image;
    whole images always count as similar enough. If actions agree to the last bit, the change was not seen.
    """
    threshold = 0.5 if rule.reuse == "patches" else -1.0
    always = replace(rule, threshold=threshold, cap=100, relevant=0.0, execute=1)
    size = getattr(getattr(policy.cfg, "vision", policy.cfg), "image_size", 64)
    rng = np.random.default_rng(0)
    first = {camera: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in common.CAMERAS}
    first |= {"state": np.zeros(8, np.float32), "instruction": "pick up the milk"}
    moved = first["agentview"].copy()
    moved[: size // 2, : size // 2] = 255 - moved[: size // 2, : size // 2]

    def acted(change: dict) -> np.ndarray:
        actor = Actor(policy, always, ("information", 0, 0))
        actor(first)
        return actor(first | change)

    changes = {"state": {"state": np.full(8, 0.5, np.float32)}, "images": {"agentview": moved}}
    same = acted({})
    return [name for name, change in changes.items() if not np.array_equal(acted(change), same)]
