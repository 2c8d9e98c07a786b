"""What the README points at is there: the lines of the reading guide, the files it names, the commands it gives.

pytest tests/test_readme.py
"""

import ast
import importlib
import re
import shlex

import pytest

import common
import runs

README = (runs.HERE / "README.md").read_text()
LINES = re.findall(r"^\| [^|]+ \| [^|]+ \| `([\w/]+\.py):([\w.]+)` \| `(.+)` \|$", README, re.MULTILINE)
COMMANDS = sorted(set(re.findall(r"python (0\d_\w+\.py configs/\w+\.yaml[^`\n#<]*)", README)))
SECTIONS = {f"{script}.py": (section, script) for section, script in runs.STAGES.items()}


def source_of(text: str, name: str) -> str:
    """Source of a function, `Class.method` for one of a class."""
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
    return ast.get_source_segment(text, node)


def test_the_guide_has_lines():
    assert len(LINES) == README.partition("| formula |")[2].partition("\n\n")[0].count("\n") - 1 >= 15


@pytest.mark.parametrize("file, function, line", LINES)
def test_a_formula_stands_on_its_line(file, function, line):
    assert line in [
        x.partition("  #")[0].strip().removesuffix(":") for x in source_of((runs.HERE / file).read_text(), function).split("\n")
    ]


def test_a_line_that_has_moved_is_noticed():
    text = "class A:\n    def f(self):\n        x = 1\n\n\ndef g():\n    x = 2\n"
    assert "x = 1" in source_of(text, "A.f") and "x = 1" not in source_of(text, "g")
    with pytest.raises(ValueError):
        source_of(text, "A.g")


def test_files_that_the_readme_names_are_there():
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml|md|sh))`", README))
    known = {path.name for path in runs.HERE.glob("configs/*.yaml")}
    made = {"results.md", "table.md", "report.md"}  # by the stages
    assert len(names) > 25 and not [name for name in names - made if not (runs.HERE / name).is_file() and name not in known]


def test_commands_that_the_readme_gives_are_accepted():
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        script, *arguments = shlex.split(command.strip())
        if "dry" in command or "PATH" not in command:
            section, name = SECTIONS[script]
            if "configs/pi05.yaml" in arguments:  # is for a GPU
                arguments.append("dry_run=true")
            common.load_config(importlib.import_module(name).Config, section, [str(runs.HERE / arguments[0]), *arguments[1:]])
