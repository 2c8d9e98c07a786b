"""The house: which room imports which, its size, and what a stage's main shows. pytest tests/test_house.py"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.stage import imports

KIT = Path(__file__).resolve().parent.parent
STAGES = sorted(path.name for path in KIT.glob("0*.py"))
TOP = {"README.md", "run_all.sh", "LICENSE", "requirements.txt", "pyproject.toml", "common.py", "dora.py"}
TOP |= {
    "backbones",
    "sim",
    "runtime",
    "report",
    "extras",
    "configs",
    "checkpoints",
    "results",
    "tests",
    "docs",
}
BELOW = {  # room -> the rooms that it may import
    "runtime": set(),
    "dora": set(),
    "common": {"runtime", "dora"},
    "sim": {"runtime", "common"},
    "backbones": {"runtime", "common"},
    "report": {"runtime", "common"},
    "stage": {"runtime", "common", "sim", "backbones", "report"},
    "extras": {"runtime", "common", "sim", "backbones", "report", "stage"},
}
PRODUCT = [p for p in sorted(KIT.glob("*.py")) + sorted(KIT.glob("*/*.py")) if p.parent.name != "tests"]
DEFAULT_RUN = [
    "extras/preflight.py",
    *(name for name in STAGES if name[:2] in ("00", "01", "02", "03", "04", "08")),
]


# what the default run never imports: the exact likelihood, published checkpoints, a dry run
ON_REQUEST = {f"backbones/{name}.py" for name in ("likelihood", "published")}


def room_of(path: Path) -> str:
    place = path.relative_to(KIT)
    return place.parts[0] if len(place.parts) > 1 else "stage" if place.name in STAGES else place.stem


def upward(path: Path) -> list[str]:
    """The files of other rooms that a file imports and may not."""
    room = room_of(path)
    return [str(p.relative_to(KIT)) for p in imports(path) if room_of(p) not in {*BELOW[room], room}]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_top_level_shows_the_method():
    listed = subprocess.run(["git", "ls-files"], cwd=KIT, capture_output=True, text=True).stdout.split("\n")
    top = {name.partition("/")[0] for name in listed if name and (KIT / name).exists()} or set(
        os.listdir(KIT)
    )
    assert {name for name in top if not name.startswith(".")} - {"runs"} == TOP | set(STAGES)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(KIT)))
def test_rooms_import_only_what_is_below(path):
    assert not upward(path)
    if room_of(path) == "stage":
        assert not [p for p in imports(path) if room_of(p) == "stage"], "stages never import each other"


def test_no_circle():
    """Of files, wherever an import stands. A file's own package does not count: Python imports it anyway."""
    left = {path: {p for p in imports(path) if p != path.parent / "__init__.py"} for path in PRODUCT}
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    assert not left, f"these import one another: {sorted(str(path.relative_to(KIT)) for path in left)}"


LOADED = """
import runpy, sys
from pathlib import Path
script, sys.argv = sys.argv[1], sys.argv[1:2]
sys.path.insert(0, {kit!r})
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit:
    pass
files = {{getattr(module, "__file__", None) for module in list(sys.modules.values())}} - {{None}}
own = [file for file in files if file.startswith({kit!r}) and ".venv" not in file]
print(*sorted(str(Path(file).relative_to({kit!r})) for file in own))
"""


@pytest.mark.parametrize("script", ["04_eval.py", "extras/cells.py"])
def test_what_a_stage_loads(script):
    """A start without arguments, so that dynamic imports count."""
    code = LOADED.format(kit=str(KIT))
    result = subprocess.run([sys.executable, "-c", code, script], cwd=KIT, capture_output=True, text=True)
    assert "usage: python" in result.stderr and result.stdout, result.stderr
    loaded = [KIT / name for name in result.stdout.split()]
    assert len(loaded) > 5
    above = {"stage", "extras"} if "extras" not in script else {"stage"}
    assert not [path.name for path in loaded if room_of(path) in above]
    assert not {"pi05", "openvla"} & {path.stem for path in loaded}, "these are loaded when a policy is built"


@pytest.mark.parametrize("room", ["runtime", "sim", "backbones", "report", "common"])
def test_what_a_room_loads(room):
    names = [str(p.relative_to(KIT).with_suffix("")).replace("/", ".") for p in PRODUCT if room_of(p) == room]
    code = f"import {', '.join(names)}, sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=KIT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    known = {*BELOW, *(Path(name).stem for name in STAGES)}
    loaded = {name.partition(".")[0] for name in result.stdout.split()} & known
    assert loaded <= {room, *BELOW[room]} | ({"runtime", "dora"} if "common" in BELOW[room] else set())


# ------------------------------------------------------------------------------------------------------- size
def statements(paths) -> int:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return sum(isinstance(node, ast.stmt) for tree in trees for node in ast.walk(tree))


def default_run() -> set[Path]:
    """The files that the default run_all.sh imports: those of one backbone, and nothing on request."""
    files, todo = set(), [KIT / name for name in DEFAULT_RUN]
    todo += [KIT / "backbones" / "pi05.py"]
    others = {KIT / name for name in ON_REQUEST} | set(KIT.glob("backbones/openvla*"))
    while todo:
        path = todo.pop()
        if path not in files | others:
            files.add(path)
            todo += imports(path)
    return files


def test_size(capsys):
    product, default = statements(PRODUCT), statements(default_run())
    with capsys.disabled():
        print(f"\nstatements: product {product} (below 7000), default run {default} (at most 4620)")
    assert product < 7000 and default <= 4620


def test_common_is_small():
    assert (KIT / "common.py").read_text().count("\n") <= 450


# ---------------------------------------------------------------------------------- what a stage's main shows
def main_of(script: str) -> str:
    text = (KIT / script).read_text()
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("script, phases", [("01_sft.py", 4), ("02_collect_prefs.py", 3), ("03_dpo.py", 4)])
def test_main_shows_the_method(script, phases):
    main = main_of(script)
    assert main.count("\n") + 1 <= 60
    assert re.findall(r"# (\d)\. ", main) == [str(i + 1) for i in range(phases)]


@pytest.mark.parametrize("script", ["01_sft.py", "03_dpo.py"])
def test_no_plumbing_between_the_equations(script):
    loop = main_of(script).partition("for step in run.steps(first, ")[2].partition("\n\n    if run.first")[0]
    assert not re.findall(r"\b(ranks|disk|device|checkpoint|jsonl|Path|first)\b", loop)
    for line in (".backward()", "clip_grad_norm_", "optimizer.step()", "optimizer.zero_grad()"):
        assert line in loop
