"""Files that are whole or not there: JSON, JSONL, tensors, the state of a training.

A file is written beside its place and then renamed, so a kill or a full disk leaves the old file or none.
Only logs (JSONL) grow in place, line by line.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import UserError, one_line, refuse

# -------------------------------------------------------------------------------------------- what goes wrong
# An error of the operating system, by its number -> what to do about it. Reading and writing differ.
ANYWHERE = {
    errno.ESTALE: "the network disk has lost sight of it: mount it again",
    errno.EIO: "the disk fails: look into the system's log (dmesg)",
    errno.ENOMEM: "memory has run out: end other programs, or set workers=1",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENAMETOOLONG: "the name is too long: shorten name= or root=",
    errno.ELOOP: "a link there leads back to itself: mend it",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another place (root=)",
    errno.EISDIR: "a folder stands where a file is needed: move it away, or choose another place (root=)",
    errno.EAGAIN: "another program has locked it: end that one",
    errno.EBUSY: "another program uses it: end that one",
    errno.EPIPE: "the program that read the output (behind a `|`) has ended: write into a file instead",
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        "this disk can lock no file: mount it with locks (Lustre: -o flock), or choose another root=",
    ),
}
READING = ANYWHERE | {
    errno.ENOENT: "it is not there: name another place, or make it first",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user read it (chmod, chown)"),
}
WRITING = ANYWHERE | {
    errno.ENOENT: "no file or folder can be made there: choose another root=",
    errno.EEXIST: "something else has its name: move that away, or choose another root=",
    errno.EROFS: "the disk is mounted read-only: choose another root=",
    errno.EFBIG: "the file is larger than the disk or `ulimit -f` allows: make room for it, raise the limit",
    errno.EINVAL: "the disk does not take such a file or name: choose another root= or name=",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another root="),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write there, or choose another root="),
}
UNREADABLE = (  # what a library may raise while it reads a file that is not as it should be
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def remedy(error: BaseException, remedies: dict[int, str], otherwise: str) -> str:
    """What to do about an error of the operating system, which a library may have put into words."""
    said = re.search(r"(?:os error|errno)[ =]+(\d+)", str(error), re.IGNORECASE)
    absent = isinstance(error, FileNotFoundError) and errno.ENOENT  # safetensors gives no number
    return remedies.get(getattr(error, "errno", None) or absent or int(said[1] if said else 0), otherwise)


@contextlib.contextmanager
def reading(path: str | Path, otherwise: str, wrong: str = "is damaged") -> Iterator[None]:
    """Turn what goes wrong while `path` is read into one line.

    otherwise: what to do about a file that is there and `wrong`.
    """
    try:
        yield
    except UNREADABLE as error:
        what = remedy(error, READING, otherwise)
        why = f"{wrong if what == otherwise else 'cannot be read'} ({one_line(error)})"
        raise UserError(f"{path} {why}; {what}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a library writes, a full disk above all, into a UserError about `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # h5py raises RuntimeError, and torch
        what = f"{remedy(error, WRITING, 'make room, or choose another root=')}; then repeat the command"
        raise UserError(f"{path} cannot be written ({one_line(error)}); {what}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and disappears otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask has it; a library may take another
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # gone already where all went well


def write_atomic(path: Path, content: str | bytes) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_text(path: Path) -> str:  # UTF-8, whatever the locale: nothing else reads text files
    return path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- JSON
AGAIN = "get it again; or, if a stage made it, remove its folder and run that stage again"


def json_text(path: Path, data, indent: int | None = None) -> str:
    """JSON of what `path` shall hold; UserError that names a number that JSON can't hold."""
    try:
        return json.dumps(data, indent=indent, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        lost = re.search(r'"([^"]*)": (?:\[[^]]*)?(?:NaN|-?Infinity)', json.dumps(data))
        why = f"{lost[1] if lost else 'a value'} is not finite; look at the weights and the data behind it"
        raise UserError(f"{path}: {why}") from error


def write_json(path: Path, data) -> None:
    write_atomic(path, json_text(path, data, indent=1))


def read_json(path: Path):
    with reading(path, AGAIN):
        return json.loads(read_text(path))


def read_object(path: Path) -> dict:  # a JSON file that holds an object
    content = read_json(path)
    refuse(not isinstance(content, dict), f"{path} must hold a JSON object; get its folder again")
    return content


def append_jsonl(path: Path, row: dict) -> None:
    """Add one line. Several processes may append to one file.

    A line that a kill or a full disk has cut does not count (`read_jsonl`), and the next one takes its place.
    """
    with writing(path), open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json_text(path, row).encode())


def read_jsonl(path: Path, needs: str = "") -> list[dict]:
    """The rows of a JSONL file; none where there is no file. A last line that is cut does not count.

    Raises:
        UserError: a line is not a JSON object with all the keys in `needs` (names, separated by blanks).
    """
    if not path.is_file():
        return []
    with reading(path, AGAIN):
        rows = [json.loads(line) for line in read_text(path).split("\n")[:-1]]
    for number, row in enumerate(rows, 1):
        refuse(
            not isinstance(row, dict) or not set(needs.split()) <= row.keys(),
            f"{path} is damaged (line {number} is no object with {needs or 'keys'}); {AGAIN}",
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json_text(path, row) for row in rows))


# ---------------------------------------------------------------------------------------------------- tensors
def save_tensors(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str] | None = None) -> None:
    """facts: strings for the file's header (`facts_of`), as one text so that its bytes are always equal."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)} if facts else None)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with reading(path, AGAIN), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def load_finite(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; UserError where one is not finite."""
    tensors = load_tensors(path)
    lost = [key for key, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    refuse(lost, f"{path}: {min(lost, default='')} has values that are not finite; make or get it again")
    return tensors


def facts_of(path: Path) -> dict[str, str]:
    """What the header of a file of tensors says."""
    with reading(path, AGAIN), safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("facts", "{}"))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state of a training: tensors, numbers, and dicts and lists of them."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict | None:
    """What save_checkpoint wrote; None where there is no file."""
    if not path.is_file():
        return None
    with reading(path, "remove it to train from the start"):
        with zipfile.ZipFile(path) as file:  # PyTorch does not look at the checksums of its own files
            if (broken := file.testzip()) is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
