"""Faults in every stage of configs/micro.yaml, one at a time. Does a rerun give the undisturbed result?

    python tests/faults.py [moments=20] [stages=sft,dpo] [faults=kill,disk] [seed=0] [out=results/reliability]

kill      SIGKILL at a random moment, measured in CPU time
disk      the disk is full at a random moment (a small tmpfs: needs root); the rerun has room again
worker    a worker process is killed (evaluation with two workers)
rank      one process of torchrun is killed, of two or four in turn. The job must end by itself, with an exit
          code that is not 0. It is run again by torchrun and, from a copy of what was left, by one process
input     an input file is cut in half, or one of its bits is flipped
partial   the same happens to a file that a killed stage had written
twice     a second run is started on the same folder
place     another working directory, a source folder that may not be written, no GL library

After each fault the stage runs again. It must give the files of the undisturbed run; or one line must name
the file and the remedy, and the remedy must help. (After trainings on several ranks the weights agree within
1e-5, since sums are rounded in another order.) A damaged file of an unfinished stage may pass unnoticed if it
can still be read: only a finished stage has hashes of its files.

Everything lies in a folder whose name has a space. `moments` is the number of kills per stage. Of the other
faults each stage gets a seventh as many, at least one.
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
from test_pipeline import SEED_DIR, STAGES, copy_of_the_kit, outputs

from runtime import disk

ALL = {name: tuple(stage[:2]) for name, stage in STAGES.items()}  # what to run, and the folder that it writes
ALL["validate"] = ["07_validate.py"], f"{SEED_DIR}/validate-episode"
cell = ["-m extras.cells", "cells.reuse=chunk", "execute=2", "start=final"]
ALL["cell"] = cell, f"{SEED_DIR}/cell-chunk0.98x4-k2-euler10-val"
student = ["-m extras.distill", "start=final", "distill.steps=6", "distill.batch_size=4"]
student += ["distill.checkpoint_every=2", "distill.log_every=1"]
ALL["distill"] = student, f"{SEED_DIR}/student"
two_tasks = ["04_eval.py", "tasks=[0,3]", "workers=2", "eval.n_init=1", "eval.videos=0"]
ALL["workers"] = two_tasks, f"{SEED_DIR}/eval-sft"
INPUTS = {"sft": ["demos"], "prefs": ["sft"], "dpo": ["sft", "prefs"], "eval": ["sft", "dpo"]}
INPUTS |= {"head": ["demos", "sft"], "validate": ["sft", "prefs", "dpo"], "cell": ["sft"]}
INPUTS |= {"distill": ["demos", "sft"], "workers": ["sft"]}
RANKED = ("sft", "prefs", "dpo", "eval", "workers")  # torchrun may start these, too
TRAININGS = ("sft", "dpo", "head")
SAME, SAID, ENOUGH = "same result", "one line, then the same", "had room enough"
OTHER, UNNOTICED = "another result, without a word", "passed unnoticed: "


def command(arguments: list[str], *more: str) -> list[str]:
    """What runs a script, or `-m MODULE`, on the micro config."""
    return [sys.executable, *arguments[0].split(), "configs/micro.yaml", *arguments[1:], *more]


def of_ranks(name: str, processes: int) -> list[str]:
    """A stage's command for so many processes."""
    alone = command(ALL[name][0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return alone if processes == 1 else [*torchrun, "--nproc_per_node", str(processes), *alone[1:]]


def call(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=env)


def run(kit: Path, name: str, processes: int = 1) -> subprocess.CompletedProcess:
    return call(of_ranks(name, processes), kit)


def start(kit: Path, name: str, processes: int = 1) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(of_ranks(name, processes), cwd=kit, stdout=pipe, stderr=pipe, text=True)


def cpu_time(pid: int) -> float:
    """Seconds that a process and its living children have used."""
    try:
        me = psutil.Process(pid)
        return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0.0


def wait_for(process: subprocess.Popen, seconds: float) -> bool:
    """Wait until it has used so much CPU time; False if it ended before."""
    while process.poll() is None:
        if cpu_time(process.pid) >= seconds:
            return True
        time.sleep(0.005)
    return False


def one_line(result: subprocess.CompletedProcess | subprocess.Popen, stderr: str) -> bool:
    lines = [line for line in stderr.splitlines() if line.strip() and "\r" not in line]
    return result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def close(got: Path, want: Path) -> bool:
    """Whether two trainings differ in rounding alone: weights within 1e-5, as many rows of metrics."""
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
        needed = [name for stage in stages for name in [*needs(stage), stage]]
        for name in dict.fromkeys(needed):
            before = os.times()
            result = run(self.undisturbed, name)
            after = os.times()
            assert result.returncode == 0, result.stdout + result.stderr
            self.seconds[name] = sum(after[2:4]) - sum(before[2:4])
            print(f"undisturbed {name}: {self.seconds[name]:.0f} s of CPU time", flush=True)

    def without(self, name: str) -> Path:
        """A kit in which everything is there that `name` needs, and nothing of itself."""
        kit = self.folder / "a kit"
        shutil.rmtree(kit, ignore_errors=True)
        copy_of_the_kit(kit)
        for earlier in needs(name):
            shutil.copytree(self.undisturbed / ALL[earlier][1], kit / ALL[earlier][1])
        return kit

    def moment(self, name: str, first: float) -> float:
        """A random moment of a stage, in CPU time, after the share `first`. Imports take a good part."""
        return self.rng.uniform(first, 1) * self.seconds[name]

    def same(self, kit: Path, name: str, rounded: bool) -> bool:
        """Whether the stage gave what the undisturbed run gave; rounded: but for the order of sums."""
        folder = ALL[name][1]
        if rounded:
            return (kit / folder / "done.json").is_file() and close(kit / folder, self.undisturbed / folder)
        files = disk.read_json(kit / folder / "done.json")["outputs"]  # do their hashes hold?
        whole = all(disk.sha256(kit / folder / name) == its for name, its in files.items())
        return whole and outputs(kit, folder) == outputs(self.undisturbed, folder)

    def judge(self, kit: Path, name: str, remedy=None, processes: int = 1, rounded: bool = False) -> str:
        """Run the stage again. -> SAME, SAID (after the remedy of its error), OTHER or what else it was."""
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
            return OTHER
        return SAID if said else SAME

    def note(self, name: str, fault: str, outcome: str) -> None:
        self.rows.append((name, fault, outcome))
        print(f"{name}, {fault}: {outcome}", flush=True)


def needs(name: str) -> list[str]:
    """The stages that a stage depends on, first ones first."""
    direct = INPUTS.get(name, [])
    return list(dict.fromkeys([*(s for d in direct for s in needs(d)), *direct]))


# ----------------------------------------------------------------------------------------------------- faults
def killed(bench: Bench, name: str, first: float) -> Path | None:
    """A kit whose stage was killed after the share `first` of its time; None if it was faster five times."""
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
    for slack in (40_000, 0, -20_000, -60_000):
        if (outcome := full_disk(bench, name, share, slack)) != ENOUGH:
            break
    bench.note(name, "disk full", SAID if outcome == SAME else outcome)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def full_disk(bench: Bench, name: str, share: float, slack: int) -> str:
    """What a rerun gives after a run on a disk with room for a share of the stage's files, and `slack`."""
    kit = bench.without(name)
    (kit / "runs").mkdir(exist_ok=True)
    (kit / "runs").rename(kit / "before")
    (kit / "runs").mkdir()
    own = size_of(bench.undisturbed / ALL[name][1])
    size = size_of(kit / "before") + max(4096, int(own * share) + slack)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", kit / "runs"], check=True)
    try:
        shutil.copytree(kit / "before", kit / "runs", dirs_exist_ok=True)
        result = run(kit, name)
        subprocess.run(["mount", "-o", "remount,size=2g", kit / "runs"], check=True)
        outcome = bench.judge(kit, name)
        if not one_line(result, result.stderr) and result.returncode:
            outcome = f"{result.stderr.strip()[-300:]!r}, then: {outcome}"
        elif result.returncode == 0:
            outcome = ENOUGH if outcome == SAME else outcome
    finally:
        subprocess.run(["umount", kit / "runs"], check=True)
    return outcome


def worker(bench: Bench, name: str) -> None:
    if name != "workers":
        return
    kit = bench.without(name)
    process = start(kit, name)
    at_work = wait_for(process, bench.moment(name, 0.3))
    children = psutil.Process(process.pid).children() if at_work else []
    living = [p for p in children if "spawn_main" in " ".join(p.cmdline())]
    if not living:
        process.communicate()
        return bench.note(name, "a worker killed", "not tried: no worker was at work")
    bench.rng.choice(living).kill()
    _, stderr = process.communicate()
    said = one_line(process, stderr) or process.returncode == 0
    outcome = bench.judge(kit, name)
    bench.note(name, "a worker killed", outcome if said else f"{stderr[-300:]!r}, then: {outcome}")


def rank(bench: Bench, name: str) -> None:
    if name not in RANKED:
        return
    fault = "a rank killed"
    tried = sum(row[:2] == (name, fault) for row in bench.rows) // 2  # each gives two rows
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
        return bench.note(name, fault, "the job hangs")
    if (folder / "done.json").is_file():
        return bench.note(name, fault, "not tried: it was done by then")
    if process.returncode == 0:
        return bench.note(name, fault, "exit code 0")
    copy = shutil.copytree(kit, kit.with_name("a copy of the kit"), dirs_exist_ok=False)
    for again, n in ((kit, processes), (copy, 1)):
        bench.note(name, fault, bench.judge(again, name, processes=n, rounded=name in TRAININGS))
    shutil.rmtree(copy)


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def files_of(folder: Path, *but: str) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.stat().st_size and path.name not in but]


def restore(kit: Path, bench: Bench, path: Path, stderr: str) -> None:
    """The remedy, if the line names the damaged file or its folder. It puts the content back."""
    if path.name in stderr or str(path.parent.relative_to(kit)) in stderr:
        shutil.copyfile(bench.undisturbed / path.relative_to(kit), path)


def with_name(outcome: str, path: Path) -> str:
    return outcome if outcome in (SAME, SAID) else f"{path.name}: {outcome}"


def damaged_input(bench: Bench, name: str) -> None:
    for how in ("cut", "bit flipped"):
        if not needs(name):
            return
        kit = bench.without(name)
        folder = kit / ALL[bench.rng.choice(INPUTS[name])][1]
        path = bench.rng.choice(files_of(folder, "timing.json", "summary.json"))  # what is read
        damage(path, how, bench.rng)
        remedy = functools.partial(restore, kit, bench, path)
        bench.note(name, f"an input file {how}", with_name(bench.judge(kit, name, remedy), path))


def remove(kit: Path, folder: Path, path: Path, stderr: str) -> None:
    """The remedy, if the line names the damaged partial output or the stage's folder."""
    if path.name in stderr or str(folder.relative_to(kit)) in stderr:
        shutil.rmtree(folder)


def damaged_partial(bench: Bench, name: str) -> None:
    for how in ("cut", "bit flipped"):
        fault, kit = f"a partial output {how}", killed(bench, name, 0.5)
        if kit is None:
            bench.note(name, fault, "not tried: it was done by then")
            continue
        folder = kit / ALL[name][1]
        files = files_of(folder)
        if not files:
            bench.note(name, fault, bench.judge(kit, name))
            continue
        path = bench.rng.choice(files)
        damage(path, how, bench.rng)
        outcome = bench.judge(kit, name, functools.partial(remove, kit, folder, path))
        outcome = UNNOTICED + path.name if outcome == OTHER else with_name(outcome, path)
        bench.note(name, fault, outcome)


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
    same = first.returncode == 0 and bench.same(kit, name, rounded=False)
    outcome = f"the second said {second.stderr[-300:]!r}, the first gave the same: {same}"
    bench.note(name, "two runs at once", SAID if refused and same else outcome)


def place(bench: Bench, name: str) -> None:
    if name != "dpo":  # once is enough
        return
    script, folder = ALL[name]
    want = outputs(bench.undisturbed, folder)["outputs"]

    kit, elsewhere = bench.without(name), bench.folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    paths = [kit / script[0], kit / "configs" / "micro.yaml", f"root={kit / 'runs'}"]
    result = call([sys.executable, *map(str, paths)], elsewhere)
    same = result.returncode == 0 and outputs(kit, folder)["outputs"] == want and not any(elsewhere.iterdir())
    bench.note(name, "another working directory", SAME if same else result.stderr[-300:])

    no_gl = call(command(["00_demos.py"], "root=no-gl"), kit, MUJOCO_GL="osmesa")
    outcome = "not tried: there is one"  # libOSMesa is installed
    if no_gl.returncode:
        said = one_line(no_gl, no_gl.stderr) and "apt-get install" in no_gl.stderr
        outcome = SAID if said else no_gl.stderr[-300:]
    bench.note("demos", "no GL library", outcome)

    fault = "a source folder that may not be written"
    if os.getuid():
        return bench.note(name, fault, "not tried: needs root")
    kit = bench.without(name)
    shutil.copytree(kit / "runs", elsewhere / "runs", dirs_exist_ok=True)
    shutil.rmtree(elsewhere / folder, ignore_errors=True)
    subprocess.run(["mount", "--bind", kit, kit], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", kit], check=True)
        refused = run(kit, name)
        result = call(command(script, f"root={elsewhere / 'runs'}"), kit)
    finally:
        subprocess.run(["umount", kit], check=True)
    same = result.returncode == 0 and outputs(elsewhere, folder)["outputs"] == want
    said = one_line(refused, refused.stderr) and "root=" in refused.stderr
    bench.note(name, fault, SAID if said and same else f"{refused.stderr[-300:]!r}, {result.stderr[-300:]!r}")


FAULTS = {"kill": kill, "disk": fill_disk, "worker": worker, "input": damaged_input}
FAULTS |= {"partial": damaged_partial, "twice": twice, "place": place, "rank": rank}
ONCE = ("twice", "place")


# ------------------------------------------------------------------------------------------------------ table
def markdown(rows: list[tuple[str, str, str]], arguments: str) -> str:
    lines = [f"`python tests/faults.py {arguments}`", ""]
    lines += ["| stage | fault | tried | same result | one line, then the same | anything else |"]
    lines += ["|---" * 6 + "|"]
    for stage, fault in dict.fromkeys((stage, fault) for stage, fault, _ in rows):
        counts = Counter(outcome for s, f, outcome in rows if (s, f) == (stage, fault))
        n, rest = sum(counts.values()), {k: v for k, v in counts.items() if k not in (SAME, SAID)}
        said = "; ".join(f"{v} x {' '.join(k.split())[:160].replace('|', '/')}" for k, v in rest.items())
        lines.append(f"| {stage} | {fault} | {n} | {counts[SAME]} | {counts[SAID]} | {said} |")
    return "\n".join(lines) + "\n"


def main(moments: int = 20, stages: str = "", faults: str = "", seed: int = 0, out: str = "") -> int:
    names = stages.split(",") if stages else list(ALL)
    times = {kind: max(1, moments // 7) for kind in FAULTS} | dict.fromkeys(ONCE, 1) | {"kill": moments}
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        bench = Bench(Path(folder), names, random.Random(seed))
        for name in names:
            for kind in faults.split(",") if faults else FAULTS:
                for _ in range(times[kind]):
                    FAULTS[kind](bench, name)
    only = (f" stages={stages}" if stages else "") + (f" faults={faults}" if faults else "")
    table = markdown(bench.rows, f"moments={moments} seed={seed}{only}")
    print(table)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        disk.write_atomic(Path(out) / "faults.md", table)
    accepted = (SAME, SAID, ENOUGH, UNNOTICED, "not tried")
    return int(not all(outcome.startswith(accepted) for *_, outcome in bench.rows))


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    numbers = {key: int(options.pop(key)) for key in ("moments", "seed") if key in options}
    sys.exit(main(**options, **numbers))
