"""Do two versions of the kit give the same results, bit for bit?

    python tests/bench/same_results.py OLD NEW [out=FOLDER] [only=old|new|compare] [of=WORD]

OLD and NEW are commits, or folders with uncommitted changes. The script makes a git worktree of a commit,
or a copy of a folder's files, in a temporary folder. It runs EXPERIMENTS in both with this Python, compares
the files below runs/, prints a line for each, and exits with 1 if anything differs. A version takes about an
hour on two busy cores; micro-pi05 alone takes three minutes on idle ones.

out=FOLDER   keep everything there. The same command then goes on where it was stopped. It runs an experiment
             again only if that version's code, configs or checkpoints have changed.
only=...     run one version without a comparison, or compare what FOLDER already holds
of=WORD      take only the experiments whose names contain this word

Compared: tensors and demonstrations (type, shape, bytes), and all keys, numbers and truth values of .json and
.jsonl files. Of times only the keys count. Not compared: identities, hashes, commands, commits, plots, videos
and printed pages. A text that differs is shown, and counts as a difference only if its numbers differ. What
MENDED names does not count.

Some settings depart from the configs, in both versions alike, so that every stage has something to do:
- micro.yaml with openvla: the policy of checkpoints/try/openvla/sft fails at task 3; greedy actions at task 6
  give pairs.
- try.yaml: 06's batch of 32 is larger than the 27 anchors of its two demonstrations.
- try.yaml with openvla: tiny.yaml's limits for openvla (80 pairs, 300 play-outs) override those of try.yaml,
  so this script sets them to 2 and 10 again.
- caches: at the usual threshold, 0.98, nothing is reused in this one episode.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import h5py
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[2]
STAGES = "'00 01 02 03 04 05 06 07 08'"
SETUP = """
micro() { bash run_all.sh configs/micro.yaml "$@" name=$NAME; }
try() { bash run_all.sh configs/try.yaml "$@" name=$NAME adapters='lora dora'; }
extra() { $PYTHON $1 configs/micro.yaml start=final "${@:2}" name=$NAME; }
"""
EXPERIMENTS = {  # name, also of the folder below runs/ -> bash
    "micro-pi05": f"micro {STAGES}",
    "micro-openvla": f"""
        micro {STAGES} backbones=openvla init_from=checkpoints/try/openvla/sft tasks=[6] noise_scale=0""",
    "try-pi05": f"try {STAGES} head.batch_size=16",
    "try-openvla": f"""
        try {STAGES} head.batch_size=16 backbones=openvla prefs.n_pairs=2 prefs.max_playouts=10""",
    "variants": """
        early="adapters=lora pairs=whole start=4"
        micro "00 01 02 03 04 07" $early
        for name in elbo mirrored independent exact; do micro 03 $early surrogate=$name; done
        micro 06 head.encoder=random
        micro 01 seed=7 sft.train=dora sft.rank=4
        for name in none chunk prefix patches; do
            extra "$CELLS" execute=2 cells.threshold=0.9 cells.reuse=$name
        done
        extra "$DISTILL" distill.steps=6 distill.batch_size=4 distill.log_every=1""",
}
MOVED = {"CELLS": ("05_cells.py", "-m extras.cells"), "DISTILL": ("05_distill.py", "-m extras.distill")}
PASSIVE = {".git", "__pycache__", "runs", "docs", "results", "tests"}  # folders that change no result
SUFFIXES = (".hdf5", ".safetensors", ".json", ".jsonl")  # of the files that are compared
IDENTITY = {"stage", "config", "inputs", "outputs", "source", "versions", "fingerprint"}  # of a done.json
PROVENANCE = {"command", "commit", "crc32"}
TIMES = re.compile(r"_ms\b|ms_per_step|parts_over_whole|points\[\d+\]\.(prefix_share|ceiling)")
MENDED = (
    ".wins",  # of paired rows: only since f1fe499
    ".roofline",  # of 05: ce23880 took the sizes of `init_from` for the published ones
    "[15].ours: ",  # of claims.json: a rank correlation of 0.7346 is 0.73, where ce23880 had typed 0.74
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
TIMED_ROWS = {"ms", "CPU s", "prefix_share", "denoise_share"}  # units and metrics of table rows


# ---------------------------------------------------------------------------------------------------- running
def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(tree: Path, version: str) -> None:
    """Make `tree` a worktree of a commit or a copy of a folder. Its runs/ stays as it is."""
    if Path(version).is_dir():
        for path in tree.iterdir() if tree.is_dir() else ():
            if path.name != "runs":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files = git(Path(version), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for name in files.split("\0"):
            if (Path(version) / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(version) / name, tree / name)
    elif (tree / ".git").is_file():
        git(tree, "checkout", "--quiet", "--force", "--detach", version)
    else:
        git(HERE, "worktree", "add", "--quiet", "--force", "--detach", str(tree), version)


def run(tree: Path, name: str) -> None:
    """Run an experiment in a tree, from where the same code was stopped."""
    state = hashlib.sha256((SETUP + EXPERIMENTS[name]).encode())
    for path in sorted(tree.rglob("*")):
        if path.is_file() and path.suffix != ".md" and not PASSIVE & {*path.relative_to(tree).parts}:
            state.update(f"{path.relative_to(tree)}\n".encode() + path.read_bytes())
    log, note = (tree.with_name(f"{tree.name}-{name}.{suffix}") for suffix in ("log", "txt"))
    begun = note.read_text() if note.is_file() else ""
    if not begun.startswith(state.hexdigest()):
        shutil.rmtree(tree / "runs" / name, ignore_errors=True)
        begun = state.hexdigest()
        note.write_text(begun)
    if "finished" not in begun:
        started = time.time()
        scripts = {key: old if (tree / old).is_file() else new for key, (old, new) in MOVED.items()}
        environment = os.environ | scripts | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NAME": name}
        environment.pop("PYTHONPATH", None)  # or one version would import the other's modules
        with open(log, "w") as file:
            bash = ["bash", "-euxc", SETUP + EXPERIMENTS[name]]
            result = subprocess.run(bash, cwd=tree, env=environment, stdout=file, stderr=file)
        if result.returncode:
            last = "\n".join(log.read_text().splitlines()[-9:])
            sys.exit(f"error: {tree.name} {name} failed, see {log}:\n{last}")
        begun += f"\nfinished in {time.time() - started:.0f} s"
        note.write_text(begun)
    print(f"{tree.name} {name}: {begun.splitlines()[1]}", flush=True)


# -------------------------------------------------------------------------------------------------- comparing
def content(path: Path):
    """What a file holds, as nested dicts and lists of numbers, texts and tensors."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    found = {}

    def take(name: str, item) -> None:
        for key, value in item.attrs.items():
            found[f"{name}@{key}"] = value if isinstance(value, str) else torch.as_tensor(value)
        if isinstance(item, h5py.Dataset):
            found[name] = torch.as_tensor(item[()])

    with h5py.File(path) as file:
        file.visititems(take)
    return found


def walk(old, new, ignored: set[str], where: str = "", timed: bool = False):
    """Yield "equal", "text" (only words differ) or "DIFFERENT", with a description, for each value."""
    timed = timed or TIMES.search(where)
    if type(old) is not type(new):
        yield "DIFFERENT", f"{where}: {old!r} -> {new!r}"[:200]
    elif isinstance(old, dict):
        timed_row = TIMED_ROWS & {str(old.get("unit")), str(old.get("metric"))}
        for key in sorted({*old, *new} - ignored):
            if not (key in old and key in new):
                yield "DIFFERENT", f"{where}.{key} is only in {'old' if key in old else 'new'}"
                continue
            is_time = timed or (timed_row and key == "value")
            yield from walk(old[key], new[key], ignored, f"{where}.{key}", is_time)
    elif isinstance(old, list):
        if len(old) != len(new):
            yield "DIFFERENT", f"{where or 'rows'}: {len(old)} -> {len(new)} entries"
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from walk(a, b, ignored, f"{where}[{i}]", timed)
    elif isinstance(old, torch.Tensor) and (old.dtype, old.shape) == (new.dtype, new.shape):
        a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (old, new))
        if torch.equal(a, b):
            yield "equal", where
            return
        place = (a != b).nonzero()[0].item() // old.element_size()  # of the first value that differs
        before, after = (x.flatten()[place].item() for x in (old, new))
        yield "DIFFERENT", f"{where}, value {place} of {old.numel()}: {before!r} -> {after!r}"
    elif isinstance(old, torch.Tensor):
        yield "DIFFERENT", f"{where}: {old.dtype} {list(old.shape)} -> {new.dtype} {list(new.shape)}"
    elif timed or repr(old) == repr(new):
        yield "equal", where
    elif isinstance(old, str):
        place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
        begin = max(0, place - 20)
        same_numbers = NUMBER.findall(old) == NUMBER.findall(new)
        change = f"{old[begin : begin + 60]!r} -> {new[begin : begin + 60]!r}"
        yield ("text" if same_numbers else "DIFFERENT"), f"{where}: {change}"
    else:
        yield "DIFFERENT", f"{where}: {old!r} -> {new!r}"


def compare(old: Path, new: Path) -> str:
    """A line that says whether two files hold the same."""
    if not (old.is_file() and new.is_file()):
        return f"DIFFERENT: only in {'old' if old.is_file() else 'new'}"
    counts, first = Counter(), {}
    ignored = PROVENANCE | IDENTITY if old.name == "done.json" else PROVENANCE
    for verdict, description in walk(content(old), content(new), ignored):
        if verdict == "DIFFERENT" and description.startswith(MENDED):
            verdict = "mended"
        counts[verdict] += 1
        first.setdefault(verdict, description)
    text = f"; {counts['text']} texts differ, first {first['text']}" if counts["text"] else ""
    text += f"; {counts['mended']} values are mended" if counts["mended"] else ""
    if counts["DIFFERENT"]:
        said = f"{counts['DIFFERENT']} of {counts.total()} values, first {first['DIFFERENT']}"
        return f"DIFFERENT: {said}{text}"
    return f"equal: {counts['equal']} values{text}"


def compare_all(folder: Path, name: str) -> list[str]:
    """Compare all files of an experiment, print a line for each, and return these lines."""
    halves, lines = [folder / half / "runs" / name for half in ("old", "new")], []
    found = {path.relative_to(half) for half in halves for path in half.rglob("*") if path.suffix in SUFFIXES}
    for path in sorted(path for path in found if path.name not in ("timing.json", "started.json")):
        lines.append(compare(*(half / path for half in halves)))
        print(f"{name}/{path}  {lines[-1]}", flush=True)
    return lines or sys.exit(f"error: {folder} holds no results of {name}; run without only=compare first")


def main(versions: list[str], out: str = "", only: str = "", of: str = "") -> int:
    folder = Path(out or tempfile.mkdtemp(prefix="same_results-")).resolve()
    names = [name for name in EXPERIMENTS if of in name]
    for half, version in zip(("old", "new"), versions, strict=True):
        if only in ("", half):
            folder.mkdir(parents=True, exist_ok=True)
            prepare(folder / half, version)
            for name in names:
                run(folder / half, name)
    if only in ("old", "new"):
        return 0
    lines = [line for name in names for line in compare_all(folder, name)]
    different = sum(line.startswith("DIFFERENT") for line in lines)
    print(f"{len(lines)} files of {len(names)} experiments: {different} differ")
    if not out:
        shutil.rmtree(folder)
        git(HERE, "worktree", "prune")
    return int(different > 0)


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    sys.exit(main([argument for argument in sys.argv[1:] if "=" not in argument], **options))
