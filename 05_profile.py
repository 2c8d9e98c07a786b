"""05 - Where the time of an inference goes (paper's inference section).

reads   <run>/<backbone>/seed<k>/sft/ (01); nothing with profile.weights=random
writes  <run>/<backbone>/seed<k>/profile/: latency.json, table.{json,md}, anatomy.png, done.json
cost    an estimate: minutes
try     python 05_profile.py configs/tiny.yaml
        python 05_profile.py configs/pi05.yaml device=cpu profile.weights=random profile.repeats=2 profile.sweeps=false

The anatomy times every part of one look, from the observation to actions: on a CPU in CPU seconds of this process, which are
those of an idle machine, on a GPU by CUDA events. Parts are exclusive and sum to the whole, which has a timer of its own.
Amdahl's ceiling is what a prefix cache could gain at most if it cost nothing: from the share of image towers and prefix.
That share is no property of the architecture. The paper's 21.4 % (60 of 280 ms) belongs to one GPU, whose denoise steps are many
small kernels and, in eager code, wait for Python; the roofline says what hardware needs for the same operations.
What caches and fewer denoise steps do to success: 05_cells.py. A student of one step: 05_distill.py.
Differs from the paper: synchronised clocks, p50 and p95.
Left out: kernels of our own, quantisation.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import common
import disk
import memory
import runs


@dataclass
class Config(common.RunConfig):
    weights: str = "sft"  # "sft", or "random": the shapes of `model` alone
    repeats: int = 20  # timed looks of each point
    sweeps: bool = True  # steps, views, batch, chunk, dtype and compiler, one at a time
    compile: bool = True  # torch.compile as one point; on a GPU with CUDA graphs
    gpu: str = "H20"  # of the roofline: the paper's. Or "H100" | "A100" | "RTX 4090"
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, repeats=1, threads=1)
        common.one_of("profile.weights", self.weights, ("sft", "random"))
        common.one_of("profile.gpu", self.gpu, tuple(GPUS))


# Dense bfloat16 operations and bytes per second, by the makers' data sheets
GPUS = {"H20": (148e12, 4.0e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12), "RTX 4090": (165e12, 1.01e12)}
PAPER = {"prefix_share": 0.214, "denoise_share": 0.786}  # of 280 ms

# ---------------------------------------------------------------------------------------------------------------- clocks
# Methods (or modules, by their path) of a policy, and the part that their time belongs to. What they call is not theirs.
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
ORDER = ("preprocessing", "vision tower", "projection", "prefix", "denoising", "action tokens", "post-processing", "rest")
CACHED = ("vision tower", "projection", "prefix")  # what a free prefix cache would save


class Clock:
    """Exclusive times of nested calls: between two marks the time belongs to the innermost call that is open."""

    def __init__(self, device: str, now: Callable[[], float] = time.process_time):
        self.cuda, self.now, self.open, self.marks = device.startswith("cuda"), now, ["rest"], []

    def mark(self) -> None:
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else self.now()
        if self.cuda:
            moment.record()
        self.marks.append((moment, self.open[-1]))

    def wrap(self, function: Callable, part: str) -> Callable:
        def timed(*arguments, **keywords):
            self.open.append(part)
            self.mark()
            try:
                return function(*arguments, **keywords)
            finally:
                self.open.pop()
                self.mark()

        return timed

    def read(self) -> dict[str, float]:
        """Milliseconds by part since the first mark; the marks are forgotten."""
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
    """The policy with a timer around each of its parts; not around modules that are compiled into their callers."""
    put = []
    try:
        for path, part in PARTS[policy.backbone].items():
            if compiled and "." in path:
                continue
            owner, name = (policy.get_submodule(path), "forward") if "." in path else (policy, path)
            put.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, clock.wrap(getattr(owner, name), part))
        yield
    finally:
        for owner, name, before in reversed(put):
            delattr(owner, name) if before is None else setattr(owner, name, before)


# --------------------------------------------------------------------------------------------------------------- anatomy
@dataclass
class Point:
    """Circumstances of a look."""

    steps: int = 10
    views: int = 2
    batch: int = 1
    chunk: int = 10
    dtype: str = "float32"
    backend: str = "eager"


def points(cfg: Config, policy) -> list[tuple[str, Point]]:
    """The config's own circumstances, and with `sweeps` one of them changed at a time. -> (what is changed, point)."""
    base = Point(cfg.denoise_steps, len(policy.cfg.cameras), 1, policy.cfg.horizon, cfg.dtype)
    found = [("as it is", base)]
    if cfg.sweeps:
        values = {"steps": (1, 2, 4, 10, 20)} if policy.backbone == "pi05" else {}
        values |= {"views": (1, 2, 3), "batch": (1, 4, 16), "chunk": (5, 10, 20, 50) if values else (1, 2, 4, 8)}
        values |= {"dtype": ("float32", "bfloat16")} if cfg.dtype == "float32" else {}
        found += [
            (f"{key} {v}", replace(base, **{key: v})) for key, many in values.items() for v in many if v != getattr(base, key)
        ]
        if cfg.compile and (cfg.device == "cuda" or shutil.which("g++") or shutil.which("clang++")):
            found.append(("compiled", replace(base, backend="compile")))
    return found


def prepare(policy, point: Point):
    """The policy in these circumstances. No weight depends on the number of views or on the length of a chunk."""
    policy.cfg.cameras = (["agentview"] + ["wrist"] * (point.views - 1))[: point.views]
    policy.cfg.horizon = point.chunk
    if point.dtype != "float32" and next(policy.language_model.layers.parameters()).dtype == torch.float32:
        policy = copy.deepcopy(policy).cast(point.dtype)
    mode = "reduce-overhead" if next(policy.parameters()).is_cuda else "default"  # the former: CUDA graphs
    for name in ("image_features", "prefill", "flow") if policy.backbone == "pi05" else ("patch_features", "prefill"):
        vars(policy).pop(name, None)
        if point.backend == "compile":
            setattr(policy, name, torch.compile(getattr(policy, name), mode=mode))
    return policy


def observations(n: int, image_size: int) -> dict:
    """A batch of n random observations."""
    g, shape = common.stream(0, "observations"), (n, image_size, image_size, 3)
    images = {c: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for c in ("agentview", "wrist")}
    return images | {"state": torch.rand(n, 8, generator=g) * 2 - 1, "instruction": [memory.INSTRUCTION] * n}


@torch.no_grad()
def look(policy, obs: dict, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """One inference, from observations to actions (B, H, 7) in the environment's units."""
    return policy.unnormalise(policy.sample_actions(policy.encode(obs), noise, steps).cpu())


def measure(policy, cfg: Config, point: Point, now: Callable[[], float] = time.process_time) -> dict:
    """p50 and p95 in ms of the whole and of each part. Looks with and without timers take turns; the first two do not count."""
    policy, clock = prepare(policy, point), Clock(cfg.device, now)
    obs, noise = observations(point.batch, cfg.image_size), policy.noise(point.batch, common.stream(0, "noise"))
    wholes, parts = [], []
    for i in range(cfg.repeats + 2):
        for rows, timer in ((wholes, contextlib.nullcontext()), (parts, timers(policy, clock, point.backend == "compile"))):
            if point.backend == "compile":  # what CUDA graphs gave back may be overwritten from here on, and not before
                torch.compiler.cudagraph_mark_step_begin()
            with timer:
                clock.mark()
                look(policy, obs, noise, point.steps)
                spent = clock.read()
            if i >= 2:
                rows.append(spent)
    whole = np.array([sum(row.values()) for row in wholes])
    named = [part for part in ORDER if any(part in row for row in parts)]
    p50 = {part: float(np.median([row.get(part, 0.0) for row in parts])) for part in named}
    found = {"p50_ms": float(np.median(whole)), "p95_ms": float(np.quantile(whole, 0.95)), "parts_ms": p50, "n": len(whole)}
    found["parts_p95_ms"] = {part: float(np.quantile([row.get(part, 0.0) for row in parts], 0.95)) for part in named}
    found["parts_over_whole"] = float(np.median([sum(row.values()) / w for row, w in zip(parts, whole, strict=True)]))
    found["prefix_share"] = sum(p50.get(part, 0.0) for part in CACHED) / sum(p50.values())
    return found | {"ceiling": amdahl(found["prefix_share"])}


def amdahl(share: float) -> float:
    """Speed-up if this share of the time cost nothing."""
    return 1 / (1 - share)


# -------------------------------------------------------------------------------------------------------------- roofline
def roofline(cfg: Config) -> dict:
    """Operations, bytes and least milliseconds of the backbone at its published size, bfloat16, one observation, on each GPU.

    A part takes at least as long as its operations, and as its bytes: the weights of its linear layers, and for the actions the
    prefix's keys and values in every pass. What launches of kernels, norms and rotations cost is not in it.
    """
    cfg = replace(cfg, model={}, checkpoint="", dtype="bfloat16", image_size=224, device="cpu", dry_run=True)
    policy = memory.make_policy(cfg, "")
    (inputs, _, _), noise = memory.make_batch(policy, cfg, 1, "meta"), policy.noise(1, torch.Generator()).to("meta")
    passes = cfg.denoise_steps if policy.backbone == "pi05" else policy.horizon * policy.action_dim
    with torch.no_grad():
        with memory.Work() as images:
            embedded = policy.embed_prefix(*inputs)
        with memory.Work() as language:
            prefix, _ = policy.prefill(*embedded)
        with memory.Work() as actions:
            policy.sample_actions(prefix, noise, cfg.denoise_steps)
    actions.bytes += passes * memory.size([prefix.keys, prefix.values])
    work, rows = {"images": images, "prefix": language, "actions": actions}, {}
    for gpu, (flops, bandwidth) in GPUS.items():
        ms = {part: 1e3 * max(w.flops / flops, w.bytes / bandwidth) for part, w in work.items()}
        rows[gpu] = {"ms": ms, "prefix_share": (ms["images"] + ms["prefix"]) / sum(ms.values())}
    return {"work": {part: {"flops": w.flops, "bytes": w.bytes} for part, w in work.items()}, "gpus": rows}


# ---------------------------------------------------------------------------------------------------------- what is shown
def latency_table(rows: list[dict], roof: dict, cfg: Config) -> str:
    parts = [part for part in ORDER if any(part in r["parts_ms"] for r in rows)]
    lines = ["| | p50 ms | p95 ms | " + " | ".join(parts) + " | parts / whole | prefix share | ceiling of a prefix cache |"]
    lines.append("|---" * (len(parts) + 6) + "|")
    for r in rows:
        cells = [f"{r['parts_ms'].get(part, 0.0):.2f}" for part in parts]
        cells += [f"{r['parts_over_whole']:.1%}", f"{r['prefix_share']:.1%}", f"{r['ceiling']:.2f}x"]
        lines.append(f"| {r['label']} | {r['p50_ms']:.2f} | {r['p95_ms']:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Paper: prefix {PAPER['prefix_share']:.1%}, denoising {PAPER['denoise_share']:.1%}, eager code on one GPU: a ceiling ",
    ]
    lines[-1] += f"of {amdahl(PAPER['prefix_share']):.2f}x.\n"
    lines += ["| published size, least ms on | images | prefix | actions | prefix share | ceiling |", "|---" * 6 + "|"]
    for gpu in sorted(roof["gpus"], key=lambda name: name != cfg.gpu):
        r = roof["gpus"][gpu]
        cells = [f"{r['ms'][part]:.2f}" for part in ("images", "prefix", "actions")]
        lines.append(f"| {gpu} | {' | '.join(cells)} | {r['prefix_share']:.1%} | {amdahl(r['prefix_share']):.2f}x |")
    return "\n".join(lines)


def shares(cfg: Config, point: dict, timing: dict) -> list[dict]:
    """What 08_report.py looks up of the config's own circumstances, a row each."""
    parts, about = point["parts_ms"], {"backbone": cfg.backbone, "n": point["n"]}
    about |= {"command": timing["command"], "commit": timing["commit"]}
    found = {"p50": (point["p50_ms"], "ms"), "p95": (point["p95_ms"], "ms"), "prefix_share": (point["prefix_share"], "share")}
    if "denoising" in parts:
        found["denoise_share"] = parts["denoising"] / sum(parts.values()), "share"
    return [about | {"metric": metric, "value": value, "unit": unit} for metric, (value, unit) in found.items()]


def plot(rows: list[dict], title: str, path) -> None:
    """A stacked bar for each point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 1.2 + 0.28 * len(rows)), dpi=150, layout="constrained")
    left, place = np.zeros(len(rows)), np.arange(len(rows))[::-1]
    colours = dict(
        zip(ORDER, ("#bbbbbb", "#1f77b4", "#6baed6", "#9ecae1", "#d9822b", "#d9822b", "#777777", "#dddddd"), strict=True)
    )
    for part in [part for part in ORDER if any(part in r["parts_ms"] for r in rows)]:
        width = np.array([r["parts_ms"].get(part, 0.0) for r in rows])
        ax.barh(place, width, 0.7, left=left, color=colours[part], label=part)
        left += width
    for y, x, r in zip(place, left, rows, strict=True):
        ax.text(x, y, f" prefix {r['prefix_share']:.0%}", va="center", fontsize=7)
    ax.set_yticks(place, [r["label"] for r in rows], fontsize=8)
    ax.set_xlim(0, 1.12 * left.max())
    ax.set_xlabel("ms per inference, median (blue: what a prefix cache could save)")
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=7, ncols=4, loc="outside lower center")
    figure.savefig(path)


def random_policy(cfg: Config):
    """The config's shapes with random weights in cfg.dtype, made in place: published ones fit where two copies would not."""
    policy = memory.make_policy(replace(cfg, dry_run=True), "").to_empty(device=cfg.device)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for buffer in [m for m in policy.modules() if getattr(m, "position_ids", None) is not None]:  # not read by this kit
        buffer.position_ids = torch.arange(buffer.position_ids.shape[-1], device=cfg.device)[None]
    return policy.eval()


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "profile")
    runs.alone(__file__)
    inputs = common.sft_inputs(cfg) if cfg.weights == "sft" else []
    shared = f"backbone seed image_size denoise_steps {common.SFT_KEYS}"
    stage = runs.open_stage(__file__, cfg, cfg.seed_dir / "profile", shared, inputs, ["memory.py", *cfg.policy_code])
    folder = cfg.seed_dir / "profile"
    if stage is not None:
        print(anatomy(cfg, stage))
    points, timing = disk.read_json(folder / "latency.json")["points"], disk.read_json(folder / "timing.json")
    disk.write_json(folder / "table.json", shares(cfg, points[0], timing))


def anatomy(cfg: Config, stage: runs.Stage) -> str:
    """Measure every point; write latency.json, table.md and the plot. -> the table, and a line of JSON."""
    torch.set_num_threads(cfg.threads)
    policy, rows = common.load_sft(cfg) if cfg.weights == "sft" else random_policy(cfg), []
    for label, point in common.progress(points(cfg, policy), desc="profile", unit="point"):
        rows.append({"label": label} | vars(point) | measure(policy, cfg, point))
        if abs(rows[-1]["parts_over_whole"] - 1) > 0.05:
            print(f"[05_profile] warning: {label}: the parts sum to {rows[-1]['parts_over_whole']:.0%} of the whole", flush=True)
    roof = roofline(cfg)
    facts = {"device": cfg.device, "weights": cfg.weights, "clock": "CUDA events" if cfg.device == "cuda" else "CPU time"}
    facts |= {"threads": cfg.threads, "torch": torch.__version__, "parameters": sum(p.numel() for p in policy.parameters())}
    table = latency_table(rows, roof, cfg)
    disk.write_json(stage.dir / "latency.json", facts | {"points": rows, "roofline": roof, "paper": PAPER})
    disk.write_atomic(stage.dir / "table.md", table + "\n")
    plot(rows, f"{cfg.backbone}, {facts['parameters']:,} parameters, {cfg.device}", stage.dir / "anatomy.png")
    stage.finish()
    said = [{key: row[key] for key in ("label", "p50_ms", "p95_ms", "prefix_share", "ceiling")} for row in rows]
    return f"{table}\n{json.dumps(facts | {'points': said})}"


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "profile", sys.argv[1:])))
