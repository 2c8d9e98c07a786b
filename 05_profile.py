"""05 - Where the time of an inference goes, and what caches and fewer denoise steps make of it (paper's inference section).

reads   <run>/<backbone>/seed<k>/sft/ (01); nothing with profile.weights=random
writes  <run>/<backbone>/seed<k>/profile/: latency.json, table.{json,md}, anatomy.png, done.json; with measure=success
        .../profile-<cell>[-val]/: episodes.jsonl, summary.json, done.json, and profile-results.{json,md} over all cells so far
cost    an estimate: minutes for the anatomy; a cell of 50 episodes, 3 to 10 s each on one core
try     python 05_profile.py configs/tiny.yaml
        python 05_profile.py configs/tiny.yaml profile.measure=success profile.reuse=chunk profile.threshold=0.98 execute=2
        python 05_profile.py configs/pi05.yaml device=cpu profile.weights=random profile.repeats=2 profile.sweeps=false

The anatomy times every part of one look, from the observation to actions: on a CPU in CPU seconds of this process, which are
those of an idle machine, on a GPU by CUDA events. Parts are exclusive and sum to the whole, which has a timer of its own.
Amdahl's ceiling is what a prefix cache could gain at most if it cost nothing: from the share of image towers and prefix.
That share is no property of the architecture. The paper's 21.4 % (60 of 280 ms) belongs to eager code on one GPU, whose denoise
steps wait for Python; the roofline says what hardware needs for the same operations.
Cells: caches.py says what is reused. Every cell is paired, episode by episode, with one that looks as often and reuses nothing.
Differs from the paper: synchronised clocks, p50 and p95; an action is executed once; the similarity check is part of the latency;
what a hit cannot see is tested and stands in the table.
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
from pathlib import Path

import numpy as np
import torch

import caches
import common
import episodes
import memory
import ranks
import runs
import sim


@dataclass
class Config(common.RunConfig):
    measure: str = "latency"  # "latency", or "success" of the cell that these keys, execute and denoise_steps describe:
    reuse: str = "none"  # "none" | "chunk" | "prefix" | "patches"
    threshold: float = 0.98  # similarity from which on something is reused; the paper: 0.92, 0.95, 0.98, 0.999
    cap: int = 4  # looks in a row that may reuse
    relevant: float = 0.25  # patches: share of the image tokens, those most attended to, that are never reused
    solver: str = "euler"  # "euler" | "midpoint" | "heun"; the last two evaluate the flow twice a step
    group: str = "val"  # init states: "val" (35-39, for every choice) or "test" (40-49, reported)
    n_init: int = 5  # init states per task
    weights: str = "sft"  # "sft", or "random": the shapes of `model` alone
    repeats: int = 20  # timed looks of each point
    sweeps: bool = True  # steps, views, batch, chunk, dtype and compiler, one at a time
    compile: bool = True  # torch.compile as one point; on a GPU with CUDA graphs
    gpu: str = "H20"  # of the roofline: the paper's. Or "H100" | "A100" | "RTX 4090"
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        common.at_least(self, threshold=-1, cap=1, relevant=0, n_init=1, repeats=1, threads=1)
        choices = {"measure": ("latency", "success"), "reuse": caches.REUSE, "solver": caches.SOLVERS, "gpu": tuple(GPUS)}
        for key, known in (choices | {"group": ("val", "test"), "weights": ("sft", "random")}).items():
            common.one_of(f"profile.{key}", getattr(self, key), known)


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
def timers(policy, clock: Clock) -> Iterator[None]:
    """The policy with a timer around each of its parts."""
    put = []
    try:
        for path, part in PARTS[policy.backbone].items():
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
        for rows, timer in ((wholes, contextlib.nullcontext()), (parts, timers(policy, clock))):
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
    ax.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path)


def random_policy(cfg: Config):
    """The config's shapes with random weights in cfg.dtype, made in place: published ones fit where two copies would not."""
    policy = memory.make_policy(replace(cfg, dry_run=True), "").to_empty(device=cfg.device)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for buffer in [m for m in policy.modules() if getattr(m, "position_ids", None) is not None]:  # not read by this kit
        buffer.position_ids = torch.arange(buffer.position_ids.shape[-1], device=cfg.device)[None]
    return policy.eval()


def latency(cfg: Config) -> None:
    """The anatomy."""
    runs.alone(__file__)
    inputs = common.sft_inputs(cfg) if cfg.weights == "sft" else []
    shared = f"backbone seed image_size denoise_steps {common.SFT_KEYS}"
    stage = runs.open_stage(__file__, cfg, cfg.seed_dir / "profile", shared, inputs, ["memory.py", *cfg.policy_code])
    if stage is None:
        return
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
    runs.write_json(stage.dir / "latency.json", facts | {"points": rows, "roofline": roof, "paper": PAPER})
    runs.write_atomic(stage.dir / "table.md", table + "\n")
    plot(rows, f"{cfg.backbone}, {facts['parameters']:,} parameters, {cfg.device}", stage.dir / "anatomy.png")
    stage.finish()
    runs.write_json(stage.dir / "table.json", shares(cfg, rows[0], runs.read_json(stage.dir / "timing.json")))
    print(table)
    print(
        json.dumps(
            facts | {"points": [{k: r[k] for k in ("label", "p50_ms", "p95_ms", "prefix_share", "ceiling")} for r in rows]}
        )
    )


# ----------------------------------------------------------------------------------------------------------------- cells
def cell_name(cfg: Config) -> str:
    """E.g. none-k5-euler10, chunk0.98x4-k2-euler10, student-none-k8-euler1: its folder, without profile- or -val."""
    kept = "" if cfg.reuse == "none" else f"{cfg.threshold:g}x{cfg.cap}"
    name = f"{cfg.reuse}{kept}-k{cfg.execute}-{cfg.solver}{cfg.denoise_steps}{'' if cfg.start == 'final' else f'-at{cfg.start}'}"
    return f"{Path(cfg.checkpoint).name}-{name}" if cfg.checkpoint else name


def play(job: tuple):
    """Worker: episodes of one task in a cell; yields a row for each. Seconds go where wall times go, to timing.json."""
    cfg, _, suite, task, inits = job
    policy, env = common.load_sft(cfg), sim.TaskEnv(suite, task, cfg.image_size, cfg.render)
    for init in inits:
        actor = caches.Actor(policy, cfg, (suite, task, init))
        row = episodes.play(env, init, actor)
        row |= {"looks": actor.looks, "hits": round(actor.hits, 3), "wall_s": {"episode": row["wall_s"]} | actor.seconds}
        yield {"suite": suite, "task": task, "init_state": init, "seed": cfg.seed} | row
    env.close()


NO_REUSE = {"reuse": "none", "solver": "euler", "denoise_steps": 10}


def cells_table(cfg: Config) -> list[dict]:
    """A row per finished cell, paired with the one that reuses nothing and looks as often, in ten Euler steps."""
    cells, rows = episodes.finished(cfg.seed_dir, "profile-*", cfg.group), []
    found = {facts["cell"]: (facts, played, timing) for facts, played, timing in cells}
    for name, (facts, played, timing) in found.items():
        seconds, steps = list(timing["episodes_s"].values()), sum(row["steps"] for row in played)
        spent = {part: 1e3 * sum(s[part] for s in seconds) / max(1, steps) for part in ("check", "encode", "act")}
        row = {"name": name, "suite": " ".join(facts["config"]["suites"]), "backbone": cfg.backbone, "policy": "sft"}
        row |= {"group": cfg.group, "train_seeds": [cfg.seed], "sees_on_a_hit": facts["sees_on_a_hit"]}
        row |= {"hit_rate": sum(r["hits"] for r in played) / max(1, sum(r["looks"] for r in played))}
        row |= {"ms_per_step": sum(spent.values()), "ms_per_step_parts": spent} | episodes.summarise(played)
        row |= {"command": timing["command"], "commit": timing["commit"]}
        same = {key: facts["config"][key] for key in ("execute", "start")}
        for checkpoint in ("", facts["config"]["checkpoint"]):  # a student's is its teacher's, a published one's its own
            base = cell_name(replace(cfg, **NO_REUSE, **same, checkpoint=checkpoint))
            if base in found and base != name:
                row |= episodes.paired(played, found[base][1])
                break
        rows.append(row)
    return rows


def cells_markdown(rows: list[dict]) -> str:
    """ms per step of the environment; `a hit sees`: what of a new observation reaches the actions then."""
    head = (
        "cell | success | 95 % interval | hits | ms per step | of it the check | a hit sees | over no reuse | gained / lost | p"
    )
    lines = [f"| {head} |", "|---" * 10 + "|"]
    for r in rows:
        sees = "" if r["name"].startswith("none") else " and ".join(r["sees_on_a_hit"]) or "nothing new"
        cells = [r["name"], f"{r['successes']} / {r['n']}", "{:.0%} to {:.0%}".format(*r["ci95"]), f"{r['hit_rate']:.0%}"]
        cells += [f"{r['ms_per_step']:.2f}", f"{r['ms_per_step_parts']['check']:.2f}", sees]
        if "gained" in r:
            cells += [f"{100 * r['diff_vs_sft']:+.0f} points", f"{r['gained']} / {r['lost']}", f"{r['p_vs_sft']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |" * (11 - len(cells)))
    return "\n".join(lines)


def success(cfg: Config) -> None:
    """One cell, then the table of all."""
    tasks, inits, suffix = sim.tasks(cfg), common.init_states(cfg.group, cfg.n_init), "-val" if cfg.group == "val" else ""
    shared = f"suites tasks backbone seed image_size render execute denoise_steps noise_scale {common.SFT_KEYS}"
    code = ["sim.py", "osc.py", "workers.py", "episodes.py", "caches.py", *cfg.policy_code]
    folder = cfg.seed_dir / f"profile-{cell_name(cfg)}{suffix}"
    stage = runs.open_stage(__file__, cfg, folder, shared, common.sft_inputs(cfg), code)
    if stage is not None:
        rows = episodes.gather(stage, play, cfg, tasks, inits, cell_name(cfg))
        if ranks.first():
            sees = caches.sees_on_a_hit(common.load_sft(cfg), cfg)
            episodes.finish(stage, rows, cell=cell_name(cfg), sees_on_a_hit=sees)
    if ranks.first():
        rows = cells_table(cfg)
        runs.write_json(cfg.seed_dir / f"profile-results{suffix}.json", rows)
        runs.write_atomic(cfg.seed_dir / f"profile-results{suffix}.md", cells_markdown(rows) + "\n")
        print(cells_markdown(rows), flush=True)


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return memory.report(cfg, "eval")
    if cfg.blank_images:
        raise common.UserError("caches compare images, and black ones are all alike; set blank_images=false")
    {"latency": latency, "success": success}[cfg.measure](cfg)


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "profile", sys.argv[1:])))
