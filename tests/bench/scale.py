"""What each stage costs against its size, and what follows for 10^6 pairs and for the paper's grid on GPUs.

    python tests/bench/scale.py [series=03,04] [out=results/scale]        about 10 CPU minutes; series: those that begin so

Each stage runs at four sizes, a doubling each, with configs/micro.yaml in a process of its own. `CPU s` is that of the process and
all it started (imports included: 6 to 14 s that no size changes). cost = a + b x size is fitted by least squares to all sizes
but the largest, which is then predicted and set beside what was measured. Peak memory: high-water marks (VmHWM) of the process
and its children, added up. Real are the simulator, the policy (checkpoints/tiny_libero_object) and 01's demonstrations
(checkpoints/try); made up are the frames of 06 (noise) and the pairs of 03 and 07 (the twenty of checkpoints/try, repeated).

Then, each line marked as measured, fitted (and extrapolated), counted (memory.py, no GPU was used) or assumed: 10^6 pairs on a
machine like this one; the paper's 4 suites x {LoRA, DoRA} x 3 seeds for OpenVLA-7B and pi-0.5, on 1 and 8 GPUs.
reads   results/tiny_libero_object/training/ (play-outs per pair), configs/, checkpoints/
writes  with `out`: scale.json (points, fits, rows) and scale.md; points are kept as they are made, and not made again while the
        stage's code is the same
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

KIT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(KIT / "tests"))
sys.path.insert(0, str(KIT))
import common
import memory
import runs

PAIRS = KIT / "checkpoints/try/pi05/prefs"
UNITS = KIT / "results/tiny_libero_object/training/prefs-branch-at750-units.jsonl"
GIVEN = "checkpoint=checkpoints/tiny_libero_object"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
CORES = 8  # of the CPU beside each GPU, for the simulator; assumed


# ------------------------------------------------------------------------------------------------------------ the series
def demonstrations(root: Path, write) -> None:
    """A data folder as later stages see it; write(folder) makes its files."""
    folder = root / "micro" / "data"
    (folder / "libero_object").mkdir(parents=True)
    write(folder / "libero_object")
    runs.write_json(folder / "done.json", {"stage": "00_demos", "fingerprint": "made up", "inputs": {}})


def repeated_pairs(folder: Path, n: int) -> str:
    """n pairs as 02 writes them; the config key that names them."""
    pairs, lines = runs.load_tensors(PAIRS / "pairs.safetensors"), runs.read_jsonl(PAIRS / "pairs.jsonl")
    rows = np.arange(n) % len(lines)
    folder.mkdir()
    runs.save_tensors(folder / "pairs.safetensors", {key: value[rows] for key, value in pairs.items()})
    runs.write_rows(folder / "pairs.jsonl", [lines[i] for i in rows])
    return f"pairs_from={folder}"


def sft(root: Path, *more: str) -> list[str]:
    demonstrations(
        root, lambda folder: (folder / "task_00.hdf5").symlink_to(KIT / "checkpoints/try/data/libero_object/task_00.hdf5")
    )
    return ["tasks=[0]", "sft.snapshots=[]", "sft.checkpoint_every=1000", "sft.log_every=1000", *more]


def sft_of_width(root: Path, width: int) -> list[str]:
    size = {"width": width, "depth": 3, "mlp_dim": 3 * width, "num_heads": 4, "num_kv_heads": 1, "head_dim": width // 4}
    vision = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 2 * width}
    model = {"vlm": size, "expert": size, "vision": vision | {"image_size": 64, "patch_size": 16}, "horizon": 10, "flow_dim": 7}
    model |= {"max_tokens": 32, "conv_stem": True, "state_token": True, "gate_bias": 1.0}
    return sft(root, "sft.init_from=", "sft.steps=16", f"model={json.dumps(model)}")


def head(root: Path, frames: int) -> list[str]:
    from samples import write_demonstrations

    starts = [i % 20 for i in range(frames // 30)]  # 30 frames each
    demonstrations(root, lambda folder: write_demonstrations(folder / "task_03.hdf5", starts, 120, 4, 64))
    return [GIVEN]


def parts_of_pairs(root: Path, n: int) -> list[str]:
    """What 02 has before it assembles: a file for each pair, and the attempts."""
    pairs, stage = runs.load_tensors(PAIRS / "pairs.safetensors"), importlib.import_module("02_collect_prefs")
    root.mkdir()
    for i in range(n):
        row = {"suite": "libero_object", "task": 0, "unit": i, "init_state": 20, "pairs": [{"instruction": ""}]}
        runs.append_jsonl(root / "units.jsonl", row)
        runs.save_tensors(stage.part(root, row, 0), {key: value[i % len(value)] for key, value in pairs.items()})
    return []


PREFS = (GIVEN, "prefs.n_pairs=1000", "prefs.n_init=15")
SERIES = {  # name: script, sizes, what (folder, size) adds to the command; "assemble" is a function of 02 by itself
    "00 demonstrations": ("00_demos.py", (1, 2, 4, 8), lambda root, n: [f"demos.n_init={n}"]),
    "01 steps of 4": ("01_sft.py", (16, 32, 64, 128), lambda root, n: sft(root, f"sft.steps={n}")),
    "01 parameters, 16 steps": ("01_sft.py", (64, 96, 128, 192), sft_of_width),  # widths; the size is counted
    "02 play-outs": ("02_collect_prefs.py", (2, 4, 8, 16), lambda root, n: [*PREFS, f"prefs.max_playouts={n}"]),
    "02 pairs, assembled": ("assemble", (250, 500, 1000, 2000), parts_of_pairs),
    "03 pairs, one epoch": (
        "03_dpo.py",
        (64, 128, 256, 512),
        lambda root, n: [GIVEN, repeated_pairs(root, n), "dpo.batch_size=8", f"dpo.steps={n // 8}", "dpo.checkpoint_every=1000"],
    ),
    "04 episodes": ("04_eval.py", (1, 2, 4, 8), lambda root, n: [GIVEN, f"eval.n_init={n}", "eval.videos=0"]),
    "04 workers, 4 episodes": ("04_eval.py", (1, 2), lambda root, n: [GIVEN, "tasks=[0, 3]", "eval.videos=0", f"workers={n}"]),
    "06 frames": ("06_pretrain_head.py", (240, 480, 960, 1920), head),
    "07 pairs": (
        "07_validate.py",
        (8, 16, 32, 64),
        lambda root, n: [GIVEN, repeated_pairs(root, n), f"validate.n_pairs={n}", "validate.max_draws=4", "validate.ode_steps=2"],
    ),
    "simulator": ("step", (256,), lambda root, n: []),
}


# ------------------------------------------------------------------------------------------------------------ measurement
def peak_kb(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def run(command: list[str]) -> dict:
    """CPU and wall seconds and peak memory of a command and its children, and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        began, peaks = time.time(), {}
        process = subprocess.Popen(command, cwd=KIT, stdout=said, stderr=said)
        tree = psutil.Process(process.pid)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            try:
                for p in (tree, *tree.children(recursive=True)):
                    peaks.setdefault(p.pid, []).append(peak_kb(p))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        said.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{said.read()[-2000:]}")
        lasting = [max(seen) for seen in peaks.values() if len(seen) > 1]  # one seen once may still be its parent's copy
        cpu = ended[2].ru_utime + ended[2].ru_stime  # with the children that it waited for
        return {
            "cpu_s": round(cpu, 2),
            "wall_s": round(time.time() - began, 1),
            "peak_mb": sum(lasting) // 1024,
            "said": said.read(),
        }


def measure(name: str, n: int, folder: Path) -> dict:
    script, _, arguments = SERIES[name]
    root = folder / f"{name.replace(' ', '-')}-{n}"
    more = arguments(root if script in ("assemble", "03_dpo.py", "07_validate.py") else root / "runs", n)
    command = [sys.executable, __file__, script, str(root)]
    if script.endswith(".py"):
        command = [sys.executable, script, "configs/micro.yaml", f"root={root / 'runs'}", *more]
    point = {"series": name, "size": n} | run(command)
    said = point.pop("said")
    if name.startswith("01 parameters"):
        point["size"] = runs.read_json(root / "runs/micro/pi05/seed42/sft/done.json")["parameters"]
    return point | (json.loads(said.splitlines()[-1]) if name == "simulator" else {})


def step_costs() -> dict:
    """CPU seconds of a control step and of an observation as published checkpoints must be shown it, and of a reset."""
    import sim

    env, spent = sim.TaskEnv("libero_object", 0, 256, "default"), {}
    env.reset(40), env.observe()  # the first one makes the renderer
    for name, n, act in (
        ("step_s", 30, lambda: env.step(np.zeros(7))),
        ("look_s", 10, env.observe),
        ("reset_s", 3, lambda: env.reset(40)),
    ):
        began = time.process_time()
        for _ in range(n):
            act()
        spent[name] = round((time.process_time() - began) / n, 4)
    env.close()
    return spent


# ---------------------------------------------------------------------------------------------------- fit and extrapolate
def fit(sizes: list[float], costs: list[float]) -> tuple[float, float]:
    """a and b of cost = a + b x size, by least squares."""
    if len(set(sizes)) < 3:
        raise ValueError(f"{len(set(sizes))} sizes do not show whether a line fits; three are needed")
    b, a = np.polyfit(sizes, costs, 1)
    return float(a), float(b)


def fitted(points: list[dict]) -> dict:
    """The line through all points but the largest, and the largest as predicted and as measured; memory's line through all."""
    points = sorted(points, key=lambda p: p["size"])
    sizes, cpu, mb = ([p[key] for p in points] for key in ("size", "cpu_s", "peak_mb"))
    a, b = fit(sizes[:-1], cpu[:-1])
    memory_a, memory_b = fit(sizes, mb)
    found = {"sizes": sizes, "cpu_s": cpu, "a": a, "b": b, "predicted": a + b * sizes[-1], "measured": cpu[-1]}
    return found | {"peak_mb": [mb[0], mb[-1]], "memory_a": memory_a, "memory_b": memory_b}


def many_pairs(
    fits: dict, playouts: float, pair_bytes: int, gigabytes: float, n: int = 10**6
) -> list[tuple[str, float, str, str]]:
    """What n pairs take on a machine like this one: (what, how much, unit, how it is known)."""
    rows = [("play-outs per pair (branch, step 750)", playouts, "", "measured, results/tiny_libero_object")]
    rows.append(("pairs.safetensors", n * pair_bytes / 1e9, "GB", "counted"))
    if "02 play-outs" in fits:
        rows.append(("02: playing", n * playouts * fits["02 play-outs"]["b"] / 3600, "core hours", "fitted"))
    for name, what in (("02 pairs, assembled", "02: assembling"), ("03 pairs, one epoch", "03: an epoch, batches of 8")):
        if line := fits.get(name):
            rows.append((what, (line["a"] + n * line["b"]) / 3600, "core hours", "fitted"))
            rows.append((f"{what}, memory", (line["memory_a"] + n * line["memory_b"]) / 1e3, "GB", "fitted"))
            most = (1e3 * gigabytes - line["memory_a"]) / max(line["memory_b"], 1e-9)
            rows.append((f"{what}, pairs that fit into {gigabytes:.0f} GB", most, "pairs", "fitted"))
    return rows


def paper_grid(training: dict, look: float, execute: int, simulator: dict, gpus: int, playouts=2000, trials=50, seeds=3) -> dict:
    """Hours of the paper's grid of one backbone. training: operations of one DPO run by adapter; look: GPU seconds, at best.

    Trainings and episodes are independent of one another: on `gpus` they take that share of the time, nothing is sent between
    them. Episodes run to their limits; SFT and each adapter are evaluated.
    """
    control_steps = sum(common.MAX_STEPS[suite] for suite in SUITES)  # of an episode in each
    episodes = {"collection": playouts, "evaluation": trials * seeds * (1 + len(training))}
    hours = {"DPO, GPU": len(SUITES) * seeds * sum(training.values()) / memory.FLOPS / memory.UTILISATION / 3600 / gpus}
    for name, n in episodes.items():
        looks, steps = n * control_steps / execute, n * control_steps
        hours[f"{name}, GPU"] = looks * look / 3600 / gpus
        cpu = steps * simulator["step_s"] + looks * simulator["look_s"] + n * len(SUITES) * simulator["reset_s"]
        hours[f"{name}, simulator"] = cpu / 3600 / gpus / CORES
    return hours


def counted(name: str) -> tuple[dict, float, int]:
    """Of a published shape: operations of a DPO run by adapter, the least seconds of a look, actions per look."""

    def config(script: str, section: str, *more: str):
        cls = importlib.import_module(script).Config
        return common.load_config(cls, section, [str(KIT / "configs" / f"{name}.yaml"), "--dry-run", *more])

    training = {a: memory.work_of_training(config("03_dpo", "dpo", f"adapter={a}"), "dpo")[0] for a in ("lora", "dora")}
    cfg = config("04_eval", "eval")
    flops, read = memory.work_of_a_look(cfg)
    return training, max(flops / memory.FLOPS / memory.UTILISATION, read / memory.BANDWIDTH), cfg.execute


# ------------------------------------------------------------------------------------------------------------------ tables
def table(head: str, rows: list[list]) -> str:
    return "\n".join(
        [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
    )


def report(points: list[dict]) -> tuple[dict, str]:
    """Fits and rows as data, and all tables as text."""
    of = {name: [p for p in points if p["series"] == name] for name in SERIES}
    fits = {name: fitted(some) for name, some in of.items() if len(some) > 3}
    cells = [
        [
            name,
            ", ".join(f"{n:,}" for n in f["sizes"]),
            ", ".join(f"{s:.0f}" for s in f["cpu_s"]),
            f"{f['a']:.1f}",
            f"{f['b']:.3g}",
        ]
        + [f"{f['predicted']:.1f}", f"{f['measured']:.1f}", f"{f['predicted'] / f['measured']:.2f}"]
        + [f"{f['peak_mb'][0]:,}", f"{f['peak_mb'][1]:,}", f"{1e3 * f['memory_b']:.3g}"]
        for name, f in fits.items()
    ]
    head = "stage and size | sizes | CPU s | a | b | largest: predicted | measured | ratio | MB, smallest | MB, largest | kB per unit"
    said = [table(head, cells)]
    if some := of["04 workers, 4 episodes"]:
        cells = [[p["size"], f"{p['cpu_s']:.0f}", f"{p['wall_s']:.0f}", f"{p['peak_mb']:,}"] for p in some]
        said.append(table("04, workers | CPU s | wall s | MB", cells))
    units = runs.read_jsonl(UNITS, "playouts pairs")
    playouts = sum(row["playouts"] for row in units) / sum(len(row["pairs"]) for row in units)
    pairs = runs.load_tensors(PAIRS / "pairs.safetensors")
    million = many_pairs(fits, playouts, memory.size(pairs.values()) // len(pairs["mask"]), psutil.virtual_memory().total / 1e9)
    said.append(
        table("10^6 pairs, the tiny policy, one core | | | how known", [[w, f"{x:,.3g}", u, k] for w, x, u, k in million])
    )
    grid = {}
    if of["simulator"]:
        cost = of["simulator"][-1]
        known = ", ".join(f"{key[:-2]} {1e3 * cost[key]:.0f}" for key in ("step_s", "look_s", "reset_s"))
        for name in ("openvla_7b", "pi05"):
            work = counted(name)
            grid[name] = {gpus: paper_grid(*work, cost, gpus) for gpus in (1, 8)}
        cells = [[n, what, *(f"{grid[n][g][what]:.2g}" for g in (1, 8))] for n in grid for what in grid[n][1]]
        said.append(table(f"the paper's grid, hours | part | 1 {memory.GPU} | 8 {memory.GPU}", cells))
        said.append(
            f"GPU hours are counted (memory.py: {memory.UTILISATION:.0%} of the peak, or the weights' bytes; launching kernels, which "
            f"makes eager code several times slower, is left out). On 8 GPUs the efficiency is taken as ideal: 24 trainings and all "
            f"episodes are independent. Simulator hours come from measured CPU milliseconds ({known}; 256 pixels, `default`, drawn "
            f"by the CPU), on {CORES} cores per GPU, which is assumed. Play-outs: 2000 a suite, to their limits. Episodes: 50 a suite, "
            "seed and policy (SFT, LoRA, DoRA), to their limits. Loading, videos and failures of machines are left out.\n"
        )
    return {"fits": fits, "million_pairs": million, "paper_grid": grid}, "\n".join(said)


def main(series: str = "", out: str = "") -> None:
    wanted = [name for name in SERIES if name.startswith(tuple(series.split(",")))]
    path = Path(out) / "scale.json"
    points = runs.read_json(path)["points"] if out and path.is_file() else []
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for name in wanted:
            script, sizes, _ = SERIES[name]
            file = {"assemble": "02_collect_prefs.py", "step": "sim.py"}.get(script, script)
            code = "".join(runs.source_hash(KIT / source)[:8] for source in (file, "common.py"))
            for n in sizes:
                if any((p["series"], p["asked"], p["code"]) == (name, n, code) for p in points):
                    continue
                points = [p for p in points if (p["series"], p["asked"]) != (name, n)]
                points.append(measure(name, n, Path(folder)) | {"asked": n, "code": code})
                print(json.dumps(points[-1]), flush=True)
                if out:
                    runs.write_json(path, {"points": points})
    found, said = report(points)
    print("\n" + said)
    if out:
        runs.write_json(path, {"points": points} | found)
        runs.write_atomic(path.with_suffix(".md"), f"`python tests/bench/scale.py out={out}`\n\n{said}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["assemble"]:
        root = Path(sys.argv[2])
        importlib.import_module("02_collect_prefs").assemble(root / "units.jsonl", root, root)
    elif sys.argv[1:2] == ["step"]:
        print(json.dumps(step_costs()))
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
