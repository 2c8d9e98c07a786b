"""What two or more stages must agree on: LIBERO's conventions, demonstrations and pairs, the surrogate log-probability, adapters.

A thing stands here when two stages use it and a silent difference between two copies would change a result. Losses, pair
selection, training loops and timing loops stay in their stage. Importing this module is cheap: no simulator, no transformers.

`python common.py CONFIG [key=value ...]` checks a whole config before hours are spent, and prints it as every stage will see it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import errno
import hashlib
import importlib
import importlib.metadata
import json
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open

import ranks
from data import Demo, check_pairs, read_demos, read_pairs  # noqa: F401 (the stages take them from here)
from disk import UserError, one_line
from runs import HERE, STAGES, checkpoint_files, input_name, read_identity, require

# ---------------------------------------------------------------------------------------------------------------- LIBERO
# Evaluation protocol of OpenVLA (experiments/robot/libero/run_libero_eval.py) and openpi (examples/libero/main.py).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SETTLE_STEPS = 10  # steps after a reset in which objects come to rest; not counted in MAX_STEPS
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0  # what env.step takes
ENV_SEED = 0  # moves the fixtures (which no init state contains), so it never varies
ACTION_DIM = 7  # delta position (3), delta axis-angle (3), gripper; all in [-1, 1]

# LIBERO stores 50 initial states per task. Each has one purpose for good; a stage that would mix them fails.
INIT_GROUPS = {"demos": range(0, 20), "prefs": range(20, 35), "val": range(35, 40), "test": range(40, 50)}


def init_states(group: str, n: int | None = None) -> list[int]:
    """The first n init-state numbers of a group (all when n is None).

    Raises:
        UserError: unknown group, or more states than it has (taking them elsewhere would mix the groups).
    """
    if group not in INIT_GROUPS:
        raise UserError(f"no group of init states is called {group!r}; {did_you_mean(group, INIT_GROUPS)}")
    states = list(INIT_GROUPS[group])
    if n is not None and not 0 < n <= len(states):
        raise UserError(f"group {group!r} has init states {states[0]}-{states[-1]}: choose 1 to {len(states)}, not {n}")
    return states[:n]


def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Unit quaternion (4,) xyzw -> rotation vector (3,) in radians, exactly as robosuite.utils.transform_utils.quat2axisangle.

    The end effector lives near an angle of pi, where q and -q give opposite vectors. LIBERO's data and all published
    policies use this conversion *without* taking the shorter arc, so the angle runs over [0, 2 pi].
    """
    assert quat.shape == (4,), quat.shape
    w = float(np.clip(quat[3], -1.0, 1.0))
    den = math.sqrt(1.0 - w * w)
    return np.zeros(3) if math.isclose(den, 0.0) else (quat[:3] * 2.0 * math.acos(w)) / den


def collate(obs: list[dict]) -> dict:
    """List of observations -> one batch: uint8 images (B, S, S, 3), float32 state (B, 8), instructions (list of B strings)."""
    return {
        "agentview": torch.from_numpy(np.stack([o["agentview"] for o in obs])),
        "wrist": torch.from_numpy(np.stack([o["wrist"] for o in obs])),
        "state": torch.from_numpy(np.stack([o["state"] for o in obs])).float(),
        "instruction": [o["instruction"] for o in obs],
    }


def blank_images(obs: dict) -> dict:
    """The control's view of the world: the same observation with both images black."""
    return obs | {camera: obs[camera] * 0 for camera in ("agentview", "wrist")}


def random_shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Augmentation: each image (B, S, S, 3) moved by up to `pixels` in both directions, its border repeated."""
    if pixels == 0:
        return images
    b, s = images.shape[:2]
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b), generator=generator)
    rows = (torch.arange(s) + dy[:, None]).clamp(0, s - 1)  # (B, S)
    cols = (torch.arange(s) + dx[:, None]).clamp(0, s - 1)
    return images[torch.arange(b)[:, None, None], rows[:, :, None], cols[:, None, :]]


def demonstrations(cfg, holdout: int) -> Iterator[tuple[str, bool, Demo]]:
    """(suite, held out, demonstration) of all demonstrations of a run, always in this order.

    Held out are those from the last `holdout` init states of each task, where it has more than so many.

    Raises:
        UserError: there are none, one starts from an init state that is kept for others, or images differ in size.
    """
    sizes = set()
    for suite in cfg.suites:
        folder, selected = cfg.data_dir / suite, [f"task_{task:02d}.hdf5" for task in sorted(cfg.tasks)]
        if absent := [name for name in selected if not (folder / name).is_file()]:
            raise UserError(f"{folder / absent[0]} is not there; run 00_demos.py for this task too")
        paths = [folder / name for name in selected] or sorted(folder.glob("task_*.hdf5"))
        if not paths:
            raise UserError(f"no demonstrations of {suite} in {folder}; run 00_demos.py for this suite too")
        for path in paths:
            task = int(path.stem.rpartition("_")[2])
            demos = list(read_demos(path, task))
            if wrong := [d for d in demos if d.init_state not in (-1, *INIT_GROUPS["demos"])]:
                raise UserError(f"{path}: demo_{wrong[0].number} starts from init state {wrong[0].init_state}, kept for others")
            starts = [d.init_state if d.init_state >= 0 else d.number for d in demos]
            distinct = sorted(set(starts))
            held = distinct[len(distinct) - holdout :] if len(distinct) > holdout else []
            sizes |= {demo.agentview.shape[1] for demo in demos}
            if len(sizes) > 1:
                raise UserError(f"{path}: images of {sorted(sizes)} pixels do not go together; record them anew, of one size")
            yield from ((suite, start in held, demo) for start, demo in zip(starts, demos, strict=True))
    if not sizes:
        raise UserError(f"no demonstrations under {cfg.data_dir} for suites {cfg.suites}, tasks {cfg.tasks or 'all'}")


# ------------------------------------------------------------------------------------------------------------ randomness
def _entropy(seed: int, names: tuple) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:8], "little")


def stream(seed: int, *names: int | str) -> torch.Generator:
    """A torch generator of its own for each (seed, names): what is drawn never depends on what was drawn elsewhere before."""
    return torch.Generator().manual_seed(_entropy(seed, names) >> 1)


def np_stream(seed: int, *names: int | str) -> np.random.Generator:
    """The same in numpy."""
    return np.random.default_rng(_entropy(seed, names))


def own_rows(*batch):
    """This rank's rows (ranks.py; alone, all) of a batch's parts: tensors, dicts of tensors and lists, draws, or None."""

    def own(x):
        if isinstance(x, dict):
            return {key: own(value) for key, value in x.items()}
        return x.rows(ranks.share(torch.arange(x.t.shape[1]))) if isinstance(x, Draws) else x if x is None else ranks.share(x)

    return tuple(own(x) for x in batch)


def divisible(key: str, batch_size: int) -> None:
    """UserError unless the ranks can take as many rows each."""
    if batch_size % ranks.size():
        raise UserError(f"{key}={batch_size} can't be split over {ranks.size()} processes; make it a multiple")


def shuffled(seed: int, name: str, step: int, batch_size: int, n: int) -> torch.Tensor:
    """Indices (batch_size,) of a training step: fresh permutations of n, epoch after epoch, a function of (seed, step) alone."""
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {e: torch.randperm(n, generator=stream(seed, f"{name} epoch", e)) for e in (places // n).unique().tolist()}
    return torch.stack([epochs[p // n][p % n] for p in places.tolist()])


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up to cfg.lr, then a cosine down to 1 % of it at cfg.steps."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


# --------------------------------------------------------------------------------- surrogate log-probability (paper, sec. 3)
# Time runs as in openpi and transformers: t = 1 is noise, t = 0 the action. (The paper writes it the other way round.)
LOG_SNR = math.log(99)  # scheme "logsnr": log((1-t) / t) between -LOG_SNR and LOG_SNR, so t between 0.01 and 0.99

# What a flow policy's log p(a | o) is estimated by -> the scheme of its draws (t, eps)
SURROGATES = {
    "paper": "stratified",  # its text: T = 4 times, a noise for each; here shared by the four terms of the loss
    "antithetic": "antithetic",  # at each of T/2 times a noise and its mirror image
    "elbo": "logsnr",  # the evidence lower bound, in nats up to a constant
    "independent": "iid",  # the paper's code: fresh draws, and augmented images, in each of the four terms
    "exact": "",  # no surrogate: the likelihood itself (likelihood.py)
}


@dataclass
class Draws:
    """The randomness of a flow-matching error, as an argument: whoever shares draws, shares noise."""

    t: torch.Tensor  # (K, B) times
    eps: torch.Tensor  # (K, B, H, D) noise

    def to(self, device: torch.device) -> Draws:
        return Draws(self.t.to(device), self.eps.to(device))

    def rows(self, index: torch.Tensor) -> Draws:
        """Those of some of the chunks."""
        return Draws(self.t[:, index], self.eps[:, index])

    def repeat(self, n: int) -> Draws:
        """The same draws for n batches laid end to end, e.g. [chosen; rejected]."""
        return Draws(self.t.repeat(1, n), self.eps.repeat(1, n, 1, 1))


def make_draws(batch: int, horizon: int, dim: int, k: int, generator: torch.Generator, scheme: str = "stratified") -> Draws:
    """K draws (t, eps) for each of `batch` chunks.

    scheme "stratified": t at the midpoints of k equal strata, the paper's {0.125, 0.375, 0.625, 0.875} for k = 4.
    scheme "beta": t ~ Beta(1.5, 1) * 0.999 + 0.001, openpi's training distribution (models_pytorch/pi0_pytorch.py),
    stratified over the k draws of a chunk as well, which leaves its marginal as it is.  "iid": the same, not stratified.
    scheme "antithetic": k/2 stratified times, each with a noise and its mirror image.
    scheme "logsnr": log((1-t)/t) at the midpoints of k strata; goes with the weight of that name.
    """
    one_of("scheme of draws", scheme, ("stratified", "beta", "iid", "antithetic", "logsnr"))
    strata = torch.arange(k)[:, None].expand(k, batch)
    t = (strata + 0.5) / k
    if scheme in ("beta", "iid"):
        uniform = torch.rand(k, batch, generator=generator)
        uniform = (strata + uniform) / k if scheme == "beta" else uniform
        t = uniform ** (1 / 1.5) * 0.999 + 0.001  # the quantile function of Beta(1.5, 1) is u^(1/1.5)
    if scheme == "logsnr":
        t = torch.sigmoid(LOG_SNR * (2 * t - 1))
    if scheme == "antithetic":
        half = make_draws(batch, horizon, dim, k // 2, generator)
        return Draws(half.t.repeat(2, 1), torch.cat([half.eps, -half.eps]))
    return Draws(t, torch.randn(k, batch, horizon, dim, generator=generator))


def time_weight(t: torch.Tensor, weight: str) -> torch.Tensor:
    """w(t) on the squared *velocity* error, with x_t = t eps + (1-t) a.

    "velocity": 1, the paper's.  "noise": (1-t)^2, which is the squared error in eps.  "elbo": (1-t)/t, half the derivative of
    the log signal-to-noise ratio times the error in eps; it diverges at t = 0 and is bounded at t = 0.05.
    "logsnr": that of the elbo over the density 1 / (2 LOG_SNR t (1-t)) of such times, which is bounded of itself.
    """
    if weight == "velocity":
        return torch.ones_like(t)
    if weight == "noise":
        return (1 - t) ** 2
    if weight == "elbo":
        return (1 - t) / t.clamp(min=0.05)
    if weight == "logsnr":
        return 2 * LOG_SNR * (1 - t) ** 2
    raise UserError(f"unknown weight {weight!r}; {did_you_mean(weight, ('velocity', 'noise', 'elbo', 'logsnr'))}")


def flow_matching_error(
    velocity: Callable, chunk: torch.Tensor, draws: Draws, mask: torch.Tensor, real_dim: int = ACTION_DIM
) -> torch.Tensor:
    """Squared velocity error per draw and chunk, summed over the executed actions and the real dimensions: (K, B).

    velocity: function of (index (K*B,) into the B observations, x_t (K*B, H, D), t (K*B,)) -> (K*B, H, D).
    chunk: (B, H, D) normalised.  mask: (B, H), True where an action counts.
    """
    k, b, h, d = draws.eps.shape
    assert chunk.shape == (b, h, d) and mask.shape == (b, h) and draws.t.shape == (k, b), (chunk.shape, mask.shape)
    t = draws.t[:, :, None, None]
    x_t = t * draws.eps + (1 - t) * chunk  # (K, B, H, D)
    u_t = draws.eps - chunk  # (K, B, H, D) the target: d x_t / dt
    index = torch.arange(b, device=chunk.device).repeat(k)
    v_t = velocity(index, x_t.flatten(0, 1), draws.t.flatten()).unflatten(0, (k, b))
    error = (v_t.float() - u_t)[..., :real_dim].square().sum(-1)  # (K, B, H)
    return (error * mask).sum(-1)


def surrogate_log_prob(
    velocity: Callable,
    chunk: torch.Tensor,
    draws: Draws,
    mask: torch.Tensor,
    weight: str = "velocity",
    real_dim: int = ACTION_DIM,
) -> torch.Tensor:
    """log p~(a | o) = - mean over draws of w(t) || v(x_t, t, o) - u_t ||^2, float32 (B,); paper sec. 3, its surrogate.

    Differs from the paper's code in taking the draws as an argument (theirs are fresh in each forward) and in the sum over
    the H x 7 dimensions (theirs is a mean, which makes the logit of DPO about 70 times smaller at the same beta).
    """
    error = flow_matching_error(velocity, chunk, draws, mask, real_dim)  # (K, B)
    return -(time_weight(draws.t, weight) * error).mean(0)


# -------------------------------------------------------------------------------------------------------------- adapters
def attach_adapter(policy, kind: str, rank: int, alpha: int, targets: str, seed: int):
    """Put LoRA or DoRA (peft) into the policy's linear layers that the regex matches; returns the PeftModel around it.

    The adapted policy starts as an exact identity (B = 0; DoRA's magnitude is the very norm that the forward pass computes),
    so that policy = reference gives a margin of exactly 0. Dropout is 0.
    """
    from peft import LoraConfig, get_peft_model

    import dora

    one_of("adapter", kind, ("lora", "dora"))
    if not any(regex("targets", targets).fullmatch(layer) for layer, _ in policy.named_modules()):
        raise UserError(f"the regex {targets!r} matches no layer of the policy")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, use_dora=kind == "dora")
    if kind == "dora":
        config._register_custom_module({torch.nn.Linear: dora.DoraLinear})
    with torch.random.fork_rng():  # peft draws A from the global generator
        torch.manual_seed(_entropy(seed, ("adapter", kind)) >> 1)
        return get_peft_model(policy, config)


def load_adapter(policy, folder: Path, dropout: float = 0.0):
    """The policy with the adapter of `folder` (peft's own format) merged into its weights, in evaluation mode.

    dropout: not merged, and its dropout is on (a control; nothing else of the policy drops anything).
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors; run 03_dpo.py first")
    try:
        with warnings.catch_warnings(action="ignore"):  # of keys that are missing; see below
            adapted = PeftModel.from_pretrained(policy, str(folder))
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no adapter of this policy ({one_line(error)}); run 03_dpo.py again") from error
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        if other := set(file.keys()) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False)):
            raise UserError(f"{folder} holds an adapter of another policy: only one of the two has {min(other)}")
    if not dropout:
        return adapted.merge_and_unload().eval()
    for layer in policy.eval().modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = torch.nn.Dropout(dropout)  # in training mode, as it is made
    return policy


def merged_copy(policy):
    """A copy of a policy with its adapter merged into plain weights; the policy itself stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    policy = copy.deepcopy(policy)
    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            policy.set_submodule(name, module.get_base_layer())
    return policy


# ---------------------------------------------------------------------------------------------------- policy and simulator
SFT_KEYS = "start checkpoint model device dtype"  # the shared config keys that decide which policy load_sft gives


def sft_inputs(cfg: RunConfig) -> list[Path]:
    """What load_sft reads, as inputs of a stage: the folder of stage 01, or the files of a published checkpoint."""
    return checkpoint_files(cfg.checkpoint) if cfg.checkpoint else [require(cfg.start_dir / "sft", "sft")]


def given_or_made(cfg: RunConfig, kind: str) -> list[Path]:
    """Pairs ("prefs") or adapter ("dpo") as inputs of a stage: the files that are given, or the folder of stage 02 or 03.

    Raises:
        UserError: they are not there, or 02 or 03 made them from another policy than that of `cfg`.
    """
    folder, own = cfg.source(kind), f" adapter={cfg.adapter} surrogate={cfg.surrogate} seed={cfg.seed}"
    hint = f" backbone={cfg.backbone} pairs={cfg.pairs} start={cfg.start}" + own * (kind == "dpo")
    if folder != cfg.variant(kind):
        return checkpoint_files(str(folder))
    made_from = read_identity(require(folder, kind, hint) / "done.json")["inputs"]
    if other := [path for path in sft_inputs(cfg) if input_name(path, Path(cfg.root) / cfg.name) not in made_from]:
        raise UserError(f"{folder} was not made from {other[0]}: set checkpoint= and start_seed= as they were for it")
    return [folder]


def load_sft(cfg: RunConfig):
    """The policy that everything starts from, in evaluation mode: `checkpoint` or that of stage 01, its final weights or the
    snapshot that `start` names."""
    import backbones

    folder = Path(cfg.checkpoint) if cfg.checkpoint else require(cfg.start_dir / "sft", "sft")
    weights = "model.safetensors" if cfg.start == "final" else f"model-{cfg.start}.safetensors"
    if cfg.start != "final" and not (folder / weights).is_file():
        kept = ", ".join(sorted(p.stem.partition("-")[2] for p in folder.glob("model-*.safetensors"))) or "none"
        raise UserError(f"no SFT snapshot of step {cfg.start} in {folder} (kept: {kept}); see sft.snapshots")
    policy = backbones.load_policy(folder, weights, cfg.model if cfg.checkpoint else None, cfg.suites)
    if policy.backbone != cfg.backbone:
        raise UserError(f"{folder} is a checkpoint of {policy.backbone}; set backbone={policy.backbone}")
    return policy.cast(cfg.dtype).to(ranks.place(cfg.device)).eval()


@torch.no_grad()
def propose(policy, obs: dict, cfg: RunConfig, generators: list[torch.Generator]) -> torch.Tensor:
    """One normalised chunk (H, 7) per generator for one observation, which is encoded once: (N, H, 7)."""
    obs = collate([blank_images(obs) if cfg.blank_images else obs])
    if cfg.execute > policy.horizon:
        raise UserError(f"execute={cfg.execute} actions of a chunk, but the policy's chunks have {policy.horizon}")
    prefix = policy.encode(obs).select(torch.zeros(len(generators), dtype=torch.long))
    noise = cfg.noise_scale * torch.cat([policy.noise(1, g) for g in generators])
    chunks = policy.sample_actions(prefix, noise, cfg.denoise_steps).cpu()
    if not chunks.isfinite().all():
        raise UserError("the policy's actions are not finite: its weights or statistics are damaged")
    return chunks


def carry_out(env, actions: np.ndarray) -> int:
    """Execute actions (n, 7) in env units until they, the task or the time end; returns how many were executed."""
    for i, action in enumerate(actions):
        if env.step(np.clip(action, -1, 1)) or env.steps >= env.max_steps:
            return i + 1
    return len(actions)


# ---------------------------------------------------------------------------------------------------------------- config
@dataclass
class RunConfig:
    """Keys that several stages share: top level of the YAML. A stage's own keys stand in its own section."""

    name: str = ""  # the YAML's file name; names the run folder
    root: str = "runs"
    suites: list[str] = field(default_factory=lambda: ["libero_object"])
    tasks: list[int] = field(default_factory=list)  # task numbers within a suite; empty = all ten
    backbone: str = "pi05"
    model: dict = field(default_factory=dict)  # sizes and knobs of the backbone, see backbones/
    stages: str = ""  # that run_all.sh runs where its command line names none; empty = its default
    adapters: str = ""  # the same: which adapters it trains and evaluates
    init_from: str = ""  # folder of a checkpoint, published or the kit's, that 01 starts from; empty = from scratch
    checkpoint: str = ""  # folder of such weights that 02 to 07 start from; empty = 01's
    pairs_from: str = ""  # folder of preference pairs that 03 and 07 take; empty = 02's
    adapters_from: str = ""  # folder that holds lora/ and dora/, trained adapters that 04 and 07 take; empty = 03's
    device: str = "cpu"  # or "cuda", with torchrun a GPU per rank
    dtype: str = "float32"  # of the large weights: "float32" or "bfloat16"; log-probabilities and flow stay float32
    seed: int = 42  # of training, of the policy's noise
    image_size: int = 64  # pixels rendered, both cameras
    render: str = "fast"  # "fast" or "default" (what published checkpoints must be shown)
    blank_images: bool = False  # control: black images, in whichever stage it is set
    start: str = "final"  # SFT weights that prefs, dpo and eval start from: "final", or a snapshot's step such as "1500"
    pairs: str = "branch"  # preference recipe: "branch", "episode" or "whole", see 02
    adapter: str = "lora"  # "lora" or "dora"
    surrogate: str = "paper"  # what DPO takes for log p of a flow policy, see SURROGATES
    start_seed: int = 0  # seed whose SFT policy and pairs DPO uses, for more training seeds on the same; 0 = `seed`
    execute: int = 8  # actions of a chunk that are carried out before the policy looks again
    denoise_steps: int = 10  # Euler steps of sample_actions, for flow matching
    noise_scale: float = 1.0  # of the noise that a chunk is sampled from; for action tokens the temperature, 0 = greedy
    workers: int = 2  # simulator processes; never changes a result
    dry_run: bool = False  # or --dry-run: print how much memory a stage would take (memory.py), and do nothing
    overwrite: bool = False  # redo a stage whose config, inputs or code have changed

    def __post_init__(self):
        from backbones import BACKBONES

        for f in dataclasses.fields(self):  # of any stage: no number is below 0, but a cosine, nor too large for a seed
            value = getattr(self, f.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not (f.name == "threshold" or 0 <= number <= 2**62):
                    raise UserError(f"config key {f.name!r} must be 0 or more and no more than 2^62, not {value}")
        at_least(self, execute=1, denoise_steps=1, workers=1, image_size=16)
        at_most(self, image_size=480)
        one_of("backbone", self.backbone, BACKBONES)
        for suite in self.suites or [""]:
            one_of("suite", suite, MAX_STEPS)
        if len({*self.suites}) < len(self.suites) or len({*self.tasks}) < len(self.tasks):
            raise UserError(f"suites={self.suites}, tasks={self.tasks}: name each once, episodes would count twice")
        if self.name != Path(self.name).name or self.name == ".." or not re.fullmatch(r"final|[0-9]+", self.start):
            raise UserError(f"name={self.name!r} must be a folder's name, start={self.start!r} a step or 'final'")
        choices = {"render": ("fast", "default"), "pairs": ("branch", "episode", "whole"), "adapter": ("lora", "dora")}
        choices |= {"device": ("cpu", "cuda"), "dtype": ("float32", "bfloat16"), "surrogate": SURROGATES}
        for key, known in choices.items():
            one_of(key, getattr(self, key), known)
        if self.device == "cuda" and not self.dry_run and not torch.cuda.is_available():
            raise UserError("device=cuda, but PyTorch sees no GPU; use device=cpu, or install a CUDA build of PyTorch")

    @property
    def data_dir(self) -> Path:
        return Path(self.root) / self.name / "data"

    @property
    def seed_dir(self) -> Path:
        return Path(self.root) / self.name / self.backbone / f"seed{self.seed}"

    @property
    def start_dir(self) -> Path:
        """Where the SFT policy and the pairs are."""
        return self.seed_dir.with_name(f"seed{self.start_seed or self.seed}")

    def source(self, kind: str) -> Path:
        """Folder of the pairs ("prefs") or the adapter ("dpo") that a stage reads: one that is given, or that of 02 or 03."""
        given = self.pairs_from if kind == "prefs" else self.adapters_from and f"{self.adapters_from}/{self.adapter}"
        return Path(given) if given else self.variant(kind)

    @property
    def policy_code(self) -> list[str]:
        """The files that make this policy what it is."""
        names = ["__init__", "layers", *sorted(p.stem for p in (HERE / "backbones").glob(f"{self.backbone}*.py"))]
        return [f"backbones/{name}.py" for name in names + ["published"] * bool(self.checkpoint)]

    def variant(self, kind: str) -> Path:
        """Folder of a stage that depends on `pairs`, `start`, `adapter`, `surrogate`: prefs, dpo, validate."""
        parts = [kind, *[self.adapter] * (kind == "dpo"), self.pairs]
        parts += [self.surrogate] * (kind == "dpo" and self.surrogate != "paper")
        parts += [] if self.start == "final" else [f"at{self.start}"]
        return (self.start_dir if kind == "prefs" else self.seed_dir) / "-".join(parts)


def at_least(cfg, **least: float) -> None:
    """UserError unless each named config key is at least so much."""
    for key, low in least.items():
        if getattr(cfg, key) < low:
            raise UserError(f"config key {key!r} must be at least {low}, not {getattr(cfg, key)}")


def at_most(cfg, **most: float) -> None:
    """UserError if a named config key is more than so much."""
    for key, high in most.items():
        if getattr(cfg, key) > high:
            raise UserError(f"config key {key!r} must be at most {high}, not {getattr(cfg, key)}")


def regex(key: str, text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{key}={text!r} is no regular expression ({error})") from error


def one_of(key: str, value, known) -> None:
    """UserError unless the value of a config key is a known one."""
    if value not in known:
        raise UserError(f"unknown {key}={value!r}; {did_you_mean(value, known)}")


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, known))}"


def typed(value, kind, key: str):
    """value as the field's type. PyYAML reads 5e-5 as a string: the type decides, not the spelling."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is list and isinstance(value, list):
            return [typed(v, args[0], key) for v in value]
        if kind is dict and isinstance(value, dict):
            return value
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool) and "\0" not in str(value):
            return str(value)
        if kind is int and type(value) is int:  # as it is: a float has no room for large ones
            return value
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise UserError(f"config key {key!r} must be {name}, not {value!r}")


def read_yaml(path: Path, above: tuple[str, ...] = ()) -> dict:
    """A config file, laid over the one of its folder that it names as `base`. above: those that led here."""
    if not path.is_file():
        near = did_you_mean(path.stem, [p.stem for p in (HERE / "configs").glob("*.yaml")])
        raise UserError(f"no config file {path}; {near}")
    data = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    base = data.pop("base", None)
    if not isinstance(base, str | None) or (base and (Path(base).name != base or base in (*above, path.name))):
        raise UserError(f"{path}: base must name another YAML of its folder, not {base!r}")
    return laid_over(read_yaml(path.parent / base, (*above, path.name)), data) if base else data


def parse_yaml(text: str | bytes, where: str):
    """Plain data of a YAML text; nothing in it is executed."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise UserError(f"{where} is not valid YAML: {one_line(error)}") from error


def laid_over(below: dict, above: dict) -> dict:
    """`above` wins, key by key; sections are merged."""
    both_dicts = [key for key in above if isinstance(below.get(key), dict) and isinstance(above[key], dict)]
    return below | above | {key: laid_over(below[key], above[key]) for key in both_dicts}


def for_backbone(data: dict, backbone: str) -> dict:
    """A config as one backbone sees it: the section of its name laid over the rest, the others' left out."""
    from backbones import BACKBONES

    for name in BACKBONES:
        if not isinstance(data.get(name) or {}, dict):
            raise UserError(f"section {name!r} must hold `key: value` lines")
    return laid_over({key: value for key, value in data.items() if key not in BACKBONES}, data.get(backbone) or {})


def load_config(cls: type, section: str, argv: list[str]):
    """Config of one stage from `CONFIG.yaml [key=value ...]`: defaults < YAML < command line.

    YAML: shared keys at the top level, the stage's own under `section`, what holds for one backbone alone under its name;
    `base: OTHER.yaml` in a file that only says what differs from another one. On the command line a key may carry its
    section (`dpo.beta=0.2`); those of other stages are passed over. Raises UserError for unknown keys and wrong types.
    """
    argv = ["dry_run=true" if item == "--dry-run" else item for item in argv]
    if not argv or "=" in argv[0]:
        raise UserError("usage: python SCRIPT.py configs/NAME.yaml [key=value ...]")
    path = Path(argv[0])
    data = read_yaml(path)
    backbone = [item.partition("=")[2] for item in argv[1:] if item.startswith("backbone=")]
    data = for_backbone(data, str([data.get("backbone", RunConfig.backbone), *backbone][-1]))

    shared, fields = typing.get_type_hints(RunConfig), typing.get_type_hints(cls)
    values = {"name": path.stem}

    def put(key: str, value, where: str):
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; {did_you_mean(key, fields)}")
        values[key] = typed(value, fields[key], key)

    for key, value in data.items():
        if key in STAGES or key == "model":
            if not isinstance(value, dict | None):
                raise UserError(f"{path}: section {key!r} must hold `key: value` lines")
            if key == section:
                for inner, v in (value or {}).items():
                    put(inner, v, f"{path}, section {section}")
            elif key == "model":
                put(key, value or {}, str(path))
        elif key in shared:
            put(key, value, str(path))
        else:
            raise UserError(f"{path}: unknown key {key!r}; {did_you_mean(key, [*shared, *STAGES, 'model'])}")
    for item in argv[1:]:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not key=value")
        prefix, dot, inner = key.rpartition(".")
        if dot and prefix not in STAGES:
            raise UserError(f"{item!r}: no stage is called {prefix!r}; {did_you_mean(prefix, STAGES)}")
        if not dot or prefix == section:
            value = parse_yaml(text, f"{item!r}, after the equals sign,") if text else ""  # key= clears a text
            put(inner, value, "command line")
    return cls(**values)


DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); a UserError becomes one line on stderr and exit code 2, and so does a disk that takes no more."""
    try:
        main()
        ranks.part()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        ranks.leave(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        said = " ".join(str(error).split())
        print(f"error: {said}; make room, or name another folder with root=, the same command then goes on", file=sys.stderr)
        ranks.leave(2)
    except KeyboardInterrupt:
        sys.exit(130)


def progress(iterable=None, **kwargs):
    """tqdm that stays quiet when the output is not a terminal, and on all ranks but the first."""
    from tqdm import tqdm

    return tqdm(iterable, disable=None if ranks.first() else True, dynamic_ncols=True, **kwargs)


def main() -> None:
    """Check the config against every stage at once, and print it."""
    sys.path.insert(0, str(HERE))
    for section, script in STAGES.items():
        cfg = load_config(importlib.import_module(script).Config, section, sys.argv[1:])
        if cfg.model:
            importlib.import_module("backbones").horizon(cfg.backbone, cfg.model)
        own = {f.name for f in dataclasses.fields(cfg)} - {f.name for f in dataclasses.fields(RunConfig)}
        print(f"{section}: " + " ".join(f"{key}={getattr(cfg, key)}" for key in sorted(own)))
    print("shared: " + " ".join(f"{f.name}={getattr(cfg, f.name)}" for f in dataclasses.fields(RunConfig)))


if __name__ == "__main__":
    run(main)
