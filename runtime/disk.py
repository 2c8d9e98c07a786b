"""Files that are whole or not there: JSON, JSONL, tensors, the state of a training.

Every file is written beside its place and then renamed, so a kill or a full disk leaves the old file or none.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import UserError, one_line, refuse


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a library writes, a full disk above all, into a UserError about `path`."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # the system's and h5py's, torch's, safetensors'
        raise UserError(
            f"{path} cannot be written ({one_line(error)}); make room, the same command then goes on"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and disappears otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, content: str | bytes) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- JSON
def write_json(path: Path, data) -> None:
    write_atomic(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); remove its folder and run its stage again"
        ) from error


def json_line(row: dict) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def append_jsonl(path: Path, row: dict) -> None:
    """Add one line, or raise UserError and add none. Several processes may append to one file."""
    with writing(path), open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        if end and not (content := file.read()).endswith(b"\n"):  # a kill has cut the last line: drop it
            end = content.rfind(b"\n") + 1
            file.truncate(end)
        line = json_line(row).encode()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def read_jsonl(path: Path, needs: str = "") -> list[dict]:
    """The rows of a JSONL file; none where there is no file. A last line that a kill has cut does not count.

    Raises:
        UserError: a line is not a JSON object with all the keys in `needs` (names, separated by blanks).
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); remove its folder and run its stage again"
        ) from error
    for number, row in enumerate(rows, 1):
        refuse(
            not isinstance(row, dict) or not set(needs.split()) <= row.keys(),
            f"{path} is damaged (line {number} is no object with {needs or 'keys'}); "
            "remove its folder and run its stage again",
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(map(json_line, rows)))


# ---------------------------------------------------------------------------------------------------- tensors
def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
        temporary.chmod(0o644)  # safetensors makes it 0600


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); remove its folder and run its stage again"
        ) from error


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state of a training: tensors, numbers, and dicts and lists of them."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict | None:
    """What save_checkpoint wrote; None where there is no file."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # PyTorch does not look at the checksums of its own files
            intact = file.testzip() is None
        if intact:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); remove it to train from the start"
        ) from error
    raise UserError(f"{path} is damaged; remove it to train from the start")
