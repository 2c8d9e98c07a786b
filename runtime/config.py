"""Configs: one YAML for all stages, `key=value` on the command line, and a dataclass per stage that checks
both.

A stage's Config is a dataclass. Its own keys stand in the section of the YAML that `Config.section` names;
the keys that it inherits are shared, and stand at the top level. The type of a key is its check:

    steps: Count = 200                        a whole number, 1 or more
    lr: float = 5e-5                          a number, 0 or more
    threshold: Annotated[float, -1] = 0.98    a number, -1 or more
    start: Annotated[str, "final|[0-9]+"] = "final"    a text that matches
    adapter: Literal["lora", "dora"] = "lora"
"""

import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml

from runtime.errors import UserError, did_you_mean, one_line, one_of, refuse

HERE = Path(__file__).resolve().parents[1]  # the kit's folder
STAGES = {  # section of the YAML -> what to run, behind `python`
    "demos": "00_demos.py",
    "sft": "01_sft.py",
    "prefs": "02_collect_prefs.py",
    "dpo": "03_dpo.py",
    "eval": "04_eval.py",
    "profile": "05_profile.py",
    "head": "06_pretrain_head.py",
    "validate": "07_validate.py",
    "report": "08_report.py",
    "cells": "-m extras.cells",
    "distill": "-m extras.distill",
    "export": "-m extras.export",
    "grpo": "-m extras.grpo",
}
BACKBONES = ("openvla", "pi05")  # each a section of the YAML and a module of backbones/
LARGEST = 2**62  # what a seed can hold
Count = Annotated[int, 1]
Place = Annotated[str, ""]  # a file or folder: see `located`


@dataclass
class PlaceConfig:
    """Keys that say where a run lies and how fast it goes. They never change a result or an identity."""

    section: ClassVar[str] = ""  # of the YAML, for the stage's own keys
    by_torchrun: ClassVar[bool] = False  # whether several processes may share the stage

    name: Annotated[str, r"(?!\.+$)[^/]*"] = ""  # the YAML's file name; names the run folder
    root: Place = "runs"
    stages: str = ""  # that run_all.sh runs if its command line names none; empty = its default
    adapters: str = ""  # the same: which adapters it trains and evaluates
    workers: Count = 2  # simulator processes
    dry_run: bool = False  # or --dry-run: say what the stage would read, write and take, and do nothing
    overwrite: bool = False  # redo a stage whose config, inputs or code have changed

    run_dir = property(lambda self: Path(self.root) / self.name)

    def left_out(self) -> tuple[str, ...]:
        """Keys that do not count in the stage's identity: these, and those whose files are hashed instead."""
        return (*(own.name for own in fields(PlaceConfig)), "start_seed", "pairs_from", "adapters_from")


def typed(value, kind, key: str):
    """`value` as `kind` says. The type decides, not the spelling: PyYAML reads 5e-5 as a string.

    Raises:
        UserError: it is of another type, below its least or above the largest value.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is list and isinstance(value, list):
        return [typed(item, args[0], key) for item in value]
    if origin is Literal:
        one_of(key, value, args)
        return value
    least, most = 0, LARGEST
    if origin is Annotated:
        kind, least, most = (*args, LARGEST)[:3]
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind in (bool, dict) and isinstance(value, kind):
        return value
    if kind is str and plain and "\0" not in str(value):
        refuse(
            least and not re.fullmatch(least, str(value)),
            f"config key {key!r} can't be {value!r} (its pattern is {least})",
        )
        return str(value)
    number = as_number(value, kind) if kind in (int, float) and plain else None
    refuse(number is None, f"config key {key!r} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    refuse(number < least, f"config key {key!r} must be at least {least}, not {value}")
    refuse(number > most, f"config key {key!r} must be at most {most}, not {value}")
    return number


def as_number(value: str | int | float, kind: type) -> int | float | None:
    """The number that a text or number stands for; None where it is no number, is not finite, or is not
    whole although an int is wanted.
    """
    if kind is int and isinstance(value, int):  # as it is: a float has no room for large ones
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return kind(number) if math.isfinite(number) and (kind is not int or number == int(number)) else None


# ------------------------------------------------------------------------------------------------------- YAML
def read_yaml(path: Path, backbone: str = "", above: tuple[str, ...] = ()) -> dict:
    """A config file, laid over the file of its folder that it names as `base`.

    A file's own section of the backbone is laid over the rest of that file, so a file wins over its base in
    everything. above: the files that led here.
    """
    refuse(
        not path.is_file(),
        f"no config file {path}; "
        + did_you_mean(path.stem, [p.stem for p in (HERE / "configs").glob("*.yaml")]),
    )
    data = parse_yaml(path.read_bytes(), str(path)) or {}
    refuse(not isinstance(data, dict), f"{path} must hold `key: value` lines")
    base = data.pop("base", None)
    if isinstance(data.get(backbone), dict):
        data = laid_over(data, data[backbone])
    if base is None:
        return data
    refuse(
        not isinstance(base, str) or Path(base).name != base or base in (*above, path.name),
        f"{path}: base must name another YAML of its folder, not {base!r}",
    )
    return laid_over(read_yaml(path.parent / base, backbone, (*above, path.name)), data)


class Loader(yaml.SafeLoader):  # without two traps of YAML: 010 that means 8, and a key that stands twice
    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{', '.join(twice)} stands twice, at or below line {node.start_mark.line + 1}")
        return node


# 010 is 8 to YAML, 1:30 is 90 and 2026_11_30 20261130; here they are text, and an int's key reads its number
NO_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+:[0-9_:.]+|[0-9]+_[0-9_]+)$")
Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", NO_NUMBER), *others]
    for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str | bytes, where: str):
    """The plain data of a YAML text; nothing in it is executed."""
    try:
        data = yaml.load(text, Loader)
        json.dumps(data, sort_keys=True, allow_nan=False)  # what it cannot hold, a date say, is no config
        return data
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {one_line(error)}") from error


def laid_over(below: dict, above: dict) -> dict:
    """Both dicts in one; `above` wins, key by key, and sections are merged; an empty one changes nothing."""
    merged = below | above
    for key, value in above.items():
        if isinstance(value, dict | None) and isinstance(below.get(key), dict):
            merged[key] = laid_over(below[key], value or {})
    return merged


# ----------------------------------------------------------------------------------------------------- config
def shared_keys(kind: type = PlaceConfig) -> dict:
    """Name -> type of the keys that stages share: those of all the bases that stages' Configs are made of."""
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: hints[field.name] for field in fields(kind)}
    for each in kind.__subclasses__():
        if "section" not in vars(each):  # a stage's own Config has one
            found |= shared_keys(each)
    return found


def load_config(cls: type, argv: list[str]):
    """The Config of one stage from `CONFIG.yaml [key=value ...]`: defaults < YAML < command line.

    In the YAML, what holds for one backbone alone stands in a section of its name. On the command line a key
    may carry its section (`dpo.beta=0.2`, `model.horizon=16`). A key in another stage's section is
    ignored here. That stage checks it when it runs.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range.
    """
    called = Path(sys.argv[0])
    script = f"-m extras.{called.stem}" if called.parent.name == "extras" else STAGES.get(cls.section, "")
    usage = f"usage: python {script} configs/NAME.yaml [key=value ...] [--dry-run]"
    if {"-h", "--help"} & {*argv}:
        shown = [inspect.getsource(each) for each in cls.__mro__ if is_dataclass(each)]
        print(usage, *re.findall(r"^    [a-z]\w*: (?!ClassVar).*", "".join(shown), re.MULTILINE), sep="\n")
        sys.exit()
    refuse(not argv or "=" in argv[0] or argv[0].startswith("-"), f"{usage}; --help lists the keys")
    path = Path(argv[0]) if Path(argv[0]).is_file() else HERE / argv[0]
    overrides = [parsed(item) for item in argv[1:]]
    chosen = {key: value for section, key, value in overrides if (section, key) == ("", "backbone")}
    backbone = str((read_yaml(path) | chosen).get("backbone", "pi05"))
    own = backbone if backbone in BACKBONES else ""
    data = {"name": path.stem, "root": cls.root} | read_yaml(path, own) | chosen
    sections = [*STAGES, *BACKBONES]
    for name in [*sections, "model"]:
        refuse(
            not isinstance(data.get(name) or {}, dict),
            f"{path}: section {name!r} must hold `key: value` lines",
        )

    hints, shared = get_type_hints(cls, include_extras=True), shared_keys()
    keys = [field.name for field in fields(cls)]  # in a section also what is shared, for its stage alone
    given = [  # key, value, where it stands, the keys that may stand there; the last one wins
        *(
            (key, v, f"{path}, no stage's section", [*shared, *sections])
            for key, v in data.items()
            if key not in sections
        ),
        *(
            (key, v, f"{path}, section {cls.section}", keys)
            for key, v in (data.get(cls.section) or {}).items()
        ),
        *(
            (key, v, "command line", keys if section else [*keys, *shared])
            for section, key, v in overrides
            if section in ("", cls.section)
        ),
    ]
    values = {}
    for key, value, where, known in given:
        if cls is PlaceConfig and key not in hints:  # of a stage: run_all.sh asks for the other keys
            continue
        refuse(key not in known, f"{where}: unknown key {key!r}; {did_you_mean(key, known)}")
        refuse(
            key == "backbone" and str(value) != backbone,
            f"{where}: backbone does not belong in a section; set it at the top level",
        )
        kind = hints.get(key) or shared[key]
        checked = typed({} if value is None and kind is dict else value, kind, key)
        if kind == Place and checked:
            checked = located(checked, Path.cwd() if where == "command line" else HERE)
        if key in hints:
            values[key] = checked
    if "model" in hints:
        changed = {key: value for section, key, value in overrides if section == "model"}
        values["model"] = laid_over(values.get("model", {}), changed)
    return cls(**values)


def located(place: str, base: Path) -> str:
    """A file or folder that a config names. ~ is the home folder. What is relative begins in the kit's folder
    if a YAML names it, and in the working directory if the command line does.
    """
    place = os.path.expanduser(place)
    refuse(place.startswith("~"), f"nobody knows whose home folder {place} means; write the path out")
    return os.path.normpath(place if Path.cwd() == HERE else base / place)  # without a slash at its end


def parsed(item: str) -> tuple[str, str, object]:
    """(section or "", key, value) of a `[section.]key=value`; `key=` is the empty text."""
    if item == "--dry-run":
        return "", "dry_run", True
    name, equals, text = item.partition("=")
    refuse(not equals, f"{item!r} is not key=value")
    section, dot, key = name.rpartition(".")
    if dot:
        one_of(f"{item!r}: stage", section, [*STAGES, "model"])
    where = f"{item!r}, after the equals sign,"
    refuse(
        key != "name" and text[:1] not in ("'", '"') and re.search(r"\s#", text),
        f"{item!r}: in YAML ' #' begins a comment; quote the value, in quotes that the shell leaves",
    )
    return section, key, parse_yaml(text, where) if text and key != "name" else text  # a name: 2026_11_30 too
