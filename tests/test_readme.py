"""What README.md and the guides in docs/ promise: their size, files, commands, line counts and lines of code.

pytest tests/test_readme.py
"""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from runtime.config import HERE, STAGES, load_config

PAGES = ["README.md", "docs/reading.md", "docs/checkpoints.md", "checkpoints/README.md"]
PAGES += ["results/conclusions.md"]
TEXTS = {page: (HERE / page).read_text() for page in PAGES}
ALL = "\n".join(TEXTS.values())
README, READING = TEXTS["README.md"], TEXTS["docs/reading.md"]

FORMULA = re.compile(r"^\| [^|]+ \| [^|]+ \| `([\w/]+\.py):([\w.]+)` \| `(.+)` \|$", re.MULTILINE)
FORMULAS = FORMULA.findall(READING)
COMMAND = re.compile(
    r"(?:python (?:\d\d_\w+\.py|-m extras\.\w+)|bash run_all\.sh|torchrun [^`\n#]*?\.py)[^`\n#]*"
)
HEADERS = "\n".join(path.read_text() for path in (HERE / "configs").glob("*.yaml"))
PAPER = yaml.safe_load((HERE / "configs/paper.yaml").read_text())
CLAIMED = {row["command"] for row in PAPER["claims"] + PAPER["also"] if row.get("command")}
COMMANDS = sorted(
    {command.partition("   ")[0].strip() for command in COMMAND.findall(ALL + HEADERS) if "$" not in command}
    | CLAIMED
)
LINKS = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
COUNTS = re.findall(r"^(?:\| `)?([\w.]+(?:\.py|/))`?[ |]+(\d+) ", README, re.MULTILINE)
MADE = {"results.md", "metrics.jsonl", "done.json", "eval_info.json"}  # by the stages
THEIRS = {
    "config.json",
    "tokenizer.json",
    "norm_stats.json",
    "dataset_statistics.json",
}  # of published folders
THEIRS |= {"preprocessor_config.json", "policy_preprocessor.json", "policy_postprocessor.json"}


def test_the_readme_is_short():
    assert README.count("\n") <= 200 and len(README.split()) <= 2500


# ----------------------------------------------------------------------------------------- formulas and lines
def source_of(text: str, name: str) -> str:
    """Source of a function, or of `Class.method`."""
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
    return ast.get_source_segment(text, node)


def test_every_row_of_the_guide_is_read():
    table = READING.partition("| formula |")[2].partition("\n\n")[0]
    assert len(FORMULAS) == table.count("\n") - 1 >= 16


@pytest.mark.parametrize("file, function, line", FORMULAS)
def test_a_formula_stands_on_its_line(file, function, line):
    lines = source_of((HERE / file).read_text(), function).split("\n")
    assert line in [text.partition("  #")[0].strip().removesuffix(":") for text in lines]


def test_a_line_that_has_moved_is_noticed():
    text = "class A:\n    def f(self):\n        x = 1\n\n\ndef g():\n    x = 2\n"
    assert "x = 1" in source_of(text, "A.f") and "x = 1" not in source_of(text, "g")
    with pytest.raises(ValueError):
        source_of(text, "A.g")


def lines_of(name: str) -> int:
    """Lines of a script, or of all Python files of a folder."""
    files = [HERE / name] if name.endswith(".py") else (HERE / name).rglob("*.py")
    return sum(len(file.read_text().splitlines()) for file in files)


def test_line_counts_are_right_within_a_tenth():
    counted = {name: (int(stated), lines_of(name)) for name, stated in COUNTS}
    assert len(counted) >= 15
    assert not {name: pair for name, pair in counted.items() if abs(pair[0] - pair[1]) > 0.1 * pair[1]}


# ----------------------------------------------------------------------------------------- files and headings
def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page, link", LINKS)
def test_links_lead_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (HERE / page).parent / name if name else HERE / page
    assert target.exists()
    assert not anchor or anchor in headings(target)


def test_figures_of_the_conclusions_stand_in_the_pages_that_they_link_to():
    page = (HERE / "results" / "conclusions.md").read_text()
    figures = re.findall(r"\[\*\*([^*]+)\*\*\]\(([^)]+)\)", page)
    assert len(figures) >= 10
    for figure, link in figures:
        text = " ".join((HERE / "results" / link).read_text().replace("**", "").split())
        assert " ".join(figure.split()) in text, (figure, link)


def test_files_and_folders_that_the_pages_name_are_there():
    files = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml|md|sh|json))`", ALL)) - MADE - THEIRS
    folders = set(re.findall(r"`((?:results|checkpoints|tests|configs|docs)/[\w/]*)`", ALL))
    places = [HERE, HERE / "configs", HERE / "checkpoints"]
    absent = [name for name in files | folders if not any((place / name).exists() for place in places)]
    assert len(files) > 20 and not absent
    tree = README.partition("## The files")[2].partition("## ")[0]
    for room, row in re.findall(r"^(\w+)/ (.*(?:\n  .*)*)", tree, re.MULTILINE):
        named = re.findall(r"\w+\.(?:py|md|yaml)", row)
        assert not [name for name in named if not (HERE / room / name).is_file()]


# --------------------------------------------------------------------------------------------------- commands
def config_classes(script: str) -> list[type]:
    """The Config of a script such as 03_dpo.py; for the preflight, which has none, those of all stages."""
    module = importlib.import_module(script.removesuffix(".py"))
    if hasattr(module, "Config"):
        return [module.Config]
    return [
        importlib.import_module(name.removesuffix(".py").removeprefix("-m ")).Config
        for name in STAGES.values()
    ]


def check(command: str) -> None:
    """UserError unless the scripts that a command starts accept its arguments."""
    words = shlex.split(command)
    if words[0] == "bash":  # run_all.sh [CONFIG] [STAGES] [key=value ...]
        given = [word for word in words[2:] if not word.startswith(("backbones=", "adapters="))]
        config = [word for word in given if word.endswith(".yaml")] or ["configs/look.yaml"]
        numbers = [
            number for word in given if "=" not in word and word not in config for number in word.split()
        ]
        arguments = config + [word for word in given if "=" in word]
        scripts = [
            name for name in STAGES.values() if name[:2] in (numbers or ("00", "01", "02", "03", "04", "08"))
        ]
        assert {name[:2] for name in scripts} >= set(numbers)
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("extras."))
        scripts, arguments = [words[place]], words[place + 1 :]
        if not arguments or not arguments[0].endswith(".yaml"):
            assert importlib.util.find_spec(scripts[0]), command  # no config
            return
    for cls in [cls for script in scripts for cls in config_classes(script)]:
        load_config(cls, [*arguments, "--dry-run"])  # without a GPU too


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command, monkeypatch):
    monkeypatch.chdir(HERE)
    check(command)


def test_there_are_commands_and_a_wrong_one_is_noticed(monkeypatch):
    monkeypatch.chdir(HERE)
    assert len(COMMANDS) > 20
    for wrong in (
        "python 03_dpo.py configs/try.yaml dpo.stepz=1",
        "bash run_all.sh configs/try.yaml no_key=1",
    ):
        with pytest.raises(Exception, match="unknown key"):
            check(wrong)
