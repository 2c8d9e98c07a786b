"""Files that are whole or not there, and known to be what was written: JSON, JSONL, tensors, a training's state."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError


class UserError(Exception):
    """One line that says what is wrong and what to do. Scripts print it without a traceback and exit with code 2."""


def one_line(error: Exception) -> str:
    """What an error of a library says, in one line that can stand within another."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a library writes in the block; UserError that names `path` when it can't, on a full disk above all."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the system's and h5py's, torch's, safetensors'
        raise UserError(f"{path} cannot be written ({one_line(error)}); make room, the same command then goes on") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which is thus the old one or the whole new one, whatever happens; errors as above."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, content: str | bytes) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_sealed(path: Path, content: bytes) -> None:
    """A file of an unfinished stage's own, its checksum behind it."""
    write_atomic(path, content + hashlib.sha256(content).digest())


def read_sealed(path: Path) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise UserError(f"{path} is damaged; remove it, the same command makes it again")
    return content[:-32]


def write_json(path: Path, data) -> None:
    write_atomic(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); remove its folder and run its stage again") from error


CHECKSUM = ', "crc32": '  # before the last number of each line, until its stage is finished and its hashes stand for it


def plain_line(row: dict) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def sealed_line(row: dict) -> str:
    text = plain_line(row)[:-2]  # without its brace, which follows the checksum
    return f"{text}{CHECKSUM}{zlib.crc32(text.encode())}}}\n"


def opened_line(line: str) -> tuple[dict, bool]:
    """The row of a line, and whether it was sealed; ValueError if it is not what was written."""
    text, mark, crc = line.rpartition(CHECKSUM)
    if mark and crc != f"{zlib.crc32(text.encode())}}}":
        raise ValueError("a line has another checksum than it was written with")
    return json.loads(text + "}" if mark else line), bool(mark)


def append_jsonl(path: Path, row: dict) -> None:
    """One more line, or UserError and none; several processes may append to one file."""
    line = sealed_line(row).encode()
    with writing(path), open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def read_jsonl(path: Path, needs: str = "") -> list[dict]:
    """Complete lines of a JSONL file; a last line cut short by a kill does not count.

    Raises:
        UserError: a line that is not JSON, no object with the keys in `needs`, or not what was written.
    """
    if not path.is_file():
        return []
    try:
        *lines, rest = path.read_text().split("\n")
        rows, sealed = zip(*map(opened_line, lines), strict=True) if lines else ((), ())
        if any(sealed) and not all(sealed):
            raise ValueError(f"line {sealed.index(False) + 1} has lost its checksum")
        if wrong := [i for i, row in enumerate(rows) if not isinstance(row, dict) or not set(needs.split()) <= row.keys()]:
            raise ValueError(f"line {wrong[0] + 1} is no object with {needs or 'keys'}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); remove its folder and run its stage again") from error
    if rest:  # drop the cut line, so that the next one starts on a line of its own
        write_atomic(path, "".join(line + "\n" for line in lines))
    return list(rows)


def keep_rows(path: Path, keep: Callable[[dict], bool], needs: str = "") -> list[dict]:
    """Rewrite a JSONL file with the rows that `keep` accepts (those a checkpoint knows of), and return them."""
    rows = [row for row in read_jsonl(path, needs) if keep(row)]
    write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(map(sealed_line, rows)))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(path: Path, state: dict) -> None:
    """Training state (tensors, numbers, dicts and lists of them), written by rename. Read it with load_checkpoint."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict | None:
    """What save_checkpoint wrote, None where there is nothing. PyTorch does not look at the checksums of its own files."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            intact = file.testzip() is None
        if intact:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError):
        pass  # said below
    raise UserError(f"{path} is damaged; remove it to train from the start")


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors: names, types, shapes and bits."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def save_tensors(path: Path, tensors: dict) -> None:
    """A safetensors file that carries the digest of what is in it."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"sha256": digest(tensors)})
        temporary.chmod(0o644)  # safetensors makes it 0600


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; UserError if it can't be read, or is not what save_tensors wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            written, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); remove its folder and run its stage again") from error
    if (written or {}).get("sha256") not in (None, digest(tensors)):
        raise UserError(f"{path} is damaged, its checksum is wrong; remove its folder and run its stage again")
    return tensors
