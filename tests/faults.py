"""Faults, one after the other, in every stage of configs/micro.yaml: what a rerun gives, against the undisturbed run.

    python tests/faults.py [moments=20] [stages=sft,dpo] [faults=kill,disk] [seed=0] [out=results/reliability]

kill      SIGKILL at random moments, by the CPU time used
disk      a disk that is full at a random moment (a small tmpfs: needs root), with room again for the rerun
worker    a worker process killed (evaluation with two workers)
rank      one process of torchrun killed, of two or four in turn: the job must end by itself, with an exit code that is not 0; the
          rerun is by torchrun and, from a copy of what was left, by one process
input     an input file cut in half, or with one bit flipped
partial   the same to a file that a killed stage had written
twice     a second run started on the same folder
place     another working directory, a source folder that may not be written, no GL library

After each the stage is run again. Its files must be those of the undisturbed run, or else one line must name the file and the
remedy, and the remedy help (trainings on several ranks: weights within 1e-5, since sums are rounded in another order; episodes
and pairs: the very files). Everything lies in a folder whose name has a space. `moments` is how many kills each stage gets; of
the other faults it gets a seventh as many, one at least.
"""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_pipeline import SEED_DIR, STAGES, command, copy_of_the_kit, outputs

import disk

ALL = {name: tuple(stage[:2]) for name, stage in STAGES.items()}
ALL["validate"] = ["07_validate.py"], f"{SEED_DIR}/validate-episode"
cell = ["05_cells.py", "cells.reuse=chunk", "execute=2", "start=final"]
ALL["cell"] = cell, f"{SEED_DIR}/cell-chunk0.98x4-k2-euler10-val"
ALL["distill"] = ["05_distill.py", "start=final", "distill.steps=6", "distill.batch_size=4"], f"{SEED_DIR}/student"
ALL["distill"][0].extend(["distill.checkpoint_every=2", "distill.log_every=1"])
ALL["workers"] = ["04_eval.py", "tasks=[0,3]", "workers=2", "eval.n_init=1", "eval.videos=0"], f"{SEED_DIR}/eval-sft"
INPUTS = {"sft": ["demos"], "prefs": ["sft"], "dpo": ["sft", "prefs"], "eval": ["sft", "dpo"], "head": ["demos", "sft"]}
INPUTS |= {"validate": ["sft", "prefs", "dpo"], "cell": ["sft"], "distill": ["demos", "sft"], "workers": ["sft"]}
RANKED = ("sft", "prefs", "dpo", "eval", "head", "workers")  # started by torchrun as well
TRAININGS = ("sft", "dpo", "head")
SAME, SAID = "same result", "one line, then the same"


def of_ranks(name: str, processes: int) -> list[str]:
    """A stage's command for so many processes."""
    alone = command(ALL[name][0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return alone if processes == 1 else torchrun + alone[1:]


def run(kit: Path, name: str, processes: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(of_ranks(name, processes), cwd=kit, capture_output=True, text=True)


def start(kit: Path, name: str, processes: int = 1) -> subprocess.Popen:
    return subprocess.Popen(of_ranks(name, processes), cwd=kit, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cpu_time(pid: int) -> float:
    """Seconds of a process and its children that live."""
    try:
        me = psutil.Process(pid)
        return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0.0


def wait_for(process: subprocess.Popen, seconds: float) -> bool:
    """Until it has used so much CPU time; False if it ended before."""
    while process.poll() is None:
        if cpu_time(process.pid) >= seconds:
            return True
        time.sleep(0.005)
    return False


def one_line(result: subprocess.CompletedProcess | subprocess.Popen, stderr: str) -> bool:
    lines = [line for line in stderr.splitlines() if line.strip() and "\r" not in line]
    return result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def close(got: Path, want: Path) -> bool:
    """Two trainings that differ in rounding: the same weights within 1e-5, as many rows of metrics."""
    for path in want.rglob("*.safetensors"):
        a, b = (disk.load_tensors(folder / path.relative_to(want)) for folder in (got, want))
        if a.keys() != b.keys() or any(not torch.allclose(a[key], b[key], atol=1e-5, rtol=0) for key in b):
            return False
    return len(disk.read_jsonl(got / "metrics.jsonl")) == len(disk.read_jsonl(want / "metrics.jsonl"))


class Bench:
    """The undisturbed run, and copies of it in which one stage has still to run."""

    def __init__(self, folder: Path, stages: list[str], rng: random.Random):
        self.folder, self.rng, self.seconds, self.rows = folder, rng, {}, []
        self.undisturbed = copy_of_the_kit(folder / "undisturbed kit")
        needed = dict.fromkeys([*(s for name in stages for s in [*needs(name), name])])
        for name in needed:
            before = os.times()
            result = run(self.undisturbed, name)
            after = os.times()
            assert result.returncode == 0, result.stdout + result.stderr
            self.seconds[name] = sum(after[2:4]) - sum(before[2:4])
            print(f"undisturbed {name}: {self.seconds[name]:.0f} s of CPU time", flush=True)

    def without(self, name: str) -> Path:
        """A kit in which all that `name` needs is there, and nothing of it."""
        kit = self.folder / "a kit"
        shutil.rmtree(kit, ignore_errors=True)
        copy_of_the_kit(kit)
        for earlier in needs(name):
            shutil.copytree(self.undisturbed / ALL[earlier][1], kit / ALL[earlier][1])
        return kit

    def moment(self, name: str, first: float) -> float:
        """A random moment between the first share of a stage's CPU time (of which imports take a good part) and its end."""
        return self.rng.uniform(first, 1) * self.seconds[name]

    def same(self, kit: Path, name: str, rounded: bool) -> bool:
        """Whether the stage gave what the undisturbed run gave; rounded: in another order of sums."""
        folder = ALL[name][1]
        if rounded:
            return (kit / folder / "done.json").is_file() and close(kit / folder, self.undisturbed / folder)
        files = disk.read_json(kit / folder / "done.json")["outputs"]  # are they what they are said to be?
        whole = all(disk.sha256(kit / folder / name) == its for name, its in files.items())
        return whole and outputs(kit, folder) == outputs(self.undisturbed, folder)

    def judge(self, kit: Path, name: str, remedy=None, processes: int = 1, rounded: bool = False) -> str:
        """Run the stage again. -> SAME, SAID (after the remedy of its error), or what else it was."""
        result, said = run(kit, name, processes), False
        if result.returncode:
            if remedy is None or not one_line(result, result.stderr):
                return f"exit code {result.returncode}: {result.stderr.strip()[-300:]}"
            said = True
            remedy(result.stderr)
            result = run(kit, name)
            if result.returncode:
                return f"exit code {result.returncode} after the remedy: {result.stderr.strip()[-300:]}"
        if not self.same(kit, name, rounded):
            return "another result, without a word"
        return SAID if said else SAME

    def note(self, name: str, fault: str, outcome: str) -> None:
        self.rows.append((name, fault, outcome))
        print(f"{name}, {fault}: {outcome}", flush=True)


def needs(name: str) -> list[str]:
    """The stages that a stage depends on, first ones first."""
    direct = INPUTS.get(name, [])
    return list(dict.fromkeys([*(s for d in direct for s in needs(d)), *direct]))


# ----------------------------------------------------------------------------------------------------------------- faults
def killed(bench: Bench, name: str, first: float) -> Path | None:
    """A kit whose stage was killed at a random moment after the share `first` of its time; None if it was faster, five times."""
    for _ in range(5):
        kit = bench.without(name)
        process = start(kit, name)
        wait_for(process, bench.moment(name, first))
        process.kill()
        process.communicate()
        if not (kit / ALL[name][1] / "done.json").is_file():
            return kit
    return None


def kill(bench: Bench, name: str) -> None:
    kit = killed(bench, name, 0.2)
    bench.note(name, "kill -9", bench.judge(kit, name) if kit else "not tried: it was done by then")


def fill_disk(bench: Bench, name: str) -> None:
    if os.getuid():
        return bench.note(name, "disk full", "not tried: needs root")
    share = bench.rng.uniform(0.05, 0.9)
    for outcome in (full_disk(bench, name, share, slack) for slack in (40_000, 0, -20_000, -60_000)):
        if outcome != "had room enough":
            break
    bench.note(name, "disk full", SAID if outcome == SAME else outcome)


def full_disk(bench: Bench, name: str, share: float, slack: int) -> str:
    """What a rerun gives after a run on a disk with room for a share of what the stage writes, and some bytes more or less."""
    kit = bench.without(name)
    (kit / "runs").rename(kit / "before") if (kit / "runs").exists() else (kit / "before").mkdir()
    (kit / "runs").mkdir()
    weigh = lambda folder: sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())  # noqa: E731
    there, own = weigh(kit / "before"), weigh(bench.undisturbed / ALL[name][1])
    size = there + max(4096, int(own * share) + slack)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", kit / "runs"], check=True)
    try:
        shutil.copytree(kit / "before", kit / "runs", dirs_exist_ok=True)
        result = run(kit, name)
        subprocess.run(["mount", "-o", "remount,size=2g", kit / "runs"], check=True)
        outcome = bench.judge(kit, name)
        if not one_line(result, result.stderr) and result.returncode:
            outcome = f"{result.stderr.strip()[-300:]!r}, then: {outcome}"
        elif result.returncode == 0:
            outcome = "had room enough" if outcome == SAME else outcome
    finally:
        subprocess.run(["umount", kit / "runs"], check=True)
    return outcome


def worker(bench: Bench, name: str) -> None:
    if name != "workers":
        return
    kit = bench.without(name)
    process = start(kit, name)
    while process.poll() is None and len(psutil.Process(process.pid).children()) < 3:  # two and the resource tracker
        time.sleep(0.01)
    wait_for(process, bench.moment(name, 0.3))
    children = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    if children:
        bench.rng.choice(children).kill()
    _, stderr = process.communicate()
    said = one_line(process, stderr) or process.returncode == 0
    outcome = bench.judge(kit, name)
    bench.note(name, "a worker killed", outcome if said else f"{stderr[-300:]!r}, then: {outcome}")


def rank(bench: Bench, name: str) -> None:
    if name not in RANKED:
        return
    tried = sum(row[:2] == (name, "a rank killed") for row in bench.rows) // 2  # a row for each way to run it again
    processes = 4 if tried % 2 and name != "dpo" else 2  # dpo's batch is 2
    kit = bench.without(name)
    folder = kit / ALL[name][1]
    process = start(kit, name, processes)
    while process.poll() is None and not (folder / "started.json").exists():
        time.sleep(0.01)
    wait_for(process, cpu_time(process.pid) + bench.rng.uniform(0, 0.5) * bench.seconds[name])
    agent = [psutil.Process(process.pid)] if process.poll() is None else []
    living = [p for a in agent for p in a.children() if ALL[name][0][0] in p.cmdline()]
    if living:
        bench.rng.choice(living).kill()
    try:
        process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        for p in [*agent[0].children(recursive=True), *agent]:
            p.kill()
        process.communicate()
        return bench.note(name, "a rank killed", "the job hangs")
    if (folder / "done.json").is_file():
        return bench.note(name, "a rank killed", "not tried: it was done by then")
    if process.returncode == 0:
        return bench.note(name, "a rank killed", "exit code 0")
    copy = shutil.copytree(kit, kit.with_name("a copy of the kit"), dirs_exist_ok=False)
    for again, n in ((kit, processes), (copy, 1)):
        bench.note(name, "a rank killed", bench.judge(again, name, processes=n, rounded=name in TRAININGS))
    shutil.rmtree(copy)


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def restore(kit: Path, bench: Bench, path: Path, stderr: str) -> None:
    """The remedy, if the line names the damaged file or its folder: here the file's own content, in place of making it anew."""
    named = path.name in stderr or str(path.parent.relative_to(kit)) in stderr
    if named:
        shutil.copyfile(bench.undisturbed / path.relative_to(kit), path)


def damaged_input(bench: Bench, name: str) -> None:
    for how in ("cut", "bit flipped"):
        if not needs(name):
            return
        kit = bench.without(name)
        folder = kit / ALL[bench.rng.choice(INPUTS[name])][1]
        files = [
            p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in ("timing.json", "summary.json")
        ]
        path = bench.rng.choice(sorted(files))
        damage(path, how, bench.rng)
        remedy = functools.partial(restore, kit, bench, path)
        bench.note(name, f"an input file {how}", with_name(bench.judge(kit, name, remedy), path))


def remove(kit: Path, folder: Path, path: Path, stderr: str) -> None:
    """The remedy, if the line names the damaged partial output or the stage's folder."""
    if path.name in stderr or str(folder.relative_to(kit)) in stderr:
        shutil.rmtree(folder)


def with_name(outcome: str, path: Path) -> str:
    return outcome if outcome in (SAME, SAID) else f"{path.name}: {outcome}"


def damaged_partial(bench: Bench, name: str) -> None:
    for how in ("cut", "bit flipped"):
        kit = killed(bench, name, 0.5)
        if kit is None:
            bench.note(name, f"a partial output {how}", "not tried: it was done by then")
            continue
        folder = kit / ALL[name][1]
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        if not files:
            bench.note(name, f"a partial output {how}", bench.judge(kit, name))
            continue
        path = bench.rng.choice(files)
        damage(path, how, bench.rng)
        remedy = functools.partial(remove, kit, folder, path)
        bench.note(name, f"a partial output {how}", with_name(bench.judge(kit, name, remedy), path))


def twice(bench: Bench, name: str) -> None:
    kit = bench.without(name)
    first = start(kit, name)
    while first.poll() is None and not (kit / ALL[name][1] / "started.json").exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # it is at work, however long the second one takes to come
    second = run(kit, name)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    refused = one_line(second, second.stderr) and "another process is at work" in second.stderr
    same = first.returncode == 0 and outputs(kit, ALL[name][1]) == outputs(bench.undisturbed, ALL[name][1])
    outcome = SAID if refused and same else f"{second.stderr[-300:]!r}, the first one {'the same' if same else 'another'}"
    bench.note(name, "two runs at once", outcome)


def place(bench: Bench, name: str) -> None:
    if name != "dpo":  # once is enough
        return
    kit, elsewhere = bench.without(name), bench.folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    script, folder = ALL[name]
    arguments = [sys.executable, str(kit / script[0]), str(kit / "configs" / "micro.yaml"), f"root={kit / 'runs'}"]
    result = subprocess.run(arguments, cwd=elsewhere, capture_output=True, text=True)
    same = result.returncode == 0 and outputs(kit, folder)["outputs"] == outputs(bench.undisturbed, folder)["outputs"]
    bench.note(name, "another working directory", SAME if same and not any(elsewhere.iterdir()) else result.stderr[-300:])
    no_gl = subprocess.run(
        command(["00_demos.py"], "root=no-gl"), cwd=kit, capture_output=True, text=True, env=os.environ | {"MUJOCO_GL": "osmesa"}
    )
    said = one_line(no_gl, no_gl.stderr) and "apt-get install" in no_gl.stderr
    there = no_gl.returncode == 0  # libOSMesa is installed
    bench.note("demos", "no GL library", SAID if said else "not tried: there is one" if there else no_gl.stderr[-300:])
    if os.getuid():
        return bench.note(name, "a source folder that may not be written", "not tried: needs root")
    kit = bench.without(name)
    shutil.copytree(kit / "runs", elsewhere / "runs", dirs_exist_ok=True)
    shutil.rmtree(elsewhere / folder, ignore_errors=True)
    subprocess.run(["mount", "--bind", kit, kit], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", kit], check=True)
        refused = run(kit, name)
        result = subprocess.run(command(script, f"root={elsewhere / 'runs'}"), cwd=kit, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", kit], check=True)
    same = result.returncode == 0 and outputs(elsewhere, folder)["outputs"] == outputs(bench.undisturbed, folder)["outputs"]
    said = one_line(refused, refused.stderr) and "root=" in refused.stderr
    outcome = SAID if said and same else f"{refused.stderr[-300:]!r}, {result.stderr[-300:]!r}"
    bench.note(name, "a source folder that may not be written", outcome)


FAULTS = {"kill": kill, "disk": fill_disk, "worker": worker, "input": damaged_input, "partial": damaged_partial, "twice": twice}
FAULTS |= {"place": place, "rank": rank}


# ------------------------------------------------------------------------------------------------------------------ table
def markdown(rows: list[tuple[str, str, str]], arguments: str) -> str:
    lines = [f"`python tests/faults.py {arguments}`", ""]
    lines += ["| stage | fault | tried | same result | one line, then the same | anything else |", "| --- " * 6 + "|"]
    for stage, fault in dict.fromkeys((stage, fault) for stage, fault, _ in rows):
        found = Counter(outcome for s, f, outcome in rows if (s, f) == (stage, fault))
        n, rest = sum(found.values()), {k: v for k, v in found.items() if k not in (SAME, SAID)}
        said = "; ".join(f"{v} x {' '.join(k.split())[:160].replace('|', '/')}" for k, v in rest.items())
        lines.append(f"| {stage} | {fault} | {n} | {found[SAME]} | {found[SAID]} | {said} |")
    return "\n".join(lines) + "\n"


def main(moments: int = 20, stages: str = "", faults: str = "", seed: int = 0, out: str = "") -> int:
    names = stages.split(",") if stages else list(ALL)
    kinds = faults.split(",") if faults else list(FAULTS)
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        bench = Bench(Path(folder), names, random.Random(seed))
        for name in names:
            for kind in kinds:
                for _ in range(moments if kind == "kill" else 1 if kind in ("twice", "place") else max(1, moments // 7)):
                    FAULTS[kind](bench, name)
    only = (f" stages={stages}" if stages else "") + (f" faults={faults}" if faults else "")
    table = markdown(bench.rows, f"moments={moments} seed={seed}{only}")
    print(table)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        disk.write_atomic(Path(out) / "faults.md", table)
    accepted = (SAME, SAID, "had room enough")
    return int(any(outcome not in accepted and not outcome.startswith("not tried") for *_, outcome in bench.rows))


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sys.exit(main(**{key: int(value) if key in ("moments", "seed") else value for key, value in options.items()}))
