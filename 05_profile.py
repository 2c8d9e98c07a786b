"""05 - Where the time of an inference goes (the paper's section on inference).

reads   <run>/<backbone>/seed<k>/sft/ (01); nothing with profile.weights=random
writes  <run>/<backbone>/seed<k>/profile/: latency.json, table.{json,md}, done.json
cost    configs/tiny.yaml: 1.5 minutes
try     python 05_profile.py configs/tiny.yaml
        python 05_profile.py configs/pi05.yaml device=cpu profile.weights=random profile.repeats=2

An inference goes from an observation to a chunk of actions. This stage times every part of it: on a CPU in
CPU seconds of this process, which a busy machine does not change, on a GPU by CUDA events. The times are
exclusive, so they add up to the whole, which is timed on its own too. The code is eager. On a CPU, 02 and 04
act with a trace of the Euler step (Pi05.traced), whose denoising takes about half the time.
A prefix cache saves at most the image towers and the prefix. Amdahl's law turns their share into a ceiling on
the speed-up. The share is not a property of the architecture: the paper's 21.4 % (60 of 280 ms) belongs to
eager code on one GPU, where the denoise steps launch many small kernels and wait for Python. The roofline
says what the hardware needs for the same operations.
See also extras/cells.py (success with caches and fewer denoise steps) and extras/distill.py (a student that
takes one step).
Differs from the paper: synchronised clocks, p50 and p95.
Left out: kernels of our own, quantisation.
"""

import contextlib
import copy
import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import backbones
import common
from backbones import memory
from report import latency
from runtime import Count, disk, stage, workers

# Dense bfloat16 operations and bytes per second, from the makers' data sheets
GPUS = {
    "H20": (148e12, 4.0e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "RTX 4090": (165e12, 1.01e12),
}


@dataclass
class Config(common.SceneConfig, common.ActingConfig):
    section: ClassVar = "profile"
    weights: Literal["sft", "random"] = "sft"  # "random": of the shapes in `model` or of the checkpoint
    repeats: Count = 20  # timed inferences at each point
    sweeps: bool = True  # vary steps, views, batch, chunk, dtype and the compiler, one at a time
    gpu: Literal[tuple(GPUS)] = "H20"  # first line of the roofline; the paper's GPU

    folder = property(lambda self: self.seed_dir / "profile")

    def inputs(self) -> list[Path]:
        return self.sft_inputs() if self.weights == "sft" else []


# ----------------------------------------------------------------------------------------------------- clocks
# Methods (or modules, by their path) of a policy -> the part that their time belongs to. Time in the methods
# that they call belongs to those.
PARTS = {
    "pi05": {
        "inputs": "preprocessing",
        "image_features": "vision tower",
        "multi_modal_projector.linear": "projection",
        "embed_prefix": "prefix",
        "prefill": "prefix",
        "surroundings": "denoising",
        "modulations": "denoising",
        "flow": "denoising",
        "unnormalise": "post-processing",
    },
    "openvla": {
        "inputs": "preprocessing",
        "patch_features": "vision tower",
        "project": "projection",
        "embed_prefix": "prefix",
        "prefill": "prefix",
        "generate": "action tokens",
        "decode_actions": "post-processing",
        "unnormalise": "post-processing",
    },
}
CACHED = ("vision tower", "projection", "prefix")  # what a free prefix cache would save


class Clock:
    """Exclusive times of nested calls: between two marks, time belongs to the innermost open call."""

    def __init__(self, device: str, now: Callable[[], float] = time.process_time):
        self.cuda, self.now, self.open, self.marks = device.startswith("cuda"), now, ["rest"], []

    def mark(self) -> None:
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else self.now()
        if self.cuda:
            moment.record()
        self.marks.append((moment, self.open[-1]))

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Gives the time of a block to `part`; as a decorator, that of a function."""
        self.open.append(part)
        self.mark()
        try:
            yield
        finally:
            self.open.pop()
            self.mark()

    def read(self) -> dict[str, float]:
        """Milliseconds by part since the first mark. Forgets the marks."""
        self.mark()
        if self.cuda:
            torch.cuda.synchronize()
        spent = defaultdict(float)
        for (a, part), (b, _) in itertools.pairwise(self.marks):
            spent[part] += a.elapsed_time(b) if self.cuda else 1e3 * (b - a)
        self.marks = []
        return dict(spent)


@contextlib.contextmanager
def timers(policy, clock: Clock, compiled: bool = False) -> Iterator[None]:
    """Time the parts of a policy, except for modules that are compiled into their callers."""
    with contextlib.ExitStack() as stack:
        for path, part in PARTS[policy.backbone].items():
            owner, name = (policy.get_submodule(path), "forward") if "." in path else (policy, path)
            if owner is policy or not compiled:
                stack.enter_context(mock.patch.object(owner, name, clock.during(part)(getattr(owner, name))))
        yield


# ---------------------------------------------------------------------------------------------------- anatomy
def points(cfg: Config, policy) -> Iterator[tuple[str, dict]]:
    """(label, point): the config's own, and with `sweeps` those that differ from it in one thing."""
    base = {
        "steps": cfg.denoise_steps,
        "views": len(policy.cfg.cameras),
        "batch": 1,
        "chunk": policy.cfg.horizon,
        "dtype": cfg.dtype,
        "backend": "eager",
    }
    is_flow = policy.backbone == "pi05"
    values = {
        "steps": (1, 2, 4, 10, 20) if is_flow else (),
        "views": (1, 2, 3),
        "batch": (1, 4, 16),
        "chunk": (5, 10, 20, 50) if is_flow else (1, 2, 4, 8),
        "dtype": ("bfloat16",),
    }
    yield "as it is", base
    others = [(key, value) for key, many in values.items() for value in many if value != base[key]]
    for key, value in others if cfg.sweeps else ():
        yield f"{key} {value}", base | {key: value}
    if cfg.sweeps and (cfg.device == "cuda" or shutil.which("g++") or shutil.which("clang++")):
        yield "compiled", base | {"backend": "compile"}


def prepare(policy, point: dict):
    """The policy, changed in place to this point; a copy where the dtype differs.

    No weight depends on the number of views or the length of a chunk.
    """
    policy.cfg.cameras = ["agentview", *["wrist"] * (point["views"] - 1)]
    policy.cfg.horizon = point["chunk"]
    if point["dtype"] != "float32" and next(policy.language_model.layers.parameters()).dtype == torch.float32:
        policy = copy.deepcopy(policy).cast(point["dtype"])
    compiled = {"pi05": ("image_features", "prefill", "flow"), "openvla": ("patch_features", "prefill")}
    for name in compiled[policy.backbone]:
        vars(policy).pop(name, None)
        if point["backend"] == "compile":  # on a GPU with CUDA graphs
            mode = "reduce-overhead" if next(policy.parameters()).is_cuda else "default"
            setattr(policy, name, torch.compile(getattr(policy, name), mode=mode))
    return policy


def observations(n: int, image_size: int) -> dict:
    g, shape = common.stream(0, "observations"), (n, image_size, image_size, 3)
    return {
        **{c: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for c in common.CAMERAS},
        "state": torch.rand(n, 8, generator=g) * 2 - 1,
        "instruction": [memory.INSTRUCTION] * n,
    }


@torch.no_grad()
def look(policy, obs: dict, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """One inference, from observations to actions (B, H, 7) in the environment's units."""
    return policy.unnormalise(policy.sample_actions(policy.encode(obs), noise, steps).cpu())


def measure(policy, cfg: Config, point: dict, now: Callable[[], float] = time.process_time) -> dict:
    """p50 and p95 of the whole and of each part, in ms. Inferences with and without timers take turns."""
    policy, clock = prepare(policy, point), Clock(cfg.device, now)
    obs, compiled = observations(point["batch"], cfg.image_size), point["backend"] == "compile"
    noise = policy.noise(point["batch"], common.stream(0, "noise"))

    def spent(timer) -> dict[str, float]:
        if compiled:  # CUDA graphs may overwrite earlier results from here on
            torch.compiler.cudagraph_mark_step_begin()
        with timer:
            clock.mark()
            look(policy, obs, noise, point["steps"])
            return clock.read()

    wholes, parts = [], []
    for _ in range(cfg.repeats + 2):
        wholes.append(sum(spent(contextlib.nullcontext()).values()))
        parts.append(spent(timers(policy, clock, compiled)))
    wholes, parts = np.array(wholes[2:]), parts[2:]  # the first two warm up
    times = {part: [row.get(part, 0.0) for row in parts] for part in latency.parts_of(parts)}
    p50 = {part: float(np.median(values)) for part, values in times.items()}
    share = sum(p50.get(part, 0.0) for part in CACHED) / sum(p50.values())
    return {
        "p50_ms": float(np.median(wholes)),
        "p95_ms": float(np.quantile(wholes, 0.95)),
        "parts_ms": p50,
        "n": len(wholes),
        "parts_p95_ms": {part: float(np.quantile(values, 0.95)) for part, values in times.items()},
        "parts_over_whole": float(np.median([sum(row.values()) for row in parts] / wholes)),
        "prefix_share": share,
        "ceiling": latency.amdahl(share),
    }


# --------------------------------------------------------------------------------------------------- roofline
class Work(TorchFunctionMode):
    """Counts operations of linear layers and attention, and the bytes of weights that they read."""

    flops = bytes = 0

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        if function is F.linear:
            x, weight = arguments[:2]
            self.flops += 2 * x.numel() * weight.shape[0]
            self.bytes += weight.numel() * weight.element_size()
        if function is F.scaled_dot_product_attention:
            q, k = arguments[:2]
            self.flops += 4 * q.numel() * k.shape[-2]  # scores, then the sum of the values
        return function(*arguments, **(kwargs or {}))


def roofline(cfg: Config) -> dict:
    """Operations, bytes and least milliseconds of the published size on each GPU: bfloat16, one observation.

    A part takes at least as long as its operations, and as reading its bytes: the weights of its linear
    layers, and for the actions also the prefix's keys and values, in every pass. Kernel launches, norms and
    rotations come on top.
    """
    policy = memory.make_policy(replace(cfg, model={}, checkpoint="", init_from="", dtype="bfloat16"), "")
    obs, _, _ = memory.make_batch(policy, 1)
    noise = policy.noise(1, torch.Generator()).to("meta")
    passes = cfg.denoise_steps if policy.backbone == "pi05" else policy.horizon * common.ACTION_DIM
    with torch.no_grad():
        with Work() as images:
            embedded = policy.embed(obs)
        with Work() as language:
            prefix = policy.encode(embedded)
        with Work() as actions:
            policy.sample_actions(prefix, noise, cfg.denoise_steps)
    actions.bytes += passes * memory.size([prefix.keys, prefix.values])
    work, gpus = {"images": images, "prefix": language, "actions": actions}, {}
    for gpu, (flops, bandwidth) in GPUS.items():
        ms = {part: 1e3 * max(w.flops / flops, w.bytes / bandwidth) for part, w in work.items()}
        gpus[gpu] = {"ms": ms, "prefix_share": (ms["images"] + ms["prefix"]) / sum(ms.values())}
    return {"work": {part: {"flops": w.flops, "bytes": w.bytes} for part, w in work.items()}, "gpus": gpus}


# ------------------------------------------------------------------------------------------------------- main
def random_policy(cfg: Config):
    """Random weights of the config's shapes, made in place: two copies of published shapes may not fit."""
    policy = memory.make_policy(cfg, "").to_empty(device=cfg.device)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return policy.eval()


def main(cfg: Config, run: stage.Run) -> None:
    """Measure every point; write latency.json and table.md; print the table."""
    policy = backbones.load_sft(cfg) if cfg.weights == "sft" else random_policy(cfg)
    rows = [
        {"label": label} | point | measure(policy, cfg, point)
        for label, point in workers.progress(list(points(cfg, policy)), desc="profile", unit="point")
    ]
    bounds = roofline(cfg)
    table = latency.latency_report(rows, bounds, cfg.gpu)
    measured = {
        "device": cfg.device,
        "weights": cfg.weights,
        "clock": "CUDA events" if cfg.device == "cuda" else "CPU time",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "points": rows,
        "roofline": bounds,
        "paper": latency.PAPER,
    }
    disk.write_json(run.dir / "latency.json", measured)
    disk.write_atomic(run.dir / "table.md", table)
    print(table, flush=True)


def write_table(cfg: Config) -> None:
    """table.json, which 08_report.py reads."""
    own, timing = (disk.read_json(cfg.folder / name) for name in ("latency.json", "timing.json"))
    disk.write_json(cfg.folder / "table.json", latency.metric_rows(cfg, own["points"][0], timing))


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview, after=write_table)
