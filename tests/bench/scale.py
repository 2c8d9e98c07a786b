"""What each stage costs against its size, and what follows for 10^6 pairs and for the paper's grid on GPUs.

    python tests/bench/scale.py [series=03,04] [out=results/scale]

About 15 CPU minutes. `series` takes the series whose names begin so.

Each stage runs at four sizes, a doubling each, with configs/micro.yaml, in a process of its own. `CPU s` is
the time of that process and of all that it started, imports included. A line, cost = a + b x size, is fitted
by least squares to all sizes but the largest. The table sets its prediction of the largest beside the
measurement. Peak memory adds up the high-water marks (VmHWM) of the process and its children. A line goes
through all sizes; memory is `flat` where the largest size takes hardly more than the smallest.
The simulator, the policy (checkpoints/tiny_libero_object) and 01's demonstrations (checkpoints/try) are real.
The frames of 06 are noise. The pairs of 03 and 07, and those that 02 assembles, are the twenty of
checkpoints/try, repeated.

Two tables extrapolate, and mark each line as measured, fitted, counted or assumed: 10^6 pairs on a machine
like this one, and the paper's 4 suites x {LoRA, DoRA} x 3 seeds for OpenVLA-7B and pi-0.5 on 1 and 8 GPUs, by
the counts of backbones/memory.py (no GPU is used).

reads   results/tiny_libero_object/training/ (play-outs per pair), configs/, checkpoints/
writes  with `out`: scale.json (points, fits, extrapolations) and scale.md. Points are kept as they are made,
        and not made again while the stage's script is the same
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import work

import common
from backbones import memory
from runtime import disk, stage
from runtime.config import HERE as KIT
from runtime.config import STAGES, laid_over, load_config, read_yaml

TRY = KIT / "checkpoints" / "try"
UNITS = KIT / "results/tiny_libero_object/training/prefs-branch-at750-units.jsonl"
GIVEN = "checkpoint=checkpoints/tiny_libero_object"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
NOISE_MB = 20  # a peak that grows by less is called flat
CORES = 8  # of the CPU beside each GPU, for the simulator; assumed


# ---------------------------------------------------------------- the series: what a size adds to the command
def demonstrations(root: Path, make) -> None:
    """A data folder as later stages see it; make(path) makes the file of a task."""
    folder = root / "micro" / "data" / "libero_object"
    folder.mkdir(parents=True)
    make(folder)
    disk.write_json(
        folder.with_name("done.json"), {"stage": "00_demos", "fingerprint": "made up", "inputs": {}}
    )


def sft(root: Path, *more: str) -> list[str]:
    demonstrations(
        root, lambda folder: (folder / "task_00.hdf5").symlink_to(TRY / "data/libero_object/task_00.hdf5")
    )
    return ["tasks=[0]", "sft.snapshots=[]", "sft.checkpoint_every=1000", "sft.log_every=1000", *more]


def sft_of_width(root: Path, width: int) -> list[str]:
    """configs/tiny.yaml's shape, from scratch, at another width."""
    size = {"width": width, "mlp_dim": 3 * width, "head_dim": width // 4}
    vision = {"hidden_size": width, "intermediate_size": 2 * width}
    tiny = read_yaml(KIT / "configs" / "tiny.yaml")["pi05"]["model"]
    model = laid_over(tiny, {"vlm": size, "expert": size, "vision": vision})
    return sft(root, "sft.init_from=", "sft.steps=64", f"model={json.dumps(model)}")


def head(root: Path, frames: int) -> list[str]:
    from samples import write_demonstrations

    starts = [i % 20 for i in range(frames // 30)]  # 30 frames each
    demonstrations(root, lambda folder: write_demonstrations(folder / "task_03.hdf5", starts, 120, 4, 64))
    return [GIVEN]


def repeated_pairs(folder: Path, n: int) -> str:
    """n pairs as 02 writes them; the config key that names them."""
    pairs, lines = (
        disk.load_tensors(TRY / "pi05/prefs/pairs.safetensors"),
        disk.read_jsonl(TRY / "pi05/prefs/pairs.jsonl"),
    )
    rows = np.arange(n) % len(lines)
    folder.mkdir(parents=True)
    disk.save_tensors(folder / "pairs.safetensors", {key: value[rows] for key, value in pairs.items()})
    disk.write_rows(folder / "pairs.jsonl", [lines[i] for i in rows])
    return f"pairs_from={folder}"


def parts_of_pairs(root: Path, n: int) -> list[str]:
    """What 02 has before it assembles: a file for each pair, and the attempts."""
    pairs = disk.load_tensors(TRY / "pi05/prefs/pairs.safetensors")
    part_file = importlib.import_module("02_collect_prefs").part_file
    (root / "parts").mkdir(parents=True)
    for i in range(n):
        row = {
            "suite": "libero_object",
            "task": 0,
            "unit": i,
            "init_state": 20,
            "pairs": [{"instruction": ""}],
            "tried": [{}],
        }
        row |= {"outcome": "", "playouts": 1}
        disk.append_jsonl(root / "units.jsonl", row)
        one = {key: value[i % len(value)][None] for key, value in pairs.items()}
        for kind in ("pairs", "tried"):
            disk.save_tensors(part_file(root, row, kind), one)
    return []


def prefs(root: Path, n: int) -> list[str]:
    return [GIVEN, "prefs.n_pairs=1000", "prefs.n_init=15", f"prefs.max_playouts={n}"]


def dpo(root: Path, n: int) -> list[str]:
    pairs = repeated_pairs(root / "pairs", n)
    return [GIVEN, pairs, "dpo.batch_size=8", f"dpo.steps={n // 8}", "dpo.checkpoint_every=1000"]


def validate(root: Path, n: int) -> list[str]:
    return [GIVEN, repeated_pairs(root / "pairs", n), f"validate.n_pairs={n}"]


SERIES = {  # name: script (or a function of this file), sizes, arguments (folder, size)
    "00 demonstrations": ("00_demos.py", (1, 2, 4, 8), lambda root, n: [f"demos.n_init={n}"]),
    "01 steps of 4": ("01_sft.py", (32, 64, 128, 256), lambda root, n: sft(root, f"sft.steps={n}")),
    "01 parameters, 64 steps": ("01_sft.py", (64, 96, 128, 192), sft_of_width),  # asked for by width
    "02 play-outs": ("02_collect_prefs.py", (2, 4, 8, 16), prefs),
    "02 pairs, assembled": ("assemble", (250, 500, 1000, 2000), parts_of_pairs),
    "03 pairs, one epoch": ("03_dpo.py", (256, 512, 1024, 2048), dpo),
    "04 episodes": ("04_eval.py", (1, 2, 4, 8), lambda root, n: [GIVEN, f"eval.n_init={n}", "eval.videos=0"]),
    "04 workers, 4 episodes": (
        "04_eval.py",
        (1, 2),
        lambda root, n: [GIVEN, "tasks=[0, 3]", "eval.videos=0", f"workers={n}"],
    ),
    "06 frames": ("06_pretrain_head.py", (240, 480, 960, 1920), head),
    "07 pairs": ("07_validate.py", (8, 16, 32, 64), validate),
    "simulator": ("simulate", (256,), lambda root, n: []),  # pixels
}


def assemble(root: Path) -> None:
    """The end of 02 by itself."""
    importlib.import_module("02_collect_prefs").assemble(root)


def simulate(_: Path) -> None:
    """CPU seconds of a control step, of an observation as published checkpoints need it, and of a reset."""
    from sim.env import TaskEnv

    env = TaskEnv("libero_object", 0, 256, "default")
    acts = {
        "reset_s": (3, lambda: env.reset(40)),
        "look_s": (10, env.observe),
        "step_s": (30, lambda: env.step(np.zeros(7))),
    }
    for name, (n, act) in acts.items():
        act()  # the first observation makes the renderer
        began = time.process_time()
        for _ in range(n):
            act()
        acts[name] = round((time.process_time() - began) / n, 4)
    env.close()
    print(json.dumps(acts))


# ------------------------------------------------------------------------------------------------ measurement
def peak_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def run(command: list[str]) -> dict:
    """CPU and wall seconds and peak memory of a command with its children, and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        began, peaks, process = time.time(), {}, subprocess.Popen(command, cwd=KIT, stdout=said, stderr=said)
        tree = psutil.Process(process.pid)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            for p in (tree, *tree.children(recursive=True)):
                peaks.setdefault(p.pid, []).append(peak_kb(p.pid))
            time.sleep(0.3)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        said.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{said.read()[-2000:]}")
        # a process that was seen once may still have been its parent's copy
        mb = sum(max(seen) for seen in peaks.values() if len(seen) > 1) // 1024
        cpu = ended[2].ru_utime + ended[2].ru_stime  # with the children that it waited for
        return {
            "cpu_s": round(cpu, 2),
            "wall_s": round(time.time() - began, 1),
            "peak_mb": mb,
            "said": said.read(),
        }


def measure(name: str, n: int, folder: Path) -> dict:
    script, _, arguments = SERIES[name]
    root = folder / f"{name.replace(' ', '-').replace(',', '')}-{n}"
    more = arguments(root, n)
    if not script.endswith(".py"):
        return {"series": name, "size": n} | run([sys.executable, __file__, script, str(root)])
    point = {"series": name, "size": n} | run(
        [sys.executable, script, "configs/micro.yaml", f"root={root}", *more]
    )
    done = root / "micro/pi05/seed42/sft/done.json"
    return point | ({"size": disk.read_json(done)["parameters"]} if "parameters" in name else {})


# ---------------------------------------------------------------------------------------- fit and extrapolate
def fit(sizes: list[float], costs: list[float]) -> tuple[float, float]:
    """a and b of cost = a + b x size, by least squares."""
    if len(set(sizes)) < 3:
        raise ValueError(f"{len(set(sizes))} sizes do not show whether a line fits; three are needed")
    b, a = np.polyfit(sizes, costs, 1)
    return float(a), float(b)


def fitted(points: list[dict]) -> dict:
    """The line through all points but the largest, what it predicts, and the line of memory."""
    points = sorted(points, key=lambda p: p["size"])
    sizes, cpu, mb = ([p[key] for p in points] for key in ("size", "cpu_s", "peak_mb"))
    (a, b), (memory_a, memory_b) = fit(sizes[:-1], cpu[:-1]), fit(sizes, mb)
    found = {
        "sizes": sizes,
        "cpu_s": cpu,
        "a": a,
        "b": b,
        "predicted": a + b * sizes[-1],
        "measured": cpu[-1],
    }
    return found | {
        "peak_mb": [mb[0], mb[-1]],
        "memory_a": memory_a,
        "memory_b": memory_b,
        "grows": mb[-1] - mb[0] > NOISE_MB,
    }


def many_pairs(fits: dict, playouts: float, pair_bytes: int, gigabytes: float, n: int = 10**6) -> list[tuple]:
    """What n pairs take on one core and in memory: (what, how much, unit, how it is known)."""
    rows = [("play-outs per pair (branch, step 750)", playouts, "", "measured, results/tiny_libero_object")]
    rows.append(("pairs.safetensors", n * pair_bytes / 1e9, "GB", "counted"))
    if "02 play-outs" in fits:
        rows.append(
            (
                "02: playing",
                n * playouts * fits["02 play-outs"]["b"] / 3600,
                "core hours",
                "measured x fitted",
            )
        )
    for name, what in (
        ("02 pairs, assembled", "02: assembling"),
        ("03 pairs, one epoch", "03: an epoch, batches of 8"),
    ):
        if line := fits.get(name):
            rows.append((what, (line["a"] + n * line["b"]) / 3600, "core hours", "fitted"))
        if line and line["grows"]:
            rows.append((f"{what}, memory", (line["memory_a"] + n * line["memory_b"]) / 1e3, "GB", "fitted"))
            most = (1e3 * gigabytes - line["memory_a"]) / max(line["memory_b"], 1e-9)
            rows.append((f"{what}, most that {gigabytes:.0f} GB hold", most, "pairs", "fitted"))
    return rows


def paper_grid(training: dict, look: float, execute: int, simulator: dict, gpus: int) -> dict[str, float]:
    """Hours of one backbone in the paper's grid.

    training: operations of a DPO run by adapter.  look: GPU seconds at best.
    The grid has 3 seeds, 50 episodes per suite, seed and policy (SFT and each adapter), and 2000 play-outs
    per suite, all to their limits. Trainings and episodes are independent: each GPU takes its share.
    """
    steps = sum(common.MAX_STEPS[suite] for suite in SUITES)  # of an episode in each
    hours = {
        "DPO, GPU": len(SUITES) * 3 * sum(training.values()) / work.FLOPS / work.UTILISATION / 3600 / gpus
    }
    for name, n in (("collection", 2000), ("evaluation", 50 * 3 * (1 + len(training)))):
        cpu = (
            steps * simulator["step_s"]
            + steps / execute * simulator["look_s"]
            + len(SUITES) * simulator["reset_s"]
        )
        hours[f"{name}, GPU"] = n * steps / execute * look / 3600 / gpus
        hours[f"{name}, simulator"] = n * cpu / 3600 / gpus / CORES
    return hours


def counted(name: str) -> tuple[dict, float, int]:
    """Operations of a DPO run by adapter, and the least seconds and the actions of a look, by a config."""

    def config(section: str, *more: str):
        cls = importlib.import_module(STAGES[section].removesuffix(".py")).Config
        return load_config(cls, [str(KIT / "configs" / f"{name}.yaml"), "--dry-run", *more])

    cfg, training = config("eval"), {}
    for adapter in ("lora", "dora"):
        dpo = config("dpo", f"adapter={adapter}")
        training[adapter] = dpo.steps * work.work_of(dpo, "dpo")[0]
    flops, read = work.work_of(cfg, "eval")
    return training, max(flops / work.FLOPS / work.UTILISATION, read / work.BANDWIDTH), cfg.execute


# ----------------------------------------------------------------------------------------------------- tables
NOTE = """\
GPU hours are counted: {share:.0%} of the peak, or the weights' bytes where those bind. Left out: launching
kernels (on an H100 eager DPO steps take twice that, looks 9 to 37 times: results/profile/h100), DoRA's
norms, loading, videos. 8 GPUs are taken at the ideal efficiency, since the 24 trainings and all episodes
are independent. Simulator: measured CPU ms ({known}; 256 pixels, `default`, drawn by the CPU) on {cores}
cores per GPU, which is assumed; where its hours are more than the GPU's, it is what bounds collection and
evaluation.
"""


def table(head: str, rows: list[list]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, r))} |" for r in rows), ""])


def report(points: list[dict]) -> tuple[dict, str]:
    """Fits and extrapolations as data, and all tables as text."""
    of = {
        name: [p for p in points if p["series"] == name and p["asked"] in sizes]
        for name, (_, sizes, _) in SERIES.items()
    }
    fits, cells, grid = {name: fitted(some) for name, some in of.items() if len(some) > 3}, [], {}
    for name, f in fits.items():
        sizes, cpu = ", ".join(f"{n:,}" for n in f["sizes"]), ", ".join(f"{s:.0f}" for s in f["cpu_s"])
        numbers = [f["predicted"], f["measured"], f["predicted"] / f["measured"], *f["peak_mb"]]
        cells.append([name, sizes, cpu, f"{f['a']:.1f}", f"{f['b']:.3g}", *(f"{x:,.4g}" for x in numbers)])
        cells[-1].append(f"{1e3 * f['memory_b']:.3g}" if f["grows"] else "flat")
    head = "size | | CPU s | a | b | largest, predicted | measured | ratio | MB, smallest | largest | kB each"
    said = [table(head, cells)]
    cells = [[p["size"], p["cpu_s"], p["wall_s"], p["peak_mb"]] for p in of["04 workers, 4 episodes"]]
    said.append(table("04, workers | CPU s | wall s | MB", cells))
    units, pairs = (
        disk.read_jsonl(UNITS, "playouts pairs"),
        disk.load_tensors(TRY / "pi05/prefs/pairs.safetensors"),
    )
    playouts = sum(row["playouts"] for row in units) / sum(len(row["pairs"]) for row in units)
    total = psutil.virtual_memory().total / 1e9
    million = many_pairs(fits, playouts, memory.size(pairs.values()) // len(pairs["mask"]), total)
    said.append(
        table(
            "10^6 pairs of the tiny policy | | | how known",
            [[w, f"{x:,.3g}", u, k] for w, x, u, k in million],
        )
    )
    for measured in of["simulator"]:
        its = json.loads(measured["said"].splitlines()[-1])
        grid = {
            name: {gpus: paper_grid(*counted(name), its, gpus) for gpus in (1, 8)}
            for name in ("openvla_7b", "pi05")
        }
        cells = [
            [name, what, *(f"{hours[g][what]:.2g}" for g in hours)]
            for name, hours in grid.items()
            for what in hours[1]
        ]
        said.append(table(f"the paper's grid, hours | part | 1 {work.GPU} | 8 {work.GPU}", cells))
        known = ", ".join(f"{key[:-2]} {1e3 * seconds:.0f}" for key, seconds in its.items())
        said.append(NOTE.format(share=work.UTILISATION, known=known, cores=CORES))
    return {"fits": fits, "million_pairs": million, "paper_grid": grid}, "\n".join(said)


def main(series: str = "", out: str = "") -> None:
    wanted, path = (
        [name for name in SERIES if name.startswith(tuple(series.split(",")))],
        Path(out) / "scale.json",
    )
    points = disk.read_json(path)["points"] if out and path.is_file() else []
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for name, n in [(series, size) for series in wanted for size in SERIES[series][1]]:
            script = {"assemble": "02_collect_prefs.py", "simulate": "sim/env.py"}.get(
                SERIES[name][0], SERIES[name][0]
            )
            key = {"asked": n, "code": stage.source_hash(KIT / script)}
            if any(p["series"] == name and p.items() >= key.items() for p in points):
                continue
            points = [p for p in points if (p["series"], p["asked"]) != (name, n)]
            points.append(measure(name, n, Path(folder)) | key)
            print(
                *(f"{k}={points[-1][k]}" for k in ("series", "size", "cpu_s", "wall_s", "peak_mb")),
                flush=True,
            )
            if name != "simulator":
                points[-1].pop("said")
            if out:
                disk.write_json(path, {"points": points})
    found, said = report(points)
    print("\n" + said)
    if out:
        disk.write_json(path, {"points": points} | found)
        disk.write_atomic(path.with_suffix(".md"), f"`python tests/bench/scale.py out={out}`\n\n{said}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in (assemble.__name__, simulate.__name__):
        globals()[sys.argv[1]](Path(sys.argv[2]))
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
