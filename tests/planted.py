"""Makes the mistakes of planted.yaml, one at a time, in a copy of the kit: the named test must then fail.

    python tests/planted.py [WORDS] [out=FOLDER]
        all rows, or those with WORDS in `why` or `test`; the table of results goes to FOLDER

A row says: in `file`, `old` (which stands there exactly once) becomes `new`. Then `test` must fail because of
what it found, and not because the code no longer runs. Without the mistake each test must pass.
"""

import ast
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).resolve().parent
KIT = HERE.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "results", "__pycache__", ".*_cache", ".hypothesis"
)
# What pytest prints when a test did not find what it expects. Anything else: the planted code does not run.
FOUND = ("AssertionError", "assert ", "Failed: DID NOT RAISE", "Failed: stopped", "UserError")
FOUND += ("Regex pattern did not match",)
LIBRARIES = ["h5py", "hypothesis", "matplotlib.pyplot", "peft", "scipy.stats", "torchdiffeq", "transformers"]
MODELS = ("dinov2_with_registers", "gemma", "llama", "siglip")
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in MODELS]


def table() -> list[dict]:
    return yaml.safe_load((HERE / "planted.yaml").read_text())


def planted(row: dict, text: str) -> str:
    return text.replace(row["old"], row["new"])


def problems(row: dict, kit: Path = KIT) -> list[str]:
    """What is wrong with a row; nothing as long as it fits the code."""
    where = f"{row['why']!r}"
    if set(row) != {"why", "file", "old", "new", "test"}:
        return [f"{where} has the keys {sorted(row)}"]
    text = (kit / row["file"]).read_text()
    if (n := text.count(row["old"])) != 1:
        return [f"{where}: {row['old']!r} occurs {n} times in {row['file']}"]
    try:
        ast.parse(planted(row, text))
    except SyntaxError as error:
        return [f"{where}: {error}"]
    file, _, name = row["test"].partition("::")
    tests = {n.name for n in ast.walk(ast.parse((kit / file).read_text())) if isinstance(n, ast.FunctionDef)}
    return [] if name.partition("[")[0] in tests else [f"{where}: no test {row['test']}"]


def run_tests(kit: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output. It runs in a fork of this process, which has imported the libraries."""
    with tempfile.TemporaryFile("w+") as said:
        if (pid := os.fork()) == 0:
            os.chdir(kit)
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            sys.path[0] = str(kit / "tests")
            # Python may take an old .pyc for a file that was changed in the same second
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            code = pytest.main(["-q", "-x", "--tb=short", "-p", "no:cacheprovider", *tests])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read()


def caught(row: dict, kit: Path) -> tuple[bool, str]:
    """Plant one mistake, run its test, restore the file. -> whether the test found it, and what it said."""
    path = kit / row["file"]
    right = path.read_text()
    try:
        path.write_text(planted(row, right))
        code, output = run_tests(kit, [row["test"]])
    finally:
        path.write_text(right)
    errors = [line[1:].strip() for line in output.splitlines() if line.startswith("E  ")]
    said = next((line for line in errors if any(words in line for words in FOUND)), "")
    if code == 1 and said:
        return True, said
    return False, "the test passes" if code == 0 else " ".join(errors[:1]) or output[-200:]


def markdown(rows: list[tuple[dict, bool, str]]) -> str:
    lines = ["| planted mistake | file | test that fails | what it says |", "|---" * 4 + "|"]
    for row, ok, said in rows:
        outcome = said[:100] if ok else f"**not caught**: {said[:200]}"
        cells = [row["why"], row["file"], row["test"].removeprefix("tests/"), outcome]
        cells = [cell.replace("|", "/").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: str = "", out: str = "") -> int:
    rows = [row for row in table() if words in f"{row['why']} {row['test']}"]
    if wrong := [problem for row in rows for problem in problems(row)]:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    for library in LIBRARIES:  # for the forks; not mujoco, which chooses its renderer on import
        importlib.import_module(library)
    results, passes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        kit = Path(shutil.copytree(KIT, Path(folder) / "kit", ignore=LEFT_OUT))
        (kit / "results").symlink_to(KIT / "results")
        for row in rows:
            if row["test"] not in passes:
                code, output = run_tests(kit, [row["test"]])
                passes[row["test"]] = code == 0 or f"fails without the mistake: {output[-300:]}"
            began = time.time()
            ok, said = caught(row, kit) if passes[row["test"]] is True else (False, passes[row["test"]])
            results.append((row, ok, said))
            verdict = f"{'caught' if ok else 'MISSED'} {time.time() - began:4.0f} s"
            print(f"{verdict}  {row['why']}: {said[:120]}", flush=True)
    missed = sum(not ok for _, ok, _ in results)
    print(f"{len(results) - missed} of {len(results)} planted mistakes caught")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "planted.md").write_text(markdown(results))
    return int(missed > 0)


if __name__ == "__main__":
    options = [argument.removeprefix("out=") for argument in sys.argv[1:] if argument.startswith("out=")]
    sys.exit(main(" ".join(a for a in sys.argv[1:] if not a.startswith("out=")), *options))
