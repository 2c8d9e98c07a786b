"""What two or more stages must agree on: LIBERO's conventions, pairs, the surrogate, adapters, config keys.

Code belongs here if two stages use it and a silent difference between copies would change a result.
Losses, pair selection and training loops stay in their stage. Importing this module is cheap.
"""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from runtime import Count, Place, PlaceConfig, disk, one_of, refuse, stage, typed, warn
from runtime.origin import origin, same_origin
from runtime.seeds import entropy, np_stream, own_rows, select, shuffled, stream  # noqa: F401 (for stages)

# ----------------------------------------------------------------------------------------------------- LIBERO
# As OpenVLA evaluates (experiments/robot/libero/run_libero_eval.py), and openpi (examples/libero/main.py)
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
MAX_STEPS = dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True))
# LIBERO-PRO's layouts of a suite's tasks -> the suite. `_swap`: objects change places. `_temp_x0.N` and
# `_temp_y0.N`: Object's target moves by N x 7 cm. (Not y0.5: the package lacks init states of its task 1.)
LAYOUTS = {
    **{f"{suite}_swap": suite for suite in SUITES[:4]},
    "libero_object_look": SUITES[1],  # libero_object_swap, but the arm starts as in libero_object
    **{f"libero_object_temp_{a}0.{n}": SUITES[1] for a in "xy" for n in range(1, 6 if a == "x" else 5)},
}
MAX_STEPS |= {layout: MAX_STEPS[suite] for layout, suite in LAYOUTS.items()}
SETTLE_STEPS = 10  # steps after a reset in which objects come to rest; MAX_STEPS does not count them
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0  # what env.step takes
ENV_SEED = 0  # places the fixtures, which no init state stores; so it never varies
ACTION_DIM = 7  # delta position (3), delta axis-angle (3), gripper; all in [-1, 1]
CAMERAS = ("agentview", "wrist")
EXECUTE = 8  # actions of a chunk between two looks, where nothing says otherwise

# LIBERO stores 50 init states per task. Each has one purpose for good; a stage that would mix them fails.
INIT_GROUPS = {"demos": range(0, 20), "prefs": range(20, 35), "val": range(35, 40), "test": range(40, 50)}


def init_states(group: str, n: int | None = None) -> list[int]:
    """The first n init-state numbers of a group (all when n is None).

    Raises:
        UserError: more states than it has: those of the next group have another purpose.
    """
    states = list(INIT_GROUPS[group])
    known = f"{group!r} has init states {states[0]}-{states[-1]}"
    refuse(
        n is not None and not 0 < n <= len(states), f"{known}: choose 1 to {len(states)} (n_init), not {n}"
    )
    return states[:n]


def blank_images(obs: dict) -> dict:
    """The same observation with black images: a control that shows whether a policy uses its images."""
    return obs | {camera: obs[camera] * 0 for camera in CAMERAS}


SHIFT = 4  # pixels of random_shift in 01, and in 03 and 07 for surrogate=independent


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Augmentation: move each image (B, S, S, 3) by up to `pixels` in both directions; the border repeats."""
    b, s = images.shape[:2]
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b), generator=generator)
    rows = (torch.arange(s) + dy[:, None]).clamp(0, s - 1)  # (B, S)
    cols = (torch.arange(s) + dx[:, None]).clamp(0, s - 1)
    return images[torch.arange(b)[:, None, None], rows[:, :, None], cols[:, None, :]]


# ------------------------------------------------------------------------------------------------------ pairs
def read_pairs(folder: Path, policy=None) -> dict:
    """02's pairs: their tensors, `instruction` (N strings) and `attempt` (N,), which attempt found each pair.

    Raises:
        UserError: something is missing, not finite or of another shape, or `policy` has chunks of another
            length.
    """
    path = folder / "pairs.safetensors"
    pairs, again = disk.load_tensors(path), disk.AGAIN
    keys = ("agentview", "wrist", "state", "chosen", "rejected", "mask")
    absent = [key for key in keys if key not in pairs]
    refuse(absent, f"{path} lacks {', '.join(absent)}; {again}")
    rows = disk.read_jsonl(folder / "pairs.jsonl", "instruction")
    pairs["instruction"] = [row["instruction"] for row in rows]
    source = [(row.get("suite"), row.get("task"), row.get("unit", i)) for i, row in enumerate(rows)]
    number = {key: i for i, key in enumerate(dict.fromkeys(source))}
    pairs["attempt"] = torch.tensor([number[key] for key in source])
    n, h, size = len(rows), pairs["mask"].shape[1:2], pairs["agentview"].shape[1:2]
    image, chunk = (n, *size, *size, 3), (n, *h, 7)
    for key, shape in zip(keys, (image, image, (n, 8), chunk, chunk, (n, *h)), strict=True):
        wrong = n == 0 or pairs[key].shape != shape or not pairs[key].isfinite().all()
        refuse(
            wrong, f"{path}: {key} has another shape than the rest, or values that are not finite; {again}"
        )
    refuse(pairs["mask"].dtype != torch.bool, f"{path}: mask must be boolean; {again}")
    equal = ((pairs["chosen"] == pairs["rejected"]).all(-1) | ~pairs["mask"]).all(-1)  # (N,)
    many = f"{path}: in {int(equal.sum())} of {n} pairs the executed chunks do not differ"
    refuse(equal.all(), f"{many}; collect others")
    if equal.any():
        warn(f"{many}; they are trained on, and teach DPO nothing")
    if policy is not None:
        refuse(
            h != (policy.horizon,),
            f"the pairs have chunks of {h[0]} actions, the policy of {policy.horizon}: "
            "they are another policy's, see pairs_from",
        )
        same_origin(policy, path)
    return pairs


# ------------------------------------------------------------- surrogate log-probability (paper, section 3.2)
# t = 1 is noise, t = 0 the action, as in openpi and transformers. (The paper writes it the other way round.)
# Scheme "logsnr": half the log SNR, log((1-t) / t), lies within this: t is 0.01 to 0.99.
HALF_LOG_SNR = math.log(99)

SURROGATES = {  # what stands for log p(a | o) of a flow policy -> the scheme of its draws (t, eps)
    "paper": "stratified",  # its text: T = 4 times, a noise for each; the four terms of the loss share them
    "mirrored": "mirrored",  # at each of T/2 times a noise and its mirror image
    "elbo": "logsnr",  # the evidence lower bound, in nats up to a constant
    "independent": "iid",  # the paper's code: fresh draws, and augmented images, in each of the four terms
    "exact": "",  # no surrogate: the likelihood itself (backbones/likelihood.py)
}
TIME_WEIGHTS = {  # w(t) on the squared *velocity* error, of times of any shape
    "velocity": torch.ones_like,  # the paper's
    "noise": lambda t: (1 - t) ** 2,  # makes it the squared error in eps
    # 1/2 |d log SNR / dt| on the error in eps, capped near t = 0: the bound where t is uniform
    "elbo": lambda t: (1 - t) / t.clamp(min=0.05),
    "logsnr": lambda t: 2 * HALF_LOG_SNR * (1 - t) ** 2,  # the same over the density of "logsnr"'s times
}


@dataclass
class Draws:
    """The randomness of a flow-matching error, as an argument: whoever shares draws, shares noise."""

    t: Tensor  # (K, B) times
    eps: Tensor  # (K, B, H, D) noise

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.t.to(device), self.eps.to(device))

    def select(self, index: Tensor) -> "Draws":
        """The draws of some of the chunks."""
        return Draws(self.t[:, index], self.eps[:, index])

    def repeat(self, n: int) -> "Draws":
        """The same draws for n batches laid end to end, e.g. [chosen; rejected]."""
        return Draws(self.t.repeat(1, n), self.eps.repeat(1, n, 1, 1))


def make_draws(batch: int, horizon: int, dim: int, k: int, generator: torch.Generator, scheme: str) -> Draws:
    """K draws (t, eps) for each of `batch` chunks. scheme:

    "stratified": t at the midpoints of k equal strata, the paper's {0.125, 0.375, 0.625, 0.875} for k = 4.
    "mirrored": k/2 stratified times, each with a noise and its mirror image.
    "iid": t ~ Beta(1.5, 1) * 0.999 + 0.001, openpi's training distribution (models_pytorch/pi0_pytorch.py).
    "beta": the same, stratified over the k draws of a chunk, which leaves its marginal as it is.
    "logsnr": log((1-t)/t) at the midpoints of k strata; goes with the weight of that name.
    """
    one_of("scheme of draws", scheme, ("stratified", "mirrored", "iid", "beta", "logsnr"))
    if scheme == "mirrored":
        half = make_draws(batch, horizon, dim, k // 2, generator, "stratified")
        return Draws(half.t.repeat(2, 1), torch.cat([half.eps, -half.eps]))
    strata = torch.arange(k)[:, None].expand(k, batch)
    t = (strata + 0.5) / k
    if scheme in ("beta", "iid"):
        uniform = torch.rand(k, batch, generator=generator)
        uniform = (strata + uniform) / k if scheme == "beta" else uniform
        t = uniform ** (1 / 1.5) * 0.999 + 0.001  # the quantile function of Beta(1.5, 1) is u^(1/1.5)
    if scheme == "logsnr":
        t = torch.sigmoid(HALF_LOG_SNR * (2 * t - 1))
    return Draws(t, torch.randn(k, batch, horizon, dim, generator=generator))


def flow_matching_error(velocity: Callable, chunk: Tensor, draws: Draws, mask: Tensor):
    """Squared velocity error per draw and chunk, over the actions that count and their 7 dimensions: (K, B).

    velocity: function of (index (K*B,) into the B observations, x_t (K*B, H, D), t (K*B,)) -> (K*B, H, D).
    chunk: (B, H, D) normalised.  mask: (B, H), True where an action counts.
    """
    k, b, h, d = draws.eps.shape
    assert (chunk.shape, mask.shape, draws.t.shape) == ((b, h, d), (b, h), (k, b)), (chunk.shape, mask.shape)
    t = draws.t[:, :, None, None]
    x_t = t * draws.eps + (1 - t) * chunk  # (K, B, H, D)
    u_t = draws.eps - chunk  # (K, B, H, D) the target: d x_t / dt
    index = torch.arange(b, device=chunk.device).repeat(k)
    v_t = velocity(index, x_t.flatten(0, 1), draws.t.flatten()).unflatten(0, (k, b))
    error = (v_t.float() - u_t)[..., :ACTION_DIM].square().sum(-1)  # (K, B, H)
    return (error * mask).sum(-1)


def surrogate_log_prob(error: Tensor, t: Tensor, weight: str = "velocity") -> Tensor:
    """log p~(a | o) = - mean over draws of w(t) || v(x_t, t, o) - u_t ||^2, float32 (B,); paper, section 3.2.

    error: the squared norm for each draw and chunk, by flow_matching_error.  t: its times. Both (K, B).
    Differs from the paper's code: draws are an argument (theirs are fresh in each forward). Errors are summed
    over the 7 dimensions of the actions that count. Theirs is a mean over all H x 7: where 8 actions count,
    DPO's logit is some 56 times smaller at the same beta.
    """
    w = TIME_WEIGHTS[weight](t)  # (K, B)
    return -(w * error).mean(0)


# --------------------------------------------------------------------------------------------------- adapters
def attach_adapter(policy, kind: str, rank: int, alpha: int, targets: str, seed: int):
    """Put LoRA or DoRA (peft) into `policy` itself: into the linear layers whose names match `targets`.

    Returns peft's wrapper of it, for `save_adapter`.

    The adapted policy starts as an exact identity (B = 0; DoRA's magnitude is the norm that the forward pass
    computes), so that policy = reference gives a margin of exactly 0. Dropout is 0.
    """
    from peft import LoraConfig, get_peft_model

    import dora

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=kind == "dora")
    if kind == "dora":
        config._register_custom_module({torch.nn.Linear: dora.DoraLinear})
    with torch.random.fork_rng():  # peft draws A from the global generator
        torch.manual_seed(entropy(seed, ("adapter", kind)) >> 1)
        return get_peft_model(policy, config)


def save_adapter(adapted, folder: Path) -> None:
    """The adapter in peft's own format; its file's header says which policy it was trained on."""
    path, targets = folder / "adapter_model.safetensors", adapted.peft_config["default"].target_modules
    with disk.writing(folder):
        adapted.save_pretrained(str(folder))
    disk.save_tensors(path, disk.load_finite(path), origin(adapted.get_base_model(), targets))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def load_adapter(policy, folder: Path, trainable: bool = False):
    """The policy, in evaluation mode, with an adapter in peft's format.

    It is merged where all weights are float32. Else, and if trainable, it stays beside them.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    import dora

    in_float32 = all(p.dtype == torch.float32 for p in policy.parameters())  # bfloat16 loses small changes
    path = folder / "adapter_model.safetensors"
    refuse(not path.is_file(), f"{folder} holds no adapter_model.safetensors; run 03_dpo.py first")
    tensors = disk.load_finite(path)
    same_origin(policy, path)
    with (
        disk.reading(folder, "run 03_dpo.py again", "holds no adapter of this policy"),
        warnings.catch_warnings(action="ignore"),  # of missing keys, which are an error below
    ):
        config = LoraConfig.from_pretrained(str(folder))
        if config.use_dora and not in_float32:
            config._register_custom_module({torch.nn.Linear: dora.DoraLinear})
        adapted = PeftModel.from_pretrained(policy, str(folder), is_trainable=trainable, config=config)
    other = {*tensors} ^ {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    refuse(other, f"{folder} holds an adapter of another policy: only one has {min(other, default='')}")
    return (adapted if trainable else (adapted.merge_and_unload() if in_float32 else policy)).eval()


# ------------------------------------------------------------------------------------------------ config keys
@dataclass
class RunConfig(PlaceConfig):
    """Keys of every stage, at the top level of the YAML. A stage inherits those that it may read. All of
    them count in its identity, except those that `left_out` names."""

    suites: list[Literal[tuple(MAX_STEPS)]] = field(default_factory=lambda: ["libero_object"])
    tasks: list[int] = field(default_factory=list)  # task numbers within a suite; empty = all

    def __post_init__(self):
        twice = len({*self.suites}) < len(self.suites) or len({*self.tasks}) < len(self.tasks)
        refuse(
            twice or not self.suites, f"suites={self.suites}, tasks={self.tasks}: name one or more, each once"
        )

    data_dir = property(lambda self: self.run_dir / "data")


@dataclass
class SceneConfig(RunConfig):
    """Keys of stages that render. `default` frames are those that published checkpoints were trained on."""

    image_size: Annotated[int, 16, 480] = 64  # pixels, both cameras
    render: Literal["fast", "default"] = "fast"


@dataclass
class PolicyConfig(RunConfig):
    """Keys of stages that train or run a policy."""

    backbone: Literal["pi05", "openvla"] = "pi05"
    model: dict = field(default_factory=dict)  # sizes and knobs of the backbone, see backbones/
    init_from: Place = ""  # folder of a checkpoint that 01 starts from; empty = from scratch
    device: Literal["cpu", "cuda"] = "cpu"  # with torchrun a GPU per process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of large weights; log-probabilities stay float32
    seed: Count = 42  # of training, and of the policy's noise
    blank_images: bool = False  # control: black images, in whichever stage it is set

    def __post_init__(self):
        super().__post_init__()
        refuse(
            self.device == "cuda" and not self.dry_run and not torch.cuda.is_available(),
            f"device=cuda, but PyTorch sees no GPU (CUDA_VISIBLE_DEVICES is"
            f" {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')!r});"
            " use device=cpu, or install a CUDA build",
        )

    seed_dir = property(lambda self: self.run_dir / self.backbone / f"seed{self.seed}")
    given = property(lambda self: getattr(self, "checkpoint", self.init_from))  # folder to start from, or ""


@dataclass
class StartConfig(PolicyConfig):
    """Keys of stages that start from an SFT policy."""

    checkpoint: Place = ""  # folder of weights that 02 to 07 start from; empty = 01's
    start: Annotated[str, "final|[0-9]+"] = "final"  # which of 01's weights: the last, or a snapshot's step
    start_seed: int = 0  # whose SFT policy and pairs to take, to train DPO on them again; 0 = `seed`'s

    def variant(self, *words: str) -> str:
        """Name of a folder whose contents depend on `start`."""
        return "-".join(words if self.start == "final" else [*words, f"at{self.start}"])

    start_dir = property(lambda self: self.seed_dir.with_name(f"seed{self.start_seed or self.seed}"))

    def sft_inputs(self) -> list[Path]:
        """The files of `checkpoint`, or the folder of stage 01."""
        if self.checkpoint:
            inside = Path(self.root).resolve().is_relative_to(Path(self.checkpoint).resolve())
            refuse(inside, f"root={self.root} lies in the checkpoint's folder; choose another root=")
            return stage.checkpoint_files(self.checkpoint)
        folder = stage.require(
            self.start_dir / "sft",
            "sft",
            f" name={self.name} backbone={self.backbone} seed={self.start_seed or self.seed}",
        )
        self.made_with(folder, "model")
        return [folder]

    def made_with(self, folder: Path, *labels: str) -> None:
        """UserError if a stage made this folder with other values of these keys."""
        done = folder / "done.json"
        made = disk.read_object(done).get("config", {}) if done.is_file() else {}
        for key in [label for label in labels if label in made]:
            its, ours = made[key], getattr(self, key)
            refuse(its != ours, f"{folder} was made with {key}={its}, not {ours}; set {key}={its}")


@dataclass
class ActingConfig(StartConfig):
    """Keys of stages in which the policy acts."""

    execute: Annotated[int, 0] = 0  # actions between two looks; 0 = lerobot's n_action_steps, or 8
    denoise_steps: Annotated[int, 0] = 0  # Euler steps, of flow; 0 = lerobot's num_inference_steps, or 10
    noise_scale: float = 1.0  # of the noise behind a chunk; for action tokens the temperature, 0 = greedy

    def __post_init__(self):
        super().__post_init__()
        path = Path(self.checkpoint, "config.json")
        said = disk.read_object(path) if self.checkpoint and path.is_file() else {}
        self.execute = self.execute or typed(said.get("n_action_steps", EXECUTE), Count, "n_action_steps")
        steps = typed(said.get("num_inference_steps", 10), Count, "num_inference_steps")
        self.denoise_steps = self.denoise_steps or steps


@dataclass
class PairsConfig(StartConfig):
    """Keys of stages that make or use preference pairs."""

    pairs: Literal["branch", "episode", "whole"] = "branch"  # how 02 makes them
    pairs_from: Place = ""  # folder of preference pairs that 03 and 07 take; empty = 02's

    made_pairs = property(lambda self: self.start_dir / self.variant("prefs", self.pairs))
    pairs_dir = property(lambda self: Path(self.pairs_from) if self.pairs_from else self.made_pairs)

    def made_from_ours(self, folder: Path, section: str, hint: str = "") -> list[Path]:
        """`folder` as an input; UserError unless its stage has made it from this config's SFT policy."""
        hint = f" name={self.name} backbone={self.backbone} pairs={self.pairs} start={self.start}{hint}" + (
            f" checkpoint={self.checkpoint}" if self.checkpoint else ""
        )
        made_from = stage.read_identity(stage.require(folder, section, hint) / "done.json")["inputs"]
        for path in self.sft_inputs():
            refuse(
                stage.input_name(path, self.run_dir) not in made_from,
                f"{folder} was not made from {path}: set checkpoint= and start_seed= as they were for it",
            )
        return [folder]

    def pairs_inputs(self) -> list[Path]:
        own = (
            []
            if self.pairs_from
            else self.made_from_ours(self.made_pairs, "prefs", f" seed={self.start_seed or self.seed}")
        )
        self.made_with(self.pairs_dir, "pairs", "suites", "tasks")
        return own or stage.checkpoint_files(self.pairs_from)


@dataclass
class AdapterConfig(PairsConfig):
    """Keys of stages that train or use an adapter."""

    adapter: Literal["lora", "dora"] = "lora"
    adapters_from: Place = ""  # folder with lora/ and dora/, adapters that 04 and 07 take; empty = 03's
    surrogate: Literal[tuple(SURROGATES)] = "paper"  # what DPO takes for log p of a flow policy
    held_out: int = 0  # N: every N-th attempt that gave a pair is only measured, not trained on; 0 = none

    @property
    def made_adapter(self) -> Path:
        """Where 03 writes."""
        other = [] if self.surrogate == "paper" else [self.surrogate]
        return self.seed_dir / self.variant("dpo", self.adapter, self.pairs, *other)

    adapter_dir = property(
        lambda self: Path(self.adapters_from, self.adapter) if self.adapters_from else self.made_adapter
    )

    def adapter_inputs(self, *labels: str) -> list[Path]:
        """A given adapter's files, or 03's folder. labels: more keys with which a given one must be made."""
        if self.adapters_from:
            self.made_with(self.adapter_dir, "pairs", "surrogate", *labels)
            return stage.checkpoint_files(str(self.adapter_dir))
        return self.made_from_ours(
            self.made_adapter,
            "dpo",
            f" adapter={self.adapter} surrogate={self.surrogate} seed={self.seed}"
            f" start_seed={self.start_seed}",
        )
